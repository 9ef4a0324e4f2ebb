//! Everything that is not HTTP.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use mesh_tests::{Mesh, Options, Pod, PodSpec, THREADS, until_ok};
use socket2::SockRef;
use tokio::time::Instant;

use crate::common::{address, connect, try_connect};

const GREETER: &str = "10.96.0.40";
const ECHO: &str = "10.96.0.41";

/// TCP servers, whose services say nothing of their protocol.
fn tcp() -> (Mesh, Pod, Pod) {
    let mut mesh = Mesh::start(&Options::default()).unwrap();
    mesh.service("greeter", &[GREETER], &[("one", 25, 2525)], "peer")
        .unwrap();
    mesh.service("echo", &[ECHO], &[("two", 7, 7777)], "peer")
        .unwrap();
    let mut peer = mesh.pod(PodSpec::new("peer", 1)).unwrap();
    peer.serve(&mesh.run, "greeter", 2525).unwrap();
    peer.serve(&mesh.run, "echo", 7777).unwrap();
    let client = mesh.pod(PodSpec::new("client", 0)).unwrap();
    until_ok("the services", Duration::from_secs(5), || {
        let mut stream = try_connect(&client, address(ECHO, 7))?;
        stream.write_all(b"x")?;
        Ok(stream.read_exact(&mut [0])?)
    })
    .unwrap();
    (mesh, client, peer)
}

#[test]
fn a_server_that_speaks_first_is_heard_at_once() {
    let (_mesh, client, peer) = tcp();
    let pod = peer.at(2525);
    for to in [address(GREETER, 25), pod] {
        let started = Instant::now();
        let mut reader = BufReader::new(connect(&client, to));
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, format!("220 peer greets {}\r\n", client.v4));
        assert!(
            started.elapsed() < Duration::from_secs(1),
            "{to}: {:?}",
            started.elapsed()
        );
        reader.get_mut().write_all(b"hello\n").unwrap();
        line.clear();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, "250 peer heard hello\n");
    }
}

#[test]
fn half_close_reaches_the_other_side_and_the_rest_comes_back() {
    let (_mesh, client, _peer) = tcp();
    let mut stream = connect(&client, address(ECHO, 7));
    let bytes: Vec<u8> = (0..3_000_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let sender = {
        let mut stream = stream.try_clone().unwrap();
        let bytes = bytes.clone();
        thread::spawn(move || {
            stream.write_all(&bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    sender.join().unwrap();
    let (echoed, rest) = got.split_at(bytes.len().min(got.len()));
    assert!(echoed == bytes, "{} bytes came back", got.len());
    assert_eq!(
        String::from_utf8_lossy(rest),
        format!("\n{} bytes\n", bytes.len())
    );
}

#[test]
fn a_reader_that_stops_holds_the_writer_back() {
    let (_mesh, client, _peer) = tcp();
    let stream = connect(&client, address(ECHO, 7));
    stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let chunk = vec![7; 1 << 20];
    // What the kernels and the agents buffer on the way there and back; without back-pressure there is no end.
    let most = 256;
    let written = (0..most)
        .take_while(|_| (&stream).write_all(&chunk).is_ok())
        .count();
    assert!(written < most, "{written} MiB were taken though nobody read");
}

/// A server in `pod` that the test itself plays.
fn listen(pod: &Pod, port: u16) -> TcpListener {
    let bound = pod.netns.enter(|| TcpListener::bind(("::", port)));
    bound.unwrap().unwrap()
}

/// A connection to `port` of `server`, both ends of it, after a byte went each way.
fn pair(client: &Pod, server: &Pod, listener: &TcpListener, port: u16) -> (TcpStream, TcpStream) {
    let mut near = connect(client, server.at(port));
    near.write_all(b"x").unwrap();
    let (mut far, _) = listener.accept().unwrap();
    far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    far.read_exact(&mut [0]).unwrap();
    far.write_all(b"y").unwrap();
    near.read_exact(&mut [0]).unwrap();
    (near, far)
}

/// A client, and a server on its own node and one on the other.
fn near_and_far() -> (Mesh, Pod, [Pod; 2]) {
    let (mut mesh, client, peer) = tcp();
    let neighbour = mesh.pod(PodSpec::new("neighbour", 0)).unwrap();
    mesh.wait_known(&neighbour).unwrap();
    (mesh, client, [peer, neighbour])
}

fn abort(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

fn assert_reset(mut stream: TcpStream, what: &str) {
    let end = stream.read(&mut [0; 16]);
    let kind = end.as_ref().err().map(std::io::Error::kind);
    assert_eq!(kind, Some(ErrorKind::ConnectionReset), "{what}: {end:?}");
}

/// What broke must not look like what ended: a reader would take half a file for the whole.
#[test]
fn a_reset_is_a_reset_on_the_other_side_too() {
    let (_mesh, client, servers) = near_and_far();
    for server in &servers {
        let listener = listen(server, 9000);
        let (near, far) = pair(&client, server, &listener, 9000);
        abort(&far);
        drop(far);
        assert_reset(near, "the client, when the server resets");
        let (near, far) = pair(&client, server, &listener, 9000);
        abort(&near);
        drop(near);
        assert_reset(far, "the server, when the client resets");
    }
}

#[test]
fn streams_of_a_released_workload_are_cut_and_seen_as_cut() {
    let (mesh, client, servers) = near_and_far();
    for server in &servers {
        let listener = listen(server, 9000);
        let (near, far) = pair(&client, server, &listener, 9000);
        mesh.withdraw(server).unwrap();
        assert_reset(near, "the client of a released workload");
        assert_reset(far, "the application of a released workload");
    }
}

#[test]
fn an_aborted_connection_leaves_nothing_open() {
    let (mesh, client, _peer) = tcp();
    for _ in 0..20 {
        let mut stream = connect(&client, address(ECHO, 7));
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    }
    until_ok("all connections to be closed", Duration::from_secs(5), || {
        for agent in &mesh.agents {
            let page = agent.get("/api/v1/connections")?;
            let all = page.as_array().context("no list")?;
            // One connection between the agents for each thread of the data path stays for the next ones.
            let open = all.iter().filter(|one| one["protocol"] != "hbone").count();
            anyhow::ensure!(open == 0 && all.len() <= THREADS, "{}: {page}", agent.node);
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn unknown_destinations_pass_through() {
    let (mut mesh, client, _peer) = tcp();
    let mut outside = mesh.stranger("outside", 1).unwrap();
    outside.serve(&mesh.run, "greeter", 2525).unwrap();
    outside.serve(&mesh.run, "http", 8080).unwrap();
    for to in [outside.at(2525), outside.at_v6(2525)] {
        let mut line = String::new();
        BufReader::new(connect(&client, to)).read_line(&mut line).unwrap();
        let from = if to.is_ipv4() { client.v4 } else { client.v6 };
        assert_eq!(line, format!("220 outside greets {from}\r\n"));
    }
    let response = client.curl(&[&format!("http://{}/x", outside.at(8080))]).unwrap();
    assert_eq!(response.header("x-pod"), Some("outside"));
    // Nobody listens there: what the application learns is what it would have learned.
    let refused = try_connect(&client, outside.at(1)).and_then(|mut stream| {
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.read(&mut [0])
    });
    assert!(!matches!(refused, Ok(1..)), "{refused:?}");
}

#[test]
fn tls_of_the_application_passes_untouched() {
    let (mesh, client, mut peer) = tcp();
    let dir = mesh.run.dir();
    let (key, certificate) = (dir.join("key.pem"), dir.join("cert.pem"));
    let mut openssl = std::process::Command::new("openssl");
    openssl.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
    ]);
    openssl.args([
        "-subj",
        "/CN=app.example",
        "-addext",
        "subjectAltName=DNS:app.example",
    ]);
    openssl.arg("-keyout").arg(&key).arg("-out").arg(&certificate);
    mesh_tests::shell::output(&mut openssl).unwrap();
    let args = [
        "s_server",
        "-accept",
        "8443",
        "-www",
        "-quiet",
        "-key",
        key.to_str().unwrap(),
        "-cert",
        certificate.to_str().unwrap(),
    ];
    peer.start(&mesh.run, "openssl", &"openssl".into(), &args)
        .unwrap();
    mesh.service("secure", &["10.96.0.42"], &[("https", 443, 8443)], "peer")
        .unwrap();
    until_ok(
        "a handshake with the application",
        Duration::from_secs(10),
        || {
            let mut s_client = client.command("openssl");
            s_client.args([
                "s_client",
                "-connect",
                "10.96.0.42:443",
                "-servername",
                "app.example",
                "-verify_return_error",
            ]);
            s_client.arg("-CAfile").arg(&certificate).stdin(Stdio::null());
            let output = mesh_tests::shell::raw(&mut s_client)?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            anyhow::ensure!(text.contains("Verify return code: 0 (ok)"), "{text}");
            Ok(())
        },
    )
    .unwrap();
}

#[test]
fn many_destinations_from_one_source_port() {
    let (_mesh, client, _peer) = tcp();
    let answers = client
        .netns
        .enter(|| {
            let bound = |to: &str, port| {
                let socket =
                    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket
                    .bind(&std::net::SocketAddr::from(([0, 0, 0, 0], 45_678)).into())
                    .unwrap();
                socket.connect(&address(to, port).into()).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                TcpStream::from(socket)
            };
            let (mut greeter, mut echo) = (bound(GREETER, 25), bound(ECHO, 7));
            let mut greeting = [0; 8];
            greeter.read_exact(&mut greeting).unwrap();
            echo.write_all(b"echo").unwrap();
            let mut echoed = [0; 4];
            echo.read_exact(&mut echoed).unwrap();
            let names = (
                greeter.peer_addr().unwrap(),
                echo.peer_addr().unwrap(),
                echo.local_addr().unwrap(),
            );
            (greeting, echoed, names)
        })
        .unwrap();
    assert_eq!(&answers.0, b"220 peer");
    assert_eq!(&answers.1, b"echo");
    let (greeter, echo, local) = answers.2;
    assert_eq!((greeter, echo), (address(GREETER, 25), address(ECHO, 7)));
    assert_eq!(local, client.at(45_678));
}

#[test]
fn connections_that_live_count_for_balancing() {
    let (mut mesh, client, _peer) = tcp();
    let mut second = mesh.pod(PodSpec::new("second", 1).label("app", "peer")).unwrap();
    second.serve(&mesh.run, "greeter", 2525).unwrap();
    let greeted = || -> anyhow::Result<_> {
        let stream = try_connect(&client, address(GREETER, 25))?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        Ok((stream, line))
    };
    until_ok("the second pod", Duration::from_secs(5), || {
        anyhow::ensure!(greeted()?.1.contains("second"));
        Ok(())
    })
    .unwrap();
    until_ok("the end of these connections", Duration::from_secs(5), || {
        let open = mesh.agents[0].get("/api/v1/connections")?;
        anyhow::ensure!(open.as_array().is_some_and(Vec::is_empty), "{open}");
        Ok(())
    })
    .unwrap();
    // All stay open, so each goes to whichever pod has fewer.
    let open: Vec<_> = (0..40).map(|_| greeted().unwrap()).collect();
    let to_second = open.iter().filter(|(_, line)| line.contains("second")).count();
    assert_eq!(to_second, 20);
}
