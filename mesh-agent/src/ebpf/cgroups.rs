//! The cgroup hierarchies of this machine, as far as this process sees them.
//!
//! What runs outside of the cgroup where the programs are attached is not captured, so it matters whether what is
//! mounted is the whole hierarchy or only a container's own part of it. Workloads that are known by their cgroup are
//! captured where the kernel knows the cgroup2 of each socket.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::mounts::{self, Mount};

/// What there is of cgroups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Where cgroup2 is mounted, the one that the agent uses first.
    pub v2: Vec<Cgroup2>,
    /// How many hierarchies of version 1 are mounted.
    pub v1: usize,
    /// A hierarchy of version 1 has net_cls or net_prio, mounted here or where this process does not see it.
    pub v1_marks_sockets: bool,
    /// The kernel knows cgroup2.
    pub supported: bool,
}

/// A mounted cgroup2 hierarchy, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup2 {
    pub path: PathBuf,
    /// Nothing is above it.
    pub is_root: bool,
    /// Whether processes run in cgroups below it, if that can be read. Those beside this one in the same cgroup are of
    /// its own container: a shell or an init that started it.
    pub has_others: Option<bool>,
}

impl Cgroups {
    pub fn find() -> io::Result<Self> {
        let mounts = mounts::all()?;
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Ok(Self {
            v2: preferred(mounts.iter().filter_map(Cgroup2::at).collect()),
            v1: mounts.iter().filter(|mount| mount.kind == "cgroup").count(),
            v1_marks_sockets: marks_sockets(&read("/proc/cgroups")),
            supported: read("/proc/filesystems")
                .lines()
                .any(|line| line.ends_with("\tcgroup2")),
        })
    }
}

impl Cgroup2 {
    fn at(mount: &Mount) -> Option<Self> {
        // Another mount may lie over it.
        let visible = statfs(&mount.path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC);
        (mount.kind == "cgroup2" && visible).then(|| Self::of(&mount.path))
    }

    fn of(folder: &Path) -> Self {
        Self {
            path: folder.to_owned(),
            // The only cgroup without a type is the root of all; that of a cgroup namespace has one.
            is_root: !folder.join("cgroup.type").exists(),
            has_others: has_others(folder).ok(),
        }
    }
}

/// The whole hierarchy before a part of it.
fn preferred(mut found: Vec<Cgroup2>) -> Vec<Cgroup2> {
    found.sort_by_key(|cgroup| !cgroup.is_root);
    found.dedup_by(|a, b| a.path == b.path);
    found
}

/// Whether a cgroup right below has processes, in itself or further below: `cgroup.events` speaks for both.
fn has_others(folder: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(folder)? {
        // Files of the cgroup itself have none, and a cgroup may end meanwhile.
        let events = fs::read_to_string(entry?.path().join("cgroup.events")).unwrap_or_default();
        if events.lines().any(|line| line == "populated 1") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Of the text of `/proc/cgroups`: a controller's name and its hierarchy, which is 0 if no version 1 has it.
fn marks_sockets(controllers: &str) -> bool {
    controllers.lines().any(|line| {
        let mut words = line.split_whitespace();
        matches!(words.next(), Some("net_cls" | "net_prio")) && words.next() != Some("0")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_hierarchy_is_preferred_to_a_part_of_it() {
        let cgroup = |path: &str, is_root| Cgroup2 {
            path: path.into(),
            is_root,
            has_others: None,
        };
        let part = cgroup("/sys/fs/cgroup", false);
        let whole = cgroup("/host/cgroup", true);
        assert_eq!(
            preferred(vec![part.clone(), whole.clone(), whole.clone()]),
            [whole, part]
        );
    }

    #[test]
    fn others_are_those_in_cgroups_below() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let others = || Cgroup2::of(dir.path()).has_others;
        // An init, a shell and this process; their own cgroup is populated.
        write("cgroup.procs", "0\n41\n42\n");
        write("cgroup.stat", "nr_descendants 2\nnr_dying_descendants 3\n");
        write("cgroup.events", "populated 1\nfrozen 0\n");
        assert_eq!(others(), Some(false));
        for name in ["a", "b"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        write("a/cgroup.events", "populated 0\nfrozen 0\n");
        assert_eq!(others(), Some(false), "nothing runs in what is below");
        write("b/cgroup.events", "populated 1\nfrozen 0\n");
        assert_eq!(others(), Some(true));
        assert_eq!(Cgroup2::of(&dir.path().join("c")).has_others, None);
    }

    #[test]
    fn version_1_marks_sockets_where_it_has_the_controllers() {
        let controllers = |net_cls: u32, net_prio: u32| {
            format!(
                "#subsys_name\thierarchy\tnum_cgroups\tenabled\n\
                 cpu\t1\t1\t1\nnet_cls\t{net_cls}\t2\t1\nnet_prio\t{net_prio}\t2\t1\n"
            )
        };
        assert!(!marks_sockets(&controllers(0, 0)));
        assert!(marks_sockets(&controllers(4, 0)));
        assert!(marks_sockets(&controllers(0, 5)));
        assert!(!marks_sockets(""));
    }

    #[test]
    fn this_machine_has_one() {
        let found = Cgroups::find().unwrap();
        assert!(found.supported);
    }
}
