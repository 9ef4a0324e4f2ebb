//! A proxy that decides nothing: bytes as they come, to the one place that is behind a port, and back.
//!
//! It tells about what the hops cost by themselves, with tokio and rustls: each client's connection has one task and one
//! connection of its own behind it, and a request and its answer take two reads and two writes. Only a proxy that
//! carries many connections' bytes in one can do with less. `relay LISTEN=TO...` speaks TCP on both sides; of two at
//! the ends of a way `relay-tls client CERTIFICATE KEY ROOT LISTEN=TO...` speaks TLS 1.3 behind, `relay-tls
//! server ...` in front, and each wants the other's certificate.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Of each direction: four TLS records, as many as rustls takes before it has to send.
const BUFFER: usize = 65_536;
/// What the server's certificate says.
const SERVER: &str = "server";

#[derive(Clone)]
enum Wire {
    Plain,
    /// TLS to what is behind.
    Client(TlsConnector),
    /// TLS from who is in front.
    Server(TlsAcceptor),
}

pub(crate) async fn run(ways: &[&str]) -> Result<()> {
    serve(&Wire::Plain, ways).await
}

pub(crate) async fn run_tls(end: &str, files: [&str; 3], ways: &[&str]) -> Result<()> {
    let [certificate, key, root] = files;
    let chain = vec![CertificateDer::from_pem_file(certificate)?];
    let key = PrivateKeyDer::from_pem_file(key)?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(root)?)?;
    let wire = match end {
        "client" => {
            let config =
                ClientConfig::builder_with_protocol_versions(&[&TLS13]).with_root_certificates(roots);
            Wire::Client(Arc::new(config.with_client_auth_cert(chain, key)?).into())
        }
        "server" => {
            let verifier = WebPkiClientVerifier::builder(roots.into()).build()?;
            let config =
                ServerConfig::builder_with_protocol_versions(&[&TLS13]).with_client_cert_verifier(verifier);
            Wire::Server(Arc::new(config.with_single_cert(chain, key)?).into())
        }
        other => bail!("{other} is neither `client` nor `server`"),
    };
    serve(&wire, ways).await
}

/// Until one of the listeners fails.
async fn serve(wire: &Wire, ways: &[&str]) -> Result<()> {
    let mut listeners = JoinSet::new();
    for way in ways {
        let (listen, to) = way
            .split_once('=')
            .with_context(|| format!("{way} is not LISTEN=TO"))?;
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot listen at {listen}"))?;
        listeners.spawn(listen_at(listener, to.parse()?, wire.clone()));
    }
    let ended = listeners.join_next().await.context("nowhere to listen at")?;
    Err(ended?)
}

async fn listen_at(listener: TcpListener, to: SocketAddr, wire: Wire) -> anyhow::Error {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let wire = wire.clone();
                tokio::spawn(async move {
                    if let Err(error) = relay(stream, to, wire).await {
                        eprintln!("{error:#}");
                    }
                });
            }
            Err(error) => return anyhow!(error).context("accept"),
        }
    }
}

async fn relay(front: TcpStream, to: SocketAddr, wire: Wire) -> Result<()> {
    let behind = TcpStream::connect(to)
        .await
        .with_context(|| format!("cannot reach {to}"))?;
    front.set_nodelay(true)?;
    behind.set_nodelay(true)?;
    match wire {
        Wire::Plain => copy(front, behind).await,
        Wire::Client(tls) => copy(front, tls.connect(ServerName::try_from(SERVER)?, behind).await?).await,
        Wire::Server(tls) => copy(tls.accept(front).await?, behind).await,
    }
}

async fn copy(
    mut front: impl AsyncRead + AsyncWrite + Unpin,
    mut behind: impl AsyncRead + AsyncWrite + Unpin,
) -> Result<()> {
    // Who ends a connection the hard way says nothing new.
    let _ended = copy_bidirectional_with_sizes(&mut front, &mut behind, BUFFER, BUFFER).await;
    Ok(())
}
