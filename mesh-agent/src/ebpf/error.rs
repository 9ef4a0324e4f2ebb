//! What can go wrong, and what to do about it.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use aya::programs::ProgramError;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum CaptureError {
    #[error("this agent was built without its eBPF programs: run `cargo xtask build-ebpf`, then build again")]
    NoPrograms,
    #[error("cannot use {} for pinned programs and maps", path.display())]
    Bpffs { path: PathBuf, source: io::Error },
    #[error("{} is on no BPF filesystem, and none can be mounted at its parent, which is not an empty folder", .0.display())]
    NotBpffs(PathBuf),
    #[error("cannot mount a BPF filesystem at {}", path.display())]
    Mount { path: PathBuf, source: io::Error },
    #[error("another agent runs with the `bpffs` {}: stop it first, or give this one a folder of its own", .0.display())]
    Claimed(PathBuf),
    #[error("no cgroup2 hierarchy is mounted; run `mount -t cgroup2 none /sys/fs/cgroup`")]
    NoCgroup2,
    #[error("cannot read /proc/self/mounts: {0}")]
    Mounts(io::Error),
    #[error("cannot open the cgroup {}: {source}", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("cannot load the eBPF object: {0}")]
    Object(#[from] aya::EbpfError),
    #[error("the eBPF object has no program {0}; build the agent again")]
    MissingProgram(&'static str),
    #[error("the kernel refuses the program {name}: {reason}; `mesh-agent doctor` shows what it takes")]
    Program { name: &'static str, reason: String },
    #[error("cannot find out whether the kernel has {what}: {source}")]
    Probe { what: &'static str, source: io::Error },
    #[error("cannot attach {name}: {source}")]
    Attach { name: String, source: io::Error },
    #[error("{}: {source}", path.display())]
    Pin { path: PathBuf, source: io::Error },
    #[error("the map at {} has another layout than this agent's; run `mesh-agent uninstall` first", path.display())]
    ForeignMap { path: PathBuf },
    #[error("{place} is not a network namespace that can be entered: {source}")]
    Namespace { place: String, source: io::Error },
    #[error("{place} has no address {address}; it has {}", list(present))]
    NoSuchAddress {
        place: String,
        address: IpAddr,
        present: Vec<IpAddr>,
    },
    #[error(
        "the loopback device of {place} is down, and capture goes through it; run `ip link set lo up` there"
    )]
    LoopbackDown { place: String },
    #[error("a workload needs at least one address")]
    NoAddress,
    #[error("cannot open the agent's listeners in {place}: {source}")]
    Listeners { place: String, source: io::Error },
    #[error("cannot write the map {map}: {source}")]
    Map { map: &'static str, source: io::Error },
    #[error("an agent is alive there: stop it first")]
    AgentAlive,
    #[error("that is no folder on a BPF filesystem, so no agent has its pins there")]
    NoPins,
}

impl CaptureError {
    /// That the kernel refused a program, in its own words.
    pub(super) fn program(name: &'static str, error: &ProgramError) -> Self {
        Self::Program {
            name,
            reason: refusal(error),
        }
    }

    /// The place is not there (yet): to be expected while a workload comes or goes.
    #[must_use]
    pub fn is_missing_place(&self) -> bool {
        match self {
            Self::Namespace { source, .. } | Self::Cgroup { source, .. } => {
                source.kind() == io::ErrorKind::NotFound
            }
            Self::NoSuchAddress { .. } | Self::LoopbackDown { .. } => true,
            _ => false,
        }
    }
}

/// One line of what may be thousands: the verifier's judgement, and the error number.
fn refusal(error: &ProgramError) -> String {
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return error.to_string();
    };
    match judgement(&verifier_log.to_string()) {
        Some(judgement) => format!("{judgement} ({io_error})"),
        None => io_error.to_string(),
    }
}

/// The last line of a verifier's log that is not one of its figures.
fn judgement(log: &str) -> Option<String> {
    const FIGURES: [&str; 4] = ["processed ", "verification time ", "stack depth ", "peak_states "];
    let mut lines = log.lines().map(|line| line.trim_matches(['\0', ' ']));
    lines
        .rfind(|line| !line.is_empty() && !FIGURES.iter().any(|figure| line.starts_with(figure)))
        .map(str::to_owned)
}

fn list(addresses: &[IpAddr]) -> String {
    if addresses.is_empty() {
        return "none".to_owned();
    }
    addresses
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_judgement_is_found_among_its_figures() {
        let log = "783: (bf) r4 = r1\n784: (1f) r4 -= r2\nR4 pointer -= pointer prohibited\n\
                   verification time 429 usec\nstack depth 192+0\n\
                   processed 65 insns (limit 1000000) max_states_per_insn 0 total_states 5\n\0";
        assert_eq!(
            judgement(log).as_deref(),
            Some("R4 pointer -= pointer prohibited")
        );
        assert_eq!(judgement("\n"), None);
    }
}
