//! Real handshakes in memory, between our configurations and peers that are wrong in one way each.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConnection, DigitallySignedStruct, Error, HandshakeKind, NamedGroup,
    ServerConnection,
};
use tempfile::TempDir;

use super::*;

const REVIEWS: &str = "spiffe://cluster.local/ns/shop/sa/reviews";
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

/// A CA, with certificates for a client and a server.
struct Mesh {
    dir: TempDir,
    identities: Identities,
}

impl Mesh {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let identities = Identities::open_embedded(dir.path(), "cluster.local").unwrap();
        identities.ensure(&BTreeSet::from([id(REVIEWS), id(CLIENT)]));
        Self { dir, identities }
    }

    fn server(&self) -> ServerConnection {
        ServerConnection::new(server_config(&self.identities, &id(REVIEWS), RecordLayer::Agent).unwrap())
            .unwrap()
    }

    fn client(&self, expected: &str) -> ClientConnection {
        connect(client_config(&self.identities, &id(CLIENT), &id(expected), RecordLayer::Agent).unwrap())
    }

    /// A certificate of this CA that the CA would not issue.
    fn odd(&self, change: impl FnOnce(&mut CertificateParams)) -> Arc<CertifiedKey> {
        let pem = |file| std::fs::read_to_string(self.dir.path().join(file)).unwrap();
        let ca_key = KeyPair::from_pem(&pem("ca-key.pem")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&pem("ca-cert.pem"), ca_key).unwrap();
        let (params, key) = params(change);
        certified(params.signed_by(&key, &issuer).unwrap(), key)
    }
}

fn id(identity: &str) -> Identity {
    identity.parse().unwrap()
}

fn uri(uri: &str) -> SanType {
    SanType::URI(uri.try_into().unwrap())
}

fn params(change: impl FnOnce(&mut CertificateParams)) -> (CertificateParams, KeyPair) {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri(REVIEWS)];
    params.not_before = (SystemTime::now() - Duration::from_hours(1)).into();
    params.not_after = (SystemTime::now() + Duration::from_hours(1)).into();
    change(&mut params);
    (params, KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap())
}

fn certified(certificate: rcgen::Certificate, key: KeyPair) -> Arc<CertifiedKey> {
    let key = any_ecdsa_type(&key.into()).unwrap();
    Arc::new(CertifiedKey::new(vec![certificate.into()], key))
}

/// Shows whatever it was given.
#[derive(Debug)]
struct Shows(Option<Arc<CertifiedKey>>);

impl ResolvesServerCert for Shows {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }
}

impl ResolvesClientCert for Shows {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

/// A client that believes every server.
#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

fn odd_server(shows: Arc<CertifiedKey>) -> ServerConnection {
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Shows(Some(shows))));
    config.alpn_protocols = vec![ALPN_NATIVE.to_vec()];
    ServerConnection::new(Arc::new(config)).unwrap()
}

fn odd_client(shows: Option<Arc<CertifiedKey>>, alpn: &[u8]) -> ClientConnection {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible))
        .with_client_cert_resolver(Arc::new(Shows(shows)));
    config.alpn_protocols = vec![alpn.to_vec()];
    connect(Arc::new(config))
}

fn connect(config: Arc<ClientConfig>) -> ClientConnection {
    ClientConnection::new(
        config,
        ServerName::IpAddress(std::net::IpAddr::from([192, 0, 2, 1]).into()),
    )
    .unwrap()
}

/// Carries bytes to and fro until neither side has more to say; tells how each side ended.
fn shake(
    client: &mut ClientConnection,
    server: &mut ServerConnection,
) -> (Result<(), Error>, Result<(), Error>) {
    let (mut client_end, mut server_end) = (Ok(()), Ok(()));
    while client.wants_write() || server.wants_write() {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        deliver(&wire, |bytes| server.read_tls(bytes));
        if server_end.is_ok() {
            server_end = server.process_new_packets().map(|_| ());
        }
        wire.clear();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        deliver(&wire, |bytes| client.read_tls(bytes));
        if client_end.is_ok() {
            client_end = client.process_new_packets().map(|_| ());
        }
    }
    (client_end, server_end)
}

fn deliver(mut bytes: &[u8], mut read: impl FnMut(&mut dyn Read) -> io::Result<usize>) {
    while !bytes.is_empty() && read(&mut bytes).is_ok_and(|read| read > 0) {}
}

/// What our client says of a server that shows `shows`.
fn judge_server(mesh: &Mesh, shows: Arc<CertifiedKey>) -> Result<(), Error> {
    shake(&mut mesh.client(REVIEWS), &mut odd_server(shows)).0
}

/// What our server says of a client that shows `shows`.
fn judge_client(mesh: &Mesh, shows: Option<Arc<CertifiedKey>>) -> Result<(), Error> {
    shake(&mut odd_client(shows, ALPN_HBONE), &mut mesh.server()).1
}

#[test]
fn both_sides_know_each_other() {
    let mesh = Mesh::new();
    let (mut client, mut server) = (mesh.client(REVIEWS), mesh.server());
    assert_eq!(shake(&mut client, &mut server), (Ok(()), Ok(())));
    assert_eq!(
        peer_identity(client.peer_certificates().unwrap()),
        Some(id(REVIEWS))
    );
    assert_eq!(
        peer_identity(server.peer_certificates().unwrap()),
        Some(id(CLIENT))
    );
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let group = client.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
    assert_eq!(server.server_name(), None);
}

#[test]
fn a_server_that_is_somebody_else_is_told_apart() {
    let mesh = Mesh::new();
    let expected = "spiffe://cluster.local/ns/shop/sa/ratings";
    let (refused, _) = shake(&mut mesh.client(expected), &mut mesh.server());
    let refused = refused.unwrap_err();
    let mismatch = PeerError::IdentityMismatch {
        expected: id(expected),
        presented: id(REVIEWS),
    };
    assert_eq!(PeerError::of(&refused), Some(&mismatch));
    let carried = io::Error::new(io::ErrorKind::InvalidData, refused);
    assert_eq!(peer_error(&carried), Some(&mismatch));
    assert_eq!(peer_error(&io::Error::other("something else")), None);
}

#[test]
fn odd_certificates_are_accepted_only_when_nothing_is_odd() {
    let mesh = Mesh::new();
    let dns: SanType = SanType::DnsName("reviews.shop".try_into().unwrap());
    for names in [vec![uri(REVIEWS)], vec![dns, uri(REVIEWS)]] {
        let good = mesh.odd(|params| params.subject_alt_names = names);
        assert_eq!(judge_server(&mesh, Arc::clone(&good)), Ok(()));
        assert_eq!(judge_client(&mesh, Some(good)), Ok(()));
    }
}

#[test]
fn certificates_without_exactly_one_workload_are_refused() {
    let mesh = Mesh::new();
    let dns: SanType = SanType::DnsName("reviews.shop".try_into().unwrap());
    for names in [
        vec![],
        vec![dns],
        vec![uri(REVIEWS), uri(CLIENT)],
        vec![uri(REVIEWS), uri(REVIEWS)],
        vec![uri("https://cluster.local/ns/shop/sa/reviews")],
        vec![uri("spiffe://cluster.local/ns/shop/sa/reviews/../client")],
        vec![uri("spiffe://cluster.local/ns/shop/sa/re\0views")],
    ] {
        let odd = mesh.odd(|params| params.subject_alt_names = names);
        for judged in [
            judge_server(&mesh, Arc::clone(&odd)),
            judge_client(&mesh, Some(odd)),
        ] {
            assert_eq!(PeerError::of(&judged.unwrap_err()), Some(&PeerError::NoIdentity));
        }
    }
}

#[test]
fn clients_of_another_trust_domain_are_refused() {
    let mesh = Mesh::new();
    let foreign = "spiffe://elsewhere/ns/shop/sa/client";
    let odd = mesh.odd(|params| params.subject_alt_names = vec![uri(foreign)]);
    let refused = judge_client(&mesh, Some(odd)).unwrap_err();
    assert_eq!(
        PeerError::of(&refused),
        Some(&PeerError::TrustDomain {
            trust_domain: "cluster.local".into(),
            presented: id(foreign)
        })
    );
}

#[test]
fn certificates_out_of_their_time_are_refused() {
    let mesh = Mesh::new();
    let expired = |params: &mut CertificateParams| {
        params.not_after = (SystemTime::now() - Duration::from_secs(1)).into();
    };
    let early = |params: &mut CertificateParams| {
        params.not_before = (SystemTime::now() + Duration::from_mins(1)).into();
    };
    for (odd, ours) in [(mesh.odd(expired), true), (mesh.odd(early), false)] {
        for judged in [
            judge_server(&mesh, Arc::clone(&odd)),
            judge_client(&mesh, Some(odd)),
        ] {
            let Err(Error::InvalidCertificate(reason)) = judged else {
                panic!("accepted: {judged:?}");
            };
            let is_expired = matches!(reason, CertificateError::ExpiredContext { .. });
            let is_early = matches!(reason, CertificateError::NotValidYetContext { .. });
            assert_eq!((is_expired, is_early), (ours, !ours), "{reason:?}");
        }
    }
}

#[test]
fn other_roots_are_refused() {
    let (mesh, other) = (Mesh::new(), Mesh::new());
    let (self_signed, key) = params(|_| ());
    let self_signed = certified(self_signed.self_signed(&key).unwrap(), key);
    for odd in [self_signed, other.odd(|_| ())] {
        for judged in [
            judge_server(&mesh, Arc::clone(&odd)),
            judge_client(&mesh, Some(odd)),
        ] {
            assert_eq!(
                judged,
                Err(Error::InvalidCertificate(CertificateError::UnknownIssuer))
            );
        }
    }
}

#[test]
fn a_second_root_is_believed_while_roots_are_exchanged() {
    let (mut mesh, next) = (Mesh::new(), Mesh::new());
    let path = |mesh: &Mesh, file| mesh.dir.path().join(file);
    std::fs::copy(path(&next, "ca-cert.pem"), path(&mesh, "root-cert.pem")).unwrap();
    mesh.identities = Identities::open_embedded(mesh.dir.path(), "cluster.local").unwrap();
    mesh.identities.ensure(&BTreeSet::from([id(REVIEWS), id(CLIENT)]));
    for odd in [mesh.odd(|_| ()), next.odd(|_| ())] {
        assert_eq!(judge_server(&mesh, Arc::clone(&odd)), Ok(()));
        assert_eq!(judge_client(&mesh, Some(odd)), Ok(()));
    }
}

#[test]
fn the_purpose_must_fit() {
    let mesh = Mesh::new();
    let only = |purpose| mesh.odd(|params| params.extended_key_usages = vec![purpose]);
    let (for_servers, for_clients) = (
        only(ExtendedKeyUsagePurpose::ServerAuth),
        only(ExtendedKeyUsagePurpose::ClientAuth),
    );
    assert_eq!(judge_server(&mesh, Arc::clone(&for_servers)), Ok(()));
    assert!(judge_client(&mesh, Some(for_servers)).is_err());
    assert_eq!(judge_client(&mesh, Some(Arc::clone(&for_clients))), Ok(()));
    assert!(judge_server(&mesh, for_clients).is_err());
}

#[test]
fn clients_must_show_a_certificate() {
    let mesh = Mesh::new();
    assert_eq!(judge_client(&mesh, None), Err(Error::NoCertificatesPresented));
    let nobody = id("spiffe://cluster.local/ns/shop/sa/nobody");
    assert!(matches!(
        client_config(&mesh.identities, &nobody, &id(REVIEWS), RecordLayer::Agent),
        Err(ConfigError::NoCertificate(who)) if who == nobody
    ));
}

#[test]
fn a_server_without_certificate_refuses() {
    let mesh = Mesh::new();
    let nobody = id("spiffe://cluster.local/ns/shop/sa/nobody");
    let config = server_config(&mesh.identities, &nobody, RecordLayer::Agent).unwrap();
    let mut server = ServerConnection::new(config).unwrap();
    let (client, server) = shake(&mut mesh.client(REVIEWS), &mut server);
    assert!(client.is_err() && server.is_err());
}

#[test]
fn tls_1_2_is_refused() {
    let byte = |length: usize| u8::try_from(length).unwrap();
    let mut hello = vec![0x03, 0x03];
    hello.extend([7; 32]);
    hello.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0]);
    // supported_groups: secp256r1; signature_algorithms: ecdsa_secp256r1_sha256
    let extensions = [0, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3];
    hello.extend([0, byte(extensions.len())]);
    hello.extend(extensions);
    let mut record = vec![22, 3, 1, 0, byte(hello.len() + 4), 1, 0, 0, byte(hello.len())];
    record.extend(hello);

    let mut server = Mesh::new().server();
    server.read_tls(&mut record.as_slice()).unwrap();
    server.process_new_packets().unwrap_err();
    let mut alert = Vec::new();
    server.write_tls(&mut alert).unwrap();
    const PROTOCOL_VERSION: u8 = 70;
    assert_eq!(alert, [21, 3, 3, 0, 2, 2, PROTOCOL_VERSION]);
}

#[test]
fn both_sides_agree_on_what_they_speak() {
    let mesh = Mesh::new();
    let hbone = client_config_hbone(&mesh.identities, &id(CLIENT), &id(REVIEWS), RecordLayer::Agent).unwrap();
    for (mut client, agreed) in [
        (mesh.client(REVIEWS), Transport::Native),
        (connect(hbone), Transport::Hbone),
    ] {
        let mut server = mesh.server();
        assert_eq!(shake(&mut client, &mut server), (Ok(()), Ok(())));
        for alpn in [client.alpn_protocol(), server.alpn_protocol()] {
            assert_eq!(Transport::negotiated(alpn), Some(agreed));
        }
    }
    let good = mesh.odd(|_| ());
    let (_, server) = shake(&mut odd_client(Some(good), b"http/1.1"), &mut mesh.server());
    assert_eq!(server, Err(Error::NoApplicationProtocol));
    assert_eq!(Transport::negotiated(None), None);
}

#[test]
fn nothing_is_resumed() {
    let mesh = Mesh::new();
    let config = client_config(&mesh.identities, &id(CLIENT), &id(REVIEWS), RecordLayer::Agent).unwrap();
    let serving = server_config(&mesh.identities, &id(REVIEWS), RecordLayer::Agent).unwrap();
    for _ in 0..2 {
        let mut client = connect(Arc::clone(&config));
        let mut server = ServerConnection::new(Arc::clone(&serving)).unwrap();
        assert_eq!(shake(&mut client, &mut server), (Ok(()), Ok(())));
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(client.tls13_tickets_received(), 0);
    }
}

#[test]
fn a_renewed_certificate_is_shown_next_and_old_connections_go_on() {
    let mesh = Mesh::new();
    let config = client_config(&mesh.identities, &id(CLIENT), &id(REVIEWS), RecordLayer::Agent).unwrap();
    let serving = server_config(&mesh.identities, &id(REVIEWS), RecordLayer::Agent).unwrap();
    let start = || {
        let mut client = connect(Arc::clone(&config));
        let mut server = ServerConnection::new(Arc::clone(&serving)).unwrap();
        assert_eq!(shake(&mut client, &mut server), (Ok(()), Ok(())));
        (client, server)
    };
    let (mut old_client, mut old_server) = start();
    mesh.identities.ensure(&BTreeSet::new());
    mesh.identities.ensure(&BTreeSet::from([id(REVIEWS), id(CLIENT)]));
    let (new_client, new_server) = start();
    assert_ne!(old_client.peer_certificates(), new_client.peer_certificates());
    assert_ne!(old_server.peer_certificates(), new_server.peer_certificates());

    old_client.writer().write_all(b"ping").unwrap();
    old_server.writer().write_all(b"pong").unwrap();
    assert_eq!(shake(&mut old_client, &mut old_server), (Ok(()), Ok(())));
    let mut heard = [0; 4];
    old_server.reader().read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"ping");
    old_client.reader().read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"pong");
}

#[test]
fn a_stolen_certificate_without_its_key_is_refused() {
    let mesh = Mesh::new();
    let genuine = mesh.odd(|_| ());
    let (_, key) = params(|_| ());
    let stolen = Arc::new(CertifiedKey::new(
        genuine.cert.clone(),
        any_ecdsa_type(&key.into()).unwrap(),
    ));
    let bad_signature = Err(Error::InvalidCertificate(CertificateError::BadSignature));
    assert_eq!(judge_server(&mesh, Arc::clone(&stolen)), bad_signature);
    assert_eq!(judge_client(&mesh, Some(stolen)), bad_signature);
}
