//! Who used how much CPU: exact clocks of processes, and the machine's own account beside them.
//!
//! The kernel keeps every process' CPU time in nanoseconds, softirqs that ran in its context included. The sum over
//! the generator, the servers, the proxies and the kernel's network threads is what the whole system used *for this
//! run*: nobody else's work is in it, which the sampled `/proc/stat` of a shared machine cannot offer. That one says
//! how busy others kept the machine.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};
use serde::Serialize;
use tokio::time::Instant;

/// The parent of the kernel's threads.
const KTHREADD: i32 = 2;

/// Whose time is kept.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watched {
    pub(crate) servers: Vec<Pid>,
    pub(crate) proxies: Vec<Pid>,
}

/// What a stretch of time cost, in seconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Used {
    pub(crate) wall: f64,
    /// Programs that ran to their end: the load generators.
    pub(crate) generator: f64,
    pub(crate) servers: f64,
    pub(crate) proxies: f64,
    /// `ksoftirqd` and `kworker`: others' too, as the kernel does not tell for whom they work.
    pub(crate) kernel: f64,
    /// Softirqs and interrupts of all, by the sampled account; within the above as far as it is ours.
    pub(crate) interrupts: f64,
    /// Everything else on this machine.
    pub(crate) foreign: f64,
    /// What the hypervisor took.
    pub(crate) steal: f64,
}

impl Used {
    /// Everything that this run cost, the kernel's and the applications' part included.
    pub(crate) fn system(&self) -> f64 {
        self.generator + self.servers + self.proxies + self.kernel
    }
}

/// The clocks at one moment.
#[derive(Debug)]
pub(crate) struct Reading {
    at: Instant,
    children: f64,
    servers: f64,
    proxies: f64,
    kernel: BTreeMap<i32, f64>,
    /// Busy, interrupts, steal.
    machine: [f64; 3],
}

impl Watched {
    pub(crate) fn read(&self) -> Result<Reading> {
        let children = getrusage(UsageWho::RUSAGE_CHILDREN)?;
        let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        Ok(Reading {
            at: Instant::now(),
            children: seconds(children.user_time()) + seconds(children.system_time()),
            servers: total(&self.servers)?,
            proxies: total(&self.proxies)?,
            kernel: kernel_threads()?,
            machine: machine()?,
        })
    }

    pub(crate) fn since(&self, before: &Reading) -> Result<Used> {
        let now = self.read()?;
        let kernel = now
            .kernel
            .iter()
            .map(|(pid, time)| time - before.kernel.get(pid).unwrap_or(&0.0))
            .sum();
        let [busy, interrupts, steal] = [0, 1, 2].map(|column| now.machine[column] - before.machine[column]);
        let mut used = Used {
            wall: (now.at - before.at).as_secs_f64(),
            generator: now.children - before.children,
            servers: now.servers - before.servers,
            proxies: now.proxies - before.proxies,
            kernel,
            interrupts,
            foreign: 0.0,
            steal,
        };
        used.foreign = (busy - used.system()).max(0.0);
        Ok(used)
    }
}

/// A process and its children, as nginx's workers are.
pub(crate) fn family(parent: u32) -> Result<Vec<Pid>> {
    let parent = i32::try_from(parent)?;
    let children = processes()?
        .into_iter()
        .filter(|process| process.parent == parent);
    Ok([parent]
        .into_iter()
        .chain(children.map(|process| process.pid))
        .map(Pid::from_raw)
        .collect())
}

/// Whether a process has ended and let go of its ports; its memory goes earlier.
pub(crate) fn is_gone(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

/// The most memory that a process ever held, in bytes.
pub(crate) fn peak_rss(pid: Pid) -> Result<u64> {
    memory(pid, "VmHWM:")
}

/// The memory that a process holds now, in bytes.
pub(crate) fn rss(pid: Pid) -> Result<u64> {
    memory(pid, "VmRSS:")
}

fn memory(pid: Pid, field: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"))
        .with_context(|| format!("{pid} has no {field}"))?;
    Ok(kib.trim().parse::<u64>()? * 1024)
}

fn total(pids: &[Pid]) -> Result<f64> {
    pids.iter().map(|pid| cpu_time(*pid)).sum()
}

/// Seconds, of all threads.
pub(crate) fn cpu_time(pid: Pid) -> Result<f64> {
    let clock = clock_getcpuclockid(pid).with_context(|| format!("{pid} is gone"))?;
    read_clock(clock).with_context(|| format!("{pid} is gone"))
}

fn read_clock(clock: ClockId) -> Result<f64> {
    let time = clock_gettime(clock)?;
    Ok(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
}

fn kernel_threads() -> Result<BTreeMap<i32, f64>> {
    Ok(processes()?
        .into_iter()
        .filter(|process| process.parent == KTHREADD)
        .filter(|process| process.name.starts_with("ksoftirqd") || process.name.starts_with("kworker"))
        // Workers come and go.
        .filter_map(|process| Some((process.pid, cpu_time(Pid::from_raw(process.pid)).ok()?)))
        .collect())
}

struct Process {
    pid: i32,
    parent: i32,
    name: String,
}

fn processes() -> Result<Vec<Process>> {
    let pids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(pids
        .filter_map(|pid: i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name is in brackets, and may hold some itself.
            let (head, rest) = stat.rsplit_once(") ")?;
            Some(Process {
                pid,
                parent: rest.split(' ').nth(1)?.parse().ok()?,
                name: head.split_once('(')?.1.to_owned(),
            })
        })
        .collect())
}

/// Busy, interrupts and softirqs, steal: seconds of all CPUs since the start.
fn machine() -> Result<[f64; 3]> {
    let ticks = sysconf(SysconfVar::CLK_TCK)?.context("no CLK_TCK")? as f64;
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let columns = line
        .split_whitespace()
        .skip(1)
        .map(|number| Ok(number.parse::<f64>()? / ticks))
        .collect::<Result<Vec<_>>>()?;
    let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = columns[..] else {
        anyhow::bail!("/proc/stat has too few columns");
    };
    Ok([user + nice + system + irq + softirq, irq + softirq, steal])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_of_a_child_is_the_generators() {
        let watched = Watched::default();
        let before = watched.read().unwrap();
        let mut child = std::process::Command::new("sh");
        child.args(["-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"]);
        assert!(child.status().unwrap().success());
        let used = watched.since(&before).unwrap();
        assert!(used.generator > 0.001, "{used:?}");
        assert!(used.generator < used.wall * 1.5, "{used:?}");
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        // One more than the kernel ever gives out. (A clock's number has no room for all of an i32.)
        let nobody = Pid::from_raw((1 << 22) + 1);
        assert!(cpu_time(nobody).is_err());
        assert!(is_gone(nobody));
        assert!(!is_gone(nix::unistd::getpid()));
        assert!(cpu_time(nix::unistd::getpid()).unwrap() > 0.0);
    }
}
