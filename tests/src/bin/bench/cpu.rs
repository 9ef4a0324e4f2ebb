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
    /// How long the proxies' threads were ready to run and had no CPU, all of them together. Not CPU time, and not known
    /// by every kernel.
    pub(crate) waiting: Option<f64>,
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
    waiting: BTreeMap<i32, f64>,
    machine: CpuTimes,
}

/// The machine's own, sampled account: seconds of all CPUs since the start, or since another reading.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuTimes {
    pub(crate) busy: f64,
    /// Softirqs and interrupts; within `busy`.
    pub(crate) interrupts: f64,
    pub(crate) idle: f64,
    /// What the hypervisor took.
    pub(crate) steal: f64,
}

impl CpuTimes {
    pub(crate) fn read() -> Result<Self> {
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("no CLK_TCK")? as f64;
        let stat = fs::read_to_string("/proc/stat")?;
        Self::parse(stat.lines().next().context("/proc/stat is empty")?, ticks)
    }

    /// Its columns are in `proc_stat(5)`.
    fn parse(line: &str, ticks: f64) -> Result<Self> {
        let columns = line
            .split_whitespace()
            .skip(1)
            .map(|number| Ok(number.parse::<f64>()? / ticks))
            .collect::<Result<Vec<_>>>()?;
        let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = columns[..] else {
            anyhow::bail!("/proc/stat has too few columns");
        };
        Ok(Self {
            busy: user + nice + system + irq + softirq,
            interrupts: irq + softirq,
            idle: idle + iowait,
            steal,
        })
    }

    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            busy: self.busy - before.busy,
            interrupts: self.interrupts - before.interrupts,
            idle: self.idle - before.idle,
            steal: self.steal - before.steal,
        }
    }

    pub(crate) fn total(&self) -> f64 {
        self.busy + self.idle + self.steal
    }
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
            waiting: waiting(&self.proxies)?,
            machine: CpuTimes::read()?,
        })
    }

    pub(crate) fn since(&self, before: &Reading) -> Result<Used> {
        let now = self.read()?;
        // Nobody is watched, or the kernel does not count.
        let waiting = Some(&now.waiting).filter(|threads| threads.values().any(|time| *time > 0.0));
        let machine = now.machine.since(&before.machine);
        let mut used = Used {
            wall: (now.at - before.at).as_secs_f64(),
            generator: now.children - before.children,
            servers: now.servers - before.servers,
            proxies: now.proxies - before.proxies,
            kernel: growth(&before.kernel, &now.kernel),
            waiting: waiting.map(|now| growth(&before.waiting, now)),
            interrupts: machine.interrupts,
            foreign: 0.0,
            steal: machine.steal,
        };
        used.foreign = (machine.busy - used.system()).max(0.0);
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

/// Of those that are there now, each from nothing if it was not there before; of those that ended, nothing.
fn growth(before: &BTreeMap<i32, f64>, now: &BTreeMap<i32, f64>) -> f64 {
    now.iter()
        .map(|(pid, time)| (time - before.get(pid).unwrap_or(&0.0)).max(0.0))
        .sum()
}

/// Seconds in the run queue, by thread (the second column of `schedstat`; the kernel's sched-stats.rst).
fn waiting(pids: &[Pid]) -> Result<BTreeMap<i32, f64>> {
    let mut threads = BTreeMap::new();
    for pid in pids {
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?;
            // It may have ended meanwhile, and not every kernel has this file.
            let Ok(stat) = fs::read_to_string(task.path().join("schedstat")) else {
                continue;
            };
            let number = task.file_name().to_str().and_then(|name| name.parse().ok());
            let nanoseconds = stat.split_whitespace().nth(1);
            let nanoseconds: f64 = nanoseconds.context("schedstat has no second column")?.parse()?;
            threads.insert(number.context("a thread without a number")?, nanoseconds / 1e9);
        }
    }
    Ok(threads)
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

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::sync_channel;
    use std::thread;
    use std::time::Duration;

    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};

    use super::*;

    #[test]
    fn work_of_a_child_is_the_generators() {
        let watched = Watched::default();
        let before = watched.read().unwrap();
        let mut child = Command::new("sh");
        child.args(["-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"]);
        assert!(child.status().unwrap().success());
        let used = watched.since(&before).unwrap();
        assert!(used.generator > 0.001, "{used:?}");
        assert!(used.generator < used.wall * 1.5, "{used:?}");
    }

    #[test]
    fn threads_that_share_a_cpu_wait_for_it() {
        let cpus = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let cpu = (0..CpuSet::count()).find(|cpu| cpus.is_set(*cpu).unwrap());
        let mut one = CpuSet::new();
        one.set(cpu.unwrap()).unwrap();
        let stop = &AtomicBool::new(false);
        let (seen, numbers) = sync_channel(3);
        let mut waited = 0.0;
        let mut wall = 0.0;
        thread::scope(|scope| {
            for _ in 0..3 {
                let seen = seen.clone();
                scope.spawn(move || {
                    sched_setaffinity(Pid::from_raw(0), &one).unwrap();
                    let _ended = seen.send(nix::unistd::gettid().as_raw());
                    drop(seen);
                    while !stop.load(Ordering::Relaxed) {}
                });
            }
            drop(seen);
            let ours: Vec<_> = numbers.iter().collect();
            let read = || {
                let all = waiting(&[nix::unistd::getpid()])?;
                anyhow::Ok(
                    all.into_iter()
                        .filter(|(thread, _)| ours.contains(thread))
                        .collect(),
                )
            };
            // What was waited before does not count.
            thread::sleep(Duration::from_millis(300));
            let start = Instant::now();
            let before = read();
            thread::sleep(Duration::from_millis(300));
            let now = read();
            wall = start.elapsed().as_secs_f64();
            stop.store(true, Ordering::Relaxed);
            waited = growth(&before.unwrap(), &now.unwrap());
        });
        // While one runs two wait: twice the time, and at most three times where others run there too.
        assert!((1.5 * wall..3.1 * wall).contains(&waited), "{waited} of {wall}");
    }

    #[test]
    fn the_machines_account_is_read_by_its_columns() {
        let read = |line| CpuTimes::parse(line, 100.0).unwrap();
        let before = read("cpu 100 20 300 4000 50 6 70 8 0 0");
        let now = read("cpu 200 30 400 4400 60 7 90 38 0 0");
        let passed = now.since(&before);
        assert_eq!(
            [passed.busy, passed.interrupts, passed.idle, passed.steal]
                .map(|seconds| (seconds * 100.0).round()),
            [231.0, 21.0, 410.0, 30.0]
        );
        assert!((passed.total() - 6.71).abs() < 1e-6);
        assert!(CpuTimes::parse("cpu 1 2 3", 100.0).is_err());
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
