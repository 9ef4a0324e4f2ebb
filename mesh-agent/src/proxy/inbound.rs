//! The ways into a workload: mTLS on port 15008 (HBONE streams and native requests) and clear text on any other.
//!
//! Invariants: whatever the way in, a stream goes through [`stream`] and a request through
//! [`inbound_http::deliver`], and both through [`admit`]; an address that is not the workload's own is refused;
//! what could not be delivered is told to the agent that asked, so that it can try elsewhere.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;

use super::body::Body;
use super::context::{Direction, Life, Local};
use super::detect::{Detected, Prefixed};
use super::door::Door;
use super::error::{Error, Kind};
use super::inbound_http;
use super::listener::Accepted;
use super::recorders::Recorders;
use super::session::{First, Spoken};
use super::stream::Stream;
use super::{CONNECT_TIMEOUT, HBONE_PORT, Proxy, failure, mesh_serve, serve, session};
use crate::authz::{self, Verdict};
use crate::metrics::{Peers, Reporter, Security, TcpRecorder};
use crate::model::{Identity, Protocol, Service, ServiceKey, Snapshot};
use crate::sock;
use crate::tls;

/// How long a peer may take over its TLS handshake (Envoy's default is 15 s).
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Who asks.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    /// `None` for clear text.
    pub(super) identity: Option<Identity>,
    pub(super) client: SocketAddr,
    /// `x-forwarded-client-cert` for the application.
    pub(super) xfcc: Option<HeaderValue>,
    pub(super) recorders: Arc<Recorders>,
    /// The service that it says it dialled, as [`ServiceKey::to_header`] tells it.
    pub(super) service: Option<HeaderValue>,
    /// The connection it asks over.
    pub(super) life: Arc<Life>,
}

impl Caller {
    pub(super) fn new(identity: Option<Identity>, client: SocketAddr, dest: &Local, life: Arc<Life>) -> Self {
        let xfcc = identity.as_ref().and_then(|identity| {
            let text = format!("By={};URI={identity}", dest.workload().identity);
            HeaderValue::try_from(text).ok()
        });
        Self {
            identity,
            client,
            xfcc,
            recorders: Arc::default(),
            service: None,
            life,
        }
    }
}

pub(super) async fn serve(proxy: Arc<Proxy>, accepted: Accepted) {
    if accepted.address.port() == HBONE_PORT {
        // Boxed: there are few, and each of the others would hold its room.
        Box::pin(mutual_tls(proxy, accepted)).await;
    } else {
        clear_text(proxy, accepted).await;
    }
}

/// Whether the workload's policy lets `caller` in at `port`.
pub(super) fn admit(proxy: &Proxy, dest: &Local, caller: &Caller, port: u16) -> Result<(), Error> {
    match authz::check(&dest.glance().mtls, port, caller.identity.as_ref()) {
        Verdict::Allow => Ok(()),
        Verdict::Deny(reason) => {
            proxy.metrics().agent().plaintext_refused.inc();
            tracing::info!(client = %caller.client, workload = %dest.uid, port, %reason, "refused");
            Err(Error::new(Kind::Denied, reason.to_string()))
        }
    }
}

/// A connection to the workload's application, which sees `client` as its peer.
pub(super) async fn connect_app(dest: &Local, to: SocketAddr, client: SocketAddr) -> Result<Stream, Error> {
    let connect = sock::connect(&*dest.namespace, to, Some(client));
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect).await;
    let stream = stream.map_err(|cause| Error::new(Kind::Connect, cause))?;
    stream
        .map(Stream::Tcp)
        .map_err(|cause| Error::new(Kind::Connect, cause))
}

/// The recorder of streams into `to`.
pub(super) fn tcp_recorder(
    proxy: &Proxy,
    snapshot: &Snapshot,
    dest: &Local,
    caller: &Caller,
    to: SocketAddr,
) -> TcpRecorder {
    with_peers(snapshot, dest, caller, to, |peers| proxy.metrics().tcp(peers))
}

/// Tells `record` who talks to whom, as the server's side reports it.
pub(super) fn with_peers<R>(
    snapshot: &Snapshot,
    dest: &Local,
    caller: &Caller,
    to: SocketAddr,
    record: impl FnOnce(&Peers<'_>) -> R,
) -> R {
    let workload = dest.workload();
    let source = snapshot
        .workloads_by_address
        .get(&caller.client.ip().to_canonical());
    let service = service(snapshot, caller, to);
    record(&Peers {
        reporter: Reporter::Destination,
        source: source.map(|source| &**source),
        source_identity: caller.identity.as_ref(),
        destination: Some(&workload),
        destination_identity: caller.identity.is_some().then_some(&workload.identity),
        service: service.map(|service| &**service),
        security: if caller.identity.is_some() {
            Security::MutualTls
        } else {
            Security::None
        },
    })
}

/// The service whose endpoint `to` is for `caller`: what it says it dialled, where that is so, else the first.
fn service<'a>(snapshot: &'a Snapshot, caller: &Caller, to: SocketAddr) -> Option<&'a Arc<Service>> {
    let get = |key: &ServiceKey| snapshot.services.get(key);
    let dialled = caller.service.as_ref().and_then(ServiceKey::from_header);
    let dialled = dialled.as_ref().and_then(get);
    dialled
        .filter(|service| service.has_endpoint(to))
        .or_else(|| snapshot.target_service(to))
}

async fn clear_text(proxy: Arc<Proxy>, accepted: Accepted) {
    let Accepted {
        stream: socket,
        peer,
        address,
        local,
        drain,
    } = accepted;
    let life = Arc::new(Life {
        listed: proxy.connections.open(Direction::Inbound, &local, peer, address),
        drain,
    });
    let caller = Caller::new(None, peer, &local, life);
    if admit(&proxy, &local, &caller, address.port()).is_err() {
        Stream::Tcp(socket).reset();
        return;
    }
    let pipeline = Arc::new(Pipeline {
        proxy,
        local,
        caller,
        to: address,
    });
    pipeline.stream(Prefixed::new(Stream::Tcp(socket)), None).await;
}

async fn mutual_tls(proxy: Arc<Proxy>, accepted: Accepted) {
    let Accepted {
        stream: socket,
        peer,
        address,
        local,
        drain,
    } = accepted;
    let parts = &proxy.tls;
    let config = match tls::server_config(&parts.identities, &local.workload().identity, parts.layer) {
        Ok(config) => config,
        Err(error) => {
            tracing::warn!(%error, workload = %local.uid, "no mTLS");
            return;
        }
    };
    let handshake = tls::accept(config, socket);
    // Boxed: no room for it is held once it is done.
    let shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, Box::pin(handshake)).await;
    let (stream, identity) = match shaken
        .map_err(|_late| "it took too long".to_owned())
        .and_then(known)
    {
        Ok(known) => known,
        Err(error) => {
            proxy.metrics().agent().handshake_failures.inc();
            tracing::debug!(%error, %peer, workload = %local.uid, "TLS handshake failed");
            return;
        }
    };
    parts.count(&stream);
    let life = Arc::new(Life {
        listed: proxy.connections.open(Direction::Inbound, &local, peer, address),
        drain: drain.clone(),
    });
    life.speaks("hbone");
    let _ = life.connection().peer_identity.set(identity.to_string());
    let caller = Caller::new(Some(identity), peer, &local, life);
    let door = Door::new(proxy, local, caller);
    let handle = move |request, respond| Arc::clone(&door).handle(request, respond);
    mesh_serve::serve(stream, drain, handle).await;
}

/// A connection whose peer said who it is and what it speaks.
fn known(shaken: io::Result<tls::Session>) -> Result<(tls::Stream, Identity), String> {
    let session = shaken.map_err(|error| error.to_string())?;
    let identity = session.client.ok_or("no identity in the peer's certificate")?;
    if session.transport.is_none() {
        return Err("no protocol was agreed on; the peer has to offer h2 (HBONE) by ALPN".to_owned());
    }
    Ok((session.stream, identity))
}

/// One stream into a workload's port, admitted.
pub(super) struct Pipeline {
    pub(super) proxy: Arc<Proxy>,
    pub(super) local: Arc<Local>,
    pub(super) caller: Caller,
    pub(super) to: SocketAddr,
}

impl Pipeline {
    /// `app` is the application's side, where it is open already.
    pub(super) async fn stream(self: Arc<Self>, mut client: Prefixed<Stream>, app: Option<Stream>) {
        // Each boxed: who is in one of them, and may be for long, holds no room for the others.
        match Box::pin(self.listen(&mut client, app)).await {
            Some(Spoken::Http { http2 }) => Box::pin(self.http(client, http2)).await,
            Some(Spoken::Opaque(app)) => Box::pin(self.opaque(client, app)).await,
            None => {}
        }
    }

    /// What the stream speaks, from its port's protocol and its first bytes. `None`: it is to be closed.
    async fn listen(
        &self,
        client: &mut Prefixed<Stream>,
        app: Option<Stream>,
    ) -> Option<Spoken<Prefixed<Stream>>> {
        let protocol = self.proxy.store.glance().target_protocol(self.to);
        let (dest, to, from) = (Arc::clone(&self.local), self.to, self.caller.client);
        let open = async move {
            match app {
                Some(app) => Ok(app),
                None => connect_app(&dest, to, from).await,
            }
        };
        Some(match protocol {
            Protocol::Http1 | Protocol::Http2 | Protocol::Grpc => {
                let first = session::first_request(client, &self.caller.life.drain).await?;
                // What is not HTTP gets hyper's 400.
                let http2 = first == Detected::Http2;
                Spoken::Http { http2 }
            }
            Protocol::Tls | Protocol::Tcp => Spoken::Opaque(open.await.map(Prefixed::new)),
            Protocol::Detect => {
                let mut open = std::pin::pin!(open);
                match session::first(client, Direction::Inbound, &mut open).await {
                    Ok(First::Client(Detected::Http1)) => Spoken::Http { http2: false },
                    Ok(First::Client(Detected::Http2)) => Spoken::Http { http2: true },
                    Ok(First::Client(Detected::Tls | Detected::Opaque)) => {
                        Spoken::Opaque(open.await.map(Prefixed::new))
                    }
                    Ok(First::Opaque(server)) => Spoken::Opaque(Ok(server)),
                    Err(error) => Spoken::Opaque(Err(error)),
                }
            }
        })
    }

    async fn opaque(self: Arc<Self>, mut client: Prefixed<Stream>, app: Result<Prefixed<Stream>, Error>) {
        self.caller.life.speaks("tcp");
        match app {
            Ok(mut app) => {
                let recorder = {
                    let snapshot = self.proxy.store.glance();
                    tcp_recorder(&self.proxy, &snapshot, &self.local, &self.caller, self.to)
                };
                let connection = self.caller.life.connection();
                session::copy(&mut client, &mut app, connection, vec![recorder]).await;
            }
            Err(error) => {
                tracing::debug!(%error, workload = %self.local.uid, to = %self.to, "cannot deliver a stream");
                client.get_mut().reset();
            }
        }
    }

    async fn http(self: Arc<Self>, client: Prefixed<Stream>, http2: bool) {
        let life = Arc::clone(&self.caller.life);
        life.speaks(if http2 { "http2" } else { "http1" });
        let handle = move |request| Arc::clone(&self).request(request);
        if http2 {
            serve::http2(client, life.drain.clone(), handle).await;
        } else {
            serve::http1(client, life.drain.clone(), handle).await;
        }
    }

    /// A request on a stream that was opened as such: by a clear-text client, or for an upgrade.
    async fn request(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let mut response =
            inbound_http::accept(&self.proxy, &self.local, &self.caller, self.to, request).await;
        response.headers_mut().remove(failure::FAILURE);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::super::room;
    use super::*;

    /// What an idle connection holds, together with its sockets, is to stay below 8 KB.
    #[test]
    fn who_waits_holds_little() {
        assert!(room::of_two(serve) < 1200);
        assert!(room::of_three(Pipeline::stream) < 600);
        assert!(room::of_three(Pipeline::opaque) < 1300);
    }
}
