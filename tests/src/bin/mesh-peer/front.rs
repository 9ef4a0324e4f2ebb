//! A front end: an HTTP server that asks the service `reviews` for each answer.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::HOST;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpStream;

use crate::client::Connection;

const REVIEWS: &str = "reviews";

/// Idle connections to the service; there are never more than requests at the same time.
pub(crate) type Pool = Mutex<Vec<Connection>>;

pub(crate) async fn serve(stream: TcpStream, pool: Arc<Pool>) {
    let service = service_fn(move |request| answer(request, Arc::clone(&pool)));
    let server = auto::Builder::new(TokioExecutor::new());
    let _ended = server.serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(request: Request<Incoming>, pool: Arc<Pool>) -> Result<Response<Full<Bytes>>> {
    Ok(ask(request, &pool).await.unwrap_or_else(|error| {
        let mut response = Response::new(Full::from(format!("{REVIEWS}: {error:#}\n")));
        *response.status_mut() = StatusCode::BAD_GATEWAY;
        response
    }))
}

/// Passes the request on with its body, and the answer back with its headers.
async fn ask(request: Request<Incoming>, pool: &Pool) -> Result<Response<Full<Bytes>>> {
    let (head, body) = request.into_parts();
    let mut upstream = Request::builder()
        .method(head.method)
        .uri(head.uri.path())
        .header(HOST, REVIEWS);
    if let Some(secret) = head.headers.get("x-secret") {
        upstream = upstream.header("x-secret", secret);
    }
    let upstream = upstream.body(Full::new(body.collect().await?.to_bytes()))?;
    let idle = pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let mut connection = match idle {
        Some(connection) => connection,
        None => Connection::open(&Uri::from_static("http://reviews/"), false).await?,
    };
    let (mut head, body) = connection.send(upstream).await?.into_parts();
    pool.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(connection);
    // Of the connection behind, not of this one.
    head.headers.remove("connection");
    head.headers.remove("transfer-encoding");
    Ok(Response::from_parts(head, Full::new(body)))
}
