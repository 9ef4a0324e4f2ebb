//! A real gRPC client against a gRPC server, through two agents.

use std::fs;

use crate::common::{HTTP, web};

/// Messages are bytes: no generated code is needed.
const CLIENT: &str = r#"
import sys, grpc
channel = grpc.insecure_channel(sys.argv[1])
unary = channel.unary_unary("/echo.Echo/Unary")
assert unary(b"hello", timeout=10) == b"hello"
# More than a peer takes of empty frames on one connection.
for n in range(200):
    assert unary(b"again", timeout=10) == b"again"
streaming = channel.stream_stream("/echo.Echo/Both")
import queue
sent = queue.Queue()
answers = streaming(iter(sent.get, None), timeout=10)
for n in range(20):
    message = b"message %d" % n
    sent.put(message)
    assert next(answers) == message
sent.put(None)
assert list(answers) == []
big = b"x" * 3_000_000
assert unary(big, timeout=20) == big
try:
    channel.unary_unary("/echo.Echo/Fail")(b"", timeout=10)
    sys.exit("no error")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.UNAVAILABLE, error
print("all well")
"#;

#[test]
fn unary_streaming_and_failing_calls() {
    let mut web = web();
    // gRPC asks for a TXT record too, and waits for what becomes of that.
    let mut nameserver = web.mesh.stranger("nameserver", 1).unwrap();
    nameserver.serve(&web.mesh.run, "dns", 53).unwrap();
    let resolv_conf = format!("nameserver {}\n", nameserver.v4);
    web.client.netns.set_resolv_conf(&resolv_conf).unwrap();
    web.mesh
        .service("grpc", &["10.96.0.50"], &[("grpc", 50051, HTTP)], "web")
        .unwrap();
    crate::common::wait_until(
        &web.client,
        &["--http2-prior-knowledge", "http://10.96.0.50:50051/"],
        |response| response.status == 200,
    );
    let script = web.mesh.run.dir().join("client.py");
    fs::write(&script, CLIENT).unwrap();
    // By name, which the client resolves in its own way; and where the port's name says nothing.
    let pod = web.server.at(HTTP).to_string();
    for target in ["10.96.0.50:50051", "grpc.shop.svc.cluster.local:50051", &pod] {
        let mut python = web.client.command("/usr/bin/python3");
        let output = mesh_tests::shell::output(python.arg(&script).arg(target)).unwrap();
        assert_eq!(output.trim(), "all well", "{target}");
    }
    let samples = web.mesh.agents[0].metrics().unwrap();
    let ok = [
        ("grpc_response_status", "0"),
        ("request_protocol", "grpc"),
        ("reporter", "source"),
    ];
    assert!(samples.sum("istio_requests_total", &ok) >= 6.0);
    let failed = [
        ("grpc_response_status", "14"),
        ("response_code", "200"),
        ("reporter", "source"),
    ];
    assert!(samples.sum("istio_requests_total", &failed) >= 1.0);
}
