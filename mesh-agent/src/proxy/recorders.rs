//! The metric handles that one connection has already looked up.
//!
//! Invariant: a handle is used only while the snapshot it was made from is the current one, so labels follow the
//! documents; looking up takes no lock that another connection could hold.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use http::HeaderValue;

use crate::metrics::HttpRecorder;

/// Peers that one connection's requests go to at the same time, before all are looked up anew.
const MAX_KEPT: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Recorders(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    generation: u64,
    handles: Vec<(Known, Arc<HttpRecorder>)>,
}

/// What tells the peers of one connection's requests apart.
#[derive(Debug)]
pub(super) struct Exchanging<'a> {
    pub(super) inbound: bool,
    /// The service port dialled, or the client.
    pub(super) one: SocketAddr,
    /// The endpoint.
    pub(super) other: Option<SocketAddr>,
    /// Which service it was chosen for: one endpoint may be behind several.
    pub(super) service: Option<&'a HeaderValue>,
}

/// The same, kept.
#[derive(Debug)]
struct Known {
    inbound: bool,
    one: SocketAddr,
    other: Option<SocketAddr>,
    service: Option<Box<[u8]>>,
}

impl Known {
    fn new(key: &Exchanging<'_>) -> Self {
        Self {
            inbound: key.inbound,
            one: key.one,
            other: key.other,
            // A copy: the value may hold on to all that was received with it.
            service: key.service.map(|service| service.as_bytes().into()),
        }
    }

    fn is(&self, key: &Exchanging<'_>) -> bool {
        self.inbound == key.inbound
            && self.one == key.one
            && self.other == key.other
            && self.service.as_deref() == key.service.map(HeaderValue::as_bytes)
    }
}

impl Recorders {
    pub(super) fn get(
        &self,
        generation: u64,
        key: &Exchanging<'_>,
        make: impl FnOnce() -> Arc<HttpRecorder>,
    ) -> Arc<HttpRecorder> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.generation != generation {
            kept.generation = generation;
            kept.handles.clear();
        }
        if let Some((_, recorder)) = kept.handles.iter().find(|(known, _)| known.is(key)) {
            return Arc::clone(recorder);
        }
        let recorder = make();
        if kept.handles.len() >= MAX_KEPT {
            kept.handles.clear();
        }
        kept.handles.push((Known::new(key), Arc::clone(&recorder)));
        recorder
    }
}
