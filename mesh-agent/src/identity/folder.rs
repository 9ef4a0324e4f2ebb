//! The CA's folder: `ca-key.pem`, `ca-cert.pem`, and `root-cert.pem` for more roots that are trusted too.
//!
//! Invariants: files appear whole or not at all and are never overwritten; the key is readable by its owner only.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// No PEM file of ours is near this; keeps a wrong path (a disk, a log) from filling memory.
const MAX_FILE: u64 = 1 << 20;

/// Why the CA's folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{}: others than its owner may read this private key (mode {mode:03o}); \
         run `chmod 600` on it if nobody could have taken it, else replace the root", path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{}: not a private key that can sign: {source}", path.display())]
    Key { path: PathBuf, source: rcgen::Error },
    #[error("{}: {reason}", path.display())]
    Certificate { path: PathBuf, reason: String },
    #[error(
        "{} is not the key of {}; put the matching pair there, or move both away and a new root is made",
        key.display(), certificate.display()
    )]
    Mismatch { key: PathBuf, certificate: PathBuf },
    #[error(
        "{} is missing; restore it, or move {} away and a new root is made",
        key.display(), certificate.display()
    )]
    KeyMissing { key: PathBuf, certificate: PathBuf },
    #[error("a root is not usable for verifying: {0}")]
    Root(#[from] rustls::Error),
}

pub(super) struct Folder(PathBuf);

impl Folder {
    /// Makes the folder, for its owner only, when it is not there.
    pub(super) fn open(path: &Path) -> Result<Self, OpenError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(at(path))?;
        Ok(Self(path.to_owned()))
    }

    pub(super) fn key(&self) -> PathBuf {
        self.0.join("ca-key.pem")
    }

    pub(super) fn certificate(&self) -> PathBuf {
        self.0.join("ca-cert.pem")
    }

    pub(super) fn roots(&self) -> PathBuf {
        self.0.join("root-cert.pem")
    }

    /// The key and the certificate, as far as they are there.
    pub(super) fn read(&self) -> Result<(Option<String>, Option<String>), OpenError> {
        let key = read(&self.key(), |path, file| {
            let mode = file.metadata().map_err(at(path))?.mode() & 0o777;
            if mode & 0o077 != 0 {
                return Err(OpenError::Exposed {
                    path: path.to_owned(),
                    mode,
                });
            }
            Ok(())
        })?;
        Ok((key, read(&self.certificate(), |_, _| Ok(()))?))
    }

    /// The further roots; empty when there are none.
    pub(super) fn extra_roots(&self) -> Result<String, OpenError> {
        Ok(read(&self.roots(), |_, _| Ok(()))?.unwrap_or_default())
    }

    /// Held while files are made; waits for another agent that holds it. Released when dropped.
    pub(super) fn lock(&self) -> Result<File, OpenError> {
        let path = self.0.join(".lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(at(&path))?;
        file.lock().map_err(at(&path))?;
        Ok(file)
    }

    pub(super) fn write_key(&self, pem: &str) -> Result<(), OpenError> {
        self.write(&self.key(), pem, 0o600)
    }

    pub(super) fn write_certificate(&self, pem: &str) -> Result<(), OpenError> {
        self.write(&self.certificate(), pem, 0o644)
    }

    fn write(&self, path: &Path, content: &str, mode: u32) -> Result<(), OpenError> {
        let mut file = tempfile::Builder::new()
            .prefix(".new-")
            .permissions(Permissions::from_mode(mode))
            .tempfile_in(&self.0)
            .map_err(at(&self.0))?;
        file.write_all(content.as_bytes()).map_err(at(path))?;
        file.as_file().sync_all().map_err(at(path))?;
        file.persist_noclobber(path)
            .map_err(|error| at(path)(error.error))?;
        File::open(&self.0)
            .and_then(|folder| folder.sync_all())
            .map_err(at(&self.0))
    }
}

/// Reads a file that `check` finds good once it is open; `None` when there is none.
fn read(
    path: &Path,
    check: impl Fn(&Path, &File) -> Result<(), OpenError>,
) -> Result<Option<String>, OpenError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(path)(error)),
    };
    check(path, &file)?;
    let mut content = String::new();
    file.take(MAX_FILE)
        .read_to_string(&mut content)
        .map_err(at(path))?;
    Ok(Some(content))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { path, source }
}
