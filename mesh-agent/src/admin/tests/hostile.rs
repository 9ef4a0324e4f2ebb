//! Clients that mean harm, or are lost.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{LIMIT, Page};
use crate::admin::{Scope, api};

#[tokio::test]
async fn wrong_paths_methods_and_hosts() {
    let page = Page::start(Scope::Admin).await;
    let host = page.address;
    for path in [
        "/nothing",
        "/api/v1/",
        "/api/v1/secrets",
        "/api",
        "/metrics/",
        "//metrics",
        "/../etc/passwd",
    ] {
        let reply = page.get(path).await;
        assert_eq!(reply.status, 404, "{path}");
        let failure: api::Failure = serde_json::from_str(&reply.body).unwrap();
        assert!(failure.error.contains("/api/v1/status"));
    }
    for (method, path, allow) in [
        ("POST", "/metrics", "get, head"),
        ("DELETE", "/api/v1/workloads", "get, head"),
        ("DELETE", "/logging", "get, head, put, post"),
    ] {
        let reply = page
            .send(&format!("{method} {path} HTTP/1.0\r\nhost: {host}\r\n\r\n"))
            .await;
        assert_eq!(reply.status, 405);
        assert!(reply.head.contains(&format!("allow: {allow}")), "{}", reply.head);
    }
    let rebound = page
        .send("GET /config_dump HTTP/1.0\r\nhost: evil.example:15000\r\n\r\n")
        .await;
    assert_eq!(rebound.status, 403);
    assert!(!rebound.body.contains("reviews"));
}

#[tokio::test]
async fn hostile_requests_are_refused() {
    let page = Page::start(Scope::Admin).await;
    let host = page.address;
    let long = "x".repeat(100_000);
    let many: String = (0..100).map(|index| format!("x-{index}: 1\r\n")).collect();
    for (request, status) in [
        (format!("GET /{long} HTTP/1.1\r\nhost: {host}\r\n\r\n"), 414..=431),
        (
            format!("GET / HTTP/1.1\r\nhost: {host}\r\nx: {long}\r\n\r\n"),
            431..=431,
        ),
        (format!("GET / HTTP/1.1\r\nhost: {host}\r\n{many}\r\n"), 431..=431),
        (
            format!("POST /logging HTTP/1.0\r\nhost: {host}\r\ncontent-length: 100000\r\n\r\n{long}"),
            413..=413,
        ),
        (
            format!("GET / HTTP/1.1\r\nhost: {host}\r\n bad\r\n\r\n"),
            400..=400,
        ),
        ("\x16\x03\x01\x02".to_owned() + &long, 400..=431),
    ] {
        let reply = page.send(&request).await;
        assert!(
            status.contains(&reply.status),
            "{} to {:.60}",
            reply.status,
            request
        );
    }
    assert_eq!(page.get("/healthz").await.status, 200);
}

/// Time is the test's own: it jumps whenever nothing else is left to do.
#[tokio::test(start_paused = true)]
async fn silent_clients_are_cut() {
    let page = Page::start(Scope::Admin).await;
    let head = format!(
        "POST /logging HTTP/1.1\r\nhost: {}\r\ncontent-length: 5\r\n\r\nin",
        page.address
    );
    for (sent, status) in [("", 0), ("GET / HT", 0), (&head, 408)] {
        let mut stream = TcpStream::connect(page.address).await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        let answer = String::from_utf8(bytes).unwrap();
        let found = answer
            .split(' ')
            .nth(1)
            .map_or(0, |status| status.parse().unwrap());
        assert_eq!(found, status, "{sent:?} got {answer:?}");
    }
}

#[tokio::test]
async fn more_clients_than_allowed_wait() {
    let page = Page::start(Scope::Admin).await;
    let mut idle = Vec::new();
    for _ in 0..64 {
        let mut stream = TcpStream::connect(page.address).await.unwrap();
        let request = format!("GET /healthz HTTP/1.1\r\nhost: {}\r\n\r\n", page.address);
        stream.write_all(request.as_bytes()).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'H', "it is being served");
        idle.push(stream);
    }
    let mut waiting = TcpStream::connect(page.address).await.unwrap();
    waiting.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await.unwrap();
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(200), waiting.peek(&mut byte)).await;
    assert!(early.is_err(), "64 are served, this is the next");
    drop(idle);
    let read = tokio::time::timeout(LIMIT, waiting.read_u8()).await;
    assert_eq!(read.unwrap().unwrap(), b'H');
}
