//! The cgroup hierarchies of this machine, as far as this process sees them.
//!
//! What runs outside of the cgroup where the programs are attached is not captured, so it matters whether what is
//! mounted is the whole hierarchy or only a container's own part of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::mounts::{self, Mount};

/// What there is of cgroups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Where cgroup2 is mounted, the one that the agent uses first.
    pub v2: Vec<Cgroup2>,
    /// How many hierarchies of version 1 are mounted.
    pub v1: usize,
    /// The kernel knows cgroup2.
    pub supported: bool,
}

/// A mounted cgroup2 hierarchy, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup2 {
    pub path: PathBuf,
    /// Nothing is above it.
    pub is_root: bool,
    /// Whether more than this process runs in it or below it, if that can be read.
    pub has_others: Option<bool>,
}

impl Cgroups {
    pub fn find() -> io::Result<Self> {
        let mounts = mounts::all()?;
        let kinds = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        Ok(Self {
            v2: preferred(mounts.iter().filter_map(Cgroup2::at).collect()),
            v1: mounts.iter().filter(|mount| mount.kind == "cgroup").count(),
            supported: kinds.lines().any(|line| line.ends_with("\tcgroup2")),
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
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
        let (stat, processes) = (read("cgroup.stat"), read("cgroup.procs"));
        Self {
            path: folder.to_owned(),
            // The only cgroup without a type is the root of all; that of a cgroup namespace has one.
            is_root: !folder.join("cgroup.type").exists(),
            has_others: stat
                .zip(processes)
                .map(|(stat, processes)| has_others(&stat, &processes, process::id())),
        }
    }
}

/// The whole hierarchy before a part of it.
fn preferred(mut found: Vec<Cgroup2>) -> Vec<Cgroup2> {
    found.sort_by_key(|cgroup| !cgroup.is_root);
    found.dedup_by(|a, b| a.path == b.path);
    found
}

/// Of the text of `cgroup.stat` and `cgroup.procs`, where processes of other namespaces are 0.
fn has_others(stat: &str, processes: &str, own: u32) -> bool {
    let own = own.to_string();
    !stat.lines().any(|line| line == "nr_descendants 0") || processes.lines().any(|process| process != own)
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
    fn one_process_alone_has_no_others() {
        let stat = "nr_descendants 0\nnr_dying_descendants 3\n";
        assert!(!has_others(stat, "42\n", 42));
        assert!(!has_others(stat, "", 42));
        assert!(has_others(stat, "42\n7\n", 42));
        assert!(has_others(stat, "0\n42\n", 42));
        assert!(has_others("nr_descendants 12\n", "", 42));
    }

    #[test]
    fn this_machine_has_one() {
        let found = Cgroups::find().unwrap();
        assert!(found.supported);
    }
}
