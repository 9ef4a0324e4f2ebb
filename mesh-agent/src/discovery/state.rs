//! The last good state on disk: the documents in force and the addresses given to services.

use std::collections::BTreeMap;
use std::fs::{self, File as Disk, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::config::{Compiler, File, Origin, Vips};
use crate::model::ServiceKey;

/// Of this file's format; another version's file is not read.
const VERSION: u32 = 1;
const FILE: &str = "resources.json";
/// More than the sources may hold, so that what was read can be written; a bound against a file gone wild.
const MAX_BYTES: u64 = 1 << 30;

/// Where the state is kept.
#[derive(Debug)]
pub(super) struct StateFile {
    directory: PathBuf,
    hasher: RandomState,
    /// The hash of what was drafted last, to save the disk an equal write.
    written: Option<u64>,
}

/// What was in force.
#[derive(Debug, Default)]
pub(super) struct State {
    /// By the path in `resources.files` and the file.
    pub(super) files: Vec<(PathBuf, String, File)>,
    pub(super) vips: Vips,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Serialize)]
struct Out<'a> {
    version: u32,
    files: Vec<OutFile<'a>>,
    addresses: BTreeMap<String, u16>,
}

#[derive(Serialize)]
struct OutFile<'a> {
    entry: &'a Path,
    file: &'a str,
    documents: Vec<(usize, &'a RawValue)>,
}

#[derive(Deserialize)]
struct In {
    files: Vec<InFile>,
    addresses: BTreeMap<String, u16>,
}

#[derive(Deserialize)]
struct InFile {
    entry: PathBuf,
    file: String,
    documents: Vec<(usize, Value)>,
}

impl StateFile {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            hasher: RandomState::new(),
            written: None,
        }
    }

    /// The state of the last run; an empty one where there is none or none that can be used.
    pub(super) fn read(&self) -> State {
        let path = self.directory.join(FILE);
        match read(&path) {
            Ok(state) => state,
            Err(error) if error.kind() == io::ErrorKind::NotFound => State::default(),
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "the last good state is not used");
                State::default()
            }
        }
    }

    /// What is in force, to be written; `None` when that is what was drafted last.
    pub(super) fn draft(&mut self, paths: &[PathBuf], compiler: &Compiler) -> io::Result<Option<Draft>> {
        let files = compiler
            .files()
            .iter()
            .filter_map(|(Origin { order, file }, documents)| {
                Some(OutFile {
                    entry: paths.get(*order)?,
                    file,
                    documents: documents.good().collect(),
                })
            });
        let out = Out {
            version: VERSION,
            files: files.collect(),
            addresses: compiler
                .vips()
                .given()
                .map(|(key, number)| (key.to_string(), number))
                .collect(),
        };
        let bytes = serde_json::to_vec(&out)?;
        let hash = self.hasher.hash_one(&bytes);
        if self.written == Some(hash) {
            return Ok(None);
        }
        self.written = Some(hash);
        let directory = self.directory.clone();
        Ok(Some(Draft { directory, bytes }))
    }
}

/// A state on its way to the disk.
#[derive(Debug)]
pub(super) struct Draft {
    directory: PathBuf,
    bytes: Vec<u8>,
}

impl Draft {
    /// Writes it: whole or not at all, whenever the machine stops. A failure costs only the next start its safety
    /// net.
    pub(super) fn write(&self) {
        if let Err(error) = replace(&self.directory, &self.bytes) {
            tracing::warn!(%error, "the last good state cannot be written to stateDir");
        }
    }
}

fn read(path: &Path) -> io::Result<State> {
    let mut bytes = Vec::new();
    Disk::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
    let Version { version } = serde_json::from_slice(&bytes)?;
    if version != VERSION {
        let message = format!("it has format {version}, this agent reads {VERSION}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let state: In = serde_json::from_slice(&bytes)?;
    let vips = state.addresses.into_iter().filter_map(|(key, number)| {
        let (namespace, name) = key.split_once('/')?;
        let key = ServiceKey {
            namespace: namespace.into(),
            name: name.into(),
        };
        Some((key, number))
    });
    Ok(State {
        files: state
            .files
            .into_iter()
            .map(|file| (file.entry, file.file, File::restore(file.documents)))
            .collect(),
        vips: Vips::restore(vips),
    })
}

fn replace(directory: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let draft = directory.join(format!("{FILE}.new"));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        // Documents may hold what is not everybody's business.
        .mode(0o600)
        .open(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&draft, directory.join(FILE))?;
    Disk::open(directory)?.sync_all()
}
