//! What can go wrong between an application and its peer, and what the client gets.
//!
//! Invariant: one exhaustive match maps every kind to a status and a response flag; nothing is looked up by text.

use std::fmt;

use http::StatusCode;

use crate::metrics::Flag;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A request or connection that did not succeed.
#[derive(Debug)]
pub(super) struct Error {
    pub(super) kind: Kind,
    cause: Option<Cause>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The client sent what no proxy may pass on.
    BadRequest,
    /// The client went away or broke its stream.
    DownstreamReset,
    /// No rule of the route matches.
    NoRoute,
    /// The route's backend does not exist.
    NoBackend,
    /// The service has no ready endpoint.
    NoEndpoint,
    /// The endpoint could not be connected to.
    Connect,
    /// The TLS peer is not the workload that should be at that address.
    PeerIdentity,
    /// The peer refused the stream before processing anything.
    RefusedStream,
    /// The upstream connection ended before an answer.
    Reset,
    /// The upstream's answer is not HTTP.
    BadResponse,
    /// One try took longer than it may.
    PerTryTimeout,
    /// The request took longer than it may.
    RequestTimeout,
    /// Policy forbids it.
    Denied,
    /// A named bound was reached.
    Overload,
    /// Ours to mend.
    Internal,
}

impl Error {
    pub(super) fn new(kind: Kind, cause: impl Into<Cause>) -> Self {
        Self {
            kind,
            cause: Some(cause.into()),
        }
    }

    /// What the client gets, and the flag in metrics and logs (Envoy's statuses and flags).
    pub(super) fn answer(&self) -> (StatusCode, Flag) {
        match self.kind {
            Kind::BadRequest => (StatusCode::BAD_REQUEST, Flag::DownstreamProtocol),
            Kind::DownstreamReset => (StatusCode::BAD_REQUEST, Flag::DownstreamReset),
            Kind::NoRoute => (StatusCode::NOT_FOUND, Flag::NoRoute),
            Kind::NoBackend => (StatusCode::INTERNAL_SERVER_ERROR, Flag::NoCluster),
            Kind::NoEndpoint => (StatusCode::SERVICE_UNAVAILABLE, Flag::NoHealthyUpstream),
            Kind::Connect => (StatusCode::SERVICE_UNAVAILABLE, Flag::UpstreamConnectFailure),
            Kind::PeerIdentity => (StatusCode::SERVICE_UNAVAILABLE, Flag::TlsFailure),
            Kind::RefusedStream | Kind::Reset => (StatusCode::SERVICE_UNAVAILABLE, Flag::UpstreamReset),
            Kind::BadResponse => (StatusCode::BAD_GATEWAY, Flag::UpstreamProtocol),
            Kind::PerTryTimeout | Kind::RequestTimeout => {
                (StatusCode::GATEWAY_TIMEOUT, Flag::UpstreamTimeout)
            }
            Kind::Denied => (StatusCode::FORBIDDEN, Flag::Denied),
            Kind::Overload => (StatusCode::SERVICE_UNAVAILABLE, Flag::UpstreamOverflow),
            Kind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, Flag::LocalReset),
        }
    }
}

impl From<Kind> for Error {
    fn from(kind: Kind) -> Self {
        Self { kind, cause: None }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            Kind::BadRequest => "malformed request",
            Kind::DownstreamReset => "the client went away",
            Kind::NoRoute => "no route matches",
            Kind::NoBackend => "the route's backend does not exist",
            Kind::NoEndpoint => "no ready endpoint",
            Kind::Connect => "upstream connect failed",
            Kind::PeerIdentity => "the peer is not the workload expected there",
            Kind::RefusedStream => "upstream refused the stream",
            Kind::Reset => "upstream reset before an answer",
            Kind::BadResponse => "malformed upstream response",
            Kind::PerTryTimeout => "upstream try timed out",
            Kind::RequestTimeout => "request timed out",
            Kind::Denied => "denied by policy",
            Kind::Overload => "a limit of the agent was reached",
            Kind::Internal => "internal error",
        })?;
        match &self.cause {
            Some(cause) => write!(f, ": {cause}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}
