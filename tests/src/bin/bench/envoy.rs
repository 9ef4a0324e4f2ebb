//! Envoy: beside the client alone, or one at each end with mutual TLS and HTTP/2 between them.

use std::fmt::Write;
use std::net::SocketAddr;

use anyhow::Result;
use mesh_tests::Process;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

use crate::peer::{Peer, Peers};
use crate::proxies::{spawn, wait_listening, write_config};
use crate::scenario::{Door, Place};
use crate::world::{self, World};

/// The doors that need an HTTP proxy at both ends, and the port between the two.
const BETWEEN: [(Door, u16); 3] = [(Door::Http, 15_008), (Door::Http2, 15_009), (Door::Grpc, 15_010)];

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
    let (mut near, mut far) = (Config::default(), Config::default());
    let client_tls = authority.issue(
        world,
        "client",
        "tls_params: {tls_maximum_protocol_version: TLSv1_3}, ",
    )?;
    let server_tls = authority.issue(world, "server", "")?;
    let upstream = format!(
        "transport_socket: {{name: tls, typed_config: {{\"@type\": {EXTENSIONS}.transport_sockets.tls.v3.\
         UpstreamTlsContext, common_tls_context: {client_tls}}}}}"
    );
    let downstream = format!(
        ", transport_socket: {{name: tls, typed_config: {{\"@type\": {EXTENSIONS}.transport_sockets.tls.v3.\
         DownstreamTlsContext, require_client_certificate: true, common_tls_context: {server_tls}}}}}"
    );
    for (door, port) in BETWEEN {
        let name = format!("{door:?}");
        let route = format!("{{match: {{prefix: /}}, route: {{cluster: {name}}}}}");
        near.listener(world::sidecar(door), &route, "")?;
        near.cluster(&name, server.at(port), true, &upstream)?;
        far.listener(([0, 0, 0, 0], port).into(), &route, &downstream)?;
        let app = ([127, 0, 0, 1], world::port(door)).into();
        far.cluster(&name, app, door != Door::Http, "")?;
    }
    let client = &world.plain.client;
    let mut processes = Vec::new();
    for (pod, config, id, address) in [
        (server, &far, "2", server.at(BETWEEN[0].1)),
        (client, &near, "1", world::sidecar(Door::Http)),
    ] {
        let file = write_config(world, &format!("envoy-{}.yaml", pod.spec.name), &config.text())?;
        let process = spawn(world, pod, peers, Peer::Envoy, &arguments(&file, id))?;
        wait_listening(pod, address, &process)?;
        processes.push(process);
    }
    Ok(processes)
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

    fn cluster(&mut self, name: &str, at: SocketAddr, http2: bool, more: &str) -> Result<()> {
        let protocol = if http2 {
            "http2_protocol_options: {}"
        } else {
            "http_protocol_options: {}"
        };
        writeln!(
            self.clusters,
            "  - name: {name}\n    type: STATIC\n    load_assignment: {{cluster_name: {name}, endpoints: \
             [{{lb_endpoints: [{{endpoint: {{address: {address}}}}}]}}]}}\n    typed_extension_protocol_options: \
             {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{\"@type\": \
             {EXTENSIONS}.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {{{protocol}}}}}}}\n    {more}",
            address = address(at),
        )?;
        Ok(())
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

/// Signs the two certificates of one turn.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Authority {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
        })
    }

    /// Envoy's `common_tls_context` with a certificate of its own.
    fn issue(&self, world: &World, name: &str, more: &str) -> Result<String> {
        let mut params = CertificateParams::default();
        // Else it is called as its issuer is, and taken for a root.
        params.distinguished_name.push(DnType::CommonName, name);
        let id = format!("spiffe://cluster.local/ns/shop/sa/{name}");
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        let write = |kind: &str, text: &str| write_config(world, &format!("envoy-{name}-{kind}.pem"), text);
        let certificate = write("certificate", &certificate)?;
        let key = write("key", &key.serialize_pem())?;
        let root = write("root", &self.certificate)?;
        Ok(format!(
            "{{{more}alpn_protocols: [h2], tls_certificates: [{{certificate_chain: {{filename: {certificate}}}, \
             private_key: {{filename: {key}}}}}], validation_context: {{trusted_ca: {{filename: {root}}}}}}}"
        ))
    }
}
