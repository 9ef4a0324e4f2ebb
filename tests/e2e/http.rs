//! HTTP through two agents: all of it still is what the client and the server make of it.

use std::fs;
use std::io::{BufRead, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::process::Command;
use std::time::Duration;

use tokio::time::Instant;

use crate::common::{HTTP, WEB_V4, WEB_V6, address, connect, raw, read_head, seen, seen_header, web};

#[test]
fn a_service_by_address_and_name_and_a_pod_by_address() {
    let web = web();
    let pod_v4 = web.server.at(HTTP).to_string();
    let pod_v6 = web.server.at_v6(HTTP).to_string();
    let v6 = format!("[{WEB_V6}]");
    for host in [
        WEB_V4,
        &v6,
        "web",
        "web.shop",
        "web.shop.svc",
        "web.shop.svc.cluster.local",
        &pod_v4,
        &pod_v6,
    ] {
        let response = web.client.curl(&[&format!("http://{host}/hello?x=1")]).unwrap();
        let seen = seen(&response);
        assert_eq!(seen["pod"], "web", "{host}");
        assert_eq!(seen["uri"], "/hello?x=1", "{host}");
        assert_eq!(seen_header(&seen, "host"), Some(host));
        let peer: SocketAddr = seen["peer"].as_str().unwrap().parse().unwrap();
        assert!(
            [web.client.v4, web.client.v6].contains(&peer.ip()),
            "{host}: the app sees {peer}"
        );
        if host == pod_v6 {
            assert_eq!(peer.ip(), web.client.v6);
        }
    }
}

#[test]
fn versions_and_methods() {
    let web = web();
    let url = format!("http://{WEB_V4}/x");
    for (flag, client_version, server_version) in [
        ("--http1.0", "HTTP/1.", "HTTP/1.1"),
        ("--http1.1", "HTTP/1.1", "HTTP/1.1"),
        ("--http2-prior-knowledge", "HTTP/2", "HTTP/1.1"),
    ] {
        let response = web.client.curl(&[flag, &url]).unwrap();
        assert!(
            response.head.starts_with(client_version),
            "{flag}: {}",
            response.head
        );
        // The port is called `http`: the application is spoken to in HTTP/1.1, whatever the client speaks.
        assert_eq!(seen(&response)["version"], server_version, "{flag}");
    }
    for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PURGE"] {
        let response = web.client.curl(&["--request", method, &url]).unwrap();
        assert_eq!(seen(&response)["method"], method);
    }
    let head = web.client.curl(&["--head", &url]).unwrap();
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    let length: usize = head.header("content-length").unwrap().parse().unwrap();
    assert!(length > 100);
}

#[test]
fn keep_alive_and_the_end_of_an_http_1_0_connection() {
    let web = web();
    let stream = connect(&web.client, address(WEB_V4, 80));
    for _ in 0..3 {
        let (head, mut reader) = raw(&stream, "GET /status/200 HTTP/1.1\r\nhost: web\r\n\r\n");
        assert_eq!(head[0], "http/1.1 200 ok");
        let mut body = [0; 9];
        reader.read_exact(&mut body).unwrap();
        assert_eq!(&body, b"as asked\n");
    }
    let old = connect(&web.client, address(WEB_V4, 80));
    let (head, mut reader) = raw(&old, "GET /stream?chunks=2&bytes=3 HTTP/1.0\r\n\r\n");
    assert!(
        !head.iter().any(|line| line.starts_with("transfer-encoding")),
        "{head:?}"
    );
    let mut body = String::new();
    reader.read_to_string(&mut body).unwrap();
    assert_eq!(body, "xxxxxx");
}

#[test]
fn bodies_stream_both_ways() {
    let web = web();
    let stream = connect(&web.client, address(WEB_V4, 80));
    let started = Instant::now();
    let (head, mut reader) = raw(
        &stream,
        "GET /stream?chunks=3&bytes=1&ms=500 HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n",
    );
    assert_eq!(head[0], "http/1.1 200 ok");
    let mut chunk = String::new();
    while !chunk.contains('x') {
        chunk.clear();
        reader.read_line(&mut chunk).unwrap();
    }
    assert!(
        started.elapsed() < Duration::from_millis(450),
        "the first chunk came after {:?}",
        started.elapsed()
    );

    // An echo answers while the request is still being sent.
    let stream = connect(&web.client, address(WEB_V4, 80));
    let (head, mut reader) = raw(
        &stream,
        "POST /echo HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n",
    );
    assert_eq!(head[0], "http/1.1 200 ok");
    let mut lines = String::new();
    while !lines.contains("first") {
        assert!(reader.read_line(&mut lines).unwrap() > 0);
    }
    (&stream).write_all(b"6\r\nsecond\r\n0\r\n\r\n").unwrap();
    while !lines.contains("second") {
        assert!(reader.read_line(&mut lines).unwrap() > 0);
    }
}

#[test]
fn large_bodies_are_byte_exact() {
    let web = web();
    let dir = web.mesh.run.dir();
    let (sent, got) = (dir.join("sent"), dir.join("got"));
    let bytes: Vec<u8> = (0..5_000_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    fs::write(&sent, &bytes).unwrap();
    let data = format!("@{}", sent.display());
    for flag in ["--http1.1", "--http2-prior-knowledge"] {
        let mut curl: Command = web.client.command("curl");
        curl.args([
            "--silent",
            "--show-error",
            "--fail",
            flag,
            "--max-time",
            "30",
            "--data-binary",
            &data,
        ]);
        curl.arg("--output")
            .arg(&got)
            .arg(format!("http://{WEB_V4}/echo"));
        mesh_tests::shell::output(&mut curl).unwrap();
        assert!(fs::read(&got).unwrap() == bytes, "{flag}: other bytes came back");
    }
}

#[test]
fn trailers_interim_answers_and_upgrades() {
    let web = web();
    let stream = connect(&web.client, address(WEB_V4, 80));
    let request = "GET /trailers HTTP/1.1\r\nhost: web\r\nte: trailers\r\nconnection: te, close\r\n\r\n";
    let (_, mut reader) = raw(&stream, request);
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("before the trailers"), "{rest}");
    assert!(rest.to_ascii_lowercase().contains("x-trailer: yes"), "{rest}");

    let stream = connect(&web.client, address(WEB_V4, 80));
    let request = "POST /x HTTP/1.1\r\nhost: web\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
    let (head, mut reader) = raw(&stream, request);
    assert_eq!(head[0], "http/1.1 100 continue");
    (&stream).write_all(b"body").unwrap();
    assert_eq!(read_head(&mut reader)[0], "http/1.1 200 ok");

    let stream = connect(&web.client, address(WEB_V4, 80));
    let request = "GET /upgrade HTTP/1.1\r\nhost: web\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
    let (head, mut reader) = raw(&stream, request);
    assert_eq!(head[0], "http/1.1 101 switching protocols");
    assert!(head.contains(&"upgrade: websocket".to_owned()), "{head:?}");
    for message in [&b"hello"[..], b"\x00\xff and bytes"] {
        (&stream).write_all(message).unwrap();
        let mut echoed = vec![0; message.len()];
        reader.read_exact(&mut echoed).unwrap();
        assert_eq!(echoed, message);
    }
    // What goes on after a switch is still seen, and ends with its workload.
    for agent in &web.mesh.agents {
        let page = agent.get("/api/v1/connections").unwrap();
        let moved = page
            .as_array()
            .unwrap()
            .iter()
            .filter(|one| one["protocol"] == "http1" && one["bytesReceived"].as_u64() >= Some(16));
        assert_eq!(moved.count(), 1, "{}: {page}", agent.node);
    }
    web.mesh.withdraw(&web.server).unwrap();
    let end = reader.read(&mut [0]);
    let kind = end.as_ref().err().map(std::io::Error::kind);
    assert_eq!(kind, Some(ErrorKind::ConnectionReset), "{end:?}");
}

#[test]
fn a_client_that_sends_fin_after_its_request_gets_the_answer() {
    let web = web();
    let stream = connect(&web.client, address(WEB_V4, 80));
    (&stream)
        .write_all(b"GET /slow?ms=300 HTTP/1.1\r\nhost: web\r\n\r\n")
        .unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    (&stream).read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
    assert!(answer.ends_with("slow\n"), "{answer:?}");
}

#[test]
fn headers_that_the_mesh_adds_keeps_and_takes() {
    let web = web();
    let url = format!("http://{WEB_V4}/");
    let get = |args: &[&str]| seen(&web.client.curl(&[args, &[&*url]].concat()).unwrap());
    let (one, two) = (get(&[]), get(&[]));
    let id = |seen| seen_header(seen, "x-request-id").map(str::to_owned);
    assert!(id(&one).is_some_and(|id| id.len() == 36), "{one}");
    assert_ne!(id(&one), id(&two));

    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let traceparent = format!("traceparent: {trace}");
    let sent = get(&[
        "--header",
        "x-request-id: mine",
        "--header",
        &traceparent,
        "--header",
        "x-forwarded-for: 192.0.2.1",
        "--header",
        "mesh-agent-client: 1",
        "--header",
        "mesh-agent-destination: 22",
        "--header",
        "mesh-agent-version: 2",
        "--header",
        "mesh-agent-service: shop/other",
        "--header",
        "x-forwarded-client-cert: By=me",
        "--header",
        "connection: x-hop",
        "--header",
        "x-hop: gone",
        "--header",
        "connection: x-second",
        "--header",
        "x-second: gone",
        "--header",
        "te: deflate",
    ]);
    assert_eq!(seen_header(&sent, "x-request-id"), Some("mine"));
    assert_eq!(seen_header(&sent, "traceparent"), Some(trace));
    assert!(seen_header(&sent, "x-forwarded-for").is_some_and(|list| list.starts_with("192.0.2.1")));
    for pair in sent["headers"].as_array().unwrap() {
        let name = pair[0].as_str().unwrap();
        assert!(!name.starts_with("mesh-agent-"), "{sent}");
    }
    assert_eq!(sent["version"], "HTTP/1.1");
    for name in ["x-hop", "x-second", "te"] {
        assert_eq!(seen_header(&sent, name), None);
    }
    let certificate = seen_header(&sent, "x-forwarded-client-cert").unwrap_or_default();
    assert!(!certificate.contains("By=me"), "{certificate}");
    assert!(
        certificate.contains("spiffe://cluster.local/ns/shop/sa/client"),
        "{certificate}"
    );
}

#[test]
fn hostile_requests_are_refused_and_harm_nobody() {
    let web = web();
    for request in [
        "GET / HTTP/1.1\r\nhost: web\r\nhost: other\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET /a%00b HTTP/1.1\r\nhost: web\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        "GET / HTTP/1.1\r\nhost : web\r\n\r\n",
        "CONNECT web:80 HTTP/1.1\r\nhost: web:80\r\n\r\n",
    ] {
        let stream = connect(&web.client, address(WEB_V4, 80));
        let (head, _) = raw(&stream, request);
        assert!(head[0].starts_with("http/1.1 400"), "{request:?}: {head:?}");
    }
    // What HTTP/2 does not allow in trailers: nobody waits for the end of such a message.
    let stream = connect(&web.client, address(WEB_V4, 80));
    let request = "POST /echo HTTP/1.1\r\nhost: web\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n\
                   1\r\na\r\n0\r\nkeep-alive: x\r\n\r\n";
    let (_, mut reader) = raw(&stream, request);
    let ended = reader.read_to_end(&mut Vec::new());
    let hangs = ended.is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
    assert!(!hangs, "no end for ten seconds");
    let path = format!("http://{WEB_V4}/a/../b/%2e%2e/c");
    let response = web.client.curl(&["--path-as-is", &path]).unwrap();
    assert_eq!(seen(&response)["uri"], "/c");
}

#[test]
fn a_pod_that_calls_itself() {
    let web = web();
    // Through its own service: captured, and the application sees its own address.
    for host in [WEB_V4.to_owned(), format!("[{WEB_V6}]")] {
        let seen = seen(&web.server.curl(&[&format!("http://{host}/")]).unwrap());
        assert_eq!(seen["pod"], "web");
        let peer: SocketAddr = seen["peer"].as_str().unwrap().parse().unwrap();
        assert!([web.server.v4, web.server.v6].contains(&peer.ip()), "{peer}");
    }
    // Inside the pod nothing is captured.
    for host in ["127.0.0.1:8080", "[::1]:8080"] {
        let response = web.server.curl(&[&format!("http://{host}/")]).unwrap();
        assert_eq!(seen_header(&seen(&response), "x-request-id"), None, "{host}");
    }
}

#[test]
fn nginx_and_h2load() {
    let mut web = web();
    let config = web.mesh.run.dir().join("nginx.conf");
    // nginx removes the file of its pid when it ends, whatever it is.
    let pid = web.mesh.run.dir().join("nginx.pid");
    let server = r#"listen 8081; listen [::]:8081; location / { return 200 "nginx\n"; }"#;
    let text = format!(
        "daemon off; pid {}; error_log stderr; events {{}}\nhttp {{ access_log off; server {{ {server} }} }}\n",
        pid.display()
    );
    fs::write(&config, text).unwrap();
    let args = ["-c", config.to_str().unwrap()];
    web.server
        .start(&web.mesh.run, "nginx", &"nginx".into(), &args)
        .unwrap();
    web.mesh
        .service("nginx", &["10.96.0.21"], &[("http", 80, 8081)], "web")
        .unwrap();
    let response = crate::common::wait_for(&web.client, "http://nginx/");
    assert_eq!(response.body, "nginx\n");

    for protocol in [&["--h1"][..], &["-m", "10"]] {
        let mut h2load = web.client.command("h2load");
        h2load
            .args(["-n", "2000", "-c", "8"])
            .args(protocol)
            .arg("http://10.96.0.21/");
        let report = mesh_tests::shell::output(&mut h2load).unwrap();
        assert!(report.contains("2000 succeeded, 0 failed, 0 errored"), "{report}");
        assert!(report.contains("status codes: 2000 2xx"), "{report}");
    }
}
