//! One look at all files: what is new is read, what is the same is left, what cannot be read stays as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::state::{Draft, StateFile};
use crate::config::{AgentConfig, Compiler, File, Listed, Origin, list, read_text};
use crate::model::{Rejected, Severity, Snapshot};

/// Bytes in all files together: what the agent is ready to hold in memory, several times over.
const MAX_TOTAL_BYTES: u64 = 256 << 20;
/// Younger files may change again without a new time stamp, so their text is compared.
const YOUNG: Duration = Duration::from_secs(2);

/// The documents in files and folders, and the snapshot that they make.
#[derive(Debug)]
pub struct FileSource {
    paths: Vec<PathBuf>,
    compiler: Compiler,
    seen: BTreeMap<Origin, Seen>,
    hasher: RandomState,
    state: StateFile,
}

/// How a file looked when it was read.
#[derive(Clone, Debug)]
struct Seen {
    /// `None`: look again each time.
    stamp: Option<Stamp>,
    text: Option<u64>,
    bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

type Changes = Vec<(Origin, Option<File>)>;

impl FileSource {
    /// Reads everything once. What cannot be read is taken from the last run's state.
    pub fn open(config: &AgentConfig) -> Self {
        let state = StateFile::new(config.state_dir.clone());
        let last = state.read();
        let mut source = Self {
            paths: config.files.clone(),
            compiler: Compiler::new(config.settings(), last.vips),
            seen: BTreeMap::new(),
            hasher: RandomState::new(),
            state,
        };
        let restored = last.files.into_iter().filter_map(|(entry, file, documents)| {
            let order = source.paths.iter().position(|path| *path == entry)?;
            let file = file.into();
            Some((Origin { order, file }, Some(documents)))
        });
        let restored: Changes = restored.collect();
        source.compiler.update(restored);
        let changes = source.look(true);
        source.apply(changes);
        source
    }

    /// What is in force.
    pub fn snapshot(&self) -> &Snapshot {
        self.compiler.snapshot()
    }

    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// The files that are known, with the folders that they come from.
    pub(super) fn known_files(&self) -> impl Iterator<Item = &Path> {
        self.seen.keys().map(|origin| Path::new(&*origin.file))
    }

    /// Looks at all files; true when something changed.
    pub(super) fn scan(&mut self) -> bool {
        let changes = self.look(false);
        let changed = !changes.is_empty();
        if changed {
            self.apply(changes);
        }
        changed
    }

    /// The state to be written, if it is another than the last one.
    pub(super) fn draft(&mut self) -> Option<Draft> {
        self.state
            .draft(&self.paths, &self.compiler)
            .unwrap_or_else(|error| {
                tracing::warn!(%error, "the state that is in force cannot be written down");
                None
            })
    }

    fn apply(&mut self, changes: Changes) {
        let before = Arc::clone(&self.compiler.snapshot().rejected);
        let known = self.compiler.files().len();
        let snapshot = self.compiler.update(changes);
        log_news(&before, &snapshot.rejected);
        tracing::info!(
            generation = snapshot.generation,
            workloads = snapshot.workloads.len(),
            services = snapshot.services.len(),
            findings = snapshot.rejected.len(),
            "resources compiled"
        );
        if known > 0 && self.compiler.files().is_empty() {
            tracing::warn!("all resource files are gone: no workload is known any more, and no policy");
        }
    }

    /// `first`: a path that is not there may be there soon, and until then its last good state holds.
    fn look(&mut self, first: bool) -> Changes {
        let mut changes = Changes::new();
        let mut wanted = BTreeSet::new();
        let mut total = 0;
        for order in 0..self.paths.len() {
            let path = self.paths[order].clone();
            let here = Origin {
                order,
                file: path.to_string_lossy().into(),
            };
            match list(&path) {
                Ok(Listed::File) => {
                    self.visit(here.clone(), &path, &mut total, &mut changes);
                    wanted.insert(here);
                }
                Ok(Listed::Folder(files)) => {
                    for file in files {
                        let origin = Origin {
                            order,
                            file: file.to_string_lossy().into(),
                        };
                        self.visit(origin.clone(), &file, &mut total, &mut changes);
                        wanted.insert(origin);
                    }
                }
                Err(error) => {
                    let known = self.compiler.files();
                    let was_file = known.get(&here).is_some_and(|file| file.good().next().is_some());
                    let of_here = known.keys().filter(|origin| origin.order == order).cloned();
                    // A file that was taken away takes its documents along; a folder is more likely not mounted.
                    let taken_away = was_file && error.kind() == io::ErrorKind::NotFound && !first;
                    if !taken_away {
                        wanted.extend(of_here);
                    }
                    self.fail(
                        here.clone(),
                        &format!("cannot be read: {error}"),
                        !taken_away,
                        &mut changes,
                    );
                    wanted.insert(here);
                }
            }
        }
        let gone = self
            .compiler
            .files()
            .keys()
            .filter(|origin| !wanted.contains(origin));
        changes.extend(gone.map(|origin| (origin.clone(), None)));
        self.seen.retain(|origin, _| wanted.contains(origin));
        changes
    }

    /// Reads one file if it may have changed.
    fn visit(&mut self, origin: Origin, path: &Path, total: &mut u64, changes: &mut Changes) {
        let metadata = fs::metadata(path);
        let stamp = metadata.as_ref().ok().and_then(Stamp::of);
        if let Some(seen) = self.seen.get(&origin) {
            *total += seen.bytes;
            if seen.stamp.is_some() && seen.stamp == stamp {
                return;
            }
            *total -= seen.bytes;
        }
        let length = metadata.map_or(0, |metadata| metadata.len());
        let text = match *total + length > MAX_TOTAL_BYTES {
            true => Err(format!(
                "is not read: all files together may have {} MiB",
                MAX_TOTAL_BYTES >> 20
            )),
            false => read_text(path),
        };
        match text {
            Ok(text) => {
                let bytes = u64::try_from(text.len()).unwrap_or(u64::MAX);
                *total += bytes;
                let hash = self.hasher.hash_one(&text);
                let old = self.seen.insert(
                    origin.clone(),
                    Seen {
                        stamp,
                        text: Some(hash),
                        bytes,
                    },
                );
                if old.is_some_and(|old| old.text == Some(hash)) {
                    return;
                }
                let mut file = File::parse(path, &text);
                if let Some(previous) = self.compiler.files().get(&origin) {
                    file = file.after(previous);
                }
                changes.push((origin, Some(file)));
            }
            Err(message) => self.fail(origin, &message, true, changes),
        }
    }

    /// Notes that a file cannot be read; `keep` leaves its documents in force.
    fn fail(&mut self, origin: Origin, message: &str, keep: bool, changes: &mut Changes) {
        let hash = self.hasher.hash_one(message);
        let seen = Seen {
            stamp: None,
            text: Some(hash),
            bytes: 0,
        };
        let old = self.seen.insert(origin.clone(), seen);
        if old.is_some_and(|old| old.text == Some(hash)) {
            return;
        }
        let mut file = File::unreadable(message);
        if let Some(previous) = self.compiler.files().get(&origin).filter(|_| keep) {
            file = file.after(previous);
        }
        changes.push((origin, Some(file)));
    }
}

impl Stamp {
    /// `None` for a file that may change again under the same stamp.
    fn of(metadata: &Metadata) -> Option<Self> {
        let age = SystemTime::now().duration_since(metadata.modified().ok()?).ok()?;
        (age > YOUNG).then(|| Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

/// Each finding is logged once, when it comes.
fn log_news(before: &[Rejected], now: &[Rejected]) {
    let known: BTreeSet<String> = before.iter().map(ToString::to_string).collect();
    for finding in now {
        let text = finding.to_string();
        if known.contains(&text) {
            continue;
        }
        match finding.severity {
            Severity::Error => tracing::error!("{text}"),
            Severity::Warning => tracing::warn!("{text}"),
        }
    }
}
