//! Connections of the admin page: HTTP/1, few, short, and with little patience.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::pages::{self, Answer, Site};

/// Served at a time; others wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 64;
/// A request's headers must be here this long after the connection, or after the answer before.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// A request's body must be here this long after its headers.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection gets no further request after this long, so that nobody keeps one of the few for good.
const LIFETIME: Duration = Duration::from_mins(1);
/// What a slow reader gets beyond that to take its answer.
const GRACE: Duration = Duration::from_secs(10);
/// The head of a request; more gets 431.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
/// A filter for the log is the only thing to send.
const MAX_BODY: usize = 4 * 1024;
/// After an accept that failed, most likely for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) async fn serve(listener: TcpListener, site: Site) {
    let site = Arc::new(site);
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // Never closed, so there is always a permit to come.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let site = Arc::clone(&site);
                connections.spawn(async move {
                    connection(stream, site).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the admin page cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(stream: TcpStream, site: Arc<Site>) {
    let service = service_fn(move |request| {
        let site = Arc::clone(&site);
        async move { Ok::<_, Infallible>(answer(&site, request).await) }
    });
    let mut serving = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), service)
    );
    // How a connection of the admin page ends concerns only its client.
    tokio::select! {
        _ = &mut serving => return,
        () = sleep(LIFETIME) => serving.as_mut().graceful_shutdown(),
    }
    let _ = timeout(GRACE, serving).await;
}

async fn answer(site: &Site, request: http::Request<Incoming>) -> Answer {
    let (parts, body) = request.into_parts();
    match timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => pages::answer(site, &parts, &body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => pages::failure(
            http::StatusCode::PAYLOAD_TOO_LARGE,
            &format!("the body is longer than {MAX_BODY} bytes"),
        ),
        Ok(Err(_)) => pages::failure(http::StatusCode::BAD_REQUEST, "the body cannot be read"),
        Err(_) => pages::failure(http::StatusCode::REQUEST_TIMEOUT, "the body did not come in time"),
    }
}
