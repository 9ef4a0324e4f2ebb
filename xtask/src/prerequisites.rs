//! What the privileged tests need from the machine that no package brings.
//!
//! What only shows when programs are loaded, the agent's own `doctor` finds once it is built.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::shell;

/// The first kernel with all helpers that the programs cannot do without.
const OLDEST_KERNEL: (u32, u32) = (5, 10);

/// Numbers and names of `linux/capability.h`: what namespaces, devices and programs take.
const CAPABILITIES: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];

/// The machine's own user namespace in `/proc/self/ns`: its number is part of the kernel's interface.
const FIRST_USER_NAMESPACE: &str = "user:[4026531837]";

const AS_ROOT: &str =
    "run as the machine's own root; in a container with --privileged, and not in a rootless one";

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
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    need(
        has_cgroup2(&mounts),
        "cgroup2 is not mounted: `mount -t cgroup2 none /sys/fs/cgroup`, or a folder in it",
    );
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let user_namespace = namespace("/proc/self/ns/user");
    if let Some(reason) = unprivileged(
        nix::unistd::geteuid().is_root(),
        &status,
        user_namespace.as_deref(),
    ) {
        // The rest follows from it.
        reasons.push(reason);
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

/// What the agent itself finds missing here, with what to do; empty if it can run.
pub(crate) fn unfit(agent: &Path) -> Result<Vec<String>> {
    let report = doctor(agent)?;
    let problems = problems(&report);
    // One that fails without a reason, or has a reason and does not fail, is itself broken.
    if problems.is_empty() != (report["canRun"] == true) {
        bail!("`mesh-agent doctor` contradicts itself: {report:#}");
    }
    Ok(problems)
}

/// What the agent's own doctor finds here, of an agent with ports that nobody has.
pub(crate) fn doctor(agent: &Path) -> Result<Value> {
    let folder = shell::target_dir().join("doctor");
    fs::create_dir_all(folder.join("resources"))?;
    let config = folder.join("agent.yaml");
    let addresses = "admin: {address: '127.0.0.1:0'}\nmetrics: {address: '127.0.0.1:0'}\n";
    fs::write(&config, format!("{addresses}stateDir: state\n"))?;
    let mut doctor = Command::new(agent);
    doctor.args(["doctor", "-o", "json", "--config"]).arg(&config);
    let output = doctor
        .output()
        .with_context(|| format!("cannot run {}", agent.display()))?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
        .context("`mesh-agent doctor` tells nothing")?;
    if output.status.success() != (report["canRun"] == true) {
        bail!("`mesh-agent doctor` ended with {}: {report:#}", output.status);
    }
    Ok(report)
}

fn problems(report: &Value) -> Vec<String> {
    let checks = report["checks"].as_array().into_iter().flatten();
    let problems = checks.filter(|check| check["level"] == "problem");
    problems
        .map(|check| {
            let text = |field: &str| check[field].as_str().unwrap_or_default();
            let details = check["details"].as_array().into_iter().flatten();
            let details: String = details
                .filter_map(|detail| Some(format!("\n      {}", detail.as_str()?)))
                .collect();
            format!("{}; {}{details}", text("found"), text("advice"))
        })
        .collect()
}

/// What the link of a namespace says; `None` on kernels that have none of its kind.
fn namespace(link: &str) -> Option<String> {
    match fs::read_link(link) {
        Ok(link) => Some(link.to_string_lossy().into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        // It may be any.
        Err(_) => Some(String::new()),
    }
}

/// Why this process is not what the kernel takes for root.
fn unprivileged(is_root: bool, status: &str, user_namespace: Option<&str>) -> Option<String> {
    if !is_root {
        return Some(format!(
            "network namespaces and eBPF programs need root: {AS_ROOT}"
        ));
    }
    if user_namespace.is_some_and(|namespace| namespace != FIRST_USER_NAMESPACE) {
        return Some(format!(
            "root of this user namespace may not load eBPF programs: {AS_ROOT}"
        ));
    }
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    let effective = effective.unwrap_or_default();
    let missing = CAPABILITIES
        .iter()
        .filter(|(number, _)| effective & (1 << number) == 0);
    let missing: Vec<_> = missing.map(|(_, name)| *name).collect();
    (!missing.is_empty()).then(|| format!("this root lacks {}: {AS_ROOT}", missing.join(" and ")))
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
    use serde_json::json;

    use super::{
        AS_ROOT, FIRST_USER_NAMESPACE, OLDEST_KERNEL, has_cgroup2, kernel_version, namespace, problems,
        unprivileged,
    };

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

    #[test]
    fn who_only_looks_like_root_is_told_so() {
        let status = |effective: u64| format!("Name:\tx\nCapEff:\t{effective:016x}\n");
        let all = status((1 << 41) - 1);
        let first = Some(FIRST_USER_NAMESPACE);
        assert_eq!(unprivileged(true, &all, first), None);
        assert_eq!(namespace("/proc/self/ns/of-no-kind"), None);
        assert_eq!(unprivileged(true, &all, None), None, "there are no others");
        let docker = status(0xa804_25fb);
        for (reason, expected) in [
            (unprivileged(false, &all, first), "need root"),
            (unprivileged(true, &all, Some("user:[1]")), "user namespace"),
            (
                unprivileged(true, &docker, first),
                "this root lacks CAP_NET_ADMIN and CAP_SYS_ADMIN",
            ),
            (unprivileged(true, "", first), "CAP_SYS_ADMIN"),
        ] {
            let reason = reason.unwrap();
            assert!(reason.contains(expected) && reason.ends_with(AS_ROOT), "{reason}");
        }
    }

    #[test]
    fn problems_are_told_with_what_to_do() {
        let report = json!({"checks": [
            {"level": "ok", "found": "a"},
            {"level": "problem", "found": "b", "advice": "do c", "details": ["d"]},
        ]});
        assert_eq!(problems(&report), ["b; do c\n      d"]);
    }
}
