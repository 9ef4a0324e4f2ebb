//! A node that lacks something, for one process alone: what is taken away is taken from a mount namespace, or from the
//! process, between fork and exec.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context as _;
use mesh_tests::{Process, Run, program, shell, until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::world::PATIENCE;

/// Runs in the new process, before the agent's program does.
type Step = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// `CAP_CHECKPOINT_RESTORE`, the last one since 5.9.
const LAST_CAPABILITY: libc::c_ulong = 40;

/// In the node's folder.
const AGENT: &str = "mesh-agent";

pub(crate) struct Node {
    pub(crate) run: Run,
    pub(crate) config: Config,
    steps: Vec<Step>,
}

pub(crate) struct Config {
    pub(crate) admin: SocketAddr,
    pub(crate) bpffs: PathBuf,
    pub(crate) folder: PathBuf,
}

/// What `doctor -o json` said.
pub(crate) struct Report {
    pub(crate) success: bool,
    pub(crate) json: Value,
}

impl Node {
    /// One that lacks nothing.
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let run = Run::start(&format!("d{:x}-{number}", std::process::id())).unwrap();
        let folder = run.dir().join("agent");
        fs::create_dir_all(folder.join("resources")).unwrap();
        let config = Config {
            admin: "127.0.0.1:0".parse().unwrap(),
            bpffs: run.bpffs().join("agent"),
            folder,
        };
        // Reached by who may not look into the folder where it was built, too.
        let agent = config.folder.join(AGENT);
        fs::write(&agent, "").unwrap();
        let built = program("mesh-agent", "MESH_AGENT_BIN").unwrap();
        let alone: Step = Arc::new(move || {
            unshare(CloneFlags::CLONE_NEWNS)?;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
            bind(&built, &agent)
        });
        Self {
            run,
            config,
            steps: vec![alone],
        }
    }

    pub(crate) fn but(mut self, step: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Self {
        self.steps.push(Arc::new(step));
        self
    }

    /// Nothing is mounted at any cgroup's place any more.
    pub(crate) fn without_cgroups(self) -> Self {
        let mounts = cgroup_mounts();
        self.but(move || {
            for (_, path) in mounts.iter().rev() {
                umount2(path, MntFlags::MNT_DETACH)?;
            }
            Ok(())
        })
    }

    /// What is mounted as cgroup2 is only this part of it.
    pub(crate) fn with_part_of_cgroup2(self, part: &Path) -> Self {
        let (part, place) = (part.to_owned(), cgroup2());
        self.but(move || bind(&part, &place))
    }

    /// In a cgroup namespace of its own, whose root is the cgroup of `join` (a `cgroup.procs`), and nothing else is
    /// mounted: as container runtimes do it.
    pub(crate) fn in_a_cgroup_namespace(self, join: PathBuf) -> Self {
        let place = cgroup2();
        let node = self.without_cgroups();
        // Before the hierarchy is gone.
        let first: Step = Arc::new(move || {
            fs::write(&join, "0")?;
            Ok(unshare(CloneFlags::CLONE_NEWCGROUP)?)
        });
        let mut steps = vec![first];
        steps.extend(node.steps);
        Self { steps, ..node }.but(move || {
            let none = MsFlags::empty();
            Ok(mount(
                Some("cgroup2"),
                &place,
                Some("cgroup2"),
                none,
                None::<&str>,
            )?)
        })
    }

    /// A file with this text lies over another.
    pub(crate) fn with_file(self, path: &'static str, text: &str) -> Self {
        let own = self.config.folder.join(path.replace('/', "-"));
        fs::write(&own, text).unwrap();
        self.but(move || bind(&own, Path::new(path)))
    }

    /// Without one capability, by number.
    pub(crate) fn without_capability(self, number: libc::c_ulong) -> Self {
        self.but(move || drop_capability(number))
    }

    /// With these capabilities alone.
    pub(crate) fn with_capabilities(self, kept: &'static [libc::c_ulong]) -> Self {
        self.but(move || {
            let mut others = (0..=LAST_CAPABILITY).filter(|number| !kept.contains(number));
            others.try_for_each(drop_capability)
        })
    }

    /// `bpf(2)` fails with `errno`, as under a container's seccomp profile.
    pub(crate) fn with_bpf_failing(self, errno: i32) -> Self {
        let errno = errno.unsigned_abs();
        self.but(move || forbid_bpf(errno))
    }

    /// What the agent of this node would be told to use.
    fn config_file(&self) -> PathBuf {
        let path = self.config.folder.join("agent.yaml");
        let text = format!(
            "node: node-a\nadmin: {{address: '{}'}}\nmetrics: {{address: '127.0.0.1:0'}}\n\
             identity: {{ca: {{directory: ca}}}}\nstateDir: state\nbpffs: {}\n",
            self.config.admin,
            self.config.bpffs.display()
        );
        fs::write(&path, text).unwrap();
        path
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.config.folder.join(AGENT));
        command.args(words).arg("--config").arg(self.config_file());
        command.env_remove("RUST_LOG").env_remove("NODE_NAME");
        let steps = self.steps.clone();
        // SAFETY: system calls, and small files at most; no lock of the parent is waited for.
        unsafe {
            command.pre_exec(move || steps.iter().try_for_each(|step| step()));
        }
        command
    }

    pub(crate) fn doctor(&self) -> Report {
        let Output {
            status,
            stdout,
            stderr,
        } = shell::raw(&mut self.command(&["doctor", "-o", "json"])).unwrap();
        let said = [&*stdout, &*stderr].concat();
        let json =
            serde_json::from_slice(&stdout).with_context(|| String::from_utf8_lossy(&said).into_owned());
        Report {
            success: status.success(),
            json: json.unwrap(),
        }
    }

    /// Starts an agent that gives up, and returns what it says.
    pub(crate) fn refused(&self) -> String {
        let mut process = Process::spawn(&self.run, "agent", &mut self.command(&["run"])).unwrap();
        let status = process.wait(PATIENCE).unwrap();
        assert_eq!(status.code(), Some(1), "{}", process.log());
        process.log()
    }

    /// Starts an agent, and waits until it runs.
    pub(crate) fn start(&self) -> Process {
        let mut process = Process::spawn(&self.run, "agent", &mut self.command(&["run"])).unwrap();
        until("the agent to run", PATIENCE, || {
            let ended = process.has_ended().unwrap();
            assert!(ended.is_none(), "{}", process.log());
            process.log().contains("the agent runs").then_some(())
        })
        .unwrap();
        process
    }

    /// Starts an agent that runs, stops it, and returns what it said.
    pub(crate) fn runs(&self) -> String {
        let mut process = self.start();
        process.signal(Signal::SIGTERM).unwrap();
        let status = process.wait(PATIENCE).unwrap();
        assert!(status.success(), "{status}: {}", process.log());
        process.log()
    }
}

impl Report {
    pub(crate) fn check(&self, id: &str) -> &Value {
        let checks = self.json["checks"].as_array().unwrap();
        let found = checks.iter().find(|check| check["id"] == id);
        found
            .with_context(|| format!("no check {id} in {:#}", self.json))
            .unwrap()
    }

    /// (level, found, advice)
    pub(crate) fn told(&self, id: &str) -> (&str, &str, &str) {
        let check = self.check(id);
        let text = |field: &str| check[field].as_str().unwrap_or_default();
        (text("level"), text("found"), text("advice"))
    }

    pub(crate) fn problems(&self) -> Vec<&str> {
        let checks = self.json["checks"].as_array().unwrap();
        let problems = checks.iter().filter(|check| check["level"] == "problem");
        problems.map(|check| check["id"].as_str().unwrap()).collect()
    }
}

/// Puts a file or folder over another.
pub(crate) fn bind(what: &Path, over: &Path) -> io::Result<()> {
    Ok(mount(
        Some(what),
        over,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?)
}

/// (kind, place) of each hierarchy that is mounted here.
fn cgroup_mounts() -> Vec<(String, PathBuf)> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (path, kind) = (words.next()?, words.next()?);
        kind.starts_with("cgroup").then(|| (kind.to_owned(), path.into()))
    });
    mounts.collect()
}

/// Where cgroup2 is mounted.
pub(crate) fn cgroup2() -> PathBuf {
    let mounts = cgroup_mounts();
    mounts.into_iter().find(|(kind, _)| kind == "cgroup2").unwrap().1
}

/// A port that somebody listens on.
pub(crate) fn taken() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Takes effect with the next program.
fn drop_capability(number: libc::c_ulong) -> io::Result<()> {
    // SAFETY: takes numbers only.
    match unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn forbid_bpf(errno: u32) -> io::Result<()> {
    let number = u32::try_from(libc::SYS_bpf).map_err(io::Error::other)?;
    let statement = |code: u32, jump: (u8, u8), k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt: jump.0,
        jf: jump.1,
        k,
    };
    let mut filter = [
        // The number of the system call is the first thing there.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, (0, 0), 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, (0, 1), number),
        statement(
            libc::BPF_RET | libc::BPF_K,
            (0, 0),
            libc::SECCOMP_RET_ERRNO | errno,
        ),
        statement(libc::BPF_RET | libc::BPF_K, (0, 0), libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: `program` and its filter outlive the call, which copies them.
    let done = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
