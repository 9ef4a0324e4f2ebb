//! What another agent may ask over its mTLS connection: requests as they are, and byte streams (HBONE `CONNECT`).
//!
//! Invariants: only the workload's own addresses can be asked for; the other agent may tell its client's port, not
//! another address; every request is measured, also one that is refused.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
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
use super::message::Message;
use super::stream::Stream;
use super::{Proxy, headers, inbound_http, mesh_serve, reply};
use crate::model::Protocol;

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

    /// Boxed: tokio moves a task about until it is first polled, and neither kind holds room for the other.
    pub(super) fn handle(
        self: Arc<Self>,
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        if request.method() == Method::CONNECT {
            return Box::pin(self.byte_stream(Box::new(request), respond));
        }
        let message = received(request);
        Box::pin(mesh_serve::answer(respond, async move || {
            self.request(message).await
        }))
    }

    /// A native request.
    async fn request(&self, mut message: Box<Message>) -> Response<Body> {
        let parts = &mut message.parts;
        let caller = self.caller(&parts.headers);
        let to = self.destination(&parts.headers);
        headers::strip_ours(&mut parts.headers);
        match to.and_then(|to| inbound_http::canonical(parts).map(|()| to)) {
            Ok(to) => inbound_http::deliver(&self.proxy, &self.local, &caller, to, message).await,
            Err(error) => {
                let to = self.caller.life.connection().destination;
                let audience = reply::Audience::of(parts);
                Measured::begin(&self.proxy, &self.local, &caller, to, parts).end(to, Err(error), audience)
            }
        }
    }

    /// An HBONE stream.
    async fn byte_stream(self: Arc<Self>, request: Box<Request<RecvStream>>, respond: SendResponse<Bytes>) {
        // Boxed: no room for it is held once it is open.
        let Some((life, carrying)) = Box::pin(self.opened(request, respond)).await else {
            return;
        };
        tokio::select! {
            () = carrying => {}
            () = life.cut() => {}
        }
    }

    /// Opens a stream and answers: what is left is to carry it. The answer waits for the application where its
    /// protocol is not HTTP, so that the other agent learns of a failure while it can still go elsewhere.
    async fn opened(
        &self,
        request: Box<Request<RecvStream>>,
        mut respond: SendResponse<Bytes>,
    ) -> Option<(Arc<Life>, Pin<Box<impl Future<Output = ()> + use<>>>)> {
        let opened = {
            let opening = pin!(self.open(&request));
            mesh_serve::unless_reset(&mut respond, opening).await?
        };
        let (pipeline, app) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let refusal = reply::error(&error, reply::Audience::Http);
                mesh_serve::answer(respond, async || refusal).await;
                return None;
            }
        };
        let send = respond.send_response(Response::new(()), false).ok()?;
        let stream = Stream::tunnel(Duplex::new(send, request.into_body()), None);
        let life = Arc::clone(&pipeline.caller.life);
        let carrying = Arc::new(pipeline).stream(Prefixed::new(stream), app);
        Some((life, Box::pin(carrying)))
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
        // The other agent connects from its workload's own address, and knows the client's port there. Agents of
        // other projects do not tell it.
        let mut client = self.caller.client;
        client.set_port(port(headers, &headers::CLIENT).unwrap_or_else(|| client.port()));
        Caller {
            client,
            service: headers
                .get(headers::SERVICE)
                .filter(|key| key.len() <= headers::MAX_SERVICE)
                .cloned(),
            ..self.caller.clone()
        }
    }

    fn destination(&self, headers: &HeaderMap) -> Result<SocketAddr, Error> {
        let port = port(headers, &headers::DESTINATION).ok_or_else(|| {
            Error::new(
                Kind::BadRequest,
                format!("{} is missing or no port", headers::DESTINATION),
            )
        })?;
        self.own(SocketAddr::new(
            self.caller.life.connection().destination.ip(),
            port,
        ))
    }

    /// Only the workload's own addresses may be asked for.
    fn own(&self, to: SocketAddr) -> Result<SocketAddr, Error> {
        if self.local.glance().addresses.contains(&to.ip().to_canonical()) {
            Ok(to)
        } else {
            Err(Error::new(
                Kind::BadRequest,
                format!("{to} is not an address of {}", self.local.uid),
            ))
        }
    }
}

fn received(request: Request<RecvStream>) -> Box<Message> {
    let (parts, stream) = request.into_parts();
    let http2 = parts
        .headers
        .get(headers::VERSION)
        .is_some_and(|version| version == "2");
    let body = match stream.is_end_stream() {
        true => Body::default(),
        false => Body::receiving(Receiving::new(&parts.headers, stream)),
    };
    Message::new(parts, body, http2)
}

fn port(headers: &HeaderMap, name: &HeaderName) -> Option<u16> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}
