//! What a failed exchange means: by the HTTP libraries' errors here, by a response header between agents.
//!
//! Invariant: the side that routes learns from the side that delivers what failed before an answer, so that it
//! can decide about another try; an application cannot speak in an agent's name (the header is stripped).

use http::header::{HeaderMap, HeaderName, HeaderValue};

use super::error::{Error, Kind};

/// Says that a response was made by the agent beside the server, and why.
pub(super) const FAILURE: HeaderName = HeaderName::from_static("mesh-agent-failure");

const NAMES: [(Kind, &str); 8] = [
    (Kind::Connect, "connect"),
    (Kind::RefusedStream, "refused-stream"),
    (Kind::Reset, "reset"),
    (Kind::BadResponse, "bad-response"),
    (Kind::Denied, "denied"),
    (Kind::Overload, "overload"),
    (Kind::BadRequest, "bad-request"),
    (Kind::Internal, "internal"),
];

/// For a response that goes to another agent.
pub(super) fn announce(kind: Kind, headers: &mut HeaderMap) {
    if let Some((_, name)) = NAMES.iter().find(|(known, _)| *known == kind) {
        headers.insert(FAILURE, HeaderValue::from_static(name));
    }
}

/// What the agent beside the server says went wrong, if it says so.
pub(super) fn announced(headers: &HeaderMap) -> Option<Kind> {
    let name = headers.get(FAILURE)?.as_bytes();
    let known = NAMES.iter().find(|(_, known)| known.as_bytes() == name);
    Some(known.map_or(Kind::Internal, |(kind, _)| *kind))
}

/// Why a request that was sent over HTTP/1.1 got no response.
pub(super) fn of_http(error: hyper::Error) -> Error {
    let kind = if error.is_user() {
        // The request's body broke off: that is the client's doing.
        Kind::DownstreamReset
    } else if error.is_parse() {
        Kind::BadResponse
    } else {
        Kind::Reset
    };
    Error::new(kind, error)
}

/// The same over HTTP/2.
pub(super) fn of_h2(error: h2::Error) -> Error {
    Error::new(kind_of_h2(&error), error)
}

fn kind_of_h2(error: &h2::Error) -> Kind {
    let leaving = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
    if error.is_remote() && (leaving || error.reason() == Some(h2::Reason::REFUSED_STREAM)) {
        // RFC 9113, sections 6.8 and 8.7: nothing was processed.
        Kind::RefusedStream
    } else if error.is_reset() && !error.is_remote() && error.reason() == Some(h2::Reason::CANCEL) {
        // We gave it up, since the request's body broke off.
        Kind::DownstreamReset
    } else {
        Kind::Reset
    }
}
