//! `process_*`: what this process costs, under the names that every Prometheus client library uses.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

#[derive(Debug)]
pub(super) struct Process {
    /// Seconds since 1970.
    started: u64,
}

impl Process {
    pub(super) fn new() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            started: since.map_or(0, |since| since.as_secs()),
        }
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let cpu = getrusage(UsageWho::RUSAGE_SELF)
            .map(|usage| seconds(usage.user_time()) + seconds(usage.system_time()));
        if let Ok(cpu) = cpu {
            let name = "process_cpu_seconds";
            let family = encoder.encode_descriptor(name, "CPU time used", None, MetricType::Counter)?;
            ConstCounter::new(cpu).encode(family)?;
        }
        let gauges = [
            (
                "process_start_time_seconds",
                "When it started",
                Some(self.started),
            ),
            (
                "process_resident_memory_bytes",
                "Resident memory",
                status_bytes("VmRSS:"),
            ),
            (
                "process_virtual_memory_bytes",
                "Address space",
                status_bytes("VmSize:"),
            ),
            ("process_open_fds", "Open file descriptors", open_descriptors()),
        ];
        for (name, help, value) in gauges {
            let Some(value) = value else { continue };
            let family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(family)?;
        }
        Ok(())
    }
}

fn seconds(time: TimeVal) -> f64 {
    time.num_microseconds() as f64 / 1e6
}

/// A field of `/proc/self/status`, which the kernel gives in kB.
fn status_bytes(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    kilobytes.checked_mul(1024)
}

fn open_descriptors() -> Option<u64> {
    let descriptors = std::fs::read_dir("/proc/self/fd").ok()?.count();
    // One of them is the folder's own.
    u64::try_from(descriptors).ok()?.checked_sub(1)
}
