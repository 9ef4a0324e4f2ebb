//! The kernel itself: what it is, and what it lets programs do.

use std::fs;
use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::privileges::Privileges;
use super::{Check, Group, Level};
use crate::ebpf::examine;

/// The first one whose helpers suffice.
const OLDEST: Version = Version(5, 10);
/// The first one that counts maps in the memory of a cgroup instead of as locked memory.
const COUNTS_IN_CGROUP: Version = Version(5, 11);
/// What the maps take, with room: `RLIMIT_MEMLOCK` in bytes.
const LOCKED_MEMORY: u64 = 128 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32);

impl Version {
    /// `None` if it cannot be told.
    pub(super) fn running() -> Option<Self> {
        Self::parse(&release())
    }

    /// `6.18.0-cloud-amd64` is 6.18.
    fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|character: char| !character.is_ascii_digit());
        Some(Self(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }
}

pub(super) fn release() -> String {
    read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "of unknown version".to_owned())
}

pub(super) fn check(version: Option<Version>) -> Vec<Check> {
    // As it was given, before it is lifted.
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((RLIM_INFINITY, RLIM_INFINITY));
    let privileges = Privileges::own();
    let mut checks = vec![kernel(&release(), version)];
    // It comes before what it is the cause of.
    if version < Some(COUNTS_IN_CGROUP) {
        checks.push(locked_memory(limit, privileges.may_raise_limits()));
    }
    checks.extend([
        syscall(examine::bpf_syscall(), &privileges),
        btf(fs::exists("/sys/kernel/btf/vmlinux").unwrap_or_default()),
        jit(setting("/proc/sys/net/core/bpf_jit_enable"), is_host_network()),
        lockdown(read("/sys/kernel/security/lockdown").as_deref()),
    ]);
    checks
}

/// Only the first network namespace has this setting.
pub(super) fn is_host_network() -> bool {
    fs::exists("/proc/sys/net/core/netdev_budget").unwrap_or_default()
}

/// A setting of one line.
fn setting(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

fn read(path: &str) -> Option<String> {
    setting(path).ok()
}

fn kernel(release: &str, version: Option<Version>) -> Check {
    let check = Check::ok(Group::Kernel, "kernel", format!("Linux {release}"));
    match version {
        Some(version) if version >= OLDEST => check,
        Some(_) => check.but(
            // Distributions bring newer helpers into older kernels: the programs' trial is what decides.
            Level::Warning,
            format!(
                "use Linux {}.{} or newer: older ones lack what the programs need, unless their distribution added it",
                OLDEST.0, OLDEST.1
            ),
        ),
        None => check.but(
            Level::Note,
            "its version cannot be told; what matters is whether the programs load",
        ),
    }
}

fn syscall(tried: io::Result<()>, privileges: &Privileges) -> Check {
    let check = |found: &str| Check::ok(Group::Kernel, "bpf", found);
    let Err(error) = tried else {
        return check("the bpf system call works");
    };
    match error.raw_os_error() {
        Some(libc::ENOSYS) => check("the kernel has no bpf system call").but(
            Level::Problem,
            "use a kernel with CONFIG_BPF_SYSCALL=y; in a sandbox such as gVisor there is none",
        ),
        Some(libc::EPERM) if privileges.is_filtered && privileges.may_load() => {
            check("the bpf system call is refused though this process has the capabilities: a seccomp filter is in force").but(
                Level::Problem,
                "run without that filter: in Kubernetes `seccompProfile: {type: Unconfined}` or `privileged: true`, in Docker `--security-opt seccomp=unconfined`",
            )
        }
        Some(libc::EPERM) if privileges.may_load() => {
            check("the bpf system call is refused though this process has the capabilities").but(
                Level::Problem,
                "see whether a security module (SELinux, AppArmor) or a container's sandbox forbids it",
            )
        }
        Some(libc::EPERM) => check("the bpf system call is refused: a capability is missing")
            .but(Level::Problem, "run it as the machine's root, with CAP_SYS_ADMIN"),
        _ => Check::ok(
            Group::Kernel,
            "bpf",
            format!("the bpf system call fails: {error}"),
        )
        .but(Level::Problem, "see the kernel's log (`dmesg`) for why"),
    }
}

fn btf(present: bool) -> Check {
    let found = match present {
        true => "the kernel has BTF, which is not needed",
        false => "the kernel has no BTF, which is not needed: the programs touch no kernel structures",
    };
    Check::ok(Group::Kernel, "btf", found)
}

fn jit(setting: io::Result<String>, is_host: bool) -> Check {
    let check = |found: &str| Check::ok(Group::Kernel, "jit", found);
    match setting {
        Ok(off) if off == "0" => {
            check("the BPF JIT is off: programs are interpreted, which is several times slower").but(
                Level::Warning,
                "run `sysctl net.core.bpf_jit_enable=1`, and put that into /etc/sysctl.d",
            )
        }
        Ok(_) => check("the BPF JIT is on"),
        // Only root may read it.
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            check(&format!("whether the BPF JIT is on cannot be read: {error}")).but(
                Level::Note,
                "run this as root, or see `sysctl net.core.bpf_jit_enable` on the host",
            )
        }
        Err(_) if is_host => {
            check("the kernel has no BPF JIT: programs are interpreted, which is several times slower")
                .but(Level::Warning, "use a kernel with CONFIG_BPF_JIT=y")
        }
        Err(_) => check("whether the BPF JIT is on is not seen from this network namespace")
            .but(Level::Note, "see `sysctl net.core.bpf_jit_enable` on the host"),
    }
}

/// What a locked-down kernel refuses to programs is reading or writing its memory, which ours do not.
fn lockdown(modes: Option<&str>) -> Check {
    let active = modes.and_then(|modes| modes.split_once('[')?.1.split_once(']'));
    let found = match active {
        Some(("none", _)) => "the kernel is not locked down".to_owned(),
        Some((mode, _)) => {
            format!(
                "the kernel is locked down ({mode}), which our programs do not run into: they read no kernel memory"
            )
        }
        None => "no lockdown mode is shown (no securityfs, or no such module)".to_owned(),
    };
    Check::ok(Group::Kernel, "lockdown", found)
}

fn locked_memory((soft, hard): (u64, u64), may_raise: bool) -> Check {
    let check = |found: String| Check::ok(Group::Kernel, "memlock", found);
    let enough = |limit| limit == RLIM_INFINITY || limit >= LOCKED_MEMORY;
    if enough(soft) {
        return check("RLIMIT_MEMLOCK leaves room for the maps".to_owned());
    }
    if enough(hard) || may_raise {
        return check(format!(
            "RLIMIT_MEMLOCK is {} KiB; the agent raises it for itself",
            soft / 1024
        ));
    }
    check(format!(
        "RLIMIT_MEMLOCK is {} KiB, and kernels before 5.11 count maps as locked memory",
        hard / 1024
    ))
    .but(
        Level::Problem,
        "set `LimitMEMLOCK=infinity` in the unit, `--ulimit memlock=-1` in Docker, or give CAP_SYS_RESOURCE",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn privileges(effective: u64, is_filtered: bool) -> Privileges {
        Privileges {
            effective,
            is_filtered,
            ..Privileges::ALL
        }
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert_eq!(Version::parse("6.18.0-cloud-amd64"), Some(Version(6, 18)));
        assert!(Version::parse("5.4.0").unwrap() < OLDEST);
        let old = kernel("5.4.0", Version::parse("5.4.0"));
        assert_eq!(old.level, Level::Warning, "a number refuses nobody");
        assert!(old.to_string().contains("use Linux 5.10 or newer"), "{old}");
        assert_eq!(kernel("5.10.0-28", Version::parse("5.10.0-28")).level, Level::Ok);
        assert_eq!(kernel("x", Version::parse("x")).level, Level::Note);
    }

    #[test]
    fn a_refused_system_call_has_a_reason() {
        let tried = |errno| Err(io::Error::from_raw_os_error(errno));
        let all = Privileges::ALL.effective;
        for (errno, privileges, expected) in [
            (libc::ENOSYS, privileges(all, false), "CONFIG_BPF_SYSCALL"),
            (libc::EPERM, privileges(all, true), "seccomp"),
            (libc::EPERM, privileges(all, false), "security module"),
            (libc::EPERM, privileges(0, false), "CAP_SYS_ADMIN"),
            (libc::EINVAL, privileges(all, false), "dmesg"),
        ] {
            let check = syscall(tried(errno), &privileges);
            assert_eq!(check.level, Level::Problem);
            assert!(check.to_string().contains(expected), "{check}");
        }
        assert_eq!(syscall(Ok(()), &privileges(0, true)).level, Level::Ok);
    }

    #[test]
    fn neither_btf_nor_lockdown_is_in_the_way() {
        assert_eq!(btf(false).level, Level::Ok);
        for (modes, expected) in [
            (Some("[none] integrity confidentiality"), "not locked down"),
            (Some("none [integrity] confidentiality"), "(integrity)"),
            (Some("none integrity [confidentiality]"), "(confidentiality)"),
            (None, "no lockdown mode is shown"),
        ] {
            let check = lockdown(modes);
            assert_eq!(check.level, Level::Ok);
            assert!(check.found.contains(expected), "{check}");
        }
    }

    #[test]
    fn without_jit_programs_are_slow() {
        let set = |value: &str| jit(Ok(value.to_owned()), true);
        assert_eq!(set("1").level, Level::Ok);
        assert_eq!(set("2").level, Level::Ok);
        assert!(set("0").to_string().contains("net.core.bpf_jit_enable=1"));
        let absent = |is_host| jit(setting("/proc/sys/of-no-kernel"), is_host);
        assert_eq!(absent(true).level, Level::Warning);
        assert!(absent(true).to_string().contains("CONFIG_BPF_JIT"));
        assert_eq!(absent(false).level, Level::Note);
    }

    #[test]
    fn a_setting_that_cannot_be_read_says_nothing_of_the_kernel() {
        for is_host in [true, false] {
            let check = jit(Err(io::Error::from_raw_os_error(libc::EACCES)), is_host);
            assert_eq!(check.level, Level::Note);
            assert!(
                check.to_string().contains("cannot be read: Permission denied"),
                "{check}"
            );
            assert!(!check.to_string().contains("CONFIG_BPF_JIT"), "{check}");
        }
    }

    #[test]
    fn locked_memory_is_enough_or_can_be_raised() {
        let small = 64 << 10;
        assert_eq!(
            locked_memory((RLIM_INFINITY, RLIM_INFINITY), false).level,
            Level::Ok
        );
        assert_eq!(locked_memory((small, RLIM_INFINITY), false).level, Level::Ok);
        assert_eq!(locked_memory((small, small), true).level, Level::Ok);
        let check = locked_memory((small, small), false);
        assert_eq!(check.level, Level::Problem);
        assert!(check.to_string().contains("64 KiB") && check.to_string().contains("LimitMEMLOCK"));
    }
}
