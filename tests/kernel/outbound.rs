//! Connections that a workload makes.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use mesh_tests::until;
use nix::sys::resource::{Resource, setrlimit};
use socket2::{SockAddr, SockRef, Socket};

use crate::world::{
    FAMILIES, OUT4, OUT6, PATIENCE, POD4, World, accept, at, connect, exchange, ip, tcp_socket, try_accept,
};

#[test]
fn a_connection_comes_to_the_agent_and_both_ends_are_told_the_truth() {
    let world = World::new();
    let agent = world.enrol(true);
    for (pod, out) in FAMILIES {
        let mut app = world.pod.enter(|| connect(at(out, 80))).unwrap().unwrap();
        let (mut agents, wanted) = agent.accept();
        assert_eq!(wanted, Some(at(out, 80)));
        assert_eq!(app.peer_addr().unwrap(), at(out, 80));
        assert_eq!(app.local_addr().unwrap().ip(), ip(pod));
        exchange(&mut app, &mut agents);
    }
    assert_eq!(world.counter("captured_tcp"), 2);
    assert_eq!(world.entries("FLOWS"), 0);
}

#[test]
fn who_is_not_enrolled_is_not_touched() {
    let world = World::new();
    for (pod, out) in FAMILIES {
        let listener = world
            .outside
            .enter(|| TcpListener::bind(at(out, 0)))
            .unwrap()
            .unwrap();
        let server = listener.local_addr().unwrap();
        let mut app = world.pod.enter(|| connect(server)).unwrap().unwrap();
        let (mut served, peer) = accept(&listener);
        assert_eq!(app.peer_addr().unwrap(), server);
        assert_eq!(peer, app.local_addr().unwrap());
        assert_eq!(peer.ip(), ip(pod));
        exchange(&mut app, &mut served);
    }
    assert!(
        world
            .capture
            .counters()
            .unwrap()
            .iter()
            .all(|(_, count)| *count == 0)
    );
}

#[test]
fn a_connection_to_the_pod_itself_stays_inside() {
    let world = World::new();
    let _agent = world.enrol(true);
    for address in ["127.0.0.1", POD4, "::1", "fd77::2", "::ffff:127.0.0.1"] {
        let (mut app, mut server) = world
            .pod
            .enter(|| {
                let listener = TcpListener::bind(at(address, 0)).unwrap();
                let app = connect(listener.local_addr().unwrap()).unwrap();
                (app, accept(&listener).0)
            })
            .unwrap();
        assert_eq!(app.peer_addr().unwrap().ip(), ip(address));
        exchange(&mut app, &mut server);
    }
    assert_eq!(world.counter("passed_local"), 5);
    assert_eq!(world.counter("captured_tcp"), 0);
}

#[test]
fn a_connect_that_does_not_wait_ends_the_same_way() {
    let world = World::new();
    let agent = world.enrol(true);
    let socket = world.pod.enter(|| tcp_socket(at(OUT4[0], 80))).unwrap();
    socket.set_nonblocking(true).unwrap();
    match socket.connect(&at(OUT4[0], 80).into()) {
        Ok(()) => {}
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS)),
    }
    until("the connect to end", PATIENCE, || socket.peer_addr().ok()).unwrap();
    assert!(socket.take_error().unwrap().is_none());
    assert_eq!(peer(&socket), at(OUT4[0], 80));
    assert_eq!(agent.accept().1, Some(at(OUT4[0], 80)));
}

#[test]
fn a_second_connect_of_a_connected_socket_fails_and_changes_nothing() {
    let world = World::new();
    let agent = world.enrol(true);
    let socket = world.pod.enter(|| tcp_socket(at(OUT4[0], 80))).unwrap();
    socket.connect(&at(OUT4[0], 80).into()).unwrap();
    let error = socket.connect(&at(OUT4[1], 81).into()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EISCONN));
    assert_eq!(peer(&socket), at(OUT4[0], 80));
    assert_eq!(agent.accept().1, Some(at(OUT4[0], 80)));
}

#[test]
fn a_disconnected_socket_connects_anew_elsewhere() {
    let world = World::new();
    let agent = world.enrol(true);
    let socket = world.pod.enter(|| tcp_socket(at(OUT4[0], 80))).unwrap();
    socket.connect(&at(OUT4[0], 80).into()).unwrap();
    assert_eq!(agent.accept().1, Some(at(OUT4[0], 80)));
    disconnect(&socket);
    socket.connect(&at(OUT4[1], 81).into()).unwrap();
    assert_eq!(peer(&socket), at(OUT4[1], 81));
    assert_eq!(agent.accept().1, Some(at(OUT4[1], 81)));
    disconnect(&socket);
    // To the pod itself: nothing of before may show.
    let listener = world
        .pod
        .enter(|| TcpListener::bind(at("127.0.0.1", 0)))
        .unwrap()
        .unwrap();
    let local = listener.local_addr().unwrap();
    socket.connect(&local.into()).unwrap();
    assert_eq!(peer(&socket), local);
    accept(&listener);
    world.wait_for_entries("FLOWS", 0);
}

#[test]
fn a_bound_source_is_kept() {
    let world = World::new();
    let agent = world.enrol(true);
    for source in [at(POD4, 0), at(POD4, 23456), at("0.0.0.0", 23457)] {
        let socket = world.pod.enter(|| tcp_socket(source)).unwrap();
        socket.bind(&source.into()).unwrap();
        let bound = local(&socket);
        socket.connect(&at(OUT4[0], 80).into()).unwrap();
        assert_eq!(local(&socket), at(POD4, bound.port()));
        assert_eq!(agent.accept().1, Some(at(OUT4[0], 80)));
    }
}

#[test]
fn one_source_port_serves_several_destinations() {
    let world = World::new();
    let agent = world.enrol(true);
    for source in [at(POD4, 23456), at("fd77::2", 23456)] {
        let destinations = if source.is_ipv4() { OUT4 } else { OUT6 };
        let mut open = Vec::new();
        for out in destinations {
            let socket = world.pod.enter(|| tcp_socket(source)).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&source.into()).unwrap();
            socket.connect(&at(out, 80).into()).unwrap();
            assert_eq!(peer(&socket), at(out, 80));
            open.push(TcpStream::from(socket));
        }
        for (app, out) in open.iter_mut().zip(destinations) {
            let (mut agents, wanted) = agent.accept();
            assert_eq!(wanted, Some(at(out, 80)));
            exchange(app, &mut agents);
        }
    }
}

#[test]
fn ipv4_through_an_ipv6_socket_is_ipv4() {
    let world = World::new();
    let agent = world.enrol(true);
    let mapped = at(&format!("::ffff:{}", OUT4[0]), 80);
    let mut app = world.pod.enter(|| connect(mapped)).unwrap().unwrap();
    assert_eq!(app.peer_addr().unwrap(), mapped);
    assert_eq!(app.local_addr().unwrap().ip(), ip(&format!("::ffff:{POD4}")));
    let (mut agents, wanted) = agent.accept();
    assert_eq!(wanted, Some(at(OUT4[0], 80)));
    exchange(&mut app, &mut agents);
}

#[test]
fn what_was_sent_before_a_quick_close_arrives() {
    let world = World::new();
    let agent = world.enrol(true);
    let mut app = world.pod.enter(|| connect(at(OUT4[0], 80))).unwrap().unwrap();
    app.write_all(b"fire and forget").unwrap();
    let source = app.local_addr().unwrap();
    drop(app);
    // Only now, when nothing but a timer is left of the app's socket, does the agent find the time.
    until("the app's end to be over", PATIENCE, || {
        let sockets = world
            .pod
            .enter(|| fs::read_to_string("/proc/thread-self/net/tcp"))
            .unwrap()
            .unwrap();
        let port = format!(":{:04X}", source.port());
        let mut sockets = sockets
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        sockets
            .any(|fields| fields[1].ends_with(&port) && fields[5].starts_with("03:"))
            .then_some(())
    })
    .unwrap();
    assert_eq!(world.entries("FLOWS"), 1);
    let (mut agents, wanted) = agent.accept();
    assert_eq!(wanted, Some(at(OUT4[0], 80)));
    let mut text = String::new();
    agents.read_to_string(&mut text).unwrap();
    assert_eq!(text, "fire and forget");
    assert_eq!(world.entries("FLOWS"), 0);
}

#[test]
fn aborted_connections_leave_nothing() {
    let world = World::new();
    let agent = world.enrol(true);
    for number in 0..100 {
        let socket = world.pod.enter(|| tcp_socket(at(OUT4[0], 80))).unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&at(OUT4[0], 80).into());
        if number % 2 == 0 {
            // A reset instead of an orderly end.
            socket.set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
    until("every flow to be gone", Duration::from_secs(5), || {
        while let Ok((stream, peer)) = try_accept(&agent.listeners.outbound, Duration::from_millis(50)) {
            let local = stream.local_addr().unwrap();
            let _ = agent.enrolment.namespace().original_destination(peer, local);
        }
        (world.entries("FLOWS") == 0).then_some(())
    })
    .unwrap();
}

#[test]
fn a_connect_given_up_leaves_nothing() {
    let world = World::new();
    // A listener that lets one connection wait leaves the next ones unanswered.
    world
        .pod
        .enter(|| fs::write("/proc/sys/net/core/somaxconn", "1"))
        .unwrap()
        .unwrap();
    let agent = world.enrol(true);
    let to = at(OUT4[0], 80);
    let connected: Vec<_> = (0..2)
        .map(|_| world.pod.enter(|| connect(to)).unwrap().unwrap())
        .collect();
    until("the listener's queue to be full", PATIENCE, || {
        (waiting_for_accept(&agent.listeners.outbound) == 2).then_some(())
    })
    .unwrap();
    let given_up: Vec<_> = (0..2)
        .map(|_| {
            let socket = world.pod.enter(|| tcp_socket(to)).unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&to.into());
            assert!(socket.peer_addr().is_err());
            socket
        })
        .collect();
    assert_eq!(world.entries("FLOWS"), 4);
    drop(given_up);
    // On a busy machine the kernel ends what is closed a little later.
    world.wait_for_entries("FLOWS", 2);
    for _ in connected {
        assert_eq!(agent.accept().1, Some(to));
    }
    assert_eq!(world.entries("FLOWS"), 0);
}

/// Connections that a listener could hand out.
fn waiting_for_accept(listener: &TcpListener) -> u32 {
    // SAFETY: all zero is a valid `tcp_info`.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap();
    // SAFETY: `info` is `len` bytes.
    let result = unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    info.tcpi_unacked
}

#[test]
fn a_full_map_refuses_and_counts() {
    let world = World::with_flows(4);
    let agent = world.enrol(true);
    // So many that one of them would be hit by chance, if a refused connection could go astray to the pod itself.
    let decoys = world.pod.enter(|| decoys(4000)).unwrap();
    let attempts = 64;
    let results: Vec<_> = world
        .pod
        .enter(|| (0..attempts).map(|_| connect(at(OUT4[0], 80))).collect())
        .unwrap();
    let refused: Vec<_> = results
        .iter()
        .filter_map(|result| result.as_ref().err().map(io::Error::kind))
        .collect();
    assert!(
        refused
            .iter()
            .all(|kind| *kind == io::ErrorKind::ConnectionRefused),
        "{refused:?}"
    );
    assert_eq!(world.counter("refused_map_full"), refused.len() as u64);
    for _ in 0..attempts - refused.len() {
        assert_eq!(agent.accept().1, Some(at(OUT4[0], 80)));
    }
    assert!(try_accept(&agent.listeners.outbound, Duration::from_millis(1)).is_err());
    assert_eq!(world.entries("FLOWS"), 0);
    // With room again, connections succeed again.
    drop(world.pod.enter(|| connect(at(OUT4[0], 80))).unwrap().unwrap());
    drop(decoys);
}

/// Listeners on ports that redirected connections carry.
fn decoys(count: u16) -> Vec<TcpListener> {
    setrlimit(Resource::RLIMIT_NOFILE, 10_000, 10_000).unwrap();
    (2000..2000 + count)
        .filter_map(|port| TcpListener::bind(at("0.0.0.0", port)).ok())
        .collect()
}

#[test]
fn the_agents_own_connections_are_left_alone() {
    let world = World::new();
    let agent = world.enrol(true);
    let namespace = agent.enrolment.namespace();
    for (pod, out) in FAMILIES {
        let listener = world
            .outside
            .enter(|| TcpListener::bind(at(out, 0)))
            .unwrap()
            .unwrap();
        let to = listener.local_addr().unwrap();
        let stream = world
            .runtime
            .block_on(mesh_agent::sock::connect(&*namespace, to, None))
            .unwrap();
        assert_eq!(stream.local_addr().unwrap().ip(), ip(pod));
        assert_eq!(accept(&listener).1, stream.local_addr().unwrap());
    }
    assert_eq!(world.counter("passed_own"), 2);
    assert_eq!(world.entries("OWN"), 0);
}

#[test]
fn a_stranger_to_the_listener_has_no_destination() {
    let world = World::new();
    let agent = world.enrol(true);
    let port = agent.listeners.outbound.local_addr().unwrap().port();
    for address in ["127.0.0.1", POD4, "::1"] {
        let refused = world
            .pod
            .enter(|| connect(at(address, port)))
            .unwrap()
            .unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(world.counter("refused_listener"), 3);
}

fn peer(socket: &Socket) -> SocketAddr {
    socket.peer_addr().unwrap().as_socket().unwrap()
}

fn local(socket: &Socket) -> SocketAddr {
    socket.local_addr().unwrap().as_socket().unwrap()
}

/// `connect` to AF_UNSPEC.
fn disconnect(socket: &Socket) {
    // SAFETY: all zero is a valid address of the family AF_UNSPEC, and that is its length.
    let ((), unspecified) = unsafe {
        SockAddr::try_init(|_, length| {
            *length = libc::socklen_t::try_from(size_of::<libc::sockaddr>()).unwrap_or(16);
            Ok(())
        })
        .unwrap()
    };
    SockRef::from(socket).connect(&unspecified).unwrap();
}
