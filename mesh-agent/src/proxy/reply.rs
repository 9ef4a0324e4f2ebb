//! Responses that the agent makes itself.

use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Response, StatusCode, request};

use super::body::Body;
use super::error::Error;
use super::failure;

/// What kind of client gets the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Audience {
    Http,
    /// A response to HEAD has no body.
    Head,
    /// gRPC clients read a status from a header-only response (gRPC over HTTP/2, "Trailers-Only").
    Grpc,
}

impl Audience {
    pub(super) fn of(parts: &request::Parts) -> Self {
        if is_grpc(&parts.headers) {
            Self::Grpc
        } else if parts.method == Method::HEAD {
            Self::Head
        } else {
            Self::Http
        }
    }
}

pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// The answer to a request that failed with `error`.
pub(super) fn error(error: &Error, audience: Audience) -> Response<Body> {
    let (status, _) = error.answer();
    let mut response = match audience {
        Audience::Head => {
            let mut response = Response::new(Body::default());
            *response.status_mut() = status;
            response
        }
        Audience::Http => {
            // The cause may name addresses; the client gets the kind only.
            let mut response = Response::new(Body::full(Error::from(error.kind).to_string()));
            *response.status_mut() = status;
            response
                .headers_mut()
                .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            response
        }
        Audience::Grpc => {
            let mut response = Response::new(Body::default());
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from_static(grpc_status(status)));
            if let Ok(message) = HeaderValue::from_str(&Error::from(error.kind).to_string()) {
                headers.insert("grpc-message", message);
            }
            response
        }
    };
    failure::announce(error.kind, response.headers_mut());
    response
}

/// As Envoy maps them (gRPC, "HTTP to gRPC Status Code Mapping").
fn grpc_status(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "13",
        401 => "16",
        403 => "7",
        404 => "12",
        429 | 502..=504 => "14",
        _ => "2",
    }
}
