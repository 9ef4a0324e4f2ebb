//! A request body that can be sent again.
//!
//! Invariants: at most [`REPLAY_LIMIT`] bytes are kept, and none once the last try is known; past that the body
//! streams on but is no longer replayable. What is kept holds on to little memory beside its own bytes. Only one try
//! reads at a time: a new try takes the body over from the one before.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use hyper::body::Incoming;

use super::body::BodyError;

/// The same as Linkerd's and Envoy's usual retry buffer.
pub(super) const REPLAY_LIMIT: usize = 64 * 1024;
/// A smaller piece is copied: as it came, it would hold on to the whole buffer that it was read into (8 KiB at least,
/// and as many as pieces). A larger one is a good part of its buffer: no copy.
const COPY_BELOW: usize = 4 * 1024;

/// The body of one request over all its tries.
#[derive(Debug)]
pub(super) struct Replayable<B = Incoming>(Arc<Mutex<Shared<B>>>);

#[derive(Debug)]
struct Shared<B> {
    rest: B,
    kept: Vec<Bytes>,
    /// What comes after `kept`, copied together from small pieces; the present try has all of it.
    small: Vec<u8>,
    kept_bytes: usize,
    /// Chunks of `kept` already given to the present try.
    given: usize,
    trailers: Option<HeaderMap>,
    trailers_given: bool,
    ended: bool,
    /// More was read than is kept, or no try will follow.
    overflowed: bool,
    /// Counts tries; an older one that is still polled gets an error instead of the newer one's bytes.
    owner: u32,
}

/// One try's view of the body.
#[derive(Debug)]
pub(super) struct Replay<B = Incoming> {
    shared: Arc<Mutex<Shared<B>>>,
    owner: u32,
}

impl<B> Replayable<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<BodyError>,
{
    pub(super) fn new(body: B) -> Self {
        Self(Arc::new(Mutex::new(Shared {
            ended: body.is_end_stream(),
            rest: body,
            kept: Vec::new(),
            small: Vec::new(),
            kept_bytes: 0,
            given: 0,
            trailers: None,
            trailers_given: false,
            overflowed: false,
            owner: 0,
        })))
    }

    /// All that was read so far can be sent again.
    pub(super) fn is_replayable(&self) -> bool {
        !lock(&self.0).overflowed
    }

    /// The body for a new try; an older try's view ends with an error.
    pub(super) fn start(&self) -> Replay<B> {
        let mut shared = lock(&self.0);
        shared.owner += 1;
        shared.seal();
        shared.given = 0;
        shared.trailers_given = false;
        Replay {
            shared: Arc::clone(&self.0),
            owner: shared.owner,
        }
    }

    /// No try follows the present one: nothing needs to be kept any more.
    pub(super) fn settle(&self) {
        let mut shared = lock(&self.0);
        shared.overflowed = true;
        shared.forget_given();
    }
}

impl<B> Replay<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<BodyError>,
{
    pub(super) fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let shared = &mut *lock(&self.shared);
        if shared.owner != self.owner {
            return Poll::Ready(Some(Err("the request is being tried again".into())));
        }
        if let Some(chunk) = shared.kept.get(shared.given).cloned() {
            shared.given += 1;
            if shared.overflowed {
                shared.forget_given();
            }
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        if shared.ended {
            let trailers = shared
                .trailers
                .as_ref()
                .filter(|_| !shared.trailers_given)
                .cloned();
            shared.trailers_given = true;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        match std::task::ready!(Pin::new(&mut shared.rest).poll_frame(cx)) {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    shared.keep(data);
                    // Else an empty frame would follow the last piece, which some peers take for an attack.
                    shared.ended = shared.rest.is_end_stream();
                } else if let Some(trailers) = frame.trailers_ref() {
                    shared.trailers = Some(trailers.clone());
                    shared.ended = true;
                    shared.trailers_given = true;
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

    /// Never for a try that is over: whoever still sends it must not take it for a whole body.
    pub(super) fn is_end_stream(&self) -> bool {
        let shared = lock(&self.shared);
        shared.owner == self.owner
            && shared.ended
            && shared.given >= shared.kept.len()
            && (shared.trailers_given || shared.trailers.is_none())
    }

    pub(super) fn size_hint(&self) -> http_body::SizeHint {
        let shared = lock(&self.shared);
        let ahead: u64 = shared.kept[shared.given.min(shared.kept.len())..]
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

impl<B> Shared<B> {
    /// Keeps what is being given to the present try.
    fn keep(&mut self, data: &Bytes) {
        if data.is_empty() || self.overflowed {
            return;
        }
        self.kept_bytes = self.kept_bytes.saturating_add(data.len());
        if self.kept_bytes > REPLAY_LIMIT {
            self.overflowed = true;
            self.forget_given();
        } else if data.len() < COPY_BELOW {
            self.small.extend_from_slice(data);
        } else {
            self.seal();
            self.kept.push(data.clone());
            self.given = self.kept.len();
        }
    }

    /// Makes one chunk of the small pieces so far.
    fn seal(&mut self) {
        if !self.small.is_empty() {
            let small = std::mem::take(&mut self.small);
            self.kept.push(Bytes::from(small.into_boxed_slice()));
            self.given = self.kept.len();
        }
    }

    fn forget_given(&mut self) {
        self.kept.drain(..self.given.min(self.kept.len()));
        self.given = 0;
        self.small = Vec::new();
        if self.kept.is_empty() {
            self.kept = Vec::new();
        }
    }
}

/// A panic while the lock was held leaves plain data that is still consistent enough to end the request with.
fn lock<B>(shared: &Mutex<Shared<B>>) -> MutexGuard<'_, Shared<B>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;

    use super::*;

    /// A body of these chunks.
    #[derive(Debug)]
    struct Chunks(VecDeque<Bytes>);

    impl http_body::Body for Chunks {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.pop_front().map(|chunk| Ok(Frame::data(chunk))))
        }

        fn is_end_stream(&self) -> bool {
            self.0.is_empty()
        }
    }

    fn body(chunks: &[&'static str]) -> Replayable<Chunks> {
        Replayable::new(Chunks(
            chunks
                .iter()
                .map(|chunk| Bytes::from_static(chunk.as_bytes()))
                .collect(),
        ))
    }

    /// The next chunk; empty at the end, `None` for an error.
    fn next(replay: &Replay<Chunks>) -> Option<Bytes> {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match replay.poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) => frame.into_data().ok(),
            Poll::Ready(Some(Err(_))) => None,
            Poll::Ready(None) => Some(Bytes::new()),
            Poll::Pending => panic!("the chunks are all there"),
        }
    }

    fn rest(replay: &Replay<Chunks>) -> String {
        std::iter::from_fn(|| next(replay).filter(|chunk| !chunk.is_empty()))
            .map(|chunk| String::from_utf8(chunk.to_vec()).unwrap())
            .collect()
    }

    fn kept(body: &Replayable<Chunks>) -> usize {
        let shared = lock(&body.0);
        shared.kept.iter().map(Bytes::len).sum::<usize>() + shared.small.len()
    }

    /// A buffer that a piece of a body was read into, counted for as long as it lives.
    struct Buffer(
        Box<[u8; 8 * 1024]>,
        #[expect(dead_code, reason = "its count is what is looked at")] Arc<()>,
    );

    impl AsRef<[u8]> for Buffer {
        fn as_ref(&self) -> &[u8] {
            &*self.0
        }
    }

    /// Pieces of `length` bytes, each read into a buffer of its own.
    fn pieces(count: usize, length: usize, buffers: &Arc<()>) -> Replayable<Chunks> {
        let piece = |number: usize| {
            let number = u8::try_from(number % 251).unwrap();
            let buffer = Buffer(Box::new([number; 8 * 1024]), Arc::clone(buffers));
            Bytes::from_owner(buffer).slice(..length)
        };
        Replayable::new(Chunks((0..count).map(piece).collect()))
    }

    #[test]
    fn each_try_reads_the_whole_and_the_one_before_no_more() {
        let body = body(&["one ", "two ", "three"]);
        let first = body.start();
        assert_eq!(next(&first).unwrap(), "one ");
        let second = body.start();
        assert!(next(&first).is_none(), "it is over");
        assert_eq!(rest(&second), "one two three");
        assert!(second.is_end_stream());
        assert!(!first.is_end_stream(), "it has not sent the whole");
        assert!(body.is_replayable());
    }

    #[test]
    fn the_last_piece_is_known_to_be_the_last() {
        let body = body(&["one", "two"]);
        let first = body.start();
        next(&first);
        assert!(!first.is_end_stream());
        next(&first);
        assert!(first.is_end_stream());
        let second = body.start();
        assert!(!second.is_end_stream());
        assert_eq!(next(&second).unwrap(), "onetwo", "small pieces are kept together");
        assert!(second.is_end_stream());
    }

    #[test]
    fn nothing_is_kept_once_no_try_can_follow() {
        let large: &'static str = "l".repeat(COPY_BELOW).leak();
        let body = body(&[large, "two ", "three ", "four"]);
        let first = body.start();
        next(&first);
        next(&first);
        let second = body.start();
        assert_eq!(next(&second).unwrap(), large);
        body.settle();
        assert!(!body.is_replayable());
        assert_eq!(kept(&body), "two ".len(), "what this try has still to send");
        assert_eq!(next(&second).unwrap(), "two ");
        assert_eq!(kept(&body), 0);
        assert_eq!(rest(&second), "three four");
        assert_eq!(kept(&body), 0);
    }

    #[test]
    fn small_pieces_do_not_hold_on_to_the_buffers_that_they_came_in() {
        const PIECES: usize = 1000;
        let buffers = Arc::new(());
        let body = pieces(PIECES, 3, &buffers);
        let first = body.start();
        for _ in 0..PIECES {
            next(&first);
        }
        assert!(body.is_replayable());
        assert_eq!(kept(&body), 3 * PIECES);
        assert_eq!(Arc::strong_count(&buffers), 1, "no buffer is left");
        let expected: Vec<u8> = (0..PIECES)
            .flat_map(|number| [u8::try_from(number % 251).unwrap(); 3])
            .collect();
        for _ in 0..2 {
            let again = body.start();
            assert_eq!(next(&again).unwrap(), expected);
            assert!(next(&again).unwrap().is_empty() && again.is_end_stream());
        }
    }

    #[test]
    fn small_and_large_pieces_keep_their_order() {
        let large: &'static str = "l".repeat(COPY_BELOW).leak();
        let body = body(&["a", "b", large, "c", large, "d", "e"]);
        let whole = format!("ab{large}c{large}de");
        let first = body.start();
        for _ in 0..4 {
            next(&first);
        }
        assert_eq!(rest(&body.start()), whole);
        assert_eq!(rest(&body.start()), whole);
        assert!(body.is_replayable());
    }

    #[test]
    fn a_body_beyond_the_limit_passes_and_is_not_kept() {
        let large: &'static str = "x".repeat(REPLAY_LIMIT / 2).leak();
        let body = body(&[large, large, large]);
        let first = body.start();
        next(&first);
        assert!(kept(&body) > 0 && body.is_replayable());
        assert_eq!(rest(&first).len(), 2 * large.len());
        assert_eq!(kept(&body), 0);
        assert!(!body.is_replayable());
    }
}
