//! A DNS server that answers every question with its own name, over UDP and TCP.

use std::net::Ipv6Addr;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// What UDP carries without EDNS.
const MOST: usize = 512;

pub(crate) async fn serve_udp(name: String, port: u16) -> Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).await?;
    let mut query = [0; MOST];
    loop {
        let (length, from) = socket.recv_from(&mut query).await?;
        if let Some(answer) = answer(&query[..length], &name) {
            socket.send_to(&answer, from).await?;
        }
    }
}

pub(crate) async fn serve_tcp(mut stream: TcpStream, name: String) {
    while let Ok(length) = stream.read_u16().await {
        let mut query = vec![0; length.into()];
        if stream.read_exact(&mut query).await.is_err() {
            return;
        }
        let Some(answer) = answer(&query, &name) else {
            return;
        };
        let Ok(length) = u16::try_from(answer.len()) else {
            return;
        };
        let whole = [&length.to_be_bytes()[..], &answer].concat();
        if stream.write_all(&whole).await.is_err() {
            return;
        }
    }
}

/// The question, and one TXT record for it.
fn answer(query: &[u8], name: &str) -> Option<Vec<u8>> {
    const HEADER: usize = 12;
    let end = HEADER + query.get(HEADER..)?.iter().position(|byte| *byte == 0)? + 1 + 4;
    let question = query.get(HEADER..end)?;
    let mut answer = query.get(..2)?.to_vec();
    // An answer, recursion desired and available; one question, one answer.
    answer.extend([0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    answer.extend(question);
    let length = u8::try_from(name.len()).ok()?;
    // The question's name, TXT, IN, 60 seconds.
    answer.extend([
        0xc0,
        0x0c,
        0,
        16,
        0,
        1,
        0,
        0,
        0,
        60,
        0,
        length.checked_add(1)?,
        length,
    ]);
    answer.extend(name.as_bytes());
    Some(answer)
}
