//! Enrolment, release, and agents that come and go.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::time::Duration;

use mesh_agent::ebpf::{
    self, Capture, CaptureError, CaptureOptions, Claim, EnrolRequest, Place, PlaceIdentity,
};
use mesh_tests::{Netns, shell, until};

use crate::world::{
    FAMILIES, OUT4, POD4, World, accept, at, connect, enrol, exchange, ip, keeper, try_accept,
};

#[test]
fn without_an_agent_a_holding_workload_is_cut_off_at_once() {
    let world = World::new();
    let agent = world.enrol(true);
    let app = world
        .pod
        .enter(|| TcpListener::bind(at("::", 8080)))
        .unwrap()
        .unwrap();
    let server = world
        .outside
        .enter(|| TcpListener::bind(at("::", 80)))
        .unwrap()
        .unwrap();
    agent.die(&world.capture);
    for (pod, out) in FAMILIES {
        let error = world.pod.enter(|| connect(at(out, 80))).unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let error = world
            .outside
            .enter(|| connect(at(pod, 8080)))
            .unwrap()
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
    for listener in [&app, &server] {
        try_accept(listener, Duration::from_millis(1)).unwrap_err();
    }
    assert_eq!(world.counter("held_outbound"), 2);
    assert_eq!(world.counter("held_inbound"), 2);
}

#[test]
fn without_an_agent_an_open_workload_goes_on_unmeshed() {
    let world = World::new();
    let agent = world.enrol(false);
    let app = world
        .pod
        .enter(|| TcpListener::bind(at("::", 8080)))
        .unwrap()
        .unwrap();
    let server = world
        .outside
        .enter(|| TcpListener::bind(at("::", 80)))
        .unwrap()
        .unwrap();
    agent.die(&world.capture);
    for (pod, out) in FAMILIES {
        let mut client = world.pod.enter(|| connect(at(out, 80))).unwrap().unwrap();
        exchange(&mut client, &mut accept(&server).0);
        let mut client = world.outside.enter(|| connect(at(pod, 8080))).unwrap().unwrap();
        exchange(&mut client, &mut accept(&app).0);
    }
    assert_eq!(world.counter("passed_open_outbound"), 2);
    assert_eq!(world.counter("passed_open_inbound"), 2);
}

#[test]
fn an_agent_that_hangs_counts_as_gone() {
    let world = World::new();
    let _agent = world.enrol(true);
    let World { runtime, pod, .. } = &world;
    assert!(pod.enter(|| connect(at(OUT4[0], 80))).unwrap().is_ok());
    // A runtime whose only worker is busy beats no more.
    let (resume, stuck) = std::sync::mpsc::sync_channel::<()>(0);
    runtime.spawn(async move {
        let _ = stuck.recv();
    });
    until("the silence to be noticed", Duration::from_secs(20), || {
        let refused = pod.enter(|| connect(at(OUT4[0], 80))).unwrap().err()?;
        (refused.kind() == io::ErrorKind::ConnectionRefused).then_some(())
    })
    .unwrap();
    drop(resume);
    until("the agent to be taken back", Duration::from_secs(5), || {
        pod.enter(|| connect(at(OUT4[0], 80))).unwrap().ok()
    })
    .unwrap();
}

#[test]
fn the_next_agent_takes_over_and_nothing_is_there_twice() {
    let world = World::new();
    let agent = world.enrol(true);
    let before = world.capture.state();
    agent.die(&world.capture);
    let refused = world.pod.enter(|| connect(at(OUT4[0], 80))).unwrap().unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);

    let next = Capture::start(&CaptureOptions::new(world.run.bpffs().join("agent"))).unwrap();
    let _keeper = keeper(&next);
    let agent = enrol(&next, &world.pod, true);
    assert!(next.forget_unknown(&[agent.enrolment.key()]).unwrap().is_empty());
    let after = next.state();
    let ids = |state: &ebpf::CaptureState| {
        let mut links: Vec<_> = state
            .links
            .iter()
            .map(|link| (link.name.clone(), link.link_id))
            .collect();
        links.sort();
        links
    };
    assert_eq!(ids(&before), ids(&after), "links stay");
    assert_eq!(after.links.len(), 10, "nine hooks and one workload");
    for link in &before.links {
        let updated = after.links.iter().find(|other| other.name == link.name).unwrap();
        assert_ne!(updated.program_id, link.program_id, "programs are replaced");
    }
    let (old, new) = (&before.workloads[0], &after.workloads[0]);
    assert_eq!(
        (old.dns_v4_port, &old.dns_v6_ports),
        (new.dns_v4_port, &new.dns_v6_ports)
    );
    assert_eq!(after.workloads.len(), 1);

    let mut app = world.pod.enter(|| connect(at(OUT4[0], 80))).unwrap().unwrap();
    let (mut agents, wanted) = agent.accept();
    assert_eq!(wanted, Some(at(OUT4[0], 80)));
    exchange(&mut app, &mut agents);
    assert_eq!(
        next.counters().unwrap(),
        world.capture.counters().unwrap(),
        "one set of maps"
    );
}

#[test]
fn a_released_workload_is_as_before() {
    let world = World::new();
    let agent = world.enrol(true);
    assert_eq!(world.capture.state().links.len(), 10);
    agent.enrolment.release().unwrap();
    let state = world.capture.state();
    assert_eq!(state.links.len(), 9);
    assert!(state.workloads.is_empty());
    assert!(state.maps.iter().all(|map| map.entries == 0), "{:?}", state.maps);
    let server = world
        .outside
        .enter(|| TcpListener::bind(at(OUT4[0], 80)))
        .unwrap()
        .unwrap();
    let mut client = world.pod.enter(|| connect(at(OUT4[0], 80))).unwrap().unwrap();
    exchange(&mut client, &mut accept(&server).0);
    assert_eq!(world.counter("captured_tcp"), 0);
}

#[test]
fn what_vanished_while_no_agent_was_there_is_forgotten() {
    let world = World::new();
    world.enrol(true).die(&world.capture);
    assert_eq!(world.capture.state().workloads.len(), 1);
    assert_eq!(world.capture.forget_unknown(&[]).unwrap().len(), 1);
    let state = world.capture.state();
    assert!(state.workloads.is_empty());
    assert_eq!(state.links.len(), 9);
}

#[test]
fn the_choice_can_change_while_the_agent_serves() {
    let world = World::new();
    let agent = world.enrol(true);
    agent.enrolment.update(&[ip(POD4)], false).unwrap();
    let workload = world.capture.state().workloads.remove(0);
    assert!(!workload.hold);
    assert_eq!(workload.addresses, [ip(POD4)]);
    assert_eq!(
        workload.outbound_port,
        agent.listeners.outbound.local_addr().unwrap().port()
    );
    let server = world
        .outside
        .enter(|| TcpListener::bind(at("::", 80)))
        .unwrap()
        .unwrap();
    // IPv6 is none of ours any more.
    let _v6 = world
        .pod
        .enter(|| connect(at(FAMILIES[1].1, 80)))
        .unwrap()
        .unwrap();
    accept(&server);
    assert_eq!(world.counter("passed_no_address"), 1);
    agent.die(&world.capture);
    let _v4 = world.pod.enter(|| connect(at(OUT4[0], 80))).unwrap().unwrap();
    accept(&server);
}

#[test]
fn a_place_that_cannot_be_enrolled_says_why() {
    let world = World::new();
    let attempt = |place: Place, address: &str| {
        let request = EnrolRequest {
            place,
            addresses: vec![ip(address)],
            hold: true,
        };
        world.capture.enrol(request).map(drop).unwrap_err()
    };
    let error = attempt(Place::NetnsPath("/run/netns/no-such".into()), POD4);
    assert!(matches!(error, CaptureError::Namespace { .. }), "{error}");
    let error = attempt(Place::NetnsPath("/etc/hostname".into()), POD4);
    assert!(matches!(error, CaptureError::Namespace { .. }), "{error}");
    let error = attempt(Place::NetnsPath(world.pod.path()), "10.9.9.9");
    let text = error.to_string();
    assert!(text.contains("10.9.9.9") && text.contains(POD4), "{text}");
    shell::ip(world.pod.name(), &["link set lo down".to_owned()]).unwrap();
    let error = attempt(Place::NetnsPath(world.pod.path()), POD4);
    assert!(matches!(error, CaptureError::LoopbackDown { .. }), "{error}");
    assert!(world.capture.state().workloads.is_empty());
}

#[test]
fn another_namespace_under_the_same_name_is_noticed() {
    let world = World::new();
    let agent = world.enrol(true);
    let path = world.pod.path();
    assert_eq!(
        PlaceIdentity::of(&Place::NetnsPath(path.clone())).unwrap(),
        agent.enrolment.identity()
    );
    let name = world.pod.name().to_owned();
    let other = {
        // Takes the name away from the namespace, which lives on for as long as it is open.
        let World {
            pod,
            outside: _outside,
            ..
        } = world;
        drop(pod);
        Netns::create(&name).unwrap()
    };
    assert_ne!(
        PlaceIdentity::of(&Place::NetnsPath(other.path())).unwrap(),
        agent.enrolment.identity()
    );
}

#[test]
fn uninstall_leaves_nothing_but_spares_the_living() {
    let world = World::new();
    let folder = world.run.bpffs().join("agent");
    let stranger = world.run.bpffs().join("stranger");
    fs::create_dir(&stranger).unwrap();
    let agent = world.enrol(true);
    assert!(matches!(ebpf::uninstall(&folder), Err(CaptureError::AgentAlive)));
    agent.die(&world.capture);
    let removed = ebpf::uninstall(&folder).unwrap();
    assert_eq!(removed.len(), 10 + 12, "{removed:?}");
    assert!(!folder.exists());
    assert!(stranger.exists());
    let server = world
        .outside
        .enter(|| TcpListener::bind(at(OUT4[0], 80)))
        .unwrap()
        .unwrap();
    let _client = world.pod.enter(|| connect(at(OUT4[0], 80))).unwrap().unwrap();
    accept(&server);
    assert!(ebpf::uninstall(&folder).unwrap().is_empty(), "twice is no error");
}

#[test]
fn uninstall_spares_an_agent_by_its_claim_alone() {
    let world = World::new();
    let folder = world.run.bpffs().join("agent");
    let claim = Claim::on(&folder).unwrap();
    world.enrol(true).die(&world.capture);
    // Of another layout, and without workloads: nothing that this program reads says that it lives.
    fs::rename(folder.join("v2"), folder.join("v1")).unwrap();
    let links = || fs::read_dir(folder.join("v1/links")).unwrap().count();
    let before = links();
    assert!(matches!(ebpf::uninstall(&folder), Err(CaptureError::AgentAlive)));
    assert!(before > 0 && links() == before);
    drop(claim);
    assert!(!ebpf::uninstall(&folder).unwrap().is_empty());
    assert!(!folder.exists());
}

#[test]
fn an_agent_of_another_layout_takes_over_without_a_gap() {
    let world = World::new();
    let folder = world.run.bpffs().join("agent");
    let server = world
        .outside
        .enter(|| TcpListener::bind(at("::", 80)))
        .unwrap()
        .unwrap();
    world.enrol(true).die(&world.capture);
    // What is there becomes what an agent of another layout left.
    fs::rename(folder.join("v2"), folder.join("v1")).unwrap();
    let held = || {
        for (pod, out) in FAMILIES {
            let out = world.pod.enter(|| connect(at(out, 80))).unwrap().unwrap_err();
            assert_eq!(out.kind(), io::ErrorKind::ConnectionRefused);
            let inward = world.outside.enter(|| connect(at(pod, 80))).unwrap().unwrap_err();
            assert_eq!(inward.kind(), io::ErrorKind::ConnectionRefused);
        }
    };
    held();
    let next = Capture::start(&CaptureOptions::new(&folder)).unwrap();
    let _keeper = keeper(&next);
    held();
    // Others may still wait to be taken over, for as long as they cannot be.
    let agent = enrol(&next, &world.pod, true);
    assert!(folder.join("v1").exists());
    for (pod, out) in FAMILIES {
        let mut client = world.pod.enter(|| connect(at(out, 80))).unwrap().unwrap();
        let (mut agents, wanted) = agent.accept();
        assert_eq!(wanted, Some(at(out, 80)));
        exchange(&mut client, &mut agents);
        let mut client = world.outside.enter(|| connect(at(pod, 80))).unwrap().unwrap();
        let (mut agents, _, to) = agent.accept_inbound();
        assert_eq!(to, at(pod, 80));
        exchange(&mut client, &mut agents);
    }
    assert!(next.forget_unknown(&[agent.enrolment.key()]).unwrap().is_empty());
    assert!(!folder.join("v1").exists());
    try_accept(&server, Duration::from_millis(1)).unwrap_err();
}

#[test]
fn strays_under_our_folder_go_when_an_agent_starts() {
    let world = World::new();
    let folder = world.run.bpffs().join("agent");
    let maps = folder.join("v2/maps");
    let old = folder.join("v0/maps");
    fs::create_dir_all(&old).unwrap();
    fs::rename(maps.join("COUNTERS"), old.join("COUNTERS")).unwrap();
    fs::rename(maps.join("REFUSED"), maps.join("UNKNOWN")).unwrap();
    let next = Capture::start(&CaptureOptions::new(&folder)).unwrap();
    assert!(!maps.join("UNKNOWN").exists());
    assert!(next.forget_unknown(&[]).unwrap().is_empty());
    assert!(!folder.join("v0").exists());
    assert!(next.counters().unwrap().iter().all(|(_, count)| *count == 0));
}

/// They are megabytes, and no program of ours has a use for them.
#[test]
fn the_kernels_types_are_not_read_again_for_each_workload() {
    let world = World::new();
    let folder = world.run.bpffs().join("other");
    let (another, to_start) = reading(|| Capture::start(&CaptureOptions::new(&folder)).unwrap());
    // This much is read once: so the count sees it.
    let types = fs::metadata("/sys/kernel/btf/vmlinux").unwrap().len();
    assert!(to_start >= types, "{to_start} of {types} bytes");
    let (_agent, to_enrol) = reading(|| enrol(&another, &world.pod, true));
    assert!(to_enrol < types / 16, "{to_enrol} of {types} bytes");
}

/// What it returns, and how many bytes this thread read meanwhile, from whatever there is.
fn reading<T>(what: impl FnOnce() -> T) -> (T, u64) {
    let before = read_by_this_thread();
    let returned = what();
    (returned, read_by_this_thread() - before)
}

fn read_by_this_thread() -> u64 {
    let counts = fs::read_to_string("/proc/thread-self/io").unwrap();
    let read = counts.lines().find_map(|line| line.strip_prefix("rchar: "));
    read.unwrap().parse().unwrap()
}
