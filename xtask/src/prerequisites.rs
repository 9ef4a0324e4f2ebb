//! What the privileged tests need from the machine that no package brings.

use std::fs;
use std::path::Path;
use std::process::Command;

/// The first kernel with all helpers that the programs cannot do without.
const OLDEST_KERNEL: (u32, u32) = (5, 10);

/// Why privileged tests cannot run here; empty if they can.
pub(crate) fn missing() -> Vec<String> {
    let mut reasons = Vec::new();
    let mut need = |holds: bool, reason: &str| {
        if !holds {
            reasons.push(reason.to_owned());
        }
    };
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    need(
        kernel_version(&release) >= Some(OLDEST_KERNEL),
        "the kernel is older than 5.10",
    );
    need(
        Path::new("/sys/kernel/btf/vmlinux").exists(),
        "the kernel has no BTF (CONFIG_DEBUG_INFO_BTF)",
    );
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    need(
        has_cgroup2(&mounts),
        "cgroup2 is not mounted: `mount -t cgroup2 none /sys/fs/cgroup`, or a folder in it",
    );
    if !nix::unistd::geteuid().is_root() {
        reasons.push("network namespaces and eBPF programs need root".to_owned());
        return reasons;
    }
    // Tried, not asked: a container may be root and yet be allowed none of it.
    need(
        succeeds(&["unshare", "--mount", "mount", "-t", "bpf", "none", "/sys/fs/bpf"]),
        "no bpffs can be mounted on /sys/fs/bpf",
    );
    let name = format!("mesh-agent-probe-{}", std::process::id());
    let named = succeeds(&["ip", "netns", "add", &name]) && succeeds(&["ip", "netns", "delete", &name]);
    need(named, "`ip netns add` makes no network namespace");
    reasons
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn has_cgroup2(mounts: &str) -> bool {
    mounts
        .lines()
        .any(|line| line.split(' ').nth(2) == Some("cgroup2"))
}

fn succeeds(words: &[&str]) -> bool {
    let (program, arguments) = words.split_first().unwrap_or((&"false", &[]));
    Command::new(program)
        .args(arguments)
        .output()
        .is_ok_and(|output| output.status.success())
}

#[cfg(test)]
mod tests {
    use super::{OLDEST_KERNEL, has_cgroup2, kernel_version};

    #[test]
    fn versions_compare_as_numbers() {
        assert_eq!(kernel_version("6.18.0-cloud-amd64"), Some((6, 18)));
        assert!(kernel_version("5.4.0") < Some(OLDEST_KERNEL));
        assert!(kernel_version("unknown") < Some(OLDEST_KERNEL));
    }

    #[test]
    fn cgroup2_is_a_type_and_no_name() {
        assert!(has_cgroup2("cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0"));
        assert!(!has_cgroup2("cgroup2 /sys/fs/cgroup cgroup rw 0 0"));
    }
}
