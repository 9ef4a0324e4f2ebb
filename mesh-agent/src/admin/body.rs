//! Bodies of answers: whole, or made while they are sent.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// Sent at a time; large enough to be worth a system call.
const CHUNK: usize = 64 * 1024;
/// Chunks that wait for a slow reader.
const WAITING: usize = 2;

#[derive(Debug)]
pub(super) enum Content {
    Whole(Option<Bytes>),
    Chunks(Receiver<Bytes>),
}

impl Content {
    /// What `write` writes, on a thread of its own, never more than a few chunks ahead of the reader. When the
    /// reader is gone, writing fails.
    pub(super) fn written(write: impl FnOnce(&mut Chunks) -> fmt::Result + Send + 'static) -> Self {
        let (sender, receiver) = channel(WAITING);
        tokio::task::spawn_blocking(move || {
            let mut chunks = Chunks {
                sender,
                next: String::with_capacity(CHUNK),
            };
            // An error means that nobody reads any more.
            let _ = write(&mut chunks).and_then(|()| chunks.send());
        });
        Self::Chunks(receiver)
    }
}

/// Text on its way to a reader.
#[derive(Debug)]
pub(super) struct Chunks {
    sender: Sender<Bytes>,
    next: String,
}

impl Chunks {
    fn send(&mut self) -> fmt::Result {
        let chunk = std::mem::replace(&mut self.next, String::with_capacity(CHUNK));
        self.sender.blocking_send(chunk.into()).map_err(|_| fmt::Error)
    }
}

impl fmt::Write for Chunks {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if !self.next.is_empty() && self.next.len() + text.len() > CHUNK {
            self.send()?;
        }
        self.next.push_str(text);
        Ok(())
    }
}

impl Body for Content {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let data = match self.get_mut() {
            Self::Whole(whole) => Poll::Ready(whole.take()),
            Self::Chunks(chunks) => chunks.poll_recv(context),
        };
        data.map(|data| data.map(|data| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(Some(whole)) => SizeHint::with_exact(u64::try_from(whole.len()).unwrap_or(u64::MAX)),
            Self::Whole(None) => SizeHint::with_exact(0),
            Self::Chunks(_) => SizeHint::default(),
        }
    }
}
