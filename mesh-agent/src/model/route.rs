//! Routes: which requests go where, after what edits, within what time, and what is tried again.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method};
use regex::Regex;

use super::ServiceKey;

/// One rule of an HTTPRoute, for one service port.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteRule {
    /// `namespace/route` and the rule's name or index, for logs and the admin page.
    pub name: Arc<str>,
    /// One precedence class each: a route's rule with several matches becomes several rules here.
    pub matches: RequestMatch,
    pub edits: HeaderEdits,
    pub backends: Vec<Backend>,
    pub timeouts: Timeouts,
    pub retry: RetryPolicy,
}

pub type HeaderEdits = (HeaderEdit, HeaderEdit);

/// All of it must hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestMatch {
    pub path: PathMatch,
    pub headers: Vec<HeaderMatch>,
    pub query: Vec<QueryMatch>,
    pub method: MethodMatch,
}

#[derive(Clone, Debug, Default)]
pub enum PathMatch {
    #[default]
    Any,
    Exact(Box<str>),
    /// Whole path elements: `/a` matches `/a` and `/a/b`, not `/ab`. Kept without a trailing slash, so
    /// that `/` is the empty string.
    Prefix(Box<str>),
    /// Compiled with anchors at both ends: must match the whole path.
    Regex(Regex),
}

impl PartialEq for PathMatch {
    /// A regular expression is its pattern.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, Self::Any) => true,
            (Self::Exact(a), Self::Exact(b)) | (Self::Prefix(a), Self::Prefix(b)) => a == b,
            (Self::Regex(a), Self::Regex(b)) => a.as_str() == b.as_str(),
            _ => false,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct HeaderMatch {
    pub name: HeaderName,
    pub value: StringMatch,
}

#[derive(Clone, Debug, PartialEq)]
pub struct QueryMatch {
    pub name: Box<str>,
    pub value: StringMatch,
}

#[derive(Clone, Debug)]
pub enum StringMatch {
    Exact(Box<str>),
    /// Compiled with anchors at both ends: must match the whole value.
    Regex(Regex),
}

impl PartialEq for StringMatch {
    /// A regular expression is its pattern.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exact(a), Self::Exact(b)) => a == b,
            (Self::Regex(a), Self::Regex(b)) => a.as_str() == b.as_str(),
            _ => false,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub enum MethodMatch {
    #[default]
    Any,
    Is(Method),
}

/// `RequestHeaderModifier` / `ResponseHeaderModifier`: set, then add, then remove.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeaderEdit {
    pub set: Vec<(HeaderName, HeaderValue)>,
    pub add: Vec<(HeaderName, HeaderValue)>,
    pub remove: Vec<HeaderName>,
}

/// Where a share of the requests goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// `None` for a backendRef that points nowhere: its share of the requests gets 500, as the Gateway API says.
    pub service: Option<(ServiceKey, u16)>,
    pub weight: u32,
    pub edits: HeaderEdits,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// From the request's arrival to the end of the response, all tries included.
    pub request: Option<Duration>,
    /// For each try.
    pub per_try: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries beyond the first.
    pub attempts: u32,
    /// What is tried again, beyond what is always safe.
    pub on: RetryOn,
    /// The base of the exponential backoff with full jitter; the cap is ten times that, as in Envoy.
    pub backoff: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryOn {
    pub connect_failure: bool,
    pub refused_stream: bool,
    /// Reset before response headers, for idempotent methods only.
    pub reset: bool,
    pub codes: Vec<u16>,
}

impl Default for RetryPolicy {
    /// Istio's mesh-wide default: two more tries, 25 ms, connect failures and refused streams; and, for
    /// idempotent methods, connections that died before an answer.
    fn default() -> Self {
        Self {
            attempts: 2,
            on: RetryOn {
                connect_failure: true,
                refused_stream: true,
                reset: true,
                codes: Vec::new(),
            },
            backoff: Duration::from_millis(25),
        }
    }
}
