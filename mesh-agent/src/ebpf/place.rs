//! Where a workload runs: a network namespace of its own, or a cgroup in the host's.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use mesh_common::{CGROUP_KEYS, WorkloadKey};

use super::bpffs::{Folders, cgroup_folder, open_cgroup};
use super::netns::Netns;
use super::object::Loader;
use super::{CaptureError, Shared, programs};

/// Where a workload runs.
#[derive(Debug)]
pub enum Place {
    /// A network namespace by name, as `ip netns` and container runtimes leave it on a file system.
    NetnsPath(PathBuf),
    /// A network namespace that somebody opened for us.
    NetnsFile(File),
    /// A cgroup in the host's network namespace, by its path in the hierarchy or in the file system. What comes
    /// in there cannot be captured: the namespace belongs to others.
    Cgroup(PathBuf),
}

/// Tells whether two places are the same; never reused while one of the two is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaceIdentity {
    device: u64,
    inode: u64,
}

impl PlaceIdentity {
    /// Of what `place` names now.
    pub fn of(place: &Place) -> io::Result<Self> {
        let metadata = match place {
            Place::NetnsPath(path) => File::open(path)?.metadata(),
            Place::NetnsFile(file) => file.metadata(),
            Place::Cgroup(path) => cgroup_folder(path).map_err(io::Error::other)?.metadata(),
        };
        metadata.map(|metadata| Self::from(&metadata))
    }
}

impl From<&Metadata> for PlaceIdentity {
    fn from(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// A place, opened.
#[derive(Debug)]
pub(super) struct Site {
    /// For messages.
    pub(super) name: String,
    pub(super) key: WorkloadKey,
    pub(super) identity: PlaceIdentity,
    /// Where its sockets are made.
    pub(super) netns: Netns,
    cgroup: Option<File>,
}

impl Site {
    pub(super) fn open(place: Place, shared: &Shared) -> Result<Self, CaptureError> {
        match place {
            Place::NetnsPath(path) => {
                let name = path.display().to_string();
                let file = File::open(path).map_err(|source| CaptureError::Namespace {
                    place: name.clone(),
                    source,
                })?;
                Self::netns(name, file, shared)
            }
            Place::NetnsFile(file) => Self::netns(format!("{file:?}"), file, shared),
            Place::Cgroup(path) => Self::cgroup(&cgroup_folder(&path)?, shared),
        }
    }

    pub(super) fn shares_host(&self) -> bool {
        self.cgroup.is_some()
    }

    /// Attaches what this workload needs beside the programs at the cgroup root.
    pub(super) fn attach(&self, loader: &Loader, folders: &Folders) -> Result<(), CaptureError> {
        match &self.cgroup {
            None => programs::attach_lookup(loader, folders, self.key, self.netns.as_file().as_fd()),
            Some(cgroup) => {
                let host = self.netns.cookie();
                programs::attach_workload_cgroup(loader, folders, self.key, host, cgroup)
            }
        }
    }

    fn netns(name: String, file: File, shared: &Shared) -> Result<Self, CaptureError> {
        let failed = |source| CaptureError::Namespace {
            place: name.clone(),
            source,
        };
        let identity = PlaceIdentity::from(&file.metadata().map_err(failed)?);
        let netns = Netns::from_file(file, shared).map_err(failed)?;
        Ok(Self {
            key: netns.cookie(),
            name,
            identity,
            netns,
            cgroup: None,
        })
    }

    fn cgroup(folder: &Path, shared: &Shared) -> Result<Self, CaptureError> {
        let name = folder.display().to_string();
        let file = open_cgroup(folder)?;
        let metadata = file.metadata().map_err(|source| CaptureError::Cgroup {
            path: folder.to_owned(),
            source,
        })?;
        let netns = Netns::home(shared).map_err(|source| CaptureError::Namespace {
            place: name.clone(),
            source,
        })?;
        Ok(Self {
            name,
            // A cgroup's inode number is its id.
            key: CGROUP_KEYS | metadata.ino(),
            identity: PlaceIdentity::from(&metadata),
            netns,
            cgroup: Some(file),
        })
    }
}
