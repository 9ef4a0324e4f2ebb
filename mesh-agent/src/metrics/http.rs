//! Requests between two peers: one cell of atomics for each way that they ended.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;

use super::flag::Flag;
use super::histogram::{BYTES, Histogram, MICROSECONDS, Observed};
use super::labels::{Labels, PeerLabels, Reporter};

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub struct HttpOutcome {
    /// What the client was told; anything outside 100..=599 counts as 0, which is also for "nothing".
    pub status: u16,
    pub flag: Flag,
    /// `Some` for gRPC requests, also for those that ended without a `grpc-status` (14, unavailable).
    pub grpc_status: Option<u16>,
    pub duration: Duration,
    pub request_bytes: u64,
    pub response_bytes: u64,
}

/// Counts the requests between two peers. Shared by all connections between them.
#[derive(Debug)]
pub struct HttpRecorder {
    labels: PeerLabels,
    outcomes: Chunk,
    room: Arc<AtomicUsize>,
    rest: Rest,
}

/// Where an outcome goes that has no room.
#[derive(Debug)]
enum Rest {
    To(Arc<HttpRecorder>),
    /// This is that place; what arrives is counted.
    Here(Counter),
}

/// Different outcomes that one pair of peers may have, so that a server that invents status codes does not eat
/// the room of the others. Each costs 70 lines per scrape.
const MAX_OUTCOMES_PER_PAIR: usize = 32;
/// Different outcomes that all pairs may have together. Each takes half a KiB for each thread that counts it, of
/// [`PARTS`] at most: 17 MB if all are there.
pub(super) const MAX_OUTCOMES: usize = 4_000;

impl HttpRecorder {
    pub(super) fn new(labels: PeerLabels, other: &Arc<Self>, room: &Arc<AtomicUsize>) -> Self {
        Self {
            labels,
            outcomes: Chunk::default(),
            room: Arc::clone(room),
            rest: Rest::To(Arc::clone(other)),
        }
    }

    /// Takes what has no room elsewhere.
    pub(super) fn other(reporter: Reporter, overflow: Counter) -> Self {
        Self {
            labels: PeerLabels::other(reporter),
            outcomes: Chunk::default(),
            room: Arc::new(AtomicUsize::new(MAX_OUTCOMES_PER_PAIR)),
            rest: Rest::Here(overflow),
        }
    }

    pub fn record(&self, outcome: &HttpOutcome) {
        let key = match &self.rest {
            Rest::To(_) => Key::new(outcome),
            Rest::Here(overflow) => {
                overflow.inc();
                Key::class(outcome)
            }
        };
        match (self.outcomes.cell(key, &self.room), &self.rest) {
            (Some(cell), _) => cell.record(outcome),
            (None, Rest::To(other)) => other.record(outcome),
            // There are far fewer classes than room.
            (None, Rest::Here(_)) => {}
        }
    }

    /// All requests so far.
    pub(super) fn requests(&self) -> u64 {
        self.outcomes.iter().map(Cell::requests).sum()
    }

    /// Each outcome with its labels.
    pub(super) fn cells(&self) -> impl Iterator<Item = (Labels<'_>, &Cell)> {
        let cells = self.outcomes.iter();
        cells.map(|cell| (cell.key.labels(&self.labels), cell))
    }
}

impl Drop for HttpRecorder {
    fn drop(&mut self) {
        self.room
            .fetch_add(self.outcomes.iter().count(), Ordering::Relaxed);
    }
}

/// An append-only list of cells that is read without a lock; the commonest outcome comes first by itself.
#[derive(Debug, Default)]
struct Chunk {
    cells: [OnceLock<Box<Cell>>; CHUNK],
    next: OnceLock<Box<Self>>,
}

const CHUNK: usize = 4;

impl Chunk {
    /// The cell of `key`, made when there is room.
    fn cell(&self, key: Key, room: &AtomicUsize) -> Option<&Cell> {
        let mut chunk = self;
        for _ in 0..MAX_OUTCOMES_PER_PAIR / CHUNK {
            for slot in &chunk.cells {
                let cell = match slot.get() {
                    Some(cell) => cell,
                    None => Self::fill(slot, key, room)?,
                };
                if cell.key == key {
                    return Some(cell);
                }
            }
            chunk = chunk.next.get_or_init(Box::default);
        }
        None
    }

    /// Whoever is first fills the slot, so it may hold another key afterwards.
    fn fill<'a>(slot: &'a OnceLock<Box<Cell>>, key: Key, room: &AtomicUsize) -> Option<&'a Cell> {
        let take = |left: usize| left.checked_sub(1);
        room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .ok()?;
        let mut taken = false;
        let cell = slot.get_or_init(|| {
            taken = true;
            Box::new(Cell::new(key))
        });
        if !taken {
            room.fetch_add(1, Ordering::Relaxed);
        }
        Some(cell)
    }

    fn iter(&self) -> impl Iterator<Item = &Cell> {
        std::iter::successors(Some(self), |chunk| chunk.next.get().map(|next| &**next)).flat_map(|chunk| {
            chunk
                .cells
                .iter()
                .filter_map(|slot| slot.get().map(|cell| &**cell))
        })
    }
}

/// The labels that vary with the outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    status: u16,
    flag: Flag,
    grpc: Option<u8>,
}

impl Key {
    fn new(outcome: &HttpOutcome) -> Self {
        /// gRPC's UNKNOWN, for codes that gRPC does not know.
        const UNKNOWN: u8 = 2;
        const LAST: u8 = 16;
        let grpc = |code| {
            u8::try_from(code)
                .ok()
                .filter(|code| *code <= LAST)
                .unwrap_or(UNKNOWN)
        };
        Self {
            status: if (100..=599).contains(&outcome.status) {
                outcome.status
            } else {
                0
            },
            flag: outcome.flag,
            grpc: outcome.grpc_status.map(grpc),
        }
    }

    fn class(outcome: &HttpOutcome) -> Self {
        Self {
            status: Self::new(outcome).status / 100 * 100,
            flag: Flag::None,
            grpc: None,
        }
    }

    fn labels(self, peers: &PeerLabels) -> Labels<'_> {
        Labels {
            peers,
            protocol: if self.grpc.is_some() { "grpc" } else { "http" },
            codes: Some((self.status, self.grpc)),
            flags: self.flag.as_str(),
        }
    }
}

/// One outcome's counts, in parts that are added up when they are read: threads that count the same thing on
/// different cores would else take the memory from each other with every request.
#[derive(Debug)]
pub(super) struct Cell {
    key: Key,
    parts: [OnceLock<Box<Part>>; PARTS],
}

/// More threads than that share parts.
const PARTS: usize = 8;

#[derive(Debug, Default)]
#[repr(align(128))]
struct Part {
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
}

thread_local! {
    /// The part that this thread counts in.
    static OWN: usize = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed) % PARTS
    };
}

impl Cell {
    fn new(key: Key) -> Self {
        Self {
            key,
            parts: Default::default(),
        }
    }

    fn record(&self, outcome: &HttpOutcome) {
        let part = self.parts[OWN.with(|own| *own)].get_or_init(Box::default);
        let microseconds = u64::try_from(outcome.duration.as_micros()).unwrap_or(u64::MAX);
        part.duration.observe(microseconds, &MICROSECONDS);
        part.request_bytes.observe(outcome.request_bytes, &BYTES);
        part.response_bytes.observe(outcome.response_bytes, &BYTES);
    }

    /// Each request has exactly one duration.
    pub(super) fn requests(&self) -> u64 {
        self.parts().map(|part| part.duration.count()).sum()
    }

    pub(super) fn duration(&self) -> Observed {
        Histogram::read(self.parts().map(|part| &part.duration), &MICROSECONDS)
    }

    pub(super) fn request_bytes(&self) -> Observed {
        Histogram::read(self.parts().map(|part| &part.request_bytes), &BYTES)
    }

    pub(super) fn response_bytes(&self) -> Observed {
        Histogram::read(self.parts().map(|part| &part.response_bytes), &BYTES)
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        self.parts
            .iter()
            .filter_map(|part| part.get().map(|part| &**part))
    }
}
