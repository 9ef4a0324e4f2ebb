//! Names asked for over UDP.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg};

use socket2::{Domain, Socket, Type};

use crate::world::{Agent, OUT4, OUT6, PATIENCE, POD4, POD6, World, at, ip};

#[test]
fn two_servers_asked_through_one_socket_answer_each_for_itself() {
    let world = World::new();
    let agent = world.enrol(true);
    let app = udp(&world, "0.0.0.0");
    for server in [OUT4[1], OUT4[2]] {
        app.send_to(server.as_bytes(), at(server, 53)).unwrap();
    }
    for server in [OUT4[1], OUT4[2]] {
        assert_eq!(answer_v4(&agent), Some((server.to_owned(), at(server, 53))));
    }
    assert_eq!(receive(&app), (format!("re {}", OUT4[1]), at(OUT4[1], 53)));
    assert_eq!(receive(&app), (format!("re {}", OUT4[2]), at(OUT4[2], 53)));
    assert_eq!(world.counter("captured_dns"), 2);
}

#[test]
fn a_connected_socket_sees_its_server() {
    let world = World::new();
    let agent = world.enrol(true);
    let app = unbound(&world, Domain::IPV4);
    app.connect(at(OUT4[2], 53)).unwrap();
    assert_eq!(app.peer_addr().unwrap(), at(OUT4[2], 53));
    assert_eq!(app.local_addr().unwrap().ip(), ip(POD4));
    app.send(b"who").unwrap();
    assert_eq!(answer_v4(&agent), Some(("who".to_owned(), at(OUT4[2], 53))));
    assert_eq!(receive(&app), ("re who".to_owned(), at(OUT4[2], 53)));
    // Then to somewhere else, which is not captured.
    let elsewhere = world
        .outside
        .enter(|| UdpSocket::bind(at(OUT4[0], 0)))
        .unwrap()
        .unwrap();
    app.connect(elsewhere.local_addr().unwrap()).unwrap();
    assert_eq!(app.peer_addr().unwrap(), elsewhere.local_addr().unwrap());
}

#[test]
fn a_server_with_an_ipv6_address() {
    let world = World::new();
    let agent = world.enrol(true);
    let app = udp(&world, "::");
    for server in [OUT6[1], OUT6[2]] {
        app.send_to(server.as_bytes(), at(server, 53)).unwrap();
    }
    for server in [OUT6[1], OUT6[2]] {
        assert_eq!(answer_v6(&agent), Some((server.to_owned(), at(server, 53))));
        assert_eq!(receive(&app), (format!("re {server}"), at(server, 53)));
    }
    let app = unbound(&world, Domain::IPV6);
    app.connect(at(OUT6[2], 53)).unwrap();
    assert_eq!(app.local_addr().unwrap().ip(), ip(POD6));
    assert_eq!(app.peer_addr().unwrap(), at(OUT6[2], 53));
    app.send(b"who").unwrap();
    assert_eq!(answer_v6(&agent), Some(("who".to_owned(), at(OUT6[2], 53))));
    assert_eq!(receive(&app), ("re who".to_owned(), at(OUT6[2], 53)));
}

#[test]
fn more_ipv6_servers_than_slots_pass_and_are_counted() {
    let world = World::new();
    let _agent = world.enrol(true);
    let app = udp(&world, "::");
    for number in 0..6 {
        app.send_to(b"who", at(&format!("fd77::5{number}"), 53)).unwrap();
    }
    assert_eq!(world.counter("captured_dns"), 4);
    assert_eq!(world.counter("passed_dns_slots_full"), 2);
    assert_eq!(world.entries("DNS_SERVERS"), 4);
}

#[test]
fn an_ipv4_server_asked_through_an_ipv6_socket() {
    let world = World::new();
    let agent = world.enrol(true);
    let app = udp(&world, "::");
    let mapped = at(&format!("::ffff:{}", OUT4[1]), 53);
    app.send_to(b"who", mapped).unwrap();
    assert_eq!(answer_v4(&agent), Some(("who".to_owned(), at(OUT4[1], 53))));
    assert_eq!(receive(&app), ("re who".to_owned(), mapped));
    let app = unbound(&world, Domain::IPV6);
    app.connect(mapped).unwrap();
    assert_eq!(app.local_addr().unwrap().ip(), ip(&format!("::ffff:{POD4}")));
    assert_eq!(app.peer_addr().unwrap(), mapped);
    app.send(b"who else").unwrap();
    assert_eq!(answer_v4(&agent), Some(("who else".to_owned(), at(OUT4[1], 53))));
    assert_eq!(receive(&app), ("re who else".to_owned(), mapped));
}

#[test]
fn the_agent_reaches_the_real_server() {
    let world = World::new();
    let agent = world.enrol(true);
    for server in [OUT4[2], OUT6[2]] {
        let real = world
            .outside
            .enter(|| UdpSocket::bind(at(server, 53)))
            .unwrap()
            .unwrap();
        real.set_read_timeout(Some(PATIENCE)).unwrap();
        let namespace = agent.enrolment.namespace();
        world.runtime.block_on(async {
            let ours = namespace.udp_socket(at(server, 53)).unwrap();
            ours.send(b"really?").await.unwrap();
            let (text, from) = receive(&real);
            assert_eq!((text.as_str(), from), ("really?", ours.local_addr().unwrap()));
            real.send_to(b"yes", from).unwrap();
            let mut buffer = [0; 16];
            let length = ours.recv(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], b"yes");
        });
    }
    assert_eq!(world.counter("captured_dns"), 0);
    assert_eq!(world.entries("OWN"), 0);
}

#[test]
fn datagrams_other_than_dns_are_not_touched() {
    let world = World::new();
    let _agent = world.enrol(true);
    let server = world
        .outside
        .enter(|| UdpSocket::bind(at(OUT4[0], 0)))
        .unwrap()
        .unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let app = udp(&world, "0.0.0.0");
    app.send_to(b"hello", server.local_addr().unwrap()).unwrap();
    let (_, from) = receive(&server);
    server.send_to(b"hello yourself", from).unwrap();
    assert_eq!(
        receive(&app),
        ("hello yourself".to_owned(), server.local_addr().unwrap())
    );
}

#[test]
fn strangers_cannot_reach_the_agents_resolver() {
    let world = World::new();
    let agent = world.enrol(true);
    let port = agent.listeners.dns_v4.local_addr().unwrap().port();
    let stranger = world
        .outside
        .enter(|| UdpSocket::bind(at("0.0.0.0", 0)))
        .unwrap()
        .unwrap();
    stranger.set_read_timeout(Some(PATIENCE)).unwrap();
    stranger.connect(at(POD4, port)).unwrap();
    stranger.send(b"who").unwrap();
    let refused = stranger.recv(&mut [0; 16]).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(world.counter("refused_listener"), 1);
    // One from inside who knows the port names no server.
    let app = udp(&world, "0.0.0.0");
    app.send_to(b"who", at("127.0.0.1", port)).unwrap();
    assert_eq!(answer_v4(&agent), None);
}

#[test]
fn without_an_agent_queries_are_held_or_pass() {
    for hold in [true, false] {
        let world = World::new();
        world.enrol(hold).die(&world.capture);
        let real = world
            .outside
            .enter(|| UdpSocket::bind(at(OUT4[2], 53)))
            .unwrap()
            .unwrap();
        real.set_read_timeout(Some(PATIENCE)).unwrap();
        let app = udp(&world, "0.0.0.0");
        let sent = app.send_to(b"who", at(OUT4[2], 53));
        let connected = app.connect(at(OUT4[2], 53));
        if hold {
            let refused = world.refused_datagram();
            assert_eq!(sent.unwrap_err().raw_os_error(), Some(refused));
            assert_eq!(connected.unwrap_err().raw_os_error(), Some(refused));
            assert_eq!(world.counter("held_outbound"), 2);
        } else {
            connected.unwrap();
            assert_eq!(receive(&real).0, "who");
            assert_eq!(world.counter("passed_open_outbound"), 2);
        }
    }
}

fn udp(world: &World, on: &str) -> UdpSocket {
    let socket = world.pod.enter(|| UdpSocket::bind(at(on, 0))).unwrap().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Connecting gives it its source.
fn unbound(world: &World, domain: Domain) -> UdpSocket {
    let socket = world
        .pod
        .enter(|| Socket::new(domain, Type::DGRAM, None))
        .unwrap()
        .unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.into()
}

fn receive(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 128];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (String::from_utf8(buffer[..length].to_vec()).unwrap(), from)
}

/// Takes the next query, and answers it from where it came in; returns it with the server that it was for, or
/// nothing if it was for none.
pub(crate) fn answer_v4(agent: &Agent) -> Option<(String, SocketAddr)> {
    let socket = &agent.listeners.dns_v4;
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 128];
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let mut control = nix::cmsg_space!(libc::in_pktinfo);
    let message = recvmsg::<SockaddrIn>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::empty(),
    )
    .unwrap();
    let info = message.cmsgs().unwrap().find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(info),
        _ => None,
    });
    let info = info.unwrap();
    let from = message.address.unwrap();
    let length = message.bytes;
    let token = IpAddr::from(u32::from_be(info.ipi_addr.s_addr).to_be_bytes());
    let local = SocketAddr::new(token, socket.local_addr().unwrap().port());
    let server = agent.enrolment.namespace().original_dns_server(local)?;
    let query = String::from_utf8(buffer[..length].to_vec()).unwrap();
    let answer = format!("re {query}");
    let source = libc::in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst: info.ipi_addr,
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    sendmsg(
        socket.as_raw_fd(),
        &[IoSlice::new(answer.as_bytes())],
        &[ControlMessage::Ipv4PacketInfo(&source)],
        MsgFlags::empty(),
        Some(&from),
    )
    .unwrap();
    Some((query, server))
}

/// The same over IPv6, where the socket tells the server.
fn answer_v6(agent: &Agent) -> Option<(String, SocketAddr)> {
    let mut buffer = [0; 128];
    let sockets = &agent.listeners.dns_v6;
    let (socket, length, from) = mesh_tests::until("a query", PATIENCE, || {
        sockets.iter().find_map(|socket| {
            let (length, from) = socket.recv_from(&mut buffer).ok()?;
            Some((socket, length, from))
        })
    })
    .unwrap();
    let server = agent
        .enrolment
        .namespace()
        .original_dns_server(socket.local_addr().unwrap())?;
    let query = String::from_utf8(buffer[..length].to_vec()).unwrap();
    socket.send_to(format!("re {query}").as_bytes(), from).unwrap();
    Some((query, server))
}
