//! TCP servers: one that speaks first, one that outlives the client's FIN.

use std::net::SocketAddr;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// Greets before the client says anything, as SMTP, SSH and MySQL do; then answers each line.
pub(crate) async fn greet(mut stream: TcpStream, peer: SocketAddr, name: String) {
    let greeting = format!("220 {name} greets {}\r\n", peer.ip());
    if stream.write_all(greeting.as_bytes()).await.is_err() {
        return;
    }
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
        let answer = format!("250 {name} heard {line}");
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
        line.clear();
    }
}

/// Returns what it gets as it comes; after the client's FIN it tells how much that was, and closes.
pub(crate) async fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 65_536];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) => break,
            Ok(read) => {
                total += read;
                if stream.write_all(&buffer[..read]).await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
    let _sent = stream.write_all(format!("\n{total} bytes\n").as_bytes()).await;
}
