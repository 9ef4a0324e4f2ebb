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

/// The least of these counts: a second that passes, or memory that is given back, falls into one and not into the next.
const ROUNDS: u32 = 6;
const REQUESTS: u64 = 100;

/// More client's ports and more dates than a table of HTTP/2 fields has room for: what agents are like after a minute.
const SEEN: u64 = 100;

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
    for second in 0..SEEN {
        Client::connect(&web).ask(second);
    }
    let pids = MOST.map(|most| agent(&mut web.mesh.agents, most.node).process().unwrap().id());
    for pid in pids {
        callgrind.tell(pid, &["instrumentation", "on"]);
    }
    // One connection for all that is counted: making one costs more than a request.
    let mut client = Client::connect(&web);
    let mut profiles = [Vec::new(), Vec::new()];
    for round in 1..=ROUNDS {
        for _ in 0..REQUESTS {
            client.ask(SEEN);
        }
        for (pid, profiles) in pids.into_iter().zip(&mut profiles) {
            profiles.push(callgrind.dump(pid, round));
        }
    }
    let mut over = String::new();
    for (most, profiles) in MOST.into_iter().zip(&profiles) {
        let program = agent(&mut web.mesh.agents, most.node).command();
        over += &judge(&most, Path::new(program.get_program()), profiles);
    }
    assert!(over.is_empty(), "{over}");
}

fn agent<'a>(agents: &'a mut [Agent], node: &str) -> &'a mut Agent {
    agents.iter_mut().find(|agent| agent.node == node).unwrap()
}

/// Says what is wrong, and where to look.
fn judge(most: &Most, program: &Path, profiles: &[Profile]) -> String {
    let bound = if is_linked_as_one(program) {
        most.release
    } else {
        most.separate
    };
    let least = profiles.iter().min_by_key(|profile| profile.count).unwrap();
    let kept = least.keep(most.node);
    let counts: Vec<u64> = profiles.iter().map(|profile| profile.count / REQUESTS).collect();
    let count = least.count / REQUESTS;
    eprintln!("{}: {count} instructions per request ({counts:?})", most.node);
    if (LEAST..=bound).contains(&count) {
        return String::new();
    }
    format!(
        "{}: {count} instructions per request, at most {bound} are meant to be ({counts:?}); \
         `callgrind_annotate {}` shows where they are\n",
        most.node,
        kept.display()
    )
}

/// One connection from the client's pod.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(web: &Web) -> Self {
        Self(BufReader::new(connect(&web.client, address(WEB_V4, 80))))
    }

    /// A request with the headers that clients usually send, and its answer, of that date.
    fn ask(&mut self, second: u64) {
        let request = format!(
            "GET /dated?second={second} HTTP/1.1\r\nhost: web.shop\r\nuser-agent: curl/7.88.1\r\n\
             accept: */*\r\naccept-encoding: gzip\r\n\r\n"
        );
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
        let head = read_head(&mut self.0);
        assert!(head[0].starts_with("http/1.1 200"), "{head:?}");
        let length = head.iter().find_map(|line| line.strip_prefix("content-length: "));
        let length = length.and_then(|length| length.parse().ok());
        let length = length.unwrap_or_else(|| panic!("a body without length: {head:?}"));
        self.0.read_exact(&mut vec![0; length]).unwrap();
    }
}

/// Callgrind over the agents of one mesh; what it writes is in this folder.
struct Callgrind<'a>(&'a Path);

impl Callgrind<'_> {
    /// What starts an agent under it: nothing is counted yet, so that the start is several times as fast.
    fn command(&self) -> Vec<String> {
        vec![
            "valgrind".to_owned(),
            "--tool=callgrind".to_owned(),
            "--instr-atstart=no".to_owned(),
            // What other threads do now and then is no request's.
            "--separate-threads=yes".to_owned(),
            // One thread runs at a time, and a busy one would leave the others no turn.
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

    /// What the data path's only thread did since the last time: far more than any other.
    fn dump(&self, pid: u32, number: u32) -> Profile {
        self.tell(pid, &["dump"]);
        let prefix = format!("{pid}.{number}-");
        let paths = fs::read_dir(self.0).unwrap().map(|entry| entry.unwrap().path());
        let of_threads = paths.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(&prefix));
        let profiles = of_threads.map(Profile::read);
        profiles.max_by_key(|profile| profile.count).unwrap()
    }

    fn pipes(&self) -> String {
        format!("--vgdb-prefix={}", self.0.join("vgdb").display())
    }
}

/// Of one thread, over one round.
struct Profile {
    path: PathBuf,
    count: u64,
}

impl Profile {
    fn read(path: PathBuf) -> Self {
        let text = fs::read_to_string(&path).unwrap();
        let count = text.lines().find_map(|line| line.strip_prefix("summary: "));
        let count = count.and_then(|count| count.trim().parse().ok());
        let count = count.unwrap_or_else(|| panic!("{} has no sum", path.display()));
        Self { path, count }
    }

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
