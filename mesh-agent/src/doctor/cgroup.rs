//! The cgroup at which the programs are attached.

use std::io;

use super::kernel::Version;
use super::{Check, Group, Level};
use crate::ebpf::Cgroups;

/// The first one that knows the cgroup2 of each socket whatever version 1 does. Before, net_cls and net_prio kept their
/// marks in its place: once there is one, new sockets count as those of the root.
const KEEPS_CGROUP2: Version = Version(5, 15);

pub(super) fn check(cgroups: &Cgroups, version: Option<Version>) -> Vec<Check> {
    [Some(judge(cgroups)), membership(cgroups, version)]
        .into_iter()
        .flatten()
        .collect()
}

/// `None` where nothing can come between a socket and its cgroup2.
fn membership(cgroups: &Cgroups, version: Option<Version>) -> Option<Check> {
    let may_be_lost = cgroups.v1_marks_sockets && version < Some(KEEPS_CGROUP2);
    (may_be_lost && !cgroups.v2.is_empty()).then(|| {
        Check::ok(
            Group::Cgroup,
            "socket-cgroups",
            "version 1 has net_cls or net_prio: once one of them is used, kernels before 5.15 do not know the cgroup2 of new sockets, and workloads given by cgroup pass uncaptured",
        )
        .but(
            Level::Warning,
            "start the kernel with `cgroup_no_v1=net_cls,net_prio`, use Linux 5.15 or newer, or give workloads by network namespace",
        )
    })
}

fn judge(cgroups: &Cgroups) -> Check {
    let Some(cgroup) = cgroups.v2.first() else {
        return missing(cgroups);
    };
    let path = cgroup.path.display();
    let check = |found: String| Check::ok(Group::Cgroup, "cgroup2", found);
    let advice = "in a container, mount the host's /sys/fs/cgroup over it (`hostPath`, or `--cgroupns=host` in Docker)";
    match (cgroup.is_root, cgroup.has_others) {
        (true, _) if cgroups.v1 > 0 => check(format!(
            "cgroup2 is mounted at {path}, whole, beside {} hierarchies of version 1",
            cgroups.v1
        )),
        (true, _) => check(format!("cgroup2 is mounted at {path}, whole")),
        (false, Some(false)) => check(format!(
            "the cgroup2 mounted at {path} is not the root of the hierarchy, and nothing runs in cgroups below it: no pod would be captured"
        ))
        .but(Level::Problem, advice),
        (false, _) => check(format!(
            "the cgroup2 mounted at {path} is not the root of the hierarchy: what runs outside of it is not captured"
        ))
        .but(
            Level::Warning,
            format!("fine where this is a node inside of a container; else, {advice}"),
        ),
    }
}

fn missing(cgroups: &Cgroups) -> Check {
    let check = |found: &str| Check::ok(Group::Cgroup, "cgroup2", found);
    if !cgroups.supported {
        return check("the kernel has no cgroup2").but(
            Level::Problem,
            "use a kernel with CONFIG_CGROUPS=y and CONFIG_CGROUP_BPF=y",
        );
    }
    match cgroups.v1 {
        0 => check("cgroup2 is not mounted").but(
            Level::Problem,
            "run `mount -t cgroup2 cgroup2 /sys/fs/cgroup`; in a container, mount the host's /sys/fs/cgroup",
        ),
        // A folder beside those of version 1, where systemd puts it too.
        _ => check("only cgroup version 1 is mounted").but(
            Level::Problem,
            "run `mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`: version 1 can stay beside it",
        ),
    }
}

pub(super) fn unreadable(error: &io::Error) -> Check {
    Check::ok(
        Group::Cgroup,
        "cgroup2",
        format!("/proc/self/mountinfo cannot be read: {error}"),
    )
    .but(Level::Problem, "mount proc at /proc")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ebpf::Cgroup2;

    fn cgroups(v2: &[(bool, Option<bool>)], v1: usize) -> Cgroups {
        let cgroup = |(is_root, has_others): &(bool, Option<bool>)| Cgroup2 {
            path: "/sys/fs/cgroup".into(),
            is_root: *is_root,
            has_others: *has_others,
        };
        Cgroups {
            v2: v2.iter().map(cgroup).collect(),
            v1,
            v1_marks_sockets: false,
            supported: true,
        }
    }

    #[test]
    fn each_way_of_having_cgroups_is_told() {
        for (found, level, text) in [
            (cgroups(&[(true, Some(true))], 0), Level::Ok, "whole"),
            (
                cgroups(&[(true, None)], 9),
                Level::Ok,
                "beside 9 hierarchies of version 1",
            ),
            (
                cgroups(&[(false, Some(true))], 0),
                Level::Warning,
                "what runs outside of it is not captured",
            ),
            (cgroups(&[(false, None)], 0), Level::Warning, "--cgroupns=host"),
            (
                cgroups(&[(false, Some(false))], 0),
                Level::Problem,
                "no pod would be captured",
            ),
            (
                cgroups(&[], 0),
                Level::Problem,
                "mount -t cgroup2 cgroup2 /sys/fs/cgroup`",
            ),
            (cgroups(&[], 9), Level::Problem, "only cgroup version 1"),
            (Cgroups::default(), Level::Problem, "CONFIG_CGROUP_BPF"),
        ] {
            let check = judge(&found);
            assert_eq!(check.level, level, "{check}");
            assert!(check.to_string().contains(text), "{check}");
        }
    }

    #[test]
    fn old_kernels_lose_cgroups_of_sockets_to_version_1() {
        let hybrid = Cgroups {
            v1_marks_sockets: true,
            ..cgroups(&[(true, Some(true))], 9)
        };
        let (old, new) = (Some(Version(5, 14)), Some(Version(5, 15)));
        let checks = check(&hybrid, old);
        let [_, warning] = &*checks else {
            panic!("{checks:?}")
        };
        assert_eq!(warning.level, Level::Warning);
        assert!(
            warning.to_string().contains("cgroup_no_v1=net_cls,net_prio"),
            "{warning}"
        );
        let without = Cgroups {
            v1_marks_sockets: false,
            ..hybrid.clone()
        };
        let only_v1 = Cgroups {
            v2: Vec::new(),
            ..hybrid.clone()
        };
        for (cgroups, version) in [(&hybrid, new), (&without, old), (&only_v1, old)] {
            assert_eq!(check(cgroups, version).len(), 1, "{cgroups:?} {version:?}");
        }
    }
}
