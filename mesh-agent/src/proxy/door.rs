//! What another agent may ask over its mTLS connection: requests as they are, and byte streams (HBONE `CONNECT`).
//!
//! Invariants: only the workload's own addresses can be asked for; the other agent may tell its client's port, not
//! another address; every request is measured, also one that is refused.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderName, Method, Request, Response};

use super::body::Body;
use super::context::{Direction, Life, Local};
use super::detect::Prefixed;
use super::error::{Error, Kind};
use super::inbound::{Caller, Pipeline, admit, connect_app};
use super::inbound_http::Measured;
use super::mesh_stream::{Duplex, Receiving};
use super::stream::Stream;
use super::{Proxy, headers, inbound_http, mesh_serve, reply};
use crate::model::{Protocol, ServiceKey};

/// One mTLS connection from another agent.
pub(super) struct Door {
    proxy: Arc<Proxy>,
    local: Arc<Local>,
    /// Its client is the other agent; each request and stream names its own.
    caller: Caller,
}

impl Door {
    pub(super) fn new(proxy: Arc<Proxy>, local: Arc<Local>, caller: Caller) -> Arc<Self> {
        Arc::new(Self { proxy, local, caller })
    }

    pub(super) async fn handle(self: Arc<Self>, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        if request.method() == Method::CONNECT {
            // Boxed, as all that is rare: the task of each request would else hold its room.
            return Box::pin(self.byte_stream(request, respond)).await;
        }
        let (parts, stream) = request.into_parts();
        let body = match stream.is_end_stream() {
            true => Body::default(),
            false => Body::receiving(Receiving::new(&parts.headers, stream)),
        };
        let answering = pin!(self.request(Request::from_parts(parts, body)));
        mesh_serve::answer(respond, answering).await;
    }

    /// A native request.
    async fn request(&self, request: Request<Body>) -> Response<Body> {
        let (mut parts, body) = request.into_parts();
        let caller = self.caller(&parts.headers);
        let http2 = parts
            .headers
            .get(headers::VERSION)
            .is_some_and(|version| version == "2");
        let to = address(&parts.headers, &headers::DESTINATION).and_then(|to| self.own(to));
        headers::strip_ours(&mut parts.headers);
        let fit = to.and_then(|to| inbound_http::canonical(&mut parts).map(|()| to));
        match fit {
            Ok(to) => {
                let request = Request::from_parts(parts, body);
                inbound_http::deliver(&self.proxy, &self.local, &caller, to, (request, http2)).await
            }
            Err(error) => {
                let to = self.caller.life.connection().destination;
                let audience = reply::Audience::of(&parts);
                Measured::begin(&self.proxy, &self.local, &caller, to, &parts).end(to, Err(error), audience)
            }
        }
    }

    /// An HBONE stream. The answer waits for the application where its protocol is not HTTP, so that the other
    /// agent learns of a failure while it can still go elsewhere.
    async fn byte_stream(&self, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        let opened = {
            let opening = pin!(self.open(&request));
            mesh_serve::unless_reset(&mut respond, opening).await
        };
        let (pipeline, app) = match opened {
            Some(Ok(opened)) => opened,
            Some(Err(error)) => {
                let refusal = reply::error(&error, reply::Audience::Http);
                return mesh_serve::answer(respond, pin!(std::future::ready(refusal))).await;
            }
            None => return,
        };
        let Ok(send) = respond.send_response(Response::new(()), false) else {
            return;
        };
        let stream = Stream::tunnel(Duplex::new(send, request.into_body()), None);
        let life = Arc::clone(&pipeline.caller.life);
        tokio::select! {
            () = pipeline.stream(Prefixed::new(stream), app) => {}
            () = life.cut() => {}
        }
    }

    /// Where an HBONE stream goes, and the application's side of it where that is opened first.
    async fn open(&self, request: &Request<RecvStream>) -> Result<(Pipeline, Option<Stream>), Error> {
        let to = request
            .uri()
            .authority()
            .and_then(|authority| authority.as_str().parse().ok());
        let to = self.own(to.ok_or_else(|| Error::new(Kind::BadRequest, "CONNECT needs ip:port"))?)?;
        let mut caller = self.caller(request.headers());
        admit(&self.proxy, &self.local, &caller, to.port())?;
        let app = match self.proxy.store.load().target_protocol(to) {
            Protocol::Http1 | Protocol::Http2 | Protocol::Grpc => None,
            Protocol::Detect | Protocol::Tls | Protocol::Tcp => {
                Some(connect_app(&self.local, to, caller.client).await?)
            }
        };
        let connections = &self.proxy.connections;
        caller.life = Arc::new(Life {
            listed: connections.open(Direction::Inbound, &self.local, caller.client, to),
            drain: self.caller.life.drain.clone(),
        });
        if let Some(identity) = &self.caller.identity {
            let _ = caller.life.connection().peer_identity.set(identity.to_string());
        }
        let pipeline = Pipeline {
            proxy: Arc::clone(&self.proxy),
            local: Arc::clone(&self.local),
            caller,
            to,
        };
        Ok((pipeline, app))
    }

    fn caller(&self, headers: &HeaderMap) -> Caller {
        // The other agent connects from its workload's own address, so it may tell the client's port but not
        // another address. Agents of other projects tell neither.
        let client = address(headers, &headers::CLIENT)
            .ok()
            .filter(|client| client.ip().to_canonical() == self.caller.client.ip().to_canonical())
            .unwrap_or(self.caller.client);
        let service = headers.get(headers::SERVICE).and_then(|key| key.to_str().ok());
        let service = service.and_then(|key| key.split_once('/'));
        Caller {
            client,
            service: service.map(|(namespace, name)| ServiceKey {
                namespace: namespace.into(),
                name: name.into(),
            }),
            ..self.caller.clone()
        }
    }

    /// Only the workload's own addresses may be asked for.
    fn own(&self, to: SocketAddr) -> Result<SocketAddr, Error> {
        if self.local.workload().addresses.contains(&to.ip().to_canonical()) {
            Ok(to)
        } else {
            Err(Error::new(
                Kind::BadRequest,
                format!("{to} is not an address of {}", self.local.uid),
            ))
        }
    }
}

fn address(headers: &HeaderMap, name: &HeaderName) -> Result<SocketAddr, Error> {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| Error::new(Kind::BadRequest, format!("{name} is missing or not ip:port")))
}
