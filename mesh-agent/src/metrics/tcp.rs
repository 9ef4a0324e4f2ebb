//! Connections between two peers, and the bytes they carried.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::flag::Flag;
use super::labels::{Labels, PeerLabels};

/// Counts the connections between two peers.
#[derive(Clone, Debug)]
pub struct TcpRecorder(Arc<TcpSeries>);

impl TcpRecorder {
    pub(super) fn new(series: Arc<TcpSeries>) -> Self {
        Self(series)
    }

    pub fn add(&self, counts: &TcpCounts) {
        self.0.opened.fetch_add(counts.opened, Ordering::Relaxed);
        self.0.sent.fetch_add(counts.sent, Ordering::Relaxed);
        self.0.received.fetch_add(counts.received, Ordering::Relaxed);
        let closed = &self.0.closed[usize::from(Flag::None.index())];
        closed.fetch_add(counts.closed, Ordering::Relaxed);
    }

    /// Counts a connection as open until what it returns is dropped.
    pub fn open(self) -> TcpConnection {
        self.0.opened.fetch_add(1, Ordering::Relaxed);
        TcpConnection {
            series: self.0,
            flag: Flag::None,
        }
    }
}

/// What somebody else counted, in one go.
#[derive(Clone, Copy, Debug)]
pub struct TcpCounts {
    pub opened: u64,
    pub closed: u64,
    /// Bytes towards the client.
    pub sent: u64,
    /// Bytes from the client.
    pub received: u64,
}

/// One open connection; counted as closed when dropped.
#[derive(Debug)]
pub struct TcpConnection {
    series: Arc<TcpSeries>,
    flag: Flag,
}

impl TcpConnection {
    /// Bytes towards the client: the response, as in Istio.
    pub fn add_sent(&self, bytes: u64) {
        self.series.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes from the client: the request.
    pub fn add_received(&self, bytes: u64) {
        self.series.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How it ended, if not well.
    pub fn set_flag(&mut self, flag: Flag) {
        self.flag = flag;
    }
}

impl Drop for TcpConnection {
    fn drop(&mut self) {
        self.series.closed[usize::from(self.flag.index())].fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
pub(super) struct TcpSeries {
    labels: PeerLabels,
    opened: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    /// By flag: only the end of a connection is known by its flag.
    closed: [AtomicU64; Flag::ALL.len()],
}

impl TcpSeries {
    pub(super) fn new(labels: PeerLabels) -> Self {
        Self {
            labels,
            opened: AtomicU64::default(),
            sent: AtomicU64::default(),
            received: AtomicU64::default(),
            closed: Default::default(),
        }
    }

    /// Grows whenever anything was counted.
    pub(super) fn activity(&self) -> u64 {
        let closed = self.closed.iter().map(|count| count.load(Ordering::Relaxed));
        [&self.opened, &self.sent, &self.received]
            .into_iter()
            .map(|count| count.load(Ordering::Relaxed))
            .chain(closed)
            .fold(0, u64::wrapping_add)
    }

    pub(super) fn is_unused(&self) -> bool {
        self.activity() == 0
    }

    pub(super) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Closed connections by flag, as far as there are any.
    pub(super) fn closed(&self) -> impl Iterator<Item = (Flag, u64)> {
        Flag::ALL
            .into_iter()
            .zip(self.closed.iter().map(|count| count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
    }

    pub(super) fn labels(&self, flag: Flag) -> Labels<'_> {
        Labels {
            peers: &self.labels,
            protocol: "tcp",
            codes: None,
            flags: flag.as_str(),
        }
    }
}
