//! Envoy: beside the client alone, or one at each end with mutual TLS between them.
//!
//! Requests travel as HTTP/2 on connections that are kept; what is declared TCP has a TLS connection for each of
//! the client's, as a mesh of sidecars does it, and resumes sessions where it can.

use std::fmt::Write;
use std::net::SocketAddr;

use anyhow::Result;
use mesh_tests::Process;

use crate::args::Peer;
use crate::authority::{Authority, Files};
use crate::peer::Peers;
use crate::proxies::{spawn, wait_listening, write_config};
use crate::scenario::{Door, Place};
use crate::world::{self, World};

/// TLS sessions that are kept for resumption: each serves once, and several connections are made at a time.
const SESSIONS: usize = 64;

pub(crate) fn start(world: &World, peers: &Peers, place: Place) -> Result<Vec<Process>> {
    match place {
        Place::SameNode => Ok(vec![same_node(world, peers)?]),
        Place::OtherNode => two_nodes(world, peers),
    }
}

fn same_node(world: &World, peers: &Peers) -> Result<Process> {
    let server = world.plain.server(Place::SameNode);
    let mut config = Config::default();
    let routes = "{match: {prefix: /, headers: [{name: x-version, string_match: {exact: two}}]}, route: {cluster: two}}, \
                  {match: {prefix: /}, route: {cluster: one}}";
    config.listener(world::sidecar(Door::Routed), routes, "")?;
    config.cluster("one", server.at(world::port(Door::Http)), false, "")?;
    config.cluster("two", server.at(world::port(Door::Routed)), false, "")?;
    let file = write_config(world, "envoy-client.yaml", &config.text())?;
    let client = &world.plain.client;
    let process = spawn(world, client, peers, Peer::Envoy, &arguments(&file, "1"))?;
    wait_listening(client, world::sidecar(Door::Routed), &process)?;
    Ok(process)
}

fn two_nodes(world: &World, peers: &Peers) -> Result<Vec<Process>> {
    let authority = Authority::new()?;
    let server = world.plain.server(Place::OtherNode);
    let (client_files, server_files) = (
        authority.issue(world, "client")?,
        authority.issue(world, "server")?,
    );
    let (mut near, mut far) = (Config::default(), Config::default());
    for door in Door::BETWEEN_NODES {
        let name = format!("{door:?}");
        let tcp = door.is_tcp();
        let upstream = upstream_tls(&client_files, !tcp);
        let downstream = downstream_tls(&server_files, !tcp);
        let (listen, between) = (world::sidecar(door), world::between(door));
        let app = ([127, 0, 0, 1], world::port(door)).into();
        if tcp {
            near.tcp_listener(listen, &name, "")?;
            near.tcp_cluster(&name, server.at(between), &upstream)?;
            far.tcp_listener(([0, 0, 0, 0], between).into(), &name, &downstream)?;
            far.tcp_cluster(&name, app, "")?;
        } else {
            let route = format!("{{match: {{prefix: /}}, route: {{cluster: {name}}}}}");
            near.listener(listen, &route, "")?;
            near.cluster(&name, server.at(between), true, &upstream)?;
            far.listener(([0, 0, 0, 0], between).into(), &route, &downstream)?;
            far.cluster(&name, app, door != Door::Http, "")?;
        }
    }
    let client = &world.plain.client;
    let mut processes = Vec::new();
    for (pod, config, id, address) in [
        (server, &far, "2", server.at(world::between(Door::LAST))),
        (client, &near, "1", world::sidecar(Door::LAST)),
    ] {
        let file = write_config(world, &format!("envoy-{}.yaml", pod.spec.name), &config.text())?;
        let process = spawn(world, pod, peers, Peer::Envoy, &arguments(&file, id))?;
        wait_listening(pod, address, &process)?;
        processes.push(process);
    }
    Ok(processes)
}

fn upstream_tls(files: &Files, http2: bool) -> String {
    format!(
        "transport_socket: {{name: tls, typed_config: {{\"@type\": {EXTENSIONS}.transport_sockets.tls.v3.\
         UpstreamTlsContext, max_session_keys: {SESSIONS}, common_tls_context: {}}}}}",
        common_tls(
            files,
            http2,
            "tls_params: {tls_maximum_protocol_version: TLSv1_3}, "
        )
    )
}

fn downstream_tls(files: &Files, http2: bool) -> String {
    format!(
        ", transport_socket: {{name: tls, typed_config: {{\"@type\": {EXTENSIONS}.transport_sockets.tls.v3.\
         DownstreamTlsContext, require_client_certificate: true, common_tls_context: {}}}}}",
        common_tls(
            files,
            http2,
            "tls_params: {tls_minimum_protocol_version: TLSv1_3}, "
        )
    )
}

fn common_tls(files: &Files, http2: bool, params: &str) -> String {
    let Files {
        certificate,
        key,
        root,
    } = files;
    let alpn = if http2 { "alpn_protocols: [h2], " } else { "" };
    format!(
        "{{{params}{alpn}tls_certificates: [{{certificate_chain: {{filename: {certificate}}}, \
         private_key: {{filename: {key}}}}}], validation_context: {{trusted_ca: {{filename: {root}}}}}}}"
    )
}

/// `id`: two on one machine need different ones, for their shared memory.
fn arguments<'a>(file: &'a str, id: &'a str) -> [&'a str; 8] {
    ["-c", file, "--concurrency", "1", "--base-id", id, "-l", "warn"]
}

const EXTENSIONS: &str = "type.googleapis.com/envoy.extensions";

#[derive(Default)]
struct Config {
    listeners: String,
    clusters: String,
}

impl Config {
    /// `more`: of the filter chain.
    fn listener(&mut self, at: SocketAddr, routes: &str, more: &str) -> Result<()> {
        writeln!(
            self.listeners,
            "  - address: {address}\n    filter_chains: [{{filters: [{{name: envoy.filters.network.http_connection_manager, \
             typed_config: {{\"@type\": {EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager, \
             stat_prefix: door, codec_type: AUTO, route_config: {{virtual_hosts: [{{name: all, domains: [\"*\"], \
             routes: [{routes}]}}]}}, http_filters: [{{name: router, typed_config: {{\"@type\": \
             {EXTENSIONS}.filters.http.router.v3.Router}}}}]}}}}]{more}}}]",
            address = address(at),
        )?;
        Ok(())
    }

    fn tcp_listener(&mut self, at: SocketAddr, cluster: &str, more: &str) -> Result<()> {
        writeln!(
            self.listeners,
            "  - address: {address}\n    filter_chains: [{{filters: [{{name: envoy.filters.network.tcp_proxy, \
             typed_config: {{\"@type\": {EXTENSIONS}.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: door, \
             cluster: {cluster}}}}}]{more}}}]",
            address = address(at),
        )?;
        Ok(())
    }

    fn tcp_cluster(&mut self, name: &str, at: SocketAddr, more: &str) -> Result<()> {
        writeln!(
            self.clusters,
            "  - name: {name}\n    type: STATIC\n    load_assignment: {{cluster_name: {name}, endpoints: \
             [{{lb_endpoints: [{{endpoint: {{address: {address}}}}}]}}]}}\n    {more}",
            address = address(at),
        )?;
        Ok(())
    }

    fn cluster(&mut self, name: &str, at: SocketAddr, http2: bool, more: &str) -> Result<()> {
        let protocol = if http2 {
            "http2_protocol_options: {}"
        } else {
            "http_protocol_options: {}"
        };
        let options = format!(
            "typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
             {{\"@type\": {EXTENSIONS}.upstreams.http.v3.HttpProtocolOptions, \
             explicit_http_config: {{{protocol}}}}}}}\n    {more}"
        );
        self.tcp_cluster(name, at, &options)
    }

    fn text(&self) -> String {
        format!(
            "static_resources:\n  listeners:\n{}  clusters:\n{}",
            self.listeners, self.clusters
        )
    }
}

fn address(at: SocketAddr) -> String {
    format!(
        "{{socket_address: {{address: {}, port_value: {}}}}}",
        at.ip(),
        at.port()
    )
}
