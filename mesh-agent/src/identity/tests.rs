//! The CA's folder, what certificates say, who gets them, and renewal by a clock that tests turn.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::AtomicBool;

use tempfile::TempDir;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::ca::WORKLOAD_LIFETIME;
use super::*;

fn identity(name: &str) -> Identity {
    format!("spiffe://cluster.local/ns/shop/sa/{name}")
        .parse()
        .unwrap()
}

fn open(dir: &TempDir) -> Result<Identities, OpenError> {
    Identities::open_embedded(dir.path(), "cluster.local")
}

/// The system's time at the start, moved on by tokio's clock, which tests pause.
fn tokio_clock() -> Clock {
    let (wall, start) = (SystemTime::now(), Instant::now());
    Clock::new(move || wall + start.elapsed())
}

#[test]
fn a_root_is_made_once_and_its_key_is_private() {
    let dir = TempDir::new().unwrap();
    let first = open(&dir).unwrap();
    let second = open(&dir).unwrap();
    assert_eq!(first.roots().roots, second.roots().roots);
    assert_eq!(
        dir.path().join("ca-key.pem").metadata().unwrap().mode() & 0o777,
        0o600
    );
}

#[test]
fn agents_that_start_at_once_agree_on_one_root() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("shared");
    let roots: Vec<_> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| Identities::open_embedded(&path, "cluster.local").unwrap().roots()))
            .collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    for root in &roots {
        assert_eq!(root.roots, roots[0].roots);
    }
}

#[test]
fn a_key_that_others_may_read_is_refused() {
    let dir = TempDir::new().unwrap();
    open(&dir).unwrap();
    let key = dir.path().join("ca-key.pem");
    for mode in [0o640, 0o604, 0o660] {
        std::fs::set_permissions(&key, Permissions::from_mode(mode)).unwrap();
        let error = open(&dir).unwrap_err();
        assert!(
            matches!(error, OpenError::Exposed { mode: found, .. } if found == mode),
            "{error}"
        );
    }
}

#[test]
fn half_a_pair_or_a_wrong_pair_is_refused() {
    let (dir, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    open(&dir).unwrap();
    open(&other).unwrap();
    std::fs::copy(other.path().join("ca-cert.pem"), dir.path().join("ca-cert.pem")).unwrap();
    assert!(matches!(open(&dir), Err(OpenError::Mismatch { .. })));
    std::fs::remove_file(dir.path().join("ca-key.pem")).unwrap();
    assert!(matches!(open(&dir), Err(OpenError::KeyMissing { .. })));
    assert!(
        !dir.path().join("ca-key.pem").exists(),
        "a missing key is not replaced"
    );
}

#[test]
fn a_key_without_certificate_is_completed() {
    let dir = TempDir::new().unwrap();
    let before = open(&dir).unwrap().roots();
    std::fs::remove_file(dir.path().join("ca-cert.pem")).unwrap();
    let after = open(&dir).unwrap().roots();
    assert_eq!(
        before.roots[0].subject_public_key_info,
        after.roots[0].subject_public_key_info
    );
}

#[test]
fn garbage_and_an_expired_root_are_refused() {
    let dir = TempDir::new().unwrap();
    open(&dir).unwrap();
    let later = Clock::new(|| SystemTime::now() + Duration::from_hours(11 * 365 * 24));
    let error = Identities::open_embedded_with(dir.path(), "cluster.local", later).unwrap_err();
    assert!(error.to_string().contains("expired"), "{error}");

    for (file, content) in [
        ("ca-cert.pem", "garbage"),
        (
            "ca-cert.pem",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ),
        ("ca-key.pem", "garbage"),
    ] {
        std::fs::write(dir.path().join(file), content).unwrap();
        let error = open(&dir).unwrap_err();
        assert!(error.to_string().contains(file), "{error}");
    }
}

#[test]
fn more_roots_are_trusted_too() {
    let (dir, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    open(&dir).unwrap();
    open(&other).unwrap();
    std::fs::copy(other.path().join("ca-cert.pem"), dir.path().join("root-cert.pem")).unwrap();
    assert_eq!(open(&dir).unwrap().roots().len(), 2);
}

#[test]
fn a_certificate_says_exactly_who_it_is_for() {
    let dir = TempDir::new().unwrap();
    let identities = open(&dir).unwrap();
    identities.ensure(&BTreeSet::from([identity("reviews")]));
    let held = identities.current(&identity("reviews")).unwrap();
    let (_, certificate) = X509Certificate::from_der(held.certified.end_entity_cert().unwrap()).unwrap();

    let names = certificate
        .subject_alternative_name()
        .unwrap()
        .unwrap()
        .value
        .general_names
        .clone();
    assert_eq!(
        names,
        [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/reviews")]
    );
    let usage = certificate.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    assert!(!certificate.is_ca());
    assert_eq!(certificate.raw_serial_as_string().replace(':', ""), held.serial);
    let validity = certificate.validity();
    assert_eq!(
        validity.not_after.timestamp() - validity.not_before.timestamp(),
        24 * 3600 + 120
    );
    assert!(!format!("{held:?}{identities:?}").contains("PRIVATE"));
}

#[test]
fn only_wanted_identities_have_certificates() {
    let dir = TempDir::new().unwrap();
    let identities = open(&dir).unwrap();
    let foreign: Identity = "spiffe://elsewhere/ns/shop/sa/reviews".parse().unwrap();
    identities.ensure(&BTreeSet::from([identity("reviews"), foreign.clone()]));
    assert!(identities.current(&identity("reviews")).is_some());
    assert!(identities.current(&identity("ratings")).is_none());
    assert!(
        identities.current(&foreign).is_none(),
        "another trust domain's identity"
    );

    identities.ensure(&BTreeSet::from([identity("ratings")]));
    assert!(identities.current(&identity("reviews")).is_none());
    assert!(identities.current(&identity("ratings")).is_some());
    assert_eq!(identities.counts(), Counts { issued: 2, failed: 1 });
}

#[test]
fn asking_again_for_the_same_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let identities = open(&dir).unwrap();
    let wanted = BTreeSet::from([identity("reviews")]);
    identities.ensure(&wanted);
    let before = identities.current(&identity("reviews")).unwrap();
    identities.ensure(&wanted);
    assert!(Arc::ptr_eq(
        &before,
        &identities.current(&identity("reviews")).unwrap()
    ));
}

#[tokio::test(start_paused = true)]
async fn certificates_are_renewed_at_half_life() {
    let dir = TempDir::new().unwrap();
    let identities = Identities::open_embedded_with(dir.path(), "cluster.local", tokio_clock()).unwrap();
    identities.ensure(&BTreeSet::from([identity("reviews")]));
    let first = identities.current(&identity("reviews")).unwrap();
    let task = tokio::spawn({
        let identities = identities.clone();
        async move { identities.run().await }
    });

    tokio::time::sleep(WORKLOAD_LIFETIME.mul_f64(0.44)).await;
    assert!(Arc::ptr_eq(
        &first,
        &identities.current(&identity("reviews")).unwrap()
    ));
    tokio::time::sleep(WORKLOAD_LIFETIME.mul_f64(0.12)).await;
    let second = identities.current(&identity("reviews")).unwrap();
    assert_ne!(first.serial, second.serial);
    assert!(second.not_after > first.not_after);
    task.abort();
}

#[test]
fn a_clock_set_back_renews_what_has_not_begun_yet() {
    let dir = TempDir::new().unwrap();
    let back = Arc::new(AtomicBool::new(false));
    let clock = Clock::new({
        let back = Arc::clone(&back);
        move || match back.load(Ordering::Relaxed) {
            true => SystemTime::now() - Duration::from_hours(24),
            false => SystemTime::now(),
        }
    });
    open(&dir).unwrap();
    let identities = Identities::open_embedded_with(dir.path(), "cluster.local", clock).unwrap();
    identities.ensure(&BTreeSet::from([identity("reviews")]));
    back.store(true, Ordering::Relaxed);
    assert_eq!(identities.list()[0].state, CertificateState::Invalid);
    identities.renew_due();
    assert_eq!(identities.list()[0].state, CertificateState::Valid);
}

/// A CA that can be out of order.
#[derive(Debug)]
struct Moody {
    ca: EmbeddedCa,
    broken: Arc<AtomicBool>,
}

impl Issue for Moody {
    fn issue(&self, identity: &Identity, now: SystemTime) -> Result<Credential, IssueError> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(IssueError::RootExpired);
        }
        self.ca.issue(identity, now)
    }
}

fn moody(dir: &TempDir, broken: &Arc<AtomicBool>) -> Identities {
    let (clock, trust_domain) = (tokio_clock(), Arc::from("cluster.local"));
    let folder = Folder::open(dir.path()).unwrap();
    let ca = EmbeddedCa::open(&folder, &trust_domain, clock.now()).unwrap();
    let roots = ca.roots().unwrap();
    let issuer = Moody {
        ca,
        broken: Arc::clone(broken),
    };
    Identities::new(Box::new(issuer), trust_domain, roots, clock)
}

#[tokio::test(start_paused = true)]
async fn a_failed_renewal_keeps_the_certificate_and_is_tried_again() {
    let (dir, broken) = (TempDir::new().unwrap(), Arc::new(AtomicBool::new(false)));
    let identities = moody(&dir, &broken);
    identities.ensure(&BTreeSet::from([identity("reviews")]));
    let first = identities.current(&identity("reviews")).unwrap();
    let task = tokio::spawn({
        let identities = identities.clone();
        async move { identities.run().await }
    });

    broken.store(true, Ordering::Relaxed);
    tokio::time::sleep(WORKLOAD_LIFETIME.mul_f64(0.6)).await;
    assert!(Arc::ptr_eq(
        &first,
        &identities.current(&identity("reviews")).unwrap()
    ));
    let status = &identities.list()[0];
    assert_eq!(status.state, CertificateState::RenewalFailing);
    assert!(status.error.is_some());
    let failed = identities.counts().failed;
    assert!((10..10_000).contains(&failed), "{failed} tries");

    broken.store(false, Ordering::Relaxed);
    tokio::time::sleep(BACKOFF_MAX * 2).await;
    assert_ne!(
        first.serial,
        identities.current(&identity("reviews")).unwrap().serial
    );
    assert_eq!(identities.list()[0].state, CertificateState::Valid);
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn a_workload_that_comes_while_the_ca_is_down_gets_its_certificate_later() {
    let (dir, broken) = (TempDir::new().unwrap(), Arc::new(AtomicBool::new(true)));
    let identities = moody(&dir, &broken);
    let task = tokio::spawn({
        let identities = identities.clone();
        async move { identities.run().await }
    });
    identities.ensure(&BTreeSet::from([identity("reviews")]));
    assert_eq!(identities.list()[0].state, CertificateState::Missing);
    broken.store(false, Ordering::Relaxed);
    tokio::time::sleep(BACKOFF_MIN * 2).await;
    assert!(identities.current(&identity("reviews")).is_some());
    task.abort();
}
