//! What a proxy costs that decides nothing: `mesh-peer relay`, beside the client or one at each end.
//!
//! It knows no HTTP, so every door is a pipe to one port of the server; between two nodes each connection of the
//! client is one of mutual TLS 1.3.

use anyhow::Result;
use mesh_tests::Process;

use crate::args::Peer;
use crate::authority::{Authority, Files};
use crate::peer::Peers;
use crate::proxies::{spawn, wait_listening};
use crate::scenario::{Door, Place};
use crate::world::{self, World};

pub(crate) fn start(world: &World, peers: &Peers, place: Place) -> Result<Vec<Process>> {
    match place {
        Place::SameNode => Ok(vec![same_node(world, peers)?]),
        Place::OtherNode => two_nodes(world, peers),
    }
}

fn same_node(world: &World, peers: &Peers) -> Result<Process> {
    let (client, server) = (&world.plain.client, world.plain.server(Place::SameNode));
    let listen = world::sidecar(Door::Routed);
    let way = format!("{listen}={}", server.at(world::port(Door::Routed)));
    let process = spawn(world, client, peers, Peer::Bare, &["relay", &way])?;
    wait_listening(client, listen, &process)?;
    Ok(process)
}

fn two_nodes(world: &World, peers: &Peers) -> Result<Vec<Process>> {
    let authority = Authority::new()?;
    let (client, server) = (&world.plain.client, world.plain.server(Place::OtherNode));
    let near = |door| format!("{}={}", world::sidecar(door), server.at(world::between(door)));
    let far = |door| format!("0.0.0.0:{}=127.0.0.1:{}", world::between(door), world::port(door));
    let mut processes = Vec::new();
    for (pod, end, ways, address) in [
        (
            server,
            "server",
            Door::BETWEEN_NODES.map(far),
            server.at(world::between(Door::LAST)),
        ),
        (
            client,
            "client",
            Door::BETWEEN_NODES.map(near),
            world::sidecar(Door::LAST),
        ),
    ] {
        let Files {
            certificate,
            key,
            root,
        } = authority.issue(world, end)?;
        let mut arguments = vec!["relay-tls", end, &certificate, &key, &root];
        arguments.extend(ways.iter().map(String::as_str));
        let process = spawn(world, pod, peers, Peer::Bare, &arguments)?;
        wait_listening(pod, address, &process)?;
        processes.push(process);
    }
    Ok(processes)
}
