use std::collections::BTreeMap;
use std::time::SystemTime;

use clap::{CommandFactory, Parser};
use clap_complete::Shell;

use super::*;
use crate::admin::api::*;

fn now() -> SystemTime {
    humantime::parse_rfc3339("2026-01-02T00:00:00Z").unwrap()
}

fn mtls(mode: &str) -> Mtls {
    Mtls {
        mode: mode.into(),
        ports: BTreeMap::from([(9090, "permissive".into())]),
    }
}

fn workload(name: &str, state: &str, message: &str) -> Workload {
    Workload {
        namespace: "shop".into(),
        name: name.into(),
        state: state.into(),
        message: message.into(),
        node: "node-a".into(),
        addresses: vec!["10.0.0.2".into(), "fd00::2".into()],
        identity: "spiffe://cluster.local/ns/shop/sa/reviews".into(),
        meshed: true,
        mtls: mtls("strict"),
        on_agent_down: "hold".into(),
        place: Some("netns:/run/netns/reviews".into()),
        labels: BTreeMap::new(),
        source: None,
    }
}

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
    let parsed =
        Cli::try_parse_from(["mesh-agent", "get", "svc", "reviews", "-n", "shop", "-o", "wide"]).unwrap();
    let Command::Get {
        kind,
        name,
        namespace,
        output,
    } = parsed.command
    else {
        panic!("{parsed:?}")
    };
    assert_eq!(
        (kind, name.as_deref(), namespace.as_deref()),
        (Kind::Services, Some("reviews"), Some("shop"))
    );
    assert_eq!(
        (output.output, output.admin.as_str()),
        (Format::Wide, "127.0.0.1:15000")
    );
    Cli::try_parse_from(["mesh-agent", "get", "secrets"]).unwrap_err();
}

#[test]
fn shells_complete_every_command() {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let script = String::from_utf8(args::completions(shell)).unwrap();
        for command in Cli::command().get_subcommands() {
            assert!(
                script.contains(command.get_name()),
                "{shell}: {}",
                command.get_name()
            );
        }
    }
}

/// What bash offers for the last of the words, by the script that users load.
fn offered(words: &[&str]) -> String {
    let script = args::completions(Shell::Bash);
    let asking = format!(
        "\nCOMP_WORDS=({}); COMP_CWORD={}\n\
         complete=$(complete -p mesh-agent); complete=${{complete##*-F }}; complete=${{complete%% *}}\n\
         $complete mesh-agent \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; echo \"${{COMPREPLY[*]}}\"",
        words.join(" "),
        words.len() - 1,
    );
    let asked = std::process::Command::new("bash")
        .args(["--norc", "-c"])
        .arg(String::from_utf8(script).unwrap() + &asking)
        .output()
        .unwrap();
    assert!(asked.stderr.is_empty(), "{asked:?}");
    String::from_utf8(asked.stdout).unwrap().trim_end().to_owned()
}

#[test]
fn bash_completes_commands_kinds_and_options() {
    assert_eq!(offered(&["mesh-agent", "unin"]), "uninstall");
    assert_eq!(offered(&["mesh-agent", "get", "ser"]), "services");
    assert_eq!(offered(&["mesh-agent", "get", "services", "--out"]), "--output");
    assert_eq!(offered(&["mesh-agent", "status", "-o", "y"]), "yaml");
}

#[test]
fn workloads() {
    let items = vec![
        workload("reviews-1", "enrolled", ""),
        workload("a", "pending", "no \x1b[31mnetns"),
    ];
    let table = "\
NAMESPACE   NAME        STATE                     NODE     ADDRESSES          MTLS
shop        reviews-1   enrolled                  node-a   10.0.0.2,fd00::2   strict, 9090 permissive
shop        a           pending (no \u{fffd}[31mnetns)   node-a   10.0.0.2,fd00::2   strict, 9090 permissive
";
    assert_eq!(get::workloads(&items, false), table);
    let wide = get::workloads(&items, true);
    assert!(
        wide.contains("IDENTITY") && wide.contains("netns:/run/netns/reviews"),
        "{wide}"
    );
    assert!(
        wide.lines()
            .all(|line| line.ends_with('-') || line.ends_with("SOURCE")),
        "an absent value is a dash"
    );
}

#[test]
fn services_and_routes() {
    let endpoint = |address: &str| Endpoint {
        address: address.into(),
        workload: None,
        meshed: false,
        active_requests: 0,
    };
    let addresses = [
        "10.0.0.1:80",
        "10.0.0.2:80",
        "10.0.0.3:80",
        "10.0.0.4:80",
        "10.0.0.5:80",
    ];
    let service = Service {
        namespace: "shop".into(),
        name: "reviews".into(),
        hostname: "reviews.shop.svc.cluster.local".into(),
        addresses: vec!["10.96.0.10".into()],
        headless: false,
        ports: vec![ServicePort {
            port: 80,
            name: None,
            protocol: "http1".into(),
            balancing: "leastRequest".into(),
            endpoints: addresses.map(endpoint).into(),
            routes: 2,
        }],
        source: None,
    };
    let table = "\
NAMESPACE   NAME      ADDRESSES    PORTS      ENDPOINTS
shop        reviews   10.96.0.10   80/http1   10.0.0.1:80,10.0.0.2:80,10.0.0.3:80 + 2 more
";
    assert_eq!(get::services(&vec![service], false), table);

    let backend = |service: &str, weight| Backend {
        service: Some(service.into()),
        weight,
    };
    let route = Route {
        namespace: "shop".into(),
        name: "canary/0".into(),
        service: "shop/reviews".into(),
        port: 80,
        clients: None,
        matches: RouteMatch {
            path: Some("prefix:/a".into()),
            method: Some("GET".into()),
            ..Default::default()
        },
        backends: vec![backend("shop/v1:80", 9), backend("shop/v2:80", 1)],
        request_timeout_ms: Some(1500),
        try_timeout_ms: None,
        retries: 2,
        retry_codes: Vec::new(),
    };
    let any = Route {
        matches: RouteMatch::default(),
        backends: vec![backend("shop/v1:80", 0)],
        ..route.clone()
    };
    let table = "\
NAMESPACE   NAME       SERVICE           MATCHES         BACKENDS                         CLIENTS   TIMEOUT   TRY-TIMEOUT   RETRIES
shop        canary/0   shop/reviews:80   GET prefix:/a   shop/v1:80 90%, shop/v2:80 10%   -         1500ms    -             2
shop        canary/0   shop/reviews:80   *               shop/v1:80                       -         1500ms    -             2
";
    assert_eq!(get::routes(&vec![route, any], true), table);
}

#[test]
fn certificates_and_connections() {
    let certificate = Certificate {
        namespace: "shop".into(),
        name: "reviews".into(),
        identity: "spiffe://cluster.local/ns/shop/sa/reviews".into(),
        state: "valid".into(),
        serial: Some("01".into()),
        not_before: Some("2026-01-01T12:00:00Z".into()),
        not_after: Some("2026-01-02T12:00:00Z".into()),
        error: None,
    };
    let table = "\
NAMESPACE   NAME      STATE   ENDS-IN
shop        reviews   valid   12h
";
    assert_eq!(get::certificates(&vec![certificate], false, now()), table);
    let connection = Connection {
        namespace: "shop".into(),
        name: "reviews-1".into(),
        direction: "inbound".into(),
        protocol: "HTTP/1.1".into(),
        peer: "10.0.0.1:40000".into(),
        destination: "10.0.0.2:8080".into(),
        peer_identity: None,
        start_time: "2026-01-01T23:59:00Z".into(),
        bytes_received: 10,
        bytes_sent: 2000,
    };
    let table = "\
NAMESPACE   NAME        DIRECTION   PROTOCOL   PEER             DESTINATION     RECEIVED   SENT   AGE
shop        reviews-1   inbound     HTTP/1.1   10.0.0.1:40000   10.0.0.2:8080   10         2000   60s
";
    assert_eq!(get::connections(&vec![connection], false, now()), table);
}

#[test]
fn ebpf_shows_what_counted() {
    let state = Ebpf {
        state: "attached".into(),
        kernel: "6.18".into(),
        layout: "v1".into(),
        bpffs: "/sys/fs/bpf/mesh-agent".into(),
        hooks: vec![Hook {
            name: "connect4".into(),
            program_id: 7,
            link_id: 9,
        }],
        features: vec![
            lacking(),
            Feature {
                name: "bpf_set_retval".into(),
                present: true,
                ..lacking()
            },
        ],
        counters: BTreeMap::from([("captured".into(), 3), ("map_full".into(), 0)]),
        ..Ebpf::default()
    };
    let text = get::ebpf(&state, false);
    assert!(
        text.contains("fast path   false     5.15    all through the agent\n"),
        "{text}"
    );
    assert!(!text.contains("bpf_set_retval"), "{text}");
    assert!(text.contains("connect4   7         9\n"), "{text}");
    assert!(
        text.contains("captured   3\n") && !text.contains("map_full"),
        "{text}"
    );
    assert!(get::ebpf(&state, true).contains("map_full   0\n"));
}

fn sample_status() -> Status {
    Status {
        node: "node-a".into(),
        version: "0.1.0".into(),
        pid: 42,
        start_time: "2026-01-01T00:00:00Z".into(),
        uptime_seconds: 86_400,
        ready: false,
        conditions: vec![Condition {
            name: "capture".into(),
            holds: false,
            message: "no cgroup2".into(),
        }],
        draining: false,
        trust_domain: "cluster.local".into(),
        generation: 7,
        counts: Counts {
            workloads: 5,
            local_workloads: 2,
            pending_workloads: 1,
            certificates: 1,
            ..Counts::default()
        },
        next_certificate_expiry: Some("2026-01-02T12:00:00Z".into()),
        findings: vec![Finding {
            severity: "error".into(),
            file: "bad.yaml".into(),
            document: 2,
            resource: "HTTPRoute shop/a".into(),
            path: "spec.rules".into(),
            message: "unknown field".into(),
        }],
        kernel_tls: true,
        lacking: vec![lacking()],
    }
}

fn lacking() -> Feature {
    Feature {
        name: "fast path".into(),
        present: false,
        since: "5.15".into(),
        without: "all through the agent".into(),
    }
}

#[test]
fn status_on_one_screen() {
    let text = "\
Node:         node-a
State:        not ready
Version:      0.1.0
Running for:  24h (process 42)
Trust domain: cluster.local
Workloads:    2 here, 1 of them not captured (`get workloads` says why), 5 known
Services:     0
Route rules:  0
Certificates: 1, the first ends in 12h
Encryption:   by the kernel, where the other agent agrees
Connections:  0 in, 0 out
Fast path:    0 connections made, 0 ways open
Generation:   7
Not ready:    capture: no cgroup2
Kernel lacks: fast path (Linux 5.15): all through the agent

SEVERITY   RESOURCE           WHERE                   MESSAGE
error      HTTPRoute shop/a   bad.yaml:2 spec.rules   unknown field
";
    assert_eq!(status::render(&sample_status(), now()), text);
}

#[test]
fn yaml_reads_back() {
    let status = sample_status();
    let text = yaml(&status).unwrap();
    assert!(text.contains("uptimeSeconds: 86400\n"), "{text}");
    assert_eq!(serde_saphyr::from_str::<Status>(&text).unwrap(), status);
}

/// Answers one request with these bytes and returns the address to ask.
fn agent(answer: &'static str) -> String {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let length = stream.read(&mut request).unwrap();
        assert!(
            request[..length]
                .starts_with(b"GET /api/v1/workloads?namespace=shop&name=a%26b HTTP/1.1\r\nhost: 127.0.0.1:")
        );
        stream.write_all(answer.as_bytes()).unwrap();
    });
    address
}

fn get_one(admin: String) -> Result<String, String> {
    let output = Output {
        output: Format::Table,
        admin,
    };
    let wanted = get::Wanted {
        kind: Kind::Workloads,
        name: Some("a&b".into()),
        namespace: Some("shop".into()),
    };
    let mut out = Vec::new();
    let done = get::run(&wanted, &output, &mut out);
    done.map(|()| String::from_utf8(out).unwrap())
        .map_err(|error| format!("{error:#}"))
}

#[test]
fn failures_say_what_to_do() {
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let error = get_one(free.to_string()).unwrap_err();
    for part in [
        &*free.to_string(),
        "Is it running",
        "--admin",
        "MESH_AGENT_ADMIN",
        "refused",
    ] {
        assert!(error.contains(part), "no {part} in {error}");
    }
    let error = get_one(agent("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]")).unwrap_err();
    assert!(
        error.contains("no workloads named `a&b` in namespace `shop`"),
        "{error}"
    );
    let error = get_one(agent("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")).unwrap_err();
    assert!(error.contains("another version"), "{error}");
    let error = get_one(agent(
        "HTTP/1.1 400 Bad\r\ncontent-length: 13\r\n\r\n{\"error\":\"x\"}",
    ))
    .unwrap_err();
    assert!(error.contains("400") && error.ends_with(": x"), "{error}");
    let error = get_one(agent("SSH-2.0-OpenSSH_9.2\r\n")).unwrap_err();
    assert!(error.contains("does not talk like an agent"), "{error}");
}
