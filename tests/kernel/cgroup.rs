//! Workloads in the host's network namespace, known by their cgroup. The pod's namespace plays the host's.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use mesh_agent::ebpf::{Capture, CaptureOptions, EnrolRequest, Place, PlaceIdentity};
use mesh_tests::{Run, until};

use crate::node::cgroup2;
use crate::world::{Agent, FAMILIES, OUT4, PATIENCE, POD4, POD6, World, accept, at, connect, ip};

#[test]
fn a_cgroups_connections_come_to_the_agent_and_no_others() {
    let world = World::new();
    let cgroup = Cgroup::create(&world.run);
    world
        .pod
        .enter(|| {
            let (capture, agent) = start(&world, &cgroup, true);
            for (host, out) in FAMILIES {
                let app = cgroup.spawn(&format!("exec 3<>/dev/tcp/{out}/80; echo ping >&3; cat <&3"));
                let (mut agents, wanted) = agent.accept();
                assert_eq!(wanted, Some(at(out, 80)));
                let peer = agents.peer_addr().unwrap();
                assert_eq!(
                    peer.ip().to_canonical(),
                    ip(host),
                    "the source is the host's address"
                );
                let mut ping = [0; 5];
                agents.read_exact(&mut ping).unwrap();
                assert_eq!(&ping, b"ping\n");
                agents.write_all(b"pong").unwrap();
                drop(agents);
                assert_eq!(finish(app).stdout, b"pong");
            }
            // A process beside it is none of ours.
            let server = world
                .outside
                .enter(|| TcpListener::bind(at(OUT4[0], 81)))
                .unwrap()
                .unwrap();
            let stranger = bash(&format!("exec 3<>/dev/tcp/{}/81", OUT4[0])).spawn().unwrap();
            accept(&server);
            assert!(finish(stranger).status.success());
            // Nor is one in it that has a namespace of its own.
            let elsewhere = world
                .outside
                .enter(|| TcpListener::bind(at(OUT4[1], 82)))
                .unwrap()
                .unwrap();
            let script = format!("exec 3<>/dev/tcp/{}/82", OUT4[1]);
            let contained = world.outside.enter(|| cgroup.spawn(&script)).unwrap();
            accept(&elsewhere);
            assert!(finish(contained).status.success());
            let counters = capture.counters().unwrap();
            assert_eq!(
                counters
                    .iter()
                    .find(|(name, _)| *name == "captured_tcp")
                    .unwrap()
                    .1,
                2
            );
            agent.enrolment.release().unwrap();
            assert_eq!(capture.state().links.len(), 9);
        })
        .unwrap();
}

#[test]
fn a_cgroups_queries_come_to_the_agent() {
    let world = World::new();
    let cgroup = Cgroup::create(&world.run);
    world
        .pod
        .enter(|| {
            let (_capture, agent) = start(&world, &cgroup, true);
            let script = format!("exec 3<>/dev/udp/{}/53; echo -n who >&3; head -c6 <&3", OUT4[2]);
            let app = cgroup.spawn(&script);
            assert_eq!(
                crate::dns::answer_v4(&agent),
                Some(("who".to_owned(), at(OUT4[2], 53)))
            );
            assert_eq!(finish(app).stdout, b"re who");
        })
        .unwrap();
}

#[test]
fn without_an_agent_a_cgroup_is_held_or_passes() {
    let world = World::new();
    let cgroup = Cgroup::create(&world.run);
    let server = world
        .outside
        .enter(|| TcpListener::bind(at(OUT4[0], 80)))
        .unwrap()
        .unwrap();
    let script = format!("exec 3<>/dev/tcp/{}/80", OUT4[0]);
    world
        .pod
        .enter(|| {
            let (capture, agent) = start(&world, &cgroup, true);
            agent.die(&capture);
            let refused = finish(cgroup.spawn(&script));
            assert!(
                String::from_utf8_lossy(&refused.stderr).contains("refused"),
                "{refused:?}"
            );
            enrol(&capture, &cgroup, false).die(&capture);
            assert!(finish(cgroup.spawn(&script)).status.success());
            accept(&server);
            assert_eq!(capture.state().links.len(), 9 + 8, "nothing is there twice");
        })
        .unwrap();
}

#[test]
fn a_hook_that_hangs_on_a_part_of_the_hierarchy_is_made_anew() {
    let world = World::new();
    let cgroup = Cgroup::create(&world.run);
    let bpffs = world
        .pod
        .enter(|| {
            let (capture, agent) = start(&world, &cgroup, true);
            let state = capture.state();
            let links = state.bpffs.join(state.layout).join("links");
            // As an agent leaves it to which this cgroup was the root.
            for hook in ["connect4", "connect6"] {
                let own = format!("workload-{:x}-{hook}", agent.enrolment.key());
                fs::rename(links.join(own), links.join(hook)).unwrap();
            }
            agent.enrolment.release().unwrap();
            state.bpffs
        })
        .unwrap();
    let next = Capture::start(&CaptureOptions::new(bpffs)).unwrap();
    let agent = crate::world::enrol(&next, &world.pod, true);
    for (_, out) in FAMILIES {
        let _app = world.pod.enter(|| connect(at(out, 80))).unwrap().unwrap();
        assert_eq!(agent.accept().1, Some(at(out, 80)));
    }
}

#[test]
fn a_cgroup_made_anew_is_another_place() {
    let world = World::new();
    let cgroup = Cgroup::create(&world.run);
    let place = Place::Cgroup(cgroup.path.clone());
    let before = PlaceIdentity::of(&place).unwrap();
    fs::remove_dir(&cgroup.path).unwrap();
    assert!(PlaceIdentity::of(&place).is_err());
    fs::create_dir(&cgroup.path).unwrap();
    assert_ne!(PlaceIdentity::of(&place).unwrap(), before);
}

/// An agent at home in the pod's namespace: called from there.
pub(crate) fn start(world: &World, cgroup: &Cgroup, hold: bool) -> (Capture, Agent) {
    let capture = Capture::start(&CaptureOptions::new(world.run.bpffs().join("host"))).unwrap();
    let agent = enrol(&capture, cgroup, hold);
    (capture, agent)
}

fn enrol(capture: &Capture, cgroup: &Cgroup, hold: bool) -> Agent {
    let request = EnrolRequest {
        place: Place::Cgroup(cgroup.path.clone()),
        addresses: vec![ip(POD4), ip(POD6)],
        hold,
    };
    let (enrolment, listeners) = capture.enrol(request).unwrap();
    assert!(listeners.inbound.is_none());
    Agent { enrolment, listeners }
}

/// A cgroup of this test, removed when dropped.
pub(crate) struct Cgroup {
    pub(crate) path: PathBuf,
}

impl Cgroup {
    pub(crate) fn create(run: &Run) -> Self {
        let path = cgroup2().join(run.name());
        fs::create_dir(&path).unwrap();
        Self { path }
    }

    /// Runs a script in here, in the calling thread's network namespace.
    fn spawn(&self, script: &str) -> Child {
        let join = format!("echo $$ > {}/cgroup.procs; {script}", self.path.display());
        bash(&join).spawn().unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that just ended may take a moment to leave.
        if let Err(error) = until("the cgroup to be empty", PATIENCE, || {
            fs::remove_dir(&self.path).ok()
        }) {
            eprintln!("{} stays: {error:#}", self.path.display());
        }
    }
}

fn bash(script: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["5", "bash", "-c", script]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn finish(child: Child) -> Output {
    child.wait_with_output().unwrap()
}
