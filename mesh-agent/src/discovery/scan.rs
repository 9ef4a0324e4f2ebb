//! Looking at the files: what is new is read, what is the same is left, what cannot be read stays as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::journal::Journal;
use super::saver::Draft;
use super::stamp::Stamp;
use crate::config::{AgentConfig, Compiler, File, Listed, Origin, is_listed, list, read_text};
use crate::model::{Rejected, Severity, Snapshot};

/// Bytes in all files together: what the agent is ready to hold in memory, several times over.
const MAX_TOTAL_BYTES: u64 = 256 << 20;

/// The documents in files and folders, and the snapshot that they make.
#[derive(Debug)]
pub struct FileSource {
    paths: Vec<PathBuf>,
    compiler: Compiler,
    seen: BTreeMap<Origin, Seen>,
    /// Bytes in all files.
    total: u64,
    /// Files that are links, as of the last look at all.
    links: BTreeSet<PathBuf>,
    hasher: RandomState,
    /// Until somebody takes it to write down what changes.
    pub(super) journal: Option<Journal>,
    /// What is still to be written down.
    draft: Draft,
}

/// How a file looked when it was read.
#[derive(Clone, Debug)]
struct Seen {
    /// `None`: look again each time.
    stamp: Option<Stamp>,
    text: u64,
    bytes: u64,
}

/// What there is to look at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Look {
    All,
    /// These files, and nothing else.
    Files(BTreeSet<PathBuf>),
}

impl Look {
    /// One look for both.
    pub(super) fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Files(mut files), Self::Files(more)) => {
                files.extend(more);
                Self::Files(files)
            }
            _ => Self::All,
        }
    }
}

type Changes = Vec<(Origin, Option<File>)>;

impl FileSource {
    /// Reads everything once. What cannot be read is taken from the last run's state.
    pub fn open(config: &AgentConfig) -> Self {
        let journal = Journal::open(config.state_dir.clone(), config.files.clone());
        let mut source = Self {
            paths: config.files.clone(),
            compiler: Compiler::new(config.settings(), journal.vips()),
            seen: BTreeMap::new(),
            total: 0,
            links: BTreeSet::new(),
            hasher: RandomState::new(),
            journal: Some(journal),
            draft: Draft::default(),
        };
        let changes = source.look(true);
        source.apply(changes);
        // Of this run nothing is written down yet, those that were given earlier neither.
        let given = source.compiler.vips().given();
        let given = given.map(|(key, number)| (key.clone(), Some(number)));
        source.draft.numbers.extend(given);
        source
    }

    /// What is in force.
    pub fn snapshot(&self) -> &Snapshot {
        self.compiler.snapshot()
    }

    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    pub(super) fn links(&self) -> &BTreeSet<PathBuf> {
        &self.links
    }

    /// A file that is gone may mean its folder, and one that is a link needs more to be watched.
    pub(super) fn widened(&self, look: Look) -> Look {
        let is_file = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file());
        match look {
            Look::Files(files) if files.iter().all(is_file) => Look::Files(files),
            _ => Look::All,
        }
    }

    /// Looks; true when something changed.
    pub(super) fn scan(&mut self, look: &Look) -> bool {
        let changes = match look {
            Look::All => self.look(false),
            Look::Files(files) => self.look_at(files),
        };
        let changed = !changes.is_empty();
        if changed {
            self.apply(changes);
        }
        changed
    }

    /// What is to be written down since the last call.
    pub(super) fn take_draft(&mut self) -> Draft {
        self.draft.numbers.extend(self.compiler.vips().take_changes());
        std::mem::take(&mut self.draft)
    }

    /// What an event about `path` calls for; `None` when it is nobody's business.
    pub(super) fn look_for(&self, path: &Path) -> Option<Look> {
        let path = plain(path);
        let is = |configured: &&PathBuf| plain(configured) == path;
        let above = |configured: &&PathBuf| plain(configured).starts_with(path);
        let within = |configured: &&PathBuf| Some(plain(configured)) == path.parent();
        let known_file = |configured: &&PathBuf| {
            let order = self.paths.iter().position(|path| path == *configured);
            let file = configured.to_string_lossy().into();
            order.is_some_and(|order| self.seen.contains_key(&Origin { order, file }))
        };
        if let Some(configured) = self.paths.iter().find(is) {
            return Some(match known_file(&configured) {
                true => Look::Files([configured.clone()].into()),
                false => Look::All,
            });
        }
        match self.paths.iter().find(within) {
            Some(folder) if is_listed(path) => {
                let name = path.file_name()?;
                Some(Look::Files([folder.join(name)].into()))
            }
            // Any name may be a part of the way that a link goes.
            _ if !self.links.is_empty() || self.paths.iter().any(|path| above(&path)) => Some(Look::All),
            _ => None,
        }
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

    fn look_at(&mut self, files: &BTreeSet<PathBuf>) -> Changes {
        let mut changes = Changes::new();
        for path in files {
            let entries = self.paths.iter().enumerate();
            let orders =
                entries.filter(|(_, entry)| *entry == path || Some(entry.as_path()) == path.parent());
            let orders: Vec<_> = orders.map(|(order, _)| order).collect();
            for order in orders {
                self.visit(origin(order, path), path, &mut changes);
            }
        }
        changes
    }

    /// Looks at everything. `first`: a path that is not there may be there soon, and until then its last good state
    /// holds.
    fn look(&mut self, first: bool) -> Changes {
        let mut changes = Changes::new();
        let mut wanted = BTreeSet::new();
        self.links.clear();
        for order in 0..self.paths.len() {
            let path = self.paths[order].clone();
            let here = origin(order, &path);
            match list(&path) {
                Ok(Listed::File) => {
                    self.links.extend(path.is_symlink().then(|| path.clone()));
                    self.visit(here.clone(), &path, &mut changes);
                    wanted.insert(here);
                }
                Ok(Listed::Folder { files, links }) => {
                    self.links.extend(links);
                    for file in files {
                        let origin = origin(order, &file);
                        self.visit(origin.clone(), &file, &mut changes);
                        wanted.insert(origin);
                    }
                }
                Err(error) => {
                    if first {
                        self.restore(order, &here, &mut wanted, &mut changes);
                    }
                    let known = self.compiler.files();
                    let was_file = known.get(&here).is_some_and(File::is_good);
                    let of_here = known.keys().filter(|origin| origin.order == order).cloned();
                    // A file that was taken away takes its documents along; a folder is more likely not mounted.
                    let taken_away = was_file && error.kind() == io::ErrorKind::NotFound && !first;
                    if !taken_away {
                        wanted.extend(of_here);
                    }
                    let message = format!("cannot be read: {error}");
                    self.fail(here.clone(), &message, !taken_away, &mut changes);
                    wanted.insert(here);
                }
            }
        }
        let known = self.compiler.files().keys();
        let gone: Vec<_> = known
            .filter(|origin| !wanted.contains(*origin))
            .cloned()
            .collect();
        for origin in gone {
            self.note(&origin, None, &mut changes);
        }
        self.seen.retain(|origin, _| wanted.contains(origin));
        self.total = self.seen.values().map(|seen| seen.bytes).sum();
        changes
    }

    /// Takes the files of a path that is not there from the last run's state.
    fn restore(&mut self, order: usize, here: &Origin, wanted: &mut BTreeSet<Origin>, changes: &mut Changes) {
        let journal = self.journal.as_ref();
        let files = journal.map_or_else(Vec::new, |journal| journal.files(order));
        for origin in files.into_iter().filter(|origin| origin != here) {
            if let Some(file) = self.last_version(&origin) {
                wanted.insert(origin.clone());
                self.note(&origin, Some(file), changes);
            }
        }
    }

    /// Reads one file if it may have changed.
    fn visit(&mut self, origin: Origin, path: &Path, changes: &mut Changes) {
        let metadata = fs::metadata(path);
        let stamp = metadata.as_ref().ok().and_then(Stamp::of);
        if let Some(seen) = self.seen.get(&origin)
            && seen.stamp.is_some()
            && seen.stamp == stamp
        {
            return;
        }
        let length = metadata.map_or(0, |metadata| metadata.len());
        let others = self.total - self.seen.get(&origin).map_or(0, |seen| seen.bytes);
        let text = match others + length > MAX_TOTAL_BYTES {
            true => Err(format!(
                "is not read: all files together may have {} MiB",
                MAX_TOTAL_BYTES >> 20
            )),
            false => read_text(path),
        };
        match text {
            Ok(text) => {
                let bytes = u64::try_from(text.len()).unwrap_or(u64::MAX);
                let hash = self.hasher.hash_one(&text);
                let seen = Seen {
                    stamp,
                    text: hash,
                    bytes,
                };
                if self.is_known(&origin, seen) {
                    return;
                }
                let file = match self.compiler.files().get(&origin) {
                    Some(previous) => File::parse_after(path, &text, previous),
                    None => {
                        let file = File::parse(path, &text);
                        let last = file.has_errors().then(|| self.last_version(&origin));
                        match last.flatten() {
                            Some(last) => file.after(&last),
                            None => file,
                        }
                    }
                };
                self.note(&origin, Some(file), changes);
            }
            Err(message) => self.fail(origin, &message, true, changes),
        }
    }

    /// Remembers how a file looks now; true if its text is the same as before.
    fn is_known(&mut self, origin: &Origin, now: Seen) -> bool {
        let text = now.text;
        self.total += now.bytes;
        let Some(old) = self.seen.insert(origin.clone(), now) else {
            return false;
        };
        self.total -= old.bytes;
        old.text == text
    }

    /// Notes that a file cannot be read; `keep` leaves its documents in force.
    fn fail(&mut self, origin: Origin, message: &str, keep: bool, changes: &mut Changes) {
        let hash = self.hasher.hash_one(message);
        let seen = Seen {
            stamp: None,
            text: hash,
            bytes: 0,
        };
        if self.is_known(&origin, seen) {
            return;
        }
        let file = File::unreadable(message);
        let file = match self.compiler.files().get(&origin).filter(|_| keep) {
            Some(previous) => file.after(previous),
            None => match self.last_version(&origin).filter(|_| keep) {
                Some(last) => file.after(&last),
                None => file,
            },
        };
        self.note(&origin, Some(file), changes);
    }

    /// What the last run knew of a file; only at the start, before anything of this run is in force.
    fn last_version(&self, origin: &Origin) -> Option<File> {
        let journal = self.journal.as_ref()?;
        journal
            .restore(origin)
            .filter(|_| self.compiler.snapshot().generation == 0)
    }

    /// Notes a change for the compiler and for the state.
    fn note(&mut self, origin: &Origin, mut file: Option<File>, changes: &mut Changes) {
        let texts = file.as_mut().map_or_else(Vec::new, File::take_texts);
        // At the start they are written one by one: all at once would need several times the memory. But what follows
        // a version that waits must wait, too.
        let waits = self.draft.has(origin);
        let journal = self.journal.as_mut().filter(|_| !waits);
        if journal.is_none_or(|journal| journal.put_file(origin, &texts).is_err()) {
            self.draft.add(Draft {
                files: [(origin.clone(), texts)].into(),
                ..Draft::default()
            });
        }
        changes.push((origin.clone(), file));
    }
}

fn origin(order: usize, file: &Path) -> Origin {
    let file = file.to_string_lossy().into();
    Origin { order, file }
}

/// Without the `./` that watching the working directory puts before names.
fn plain(path: &Path) -> &Path {
    path.strip_prefix(".").unwrap_or(path)
}

/// Each finding is logged once, when it comes.
fn log_news(before: &[Rejected], now: &[Rejected]) {
    if before == now {
        return;
    }
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
