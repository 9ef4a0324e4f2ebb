//! TLS sessions that the kernel takes over after the handshake. Where it cannot, rustls keeps them, and all that is
//! promised here holds as well.

use std::collections::BTreeSet;
use std::future::Future;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream as StdStream};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::Duration;

use hyper::{Request, Response};
use mesh_agent::identity::Identities;
use mesh_agent::model::Identity;
use mesh_agent::tls::{self, RecordLayer, Session, Stream, Transport};
use mesh_tests::{off, patience, until};
use socket2::SockRef;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::server::{ServerSessionMemoryCache, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::{
    AlertDescription, CipherSuite, ClientConfig, ClientConnection, Error, ServerConfig,
};

use RecordLayer::{Agent, Kernel};

const LONG: Duration = Duration::from_secs(20);
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";
const BUFFER: usize = 64 << 10;
/// Many times what all buffers on the way hold.
const MUCH: usize = 8 << 20;
/// Longer than any write takes that can be done.
const BLOCKED: Duration = Duration::from_secs(1);

struct Mesh {
    /// Whether this kernel can do it.
    can: bool,
    identities: Identities,
    pair: [Identity; 2],
    _ca: TempDir,
}

impl Mesh {
    fn new() -> Self {
        let ca = TempDir::new().unwrap();
        let identities = Identities::open_embedded(ca.path(), "cluster.local").unwrap();
        let pair: [Identity; 2] = [CLIENT.parse().unwrap(), SERVER.parse().unwrap()];
        identities.ensure(&BTreeSet::from(pair.clone()));
        let can = tls::probe_kernel().is_ok();
        if !can {
            off("kernel TLS").unwrap();
        }
        Self {
            can,
            identities,
            pair,
            _ca: ca,
        }
    }

    fn client(&self, layer: RecordLayer) -> Arc<ClientConfig> {
        tls::client_config(&self.identities, &self.pair[0], &self.pair[1], layer).unwrap()
    }

    fn server(&self, layer: RecordLayer) -> Arc<ServerConfig> {
        tls::server_config(&self.identities, &self.pair[1], layer).unwrap()
    }

    /// Each end in the kernel if it is asked to, where that can be.
    async fn sessions(&self, client: RecordLayer, server: RecordLayer) -> (Session, Session) {
        let (at_client, at_server) = sessions(self.client(client), self.server(server)).await;
        assert_eq!(is_in_kernel(&at_client), self.can && client == Kernel);
        assert_eq!(is_in_kernel(&at_server), self.can && server == Kernel);
        (at_client, at_server)
    }
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let server = listener.accept().await.unwrap().0;
    for socket in [&client, &server] {
        // Whatever this machine has by default.
        SockRef::from(socket).set_send_buffer_size(BUFFER).unwrap();
        SockRef::from(socket).set_recv_buffer_size(BUFFER).unwrap();
    }
    (client, server)
}

async fn sessions(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> (Session, Session) {
    let (at_client, at_server) = sockets().await;
    within(async {
        let connecting = tls::connect(client, Ipv4Addr::LOCALHOST.into(), at_client);
        tokio::try_join!(connecting, tls::accept(server, at_server)).unwrap()
    })
    .await
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    timeout(patience(LONG), work).await.unwrap()
}

fn is_in_kernel(session: &Session) -> bool {
    matches!(session.stream, Stream::Kernel(_))
}

/// Bytes that tell where in a stream they are.
fn pattern(from: usize, length: usize) -> Vec<u8> {
    (from..from + length)
        .map(|at| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0])
        .collect()
}

/// Sends so much in pieces of all sizes, and ends.
async fn send(mut to: impl AsyncWrite + Unpin, total: usize) {
    let mut sent = 0;
    for size in [1, 2, 100, 1 << 14, (1 << 14) + 1, 100_000].into_iter().cycle() {
        let size = size.min(total - sent);
        if size == 0 {
            break;
        }
        to.write_all(&pattern(sent, size)).await.unwrap();
        sent += size;
    }
    to.shutdown().await.unwrap();
}

/// Reads to the end, and finds everything in its place.
async fn receive(mut from: impl AsyncRead + Unpin) -> usize {
    let (mut buffer, mut received) = (vec![0; 70_000], 0);
    loop {
        let n = from.read(&mut buffer).await.unwrap();
        if n == 0 {
            return received;
        }
        assert!(buffer[..n] == pattern(received, n)[..], "after {received} bytes");
        received += n;
    }
}

#[tokio::test]
async fn either_end_may_have_its_kernel_encrypt() {
    let mesh = Mesh::new();
    for (client, server) in [(Kernel, Kernel), (Kernel, Agent), (Agent, Kernel), (Agent, Agent)] {
        let (at_client, at_server) = mesh.sessions(client, server).await;
        let native = Some(Transport::Native);
        assert_eq!((at_client.transport, at_server.transport), (native, native));
        assert_eq!(at_server.client.as_ref(), Some(&mesh.pair[0]));
        let (client_reads, client_writes) = tokio::io::split(at_client.stream);
        let (server_reads, server_writes) = tokio::io::split(at_server.stream);
        // One way ends before the other.
        let ways = async {
            tokio::join!(
                send(client_writes, MUCH / 4),
                send(server_writes, MUCH),
                receive(server_reads),
                receive(client_reads),
            )
        };
        let ((), (), up, down) = within(ways).await;
        assert_eq!((up, down), (MUCH / 4, MUCH), "{client:?} to {server:?}");
    }
}

#[tokio::test]
async fn a_peer_with_another_cipher_is_left_to_the_agent() {
    let mesh = Mesh::new();
    let mut provider: CryptoProvider = aws_lc_rs::default_provider();
    let wanted = CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.retain(|suite| suite.suite() == wanted);
    let provider = Arc::new(provider);
    let clients = WebPkiClientVerifier::builder_with_provider(mesh.identities.roots(), provider.clone());
    let shown = mesh.identities.current(&mesh.pair[1]).unwrap();
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(clients.build().unwrap())
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::clone(
            &shown.certified,
        ))));
    server.alpn_protocols = vec![b"h2".to_vec()];
    // Unread, they would turn the end into a reset.
    server.send_tls13_tickets = 0;
    let (at_client, at_server) = sessions(mesh.client(Kernel), Arc::new(server)).await;
    assert_eq!(at_client.transport, Some(Transport::Hbone));
    assert!(!is_in_kernel(&at_client));
    let received = async { tokio::join!(send(at_client.stream, MUCH / 4), receive(at_server.stream)).1 };
    assert_eq!(within(received).await, MUCH / 4);
}

async fn collect(mut body: h2::RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        all.extend_from_slice(&data);
    }
    all
}

#[tokio::test]
async fn http2_runs_over_it_with_many_streams_at_once() {
    let mesh = Mesh::new();
    let (at_client, at_server) = mesh.sessions(Kernel, Kernel).await;
    tokio::spawn(async move {
        let mut connection = h2::server::handshake(at_server.stream).await.unwrap();
        while let Some(asked) = connection.accept().await {
            let (request, mut respond) = asked.unwrap();
            tokio::spawn(async move {
                let mut answer = respond.send_response(Response::new(()), false).unwrap();
                let echo = collect(request.into_body()).await;
                answer.send_data(echo.into(), true).unwrap();
            });
        }
    });
    let (sender, connection) = h2::client::handshake(at_client.stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let streams: Vec<_> = (1..=40)
        .map(|stream| {
            let sender = sender.clone();
            tokio::spawn(async move {
                let body = pattern(stream * 7, stream * 1000);
                let request = Request::post("http://a/").body(()).unwrap();
                let mut sender = sender.ready().await.unwrap();
                let (response, mut sending) = sender.send_request(request, false).unwrap();
                sending.send_data(body.clone().into(), true).unwrap();
                let echo = collect(response.await.unwrap().into_body()).await;
                assert!(echo == body);
            })
        })
        .collect();
    drop(sender);
    within(async {
        for stream in streams {
            stream.await.unwrap();
        }
        connection.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn who_does_not_read_stops_who_writes() {
    let mesh = Mesh::new();
    let (mut writer, reader) = mesh.sessions(Kernel, Kernel).await;
    let mut written = 0;
    // What waits for so long waits for the reader.
    while let Ok(n) = timeout(patience(BLOCKED), writer.stream.write(&pattern(written, 100_000))).await {
        written += n.unwrap();
        assert!(written < MUCH, "nothing stops it");
    }
    let rest = async {
        for at in (written..written + MUCH / 4).step_by(1 << 10) {
            writer.stream.write_all(&pattern(at, 1 << 10)).await.unwrap();
        }
        writer.stream.shutdown().await.unwrap();
    };
    let ((), received) = within(async { tokio::join!(rest, receive(reader.stream)) }).await;
    assert_eq!(received, written + MUCH / 4);
}

#[tokio::test]
async fn an_end_is_told_from_a_cut() {
    let mesh = Mesh::new();
    for is_end in [true, false] {
        let (mut at_client, mut at_server) = mesh.sessions(Kernel, Kernel).await;
        at_client.stream.write_all(b"all of it").await.unwrap();
        if is_end {
            at_client.stream.shutdown().await.unwrap();
        }
        drop(at_client);
        let mut received = Vec::new();
        let ended = within(at_server.stream.read_to_end(&mut received)).await;
        assert_eq!(received, b"all of it");
        let failure = ended.err().map(|error| error.kind());
        assert_eq!(failure, (!is_end).then_some(ErrorKind::UnexpectedEof));
    }
}

#[tokio::test]
async fn what_is_no_record_of_this_connection_breaks_it() {
    let mesh = Mesh::new();
    let forged = [&[23, 3, 3, 0, 48][..], &[7; 48]].concat();
    let endless = [&[23, 3, 3, 0xff, 0xff][..], &[0; 70_000]].concat();
    for (what, bytes) in [
        ("forged", &forged[..]),
        ("no TLS", b"GET / HTTP/1.1\r\n\r\n"),
        ("too long", &endless),
        ("an end in clear", &[21, 3, 3, 0, 2, 1, 0]),
    ] {
        let (at_client, at_server) = sockets().await;
        let at_client = at_client.into_std().unwrap();
        // What goes this way is not encrypted, as it would be if the client's kernel did that.
        let mut beside = at_client.try_clone().unwrap();
        let at_client = TcpStream::from_std(at_client).unwrap();
        let connecting = tls::connect(mesh.client(Agent), Ipv4Addr::LOCALHOST.into(), at_client);
        let accepting = tls::accept(mesh.server(Kernel), at_server);
        let shaken = Box::pin(within(async { tokio::try_join!(connecting, accepting) })).await;
        let (mut at_client, mut at_server) = shaken.unwrap();
        assert_eq!(is_in_kernel(&at_server), mesh.can);
        // The first part is enough, if there is no room for the rest.
        let _ = beside.write(bytes).unwrap();
        let broken = async {
            let mut buffer = [0; 1000];
            loop {
                // Agents ping each other, too: of some of this the kernel tells only who writes.
                if let Err(error) = at_server.stream.write_all(b"ping").await {
                    return error;
                }
                if let Ok(read) = timeout(BLOCKED / 10, at_server.stream.read(&mut buffer)).await {
                    return read.expect_err(what);
                }
            }
        };
        let error = within(broken).await;
        assert_ne!(error.kind(), ErrorKind::UnexpectedEof, "{what}: {error}");
        if what == "forged" {
            let told = within(at_client.stream.read_to_end(&mut Vec::new()))
                .await
                .unwrap_err();
            assert!(told.to_string().contains("BadRecordMac"), "{told}");
        }
    }
}

#[tokio::test]
async fn who_speaks_no_tls_is_not_waited_for() {
    let mesh = Mesh::new();
    let (mut at_client, at_server) = sockets().await;
    at_client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let error = within(tls::accept(mesh.server(Kernel), at_server))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
}

#[tokio::test]
async fn nothing_is_lost_when_an_end_follows_on_a_full_buffer() {
    let mesh = Mesh::new();
    for round in 0..40 {
        let (at_client, at_server) = mesh.sessions(Kernel, Kernel).await;
        let total = 600_000 + round * 1_111;
        let sending = tokio::spawn(send(at_client.stream, total));
        assert_eq!(within(receive(at_server.stream)).await, total);
        sending.await.unwrap();
    }
}

/// A client in our own hands. Its last flight is left to be sent.
fn shake_hands(config: Arc<ClientConfig>, socket: &mut StdStream) -> ClientConnection {
    let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    let mut session = ClientConnection::new(config, name).unwrap();
    socket.set_nonblocking(false).unwrap();
    loop {
        if !session.is_handshaking() {
            return session;
        }
        socket.write_all(&flight(&mut session)).unwrap();
        session.read_tls(socket).unwrap();
        session.process_new_packets().unwrap();
    }
}

/// What a session has to send.
fn flight(session: &mut ClientConnection) -> Vec<u8> {
    let mut flight = Vec::new();
    while session.wants_write() {
        session.write_tls(&mut flight).unwrap();
    }
    flight
}

/// Bytes that wait to be read.
fn waiting(socket: &StdStream) -> libc::c_int {
    let mut bytes = 0;
    // SAFETY: the request writes one int.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    assert_eq!(result, 0);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_with_the_end_of_a_handshake_is_not_lost() {
    let mesh = Mesh::new();
    const SENT: usize = 40_000;
    // Where the first packet ends: after the handshake, in a record's head, in its content, in the next record.
    for beyond in [0, 3, 5_000, 25_000, SENT] {
        let (at_client, at_server) = sockets().await;
        let at_server = at_server.into_std().unwrap();
        let beside = at_server.try_clone().unwrap();
        let at_server = TcpStream::from_std(at_server).unwrap();
        let accepting = tokio::spawn(tls::accept(mesh.server(Kernel), at_server));
        let config = mesh.client(Agent);
        let mut socket = at_client.into_std().unwrap();
        let sending = tokio::task::spawn_blocking(move || {
            let mut session = shake_hands(config, &mut socket);
            let mut last = flight(&mut session);
            let cut = last.len() + beyond;
            session.writer().write_all(&pattern(0, SENT)).unwrap();
            session.send_close_notify();
            last.append(&mut flight(&mut session));
            socket.write_all(&last[..cut]).unwrap();
            until("the server to have read it, or to be done", LONG, || {
                (waiting(&beside) == 0 || accepting.is_finished()).then_some(())
            })
            .unwrap();
            socket.write_all(&last[cut..]).unwrap();
            (accepting, socket)
        });
        let (accepting, _socket) = within(sending).await.unwrap();
        let session = within(accepting).await.unwrap().unwrap();
        assert_eq!(is_in_kernel(&session), mesh.can);
        assert_eq!(within(receive(session.stream)).await, SENT, "{beyond}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_keys_is_done_before_and_refused_after() {
    let mesh = Mesh::new();
    for at_once in [true, false] {
        let (at_client, at_server) = sockets().await;
        let accepting = tokio::spawn(tls::accept(mesh.server(Kernel), at_server));
        let config = mesh.client(Agent);
        let changing = tokio::task::spawn_blocking(move || {
            let mut socket = at_client.into_std().unwrap();
            let mut session = shake_hands(config, &mut socket);
            if !at_once {
                session.writer().write_all(b"old").unwrap();
            }
            session.refresh_traffic_keys().unwrap();
            session.writer().write_all(b"new").unwrap();
            session.send_close_notify();
            socket.write_all(&flight(&mut session)).unwrap();
            (session, socket)
        });
        let (mut session, mut socket) = within(changing).await.unwrap();
        let mut at_server = within(accepting).await.unwrap().unwrap();
        assert_eq!(is_in_kernel(&at_server), mesh.can);
        let mut received = Vec::new();
        let read = within(at_server.stream.read_to_end(&mut received)).await;
        let refused = mesh.can && !at_once;
        match read {
            Ok(_) => assert!(!refused && received.ends_with(b"new"), "{received:?}"),
            Err(error) => {
                assert_eq!(
                    (error.kind(), &received[..]),
                    (ErrorKind::InvalidData, &b"old"[..])
                );
                assert!(refused);
            }
        }
        if !refused {
            at_server.stream.write_all(b"answer").await.unwrap();
        }
        let told = tokio::task::spawn_blocking(move || {
            let mut answer = vec![0; 6];
            loop {
                if session.reader().read_exact(&mut answer).is_ok() {
                    return Ok::<_, Error>(answer);
                }
                session.read_tls(&mut socket).unwrap();
                session.process_new_packets()?;
            }
        });
        match within(told).await.unwrap() {
            Ok(answer) => assert!(!refused && answer == b"answer"),
            Err(error) => {
                assert_eq!(error, Error::AlertReceived(AlertDescription::UnexpectedMessage));
                assert!(refused);
            }
        }
    }
}

#[tokio::test]
async fn tickets_are_no_data() {
    let mesh = Mesh::new();
    let mut server = ServerConfig::clone(&mesh.server(Agent));
    server.session_storage = ServerSessionMemoryCache::new(16);
    server.send_tls13_tickets = 4;
    let (at_client, mut at_server) = sessions(mesh.client(Kernel), Arc::new(server)).await;
    assert_eq!(is_in_kernel(&at_client), mesh.can);
    at_server.stream.write_all(&pattern(0, 10)).await.unwrap();
    at_server.stream.shutdown().await.unwrap();
    assert_eq!(within(receive(at_client.stream)).await, 10);
}
