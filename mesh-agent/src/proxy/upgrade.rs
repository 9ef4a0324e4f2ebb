//! Requests that switch protocols (WebSocket and others): a connection of their own, byte for byte after 101.
//!
//! Invariant: nothing the client sends reaches the application as tunnel bytes before the application has
//! answered 101; any other answer is an ordinary response.

use std::net::SocketAddr;
use std::sync::Arc;

use http::header::{self, HeaderValue};
use http::{Request, Response, StatusCode, request};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;

use super::body::Body;
use super::context::{self, Life, Local};
use super::detect::Prefixed;
use super::error::{Error, Kind};
use super::hangup::Watched;
use super::inbound::{self, Caller};
use super::inbound_http::Measured;
use super::stream::Stream;
use super::{Proxy, failure, headers, reply, tcp};
use crate::model::InFlight;

/// A request's head, its body (which hyper ties the switch to), and the protocol asked for.
pub(super) type Switching = (request::Parts, Incoming, HeaderValue);

/// The application's side of a switch. `app` is the connection to it, where it is open already.
pub(super) async fn inbound(
    proxy: &Arc<Proxy>,
    dest: &Arc<Local>,
    caller: &Caller,
    to: SocketAddr,
    (mut parts, body, protocol): Switching,
    app: Option<Stream>,
) -> Response<Body> {
    let audience = reply::Audience::of(&parts);
    let measured = Measured::begin(proxy, dest, caller, to, &parts);
    headers::set_client_certificate(&mut parts.headers, caller.xfcc.as_ref());
    let sent = async {
        let stream = match app {
            Some(stream) => stream,
            None => {
                inbound::admit(proxy, dest, caller, to.port())?;
                inbound::connect_app(dest, to, caller.client).await?
            }
        };
        switch(stream, (parts, body, protocol), &caller.life, Some(dest), None).await
    };
    let sent = sent.await;
    measured.end(to, sent, audience)
}

/// Sends the request over `stream`; after a 101 the bytes of both sides are copied until both end, for as long as
/// the client's connection may live, and the workload `dest` of this node where it is one.
pub(super) async fn switch(
    stream: Stream,
    (mut parts, body, protocol): Switching,
    life: &Arc<Life>,
    dest: Option<&Arc<Local>>,
    held: Option<InFlight>,
) -> Result<Response<Body>, Error> {
    let (mut sender, connection) = http1::Builder::new()
        .handshake(TokioIo::new(Prefixed::new(stream)))
        .await
        .map_err(|cause| Error::new(Kind::Connect, cause))?;
    tokio::spawn(async move {
        let _ = connection.with_upgrades().await;
    });
    let client = parts.extensions.remove::<hyper::upgrade::OnUpgrade>();
    headers::origin_form(&mut parts);
    parts
        .headers
        .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    parts.headers.insert(header::UPGRADE, protocol);
    let request = Request::from_parts(parts, Body::incoming(body));
    let mut response = sender.send_request(request).await.map_err(failure::of_http)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        headers::from_server(response.headers_mut());
        return Ok(response.map(Body::incoming));
    }
    let client =
        client.ok_or_else(|| Error::new(Kind::BadRequest, "this connection cannot switch protocols"))?;
    let server = hyper::upgrade::on(&mut response);
    let (life, dest) = (Arc::clone(life), dest.cloned());
    tokio::spawn(async move {
        // Counts for balancing as long as it lives.
        let _held = held;
        let copying = async {
            let switched = tokio::try_join!(client, server);
            let (mut client, mut server) = switched.ok().and_then(|(client, server)| both(client, server))?;
            tcp::copy(&mut client, &mut server, &life.connection().moved)
                .await
                .ok()
        };
        tokio::select! {
            _ = copying => {}
            () = life.cut() => {}
            () = context::released(dest.as_ref()) => {}
        }
    });
    let switched = response.headers().get(header::UPGRADE).cloned();
    let (mut parts, _) = response.into_parts();
    headers::from_server(&mut parts.headers);
    parts
        .headers
        .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = switched {
        parts.headers.insert(header::UPGRADE, protocol);
    }
    Ok(Response::from_parts(parts, Body::default()))
}

/// The streams behind both sides, with what was read ahead.
fn both(client: Upgraded, server: Upgraded) -> Option<(Prefixed<Stream>, Prefixed<Stream>)> {
    let served = client.downcast::<TokioIo<Watched<Prefixed<Stream>>>>().ok()?;
    let (mut client, ahead) = served.io.into_inner().into_inner();
    client.prepend(ahead.as_slice());
    client.prepend(&served.read_buf);
    let opened = server.downcast::<TokioIo<Prefixed<Stream>>>().ok()?;
    let mut server = opened.io.into_inner();
    server.prepend(&opened.read_buf);
    Some((client, server))
}
