//! The fast path: what two workloads of one node say to each other without the agent.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use mesh_agent::ebpf::{Capture, CaptureOptions, EnrolRequest, FastPair, FastTraffic, Place};
use mesh_tests::{Netns, off, until};
use socket2::{Protocol, SockRef, Socket, Type};

use crate::world::{
    Agent, OUT4, OUT6, PATIENCE, POD4, POD6, World, accept, at, connect, exchange, ip, plain, tcp_socket,
    try_accept, without_multipath,
};

/// Of both families: (a service's address, the server's own).
const DESTINATIONS: [(&str, &str); 2] = [("10.96.0.9", OUT4[0]), ("fd96::9", OUT6[0])];

/// A client and a server, both enrolled, and what the server's application listens on.
struct Near {
    client: Agent,
    server: Agent,
    app: TcpListener,
    world: World,
}

/// Nothing where the kernel has no fast path: there agents open none, and what would take it goes through them.
fn with_fast_path(world: World) -> Option<World> {
    if world.capture.features().fast_path() {
        return Some(world);
    }
    let near = Near::make(world);
    for (service, _) in DESTINATIONS {
        let _client = near.connect(at(service, 80)).unwrap();
        assert_eq!(near.client.accept().1, Some(at(service, 80)));
    }
    off("fast path").unwrap();
    None
}

impl Near {
    fn new(world: World) -> Option<Self> {
        with_fast_path(world).map(Self::make)
    }

    fn make(world: World) -> Self {
        let client = world.enrol(true);
        let server = enrol(&world.capture, &world.outside, &[OUT4[0], OUT6[0]]);
        let app = listen(&world.outside);
        Self {
            client,
            server,
            app,
            world,
        }
    }

    /// Where the application listens.
    fn server_at(&self, address: &str) -> SocketAddr {
        at(address, self.app.local_addr().unwrap().port())
    }

    fn open(&self, destination: SocketAddr, backend: SocketAddr) {
        let backends = [(self.server.enrolment.key(), backend)];
        self.world
            .capture
            .open_fast_path(self.client.enrolment.key(), destination, &backends)
            .unwrap();
    }

    fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.world.pod.enter(|| connect(to)).unwrap()
    }

    fn assert_agents_idle(&self) {
        for listener in [
            &self.client.listeners.outbound,
            self.server.listeners.inbound.as_ref().unwrap(),
        ] {
            try_accept(listener, Duration::from_millis(1)).unwrap_err();
        }
    }
}

fn enrol(capture: &Capture, netns: &Netns, addresses: &[&str]) -> Agent {
    let request = EnrolRequest {
        place: Place::NetnsPath(netns.path()),
        addresses: addresses.iter().map(|address| ip(address)).collect(),
        hold: true,
    };
    let (enrolment, listeners) = capture.enrol(request).unwrap();
    Agent { enrolment, listeners }
}

fn listen(netns: &Netns) -> TcpListener {
    netns.enter(|| TcpListener::bind(at("::", 0))).unwrap().unwrap()
}

/// What was counted and not reported yet.
fn report(capture: &Capture) -> Vec<(FastPair, FastTraffic)> {
    let mut all = Vec::new();
    capture.report_fast_traffic(|pair, traffic| {
        all.push((pair, traffic));
        true
    });
    all
}

fn wait_for_closed(capture: &Capture, connections: u64) -> FastTraffic {
    let mut sum = FastTraffic::default();
    until("the connections to be counted as closed", PATIENCE, || {
        for (_, traffic) in report(capture) {
            sum.opened += traffic.opened;
            sum.closed += traffic.closed;
            sum.received += traffic.received;
            sum.sent += traffic.sent;
        }
        (sum.closed == connections).then_some(())
    })
    .unwrap();
    sum
}

#[test]
fn both_ends_meet_and_are_told_the_truth() {
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    for (service, own) in DESTINATIONS {
        for destination in [at(service, 80), near.server_at(own)] {
            near.open(destination, near.server_at(own));
            let mut client = near.connect(destination).unwrap();
            let (mut served, peer) = accept(&near.app);
            assert_eq!(client.peer_addr().unwrap(), destination);
            let seen = client.local_addr().unwrap();
            assert_eq!(seen.ip(), ip(if own.contains(':') { POD6 } else { POD4 }));
            assert_eq!(plain(peer), seen);
            assert_eq!(plain(served.peer_addr().unwrap()), seen);
            assert_eq!(plain(served.local_addr().unwrap()), near.server_at(own));
            exchange(&mut client, &mut served);
            let pair = FastPair {
                client: near.client.enrolment.key(),
                server: near.server.enrolment.key(),
                destination,
            };
            let opened = FastTraffic {
                opened: 1,
                ..FastTraffic::default()
            };
            assert_eq!(report(&near.world.capture), [(pair, opened)]);
            drop(served);
            drop(client);
            let closed = FastTraffic {
                opened: 0,
                closed: 1,
                received: 4,
                sent: 4,
            };
            assert_eq!(wait_for_closed(&near.world.capture, 1), closed);
        }
    }
    near.assert_agents_idle();
    assert_eq!(near.world.counter("fast_path"), 4);
    assert_eq!(near.world.counter("captured_tcp"), 0);
    assert_eq!(near.world.entries("FLOWS"), 0);
}

/// However a connection ends, what is counted are the bytes of the applications.
#[test]
fn bytes_are_counted_whoever_ends_it() {
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    let to = at(DESTINATIONS[0].0, 80);
    near.open(to, near.server_at(OUT4[0]));
    let reset = |stream: &TcpStream| SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
    for (client_first, abort) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut client = near.connect(to).unwrap();
        let (mut served, _) = accept(&near.app);
        exchange(&mut client, &mut served);
        let (first, last) = if client_first {
            (client, served)
        } else {
            (served, client)
        };
        if abort {
            reset(&first);
        }
        drop(first);
        // What the other side does about it comes after.
        let _ = io::copy(&mut &last, &mut io::sink());
        drop(last);
        let counted = wait_for_closed(&near.world.capture, 1);
        assert_eq!((counted.received, counted.sent), (4, 4), "{client_first} {abort}");
    }
}

#[test]
fn what_is_not_open_goes_to_the_agent() {
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    let (service, own) = DESTINATIONS[0];
    let (open, other) = (at(service, 80), at(service, 81));
    near.open(open, near.server_at(own));
    let _other = near.connect(other).unwrap();
    assert_eq!(near.client.accept().1, Some(other));
    near.world
        .capture
        .close_fast_path(near.client.enrolment.key(), open)
        .unwrap();
    let _closed = near.connect(open).unwrap();
    assert_eq!(near.client.accept().1, Some(open));
    assert_eq!(near.world.counter("fast_path"), 0);
}

#[test]
fn a_flow_that_has_ended_lets_nobody_in_any_more() {
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    let server = near.server_at(OUT4[0]);
    near.open(server, server);
    let from = || {
        let socket = tcp_socket(server);
        socket.set_reuse_address(true).unwrap();
        socket.bind(&at(POD4, 45_000).into()).unwrap();
        socket.connect_timeout(&server.into(), PATIENCE).unwrap();
        TcpStream::from(socket)
    };
    let mut client = near.world.pod.enter(from).unwrap();
    let mut served = accept(&near.app).0;
    exchange(&mut client, &mut served);
    // Neither end waits then.
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop((client, served));
    wait_for_closed(&near.world.capture, 1);

    near.client.enrolment.release().unwrap();
    let _stranger = near.world.pod.enter(from).unwrap();
    let (_, peer, to) = near.server.accept_inbound();
    assert_eq!((peer, to), (at(POD4, 45_000), server));
    assert_eq!(near.world.counter("fast_path"), 1);
}

#[test]
fn a_socket_that_is_connected_anew_is_let_in_by_no_earlier_way() {
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    let server = near.server_at(OUT4[0]);
    near.open(server, server);
    let socket = near.world.pod.enter(|| tcp_socket(server)).unwrap();
    socket.connect_timeout(&server.into(), PATIENCE).unwrap();
    accept(&near.app);

    near.client.enrolment.release().unwrap();
    disconnect(&socket);
    socket.connect_timeout(&server.into(), PATIENCE).unwrap();
    let (_, _, to) = near.server.accept_inbound();
    assert_eq!(to, server);
    assert_eq!(near.world.counter("fast_path"), 1);
    try_accept(&near.app, Duration::from_millis(1)).unwrap_err();
}

/// What `connect` with the family AF_UNSPEC does.
fn disconnect(socket: &Socket) {
    let nowhere = libc::sockaddr {
        sa_family: libc::sa_family_t::try_from(libc::AF_UNSPEC).unwrap(),
        sa_data: [0; 14],
    };
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr>()).unwrap();
    // SAFETY: an address of that size.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, size) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

#[test]
fn without_an_agent_a_holding_workload_is_cut_off() {
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    let to = at(DESTINATIONS[0].0, 80);
    near.open(to, near.server_at(OUT4[0]));
    let Near {
        client,
        server,
        app,
        world,
    } = near;
    drop(server);
    client.die(&world.capture);
    let error = world.pod.enter(|| connect(to)).unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(world.counter("held_outbound"), 1);
    assert_eq!(world.counter("fast_path"), 0);
    try_accept(&app, Duration::from_millis(1)).unwrap_err();
}

#[test]
fn a_full_map_refuses_rather_than_letting_in_as_a_stranger() {
    let Some(near) = Near::new(World::with_flows(2)) else {
        return;
    };
    let to = at(DESTINATIONS[0].0, 80);
    near.open(to, near.server_at(OUT4[0]));
    // Nobody accepts these.
    let waiting: Vec<_> = (0..2)
        .map(|n| near.connect(at(OUT4[1], 80 + n)).unwrap())
        .collect();
    let error = near.connect(to).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(near.world.counter("refused_map_full"), 1);
    assert_eq!(near.world.counter("captured_inbound"), 0);
    for _ in &waiting {
        near.client.accept();
    }
    let _client = near.connect(to).unwrap();
    accept(&near.app);
}

#[test]
fn who_does_not_listen_refuses() {
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    let to = at(DESTINATIONS[0].0, 80);
    let nobody = near
        .world
        .outside
        .enter(|| TcpListener::bind(at(OUT4[0], 0)))
        .unwrap()
        .unwrap();
    let backend = nobody.local_addr().unwrap();
    drop(nobody);
    near.open(to, backend);
    let error = near.connect(to).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(near.world.entries("FLOWS"), 0);
    assert_eq!(report(&near.world.capture), []);
    near.assert_agents_idle();
}

#[test]
fn of_several_addresses_the_server_sees_the_workloads() {
    let Some(world) = with_fast_path(World::new()) else {
        return;
    };
    let own: IpAddr = ip(OUT4[1]);
    let client = enrol(&world.capture, &world.outside, &[OUT4[1]]);
    let server = world.enrol(true);
    let app = listen(&world.pod);
    let to = at(POD4, app.local_addr().unwrap().port());
    let backends = [(server.enrolment.key(), to)];
    world
        .capture
        .open_fast_path(client.enrolment.key(), to, &backends)
        .unwrap();
    let stream = world.outside.enter(|| connect(to)).unwrap().unwrap();
    assert_eq!(stream.local_addr().unwrap().ip(), own);
    assert_eq!(plain(accept(&app).1).ip(), own);
    assert_eq!(world.counter("fast_path"), 1);
}

#[test]
fn a_workload_reaches_itself_by_its_service() {
    let Some(world) = with_fast_path(World::new()) else {
        return;
    };
    let agent = world.enrol(true);
    let app = listen(&world.pod);
    for (service, own) in [("10.96.0.9", POD4), ("fd96::9", POD6)] {
        let backends = [(agent.enrolment.key(), at(own, app.local_addr().unwrap().port()))];
        let to = at(service, 80);
        world
            .capture
            .open_fast_path(agent.enrolment.key(), to, &backends)
            .unwrap();
        let mut client = world.pod.enter(|| connect(to)).unwrap().unwrap();
        let (mut served, peer) = accept(&app);
        assert_eq!(plain(peer), client.local_addr().unwrap());
        assert_eq!(client.peer_addr().unwrap(), to);
        exchange(&mut client, &mut served);
    }
    assert_eq!(world.entries("FLOWS"), 0);
}

#[test]
fn every_backend_gets_connections() {
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    let other = listen(&near.world.outside);
    let to = at(DESTINATIONS[0].0, 80);
    let server = near.server.enrolment.key();
    let backends = [&near.app, &other].map(|app| (server, at(OUT4[0], app.local_addr().unwrap().port())));
    near.world
        .capture
        .open_fast_path(near.client.enrolment.key(), to, &backends)
        .unwrap();
    // That 64 fair coins fall alike happens once in 2^63.
    let _clients: Vec<_> = (0..64).map(|_| near.connect(to).unwrap()).collect();
    for app in [&near.app, &other] {
        accept(app);
    }
    assert_eq!(near.world.counter("fast_path"), 64);
}

/// As programs dial that know IPv6 sockets only.
#[test]
fn an_ipv6_socket_reaches_an_ipv4_service() {
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    near.open(at(DESTINATIONS[0].0, 80), near.server_at(OUT4[0]));
    let mut client = near.connect(at("::ffff:10.96.0.9", 80)).unwrap();
    let (mut served, peer) = accept(&near.app);
    assert_eq!(plain(client.peer_addr().unwrap()), at(DESTINATIONS[0].0, 80));
    assert_eq!(plain(peer), plain(client.local_addr().unwrap()));
    exchange(&mut client, &mut served);
    assert_eq!(near.world.counter("fast_path"), 1);
}

#[test]
fn multipath_tcp_goes_the_same_way() {
    if without_multipath() {
        return;
    }
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    let to = at(DESTINATIONS[0].0, 80);
    near.open(to, near.server_at(OUT4[0]));
    let multipath = || {
        let socket = Socket::new(socket2::Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP))?;
        socket.connect_timeout(&to.into(), PATIENCE)?;
        io::Result::Ok(TcpStream::from(socket))
    };
    let mut client = near.world.pod.enter(multipath).unwrap().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut served, peer) = accept(&near.app);
    assert_eq!(plain(peer).ip(), ip(POD4));
    assert_eq!(client.peer_addr().unwrap(), to);
    exchange(&mut client, &mut served);
    assert_eq!(near.world.counter("fast_path"), 1);
}

#[test]
fn what_was_counted_outlives_the_agent_and_what_was_allowed_does_not() {
    let Some(near) = Near::new(World::new()) else {
        return;
    };
    let to = at(DESTINATIONS[0].0, 80);
    near.open(to, near.server_at(OUT4[0]));
    let mut client = near.connect(to).unwrap();
    let mut served = accept(&near.app).0;
    exchange(&mut client, &mut served);
    assert_eq!(report(&near.world.capture).len(), 1);
    // Ends while nobody looks.
    drop((client, served));
    until("the flow to be closed", PATIENCE, || {
        let mut closed = 0;
        near.world.capture.report_fast_traffic(|_, traffic| {
            closed += traffic.closed;
            false
        });
        (closed == 1).then_some(())
    })
    .unwrap();

    let options = CaptureOptions {
        bpffs: near.world.run.bpffs().join("agent"),
        max_flows: 1024,
        features: None,
    };
    let next = Capture::start(&options).unwrap();
    let reported = report(&next);
    assert_eq!(reported.len(), 1);
    assert_eq!(
        (reported[0].1.opened, reported[0].1.closed, reported[0].1.received),
        (0, 1, 4)
    );
    assert_eq!(near.world.entries("FAST"), 0);
    let _client = near.connect(to).unwrap();
    assert_eq!(near.client.accept().1, Some(to));

    next.forget_fast_traffic(|_| true);
    assert_eq!(near.world.entries("FAST_TRAFFIC"), 0);
}
