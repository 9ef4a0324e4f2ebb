//! What all things of one run have in common: a name, a folder, and an end.
//!
//! The kernel drops the lock on a run's folder when its process is gone, however that happened; a run whose lock
//! can be taken is a stray. Its processes are known by a variable in their environment, its network namespaces
//! by their names, its pins by the bpffs mounted in its folder.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tokio::signal::unix::{SignalKind, signal};

use crate::{Netns, wait};

/// Where the runs' folders are.
const RUNS: &str = "/run/mesh-tests";
/// Marks a process as part of a run.
const VARIABLE: &str = "MESH_TESTS_RUN";

#[derive(Debug)]
pub struct Run {
    name: String,
    _lock: Flock<File>,
}

impl Run {
    /// Starts a run of this name, after clearing away what dead runs left. The name is short: it is the prefix
    /// of the names of network namespaces.
    pub fn start(name: &str) -> Result<Self> {
        if !geteuid().is_root() {
            bail!("network namespaces and eBPF need root: run this as root");
        }
        fs::create_dir_all(RUNS)?;
        // Nobody may take a folder for a stray between its making and its locking.
        let all = File::create(Path::new(RUNS).join(".lock"))?;
        let _all = Flock::lock(all, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        remove_strays()?;
        let dir = Path::new(RUNS).join(name);
        if dir.exists() {
            bail!("{name} is running already ({} is locked)", dir.display());
        }
        fs::create_dir_all(dir.join("logs"))?;
        let lock = try_lock(&dir)?.context("a folder made just now is locked")?;
        let run = Self {
            name: name.to_owned(),
            _lock: lock,
        };
        let bpffs = run.bpffs();
        fs::create_dir(&bpffs)?;
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("cannot mount a bpffs")?;
        Ok(run)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn dir(&self) -> PathBuf {
        Path::new(RUNS).join(&self.name)
    }

    /// A bpffs of this run alone: its pins go with it.
    pub fn bpffs(&self) -> PathBuf {
        self.dir().join("bpf")
    }

    /// The name of one of this run's network namespaces.
    pub fn netns(&self, name: &str) -> String {
        format!("{}-{name}", self.name)
    }

    /// Marks a program that is about to start as part of this run.
    pub fn adopt<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env(VARIABLE, &self.name)
    }

    /// Removes all traces of a run, whoever made them; for the end of it, however it comes.
    pub fn remove(name: &str) -> Result<()> {
        kill_processes(name)?;
        for netns in fs::read_dir("/run/netns").into_iter().flatten() {
            let netns = netns?.file_name().to_string_lossy().into_owned();
            if netns.strip_prefix(name).is_some_and(|rest| rest.starts_with('-')) {
                Netns::delete(&netns);
            }
        }
        let dir = Path::new(RUNS).join(name);
        match umount2(&dir.join("bpf"), MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(errno).context("cannot unmount the run's bpffs"),
        }
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))
    }
}

/// Cleans a run up when somebody presses Ctrl-C, and ends the process.
#[derive(Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    pub fn clean_up(run: &Run) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut terminate = {
            let _inside = runtime.enter();
            signal(SignalKind::terminate())?
        };
        let name = run.name().to_owned();
        let came = Arc::new(AtomicBool::new(false));
        let tell = Arc::clone(&came);
        thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _pressed = tokio::signal::ctrl_c() => {}
                    _asked = terminate.recv() => {}
                }
            });
            tell.store(true, Ordering::Relaxed);
            eprintln!("\ncleaning up");
            if let Err(error) = Run::remove(&name) {
                eprintln!("not all is cleaned up; the next start does the rest: {error:#}");
            }
            // As shells report a program that SIGINT ended.
            exit(130);
        });
        Ok(Self(came))
    }

    /// After an interruption never returns: what fails now fails because everything is being taken away.
    pub fn check(&self) {
        while self.0.load(Ordering::Relaxed) {
            thread::park();
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Err(error) = Self::remove(&self.name) {
            eprintln!("{} is not cleaned up: {error:#}", self.name);
        }
    }
}

fn remove_strays() -> Result<()> {
    for entry in fs::read_dir(RUNS)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        if let Some(_stray) = try_lock(&entry.path())? {
            Run::remove(&entry.file_name().to_string_lossy())?;
        }
    }
    Ok(())
}

/// `None` when the folder's run lives, or is just being removed by it.
fn try_lock(dir: &Path) -> Result<Option<Flock<File>>> {
    let file = match File::create(dir.join("lock")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno).context("cannot lock a run's folder"),
    }
}

/// Kills the processes of a run and waits until they are gone.
fn kill_processes(name: &str) -> Result<()> {
    let marker = format!("{VARIABLE}={name}");
    wait::until("the run's processes to end", Duration::from_secs(10), || {
        let alive = marked_processes(&marker);
        for pid in &alive {
            let _gone = kill(*pid, Signal::SIGKILL);
        }
        alive.is_empty().then_some(())
    })
}

fn marked_processes(marker: &str) -> Vec<Pid> {
    let own = nix::unistd::getpid();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .filter(|pid| *pid != own)
        .filter(|pid| {
            // A process that is gone, or a zombie, has no environment.
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environ| {
                environ
                    .split(|byte| *byte == 0)
                    .any(|entry| entry == marker.as_bytes())
            })
        })
        .collect()
}
