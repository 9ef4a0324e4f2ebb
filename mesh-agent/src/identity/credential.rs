//! A workload's certificate with its key.
//!
//! Invariant: the key never leaves this type except inside rustls, and is never printed.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::sign::CertifiedKey;

use crate::model::Identity;

/// What a workload shows to its peers.
pub struct Credential {
    pub identity: Identity,
    pub certified: Arc<CertifiedKey>,
    /// Lower-case hexadecimal, as openssl prints it without colons.
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("identity", &self.identity)
            .field("serial", &self.serial)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}
