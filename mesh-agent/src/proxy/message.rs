//! A request on its way to an application.
//!
//! Invariant: it is boxed until it is handed to who writes it. The futures that pass it on would else hold room for
//! it one inside the other, kilobytes that are moved whenever such a future is made.

use http::{Request, request};

use super::body::Body;

#[derive(Debug)]
pub(super) struct Message {
    pub(super) parts: request::Parts,
    pub(super) body: Body,
    /// What the application is to be spoken to in.
    pub(super) http2: bool,
}

impl Message {
    pub(super) fn new(parts: request::Parts, body: Body, http2: bool) -> Box<Self> {
        Box::new(Self { parts, body, http2 })
    }

    /// As the HTTP libraries take it.
    pub(super) fn into_request(self: Box<Self>) -> Request<Body> {
        Request::from_parts(self.parts, self.body)
    }

    /// As they give it back.
    pub(super) fn from_request(request: Request<Body>, http2: bool) -> Box<Self> {
        let (parts, body) = request.into_parts();
        Self::new(parts, body, http2)
    }
}
