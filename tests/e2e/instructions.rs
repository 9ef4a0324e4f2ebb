//! What a request costs in instructions of the agents, beside what `counted` counts.
//!
//! Valgrind's callgrind runs the real agents on a processor of its own making, so a count depends neither on the
//! machine's processor nor on what else keeps it busy. The kernel's instructions are not in it.

use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use mesh_tests::{Agent, Options, shell};

use crate::common::{WEB_V4, Web, address, connect, read_head, web_with};

/// The least of these counts: what an agent does now and then (looking for changed files, giving memory back)
/// falls into one round and not into the next.
const ROUNDS: u32 = 10;
const REQUESTS: u64 = 100;

/// Fewer mean that something else was counted.
const LEAST: u64 = 10_000;

/// Instructions per request of one agent, both directions.
struct Most {
    node: &'static str,
    /// Of the release profile, which links crates into one (thin LTO).
    release: u64,
    /// With that switched off, as it is while somebody works on the agent.
    separate: u64,
}

const MOST: [Most; 2] = [
    Most {
        node: "node-a",
        release: 71_300,
        separate: 87_000,
    },
    Most {
        node: "node-b",
        release: 75_000,
        separate: 92_000,
    },
];

#[test]
fn a_request_needs_few_instructions() {
    let folder = tempfile::tempdir().unwrap();
    let callgrind = Callgrind(folder.path());
    let mut web = web_with(&Options {
        config: "threads: 1\n".to_owned(),
        under: callgrind.command(),
        ..Options::default()
    });
    let pids = MOST.map(|most| agent(&mut web.mesh.agents, most.node).process().unwrap().id());
    // The certificates are issued, and the code is there in its instrumented form.
    let mut connection = Connection::open(&web);
    connection.ask(REQUESTS);
    for pid in pids {
        callgrind.tell(pid, &["instrumentation", "on"]);
    }
    connection.ask(REQUESTS);
    for pid in pids {
        callgrind.tell(pid, &["zero"]);
    }
    let mut profiles: [Vec<Profile>; 2] = [Vec::new(), Vec::new()];
    for round in 1..=ROUNDS {
        connection.ask(REQUESTS);
        for (pid, profiles) in pids.into_iter().zip(&mut profiles) {
            profiles.push(callgrind.dump(pid, round));
        }
    }
    let mut over = Vec::new();
    for (most, profiles) in MOST.into_iter().zip(profiles) {
        let program = agent(&mut web.mesh.agents, most.node).command();
        let bound = if is_linked_as_one(Path::new(program.get_program())) {
            most.release
        } else {
            most.separate
        };
        let per_request = |profile: &Profile| profile.count / REQUESTS;
        let counts: Vec<u64> = profiles.iter().map(per_request).collect();
        eprintln!("{} {counts:?}", most.node);
        let least = profiles.iter().min_by_key(|profile| profile.count).unwrap();
        let kept = least.keep(most.node);
        if !(LEAST..=bound).contains(&per_request(least)) {
            over.push(format!(
                "{}: {} instructions per request, at most {bound} are meant to be ({counts:?}); \
                 `callgrind_annotate {}` shows where they are",
                most.node,
                per_request(least),
                kept.display()
            ));
        }
    }
    assert!(over.is_empty(), "{}", over.join("\n"));
}

fn agent<'a>(agents: &'a mut [Agent], node: &str) -> &'a mut Agent {
    agents.iter_mut().find(|agent| agent.node == node).unwrap()
}

/// One connection for all that is counted: making one costs more than a request.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(web: &Web) -> Self {
        Self(BufReader::new(connect(&web.client, address(WEB_V4, 80))))
    }

    /// One request after the other, with the headers that clients usually send.
    fn ask(&mut self, requests: u64) {
        for _ in 0..requests {
            let request = b"GET /status/200 HTTP/1.1\r\nhost: web.shop\r\nuser-agent: curl/7.88.1\r\n\
                            accept: */*\r\naccept-encoding: gzip\r\n\r\n";
            self.0.get_mut().write_all(request).unwrap();
            let head = read_head(&mut self.0);
            assert!(head[0].starts_with("http/1.1 200"), "{head:?}");
            let length = head.iter().find_map(|line| line.strip_prefix("content-length: "));
            let length = length.and_then(|length| length.parse().ok());
            let length = length.unwrap_or_else(|| panic!("a body without length: {head:?}"));
            self.0.read_exact(&mut vec![0; length]).unwrap();
        }
    }
}

/// Callgrind over the agents of one mesh; what it writes is in this folder.
struct Callgrind<'a>(&'a Path);

impl Callgrind<'_> {
    /// What starts an agent under it: nothing is counted yet, which makes the start several times as fast.
    fn command(&self) -> Vec<String> {
        vec![
            "valgrind".to_owned(),
            "--tool=callgrind".to_owned(),
            "--instr-atstart=no".to_owned(),
            // Only one thread runs at a time, and a busy one would leave the others no turn.
            "--fair-sched=try".to_owned(),
            format!("--callgrind-out-file={}", self.0.join("%p").display()),
            self.pipes(),
        ]
    }

    /// Has it obey, while the agent goes on.
    fn tell(&self, pid: u32, words: &[&str]) {
        let mut vgdb = Command::new("vgdb");
        vgdb.arg(self.pipes()).arg(format!("--pid={pid}")).args(words);
        shell::output(&mut vgdb).unwrap();
    }

    /// What was counted since the last time.
    fn dump(&self, pid: u32, number: u32) -> Profile {
        self.tell(pid, &["dump"]);
        let path = self.0.join(format!("{pid}.{number}"));
        let text = fs::read_to_string(&path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("summary: "));
        let count = line.and_then(|count| count.trim().parse().ok());
        let count = count.unwrap_or_else(|| panic!("{}: {line:?} is no count", path.display()));
        Profile { path, count }
    }

    fn pipes(&self) -> String {
        format!("--vgdb-prefix={}", self.0.join("vgdb").display())
    }
}

struct Profile {
    path: PathBuf,
    count: u64,
}

impl Profile {
    /// Puts it where cargo keeps what tests leave, for whoever wants to know where the instructions are.
    fn keep(&self, node: &str) -> PathBuf {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        fs::create_dir_all(folder).unwrap();
        let kept = folder.join(format!("{node}.callgrind"));
        fs::copy(&self.path, &kept).unwrap();
        kept
    }
}

/// Thin LTO marks the names of thousands of functions that it takes from one crate to another; without it there is
/// none.
fn is_linked_as_one(agent: &Path) -> bool {
    const MARK: &[u8] = b".llvm.";
    let program = fs::read(agent).unwrap();
    let marks = program.windows(MARK.len()).filter(|bytes| *bytes == MARK);
    marks.take(100).count() == 100
}
