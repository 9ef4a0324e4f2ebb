//! The published snapshot: one pointer that readers load and one writer swaps.
//!
//! The only shared mutable routing state. A request loads once and keeps what it got.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use crate::model::Snapshot;

/// Cheap to clone; all clones see the same snapshot.
#[derive(Clone, Debug)]
pub struct Store {
    current: Arc<ArcSwap<Snapshot>>,
    generation: Arc<watch::Sender<u64>>,
}

impl Store {
    pub fn new(initial: Snapshot) -> Self {
        let generation = watch::Sender::new(initial.generation);
        Self {
            current: Arc::new(ArcSwap::from_pointee(initial)),
            generation: Arc::new(generation),
        }
    }

    /// The snapshot of this moment.
    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// The same for a look that ends before the next await: it touches no count that all threads share.
    pub fn glance(&self) -> Guard<Arc<Snapshot>> {
        self.current.load()
    }

    pub fn publish(&self, snapshot: Snapshot) {
        let generation = snapshot.generation;
        self.current.store(Arc::new(snapshot));
        self.generation.send_replace(generation);
    }

    /// Tells of each publication, at least of the newest.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}
