//! Sockets of kinds that capture must not leave hanging.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;

use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{
    OUT4, PATIENCE, POD4, World, accept, at, connect, exchange, ip, tcp_socket, without_multipath,
};

#[test]
fn a_socket_bound_to_a_device_passes_and_is_counted() {
    let world = World::new();
    let _agent = world.enrol(true);
    let listener = world
        .outside
        .enter(|| TcpListener::bind(at(OUT4[0], 0)))
        .unwrap()
        .unwrap();
    let server = listener.local_addr().unwrap();
    let socket = world.pod.enter(|| tcp_socket(server)).unwrap();
    socket.bind_device(Some(b"eth0")).unwrap();
    socket.connect_timeout(&server.into(), PATIENCE).unwrap();
    exchange(&mut socket.into(), &mut accept(&listener).0);
    assert_eq!(world.counter("passed_bound_device"), 1);
    assert_eq!(world.counter("captured_tcp"), 0);
}

#[test]
fn fast_open_is_captured() {
    let world = World::new();
    let agent = world.enrol(true);
    let to = at(OUT4[0], 80);
    // The first has no cookie to send and would get one, the second might use it.
    for _ in 0..2 {
        let socket = world.pod.enter(|| tcp_socket(to)).unwrap();
        socket
            .send_to_with_flags(b"early", &to.into(), libc::MSG_FASTOPEN)
            .unwrap();
        let app = TcpStream::from(socket);
        let (mut agents, wanted) = agent.accept();
        assert_eq!(wanted, Some(to));
        assert_eq!(app.peer_addr().unwrap(), to);
        let mut early = [0; 5];
        agents.read_exact(&mut early).unwrap();
        assert_eq!(&early, b"early");
    }
    assert_eq!(world.counter("captured_tcp"), 2);
}

#[test]
fn a_connect_deferred_by_fast_open_is_captured() {
    let world = World::new();
    let agent = world.enrol(true);
    let to = at(OUT4[0], 80);
    for _ in 0..2 {
        let socket = world.pod.enter(|| tcp_socket(to)).unwrap();
        set_fast_open_connect(&socket);
        socket.connect(&to.into()).unwrap();
        let mut app = TcpStream::from(socket);
        app.write_all(b"ping").unwrap();
        let (mut agents, wanted) = agent.accept();
        assert_eq!(wanted, Some(to));
        let mut bytes = [0; 4];
        agents.read_exact(&mut bytes).unwrap();
        assert_eq!(app.peer_addr().unwrap(), to);
    }
}

#[test]
fn multipath_tcp_is_captured() {
    a_captured_multipath_socket(&World::new());
}

pub(crate) fn a_captured_multipath_socket(world: &World) {
    if without_multipath() {
        return;
    }
    let agent = world.enrol(true);
    let to = at(OUT4[0], 80);
    let mut app = world.pod.enter(|| multipath(to)).unwrap().unwrap();
    app.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut agents, wanted) = agent.accept();
    assert_eq!(wanted, Some(to));
    exchange(&mut app, &mut agents);
    assert_eq!(app.local_addr().unwrap().ip(), ip(POD4));
    assert_eq!(app.peer_addr().unwrap(), to);
}

#[test]
fn two_agents_on_one_machine_know_only_their_own() {
    let (one, other) = (World::new(), World::new());
    let (one_agent, _other_agent) = (one.enrol(true), other.enrol(true));
    let _app = one.pod.enter(|| connect(at(OUT4[0], 80))).unwrap().unwrap();
    assert_eq!(one_agent.accept().1, Some(at(OUT4[0], 80)));
    assert_eq!(one.counter("captured_tcp"), 1);
    assert!(
        other
            .capture
            .counters()
            .unwrap()
            .iter()
            .all(|(_, count)| *count == 0)
    );
}

fn multipath(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::MPTCP))?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    Ok(socket.into())
}

fn set_fast_open_connect(socket: &Socket) {
    let on: libc::c_int = 1;
    // SAFETY: an int, of its length.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN_CONNECT,
            (&raw const on).cast(),
            4,
        )
    };
    assert_eq!(result, 0);
}
