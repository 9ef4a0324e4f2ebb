//! Connections that a workload makes.

use std::net::TcpListener;

use crate::world::{FAMILIES, OUT4, World, accept, at, connect, exchange, ip};

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
        let (listener, mut app) = world
            .pod
            .enter(|| {
                let outside = world
                    .outside
                    .enter(|| TcpListener::bind(at(out, 0)))
                    .unwrap()
                    .unwrap();
                let app = connect(outside.local_addr().unwrap()).unwrap();
                (outside, app)
            })
            .unwrap();
        let (mut server, peer) = accept(&listener);
        assert_eq!(app.peer_addr().unwrap(), listener.local_addr().unwrap());
        assert_eq!(peer, app.local_addr().unwrap());
        assert_eq!(peer.ip(), ip(pod));
        exchange(&mut app, &mut server);
    }
    assert!(
        world
            .capture
            .counters()
            .unwrap()
            .iter()
            .all(|(_, count)| *count == 0)
    );
    let _ = OUT4;
}
