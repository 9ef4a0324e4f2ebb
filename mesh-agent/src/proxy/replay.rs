//! A request body that can be sent again.
//!
//! Invariants: at most [`REPLAY_LIMIT`] bytes are kept; past that the body streams on but is no longer
//! replayable. Only one try reads at a time: a new try takes the body over from the one before.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame};
use hyper::body::Incoming;

/// The same as Linkerd's and Envoy's usual retry buffer.
pub(super) const REPLAY_LIMIT: usize = 64 * 1024;

/// The body of one request over all its tries.
#[derive(Clone, Debug)]
pub(super) struct Replayable(Arc<Mutex<Shared>>);

#[derive(Debug)]
struct Shared {
    rest: Incoming,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    trailers: Option<HeaderMap>,
    ended: bool,
    /// More was read than is kept.
    overflowed: bool,
    /// Counts tries; an older one that is still polled gets an error instead of the newer one's bytes.
    owner: u32,
}

/// One try's view of the body.
#[derive(Debug)]
pub(super) struct Replay {
    shared: Arc<Mutex<Shared>>,
    owner: u32,
    /// Chunks of `kept` already given to this try.
    given: usize,
    trailers_given: bool,
}

impl Replayable {
    pub(super) fn new(body: Incoming) -> Self {
        Self(Arc::new(Mutex::new(Shared {
            ended: body.is_end_stream(),
            rest: body,
            kept: Vec::new(),
            kept_bytes: 0,
            trailers: None,
            overflowed: false,
            owner: 0,
        })))
    }

    /// All that was read so far can be sent again.
    pub(super) fn is_replayable(&self) -> bool {
        !lock(&self.0).overflowed
    }

    /// The body for a new try; an older try's view ends with an error.
    pub(super) fn start(&self) -> Replay {
        let mut shared = lock(&self.0);
        shared.owner += 1;
        Replay {
            shared: Arc::clone(&self.0),
            owner: shared.owner,
            given: 0,
            trailers_given: false,
        }
    }
}

impl Replay {
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, super::body::BodyError>>> {
        let shared = &mut *lock(&self.shared);
        if shared.owner != self.owner {
            return Poll::Ready(Some(Err("the request is being tried again".into())));
        }
        if let Some(chunk) = shared.kept.get(self.given) {
            self.given += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        if shared.ended {
            let trailers = shared.trailers.as_ref().filter(|_| !self.trailers_given).cloned();
            self.trailers_given = true;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        match std::task::ready!(Pin::new(&mut shared.rest).poll_frame(cx)) {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    shared.keep(data);
                    self.given = shared.kept.len();
                } else if let Some(trailers) = frame.trailers_ref() {
                    shared.trailers = Some(trailers.clone());
                    shared.ended = true;
                    self.trailers_given = true;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                shared.overflowed = true;
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                shared.ended = true;
                Poll::Ready(None)
            }
        }
    }

    pub(super) fn is_end_stream(&self) -> bool {
        let shared = lock(&self.shared);
        shared.ended && self.given >= shared.kept.len() && (self.trailers_given || shared.trailers.is_none())
    }

    pub(super) fn size_hint(&self) -> http_body::SizeHint {
        let shared = lock(&self.shared);
        let ahead: u64 = shared.kept[self.given.min(shared.kept.len())..]
            .iter()
            .map(|chunk| chunk.len() as u64)
            .sum();
        let rest = if shared.ended {
            http_body::SizeHint::with_exact(0)
        } else {
            shared.rest.size_hint()
        };
        let mut hint = http_body::SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(ahead));
        }
        hint.set_lower(rest.lower().saturating_add(ahead));
        hint
    }
}

impl Shared {
    fn keep(&mut self, data: &Bytes) {
        if data.is_empty() {
            return;
        }
        // With what keeping it costs, or a body in pieces of one byte could cost many times the limit.
        self.kept_bytes = self.kept_bytes.saturating_add(data.len() + size_of::<Bytes>());
        if self.overflowed || self.kept_bytes > REPLAY_LIMIT {
            self.overflowed = true;
            self.kept.clear();
        } else {
            self.kept.push(data.clone());
        }
    }
}

/// A panic while the lock was held leaves plain data that is still consistent enough to end the request with.
fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
