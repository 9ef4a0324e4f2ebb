//! File system events, gathered until it is time to look.
//!
//! Invariants: a file is looked at as soon as its writer is done with it (closed it, or moved it into place), and
//! else only when nothing has happened for a while, so that a save that is several events is one change and no file is
//! read half-written; nothing that happened is forgotten; paths in memory are bounded.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, ModifyKind, RenameMode};
use notify::{Event, EventKind};
use tokio::time::Instant;

use super::scan::Look;

/// Files are often written several at once: those that follow each other as closely as this are one change.
const GATHER: Duration = Duration::from_millis(3);
/// What is not known to be complete is, after so long without an event.
const QUIET: Duration = Duration::from_millis(50);
/// But what is never quiet is looked at all the same.
const NEVER_QUIET: Duration = Duration::from_millis(200);
/// Times that more is gathered.
const MAX_GATHERS: usize = 4;
/// Paths that are remembered; with more, everything is looked at.
const MAX_PATHS: usize = 1024;

/// Where events are put. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Events {
    noticed: Arc<Mutex<Noticed>>,
    // One message is enough: it says "look", not at what.
    wake: SyncSender<()>,
}

/// What happened since the last look.
#[derive(Debug, Default)]
struct Noticed {
    /// Somebody is done with these.
    settled: BTreeSet<PathBuf>,
    /// Something goes on with these.
    open: BTreeSet<PathBuf>,
    /// Nobody knows what happened.
    anything: bool,
    stopped: bool,
}

/// Where events are waited for.
#[derive(Debug)]
pub(super) struct Wakes {
    noticed: Arc<Mutex<Noticed>>,
    wakes: Receiver<()>,
    /// Since when there are open ones.
    open_since: Option<Instant>,
}

impl Events {
    pub(super) fn new() -> (Self, Wakes) {
        let (wake, wakes) = sync_channel(1);
        let noticed = Arc::default();
        let events = Self {
            noticed: Arc::clone(&noticed),
            wake,
        };
        let wakes = Wakes {
            noticed,
            wakes,
            open_since: None,
        };
        (events, wakes)
    }

    /// Nobody is to wait any more.
    pub(super) fn stop(&self) {
        lock(&self.noticed).stopped = true;
        self.wake();
    }

    fn wake(&self) {
        // A full queue wakes as well.
        let _ = self.wake.try_send(());
    }

    pub(super) fn notice(&self, event: notify::Result<Event>) {
        let mut noticed = lock(&self.noticed);
        match event {
            Ok(event) if !event.need_rescan() => {
                let settled = match event.kind {
                    EventKind::Access(AccessKind::Close(AccessMode::Write))
                    | EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both)) => true,
                    // Our own reading makes events too, and must not wake us.
                    EventKind::Access(_) => return,
                    _ => false,
                };
                for path in event.paths {
                    noticed.add(path, settled);
                }
            }
            _ => noticed.anything = true,
        }
        drop(noticed);
        self.wake();
    }
}

impl Noticed {
    fn add(&mut self, path: PathBuf, settled: bool) {
        match settled {
            true => {
                self.open.remove(&path);
                self.settled.insert(path);
            }
            false => {
                self.settled.remove(&path);
                self.open.insert(path);
            }
        }
        if self.settled.len() + self.open.len() > MAX_PATHS {
            self.settled.clear();
            self.open.clear();
            self.anything = true;
        }
    }
}

impl Wakes {
    /// Waits until there is something to look at, or until `poll_at`. `None`: there is nothing to wait for any more.
    pub(super) fn wait(
        &mut self,
        poll_at: Instant,
        look_for: impl Fn(&Path) -> Option<Look>,
    ) -> Option<Look> {
        loop {
            let until_poll = poll_at.saturating_duration_since(Instant::now());
            let patience = match self.open_since {
                Some(_) => until_poll.min(QUIET),
                None => until_poll,
            };
            let woken = self.wakes.recv_timeout(patience);
            match woken {
                Ok(()) => self.gather(),
                Err(RecvTimeoutError::Timeout) if until_poll <= patience => return Some(Look::All),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
            let noticed = self.take(woken.is_err());
            if noticed.stopped {
                return None;
            }
            if noticed.anything {
                return Some(Look::All);
            }
            let paths = noticed.settled.iter().chain(&noticed.open);
            let look = paths.filter_map(|path| look_for(path)).reduce(Look::and);
            if look.is_some() {
                return look;
            }
        }
    }

    fn gather(&self) {
        for _ in 0..MAX_GATHERS {
            if self.wakes.recv_timeout(GATHER).is_err() {
                return;
            }
        }
    }

    /// What is settled, and the rest as well once it is quiet or had its time.
    fn take(&mut self, quiet: bool) -> Noticed {
        let mut noticed = lock(&self.noticed);
        let mut taken = std::mem::take(&mut *noticed);
        let since = *self.open_since.get_or_insert_with(Instant::now);
        if !quiet && !taken.anything && since.elapsed() < NEVER_QUIET {
            noticed.open = std::mem::take(&mut taken.open);
        }
        if noticed.open.is_empty() {
            self.open_since = None;
        }
        taken
    }
}

fn lock(noticed: &Mutex<Noticed>) -> MutexGuard<'_, Noticed> {
    noticed.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use notify::event::{CreateKind, DataChange, Flag};

    use super::*;

    const WRITTEN: EventKind = EventKind::Modify(ModifyKind::Data(DataChange::Any));
    const CLOSED: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));
    const MOVED: EventKind = EventKind::Modify(ModifyKind::Name(RenameMode::To));

    fn event(kind: EventKind, path: &str) -> notify::Result<Event> {
        Ok(Event::new(kind).add_path(path.into()))
    }

    fn files(paths: &[&str]) -> Option<Look> {
        Some(Look::Files(paths.iter().map(PathBuf::from).collect()))
    }

    /// The next look, where all files but hidden ones matter; the poll is far.
    fn next(wakes: &mut Wakes) -> Option<Look> {
        let poll_at = Instant::now() + Duration::from_secs(3600);
        wakes.wait(poll_at, |path| {
            let name = path.to_string_lossy();
            (!name.starts_with('.')).then(|| Look::Files([path.to_owned()].into()))
        })
    }

    #[test]
    fn what_is_done_with_does_not_wait_for_what_goes_on() {
        let (events, mut wakes) = Events::new();
        events.notice(event(EventKind::Create(CreateKind::File), "a"));
        events.notice(event(WRITTEN, "b"));
        events.notice(event(WRITTEN, ".c"));
        events.notice(event(CLOSED, "b"));
        events.notice(event(MOVED, "d"));
        assert_eq!(next(&mut wakes), files(&["b", "d"]));
        assert_eq!(next(&mut wakes), files(&["a"]));
        // What is written to again is not done with.
        events.notice(event(CLOSED, "a"));
        events.notice(event(WRITTEN, "a"));
        events.notice(event(CLOSED, "b"));
        assert_eq!(next(&mut wakes), files(&["b"]));
        assert_eq!(next(&mut wakes), files(&["a"]));
    }

    #[test]
    fn what_nobody_can_name_is_everything() {
        let (events, mut wakes) = Events::new();
        events.notice(Err(notify::Error::generic("lost")));
        assert_eq!(next(&mut wakes), Some(Look::All));
        events.notice(Ok(Event::new(EventKind::Other).set_flag(Flag::Rescan)));
        assert_eq!(next(&mut wakes), Some(Look::All));
        for path in 0..=MAX_PATHS {
            events.notice(event(CLOSED, &path.to_string()));
        }
        assert_eq!(lock(&events.noticed).settled.len(), 0);
        assert_eq!(next(&mut wakes), Some(Look::All));
        assert_eq!(wakes.wait(Instant::now(), |_| None), Some(Look::All), "the poll");
        events.stop();
        assert_eq!(next(&mut wakes), None);
    }
}
