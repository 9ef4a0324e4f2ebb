//! What a request costs in instructions of the agents, beside what `counted` counts.
//!
//! Valgrind's callgrind runs the real agents on a processor of its own making, so a count depends neither on the
//! machine's processor nor on what else keeps it busy. The kernel's instructions are not in it.

use std::collections::HashSet;
use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::mem;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use mesh_tests::{Agent, Options, shell};

use crate::common::{WEB_V4, Web, address, connect, read_head, web_with};

/// The least of these counts: a second that passes, or memory that is given back, falls into one and not into the next.
const ROUNDS: u32 = 6;
const REQUESTS: u64 = 100;

/// More ports of clients, and more dates, than a table of HTTP/2 fields has room for: what a minute brings.
const SEEN: u64 = 100;

/// Left out: how far glibc's allocator has to look depends on all that happened before, and `counted` has its calls.
const ALLOCATOR: &str = "/malloc/malloc.c";

/// Fewer mean that something else was counted.
const LEAST: u64 = 10_000;

/// Instructions per request of one agent, both directions.
struct Most {
    node: &'static str,
    /// Of the release profile, which links crates into one (thin LTO).
    release: u64,
    /// With that switched off, as it is while somebody works on the agent.
    separate: u64,
    /// What comes on top when the tables of fields are full.
    later: u64,
}

/// Measured in three runs: 66,113 to 66,314 at the client's end and 68,665 to 68,787 at the server's, later 68,147 to
/// 68,378 and 70,724 to 70,861; beside busy loops some 100 more, later 250. A copy of a request's headers takes 750 at the
/// least. (Some 400 fewer before bodies of requests and of responses had one way to be sent: what is inlined where.)
const MOST: [Most; 2] = [
    Most {
        node: "node-a",
        release: 66_550,
        separate: 81_850,
        later: 2_300,
    },
    Most {
        node: "node-b",
        release: 69_050,
        separate: 85_050,
        later: 2_300,
    },
];

#[test]
fn a_request_needs_few_instructions() {
    let folder = tempfile::tempdir().unwrap();
    let mut web = web_with(&Options {
        config: "threads: 1\n".to_owned(),
        under: Callgrind(folder.path()).command(),
        ..Options::default()
    });
    let pids = MOST.map(|most| agent(&mut web.mesh.agents, most.node).process().unwrap().id());
    let mut client = Client::connect(&web);
    for _ in 0..REQUESTS {
        client.ask(SEEN);
    }
    let callgrind = Callgrind(folder.path());
    for pid in pids {
        callgrind.tell(pid, &["instrumentation", "on"]);
    }
    let early = callgrind.count("early", pids, &mut client);
    for second in 0..SEEN {
        Client::connect(&web).ask(second);
    }
    let mut client = Client::connect(&web);
    let later = callgrind.count("later", pids, &mut client);

    let mut over = String::new();
    for (n, most) in MOST.into_iter().enumerate() {
        let program = agent(&mut web.mesh.agents, most.node).command();
        let linked_as_one = is_linked_as_one(Path::new(program.get_program()));
        let bound = if linked_as_one {
            most.release
        } else {
            most.separate
        };
        over += &early[n].judge(most.node, bound);
        over += &later[n].judge(most.node, bound + most.later);
    }
    assert!(over.is_empty(), "{over}");
}

fn agent<'a>(agents: &'a mut [Agent], node: &str) -> &'a mut Agent {
    agents.iter_mut().find(|agent| agent.node == node).unwrap()
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

    /// What each agent needs for the client's requests, one after the other on one connection.
    fn count(&self, when: &'static str, pids: [u32; 2], client: &mut Client) -> [Counts; 2] {
        for pid in pids {
            self.tell(pid, &["zero"]);
        }
        let mut counts = pids.map(|_| Counts {
            when,
            rounds: Vec::new(),
        });
        for _ in 0..ROUNDS {
            for _ in 0..REQUESTS {
                client.ask(SEEN);
            }
            for (pid, counts) in pids.into_iter().zip(&mut counts) {
                counts.rounds.push(self.dump(pid));
            }
        }
        counts
    }

    /// What the data path's only thread did since the last time: far more than any other.
    fn dump(&self, pid: u32) -> Profile {
        self.tell(pid, &["dump"]);
        let of_threads = fs::read_dir(self.0).unwrap().filter_map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name()?.to_str()?;
            name.starts_with(&format!("{pid}.")).then(|| Profile::take(&path))
        });
        of_threads.max_by_key(|profile| profile.count).unwrap()
    }

    fn pipes(&self) -> String {
        format!("--vgdb-prefix={}", self.0.join("vgdb").display())
    }
}

/// Of one agent.
struct Counts {
    when: &'static str,
    rounds: Vec<Profile>,
}

impl Counts {
    /// Says what is wrong, and where to look.
    fn judge(&self, node: &str, most: u64) -> String {
        let least = self.rounds.iter().min_by_key(|profile| profile.count).unwrap();
        assert!(
            least.knows_allocator,
            "what is the allocator's? Is libc6-dbg missing?"
        );
        // Where cargo keeps what tests leave.
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{node}-{}.callgrind", self.when));
        fs::create_dir_all(kept.parent().unwrap()).unwrap();
        fs::write(&kept, &least.text).unwrap();
        let rounds: Vec<u64> = self
            .rounds
            .iter()
            .map(|profile| profile.count / REQUESTS)
            .collect();
        let count = least.count / REQUESTS;
        eprintln!(
            "{node}, {}: {count} instructions per request ({rounds:?})",
            self.when
        );
        if (LEAST..=most).contains(&count) {
            return String::new();
        }
        format!(
            "{node}, {}: {count} instructions per request, at most {most} are meant to be ({rounds:?}); \
             `callgrind_annotate {}` shows where they are\n",
            self.when,
            kept.display()
        )
    }
}

/// Of one thread, over one round.
struct Profile {
    text: String,
    count: u64,
    knows_allocator: bool,
}

impl Profile {
    /// Reads it and removes it.
    fn take(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        fs::remove_file(path).unwrap();
        let (count, knows_allocator) = sum(&text);
        Self {
            text,
            count,
            knows_allocator,
        }
    }
}

/// Adds up a file in callgrind's format: names of source files, and lines of code with what they cost. A name is
/// written out where it is first used, and a number after that. Also says whether the allocator was among them.
fn sum(profile: &str) -> (u64, bool) {
    let mut allocators = HashSet::new();
    let (mut allocates, mut called, mut sum) = (false, false, 0);
    for line in profile.lines() {
        if let Some((key @ ("fl" | "fi" | "fe" | "cfl" | "cfi"), file)) = line.split_once('=') {
            let (number, name) = file.split_once(' ').unwrap_or((file, ""));
            if name.ends_with(ALLOCATOR) {
                allocators.insert(number);
            }
            if !key.starts_with('c') {
                allocates = allocators.contains(number);
            }
        } else if line.starts_with("calls=") {
            // The next line says what the function that was called cost: its own lines say so again.
            called = true;
        } else if line.starts_with(|first: char| first.is_ascii_digit() || "+-*".contains(first))
            && !mem::take(&mut called)
            && !allocates
        {
            let cost = line.split(' ').nth(1).and_then(|cost| cost.parse::<u64>().ok());
            sum += cost.unwrap_or_else(|| panic!("{line:?} has no cost"));
        }
    }
    (sum, !allocators.is_empty())
}

/// Thin LTO marks the names of thousands of functions that it takes from one crate to another; without it there is
/// none.
fn is_linked_as_one(agent: &Path) -> bool {
    const MARK: &[u8] = b".llvm.";
    let program = fs::read(agent).unwrap();
    let marks = program.windows(MARK.len()).filter(|bytes| *bytes == MARK);
    marks.take(100).count() == 100
}
