//! What a request costs, counted and not timed: counts are the same on a busy machine and on a fast one.
//!
//! One request after the other, so that nothing is batched: the most that a request can need.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use mesh_tests::{Options, shell};

use crate::common::{WEB_V4, Web, web_with};

const REQUESTS: u64 = 2000;

/// System calls per request of one agent, both directions. Measured: 6.05 to 6.10 at either end; the rest is
/// room for timers, not for one more call per request.
const MOST_SYSTEM_CALLS: [(&str, f64); 2] = [("node-a", 6.5), ("node-b", 6.5)];

/// Calls of the allocator per request of one agent, both directions. Measured: 26.0 to 26.1 at the client's end, 20.1
/// at the server's, whatever the machine does: one more per request fails.
const MOST_ALLOCATIONS: [(&str, f64); 2] = [("node-a", 26.8), ("node-b", 20.8)];

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

#[test]
fn a_request_needs_few_allocations() {
    let counting = Options {
        config: "threads: 1\n".to_owned(),
        counting: Some(library()),
        ..Options::default()
    };
    let web = web_with(&counting);
    let url = format!("http://{WEB_V4}/status/200");
    let load = |requests: u64| {
        let report = web
            .client
            .load(&[&url, "--requests", &requests.to_string()])
            .unwrap();
        assert_eq!(report["statuses"]["200"], requests, "{report}");
    };
    load(100);
    let before = allocations(&web);
    load(REQUESTS);
    let after = allocations(&web);
    for (n, (node, most)) in MOST_ALLOCATIONS.into_iter().enumerate() {
        let count = (after[n] - before[n]) as f64 / REQUESTS as f64;
        assert!(
            (1.0..most).contains(&count),
            "{node}: {count} allocations per request, at most {most} are meant to be"
        );
    }
}

fn allocations(web: &Web) -> [u64; 2] {
    MOST_ALLOCATIONS.map(|(node, _)| {
        let agent = web.mesh.agents.iter().find(|agent| agent.node == node).unwrap();
        agent.allocations(&web.mesh.run).unwrap()
    })
}

/// Cargo puts it beside the tests' own folder.
fn library() -> PathBuf {
    let tests = env::current_exe().unwrap();
    let built = tests.parent().unwrap().with_file_name("examples");
    let library = built.join("liballocations.so");
    assert!(library.is_file(), "{} is not built", library.display());
    library
}
