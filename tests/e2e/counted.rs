//! System calls of a request, counted and not timed: counts are the same on a busy machine and on a fast one.
//!
//! One request after the other, so that nothing is batched: the most that a request can need.

use std::fs;
use std::process::Command;

use mesh_tests::{Options, shell};

use crate::common::{WEB_V4, Web, web_with};

const REQUESTS: u64 = 2000;

/// System calls per request of one agent, both directions. Measured: 6.05 to 6.10 at either end; the rest is
/// room for timers, not for one more call per request.
const MOST_SYSTEM_CALLS: [(&str, f64); 2] = [("node-a", 6.5), ("node-b", 6.5)];

/// The same of a unary gRPC call. Measured: 7.1 to 7.9 (six, and a wake-up more where an agent reads the client's head
/// before its message, which this client writes apart); 9.0 to 9.6 when agents passed them on in two writes.
const MOST_SYSTEM_CALLS_OF_GRPC: [(&str, f64); 2] = [("node-a", 8.5), ("node-b", 8.5)];

#[test]
fn a_request_needs_few_system_calls() {
    few_system_calls(
        MOST_SYSTEM_CALLS,
        &mut one_lane(),
        &format!("http://{WEB_V4}/status/200"),
        &[],
    );
}

#[test]
fn a_grpc_call_needs_few_system_calls() {
    let mut web = one_lane();
    let message = web.mesh.run.dir().join("message");
    fs::write(&message, [&[0, 0, 0, 0, 100][..], &[b'x'; 100]].concat()).unwrap();
    let url = format!("http://{WEB_V4}/echo.Echo/Unary");
    let call = [
        "--http2",
        "--method",
        "POST",
        "--body-file",
        message.to_str().unwrap(),
    ];
    let fields = [
        "--header",
        "content-type:application/grpc",
        "--header",
        "te:trailers",
    ];
    few_system_calls(
        MOST_SYSTEM_CALLS_OF_GRPC,
        &mut web,
        &url,
        &[call.as_slice(), &fields].concat(),
    );
}

fn one_lane() -> Web {
    web_with(&Options {
        config: "threads: 1\n".to_owned(),
        ..Options::default()
    })
}

fn few_system_calls(most: [(&str, f64); 2], web: &mut Web, url: &str, options: &[&str]) {
    let load = |web: &Web, requests: u64| {
        let requests = requests.to_string();
        let args = [&[url, "--requests", &requests], options].concat();
        web.client.load_command(&args)
    };
    // Connections are made, certificates issued.
    shell::output(&mut load(web, 100)).unwrap();
    let counts = most.map(|(node, _)| {
        let agents = &mut web.mesh.agents;
        let agent = agents.iter_mut().find(|agent| agent.node == node).unwrap();
        let pid = agent.process().unwrap().id();
        let load = load(web, REQUESTS);
        let counted = web.mesh.run.dir().join("counted");
        let mut perf = Command::new("perf");
        perf.args([
            "stat",
            "-x",
            ",",
            "-e",
            "raw_syscalls:sys_enter",
            "-p",
            &pid.to_string(),
            "-o",
        ])
        .arg(&counted)
        .arg("--")
        .arg(load.get_program())
        .args(load.get_args());
        let report = shell::output(&mut perf).unwrap();
        // From the pod, not from an agent.
        for expected in ["200", "web"] {
            assert!(report.contains(&format!("\"{expected}\":{REQUESTS}")), "{report}");
        }
        let counted = fs::read_to_string(counted).unwrap();
        let line = counted.lines().find(|line| line.contains("sys_enter"));
        let count = line.and_then(|line| line.split(',').next()?.parse::<f64>().ok());
        count.unwrap_or_else(|| panic!("perf counted nothing: {counted}")) / REQUESTS as f64
    });
    for ((node, most), count) in most.into_iter().zip(counts) {
        assert!(
            (1.0..most).contains(&count),
            "{node}: {count} system calls per request, at most {most} are meant to be ({counts:?})"
        );
    }
}
