//! Certificates for the contestants that get theirs as files: one authority per turn.

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

use crate::proxies::write_config;
use crate::world::World;

pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

/// PEM files.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) certificate: String,
    pub(crate) key: String,
    pub(crate) root: String,
}

impl Authority {
    pub(crate) fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
        })
    }

    pub(crate) fn issue(&self, world: &World, name: &str) -> Result<Files> {
        let mut params = CertificateParams::default();
        // Else it is called as its issuer is, and taken for a root.
        params.distinguished_name.push(DnType::CommonName, name);
        let id = format!("spiffe://cluster.local/ns/shop/sa/{name}");
        params.subject_alt_names = vec![SanType::URI(id.try_into()?), SanType::DnsName(name.try_into()?)];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        let write = |kind: &str, text: &str| write_config(world, &format!("{name}-{kind}.pem"), text);
        Ok(Files {
            certificate: write("certificate", &certificate)?,
            key: write("key", &key.serialize_pem())?,
            root: write("root", &self.certificate)?,
        })
    }
}
