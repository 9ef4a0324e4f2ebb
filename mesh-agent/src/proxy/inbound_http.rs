//! The inbound pipeline for one request: admit, measure, deliver to the application.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use http::header::{self, HeaderMap};
use http::{Request, Response, Version, request};
use http_body::Body as _;
use hyper::body::Incoming;

use super::app_pool::AppKey;
use super::body::Body;
use super::context::Local;
use super::error::Error;
use super::inbound::{self, Caller};
use super::message::Message;
use super::record::{Exchange, LogLine, Outcome, Tail};
use super::recorders::Exchanging;
use super::{Proxy, headers, reply, upgrade, upstream};
use crate::metrics::Flag;
use crate::model::{Identity, Protocol};
use crate::route;

/// A request that arrived on a stream of its own: by a clear-text client, or through a tunnel.
pub(super) async fn accept(
    proxy: &Arc<Proxy>,
    dest: &Arc<Local>,
    caller: &Caller,
    to: SocketAddr,
    request: Request<Incoming>,
) -> Response<Body> {
    let (mut parts, body) = request.into_parts();
    let audience = reply::Audience::of(&parts);
    let switch = headers::upgrade(&parts);
    let http2 = speaks_http2(proxy.store.load().target_protocol(to), &parts);
    let fit = headers::from_application(&mut parts, to).and_then(|()| canonical(&mut parts));
    if let Err(error) = fit {
        return Measured::begin(proxy, dest, caller, to, &parts).end(to, Err(error), audience);
    }
    match switch {
        Some(protocol) => {
            let switching = (parts, body, protocol);
            Box::pin(upgrade::inbound(proxy, dest, caller, to, switching, None)).await
        }
        None => {
            let message = Message::new(parts, Body::incoming(body), http2);
            deliver(proxy, dest, caller, to, message).await
        }
    }
}

/// Whether the application is spoken to in HTTP/2: what its port says, else what the client speaks. A port that
/// says plain HTTP gets HTTP/1.1, as in Istio, but for gRPC, which there is none of without HTTP/2.
pub(super) fn speaks_http2(protocol: Protocol, parts: &request::Parts) -> bool {
    match protocol {
        Protocol::Http2 | Protocol::Grpc => true,
        Protocol::Http1 => parts.version == Version::HTTP_2 && reply::is_grpc(&parts.headers),
        Protocol::Detect | Protocol::Tls | Protocol::Tcp => parts.version == Version::HTTP_2,
    }
}

/// Brings one path form to routing, policy and application alike.
pub(super) fn canonical(parts: &mut request::Parts) -> Result<(), Error> {
    match route::canonical_path(&parts.uri) {
        Ok(None) => Ok(()),
        Ok(Some(uri)) => {
            parts.uri = uri;
            Ok(())
        }
        Err(cause) => Err(Error::new(super::error::Kind::BadRequest, cause)),
    }
}

/// Delivers a request to the application at `to`. A failure is answered here, and announced to the agent that asked.
pub(super) async fn deliver(
    proxy: &Arc<Proxy>,
    dest: &Arc<Local>,
    caller: &Caller,
    to: SocketAddr,
    mut message: Box<Message>,
) -> Response<Body> {
    let audience = reply::Audience::of(&message.parts);
    let measured = Measured::begin(proxy, dest, caller, to, &message.parts);
    let sent = match inbound::admit(proxy, dest, caller, to.port()) {
        Err(error) => Err(error),
        Ok(()) => {
            headers::set_client_certificate(&mut message.parts.headers, caller.xfcc.as_ref());
            message.body.count(measured.exchange());
            let key = AppKey {
                present: Some(caller.client.ip()),
                to,
                tunnel: None,
            };
            let connect = async || inbound::connect_app(dest, to, caller.client).await;
            upstream::send_app(dest.apps.here(), key, message, connect).await
        }
    };
    measured.end(to, sent, audience)
}

/// One exchange as this side sees it. Dropped before its end, it is recorded as given up.
pub(super) struct Measured(Box<Tail>);

impl Measured {
    pub(super) fn begin(
        proxy: &Proxy,
        dest: &Local,
        caller: &Caller,
        to: SocketAddr,
        parts: &request::Parts,
    ) -> Self {
        let snapshot = proxy.store.glance();
        let key = Exchanging {
            inbound: true,
            one: SocketAddr::new(caller.client.ip(), 0),
            other: Some(to),
            // Whether there is one of that name, with that endpoint, is looked at only when the handle is made.
            service: caller.service.as_ref(),
        };
        let recorder = caller.recorders.get(snapshot.generation, &key, || {
            inbound::with_peers(&snapshot, dest, caller, to, |peers| proxy.metrics().http(peers))
        });
        let line = proxy.access_log.enabled().then(|| {
            let source = snapshot
                .workloads_by_address
                .get(&caller.client.ip().to_canonical());
            let source = source.map(|source| source.uid().into());
            log_line(parts, caller.client, source, caller.identity.clone())
        });
        let identity = caller.identity.as_ref();
        let log = line.is_some().then(|| {
            let outcome = Outcome {
                upstream: None,
                destination: Some(Arc::clone(&dest.uid)),
                identity: identity.map(|_| dest.workload().identity.clone()),
                route: None,
                attempts: 1,
            };
            (proxy.access_log.clone(), outcome)
        });
        Self(Tail::new(Exchange::begin(line), recorder, log, "inbound"))
    }

    pub(super) fn exchange(&self) -> Arc<Exchange> {
        Arc::clone(self.0.exchange())
    }

    pub(super) fn end(
        self,
        to: SocketAddr,
        sent: Result<Response<Body>, Error>,
        audience: reply::Audience,
    ) -> Response<Body> {
        let mut tail = self.0;
        match sent {
            Ok(response) => {
                tail.answered_by(to);
                let tail = tail.head(response.status(), response.headers(), Flag::None);
                response.map(|body| body.measured(tail))
            }
            Err(error) => {
                tracing::debug!(%error, %to, "cannot deliver a request");
                let response = reply::error(&error, audience);
                let mut tail = tail.head(response.status(), response.headers(), error.answer().1);
                // Known to its end; whether the answer is sent, or another try made, is up to who asked.
                tail.sends(response.body().size_hint().exact().unwrap_or_default());
                tail.finish();
                response
            }
        }
    }
}

/// What the access log says of a request's head.
pub(super) fn log_line(
    parts: &request::Parts,
    client: SocketAddr,
    source: Option<Arc<str>>,
    source_identity: Option<Identity>,
) -> Box<LogLine> {
    let text = |name: &str| field(&parts.headers, name);
    Box::new(LogLine {
        at: SystemTime::now(),
        method: parts.method.to_string(),
        authority: parts
            .uri
            .authority()
            .map_or_else(|| text(header::HOST.as_str()), ToString::to_string),
        path: parts
            .uri
            .path_and_query()
            .map_or_else(String::new, ToString::to_string),
        protocol: match parts.version {
            Version::HTTP_10 => "HTTP/1.0",
            Version::HTTP_2 => "HTTP/2",
            _ => "HTTP/1.1",
        },
        request_id: text("x-request-id"),
        client,
        source,
        source_identity,
    })
}

fn field(headers: &HeaderMap, name: &str) -> String {
    headers.get(name).map_or_else(String::new, |value| {
        String::from_utf8_lossy(value.as_bytes()).into_owned()
    })
}
