//! What the proxy adds to, takes from and trusts in a message's headers.
//!
//! Invariants: nothing an application sends can pass for what an agent says (`mesh-agent-*`, XFCC are ours);
//! hop-by-hop fields end here (RFC 9110, section 7.6.1); `x-forwarded-for` and `traceparent` are left as they
//! are, as Envoy does in a mesh (`use_remote_address: false`), and `x-request-id` is made when it is missing.

use std::net::SocketAddr;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{Method, Version, request};

use super::error::{Error, Kind};

/// Where a request between agents goes: the port, on the address that the connection between them goes to.
pub(super) const DESTINATION: HeaderName = HeaderName::from_static("mesh-agent-destination");
/// The client's port, on the address that the connection comes from, where it has that address: the application
/// will see both as its peer's.
pub(super) const CLIENT: HeaderName = HeaderName::from_static("mesh-agent-client");
/// The HTTP version that the application is to be spoken to in, where that is not 1.1.
pub(super) const VERSION: HeaderName = HeaderName::from_static("mesh-agent-version");

/// The service that the client dialled, `namespace/name`; several may have the destination as an endpoint.
pub(super) const SERVICE: HeaderName = HeaderName::from_static("mesh-agent-service");
/// The longest key of a service: two DNS labels.
pub(super) const MAX_SERVICE: usize = 63 + 1 + 63;

/// What begins so is an agent's word.
const OURS: &str = "mesh-agent-";
const XFCC: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Fields that `Connection` may name although they are end-to-end: naming them must not strip them (a client
/// could otherwise make the next hop see a request without its credentials).
const NEVER_HOP_BY_HOP: [HeaderName; 6] = [
    header::AUTHORIZATION,
    header::COOKIE,
    header::HOST,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    REQUEST_ID,
];

/// Makes an application's request fit to be passed on. `fallback` names the destination when the client
/// (HTTP/1.0) did not.
pub(super) fn from_application(parts: &mut request::Parts, fallback: SocketAddr) -> Result<(), Error> {
    if parts.method == Method::CONNECT {
        return Err(Error::new(Kind::BadRequest, "CONNECT is not for a service"));
    }
    let trailers = wants_trailers(&parts.headers);
    strip_named(&mut parts.headers);
    // hyper answers `100-continue` itself when the body is first read, as Envoy does.
    let ends = |name: &str| ends_here(name) || name.starts_with(OURS) || name == XFCC || name == "expect";
    strip(&mut parts.headers, ends);
    if trailers {
        // Said anew for the next hop, which passes trailers on as we do.
        parts
            .headers
            .insert(header::TE, HeaderValue::from_static("trailers"));
    }
    absolute(parts, fallback)?;
    if !parts.headers.contains_key(REQUEST_ID) {
        parts.headers.insert(REQUEST_ID, request_id());
    }
    if !parts.headers.contains_key(FORWARDED_PROTO) {
        parts
            .headers
            .insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    Ok(())
}

/// Tells the application who its client is, as Envoy's `SANITIZE_SET` does.
pub(super) fn set_client_certificate(headers: &mut HeaderMap, xfcc: Option<&HeaderValue>) {
    match xfcc {
        Some(value) => headers.insert(XFCC, value.clone()),
        None => headers.remove(XFCC),
    };
}

/// What another agent said is for this one alone.
pub(super) fn strip_ours(headers: &mut HeaderMap) {
    strip(headers, |name| name.starts_with(OURS));
}

/// Makes an application's response fit to be passed on.
pub(super) fn from_server(headers: &mut HeaderMap) {
    strip_named(headers);
    strip(headers, |name| ends_here(name) || name.starts_with(OURS));
}

/// Hop-by-hop whether `Connection` names it or not.
fn ends_here(name: &str) -> bool {
    matches!(
        name,
        "keep-alive" | "proxy-connection" | "http2-settings" | "transfer-encoding" | "upgrade" | "te"
    )
}

/// Removes `Connection`, and what it names.
fn strip_named(headers: &mut HeaderMap) {
    let lines = headers.get_all(header::CONNECTION).iter();
    let names = lines.flat_map(|line| line.to_str().unwrap_or_default().split(','));
    let named: Vec<HeaderName> = names
        .map(str::trim)
        .filter(|name| !name.eq_ignore_ascii_case("keep-alive"))
        .filter_map(|name| HeaderName::try_from(name).ok())
        .filter(|name| !NEVER_HOP_BY_HOP.contains(name))
        .collect();
    headers.remove(header::CONNECTION);
    for name in named {
        headers.remove(name);
    }
}

/// Removes the fields of these names: one look at each field is cheaper than a search for each name.
fn strip(headers: &mut HeaderMap, is: impl Fn(&str) -> bool) {
    let named: Vec<HeaderName> = headers.keys().filter(|name| is(name.as_str())).cloned().collect();
    for name in named {
        headers.remove(name);
    }
}

/// `TE: trailers`, whatever else it lists (RFC 9110, section 10.1.4).
fn wants_trailers(headers: &HeaderMap) -> bool {
    headers.get_all(header::TE).iter().any(|te| {
        te.to_str().is_ok_and(|te| {
            te.split(',')
                .any(|coding| coding.trim().eq_ignore_ascii_case("trailers"))
        })
    })
}

/// The protocol that the client asks to switch to, if it does (RFC 9110, section 7.8).
pub(super) fn upgrade(parts: &request::Parts) -> Option<HeaderValue> {
    let asks = parts.version == Version::HTTP_11
        && parts.headers.get_all(header::CONNECTION).iter().any(|value| {
            value
                .to_str()
                .is_ok_and(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case("upgrade")))
        });
    if !asks {
        return None;
    }
    let offers = parts
        .headers
        .get_all(header::UPGRADE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let mut offers = offers
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|offer| !offer.is_empty());
    // `h2c` is not an upgrade to pass on: what follows it would be routed by nobody. A client that is answered 200
    // stays with HTTP/1.1 (RFC 9113, section 3.1).
    let offer = offers.next()?;
    let one = offers.next().is_none();
    let h2c = offer.len() >= 3 && offer.as_bytes()[..3].eq_ignore_ascii_case(b"h2c");
    (one && !h2c).then(|| HeaderValue::from_str(offer).ok())?
}

/// The form an HTTP/1.1 origin server reads: a path, and `Host`.
pub(super) fn origin_form(parts: &mut request::Parts) {
    if let Some(authority) = parts.uri.authority()
        && let Ok(host) = HeaderValue::from_str(authority.as_str())
    {
        parts.headers.insert(header::HOST, host);
    }
    join_cookies(&mut parts.headers);
    let path = parts
        .uri
        .path_and_query()
        .cloned()
        .unwrap_or_else(|| PathAndQuery::from_static("/"));
    if parts.headers.contains_key(header::TE) {
        parts
            .headers
            .insert(header::CONNECTION, HeaderValue::from_static("te"));
    }
    parts.uri = if parts.method == Method::OPTIONS && path.as_str() == "*" {
        Uri::from_static("*")
    } else {
        Uri::from(path)
    };
    parts.version = Version::HTTP_11;
}

/// HTTP/2 clients may send their cookies apart; HTTP/1.1 has one line (RFC 9113, section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let mut cookies = headers.get_all(header::COOKIE).iter();
    if cookies.next().is_none() || cookies.next().is_none() {
        return;
    }
    let lines: Vec<&[u8]> = headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if let Ok(joined) = HeaderValue::from_bytes(&lines.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

/// The form that routing reads and HTTP/2 sends: scheme, authority, path.
fn absolute(parts: &mut request::Parts, fallback: SocketAddr) -> Result<(), Error> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts
        .next()
        .map(|host| Authority::try_from(host.as_bytes()))
        .transpose();
    let host = host.map_err(|cause| Error::new(Kind::BadRequest, cause))?;
    if hosts.next().is_some() {
        return Err(Error::new(Kind::BadRequest, "more than one Host"));
    }
    let authority = match (parts.uri.authority(), host) {
        // RFC 9112, section 3.2.2: the absolute form wins over Host.
        (Some(authority), _) => authority.clone(),
        (None, Some(host)) => host,
        (None, None) if parts.version == Version::HTTP_10 => {
            Authority::try_from(fallback.to_string()).map_err(|cause| Error::new(Kind::Internal, cause))?
        }
        (None, None) => return Err(Error::new(Kind::BadRequest, "no Host")),
    };
    if authority.as_str().contains('@') {
        return Err(Error::new(Kind::BadRequest, "user information in Host"));
    }
    parts.headers.remove(header::HOST);
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = Some(authority);
    if uri.path_and_query.is_none() {
        uri.path_and_query = Some(PathAndQuery::from_static("/"));
    }
    parts.uri = Uri::from_parts(uri).map_err(|cause| Error::new(Kind::BadRequest, cause))?;
    Ok(())
}

fn request_id() -> HeaderValue {
    let mut buffer = uuid::Uuid::encode_buffer();
    let id = uuid::Uuid::new_v4().hyphenated().encode_lower(&mut buffer);
    // A UUID is ASCII, so this cannot fail; an empty value would still be valid.
    HeaderValue::from_str(id).unwrap_or_else(|_| HeaderValue::from_static(""))
}
