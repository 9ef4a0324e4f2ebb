//! Watching: file system events name the files to look at, and a slow poll of all of them catches what events miss
//! (network file systems).
//!
//! Invariant: an event costs what it names, and the poll a bounded share of the time, however many files there are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::time::Instant;

use super::events::{Events, Wakes};
use super::saver::Saver;
use super::scan::{FileSource, Look};
use crate::store::Store;

/// Without an event in all that time the files are looked at anyway.
const POLL: Duration = Duration::from_secs(2);
/// But for each moment spent looking this many are spent otherwise.
const POLL_REST: u32 = 200;
/// Folders watched at once; the poll covers the others.
const MAX_WATCHES: usize = 512;

/// Watches as long as it lives.
#[derive(Debug)]
pub struct Watching {
    events: Events,
    thread: Option<JoinHandle<()>>,
}

impl FileSource {
    /// Publishes to `store` from now on whenever the files change.
    pub fn watch(self, store: Store) -> io::Result<Watching> {
        self.watch_every(POLL, store, Folders::new)
    }

    pub(super) fn watch_every(
        mut self,
        poll: Duration,
        store: Store,
        folders: impl FnOnce(Events) -> Folders,
    ) -> io::Result<Watching> {
        let (events, wakes) = Events::new();
        let folders = folders(events.clone());
        let saver = self.journal.take().map(Saver::start).transpose()?;
        let mut discovery = Discovery {
            source: self,
            store,
            folders,
            wakes,
            saver,
            poll,
        };
        let thread = thread::Builder::new()
            .name("discovery".to_owned())
            .spawn(move || discovery.run())?;
        Ok(Watching {
            events,
            thread: Some(thread),
        })
    }
}

impl Watching {
    /// Ends the thread and waits for it: at most for one look at the files.
    pub fn stop(mut self) {
        self.events.stop();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.events.stop();
    }
}

/// What the thread has.
struct Discovery {
    source: FileSource,
    store: Store,
    folders: Folders,
    wakes: Wakes,
    saver: Option<Saver>,
    poll: Duration,
}

impl Discovery {
    fn run(&mut self) {
        // What changed before it was watched made no event.
        let mut next = Some(Look::All);
        let mut poll_at = Instant::now();
        loop {
            self.save();
            let look = match next.take() {
                Some(look) => Some(look),
                None => self.wakes.wait(poll_at, |path| self.source.look_for(path)),
            };
            let Some(look) = look else { return };
            match self.source.widened(look) {
                Look::All => {
                    let begun = Instant::now();
                    self.folders.follow(&self.source);
                    self.look(&Look::All);
                    // What is new to the watcher may have changed before it was watched.
                    next = self.folders.follow(&self.source).then_some(Look::All);
                    poll_at = Instant::now() + self.poll.max(begun.elapsed() * POLL_REST);
                }
                files => self.look(&files),
            }
        }
    }

    fn look(&mut self, look: &Look) {
        if self.source.scan(look) {
            self.store.publish(self.source.snapshot().clone());
        }
    }

    fn save(&mut self) {
        let draft = self.source.take_draft();
        if let Some(saver) = &mut self.saver {
            saver.save(draft);
        }
    }
}

/// The folders that are watched. A folder is its path and its inode: a new one in an old place is watched anew.
pub(super) struct Folders {
    watcher: Option<RecommendedWatcher>,
    watched: BTreeMap<PathBuf, (u64, u64)>,
}

impl Folders {
    pub(super) fn new(events: Events) -> Self {
        let watcher = notify::recommended_watcher(move |event| events.notice(event))
            .map_err(|error| tracing::warn!(%error, "files are polled: they cannot be watched"))
            .ok();
        Self {
            watcher,
            watched: BTreeMap::new(),
        }
    }

    /// Watches what there is to watch now; true when that changed.
    fn follow(&mut self, source: &FileSource) -> bool {
        let Some(watcher) = &mut self.watcher else {
            return false;
        };
        let wanted: BTreeMap<_, _> = folders(source)
            .into_iter()
            .filter_map(|folder| {
                let metadata = fs::metadata(&folder).ok()?;
                Some((folder, (metadata.dev(), metadata.ino())))
            })
            .take(MAX_WATCHES)
            .collect();
        if wanted == self.watched {
            return false;
        }
        for (folder, inode) in &self.watched {
            if wanted.get(folder) != Some(inode) {
                // It may be gone already.
                let _ = watcher.unwatch(folder);
            }
        }
        for (folder, inode) in &wanted {
            if self.watched.get(folder) != Some(inode)
                && let Err(error) = watcher.watch(folder, RecursiveMode::NonRecursive)
            {
                tracing::debug!(folder = %folder.display(), %error, "polled only");
            }
        }
        self.watched = wanted;
        true
    }
}

/// Each configured folder, the folder above each configured path (it may be replaced), and where links lead.
fn folders(source: &FileSource) -> BTreeSet<PathBuf> {
    let mut folders = BTreeSet::new();
    for path in source.paths() {
        if path.is_dir() {
            folders.insert(path.clone());
        }
        let mut above = parent(path);
        while !above.is_dir() && above != Path::new("/") && above != Path::new(".") {
            above = parent(&above);
        }
        folders.insert(above);
    }
    let links = source.links().iter();
    let links = links.filter_map(|file| fs::canonicalize(file).ok());
    folders.extend(links.map(|file| parent(&file)));
    folders
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        Some(_) => PathBuf::from("."),
        None => PathBuf::from("/"),
    }
}
