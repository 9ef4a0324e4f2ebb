//! The data path's threads: one runtime each, so that what belongs to a connection stays on one core.
//!
//! A connection is given a lane when it is accepted, and everything done for it (its requests, the pooled
//! connections they use) happens there: a request takes no lock that another core holds, and wakes no task of
//! another core. Invariant: a lane never waits for another.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::task::JoinHandle;

thread_local! {
    static HERE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The lanes, to spread work over.
#[derive(Clone, Debug)]
pub struct Lanes(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    handles: Vec<Handle>,
    next: AtomicUsize,
}

impl Lanes {
    /// Starts `count` of them, or one for every other CPU that the process may use. They run until the process ends.
    ///
    /// The other half of the node is for its pods; and each lane more costs: it has connections of its own to the
    /// other agents, so that fewer requests share a write, a wake-up and what is in the core's caches.
    ///
    /// # Errors
    ///
    /// A thread or its runtime cannot be made.
    pub fn start(count: Option<usize>) -> io::Result<Self> {
        let cpus = thread::available_parallelism().map_or(1, NonZero::get);
        let count = count.unwrap_or(cpus / 2).max(1);
        let handles = (0..count).map(start_one).collect::<io::Result<_>>()?;
        Ok(Self::over(handles))
    }

    /// The runtime that the caller is on as the only lane.
    #[must_use]
    pub fn current() -> Self {
        Self::over(vec![Handle::current()])
    }

    fn over(handles: Vec<Handle>) -> Self {
        Self(Arc::new(Inner {
            handles,
            next: AtomicUsize::new(0),
        }))
    }

    /// One after the other.
    pub fn next(&self) -> Lane<'_> {
        let index = self.0.next.fetch_add(1, Ordering::Relaxed) % self.0.handles.len();
        Lane {
            index,
            handle: &self.0.handles[index],
        }
    }

    pub fn all(&self) -> impl Iterator<Item = Lane<'_>> {
        let handles = self.0.handles.iter().enumerate();
        handles.map(|(index, handle)| Lane { index, handle })
    }

    /// Something that each lane has of its own.
    pub fn each<T>(&self, make: impl Fn() -> T) -> PerLane<T> {
        PerLane(self.all().map(|_| Apart(make())).collect())
    }
}

/// One of the data path's threads.
#[derive(Clone, Copy, Debug)]
pub struct Lane<'a> {
    index: usize,
    handle: &'a Handle,
}

impl Lane<'_> {
    /// Whether the caller runs on it.
    pub fn is_here(&self) -> bool {
        HERE.get() == Some(self.index)
    }

    pub fn spawn<F>(&self, work: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.handle.spawn(work)
    }

    pub fn handle(&self) -> &Handle {
        self.handle
    }
}

/// What each lane has of its own.
#[derive(Debug)]
pub struct PerLane<T>(Box<[Apart<T>]>);

/// On cache lines that no other lane writes to.
#[derive(Debug)]
#[repr(align(128))]
struct Apart<T>(T);

impl<T> PerLane<T> {
    /// The caller's; the first one's where the caller is on none.
    pub fn here(&self) -> &T {
        // Made for as many lanes as there are, and there is at least one.
        let index = HERE.get().filter(|index| *index < self.0.len());
        &self.0[index.unwrap_or_default()].0
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|own| &own.0)
    }
}

fn start_one(index: usize) -> io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    thread::Builder::new()
        .name(format!("data-{index}"))
        .spawn(move || {
            HERE.set(Some(index));
            runtime.block_on(std::future::pending::<()>());
        })?;
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_goes_round_and_stays_where_it_was_put() {
        let lanes = Lanes::over(vec![start_one(0).unwrap(), start_one(1).unwrap()]);
        let own = Arc::new(lanes.each(|| AtomicUsize::new(0)));
        let control = Builder::new_current_thread().build().unwrap();
        for _ in 0..10 {
            let (own, lane) = (Arc::clone(&own), lanes.next());
            let index = lane.index;
            let work = lane.spawn(async move {
                // Also after it had to wait.
                tokio::task::yield_now().await;
                own.here().fetch_add(1, Ordering::Relaxed);
                HERE.get()
            });
            assert_eq!(control.block_on(work).unwrap(), Some(index));
        }
        let done: Vec<_> = own.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        assert_eq!(done, [5, 5]);
    }
}
