//! Watching: file system events wake the source, and a slow poll catches what events miss (network file systems).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use super::scan::FileSource;
use super::state::Draft;
use crate::store::Store;

/// Without an event in all that time the files are looked at anyway.
const POLL: Duration = Duration::from_secs(2);
/// One save of an editor is several events: quiet for this long, it is over.
const QUIET: Duration = Duration::from_millis(50);
/// But a folder that is never quiet is looked at all the same.
const MAX_QUIET_WAITS: usize = 4;
/// Folders watched at once; the poll covers the others.
const MAX_WATCHES: usize = 512;

/// Watches as long as it lives.
#[derive(Debug)]
pub struct Watching {
    stop: Arc<AtomicBool>,
    wake: SyncSender<()>,
    thread: Option<JoinHandle<()>>,
}

impl FileSource {
    /// Publishes to `store` from now on whenever the files change.
    pub fn watch(self, store: Store) -> io::Result<Watching> {
        self.watch_every(POLL, store, Folders::new)
    }

    pub(super) fn watch_every(
        self,
        poll: Duration,
        store: Store,
        folders: impl FnOnce(SyncSender<()>) -> Folders,
    ) -> io::Result<Watching> {
        // One message is enough: it says "look again", not what happened.
        let (wake, events) = sync_channel(1);
        let stop = Arc::new(AtomicBool::new(false));
        let folders = folders(wake.clone());
        let thread = thread::Builder::new().name("discovery".to_owned()).spawn({
            let stop = Arc::clone(&stop);
            move || run(self, &store, folders, &Wakes { events, poll }, &stop)
        })?;
        Ok(Watching {
            stop,
            wake,
            thread: Some(thread),
        })
    }
}

impl Watching {
    /// Ends the thread and waits for it: at most for one look at the files.
    pub fn stop(mut self) {
        self.signal();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }

    fn signal(&self) {
        self.stop.store(true, Ordering::Relaxed);
        // A full queue wakes as well.
        let _ = self.wake.try_send(());
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.signal();
    }
}

fn run(mut source: FileSource, store: &Store, mut folders: Folders, wakes: &Wakes, stop: &AtomicBool) {
    let mut saver = Saver::start();
    saver.save(source.draft());
    let mut again = true;
    loop {
        saver.save(None);
        if !again && !wakes.wait() {
            return;
        }
        if stop.load(Ordering::Relaxed) {
            return;
        }
        folders.follow(&source);
        if source.scan() {
            store.publish(source.snapshot().clone());
            saver.save(source.draft());
        }
        // What is new to the watcher may have changed before it was watched.
        again = folders.follow(&source);
    }
}

/// Writes states in a thread of its own: a disk may take seconds, for which no change must wait.
struct Saver {
    drafts: Option<SyncSender<Draft>>,
    /// The newest one, while the thread is busy with others.
    waiting: Option<Draft>,
    thread: Option<JoinHandle<()>>,
}

impl Saver {
    fn start() -> Self {
        let (drafts, queue) = sync_channel::<Draft>(1);
        let thread = thread::Builder::new()
            .name("state".to_owned())
            .spawn(move || queue.iter().for_each(|draft| draft.write()))
            .map_err(|error| tracing::warn!(%error, "the state is written at the end only"))
            .ok();
        Self {
            drafts: thread.is_some().then_some(drafts),
            waiting: None,
            thread,
        }
    }

    /// Hands the newest draft on, or the one that waits, as soon as there is room for it.
    fn save(&mut self, newest: Option<Draft>) {
        self.waiting = newest.or_else(|| self.waiting.take());
        if let (Some(drafts), Some(draft)) = (&self.drafts, self.waiting.take()) {
            self.waiting = drafts.try_send(draft).err().map(|error| match error {
                TrySendError::Full(draft) | TrySendError::Disconnected(draft) => draft,
            });
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.drafts = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
        if let Some(draft) = &self.waiting {
            draft.write();
        }
    }
}

/// When to look again.
struct Wakes {
    events: Receiver<()>,
    poll: Duration,
}

impl Wakes {
    /// Waits for an event and for the quiet after it, or for the time to poll. False when nobody can send any more.
    fn wait(&self) -> bool {
        match self.events.recv_timeout(self.poll) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        }
        for _ in 0..MAX_QUIET_WAITS {
            match self.events.recv_timeout(QUIET) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        true
    }
}

/// The folders that are watched. A folder is its path and its inode: a new one in an old place is watched anew.
pub(super) struct Folders {
    watcher: Option<RecommendedWatcher>,
    watched: BTreeMap<PathBuf, (u64, u64)>,
}

impl Folders {
    pub(super) fn new(wake: SyncSender<()>) -> Self {
        let handler = move |event: notify::Result<Event>| {
            // Our own reading makes events too, and must not wake us.
            let matters = event.map_or(true, |event| match event.kind {
                EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
                _ => true,
            });
            if matters {
                // A full queue already says that there is something to see.
                let _ = wake.try_send(());
            }
        };
        let watcher = notify::recommended_watcher(handler)
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
    let links = source
        .known_files()
        .filter(|file| file.is_symlink())
        .filter_map(|file| fs::canonicalize(file).ok());
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
