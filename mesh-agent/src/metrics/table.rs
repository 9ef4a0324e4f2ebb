//! The label sets of one family: found once per connection, bounded, and forgotten when idle.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::labels::{PeerLabels, Reporter};

/// A node's pods times what each speaks to; a set costs half a kilobyte and up, and each scrape carries it.
pub(super) const MAX_LABEL_SETS: usize = 2_000;

#[derive(Debug)]
pub(super) struct Table<T> {
    entries: Mutex<BTreeMap<PeerLabels, Entry<T>>>,
    /// Takes what has no room: one for each reporter.
    other: [Arc<T>; 2],
}

#[derive(Debug)]
struct Entry<T> {
    series: Arc<T>,
    /// What it had counted when [`Table::forget_idle`] last looked.
    seen: Option<u64>,
}

impl<T> Table<T> {
    pub(super) fn new(other: impl Fn(Reporter) -> T) -> Self {
        Self {
            entries: Mutex::default(),
            other: [Reporter::Source, Reporter::Destination].map(|reporter| Arc::new(other(reporter))),
        }
    }

    /// The series of these labels, or, when there is no room for more, the one that takes the rest.
    pub(super) fn get(
        &self,
        labels: PeerLabels,
        make: impl FnOnce(PeerLabels, &Arc<T>) -> T,
    ) -> Result<Arc<T>, Arc<T>> {
        let other = self.other(labels.reporter);
        let mut entries = self.lock();
        if let Some(entry) = entries.get(&labels) {
            return Ok(Arc::clone(&entry.series));
        }
        if entries.len() >= MAX_LABEL_SETS {
            return Err(Arc::clone(other));
        }
        let series = Arc::new(make(labels.clone(), other));
        let entry = Entry {
            series: Arc::clone(&series),
            seen: None,
        };
        entries.insert(labels, entry);
        Ok(series)
    }

    pub(super) fn all(&self) -> Vec<Arc<T>> {
        let entries = self.lock();
        let known = entries.values().map(|entry| &entry.series);
        known.chain(&self.other).map(Arc::clone).collect()
    }

    pub(super) fn forget_idle(&self, activity: impl Fn(&T) -> u64) {
        self.lock().retain(|_, entry| {
            let now = Some(activity(&entry.series));
            // Nobody can gain a handle while the lock is held, so a sole owner stays one.
            let idle = Arc::strong_count(&entry.series) == 1 && entry.seen == now;
            entry.seen = now;
            !idle
        });
    }

    fn other(&self, reporter: Reporter) -> &Arc<T> {
        match reporter {
            Reporter::Source => &self.other[0],
            Reporter::Destination => &self.other[1],
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PeerLabels, Entry<T>>> {
        // The map is whole after any panic: each change is one call.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
