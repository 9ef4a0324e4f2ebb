//! Our folder on the BPF filesystem, and the root of the cgroup2 hierarchy.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use mesh_common::{WorkloadKey, maps};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::CaptureError;

/// The folders that this layout of maps uses.
#[derive(Clone, Debug)]
pub(super) struct Folders {
    pub(super) root: PathBuf,
    pub(super) maps: PathBuf,
    pub(super) links: PathBuf,
}

impl Folders {
    pub(super) fn new(bpffs: &Path) -> Self {
        let layout = bpffs.join(maps::LAYOUT);
        Self {
            root: bpffs.to_owned(),
            maps: layout.join("maps"),
            links: layout.join("links"),
        }
    }

    /// Makes them. Where there is no BPF filesystem, one is mounted at the parent of our folder, but never over
    /// anything: that must be an empty folder, as `/sys/fs/bpf` is.
    pub(super) fn create(&self) -> Result<(), CaptureError> {
        let failed = |path: &Path, source: io::Error| CaptureError::Bpffs {
            path: path.to_owned(),
            source,
        };
        let nearest = self.root.ancestors().find(|folder| folder.exists());
        let nearest = nearest.unwrap_or_else(|| Path::new("/"));
        let kind = statfs(nearest).map_err(|error| failed(nearest, error.into()))?;
        if kind.filesystem_type() != BPF_FS_MAGIC {
            let parent = self.root.parent().unwrap_or(&self.root);
            let empty = fs::read_dir(parent).is_ok_and(|mut entries| entries.next().is_none());
            if !empty {
                return Err(CaptureError::NotBpffs(self.root.clone()));
            }
            mount(
                Some("bpf"),
                parent,
                Some("bpf"),
                MsFlags::empty(),
                Some("mode=0700"),
            )
            .map_err(|error| failed(parent, error.into()))?;
            tracing::info!(path = %parent.display(), "mounted a BPF filesystem");
        }
        for folder in [&self.maps, &self.links] {
            fs::create_dir_all(folder).map_err(|source| failed(folder, source))?;
        }
        Ok(())
    }

    /// The link of a workload's own program at `hook`.
    pub(super) fn workload_link(&self, workload: WorkloadKey, hook: &str) -> PathBuf {
        self.links.join(format!("{WORKLOAD_PREFIX}{workload:x}-{hook}"))
    }
}

/// One agent's right to a folder, for as long as it lives: a second one would take the first one's workloads, and
/// neither would notice.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "held for its Drop")] Flock<File>);

impl Claim {
    /// Makes the folder where it is missing.
    pub fn on(bpffs: &Path) -> Result<Self, CaptureError> {
        Folders::new(bpffs).create()?;
        let failed = |source: io::Error| CaptureError::Bpffs {
            path: bpffs.to_owned(),
            source,
        };
        let folder = File::open(bpffs).map_err(failed)?;
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Err(CaptureError::Claimed(bpffs.to_owned())),
            Err((_, error)) => Err(failed(error.into())),
        }
    }
}

const WORKLOAD_PREFIX: &str = "workload-";

/// The workload whose own link has this file name.
pub(super) fn link_owner(name: &str) -> Option<WorkloadKey> {
    let (key, _hook) = name.strip_prefix(WORKLOAD_PREFIX)?.split_once('-')?;
    u64::from_str_radix(key, 16).ok()
}

/// File names in `folder`; none if it does not exist.
pub(super) fn entries(folder: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The root of the cgroup2 hierarchy, wherever this machine has it.
pub(super) fn cgroup_root() -> Result<PathBuf, CaptureError> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(CaptureError::Mounts)?;
    cgroup2_mount(&mounts)
        .map(PathBuf::from)
        .ok_or(CaptureError::NoCgroup2)
}

/// A cgroup by its path in the file system, or in the hierarchy (as `/proc/PID/cgroup` has it).
pub(super) fn cgroup_folder(path: &Path) -> Result<PathBuf, CaptureError> {
    let root = cgroup_root()?;
    if path.starts_with(&root) {
        return Ok(path.to_owned());
    }
    Ok(root.join(path.strip_prefix("/").unwrap_or(path)))
}

pub(super) fn open_cgroup(path: &Path) -> Result<File, CaptureError> {
    File::open(path).map_err(|source| CaptureError::Cgroup {
        path: path.to_owned(),
        source,
    })
}

/// The first cgroup2 mount in the text of `/proc/self/mounts`.
fn cgroup2_mount(mounts: &str) -> Option<&str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let path = fields.nth(1)?;
        (fields.next()? == "cgroup2").then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cgroup2_beside_version_1() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(mounts), Some("/sys/fs/cgroup/unified"));
        assert_eq!(cgroup2_mount("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn nothing_is_mounted_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("precious"), "data").unwrap();
        let error = Folders::new(&dir.path().join("pins")).create().unwrap_err();
        assert!(matches!(error, CaptureError::NotBpffs(_)), "{error}");
    }

    #[test]
    fn a_link_is_named_after_its_workload() {
        let path = Folders::new(Path::new("/sys/fs/bpf/x")).workload_link(0x1234, "connect4");
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(link_owner(name), Some(0x1234));
        assert_eq!(link_owner("connect4"), None);
        assert_eq!(link_owner("workload-xyz-connect4"), None);
    }
}
