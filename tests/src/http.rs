//! The smallest HTTP client that can ask an agent's admin address.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::patience;

/// An admin page that needs longer hangs.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The body of a page; a status other than 200 is an error.
pub fn get(address: SocketAddr, path: &str) -> Result<String> {
    let (status, body) = request(address, "GET", path, "")?;
    if status != 200 {
        bail!("http://{address}{path} answers {status}: {body}");
    }
    Ok(body)
}

pub fn get_json(address: SocketAddr, path: &str) -> Result<Value> {
    let body = get(address, path)?;
    serde_json::from_str(&body).with_context(|| format!("http://{address}{path} is no JSON: {body}"))
}

/// Status and body.
pub fn request(address: SocketAddr, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, patience(TIMEOUT))
        .with_context(|| format!("cannot connect to {address}"))?;
    stream.set_read_timeout(Some(patience(TIMEOUT)))?;
    // HTTP/1.0: the answer ends with the connection, so there is nothing to decode.
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nhost: {address}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").context("no end of headers")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok((status, body.to_owned()))
}
