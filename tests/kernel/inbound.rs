//! Connections that come to a workload.

use std::io;
use std::net::{SocketAddr, TcpListener};

use mesh_agent::sock;
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::{FAMILIES, OUT4, POD4, World, accept, at, connect, exchange, plain, without_multipath};

#[test]
fn a_connection_comes_to_the_agent_and_the_app_sees_the_client() {
    the_app_sees_the_client(&World::new());
}

pub(crate) fn the_app_sees_the_client(world: &World) {
    let agent = world.enrol(true);
    for (pod, _) in FAMILIES {
        // The app may listen on both families with one socket.
        let app = world.listen(at("::", 0));
        let service = at(pod, app.local_addr().unwrap().port());
        let mut client = world.outside.enter(|| connect(service)).unwrap().unwrap();
        let client_addr = client.local_addr().unwrap();
        let (mut agents, from, to) = agent.accept_inbound();
        assert_eq!((from, to), (client_addr, service));

        let onward = world.speak_for(&agent, from, to).into_std().unwrap();
        onward.set_nonblocking(false).unwrap();
        let mut onward = onward;
        let (mut served, peer) = accept(&app);
        assert_eq!(plain(peer), client_addr, "accept() names the client");
        assert_eq!(
            plain(served.peer_addr().unwrap()),
            client_addr,
            "getpeername() too"
        );
        assert_eq!(plain(served.local_addr().unwrap()), service);
        assert_eq!(
            onward.peer_addr().unwrap(),
            service,
            "the agent itself is not lied to"
        );
        exchange(&mut client, &mut agents);
        exchange(&mut onward, &mut served);
    }
    assert_eq!(world.counter("captured_inbound"), 2);
    world.wait_for_entries("FLOWS", 0);
    assert_eq!(world.entries("OWN"), 0);
}

#[test]
fn an_ipv4_app_sees_the_client() {
    the_ipv4_app_sees_the_client(&World::new());
}

pub(crate) fn the_ipv4_app_sees_the_client(world: &World) {
    let agent = world.enrol(true);
    let app = world.listen(at("0.0.0.0", 8080));
    let present = at(OUT4[1], 4321);
    let _onward = world.speak_for(&agent, present, at(POD4, 8080));
    assert_eq!(accept(&app).1, present);
}

#[test]
fn a_multipath_app_sees_the_client() {
    the_multipath_app_sees_the_client(&World::new());
}

pub(crate) fn the_multipath_app_sees_the_client(world: &World) {
    if without_multipath() {
        return;
    }
    let agent = world.enrol(true);
    let app = world
        .pod
        .enter(|| multipath_listener(at("::", 8080)))
        .unwrap()
        .unwrap();
    let present = at(OUT4[1], 4321);
    let _onward = world.speak_for(&agent, present, at(POD4, 8080));
    let (served, peer) = accept(&app);
    assert_eq!(plain(peer), present);
    assert_eq!(plain(served.peer_addr().unwrap()), present);
}

#[test]
fn a_failed_connection_to_the_app_leaves_nothing() {
    let world = World::new();
    let agent = world.enrol(true);
    let namespace = agent.enrolment.namespace();
    let nobody = at(POD4, 8081);
    let error = world
        .runtime
        .block_on(sock::connect(&*namespace, nobody, Some(at(OUT4[1], 4321))))
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    world.wait_for_entries("FLOWS", 0);
    assert_eq!(world.entries("OWN"), 0);
}

#[test]
fn any_port_leads_to_the_agent_whoever_listens_there() {
    let world = World::new();
    let agent = world.enrol(true);
    for (pod, _) in FAMILIES {
        let client = world.outside.enter(|| connect(at(pod, 15008))).unwrap().unwrap();
        let (_, from, to) = agent.accept_inbound();
        assert_eq!((from, to), (client.local_addr().unwrap(), at(pod, 15008)));
    }
}

#[test]
fn the_agents_listeners_cannot_be_dialled() {
    let world = World::new();
    let agent = world.enrol(true);
    for listener in [
        &agent.listeners.outbound,
        agent.listeners.inbound.as_ref().unwrap(),
    ] {
        let port = listener.local_addr().unwrap().port();
        for (pod, _) in FAMILIES {
            for netns in [&world.outside, &world.pod] {
                let error = netns.enter(|| connect(at(pod, port))).unwrap().unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
            }
        }
    }
    assert_eq!(world.counter("refused_listener"), 8);
    assert_eq!(world.counter("captured_inbound"), 0);
}

/// What Go programs listen with.
fn multipath_listener(on: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(on), Type::STREAM, Some(Protocol::MPTCP))?;
    socket.bind(&on.into())?;
    socket.listen(1)?;
    Ok(socket.into())
}
