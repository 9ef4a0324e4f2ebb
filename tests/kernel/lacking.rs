//! What is done where the kernel lacks something, tried on one that has it all.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;

use crate::world::{FAMILIES, OUT4, POD4, World, accept, at, connect, exchange};
use crate::{inbound, odd};

#[test]
fn an_app_sees_its_client_when_it_asks() {
    inbound::the_app_sees_the_client(&World::as_on_the_oldest_kernel());
}

#[test]
fn an_ipv4_app_sees_its_client_when_it_asks() {
    inbound::the_ipv4_app_sees_the_client(&World::as_on_the_oldest_kernel());
}

#[test]
fn a_multipath_app_sees_its_client_when_it_asks() {
    inbound::the_multipath_app_sees_the_client(&World::as_on_the_oldest_kernel());
}

#[test]
fn a_client_that_left_before_it_was_accepted_is_known_still() {
    let world = World::as_on_the_oldest_kernel();
    let agent = world.enrol(true);
    let app = world.listen(at("0.0.0.0", 8080));
    let onward = world.speak_for(&agent, at(OUT4[1], 4321), at(POD4, 8080));
    assert_eq!((world.entries("FLOWS"), world.entries("PRESENTED")), (0, 1));
    drop(onward);
    assert_eq!(accept(&app).1, at(OUT4[1], 4321));
    assert_eq!(world.entries("PRESENTED"), 0);
}

#[test]
fn a_client_that_nobody_asked_for_goes_with_its_workload() {
    let world = World::as_on_the_oldest_kernel();
    let agent = world.enrol(true);
    let _app = world.listen(at("0.0.0.0", 8080));
    let _onward = world.speak_for(&agent, at(OUT4[1], 4321), at(POD4, 8080));
    assert_eq!(world.entries("PRESENTED"), 1);
    agent.enrolment.release().unwrap();
    assert_eq!(world.entries("PRESENTED"), 0);
}

#[test]
fn a_captured_multipath_socket_sees_its_peer() {
    odd::a_captured_multipath_socket(&World::as_on_the_oldest_kernel());
}

#[test]
fn a_connection_of_an_app_with_itself_is_left_alone() {
    let world = World::as_on_the_oldest_kernel();
    let _agent = world.enrol(true);
    for (pod, _) in FAMILIES {
        let app = world.listen(at("::", 0));
        let own = at(pod, app.local_addr().unwrap().port());
        let mut client = world.pod.enter(|| connect(own)).unwrap().unwrap();
        let (mut served, peer) = accept(&app);
        assert_eq!(crate::world::plain(peer), client.local_addr().unwrap());
        exchange(&mut client, &mut served);
    }
}

#[test]
fn our_own_program_tells_the_cookie_that_the_kernel_would() {
    /// `SO_NETNS_COOKIE` of `asm-generic/socket.h`.
    const NETNS_COOKIE: libc::c_int = 71;
    let world = World::as_on_the_oldest_kernel();
    let agent = world.enrol(true);
    let socket = world
        .pod
        .enter(|| UdpSocket::bind(at("0.0.0.0", 0)))
        .unwrap()
        .unwrap();
    let (mut cookie, mut len) = (0_u64, 8);
    // SAFETY: the option writes the 8 bytes of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    let error = io::Error::last_os_error();
    match result {
        0 => assert_eq!(agent.enrolment.key(), cookie),
        // Here it is needed. That it is the one by which the programs know the pod, each other test shows.
        _ => assert_eq!(error.raw_os_error(), Some(libc::ENOPROTOOPT)),
    }
    assert_ne!(agent.enrolment.key(), 0);
    assert_eq!(world.entries("OWN"), 0);
}

#[test]
fn a_held_connection_is_refused_by_a_port_where_nobody_listens() {
    let world = World::as_on_the_oldest_kernel();
    let agent = world.enrol(true);
    agent.die(&world.capture);
    for (_, out) in FAMILIES {
        let error = world.pod.enter(|| connect(at(out, 80))).unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(world.counter("held_outbound"), 2);
    let query = world
        .pod
        .enter(|| UdpSocket::bind(at("0.0.0.0", 0)))
        .unwrap()
        .unwrap();
    let error = query.send_to(b"who", at(OUT4[2], 53)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
}
