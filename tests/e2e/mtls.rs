//! Between the nodes: encrypted, authenticated, and refused where it must be.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use mesh_tests::{Mesh, Options, Pod, PodSpec, THREADS, until_ok};

use crate::common::{HTTP, WEB_V4, Web, address, connect, seen, seen_header, try_connect, web, web_with};

fn peer_authentication(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: shop}}\n\
         spec: {{mtls: {{mode: {mode}}}}}\n"
    )
}

/// A request with the marker in header and body; the server sends both back.
fn send_marker(client: &Pod, marker: &str) {
    let header = format!("x-secret: {marker}");
    let response = client
        .curl(&[
            "--header",
            &header,
            "--data",
            marker,
            &format!("http://{WEB_V4}/"),
        ])
        .unwrap();
    assert_eq!(seen(&response)["body"], marker);
    assert_eq!(response.header("x-secret-too"), Some(marker));
}

#[test]
fn nothing_is_readable_between_the_nodes() {
    let mut web = web();
    let capture = web.mesh.capture("mtls").unwrap();
    for n in 0..20 {
        send_marker(&web.client, &format!("marker-{n}-d7a8fbb307d7"));
    }
    let captured = capture.stop().unwrap();
    assert!(!captured.contains(b"d7a8fbb307d7"));
    assert!(captured.is_all_tls());
    assert!(
        captured.bytes_of_port(15008) > 10_000,
        "{}",
        captured.bytes_of_port(15008)
    );
    assert_eq!(captured.bytes_of_port(15008), captured.bytes());

    // The same recording finds what is sent in clear: a pod without agent, and a server that allows it.
    let plain = web.mesh.pod(PodSpec::new("plain", 0).unmeshed()).unwrap();
    let capture = web.mesh.capture("clear").unwrap();
    let url = format!("http://{}/", web.server.at(HTTP));
    let response = plain
        .curl(&["--header", "x-secret: marker-9e107d9d372b", &url])
        .unwrap();
    assert_eq!(response.status, 200);
    assert!(capture.stop().unwrap().contains(b"marker-9e107d9d372b"));
}

#[test]
fn clear_text_passes_where_permitted_and_is_refused_where_strict() {
    let mut web = web();
    let plain = web.mesh.pod(PodSpec::new("plain", 0).unmeshed()).unwrap();
    let url = format!("http://{}/", web.server.at(HTTP));
    let response = plain.curl(&[&url]).unwrap();
    let peer = seen(&response)["peer"].as_str().unwrap().to_owned();
    assert!(peer.starts_with(&format!("{}:", plain.v4)), "the app sees {peer}");

    web.mesh.apply("policy", &peer_authentication("STRICT")).unwrap();
    until_ok(
        "clear text to be refused",
        Duration::from_secs(5),
        || match plain.curl(&[&url]) {
            Ok(response) => anyhow::bail!("it got {}", response.status),
            Err(_) => Ok(()),
        },
    )
    .unwrap();
    // From inside the mesh it goes on.
    assert_eq!(web.client.curl(&[&url]).unwrap().status, 200);
    let refused = web.mesh.agents[1]
        .metrics()
        .unwrap()
        .sum("mesh_agent_plaintext_refused_total", &[]);
    assert!(refused >= 1.0);

    // One port of it differs.
    web.mesh
        .apply(
            "policy-port",
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: web, namespace: shop}\n\
             spec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}}}\n",
        )
        .unwrap();
    until_ok("clear text to pass again", Duration::from_secs(5), || {
        let response = plain.curl(&[&url])?;
        anyhow::ensure!(response.status == 200);
        Ok(())
    })
    .unwrap();
}

#[test]
fn on_the_same_node_the_same_checks_hold_without_tls() {
    let mut web = web();
    let beside = web.mesh.pod(PodSpec::new("beside", 1)).unwrap();
    let plain = web.mesh.pod(PodSpec::new("plain", 1).unmeshed()).unwrap();
    web.mesh.apply("policy", &peer_authentication("STRICT")).unwrap();
    let url = format!("http://{}/", web.server.at(HTTP));
    until_ok(
        "clear text to be refused",
        Duration::from_secs(5),
        || match plain.curl(&[&url]) {
            Ok(response) => anyhow::bail!("it got {}", response.status),
            Err(_) => Ok(()),
        },
    )
    .unwrap();
    let capture = web.mesh.capture("same-node").unwrap();
    let seen = seen(&beside.curl(&[&format!("http://{WEB_V4}/")]).unwrap());
    let certificate = seen_header(&seen, "x-forwarded-client-cert").unwrap_or_default();
    assert!(
        certificate.contains("spiffe://cluster.local/ns/shop/sa/beside"),
        "{seen}"
    );
    assert!(
        seen["peer"]
            .as_str()
            .unwrap()
            .starts_with(&format!("{}:", beside.v4)),
        "{seen}"
    );
    assert_eq!(capture.stop().unwrap().bytes(), 0, "nothing of it left the node");
    // One agent is both sides, and each counts.
    let body = "x".repeat(1000);
    let url = format!("http://{WEB_V4}/");
    assert_eq!(beside.curl(&["--data", &body, &url]).unwrap().status, 200);
    for reporter in ["source", "destination"] {
        let labels = [("reporter", reporter), ("source_workload", "beside")];
        until_ok("the body to be counted", Duration::from_secs(3), || {
            let metrics = web.mesh.agents[1].metrics()?;
            let bytes = metrics.sum("istio_request_bytes_sum", &labels);
            anyhow::ensure!(bytes == 1000.0, "{reporter}: {bytes}");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn a_workload_with_another_identity_at_that_address_is_refused() {
    let mut web = web();
    // Only the client's agent is told that somebody else is there.
    web.mesh.agents[1].freeze_resources(&web.mesh.run).unwrap();
    web.server.spec = web.server.spec.clone().service_account("somebody-else");
    web.mesh.announce(&web.server).unwrap();
    until_ok("the peer to be refused", Duration::from_secs(10), || {
        let response = web.client.curl(&[&format!("http://{WEB_V4}/")])?;
        anyhow::ensure!(response.status == 503, "{response:?}");
        Ok(())
    })
    .unwrap();
    let counted = web.mesh.agents[0]
        .metrics()
        .unwrap()
        .sum("mesh_agent_peer_identity_mismatches_total", &[]);
    assert!(counted >= 1.0, "{counted}");
}

#[test]
fn the_kernel_encrypts_where_it_is_asked_to_and_can() {
    let asked = Options {
        config: format!("threads: {THREADS}\nkernelTls: true\n"),
        ..Options::default()
    };
    let web = web_with(&asked);
    let capture = web.mesh.capture("kernel-tls").unwrap();
    let marker = "a-marker-that-the-kernel-encrypts";
    send_marker(&web.client, marker);
    let seen = capture.stop().unwrap();
    assert!(seen.is_all_tls());
    assert!(!seen.contains(marker.as_bytes()));
    let expected = mesh_agent::tls::probe_kernel().is_ok();
    if !expected {
        mesh_tests::off("kernel TLS").unwrap();
    }
    for agent in &web.mesh.agents {
        let taken = agent
            .metrics()
            .unwrap()
            .sum("mesh_agent_kernel_tls_connections_total", &[]);
        let status = agent.get("/api/v1/status").unwrap();
        let lacking = status["lacking"].as_array().cloned().unwrap_or_default();
        let can = !lacking.iter().any(|feature| feature["name"] == "kernelTls");
        assert_eq!(
            (can, status["kernelTls"].as_bool()),
            (expected, Some(expected)),
            "{status}"
        );
        assert_eq!(taken > 0.0, can, "{status}");
        // Asked for, and not there: that is not kept from anybody.
        assert_eq!(agent.log().contains("kernelTls is on, but"), !can);
    }
}

#[test]
fn the_port_between_agents_takes_only_mtls() {
    let mut web = web();
    let stranger = web.mesh.stranger("stranger", 0).unwrap();
    let at = web.server.at(15008);
    // TLS without a client certificate.
    let mut openssl = stranger.command("openssl");
    openssl.args([
        "s_client",
        "-connect",
        &at.to_string(),
        "-tls1_3",
        "-alpn",
        "h2",
        "-ign_eof",
    ]);
    let output = mesh_tests::shell::raw(&mut openssl).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("certificate required") || said.contains("alert"),
        "{said}"
    );
    // A member of the mesh that does not say what it will speak, and one that speaks something else.
    let failures = |web: &Web| {
        let metrics = web.mesh.agents[1].metrics().unwrap();
        metrics.sum("mesh_agent_handshake_failures_total", &[])
    };
    let before = failures(&web);
    assert!(before >= 1.0, "{before}");
    let (key, certificate) = member(&web);
    for alpn in [&[][..], &["-alpn", "http/1.1"]] {
        let mut openssl = stranger.command("timeout");
        openssl.args([
            "5",
            "openssl",
            "s_client",
            "-tls1_3",
            "-ign_eof",
            "-connect",
            &at.to_string(),
        ]);
        openssl
            .args(alpn)
            .arg("-key")
            .arg(&key)
            .arg("-cert")
            .arg(&certificate);
        mesh_tests::shell::raw(openssl.stdin(Stdio::null())).unwrap();
    }
    until_ok("both to be counted", Duration::from_secs(5), || {
        let counted = failures(&web) - before;
        anyhow::ensure!((counted - 2.0).abs() < 0.1, "{counted}");
        Ok(())
    })
    .unwrap();
    // No TLS at all.
    let stream = try_connect(&stranger, at).unwrap();
    (&stream)
        .write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    let _reset_is_fine = (&stream).read_to_end(&mut answer);
    assert!(
        !answer.starts_with(b"HTTP"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

/// A key and a certificate that the mesh's root vouches for.
fn member(web: &Web) -> (PathBuf, PathBuf) {
    let (dir, ca) = (web.mesh.run.dir(), web.mesh.run.dir().join("ca"));
    let [key, request, certificate] = ["key.pem", "request.pem", "cert.pem"].map(|name| dir.join(name));
    let mut ask = Command::new("openssl");
    ask.args([
        "req",
        "-new",
        "-nodes",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
    ]);
    ask.args(["-subj", "/", "-addext"]);
    ask.arg("subjectAltName=critical,URI:spiffe://cluster.local/ns/shop/sa/member");
    ask.arg("-keyout").arg(&key).arg("-out").arg(&request);
    mesh_tests::shell::output(&mut ask).unwrap();
    let mut sign = Command::new("openssl");
    sign.args(["x509", "-req", "-days", "1", "-copy_extensions", "copy"]);
    sign.arg("-CA")
        .arg(ca.join("ca-cert.pem"))
        .arg("-CAkey")
        .arg(ca.join("ca-key.pem"));
    sign.arg("-in").arg(&request).arg("-out").arg(&certificate);
    mesh_tests::shell::output(&mut sign).unwrap();
    (key, certificate)
}

#[test]
fn the_root_key_is_private_or_nothing_starts() {
    let mut web = web();
    let ca = web.mesh.run.dir().join("ca");
    let keys: Vec<_> = std::fs::read_dir(&ca)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| std::fs::read_to_string(path).is_ok_and(|text| text.contains("PRIVATE KEY")))
        .collect();
    assert!(!keys.is_empty());
    for key in &keys {
        let mode = key.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", key.display());
        std::fs::set_permissions(key, std::fs::Permissions::from_mode(0o644)).unwrap();
    }
    let agent = &mut web.mesh.agents[0];
    agent.stop(Duration::from_secs(40)).unwrap();
    let error = agent.start(&web.mesh.run).unwrap_err().to_string();
    assert!(error.contains("ca"), "{error}");
}

/// What only lenient servers take for a request. At `...` the client waits for longer than detection does.
const ODD_REQUESTS: [&str; 9] = [
    "\r\n\r\nGET / HTTP/1.1\r\n",
    "\r\n...GET / HTTP/1.1\r\n",
    "GET .../ HTTP/1.1\r\n",
    "GE...T / HTTP/1.1\r\n",
    "ANY...THING / HTTP/1.1\r\n",
    "GET / HTTP/1.1 \r\n",
    "GET\t/\tHTTP/1.1\r\n",
    "get / HTTP/1.1\r\n",
    "GET /\r\n",
];
const FORGED: &str =
    "x-forwarded-client-cert: URI=spiffe://cluster.local/ns/forged/sa/forged\r\nhost: a\r\n\r\n";

/// Sends `text` and everything that comes after it, and says what came back.
fn say(client: &Pod, to: SocketAddr, text: &str) -> String {
    let mut stream = connect(client, to);
    for (n, piece) in text.split("...").enumerate() {
        if n > 0 {
            // Longer than both agents wait, one after the other: it is the pause itself that is tried.
            thread::sleep(Duration::from_millis(2500));
        }
        if stream.write_all(piece.as_bytes()).is_err() {
            return String::new();
        }
    }
    let _refused_is_fine = stream.write_all(FORGED.as_bytes());
    let _refused_is_fine = stream.shutdown(Shutdown::Write);
    let mut back = Vec::new();
    let _refused_is_fine = stream.read_to_end(&mut back);
    String::from_utf8_lossy(&back).into_owned()
}

#[test]
fn no_odd_request_carries_a_forged_identity_past_detection() {
    let mut mesh = Mesh::start(&Options::default()).unwrap();
    // The echo is the most lenient server: what comes back is what arrived. Neither port says what it speaks.
    mesh.service(
        "peer",
        &["10.96.0.41"],
        &[("one", 7, 7777), ("two", 80, HTTP)],
        "peer",
    )
    .unwrap();
    let mut peer = mesh.pod(PodSpec::new("peer", 1)).unwrap();
    peer.serve(&mesh.run, "echo", 7777).unwrap();
    peer.serve(&mesh.run, "http", HTTP).unwrap();
    let clients = [
        mesh.pod(PodSpec::new("client", 0)).unwrap(),
        mesh.pod(PodSpec::new("beside", 1)).unwrap(),
    ];
    let (echo, http) = (address("10.96.0.41", 7), address("10.96.0.41", 80));
    for client in &clients {
        until_ok("what is no request to pass", Duration::from_secs(5), || {
            let back = say(client, echo, "HELLO\r\n");
            anyhow::ensure!(back.contains("forged"), "{back:?}");
            Ok(())
        })
        .unwrap();
    }
    thread::scope(|scope| {
        for (client, text) in clients.iter().flat_map(|c| ODD_REQUESTS.map(|text| (c, text))) {
            scope.spawn(move || {
                let back = say(client, echo, text);
                assert!(
                    !back.contains("forged"),
                    "{text:?} of {}: {back:?}",
                    client.spec.name
                );
            });
        }
        for client in &clients {
            let back = say(client, echo, &long_request());
            assert!(!back.contains("forged"), "a long line: {back:?}");
        }
    });
    // What hyper reads as it was meant arrives, with the client's own identity.
    for text in [
        "\r\n\r\nGET / HTTP/1.1\r\n",
        "GET .../ HTTP/1.1\r\n",
        &long_request(),
    ] {
        let back = say(&clients[0], http, text);
        assert!(back.starts_with("HTTP/1.1 200"), "{text:?}: {back:?}");
        assert!(back.contains("/ns/shop/sa/client"), "{text:?}: {back:?}");
        assert!(!back.contains("forged"), "{text:?}: {back:?}");
    }
}

fn long_request() -> String {
    format!("GET /{} HTTP/1.1\r\n", "a".repeat(9000))
}
