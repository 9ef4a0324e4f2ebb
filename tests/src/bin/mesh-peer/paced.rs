//! An open-loop load generator: requests are due at fixed times, whether or not earlier ones were answered.
//!
//! Latency counts from the time when a request was due, so that what a slow answer does to the requests that wait
//! behind it is in the figures. `--rate N` per second in all, `--seconds N`; the rest as for `load`. The report is
//! JSON; latencies in microseconds.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use hdrhistogram::Histogram;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::clock_gettime;
use serde_json::json;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::LocalSet;
use tokio::time::timeout;

use crate::load::{Plan, try_once};

/// Before the first request is due, for the connections to be made.
const HEAD_START: Duration = Duration::from_millis(200);
/// How far behind the generator may end; what is due then is not sent any more.
const GRACE: Duration = Duration::from_secs(1);
/// Nanoseconds; nothing is waited for longer than a request's timeout and the grace.
const LONGEST: u64 = 60_000_000_000;

pub(crate) async fn run(url: &str, options: &[&str]) -> Result<()> {
    let plan = Rc::new(Plan::parse(url, options)?);
    let rate = plan.rate.filter(|rate| *rate > 0).context("--rate is missing")?;
    ensure!(plan.connections > 0, "--connections is 0");
    let start = now()? + HEAD_START;
    let local = LocalSet::new();
    let workers: Vec<_> = (0..plan.connections)
        .map(|index| {
            let schedule = Schedule {
                start,
                end: start + plan.length,
                rate,
                step: plan.connections,
                next: index,
            };
            local.spawn_local(work(Rc::clone(&plan), schedule))
        })
        .collect();
    let mut report = Report::new()?;
    local
        .run_until(async {
            for worker in workers {
                report.add(&worker.await??)?;
            }
            anyhow::Ok(())
        })
        .await?;
    writeln!(std::io::stdout(), "{}", report.into_json(plan.length))?;
    Ok(())
}

/// When the requests of one connection are due.
struct Schedule {
    start: Duration,
    end: Duration,
    rate: u64,
    /// Every so many of all requests are this connection's.
    step: u64,
    next: u64,
}

impl Iterator for Schedule {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let due = self.start + Duration::from_secs(1).mul_f64(self.next as f64 / self.rate as f64);
        self.next += self.step;
        (due < self.end).then_some(due)
    }
}

async fn work(plan: Rc<Plan>, schedule: Schedule) -> Result<Report> {
    let mut report = Report::new()?;
    // The runtime's own timers tick once in a millisecond, which is longer than most answers take.
    let timer = Timer(TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?);
    #[expect(
        deprecated,
        reason = "its successor is unsafe; this descriptor is owned, and stays the same"
    )]
    let timer = AsyncFd::with_interest(timer, Interest::READABLE)?;
    let mut connection = Some(plan.connect().await?);
    let last = schedule.end + GRACE;
    for due in schedule {
        wait_until(&timer, due).await?;
        if now()? > last {
            report.unsent += 1;
            continue;
        }
        let tried = timeout(plan.timeout, try_once(&plan, &mut connection)).await;
        match tried.unwrap_or_else(|_late| Err(anyhow!("timed out"))) {
            Ok(response) if response.status().is_success() => {
                let latency = now()?.saturating_sub(due).as_nanos();
                report.latencies.saturating_record(u64::try_from(latency)?);
            }
            Ok(response) => report.fail(response.status().to_string()),
            Err(error) => {
                connection = None;
                report.fail(format!("{error:#}"));
            }
        }
    }
    Ok(report)
}

async fn wait_until(timer: &AsyncFd<Timer>, due: Duration) -> Result<()> {
    while now()? < due {
        let at = Expiration::OneShot(TimeSpec::from_duration(due));
        timer.get_ref().0.set(at, TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
        // Setting the timer again takes back that it expired: nothing is to be read.
        timer.readable().await?.clear_ready();
    }
    Ok(())
}

/// What tokio asks of a descriptor that it is to watch.
struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

fn now() -> Result<Duration> {
    Ok(clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?.into())
}

struct Report {
    /// In nanoseconds.
    latencies: Histogram<u64>,
    errors: BTreeMap<String, u64>,
    unsent: u64,
}

impl Report {
    fn new() -> Result<Self> {
        Ok(Self {
            latencies: Histogram::new_with_bounds(1, LONGEST, 3)?,
            errors: BTreeMap::new(),
            unsent: 0,
        })
    }

    fn fail(&mut self, why: String) {
        *self.errors.entry(why).or_default() += 1;
    }

    fn add(&mut self, other: &Self) -> Result<()> {
        self.latencies.add(&other.latencies)?;
        self.unsent += other.unsent;
        for (why, count) in &other.errors {
            *self.errors.entry(why.clone()).or_default() += count;
        }
        Ok(())
    }

    fn into_json(self, length: Duration) -> serde_json::Value {
        let micros = |quantile| self.latencies.value_at_quantile(quantile) as f64 / 1e3;
        let failed: u64 = self.errors.values().sum();
        json!({
            "answers": self.latencies.len(),
            "failed": failed,
            "unsent": self.unsent,
            "errors": self.errors,
            "seconds": length.as_secs_f64(),
            "p50": micros(0.5), "p99": micros(0.99), "p999": micros(0.999), "max": micros(1.0),
        })
    }
}
