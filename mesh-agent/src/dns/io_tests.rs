//! The resolver on loopback sockets, with a server behind it that tests play.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RecordType;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::metrics::{DnsOutcome, Metrics};
use crate::sock::{Egress, Namespace};
use crate::store::Store;

use super::tests::{addresses, query, snapshot};
use super::*;

/// Far more than loopback needs.
const SOON: Duration = Duration::from_secs(10);

/// No kernel in between: all that is sent to an address that ends in 7 was meant for one server.
#[derive(Debug)]
struct Fake {
    server: SocketAddr,
}

impl Namespace for Fake {
    fn original_destination(&self, _: SocketAddr, _: SocketAddr) -> Option<SocketAddr> {
        None
    }

    fn original_dns_server(&self, local: SocketAddr) -> Option<SocketAddr> {
        local
            .ip()
            .to_string()
            .ends_with(['7', '1'])
            .then_some(self.server)
    }

    fn tcp_socket(&self, _: SocketAddr, _: Option<SocketAddr>) -> io::Result<Egress> {
        Ok(Egress {
            socket: TcpSocket::new_v4()?,
            exemption: None,
        })
    }

    fn udp_socket(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(to)?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }
}

fn resolver(server: SocketAddr) -> Resolver {
    let client = Client {
        namespace: "shop".into(),
        cluster_domain: "cluster.local".into(),
    };
    let metrics = Metrics::new(&mut Registry::default());
    Resolver::new(Arc::new(Fake { server }), client, Store::new(snapshot()), metrics)
}

fn counted(resolver: &Resolver, outcome: DnsOutcome) -> u64 {
    resolver.metrics.agent().dns_queries(outcome).get()
}

/// A resolver at `bind`, for a server that the test plays.
async fn start(bind: &str) -> (Resolver, u16, UdpSocket, JoinHandle<io::Result<()>>) {
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let resolver = resolver(server.local_addr().unwrap());
    let socket = UdpSocket::bind(bind).await.unwrap();
    let port = socket.local_addr().unwrap().port();
    let task = tokio::spawn({
        let resolver = resolver.clone();
        async move { serve(&resolver, socket).await }
    });
    (resolver, port, server, task)
}

/// A client that hears only what comes from exactly where it asked.
async fn client(of: &str, port: u16) -> UdpSocket {
    let any = if of.contains(':') {
        "[::1]:0"
    } else {
        "127.0.0.1:0"
    };
    let client = UdpSocket::bind(any).await.unwrap();
    client.connect(format!("{of}:{port}")).await.unwrap();
    client
}

async fn heard(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 65_535];
    let length = timeout(SOON, socket.recv(&mut buffer)).await.unwrap().unwrap();
    buffer.truncate(length);
    buffer
}

async fn asked(server: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65_535];
    let (length, from) = timeout(SOON, server.recv_from(&mut buffer))
        .await
        .unwrap()
        .unwrap();
    buffer.truncate(length);
    (buffer, from)
}

#[tokio::test]
async fn answers_leave_from_where_the_query_arrived() {
    for (bind, of) in [
        ("0.0.0.0:0", "127.0.0.7"),
        ("127.0.0.7:0", "127.0.0.7"),
        ("[::1]:0", "[::1]"),
        ("[::]:0", "[::1]"),
        ("[::]:0", "127.0.0.7"),
    ] {
        let (resolver, port, server, task) = start(bind).await;
        let client = client(of, port).await;

        let ours = query("reviews.", RecordType::A).to_vec().unwrap();
        client.send(&ours).await.unwrap();
        let reply = Message::from_vec(&heard(&client).await).unwrap();
        assert_eq!(addresses(&reply), ["10.96.0.1"], "{bind} {of}");
        assert_eq!(counted(&resolver, DnsOutcome::Answered), 1);

        let theirs = query("example.com.", RecordType::TXT).to_vec().unwrap();
        client.send(&theirs).await.unwrap();
        let (passed_on, from) = asked(&server).await;
        assert_eq!(passed_on, theirs, "byte for byte");
        let mut answer = theirs.clone();
        answer[2] |= 0x80;
        answer.extend(b"whatever the server says");
        server.send_to(&answer, from).await.unwrap();
        assert_eq!(heard(&client).await, answer, "byte for byte");
        assert_eq!(counted(&resolver, DnsOutcome::Forwarded), 1);
        task.abort();
    }
}

#[tokio::test]
async fn only_that_server_with_that_id_is_believed() {
    let (_, port, server, _task) = start("0.0.0.0:0").await;
    let client = client("127.0.0.7", port).await;
    let query = query("example.com.", RecordType::A).to_vec().unwrap();
    client.send(&query).await.unwrap();
    let (_, from) = asked(&server).await;

    let mut genuine = query.clone();
    genuine[2] |= 0x80;
    let mut other_id = genuine.clone();
    other_id[0] ^= 1;
    let liar = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    liar.send_to(&[genuine.as_slice(), b"lie"].concat(), from)
        .await
        .unwrap();
    for wrong in [&other_id[..], &query[..], &genuine[..5], &[]] {
        server.send_to(wrong, from).await.unwrap();
    }
    server.send_to(&genuine, from).await.unwrap();
    assert_eq!(heard(&client).await, genuine);
}

#[tokio::test]
async fn queries_wait_side_by_side() {
    let (_, port, server, _task) = start("0.0.0.0:0").await;
    let client = client("127.0.0.7", port).await;
    let mut waiting = Vec::new();
    // All with one id, as hostile or unlucky clients have it.
    for name in ["a.example.", "b.example.", "c.example."] {
        let mut query = query(name, RecordType::A);
        query.metadata.id = 7;
        client.send(&query.to_vec().unwrap()).await.unwrap();
        waiting.push(asked(&server).await);
    }
    for (mut query, from) in waiting.into_iter().rev() {
        query[2] |= 0x80;
        server.send_to(&query, from).await.unwrap();
        assert_eq!(heard(&client).await, query);
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_at_once() {
    let (resolver, port, server, _task) = start("0.0.0.0:0").await;
    drop(server);
    let client = client("127.0.0.7", port).await;
    let query = query("example.com.", RecordType::A);
    client.send(&query.to_vec().unwrap()).await.unwrap();
    let reply = Message::from_vec(&heard(&client).await).unwrap();
    assert_eq!(
        (reply.id, reply.response_code),
        (query.id, ResponseCode::ServFail)
    );
    assert_eq!(counted(&resolver, DnsOutcome::Failed), 1);
}

#[tokio::test]
async fn what_nobody_captured_and_what_is_over_the_bound_is_dropped() {
    let (resolver, port, server, _task) = start("0.0.0.0:0").await;
    let theirs = query("example.com.", RecordType::A).to_vec().unwrap();
    let ours = query("reviews.", RecordType::A).to_vec().unwrap();
    let uncaptured = client("127.0.0.9", port).await;
    uncaptured.send(&theirs).await.unwrap();
    // Datagrams are handled in order: once this is answered, the one before it was dropped.
    uncaptured.send(&ours).await.unwrap();
    heard(&uncaptured).await;
    assert_eq!(counted(&resolver, DnsOutcome::Dropped), 1);

    let client = client("127.0.0.7", port).await;
    for _ in 0..MAX_FORWARDS {
        client.send(&theirs).await.unwrap();
        asked(&server).await;
    }
    client.send(&theirs).await.unwrap();
    client.send(&ours).await.unwrap();
    heard(&client).await;
    assert_eq!(counted(&resolver, DnsOutcome::Dropped), 2);
}

#[tokio::test]
async fn large_and_tiny_datagrams_pass() {
    let (_, port, server, _task) = start("0.0.0.0:0").await;
    let client = client("127.0.0.7", port).await;
    for sent in [vec![], vec![1], vec![9; 12], vec![0; 60_000]] {
        client.send(&sent).await.unwrap();
        assert_eq!(asked(&server).await.0, sent);
    }
}

/// A DNS connection of a client, and the server's end that the test plays.
async fn start_tcp() -> (Resolver, DuplexStream, TcpListener, JoinHandle<io::Result<()>>) {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr().unwrap();
    let resolver = resolver(address);
    let (client, ours) = tokio::io::duplex(1 << 18);
    let task = tokio::spawn({
        let resolver = resolver.clone();
        async move { stream(&resolver, ours, address).await }
    });
    (resolver, client, server, task)
}

fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap();
    [&length.to_be_bytes()[..], message].concat()
}

async fn next<R: tokio::io::AsyncRead + Unpin>(reader: &mut R) -> Vec<u8> {
    let read = async {
        let length = reader.read_u16().await.unwrap();
        let mut message = vec![0; length.into()];
        reader.read_exact(&mut message).await.unwrap();
        message
    };
    timeout(SOON, read).await.unwrap()
}

async fn ends(task: JoinHandle<io::Result<()>>) -> io::Result<()> {
    timeout(SOON, task).await.unwrap().unwrap()
}

#[tokio::test]
async fn one_connection_carries_both_kinds_pipelined() {
    let (resolver, mut client, server, task) = start_tcp().await;
    let ours = query("large.", RecordType::A).to_vec().unwrap();
    let theirs = query("example.com.", RecordType::A).to_vec().unwrap();
    let large = vec![5; 65_535];
    let all = [framed(&theirs), framed(&ours), framed(&large), framed(&ours)].concat();
    // In pieces that end in the middle of everything.
    for piece in all.chunks(7001) {
        client.write_all(piece).await.unwrap();
    }
    for _ in 0..2 {
        let reply = Message::from_vec(&next(&mut client).await).unwrap();
        assert_eq!(reply.answers.len(), 60);
    }
    let (mut server, _) = timeout(SOON, server.accept()).await.unwrap().unwrap();
    assert_eq!(next(&mut server).await, theirs);
    assert_eq!(next(&mut server).await, large);
    // The client has asked all it wants, and still gets what is outstanding.
    client.shutdown().await.unwrap();
    for answer in [b"first", b"again"] {
        server.write_all(&framed(answer)).await.unwrap();
        assert_eq!(next(&mut client).await, answer);
    }
    ends(task).await.unwrap();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(counted(&resolver, DnsOutcome::Answered), 2);
    assert_eq!(counted(&resolver, DnsOutcome::Forwarded), 2);
}

#[tokio::test]
async fn the_servers_end_is_the_clients_end() {
    let (resolver, mut client, server, task) = start_tcp().await;
    client.write_all(&framed(b"something to pass on")).await.unwrap();
    let (mut server, _) = server.accept().await.unwrap();
    next(&mut server).await;
    drop(server);
    ends(task).await.unwrap();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(counted(&resolver, DnsOutcome::Failed), 1);
}

#[tokio::test]
async fn a_message_that_breaks_off_is_an_error() {
    let (_, mut client, _server, task) = start_tcp().await;
    client.write_all(&[0, 100, 1, 2, 3]).await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(ends(task).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_let_go() {
    let (_, _client, _server, task) = start_tcp().await;
    // Not `ends`: its limit would pass first on a clock that jumps to the next timer.
    let ended = task.await.unwrap();
    assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
}
