//! The harness itself, without agents: what it builds is a network, and what it sees is true.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use mesh_tests::{Mesh, Options, PodSpec, Run};

fn plain() -> Options {
    Options {
        agents: false,
        ..Options::default()
    }
}

#[test]
fn pods_reach_each_other_and_the_link_shows_it_in_clear() {
    let mut mesh = Mesh::start(&plain()).unwrap();
    let client = mesh.pod(PodSpec::new("client", 0)).unwrap();
    let mut server = mesh.pod(PodSpec::new("server", 1)).unwrap();
    server.serve(&mesh.run, "http", 8080).unwrap();

    let capture = mesh.capture("clear").unwrap();
    let marker = "marker-4711-in-a-header";
    let secret = format!("x-secret: {marker}");
    for (address, seen_from) in [(server.at(8080), client.v4), (server.at_v6(8080), client.v6)] {
        let url = format!("http://{address}/hello?x=1");
        let response = client
            .curl(&["--header", &secret, "--data", "the body", &url])
            .unwrap();
        assert_eq!(response.status, 200);
        assert_eq!(response.header("x-pod"), Some("server"));
        let seen: serde_json::Value = serde_json::from_str(&response.body).unwrap();
        assert_eq!(seen["body"], "the body");
        assert_eq!(seen["uri"], "/hello?x=1");
        let peer: std::net::SocketAddr = seen["peer"].as_str().unwrap().parse().unwrap();
        assert_eq!(peer.ip(), seen_from);
    }
    let seen = capture.stop().unwrap();
    assert!(seen.contains(marker.as_bytes()));
    assert!(!seen.contains(b"marker-4711-in-no-header"));
    assert!(!seen.is_all_tls());
    assert!(seen.bytes_of_port(8080) > 500, "{}", seen.bytes_of_port(8080));
    assert_eq!(seen.bytes_of_port(8080), seen.bytes());
}

#[test]
fn servers_and_load() {
    let mut mesh = Mesh::start(&plain()).unwrap();
    let client = mesh.pod(PodSpec::new("client", 0)).unwrap();
    let mut server = mesh.pod(PodSpec::new("server", 1)).unwrap();
    server.serve(&mesh.run, "http", 8080).unwrap();
    server.serve(&mesh.run, "greeter", 2525).unwrap();
    server.serve(&mesh.run, "echo", 7).unwrap();

    let url = format!("http://{}/", server.at(8080));
    for protocol in [&[][..], &["--http2"]] {
        let args = [&[&*url, "--requests", "200", "--connections", "4"][..], protocol].concat();
        let report = client.load(&args).unwrap();
        assert_eq!(report["pods"]["server"], 200, "{report}");
        assert_eq!(report["failed"], 0, "{report}");
    }
    let flaky = format!("http://{}/flaky?key=a&times=2&how=503", server.at(8080));
    let report = client.load(&[&flaky, "--requests", "5"]).unwrap();
    assert_eq!(report["statuses"], serde_json::json!({"503": 2, "200": 3}));

    let (greeting, echoed) = client
        .netns
        .enter(|| {
            let mut greeter = TcpStream::connect(server.at(2525)).unwrap();
            let mut greeting = [0; 10];
            greeter.read_exact(&mut greeting).unwrap();
            let mut echo = TcpStream::connect(server.at_v6(7)).unwrap();
            echo.write_all(b"hello").unwrap();
            echo.shutdown(Shutdown::Write).unwrap();
            let mut echoed = String::new();
            echo.read_to_string(&mut echoed).unwrap();
            (greeting, echoed)
        })
        .unwrap();
    assert_eq!(&greeting, b"220 server");
    assert_eq!(echoed, "hello\n5 bytes\n");
}

#[test]
fn nothing_is_left_of_a_run() {
    let (name, dir, path) = {
        let mut mesh = Mesh::start(&plain()).unwrap();
        let mut pod = mesh.pod(PodSpec::new("left", 0)).unwrap();
        pod.serve(&mesh.run, "http", 8080).unwrap();
        let path = pod.netns.path();
        assert!(path.exists());
        // As in a crash: nobody is left to drop it.
        std::mem::forget(pod);
        (mesh.run.name().to_owned(), mesh.run.dir(), path)
    };
    assert!(!path.exists());
    assert!(!dir.exists());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&name));
    // The name is free again.
    drop(Run::start(&name).unwrap());
}
