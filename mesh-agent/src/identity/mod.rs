//! Who this node's workloads are: their certificates, kept fresh.
//!
//! Invariants: a certificate exists for exactly the identities that [`Identities::ensure`] was last given, and
//! nobody can ask for another; a failed renewal keeps what is there. Keys stay inside [`Credential`].

mod ca;
mod clock;
mod credential;
mod folder;
mod issue;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use rustls::RootCertStore;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::model::Identity;

pub use clock::Clock;
pub use credential::Credential;
pub use folder::OpenError;

use ca::EmbeddedCa;
use folder::Folder;
use issue::{Issue, IssueError};

/// Between two looks at the wall clock, which may have jumped.
const CHECK_INTERVAL: Duration = Duration::from_mins(1);
/// After the first failed renewal; doubles with each.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// With half a lifetime left, hundreds of tries fit in.
const BACKOFF_MAX: Duration = Duration::from_mins(2);

/// The certificates of this node's workloads. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Identities {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    issuer: Box<dyn Issue>,
    trust_domain: Arc<str>,
    roots: Arc<RootCertStore>,
    clock: Clock,
    slots: RwLock<BTreeMap<Identity, Slot>>,
    /// One at a time asks the issuer, so nobody gets two certificates where one will do.
    issuing: Mutex<()>,
    wanted: Notify,
    issued: AtomicU64,
    failed: AtomicU64,
}

/// One identity that is wanted.
#[derive(Debug)]
struct Slot {
    credential: Option<Arc<Credential>>,
    renew_at: SystemTime,
    /// Set while asking fails.
    retry: Option<Retry>,
}

#[derive(Debug)]
struct Retry {
    at: Instant,
    failures: u32,
    error: String,
}

/// A certificate as the admin page shows it; never a key.
#[derive(Clone, Debug)]
pub struct CertificateStatus {
    pub identity: Identity,
    pub state: CertificateState,
    /// Absent when no certificate could be had yet.
    pub certificate: Option<CertificateInfo>,
    /// Why the last renewal failed.
    pub error: Option<String>,
}

#[derive(Clone, Debug)]
pub struct CertificateInfo {
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateState {
    Valid,
    /// Valid still, but the last try to renew it failed.
    RenewalFailing,
    /// Not to be had yet.
    Missing,
    /// Expired, or by this node's clock not yet valid.
    Invalid,
}

impl CertificateState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::RenewalFailing => "renewal-failing",
            Self::Missing => "missing",
            Self::Invalid => "invalid",
        }
    }
}

/// How often the issuer was asked since the start, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub issued: u64,
    pub failed: u64,
}

impl Identities {
    /// Certificates from the CA whose root is in `directory`; the root is made when it is not there.
    pub fn open_embedded(directory: &Path, trust_domain: &str) -> Result<Self, OpenError> {
        Self::open_embedded_with(directory, trust_domain, Clock::system())
    }

    /// As [`open_embedded`](Self::open_embedded), by another clock than the system's.
    pub fn open_embedded_with(directory: &Path, trust_domain: &str, clock: Clock) -> Result<Self, OpenError> {
        let trust_domain = Arc::from(trust_domain);
        let ca = EmbeddedCa::open(&Folder::open(directory)?, &trust_domain, clock.now())?;
        let roots = ca.roots()?;
        Ok(Self::new(Box::new(ca), trust_domain, roots, clock))
    }

    fn new(issuer: Box<dyn Issue>, trust_domain: Arc<str>, roots: RootCertStore, clock: Clock) -> Self {
        Self {
            shared: Arc::new(Shared {
                issuer,
                trust_domain,
                roots: Arc::new(roots),
                clock,
                slots: RwLock::default(),
                issuing: Mutex::default(),
                wanted: Notify::new(),
                issued: AtomicU64::new(0),
                failed: AtomicU64::new(0),
            }),
        }
    }

    /// Makes `wanted` the identities that have certificates: missing ones are asked for at once, others dropped.
    pub fn ensure(&self, wanted: &BTreeSet<Identity>) {
        let now = self.shared.clock.now();
        {
            let mut slots = self.write();
            slots.retain(|identity, _| wanted.contains(identity));
            for identity in wanted {
                if !slots.contains_key(identity) {
                    slots.insert(identity.clone(), Slot::empty(now));
                }
            }
        }
        self.renew_due();
        self.shared.wanted.notify_one();
    }

    /// The certificate that a workload with this identity shows now. `None` for identities not of this node.
    pub fn current(&self, identity: &Identity) -> Option<Arc<Credential>> {
        self.read().get(identity)?.credential.clone()
    }

    /// Whom this node's workloads trust.
    pub fn roots(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.shared.roots)
    }

    pub fn trust_domain(&self) -> &Arc<str> {
        &self.shared.trust_domain
    }

    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// All certificates, in order of identity.
    pub fn list(&self) -> Vec<CertificateStatus> {
        let now = self.shared.clock.now();
        self.read()
            .iter()
            .map(|(identity, slot)| slot.status(identity, now))
            .collect()
    }

    pub fn counts(&self) -> Counts {
        Counts {
            issued: self.shared.issued.load(Ordering::Relaxed),
            failed: self.shared.failed.load(Ordering::Relaxed),
        }
    }

    /// Renews certificates when half of their life is over. Runs until dropped.
    pub async fn run(&self) {
        loop {
            let wait = self.renew_due();
            tokio::select! {
                () = self.shared.wanted.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Asks for all certificates that are due, and tells when to come again.
    fn renew_due(&self) -> Duration {
        let _one = self.shared.issuing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.shared.clock.now();
        let due: Vec<Identity> = self
            .read()
            .iter()
            .filter(|(_, slot)| slot.wait(now).is_zero())
            .map(|(identity, _)| identity.clone())
            .collect();
        for identity in due {
            let answer = self.shared.issuer.issue(&identity, now);
            self.settle(&identity, answer, now);
        }
        self.read()
            .values()
            .map(|slot| slot.wait(now))
            .min()
            .map_or(CHECK_INTERVAL, |wait| wait.min(CHECK_INTERVAL))
    }

    fn settle(&self, identity: &Identity, answer: Result<Credential, IssueError>, now: SystemTime) {
        let counter = match &answer {
            Ok(_) => &self.shared.issued,
            Err(_) => &self.shared.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let mut slots = self.write();
        // It may have been dropped from the wanted ones meanwhile.
        let Some(slot) = slots.get_mut(identity) else {
            return;
        };
        match answer {
            Ok(credential) => {
                tracing::debug!(%identity, serial = credential.serial, "new certificate");
                slot.renew_at = renewal(now, credential.not_after);
                slot.credential = Some(Arc::new(credential));
                slot.retry = None;
            }
            Err(error) => {
                let failures = slot.retry.as_ref().map_or(0, |retry| retry.failures) + 1;
                let backoff = backoff(failures);
                tracing::warn!(%identity, %error, failures, retry_in = ?backoff, "no new certificate");
                slot.retry = Some(Retry {
                    at: Instant::now() + backoff,
                    failures,
                    error: error.to_string(),
                });
            }
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<Identity, Slot>> {
        self.shared.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<Identity, Slot>> {
        self.shared.slots.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn empty(now: SystemTime) -> Self {
        Self {
            credential: None,
            renew_at: now,
            retry: None,
        }
    }

    /// Until a certificate is to be asked for; zero when it is due.
    fn wait(&self, now: SystemTime) -> Duration {
        if let Some(retry) = &self.retry {
            return retry.at.saturating_duration_since(Instant::now());
        }
        match &self.credential {
            // The clock was set back to before it begins.
            Some(credential) if now < credential.not_before => Duration::ZERO,
            _ => self.renew_at.duration_since(now).unwrap_or(Duration::ZERO),
        }
    }

    fn status(&self, identity: &Identity, now: SystemTime) -> CertificateStatus {
        let state = match &self.credential {
            None => CertificateState::Missing,
            Some(held) if now < held.not_before || now >= held.not_after => CertificateState::Invalid,
            Some(_) if self.retry.is_some() => CertificateState::RenewalFailing,
            Some(_) => CertificateState::Valid,
        };
        CertificateStatus {
            identity: identity.clone(),
            state,
            certificate: self.credential.as_deref().map(|held| CertificateInfo {
                serial: held.serial.clone(),
                not_before: held.not_before,
                not_after: held.not_after,
            }),
            error: self.retry.as_ref().map(|retry| retry.error.clone()),
        }
    }
}

/// Half of the life that is left, give or take a tenth, so that a node's certificates do not renew all at once.
fn renewal(now: SystemTime, not_after: SystemTime) -> SystemTime {
    let life = not_after.duration_since(now).unwrap_or(Duration::ZERO);
    now + life.mul_f64(0.45 + 0.1 * fastrand::f64())
}

/// Doubles with each failure, with a random share off.
fn backoff(failures: u32) -> Duration {
    let doubled = BACKOFF_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(BACKOFF_MAX).mul_f64(0.5 + 0.5 * fastrand::f64())
}
