//! What most tests start from.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use mesh_tests::{Mesh, Options, Pod, PodSpec, Response};
use serde_json::Value;

/// The service in front of [`Web::server`], at port 80.
pub(crate) const WEB_V4: &str = "10.96.0.20";
pub(crate) const WEB_V6: &str = "fd00:10:96::20";
/// Where HTTP servers in pods listen.
pub(crate) const HTTP: u16 = 8080;

/// A client on one node, a server with the service `web` on the other.
pub(crate) struct Web {
    pub(crate) client: Pod,
    pub(crate) server: Pod,
    pub(crate) mesh: Mesh,
}

pub(crate) fn web() -> Web {
    web_with(&Options::default())
}

pub(crate) fn web_with(options: &Options) -> Web {
    let mut mesh = Mesh::start(options).unwrap();
    mesh.service("web", &[WEB_V4, WEB_V6], &[("http", 80, HTTP)], "web")
        .unwrap();
    let server = http_server(&mut mesh, PodSpec::new("web", 1));
    let client = mesh.pod(PodSpec::new("client", 0)).unwrap();
    wait_for(&client, &format!("http://{WEB_V4}/"));
    Web { client, server, mesh }
}

pub(crate) fn http_server(mesh: &mut Mesh, spec: PodSpec) -> Pod {
    let mut pod = mesh.pod(spec).unwrap();
    pod.serve(&mesh.run, "http", HTTP).unwrap();
    pod
}

/// Until a URL answers 200: resources take a moment to have effect.
pub(crate) fn wait_for(client: &Pod, url: &str) -> Response {
    wait_until(client, &[url], |response| response.status == 200)
}

pub(crate) fn wait_until(client: &Pod, args: &[&str], good: impl Fn(&Response) -> bool) -> Response {
    let most = Duration::from_secs(5);
    mesh_tests::until_ok(&format!("curl {args:?}"), most, || {
        let response = client.curl(args)?;
        anyhow::ensure!(good(&response), "not yet: {response:?}");
        Ok(response)
    })
    .unwrap()
}

/// What the server says it got.
pub(crate) fn seen(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{response:?}");
    serde_json::from_str(&response.body).unwrap_or_else(|error| panic!("{error}: {response:?}"))
}

/// A request header as the server got it.
pub(crate) fn seen_header<'a>(seen: &'a Value, name: &str) -> Option<&'a str> {
    seen["headers"].as_array()?.iter().find(|pair| pair[0] == name)?[1].as_str()
}

/// A connection from inside a pod that gives up rather than hang.
pub(crate) fn connect(pod: &Pod, to: SocketAddr) -> TcpStream {
    try_connect(pod, to).unwrap()
}

pub(crate) fn try_connect(pod: &Pod, to: SocketAddr) -> std::io::Result<TcpStream> {
    pod.netns
        .enter(|| {
            let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })
        .unwrap()
}

pub(crate) fn address(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// Sends a request as it is written here, and reads the head of the answer.
pub(crate) fn raw(stream: &TcpStream, request: &str) -> (Vec<String>, BufReader<TcpStream>) {
    let mut stream = stream.try_clone().unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut reader = BufReader::new(stream);
    let head = read_head(&mut reader);
    (head, reader)
}

pub(crate) fn read_head(reader: &mut impl BufRead) -> Vec<String> {
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        assert!(
            reader.read_line(&mut line).unwrap() > 0,
            "closed within the head: {head:?}"
        );
        match line.trim_end() {
            "" => return head,
            line => head.push(line.to_ascii_lowercase()),
        }
    }
}
