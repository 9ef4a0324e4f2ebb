//! TLS between agents, and with other meshes that speak HBONE: rustls configurations from identities.
//!
//! Invariants: TLS 1.3 only, both sides show a certificate of the trust domain, nothing is resumed and nothing is
//! sent early (so identities are checked in full at each handshake); the certificate is looked up at each
//! handshake, so a renewed one is used at once and open connections go on. No process-wide defaults.

mod kernel;
mod records;
mod session;
#[cfg(test)]
mod tests;
mod verify;

use std::io;
use std::sync::{Arc, LazyLock};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, VerifierBuilderError};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, ServerConfig, SignatureScheme, SupportedCipherSuite};

use crate::identity::Identities;
use crate::model::Identity;

pub use kernel::{KernelStream, Unsupported, probe as probe_kernel};
pub use records::Records;
pub use session::{Session, Stream, accept, connect};
pub use verify::{PeerError, peer_identity};

use verify::{ClientVerifier, ServerVerifier};

/// HTTP requests as HTTP/2 requests, between two of our agents.
const ALPN_NATIVE: &[u8] = b"mesh-agent/1";
/// HTTP/2 CONNECT, as Istio's ztunnel offers it.
const ALPN_HBONE: &[u8] = b"h2";

/// Who encrypts a connection after its handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecordLayer {
    /// rustls.
    #[default]
    Agent,
    /// The kernel, where the peer agrees to ChaCha20-Poly1305; rustls otherwise.
    Kernel,
}

impl RecordLayer {
    fn provider(self) -> &'static Arc<CryptoProvider> {
        match self {
            Self::Agent => &PROVIDER,
            Self::Kernel => &KERNEL_PROVIDER,
        }
    }
}

/// What both sides agreed to speak on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Native,
    Hbone,
}

impl Transport {
    /// By the connection's `alpn_protocol()`. `None` when the peer did not say: such a connection is closed.
    pub fn negotiated(alpn: Option<&[u8]>) -> Option<Self> {
        match alpn? {
            ALPN_NATIVE => Some(Self::Native),
            ALPN_HBONE => Some(Self::Hbone),
            _ => None,
        }
    }
}

/// Why there is no TLS for a workload.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{0} has no certificate (yet)")]
    NoCertificate(Identity),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error(transparent)]
    Roots(#[from] VerifierBuilderError),
}

/// For a workload's port 15008. Made once per workload, good for all its connections.
pub fn server_config(
    identities: &Identities,
    workload: &Identity,
    layer: RecordLayer,
) -> Result<Arc<ServerConfig>, ConfigError> {
    let verifier = ClientVerifier::new(identities, &PROVIDER)?;
    let clock = Arc::new(identities.clock().clone());
    let mut config = ServerConfig::builder_with_details(Arc::clone(layer.provider()), clock)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(Held::new(identities, workload)));
    config.alpn_protocols = vec![ALPN_NATIVE.to_vec(), ALPN_HBONE.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    if layer == RecordLayer::Kernel {
        config.enable_secret_extraction = true;
        config.ignore_client_order = true;
    }
    Ok(Arc::new(config))
}

/// For connections of `source` to a server that must be `expected`; the server picks the [`Transport`].
///
/// Cheap beside a handshake, so it is not kept for the next one.
pub fn client_config(
    identities: &Identities,
    source: &Identity,
    expected: &Identity,
    layer: RecordLayer,
) -> Result<Arc<ClientConfig>, ConfigError> {
    client(identities, source, expected, layer, &[ALPN_NATIVE, ALPN_HBONE])
}

/// As [`client_config`], for streams that need [`Transport::Hbone`].
pub fn client_config_hbone(
    identities: &Identities,
    source: &Identity,
    expected: &Identity,
    layer: RecordLayer,
) -> Result<Arc<ClientConfig>, ConfigError> {
    client(identities, source, expected, layer, &[ALPN_HBONE])
}

/// Who the peer was instead, when that is why a handshake failed.
pub fn peer_error(error: &io::Error) -> Option<&PeerError> {
    PeerError::of(error.get_ref()?.downcast_ref()?)
}

/// aws-lc-rs, with the post-quantum key exchange preferred.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        kx_groups: vec![
            kx_group::X25519MLKEM768,
            kx_group::X25519,
            kx_group::SECP256R1,
            kx_group::SECP384R1,
        ],
        ..aws_lc_rs::default_provider()
    })
});

/// The same with the suite ahead that the [kernel] is given.
static KERNEL_PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = CryptoProvider::clone(&PROVIDER);
    // Stable: what comes after it keeps its order.
    let is_other =
        |suite: &SupportedCipherSuite| suite.suite() != CipherSuite::TLS13_CHACHA20_POLY1305_SHA256;
    provider.cipher_suites.sort_by_key(is_other);
    Arc::new(provider)
});

fn algorithms() -> WebPkiSupportedAlgorithms {
    PROVIDER.signature_verification_algorithms
}

fn client(
    identities: &Identities,
    source: &Identity,
    expected: &Identity,
    layer: RecordLayer,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, ConfigError> {
    if identities.current(source).is_none() {
        return Err(ConfigError::NoCertificate(source.clone()));
    }
    let verifier = ServerVerifier::new(identities, expected, algorithms());
    let clock = Arc::new(identities.clock().clone());
    let mut config = ClientConfig::builder_with_details(Arc::clone(layer.provider()), clock)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(Held::new(identities, source)));
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.enable_secret_extraction = layer == RecordLayer::Kernel;
    Ok(Arc::new(config))
}

/// The certificate that a workload has at the time of a handshake.
#[derive(Debug)]
struct Held {
    identities: Identities,
    workload: Identity,
}

impl Held {
    fn new(identities: &Identities, workload: &Identity) -> Self {
        Self {
            identities: identities.clone(),
            workload: workload.clone(),
        }
    }

    fn current(&self) -> Option<Arc<CertifiedKey>> {
        let credential = self.identities.current(&self.workload)?;
        Some(Arc::clone(&credential.certified))
    }
}

impl ResolvesServerCert for Held {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current()
    }
}

impl ResolvesClientCert for Held {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.current()
    }

    fn has_certs(&self) -> bool {
        true
    }
}
