//! How an endpoint is reached, and reaching it.
//!
//! Invariant: a workload that the snapshot says is meshed is reached over mTLS or, on the same node, through the
//! same inbound pipeline; never in clear text because something else failed.

use std::net::SocketAddr;
use std::sync::Arc;

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, Version};
use http_body::Body as _;

use super::app_pool::{AppKey, AppPool};
use super::body::Body;
use super::context::{Life, Local};
use super::error::{Error, Kind};
use super::headers;
use super::inbound::{self, Caller};
use super::mesh_connection::PeerRef;
use super::message::Message;
use super::recorders::Recorders;
use super::stream::Stream;
use super::{CONNECT_TIMEOUT, Proxy, failure, inbound_http};
use crate::metrics::Security;
use crate::model::{Endpoint, MtlsMode, Service, Workload};
use crate::sock;

/// How an endpoint is reached.
#[derive(Debug)]
pub(super) enum Way<'a> {
    /// It is on this node: its pipeline is called directly.
    Local(Arc<Local>),
    /// Through the agent beside it.
    Mesh(PeerRef<'a>),
    /// Nobody stands before it.
    Clear,
}

impl<'a> Way<'a> {
    pub(super) fn to(proxy: &Proxy, from: &Local, source: &'a Workload, endpoint: &'a Endpoint) -> Self {
        let Some(workload) = endpoint.workload.as_deref().filter(|workload| workload.meshed) else {
            return Self::Clear;
        };
        if workload.mtls.mode(endpoint.address.port()) == MtlsMode::Disable {
            return Self::Clear;
        }
        // Who is at the address may have changed a moment ago: then it is asked, over mTLS, who it is.
        let is_it = |local: &Arc<Local>| {
            let there = local.workload();
            there.name == workload.name
                && there.namespace == workload.namespace
                && there.identity == workload.identity
        };
        if let Some(local) = proxy.locals.get(endpoint.address.ip()).filter(is_it) {
            return Self::Local(local);
        }
        Self::Mesh(PeerRef {
            source: from.enrolment,
            source_identity: &source.identity,
            peer_identity: &workload.identity,
            address: endpoint.address.ip(),
        })
    }

    pub(super) fn security(&self) -> Security {
        match self {
            Self::Local(_) | Self::Mesh(_) => Security::MutualTls,
            Self::Clear => Security::None,
        }
    }
}

/// One side of an exchange: who asks, from where.
#[derive(Debug)]
pub(super) struct From<'a> {
    pub(super) proxy: &'a Arc<Proxy>,
    pub(super) local: &'a Arc<Local>,
    pub(super) source: &'a Workload,
    /// The client socket's own address.
    pub(super) client: SocketAddr,
    pub(super) recorders: &'a Arc<Recorders>,
    pub(super) life: &'a Arc<Life>,
    /// The service it dialled.
    pub(super) service: Option<&'a Service>,
}

impl From<'_> {
    /// A byte stream to `to`.
    pub(super) async fn stream(&self, way: &Way<'_>, to: SocketAddr) -> Result<Stream, Error> {
        match way {
            Way::Local(dest) => {
                let caller = self.caller(dest);
                inbound::admit(self.proxy, dest, &caller, to.port())?;
                inbound::connect_app(dest, to, caller.client).await
            }
            Way::Mesh(key) => self.tunnel(key, to).await,
            Way::Clear => {
                let connect = sock::connect(&*self.local.namespace, to, None);
                let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect).await;
                let stream = stream.map_err(|cause| Error::new(Kind::Connect, cause))?;
                stream
                    .map(Stream::Tcp)
                    .map_err(|cause| Error::new(Kind::Connect, cause))
            }
        }
    }

    /// One try of one request.
    pub(super) async fn send(
        &self,
        way: &Way<'_>,
        to: SocketAddr,
        message: Box<Message>,
    ) -> Result<Response<Body>, Error> {
        match way {
            Way::Local(dest) => {
                let caller = self.caller(dest);
                let delivering = inbound_http::deliver(self.proxy, dest, &caller, to, message);
                let response = tokio::select! {
                    biased;
                    response = Box::pin(delivering) => response,
                    () = dest.released() => {
                        return Err(Error::new(Kind::Reset, "the workload there is gone"));
                    }
                };
                checked(response).map(|response| response.map(|body| Body::nested(body, Arc::clone(dest))))
            }
            Way::Mesh(key) => self.send_mesh(key, to, message).await,
            Way::Clear => {
                let key = AppKey {
                    present: None,
                    to,
                    tunnel: None,
                };
                let connect = async || self.stream(&Way::Clear, to).await;
                Box::pin(send_app(self.local.apps.here(), key, message, connect)).await
            }
        }
    }

    async fn send_mesh(
        &self,
        key: &PeerRef<'_>,
        to: SocketAddr,
        mut message: Box<Message>,
    ) -> Result<Response<Body>, Error> {
        // A connection that turns out to be closed when used gave the request back: one more may be newer.
        let mut fresh = false;
        loop {
            let lease = self.proxy.mesh.here().stream(key, self.local).await?;
            if !lease.native() {
                drop(lease);
                return Box::pin(self.send_tunnelled(key, to, message)).await;
            }
            self.sign(&mut message, to);
            match lease.send(message).await {
                Ok(response) => return checked(response),
                Err((_, Some(unsent))) if !fresh => {
                    message = unsent;
                    fresh = true;
                }
                Err((error, _)) => return Err(error),
            }
        }
    }

    /// To an agent that takes byte streams only.
    async fn send_tunnelled(
        &self,
        key: &PeerRef<'_>,
        to: SocketAddr,
        mut message: Box<Message>,
    ) -> Result<Response<Body>, Error> {
        // Of a try over a connection to one of our agents, which was there a moment ago.
        headers::strip_ours(&mut message.parts.headers);
        let tunnel = (key.source_identity.clone(), key.peer_identity.clone());
        let app = AppKey {
            present: None,
            to,
            tunnel: Some(Box::new(tunnel)),
        };
        let connect = async || self.tunnel(key, to).await;
        send_app(self.local.apps.here(), app, message, connect).await
    }

    /// Says to the agent beside the server what it cannot see.
    fn sign(&self, message: &mut Message, to: SocketAddr) {
        let headers = &mut message.parts.headers;
        headers.insert(headers::DESTINATION, to.port().into());
        if message.http2 {
            headers.insert(headers::VERSION, HeaderValue::from_static("2"));
        }
        self.name_client(headers, to);
        if let Some(id) = headers.get_mut(headers::REQUEST_ID) {
            // Few requests share one, so that the connection's table of fields need not have it.
            id.set_sensitive(true);
        }
        message.parts.version = Version::HTTP_2;
    }

    fn name_client(&self, headers: &mut HeaderMap, to: SocketAddr) {
        // The connection leaves from the workload's address of the endpoint's family; the client may have dialled
        // by the other.
        if self.client.is_ipv4() == to.is_ipv4() {
            headers.insert(headers::CLIENT, self.client.port().into());
        }
        if let Some(service) = self.service {
            headers.insert(headers::SERVICE, service.header.clone());
        }
    }

    /// An HBONE stream.
    async fn tunnel(&self, key: &PeerRef<'_>, to: SocketAddr) -> Result<Stream, Error> {
        let lease = self.proxy.mesh.here().stream(key, self.local).await?;
        let authority = Uri::try_from(to.to_string()).map_err(|cause| Error::new(Kind::Internal, cause))?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = authority;
        *request.version_mut() = Version::HTTP_2;
        self.name_client(request.headers_mut(), to);
        let opened = tokio::time::timeout(CONNECT_TIMEOUT, lease.open(request)).await;
        let opened = opened.map_err(|cause| Error::new(Kind::Connect, cause))?;
        let (response, stream) = opened.map_err(|error| Error::new(Kind::Connect, error))?;
        if let Some(kind) = failure::announced(response.headers()) {
            return Err(kind.into());
        }
        if !response.status().is_success() {
            return Err(Error::new(
                Kind::Connect,
                format!("the peer's agent answered {}", response.status()),
            ));
        }
        Ok(Stream::tunnel(stream, Some(lease)))
    }

    pub(super) fn caller(&self, dest: &Local) -> Caller {
        let caller = Caller::new(
            Some(self.source.identity.clone()),
            self.client,
            dest,
            Arc::clone(self.life),
        );
        Caller {
            recorders: Arc::clone(self.recorders),
            service: self.service.map(|service| service.header.clone()),
            ..caller
        }
    }
}

/// Sends a request over a connection to an application.
pub(super) async fn send_app(
    pool: &AppPool,
    key: AppKey,
    mut message: Box<Message>,
    connect: impl AsyncFnOnce() -> Result<Stream, Error>,
) -> Result<Response<Body>, Error> {
    let mut response = if message.http2 {
        message.parts.version = Version::HTTP_2;
        let sending = pool.send_http2(key, message, connect);
        // Boxed: the other way is the usual one, and shall not move this one's room about.
        Box::pin(sending).await?
    } else {
        let Message { parts, body, .. } = &mut *message;
        headers::origin_form(parts);
        if !body.is_end_stream()
            && body.size_hint().exact().is_none()
            && !parts.headers.contains_key(CONTENT_LENGTH)
        {
            // hyper would take a GET of unknown length for one without a body.
            parts
                .headers
                .insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        pool.send_http1(key, message, connect).await?
    };
    headers::from_server(response.headers_mut());
    Ok(response)
}

/// A response that the agent beside the server made because it could not deliver is a failed try.
fn checked(response: Response<Body>) -> Result<Response<Body>, Error> {
    match failure::announced(response.headers()) {
        Some(kind) => Err(kind.into()),
        None => Ok(response),
    }
}
