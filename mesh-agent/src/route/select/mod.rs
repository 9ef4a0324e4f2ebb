//! Matching a request's head against the matches of the rules.

use std::borrow::Cow;

use http::header::{COOKIE, HOST};
use http::request::Parts;
use http::{HeaderMap, HeaderName};

use super::path::decode;
use crate::model::{HeaderMatch, MethodMatch, PathMatch, QueryMatch, RequestMatch, RouteRule, StringMatch};

/// The first rule that matches.
pub fn select<'a>(rules: &'a [RouteRule], request: &Parts) -> Option<&'a RouteRule> {
    rules.iter().find(|rule| matches(&rule.matches, request))
}

fn matches(wanted: &RequestMatch, request: &Parts) -> bool {
    method_matches(&wanted.method, request)
        && path_matches(&wanted.path, request.uri.path())
        && wanted
            .headers
            .iter()
            .all(|header| header_matches(header, request))
        && wanted
            .query
            .iter()
            .all(|parameter| query_matches(parameter, request.uri.query()))
}

fn method_matches(wanted: &MethodMatch, request: &Parts) -> bool {
    match wanted {
        MethodMatch::Any => true,
        MethodMatch::Is(method) => *method == request.method,
    }
}

/// On the path as it stands, percent signs and all.
fn path_matches(wanted: &PathMatch, path: &str) -> bool {
    match wanted {
        PathMatch::Any => true,
        PathMatch::Exact(exact) => **exact == *path,
        PathMatch::Prefix(prefix) => path
            .strip_prefix(&**prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
        PathMatch::Regex(regex) => regex.is_match(path),
    }
}

fn header_matches(wanted: &HeaderMatch, request: &Parts) -> bool {
    match header_value(&wanted.name, &request.headers) {
        Some(value) => string_matches(&wanted.value, &value),
        // HTTP/2 and HTTP/3 name the host in the URI.
        None if wanted.name == HOST => request
            .uri
            .authority()
            .is_some_and(|authority| string_matches(&wanted.value, authority.as_str())),
        None => false,
    }
}

/// Several lines of one header are one list (RFC 9110 section 5.3); of a cookie, which HTTP/2 splits freely, one
/// cookie string (RFC 9113 section 8.2.3). A value that is not text matches nothing.
fn header_value<'a>(name: &HeaderName, headers: &'a HeaderMap) -> Option<Cow<'a, str>> {
    let mut lines = headers.get_all(name).iter();
    let first = lines.next()?;
    let first = std::str::from_utf8(first.as_bytes()).ok()?;
    let separator = if name == COOKIE { "; " } else { ", " };
    lines.try_fold(Cow::Borrowed(first), |mut joined, line| {
        let text = joined.to_mut();
        text.push_str(separator);
        text.push_str(std::str::from_utf8(line.as_bytes()).ok()?);
        Some(joined)
    })
}

/// The first value of the parameter counts.
fn query_matches(wanted: &QueryMatch, query: Option<&str>) -> bool {
    query
        .into_iter()
        .flat_map(|query| query.split('&'))
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find(|(name, _)| decoded(name).eq(wanted.name.bytes()))
        .is_some_and(|(_, value)| match &wanted.value {
            StringMatch::Exact(exact) => decoded(value).eq(exact.bytes()),
            StringMatch::Regex(regex) if !value.contains(['%', '+']) => regex.is_match(value),
            StringMatch::Regex(regex) => {
                String::from_utf8(decoded(value).collect()).is_ok_and(|value| regex.is_match(&value))
            }
        })
}

fn string_matches(wanted: &StringMatch, value: &str) -> bool {
    match wanted {
        StringMatch::Exact(exact) => **exact == *value,
        StringMatch::Regex(regex) => regex.is_match(value),
    }
}

/// The bytes of a form-encoded name or value; what is no valid escape stands for itself.
fn decoded(text: &str) -> impl Iterator<Item = u8> {
    let mut rest = text.as_bytes();
    std::iter::from_fn(move || {
        let (&first, after) = rest.split_first()?;
        if first == b'%'
            && let Some(byte) = rest.get(..3).and_then(decode)
        {
            rest = &rest[3..];
            return Some(byte);
        }
        rest = after;
        Some(if first == b'+' { b' ' } else { first })
    })
}

#[cfg(test)]
mod tests;
