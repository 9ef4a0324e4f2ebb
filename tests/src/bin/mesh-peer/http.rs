//! An HTTP/1.x and HTTP/2 server that tells what it got, and misbehaves when asked to.
//!
//! | path | does |
//! |---|---|
//! | `/status/N` | answers N |
//! | `/dated?second=N` | answers 200, dated to that second of the first hour of 1970 |
//! | `/slow?ms=N` | answers after N ms |
//! | `/stream?chunks=N&bytes=N&ms=N` | N chunks, one each N ms |
//! | `/echo` | returns the body as it comes, trailers too |
//! | `/trailers` | a body, then the trailer `x-trailer: yes` |
//! | `/reset` | ends the connection (HTTP/2: the stream) without an answer |
//! | `/flaky?key=K&times=N&how=reset\|refused\|CODE` | fails the first N requests with that key; refused: `REFUSED_STREAM` |
//! | `/upgrade` | 101, then returns what it gets |
//! | anything else | JSON that describes the request, body included |
//!
//! A gRPC request gets its messages back, whatever the method is called.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, DATE, HeaderValue, UPGRADE};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Frames that wait for a slow reader.
const QUEUE: usize = 4;

pub(crate) async fn serve(stream: TcpStream, peer: SocketAddr, name: String) {
    let name: Arc<str> = name.into();
    let service = service_fn(move |request| {
        let answer = answer(request, peer, Arc::clone(&name));
        async { answer.await.map_err(Failed) }
    });
    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http1().half_close(true);
    // Errors here are the clients' and the tests' own: resets, aborted uploads.
    let _ended = server
        .serve_connection_with_upgrades(TokioIo::new(stream), service)
        .await;
}

/// What hyper looks into for the code of a stream's reset; an [`io::Error`] hides what is in it.
#[derive(Debug)]
struct Failed(io::Error);

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for Failed {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.get_ref().map(|error| error as _)
    }
}

async fn answer(
    mut request: Request<Incoming>,
    peer: SocketAddr,
    name: Arc<str>,
) -> io::Result<Response<Frames>> {
    let version = format!("{:?}", request.version());
    let secret = request.headers().get("x-secret").cloned();
    let mut response = if is_grpc(&request) {
        grpc(request)
    } else {
        match request.uri().path() {
            "/dated" => dated(number(&request, "second")),
            "/slow" => {
                tokio::time::sleep(Duration::from_millis(number(&request, "ms"))).await;
                text("slow\n")
            }
            "/stream" => stream(&request),
            "/echo" => Response::new(Frames::relay(request.into_body(), HeaderMap::new())),
            "/trailers" => trailers(),
            "/reset" => return Err(io::ErrorKind::ConnectionReset.into()),
            "/flaky" => flaky(&request)?,
            "/upgrade" => upgrade(&mut request),
            path => match path.strip_prefix("/status/").and_then(|code| code.parse().ok()) {
                Some(code) => status(code),
                None => describe(request, peer, &name).await?,
            },
        }
    };
    let headers = response.headers_mut();
    headers.insert("x-pod", name.parse().map_err(io::Error::other)?);
    headers.insert("x-seen-version", version.parse().map_err(io::Error::other)?);
    if let Some(secret) = secret {
        headers.insert("x-secret-too", secret);
    }
    Ok(response)
}

async fn describe(request: Request<Incoming>, peer: SocketAddr, name: &str) -> io::Result<Response<Frames>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?;
    let trailers = body.trailers().map(list);
    let body = body.to_bytes();
    let seen = json!({
        "pod": name,
        "peer": peer.to_string(),
        "version": format!("{:?}", head.version),
        "method": head.method.as_str(),
        "uri": head.uri.to_string(),
        "headers": list(&head.headers),
        "bodyLength": body.len(),
        "body": String::from_utf8_lossy(&body),
        "trailers": trailers,
    });
    let mut response = text(&format!("{seen}\n"));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

fn list(headers: &HeaderMap) -> Value {
    headers
        .iter()
        .map(|(name, value)| json!([name.as_str(), String::from_utf8_lossy(value.as_bytes())]))
        .collect()
}

fn stream(request: &Request<Incoming>) -> Response<Frames> {
    let (chunks, bytes, pause) = (
        number(request, "chunks"),
        number(request, "bytes"),
        number(request, "ms"),
    );
    let chunk = Bytes::from(vec![b'x'; usize::try_from(bytes).unwrap_or(0)]);
    Response::new(Frames::made_by(async move |frames| {
        for _ in 0..chunks {
            frames.send(Ok(Frame::data(chunk.clone()))).await.ok()?;
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        Some(())
    }))
}

/// What a real server would take a second for.
fn dated(second: u64) -> Response<Frames> {
    let (minute, second) = (second / 60 % 60, second % 60);
    let date = format!("Thu, 01 Jan 1970 00:{minute:02}:{second:02} GMT");
    let mut response = status(200);
    // Without it there would be today's, which tells who looks at the date.
    response.headers_mut().insert(
        DATE,
        HeaderValue::try_from(date).unwrap_or_else(|_| HeaderValue::from_static("")),
    );
    response
}

fn trailers() -> Response<Frames> {
    let mut response = Response::new(Frames::made_by(async |frames| {
        frames
            .send(Ok(Frame::data(Bytes::from_static(b"before the trailers\n"))))
            .await
            .ok()?;
        let trailers = one_header("x-trailer", "yes");
        frames.send(Ok(Frame::trailers(trailers))).await.ok()
    }));
    response.headers_mut().extend(one_header("trailer", "x-trailer"));
    response
}

fn flaky(request: &Request<Incoming>) -> io::Result<Response<Frames>> {
    static SEEN: LazyLock<Mutex<HashMap<String, u64>>> = LazyLock::new(Mutex::default);
    let key = parameter(request, "key").unwrap_or_default();
    let count = {
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        let count = seen.entry(key.to_owned()).or_default();
        *count += 1;
        *count
    };
    if count > number(request, "times") {
        return Ok(text(&format!("worked at request {count}\n")));
    }
    let how = parameter(request, "how").unwrap_or_default();
    match how.parse() {
        Ok(code) => Ok(status(code)),
        Err(_) if how == "refused" => Err(io::Error::other(h2::Error::from(h2::Reason::REFUSED_STREAM))),
        Err(_) => Err(io::ErrorKind::ConnectionReset.into()),
    }
}

fn upgrade(request: &mut Request<Incoming>) -> Response<Frames> {
    let Some(protocol) = request.headers().get(UPGRADE).cloned() else {
        return status(426);
    };
    let upgraded = hyper::upgrade::on(request);
    tokio::spawn(async move {
        if let Ok(upgraded) = upgraded.await {
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            let _copied = tokio::io::copy(&mut read, &mut write).await;
        }
    });
    let mut response = status(101);
    response.headers_mut().insert(UPGRADE, protocol);
    response
        .headers_mut()
        .extend(one_header(CONNECTION.as_str(), "upgrade"));
    response
}

fn is_grpc(request: &Request<Incoming>) -> bool {
    request
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

fn grpc(request: Request<Incoming>) -> Response<Frames> {
    let kind = one_header(CONTENT_TYPE.as_str(), "application/grpc");
    let mut response = if request.uri().path().ends_with("/Fail") {
        // Trailers-only: the status comes with the headers.
        let mut response = text("");
        response.headers_mut().extend(one_header("grpc-status", "14"));
        response
    } else {
        Response::new(Frames::relay(request.into_body(), one_header("grpc-status", "0")))
    };
    response.headers_mut().extend(kind);
    response
}

fn status(code: u16) -> Response<Frames> {
    let mut response = if code == 101 || code == 204 || code == 304 {
        text("")
    } else {
        text("as asked\n")
    };
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_REQUEST);
    response
}

fn text(text: &str) -> Response<Frames> {
    // No body at all is not the same as an empty one: HTTP/2 then ends with the headers.
    let bytes = Bytes::copy_from_slice(text.as_bytes());
    Response::new(Frames::Whole(Some(bytes).filter(|bytes| !bytes.is_empty())))
}

fn one_header(name: &'static str, value: &'static str) -> HeaderMap {
    let name = hyper::header::HeaderName::from_static(name);
    HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
}

fn parameter<'a>(request: &'a Request<Incoming>, name: &str) -> Option<&'a str> {
    request
        .uri()
        .query()?
        .split('&')
        .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

fn number(request: &Request<Incoming>, name: &str) -> u64 {
    parameter(request, name)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

/// A response's body.
pub(crate) enum Frames {
    Whole(Option<Bytes>),
    Made(mpsc::Receiver<io::Result<Frame<Bytes>>>),
}

impl Frames {
    /// Made by a task of its own. A reader that is gone ends it.
    fn made_by<F>(make: impl FnOnce(mpsc::Sender<io::Result<Frame<Bytes>>>) -> F + Send + 'static) -> Self
    where
        F: Future<Output = Option<()>> + Send,
    {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(async move { make(sender).await });
        Self::Made(receiver)
    }

    /// Passes a body on as it comes, then its trailers and these.
    fn relay(mut body: Incoming, more: HeaderMap) -> Self {
        Self::made_by(async move |frames| {
            let mut trailers = more;
            while let Some(frame) = body.frame().await {
                match frame.map(Frame::into_data) {
                    Ok(Ok(data)) => frames.send(Ok(Frame::data(data))).await.ok()?,
                    Ok(Err(frame)) => trailers.extend(frame.into_trailers().unwrap_or_default()),
                    Err(error) => {
                        let error = Err(io::Error::other(error));
                        return frames.send(error).await.ok();
                    }
                }
            }
            if !trailers.is_empty() {
                frames.send(Ok(Frame::trailers(trailers))).await.ok()?;
            }
            Some(())
        })
    }
}

impl Body for Frames {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Made(frames) => frames.poll_recv(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(bytes) => {
                let length = bytes.as_ref().map_or(0, Bytes::len);
                hyper::body::SizeHint::with_exact(u64::try_from(length).unwrap_or(u64::MAX))
            }
            Self::Made(_) => hyper::body::SizeHint::default(),
        }
    }
}
