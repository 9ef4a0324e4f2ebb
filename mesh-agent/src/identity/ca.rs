//! The embedded CA: one root, kept in a folder, that signs the certificates of this node's workloads.
//!
//! Invariants: agents that share a folder use one root, whoever came first; a key that others may read, a pair
//! that does not match, or half of a pair is refused, never replaced.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::model::Identity;

use super::Credential;
use super::folder::{Folder, OpenError};
use super::issue::{Issue, IssueError};

const ROOT_LIFETIME: Duration = Duration::from_hours(10 * 365 * 24);
/// Short, so that a stolen key is soon worthless without revocation lists.
pub(super) const WORKLOAD_LIFETIME: Duration = Duration::from_hours(24);
/// Certificates begin this long ago, for peers whose clocks run behind; Istio's grace.
const BACKDATE: Duration = Duration::from_mins(2);

pub(super) struct EmbeddedCa {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    root_not_after: SystemTime,
    /// Trusted, not signed with: the next or the last root while roots are being exchanged.
    extra_roots: Vec<CertificateDer<'static>>,
    trust_domain: Arc<str>,
}

impl EmbeddedCa {
    /// Reads the folder's root, or makes one when the folder has none.
    pub(super) fn open(folder: &Folder, trust_domain: &Arc<str>, now: SystemTime) -> Result<Self, OpenError> {
        let (key, certificate) = match folder.read()? {
            (Some(key), Some(certificate)) => (key, certificate),
            _ => create(folder, trust_domain, now)?,
        };
        let key = KeyPair::from_pem(&key).map_err(|source| OpenError::Key {
            path: folder.key(),
            source,
        })?;
        let refuse = |reason: &str| OpenError::Certificate {
            path: folder.certificate(),
            reason: reason.to_owned(),
        };
        let root = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|_| refuse("not a certificate in PEM"))?;
        let (_, parsed) = X509Certificate::from_der(&root).map_err(|_| refuse("not an X.509 certificate"))?;
        if !parsed.is_ca() {
            return Err(refuse("not the certificate of a CA (basicConstraints CA:TRUE)"));
        }
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(OpenError::Mismatch {
                key: folder.key(),
                certificate: folder.certificate(),
            });
        }
        let root_not_after = from_timestamp(parsed.validity().not_after.timestamp());
        if root_not_after <= now {
            return Err(refuse(
                "expired; move it and its key away, and a new root is made",
            ));
        }
        let issuer =
            Issuer::from_ca_cert_der(&root, key).map_err(|error| refuse(&format!("unusable: {error}")))?;
        let extra_roots = CertificateDer::pem_slice_iter(folder.extra_roots()?.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|_| OpenError::Certificate {
                path: folder.roots(),
                reason: "not a list of certificates in PEM".to_owned(),
            })?;
        Ok(Self {
            issuer,
            root,
            root_not_after,
            extra_roots,
            trust_domain: Arc::clone(trust_domain),
        })
    }

    /// Whom this node's workloads trust.
    pub(super) fn roots(&self) -> Result<RootCertStore, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone())?;
        for root in &self.extra_roots {
            roots.add(root.clone())?;
        }
        Ok(roots)
    }
}

impl Issue for EmbeddedCa {
    fn issue(&self, identity: &Identity, now: SystemTime) -> Result<Credential, IssueError> {
        if identity.trust_domain != self.trust_domain {
            return Err(IssueError::TrustDomain(identity.clone()));
        }
        let not_before = whole_seconds(now - BACKDATE);
        let not_after = whole_seconds(now + WORKLOAD_LIFETIME).min(self.root_not_after);
        if not_after <= now {
            return Err(IssueError::RootExpired);
        }
        let serial = serial();
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;

        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let signing_key = any_ecdsa_type(&key.into())?;
        Ok(Credential {
            identity: identity.clone(),
            certified: Arc::new(CertifiedKey::new(vec![certificate.into()], signing_key)),
            serial: format!("{:032x}", u128::from_be_bytes(serial)),
            not_before,
            not_after,
        })
    }
}

/// Never the key.
impl fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedCa")
            .field("trust_domain", &self.trust_domain)
            .field("root_not_after", &self.root_not_after)
            .finish_non_exhaustive()
    }
}

/// Makes what the folder lacks, under its lock; another agent may have done it meanwhile.
fn create(folder: &Folder, trust_domain: &str, now: SystemTime) -> Result<(String, String), OpenError> {
    let _lock = folder.lock()?;
    let unusable = |source| OpenError::Key {
        path: folder.key(),
        source,
    };
    let key = match folder.read()? {
        (Some(key), Some(certificate)) => return Ok((key, certificate)),
        // Somebody died between the two files: the key has signed nothing yet, and becomes the root.
        (Some(key), None) => KeyPair::from_pem(&key).map_err(unusable)?,
        (None, Some(_)) => {
            return Err(OpenError::KeyMissing {
                key: folder.key(),
                certificate: folder.certificate(),
            });
        }
        (None, None) => {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(unusable)?;
            folder.write_key(&key.serialize_pem())?;
            key
        }
    };
    let certificate = self_signed(&key, trust_domain, now).map_err(unusable)?;
    folder.write_certificate(&certificate)?;
    tracing::info!(path = %folder.certificate().display(), trust_domain, "made a new root");
    Ok((key.serialize_pem(), certificate))
}

fn self_signed(key: &KeyPair, trust_domain: &str, now: SystemTime) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial()));
    params.not_before = whole_seconds(now - BACKDATE).into();
    params.not_after = whole_seconds(now + ROOT_LIFETIME).into();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain);
    // Named after its key: a certificate of another root is then seen to be that, not to be forged.
    let key_name: String = key
        .public_key_raw()
        .iter()
        .skip(1)
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("mesh-agent root {key_name}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params.self_signed(key)?.pem())
}

/// Random; positive and of one length, so that everybody prints it alike.
fn serial() -> [u8; 16] {
    let mut serial = uuid::Uuid::new_v4().into_bytes();
    serial[0] = serial[0] & 0x7f | 0x40;
    serial
}

/// X.509 counts seconds; what is listed must be what the certificate says.
fn whole_seconds(time: SystemTime) -> SystemTime {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs()),
        Err(_) => SystemTime::UNIX_EPOCH,
    }
}

fn from_timestamp(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
