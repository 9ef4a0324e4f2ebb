//! Our folder on the BPF filesystem, and the root of the cgroup2 hierarchy.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use mesh_common::{WorkloadKey, maps};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::unistd::{AccessFlags, faccessat};

use super::CaptureError;
use super::cgroups::Cgroups;

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

    /// Makes them, and a BPF filesystem for them where there is none.
    pub(super) fn create(&self) -> Result<(), CaptureError> {
        if let PinSite::MountAt(parent) = PinSite::of(&self.root)? {
            mount_bpffs(&parent)?;
            tracing::info!(path = %parent.display(), "mounted a BPF filesystem");
        }
        for folder in [&self.maps, &self.links] {
            fs::create_dir_all(folder).map_err(failed(folder))?;
        }
        Ok(())
    }

    /// The link of a workload's own program at `hook`.
    pub(super) fn workload_link(&self, workload: WorkloadKey, hook: &str) -> PathBuf {
        self.links.join(format!("{WORKLOAD_PREFIX}{workload:x}-{hook}"))
    }
}

/// Where a folder for pins would come to lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PinSite {
    /// On a BPF filesystem; this much of its path is there.
    Bpffs(PathBuf),
    /// On one that is to be mounted at its parent. Nothing is ever mounted over anything: that is an empty folder,
    /// as `/sys/fs/bpf` is.
    MountAt(PathBuf),
}

impl PinSite {
    pub fn of(folder: &Path) -> Result<Self, CaptureError> {
        let nearest = folder.ancestors().find(|ancestor| ancestor.exists());
        let nearest = nearest.unwrap_or_else(|| Path::new("/"));
        let kind = statfs(nearest).map_err(|error| failed(nearest)(error.into()))?;
        if kind.filesystem_type() == BPF_FS_MAGIC {
            return Ok(Self::Bpffs(nearest.to_owned()));
        }
        let parent = folder.parent().unwrap_or(folder);
        let empty = fs::read_dir(parent).is_ok_and(|mut entries| entries.next().is_none());
        match empty {
            true => Ok(Self::MountAt(parent.to_owned())),
            false => Err(CaptureError::NotBpffs(folder.to_owned())),
        }
    }

    /// Tries what the agent will do there, out of everybody's sight.
    pub fn try_out(&self) -> Result<(), CaptureError> {
        match self {
            Self::Bpffs(folder) => {
                let may = AccessFlags::W_OK | AccessFlags::X_OK;
                faccessat(AT_FDCWD, folder, may, AtFlags::AT_EACCESS)
                    .map_err(|error| failed(folder)(error.into()))
            }
            Self::MountAt(parent) => {
                // A thread may have a mount namespace of its own, which ends with it.
                let attempt = || {
                    let alone = unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
                        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
                    });
                    alone.map_err(|error| failed(parent)(error.into()))?;
                    mount_bpffs(parent)
                };
                thread::scope(|scope| scope.spawn(attempt).join())
                    .unwrap_or_else(|_| Err(failed(parent)(io::Error::other("the trial ended early"))))
            }
        }
    }
}

fn mount_bpffs(folder: &Path) -> Result<(), CaptureError> {
    let options = Some("mode=0700");
    mount(Some("bpf"), folder, Some("bpf"), MsFlags::empty(), options).map_err(|error| CaptureError::Mount {
        path: folder.to_owned(),
        source: error.into(),
    })
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> CaptureError {
    let path = path.to_owned();
    move |source| CaptureError::Bpffs { path, source }
}

/// One agent's right to a folder, for as long as it lives: a second one would take the first one's workloads, and
/// neither would notice.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "held for its Drop")] Flock<File>);

impl Claim {
    /// Makes the folder where it is missing.
    pub fn on(bpffs: &Path) -> Result<Self, CaptureError> {
        Folders::new(bpffs).create()?;
        let folder = File::open(bpffs).map_err(failed(bpffs))?;
        Self::lock(folder, bpffs)
    }

    /// Makes nothing; `None` where the folder is missing.
    pub(super) fn on_existing(bpffs: &Path) -> Result<Option<Self>, CaptureError> {
        match File::open(bpffs) {
            Ok(folder) => Self::lock(folder, bpffs).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(bpffs)(error)),
        }
    }

    fn lock(folder: File, bpffs: &Path) -> Result<Self, CaptureError> {
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Err(CaptureError::Claimed(bpffs.to_owned())),
            Err((_, error)) => Err(failed(bpffs)(error.into())),
        }
    }
}

const WORKLOAD_PREFIX: &str = "workload-";

/// The workload whose own link has this file name.
pub(super) fn link_owner(name: &str) -> Option<WorkloadKey> {
    let (key, _hook) = name.strip_prefix(WORKLOAD_PREFIX)?.split_once('-')?;
    u64::from_str_radix(key, 16).ok()
}

/// True for a folder on a BPF filesystem, and for one that is not there any more.
pub(super) fn may_have_pins(folder: &Path) -> Result<bool, CaptureError> {
    match statfs(folder) {
        Ok(found) => Ok(found.filesystem_type() == BPF_FS_MAGIC && folder.is_dir()),
        Err(Errno::ENOENT) => Ok(true),
        Err(error) => Err(failed(folder)(error.into())),
    }
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
    let found = Cgroups::find().map_err(CaptureError::Mounts)?;
    let cgroup = found.v2.into_iter().next().ok_or(CaptureError::NoCgroup2)?;
    Ok(cgroup.path)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_mounted_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("precious"), "data").unwrap();
        let error = Folders::new(&dir.path().join("pins")).create().unwrap_err();
        assert!(matches!(error, CaptureError::NotBpffs(_)), "{error}");
    }

    #[test]
    fn a_folder_has_one_claim_and_none_is_made_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = Claim::on_existing(dir.path()).unwrap();
        assert!(first.is_some());
        let second = Claim::on_existing(dir.path()).unwrap_err();
        assert!(matches!(second, CaptureError::Claimed(_)), "{second}");
        drop(first);
        assert!(Claim::on_existing(dir.path()).unwrap().is_some());
        let missing = dir.path().join("missing");
        assert!(Claim::on_existing(&missing).unwrap().is_none());
        assert!(!missing.exists());
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
