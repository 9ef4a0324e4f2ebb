//! Where certificates come from.
//!
//! One implementation today, the embedded CA. Invariant: only [`Identities`](super::Identities) calls it, and
//! only for the identities of this node's workloads.

use std::fmt::Debug;
use std::time::SystemTime;

use crate::model::Identity;

use super::Credential;

/// Makes a fresh key and a certificate for it.
pub(super) trait Issue: Debug + Send + Sync {
    fn issue(&self, identity: &Identity, now: SystemTime) -> Result<Credential, IssueError>;
}

#[derive(Debug, thiserror::Error)]
pub(super) enum IssueError {
    #[error("{0} is not in this CA's trust domain")]
    TrustDomain(Identity),
    #[error("the CA's own certificate has expired; replace the root in identity.ca.directory")]
    RootExpired,
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("cannot use the new key: {0}")]
    Key(#[from] rustls::Error),
}
