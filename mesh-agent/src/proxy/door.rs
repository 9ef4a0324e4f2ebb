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
use super::mesh_stream::Duplex;
use super::message::Message;
use super::stream::Stream;
use super::stream_body::Receiving;
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
        // It holds `self`, and so the connection's life, until the body is sent too.
        Box::pin(async move {
            mesh_serve::answer(respond, async || self.request(message).await).await;
        })
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
        // Both boxed: no room for the one is held in the other.
        let Some((pipeline, client, app)) = Box::pin(self.accept(request, respond)).await else {
            return;
        };
        let life = Arc::clone(&pipeline.caller.life);
        let carrying = Box::pin(pipeline.stream(Prefixed::new(client), app));
        tokio::select! {
            () = carrying => {}
            () = life.cut() => {}
        }
    }

    /// Answers that a stream is open. The answer waits for the application where its protocol is not HTTP, so that the
    /// other agent learns of a failure while it can still go elsewhere.
    async fn accept(
        &self,
        request: Box<Request<RecvStream>>,
        mut respond: SendResponse<Bytes>,
    ) -> Option<(Arc<Pipeline>, Stream, Option<Stream>)> {
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
        let client = Stream::tunnel(Duplex::new(send, request.into_body()), None);
        Some((Arc::new(pipeline), client, app))
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
        let app = match self.proxy.store.glance().target_protocol(to) {
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

#[cfg(test)]
mod tests {
    use super::super::room;
    use super::*;

    /// What an idle connection holds, together with its sockets, is to stay below 8 KB.
    #[test]
    fn who_waits_holds_little() {
        assert!(room::of_three(Door::byte_stream) < 700);
    }
}
