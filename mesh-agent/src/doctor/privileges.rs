//! What this process may do: capabilities, and the namespaces in which they count.

use std::fs;
use std::io;

use super::kernel::{Version, is_host_network};
use super::{Check, Group, Level};

/// Numbers and names of `linux/capability.h`.
const NET_ADMIN: (u32, &str) = (12, "CAP_NET_ADMIN");
const SYS_ADMIN: (u32, &str) = (21, "CAP_SYS_ADMIN");
const SYS_RESOURCE: u32 = 24;
const BPF: u32 = 39;

/// From here on CAP_SYS_ADMIN includes what CAP_NET_ADMIN allows with eBPF.
const ADMIN_SUFFICES: Version = Version(6, 9);

/// The links in `/proc/self/ns` of the first namespaces, whose numbers are part of the kernel's interface.
const FIRST_USER: &str = "user:[4026531837]";
const FIRST_PID: &str = "pid:[4026531836]";

/// Of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Privileges {
    /// Effective capabilities, a bit each.
    pub(super) effective: u64,
    pub(super) user: u32,
    /// A seccomp filter is in force.
    pub(super) is_filtered: bool,
    /// In a user namespace, where capabilities do not reach the machine.
    pub(super) is_confined: bool,
}

impl Privileges {
    #[cfg(test)]
    pub(super) const ALL: Self = Self {
        effective: (1 << 41) - 1,
        user: 0,
        is_filtered: false,
        is_confined: false,
    };

    pub(super) fn own() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self::parse(&status, namespace("user").as_deref())
    }

    fn parse(status: &str, user_namespace: Option<&str>) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim()
        };
        // Real, effective, saved, of the file system.
        let user = field("Uid:").split_whitespace().nth(1).unwrap_or_default();
        Self {
            effective: u64::from_str_radix(field("CapEff:"), 16).unwrap_or_default(),
            user: user.parse().unwrap_or(u32::MAX),
            is_filtered: field("Seccomp:") == "2",
            is_confined: !is_first(user_namespace, FIRST_USER),
        }
    }

    fn has(&self, capability: u32) -> bool {
        self.effective & (1 << capability) != 0
    }

    /// Any of what opens `bpf(2)`.
    pub(super) fn may_load(&self) -> bool {
        !self.is_confined && (self.has(SYS_ADMIN.0) || self.has(BPF))
    }

    pub(super) fn may_mount(&self) -> bool {
        !self.is_confined && self.has(SYS_ADMIN.0)
    }

    pub(super) fn may_raise_limits(&self) -> bool {
        !self.is_confined && self.has(SYS_RESOURCE)
    }
}

/// What the link of this process's namespace says; `None` on kernels that have no namespaces of this kind.
fn namespace(kind: &str) -> Option<String> {
    match fs::read_link(format!("/proc/self/ns/{kind}")) {
        Ok(link) => Some(link.to_string_lossy().into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        // It may be any.
        Err(_) => Some(String::new()),
    }
}

/// Without namespaces of a kind, all processes are where the first one would be.
fn is_first(namespace: Option<&str>, first: &str) -> bool {
    namespace.is_none_or(|namespace| namespace == first)
}

pub(super) fn check(version: Option<Version>) -> Vec<Check> {
    let privileges = Privileges::own();
    vec![
        user_namespace(privileges.is_confined),
        capabilities(&privileges, version),
        namespaces(is_host_network(), namespace("pid").as_deref()),
    ]
}

fn user_namespace(is_confined: bool) -> Check {
    let check = |found: &str| Check::ok(Group::Privileges, "user-namespace", found);
    match is_confined {
        false => check("root here is root of the machine"),
        true => check("this process is in a user namespace: root here is nobody to the kernel").but(
            Level::Problem,
            "run it as the machine's root: not in rootless containers, and with `hostUsers: true` in Kubernetes",
        ),
    }
}

/// Found by taking capabilities away until something failed: CAP_SYS_ADMIN enters the pods' network namespaces,
/// which nothing else does, and includes CAP_BPF and CAP_PERFMON.
fn capabilities(privileges: &Privileges, version: Option<Version>) -> Check {
    let net_admin = version < Some(ADMIN_SUFFICES);
    let needed = [(SYS_ADMIN, true), (NET_ADMIN, net_admin)];
    let missing: Vec<_> = needed
        .iter()
        .filter(|((number, _), needed)| *needed && !privileges.has(*number))
        .map(|((_, name), _)| *name)
        .collect();
    let check = |found: String| Check::ok(Group::Privileges, "capabilities", found);
    if missing.is_empty() {
        return check("the capabilities that are needed are there".to_owned());
    }
    let missing = missing.join(" and ");
    let what = "with which it loads programs and enters the pods' network namespaces";
    let found = match privileges.user {
        0 => check(format!("this process is root, but lacks {missing}, {what}")),
        user => check(format!(
            "this process runs as user {user} and lacks {missing}, {what}"
        )),
    };
    let advice = match privileges.user {
        0 => {
            "give it the capability: `privileged: true` in Kubernetes, `--privileged` in Docker, `CapabilityBoundingSet=` in a unit"
        }
        _ => "run it as root",
    };
    found.but(Level::Problem, advice)
}

fn namespaces(is_host_network: bool, pid: Option<&str>) -> Check {
    let check = |found: &str| Check::ok(Group::Privileges, "namespaces", found);
    match (is_host_network, is_first(pid, FIRST_PID)) {
        (true, true) => check("network and processes are the host's"),
        (true, false) => check("the network is the host's; processes of the host are not seen").but(
            Level::Note,
            "pods must name their network namespace by a path such as /run/netns/NAME, mounted into this container; with `/proc/PID/ns/net` use `hostPID: true`",
        ),
        (false, _) => check("this process has a network namespace of its own").but(
            Level::Note,
            "the admin and metrics addresses answer in there only, and workloads on the host's network are out of reach: use `hostNetwork: true`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privileges_are_read() {
        let status = "Name:\tx\nUid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000200000\nSeccomp:\t2\n";
        let read = Privileges::parse(status, Some(FIRST_USER));
        assert_eq!(
            read,
            Privileges {
                effective: 1 << 21,
                user: 1000,
                is_filtered: true,
                is_confined: false,
            }
        );
        assert!(read.may_load() && !read.may_raise_limits());
        assert!(!Privileges::parse("", Some(FIRST_USER)).may_load());
        let confined = Privileges::parse(status, Some("user:[4026532001]"));
        assert!(confined.is_confined && !confined.may_load() && !confined.may_mount());
        assert!(Privileges::parse(status, Some("")).is_confined);
    }

    #[test]
    fn a_kernel_without_namespaces_confines_nobody() {
        assert_eq!(namespace("of-no-kind"), None);
        assert!(namespace("mnt").unwrap().starts_with("mnt:["));
        let status = "Uid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\nSeccomp:\t0\n";
        assert_eq!(Privileges::parse(status, None), Privileges::ALL);
        assert_eq!(namespaces(true, None).level, Level::Ok);
    }

    #[test]
    fn what_is_missing_is_named() {
        let with = |effective, user| Privileges {
            effective,
            user,
            ..Privileges::ALL
        };
        let (old, new) = (Some(Version(6, 1)), Some(Version(6, 12)));
        let admin = 1 << SYS_ADMIN.0;
        assert_eq!(capabilities(&with(admin, 0), new).level, Level::Ok);
        assert_eq!(
            capabilities(&with(admin | 1 << NET_ADMIN.0, 0), old).level,
            Level::Ok
        );
        let check = capabilities(&with(admin, 0), old);
        assert!(
            check.to_string().contains("is root, but lacks CAP_NET_ADMIN,"),
            "{check}"
        );
        assert!(check.advice.contains("privileged"), "{check}");
        let check = capabilities(&with(0, 1000), None);
        assert!(
            check
                .to_string()
                .contains("user 1000 and lacks CAP_SYS_ADMIN and CAP_NET_ADMIN,"),
            "{check}"
        );
        assert_eq!(check.advice, "run it as root");
    }

    #[test]
    fn namespaces_tell_containers() {
        assert_eq!(user_namespace(false).level, Level::Ok);
        assert_eq!(user_namespace(true).level, Level::Problem);
        assert_eq!(namespaces(true, Some(FIRST_PID)).level, Level::Ok);
        assert!(namespaces(true, Some("pid:[1]")).advice.contains("hostPID"));
        assert!(namespaces(false, Some(FIRST_PID)).advice.contains("hostNetwork"));
    }
}
