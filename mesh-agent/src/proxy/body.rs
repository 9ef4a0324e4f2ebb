//! The one body type that flows through the proxy, and what watches it pass.
//!
//! Invariant: frames are passed on as they come, never copied; whatever must happen at the end of a response
//! (measuring it, giving its connection back) happens exactly once, also when the body is dropped half-way.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::app_pool::Lease;
use super::app_streams::Place;
use super::context::Local;
use super::mesh_connection::StreamLease;
use super::record::{Exchange, Tail};
use super::replay::Replay;
use super::stream_body::{Receiving, Sending};

pub(super) type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A request's or response's body.
#[derive(Debug, Default)]
pub(super) struct Body {
    source: Source,
    watch: Watch,
    held: Held,
}

#[derive(Debug, Default)]
enum Source {
    #[default]
    Empty,
    Full(Bytes),
    Incoming(Incoming),
    /// From another agent, or an application that speaks HTTP/2.
    Receiving(Box<Receiving>),
    Replay(Replay),
    /// A response that the inbound pipeline of the same agent gave.
    Nested(Box<Nested>),
    Timed(Timed),
}

struct Nested {
    body: Body,
    released: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Nested {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.released.as_mut().poll(cx).is_ready() {
            self.body = Body::default();
            return Poll::Ready(Some(Err("the workload that answered is gone".into())));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }
}

impl std::fmt::Debug for Nested {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.body.fmt(f)
    }
}

/// A body with a deadline. A reader that stopped reading is not polled any more: a task of its own looks at the
/// time.
#[derive(Debug)]
struct Timed {
    rest: Arc<Mutex<Rest>>,
    clock: JoinHandle<()>,
}

#[derive(Debug)]
struct Rest {
    /// `None` once the time is over.
    body: Option<Body>,
    reader: Option<Waker>,
}

impl Timed {
    fn new(body: Body, deadline: Instant) -> Self {
        let rest = Arc::new(Mutex::new(Rest {
            body: Some(body),
            reader: None,
        }));
        let timed = Arc::clone(&rest);
        let clock = tokio::spawn(async move {
            tokio::time::sleep_until(deadline).await;
            let (body, reader) = {
                let mut rest = lock(&timed);
                (rest.body.take(), rest.reader.take())
            };
            if let Some(body) = body {
                body.expire();
            }
            if let Some(reader) = reader {
                reader.wake();
            }
        });
        Self { rest, clock }
    }

    fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut rest = lock(&self.rest);
        let Some(body) = &mut rest.body else {
            return Poll::Ready(Some(Err("the request's time is over".into())));
        };
        let polled = Pin::new(body).poll_frame(cx);
        if polled.is_pending() {
            rest.reader = Some(cx.waker().clone());
        }
        polled
    }

    fn look<T>(&self, at: impl FnOnce(&Body) -> T) -> Option<T> {
        lock(&self.rest).body.as_ref().map(at)
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        self.clock.abort();
    }
}

fn lock(rest: &Mutex<Rest>) -> MutexGuard<'_, Rest> {
    rest.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
enum Watch {
    #[default]
    Nobody,
    /// Counts a request's bytes, for each of the (at most two) sides that this agent is of it.
    Request(Arc<Exchange>, Option<Arc<Exchange>>),
    /// Measures a response to its end.
    Response(Box<Tail>),
}

/// What a response holds until it ends.
#[derive(Debug, Default)]
pub(super) enum Held {
    #[default]
    Nothing,
    /// A connection to an application, given back at a clean end.
    App(Box<Lease>),
    /// A stream's place on a connection to an application, and the sending of its request.
    Place(
        #[expect(dead_code, reason = "held for its Drop")] Place,
        #[expect(dead_code, reason = "held for its Drop")] Option<Sending>,
    ),
    /// A stream's place on a pooled mTLS connection, and the sending of its request.
    Mesh(
        StreamLease,
        #[expect(dead_code, reason = "held for its Drop")] Option<Sending>,
    ),
}

impl Body {
    pub(super) fn full(bytes: impl Into<Bytes>) -> Self {
        Self::of(Source::Full(bytes.into()))
    }

    pub(super) fn incoming(body: Incoming) -> Self {
        Self::of(Source::Incoming(body))
    }

    pub(super) fn receiving(body: Receiving) -> Self {
        Self::of(Source::Receiving(Box::new(body)))
    }

    pub(super) fn replay(body: Replay) -> Self {
        Self::of(Source::Replay(body))
    }

    /// `body` comes from `from`, a workload of this node, and breaks off when that is released.
    pub(super) fn nested(body: Self, from: Arc<Local>) -> Self {
        Self::of(Source::Nested(Box::new(Nested {
            body,
            released: Box::pin(async move { from.released().await }),
        })))
    }

    /// Counts a request's bytes for `exchange` too.
    pub(super) fn count(&mut self, exchange: Arc<Exchange>) {
        self.watch = match std::mem::take(&mut self.watch) {
            Watch::Request(before, _) => Watch::Request(exchange, Some(before)),
            _ => Watch::Request(exchange, None),
        };
    }

    pub(super) fn measured(mut self, tail: Box<Tail>) -> Self {
        self.watch = Watch::Response(tail);
        self
    }

    /// Breaks off at `deadline`, also when nobody reads it then.
    pub(super) fn until(self, deadline: Instant) -> Self {
        if self.is_end_stream() {
            return self;
        }
        Self::of(Source::Timed(Timed::new(self, deadline)))
    }

    /// Records that the time is over, and lets go of everything.
    fn expire(mut self) {
        if let Watch::Response(tail) = &mut self.watch {
            tail.expire();
        }
    }

    pub(super) fn holding(mut self, held: Held) -> Self {
        self.held = held;
        self
    }

    fn of(source: Source) -> Self {
        Self {
            source,
            watch: Watch::Nobody,
            held: Held::Nothing,
        }
    }

    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.source {
            Source::Empty => Poll::Ready(None),
            Source::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                self.source = Source::Empty;
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Source::Incoming(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Source::Receiving(body) => body.poll_frame(cx),
            Source::Replay(body) => body.poll_frame(cx),
            Source::Nested(nested) => nested.poll_frame(cx),
            Source::Timed(timed) => timed.poll_frame(cx),
        }
    }

    fn ended(&mut self) {
        if let Watch::Response(mut tail) = std::mem::take(&mut self.watch) {
            tail.finish();
        }
        if let Held::App(lease) = std::mem::take(&mut self.held) {
            (*lease).give_back();
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = std::task::ready!(self.poll_source(cx));
        match (&frame, &mut self.watch) {
            (Some(Ok(frame)), Watch::Request(one, other)) => {
                if let Some(data) = frame.data_ref() {
                    for exchange in other.iter().chain([&*one]) {
                        exchange
                            .request_bytes
                            .fetch_add(data.len() as u64, Ordering::Relaxed);
                    }
                }
            }
            (Some(Ok(frame)), Watch::Response(tail)) => tail.passed(frame),
            (Some(Err(_)), Watch::Response(tail)) => tail.broke(),
            _ => {}
        }
        if let (Some(Ok(frame)), Held::Mesh(lease, _)) = (&frame, &mut self.held)
            && let Some(data) = frame.data_ref()
        {
            lease.load().add(data.len());
        }
        let last = match &frame {
            None => true,
            // Nobody asks for more after trailers.
            Some(Ok(frame)) => frame.is_trailers() || self.is_end_stream(),
            Some(Err(_)) => {
                self.held = Held::Nothing;
                false
            }
        };
        if last {
            self.ended();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Empty => true,
            Source::Full(bytes) => bytes.is_empty(),
            Source::Incoming(body) => body.is_end_stream(),
            Source::Receiving(body) => body.is_end_stream(),
            Source::Replay(body) => body.is_end_stream(),
            Source::Nested(nested) => nested.body.is_end_stream(),
            Source::Timed(timed) => timed.look(Self::is_end_stream).unwrap_or(false),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Incoming(body) => body.size_hint(),
            Source::Receiving(body) => body.size_hint(),
            Source::Replay(body) => body.size_hint(),
            Source::Nested(nested) => nested.body.size_hint(),
            Source::Timed(timed) => timed.look(Self::size_hint).unwrap_or_default(),
        }
    }
}

impl Drop for Body {
    /// A body that is never polled because it is empty has ended all the same.
    fn drop(&mut self) {
        let complete = match &self.source {
            Source::Receiving(body) => body.is_complete(),
            _ => self.is_end_stream(),
        };
        if complete {
            self.ended();
        }
    }
}
