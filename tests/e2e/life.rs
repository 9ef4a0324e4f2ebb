//! Agents that die and come back, and load that comes and goes.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use mesh_agent::identity::{Clock, Identities};
use mesh_tests::{Agent, Mesh, Options, Pod, PodSpec, until_ok};
use socket2::SockRef;
use tokio::time::Instant;

use crate::common::{HTTP, WEB_V4, Web, address, connect, http_server, wait_for, web};

const ECHO: &str = "10.96.0.41";

/// How a connection from a pod went: when it was tried, how long that took, and whether it got through.
#[derive(Clone, Copy, Debug)]
struct Probe {
    begun: Instant,
    ended: Instant,
    through: bool,
}

/// Connects every 10 ms until it is told to stop, and has a byte echoed.
fn probe(pod: &Pod, to: SocketAddr, stop: &AtomicBool) -> Vec<Probe> {
    let echo = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    };
    let work = || {
        let mut probes = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let through = echo().is_ok();
            probes.push(Probe {
                begun,
                ended: Instant::now(),
                through,
            });
            thread::sleep(Duration::from_millis(10));
        }
        probes
    };
    pod.netns.enter(work).unwrap()
}

/// Probes from each pod before and after the first node's agent is killed, and when that was.
fn probe_around_a_kill(web: &mut Web, pods: [&Pod; 3], to: SocketAddr) -> (Instant, [Vec<Probe>; 3]) {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let probing = pods.map(|pod| scope.spawn(|| probe(pod, to, &stop)));
        thread::sleep(Duration::from_millis(300));
        web.mesh.agents[0].kill();
        let killed = Instant::now();
        thread::sleep(Duration::from_millis(1000));
        stop.store(true, Ordering::Relaxed);
        (killed, probing.map(|thread| thread.join().unwrap()))
    })
}

fn pins(folder: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(pins(&path));
        } else {
            all.insert(path);
        }
    }
    all
}

fn hooks(agent: &Agent) -> Vec<String> {
    let page = agent.get("/api/v1/ebpf").unwrap();
    let hooks = page["hooks"].as_array().unwrap();
    hooks
        .iter()
        .map(|hook| hook["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_killed_agent_leaves_each_pod_its_choice_and_a_new_one_takes_over() {
    let mut web = web();
    let held = web
        .mesh
        .pod(PodSpec::new("held", 0).annotation("mesh-agent.dev/on-agent-down", "hold"))
        .unwrap();
    let open = web.mesh.pod(PodSpec::new("open", 0)).unwrap();
    let outside = web.mesh.stranger("outside", 0).unwrap();
    let mut server = web.mesh.stranger("server", 1).unwrap();
    server.serve(&web.mesh.run, "echo", 7).unwrap();
    let bpffs = web.mesh.run.bpffs().join("node-a");
    let (pins_before, hooks_before) = (pins(&bpffs), hooks(&web.mesh.agents[0]));

    let (killed, probes) = probe_around_a_kill(&mut web, [&held, &open, &outside], server.at(7));
    let [held_probes, open_probes, outside_probes] = &probes;
    for (who, probes) in ["held", "open", "outside"].iter().zip(&probes) {
        let before = probes
            .iter()
            .filter(|probe| probe.ended < killed - Duration::from_millis(100));
        assert!(
            before.clone().count() > 5 && before.clone().all(|probe| probe.through),
            "{who}: {probes:?}"
        );
    }
    let after = |probes: &[Probe]| {
        probes
            .iter()
            .filter(|probe| probe.begun > killed)
            .copied()
            .collect::<Vec<_>>()
    };
    assert!(after(held_probes).len() > 20);
    assert!(
        after(held_probes).iter().all(|probe| !probe.through),
        "a held connection got through"
    );
    let last_refused = after(open_probes)
        .iter()
        .filter(|probe| !probe.through)
        .map(|probe| probe.ended)
        .max();
    assert!(
        last_refused.is_none_or(|last| last - killed < Duration::from_millis(50)),
        "still refused after {:?}",
        last_refused.map(|last| last - killed)
    );
    assert!(after(open_probes).iter().filter(|probe| probe.through).count() > 20);
    assert!(
        outside_probes.iter().all(|probe| probe.through),
        "who is not in the mesh noticed"
    );

    let started = Instant::now();
    web.mesh.agents[0].spawn(&web.mesh.run).unwrap();
    until_ok("all to work again", Duration::from_secs(10), || {
        for pod in [&held, &open] {
            let args = ["--max-time", "1", &format!("http://{WEB_V4}/")];
            anyhow::ensure!(pod.curl(&args)?.status == 200);
        }
        Ok(())
    })
    .unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "it took {:?}",
        started.elapsed()
    );
    web.mesh.agents[0].wait_ready().unwrap();
    assert_eq!(pins(&bpffs), pins_before);
    assert_eq!(hooks(&web.mesh.agents[0]), hooks_before);
}

#[test]
fn uninstall_removes_what_a_dead_agent_left() {
    let mut web = web();
    let held = web
        .mesh
        .pod(PodSpec::new("held", 0).annotation("mesh-agent.dev/on-agent-down", "hold"))
        .unwrap();
    let mut server = web.mesh.stranger("server", 1).unwrap();
    server.serve(&web.mesh.run, "http", 8080).unwrap();
    let url = format!("http://{}/", server.at(8080));
    assert_eq!(held.curl(&[&url]).unwrap().status, 200);
    web.mesh.agents[0].kill();
    assert!(held.curl(&[&url]).is_err());
    let agent = &web.mesh.agents[0];
    let bpffs = web.mesh.run.bpffs().join("node-a");
    let mut uninstall = agent.command();
    mesh_tests::shell::output(uninstall.arg("uninstall").arg("--bpffs").arg(&bpffs)).unwrap();
    assert_eq!(held.curl(&[&url]).unwrap().status, 200);
    let left = pins(&bpffs);
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_hundred_thousand_requests_are_all_answered_and_counted() {
    let web = web();
    let captured = |agent: &Agent, way: &str| {
        agent.get("/api/v1/ebpf").unwrap()["counters"][way]
            .as_u64()
            .unwrap()
    };
    let before = captured(&web.mesh.agents[0], "captured_tcp");
    let mut h2load = web.client.command("h2load");
    h2load
        .args(["--h1", "-n", "100000", "-c", "32"])
        .arg(format!("http://{WEB_V4}/status/204"));
    let report = mesh_tests::shell::output(&mut h2load).unwrap();
    assert!(
        report.contains("100000 succeeded, 0 failed, 0 errored, 0 timeout"),
        "{report}"
    );
    assert_eq!(captured(&web.mesh.agents[0], "captured_tcp") - before, 32);
    for (agent, reporter) in web.mesh.agents.iter().zip(["source", "destination"]) {
        let labels = [("reporter", reporter), ("response_code", "204")];
        until_ok(&agent.node, Duration::from_secs(3), || {
            let counted = agent.metrics()?.sum("istio_requests_total", &labels);
            anyhow::ensure!((counted - 100_000.0).abs() < 0.1, "it counts {counted}");
            Ok(())
        })
        .unwrap();
    }
}

/// What an agent holds.
#[derive(Debug)]
struct Holdings {
    descriptors: usize,
    flows: u64,
    kilobytes: u64,
}

fn holdings(web: &mut Web) -> [Holdings; 2] {
    // Pools let go of what is idle in their own time.
    [0, 1].map(|node| {
        let agent = &mut web.mesh.agents[node];
        let pid = agent.process().unwrap().id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .unwrap();
        let page = agent.get("/api/v1/ebpf").unwrap();
        let flows = page["maps"]
            .as_array()
            .unwrap()
            .iter()
            .find(|map| map["name"] == "FLOWS")
            .unwrap();
        Holdings {
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
            flows: flows["entries"].as_u64().unwrap(),
            kilobytes: resident.trim().trim_end_matches(" kB").parse().unwrap(),
        }
    })
}

/// Opens and closes 500 connections each second, every other one aborted with a request under way.
fn churn(client: &Pod, seconds: u32) {
    const AT_A_TIME: u32 = 4;
    let started = Instant::now();
    thread::scope(|scope| {
        for first in 0..AT_A_TIME {
            scope.spawn(move || {
                for number in (first..seconds * 500).step_by(AT_A_TIME as usize) {
                    let due = started + Duration::from_millis(2) * number;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    come_and_go(client, (number / AT_A_TIME).is_multiple_of(2));
                }
            });
        }
    });
    let most = Duration::from_secs(seconds.into()).mul_f64(1.1);
    assert!(
        started.elapsed() < most,
        "the rate was not held: {:?}",
        started.elapsed()
    );
}

fn come_and_go(client: &Pod, abort: bool) {
    let mut stream = connect(client, address(WEB_V4, 80));
    stream
        .write_all(b"GET /status/200 HTTP/1.1\r\nhost: web\r\n\r\n")
        .unwrap();
    if abort {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    } else {
        stream.read_exact(&mut [0; 16]).unwrap();
    }
}

#[test]
fn nothing_is_left_of_connections_that_came_and_went() {
    let mut web = web();
    let settled = |web: &mut Web, check: &dyn Fn(&Holdings, usize) -> bool| {
        until_ok("the agents to let go", Duration::from_secs(60), || {
            let now = holdings(web);
            anyhow::ensure!(now.iter().zip(0..).all(|(one, node)| check(one, node)), "{now:?}");
            Ok(now)
        })
        .unwrap()
    };
    let fresh = holdings(&mut web);
    // What is made once and kept: buffers, caches, the allocator's share of each thread. Pools are empty again.
    churn(&web.client, 20);
    let before = settled(&mut web, &|one, node| {
        one.flows == 0 && one.descriptors <= fresh[node].descriptors + 5
    });
    churn(&web.client, 60);
    let after = settled(&mut web, &|one, node| {
        one.flows == 0 && one.descriptors <= before[node].descriptors + 5
    });
    // Of 30,000 connections: 40 bytes of each would be more.
    const KEPT_KILOBYTES: u64 = 1024;
    for (before, after) in before.iter().zip(&after) {
        assert!(
            after.kilobytes <= before.kilobytes + KEPT_KILOBYTES,
            "{before:?}, then {after:?}"
        );
    }
    wait_for(&web.client, &format!("http://{WEB_V4}/"));
}

#[test]
fn certificates_are_renewed_under_load_and_nobody_notices() {
    // A certificate lives no longer than its root. This one, made by a clock that is late, ends soon.
    const LEFT: Duration = Duration::from_secs(75);
    const ROOT_LIFE: Duration = Duration::from_hours(10 * 365 * 24);
    let mut mesh = Mesh::start(&Options {
        agents: false,
        ..Options::default()
    })
    .unwrap();
    let late = Clock::new(|| SystemTime::now() - ROOT_LIFE + LEFT);
    Identities::open_embedded_with(&mesh.run.dir().join("ca"), "cluster.local", late).unwrap();
    let made = Instant::now();
    mesh.start_agents(&Options::default()).unwrap();
    mesh.service("web", &[WEB_V4], &[("http", 80, HTTP)], "web")
        .unwrap();
    mesh.service("echo", &[ECHO], &[("tcp", 7, 7777)], "web").unwrap();
    let mut server = http_server(&mut mesh, PodSpec::new("web", 1));
    server.serve(&mesh.run, "echo", 7777).unwrap();
    let client = mesh.pod(PodSpec::new("client", 0)).unwrap();
    wait_for(&client, &format!("http://{WEB_V4}/"));
    let renewals = |mesh: &Mesh| {
        let count = |agent: &Agent| {
            agent
                .metrics()
                .unwrap()
                .sum("mesh_agent_certificate_renewals_total", &[])
        };
        [count(&mesh.agents[0]), count(&mesh.agents[1])]
    };
    let (before, mut open) = (renewals(&mesh), connect(&client, address(ECHO, 7)));

    // To shortly before the end, when there was time for at least two renewals each.
    let load = (LEFT - Duration::from_secs(12)).saturating_sub(made.elapsed());
    let requests = (load.as_secs() * 100).to_string();
    let url = format!("http://{WEB_V4}/status/200");
    let report = thread::scope(|scope| {
        let args = [
            &*url,
            "--connections",
            "4",
            "--rate",
            "100",
            "--requests",
            &requests,
        ];
        let loading = scope.spawn({
            let client = &client;
            move || client.load(&args).unwrap()
        });
        while !loading.is_finished() {
            let mut back = [0; 4];
            open.write_all(b"ping").unwrap();
            open.read_exact(&mut back).unwrap();
            assert_eq!(&back, b"ping");
            // A connection of its own each time: it is made with the certificate of the moment.
            come_and_go(&client, false);
            thread::sleep(Duration::from_millis(100));
        }
        loading.join().unwrap()
    });
    assert_eq!(report["failed"], 0, "{report}");
    assert_eq!(report["statuses"]["200"].to_string(), requests, "{report}");
    for (before, after) in before.iter().zip(renewals(&mesh)) {
        assert!(after >= before + 2.0, "{before} certificates, then {after}");
    }
}
