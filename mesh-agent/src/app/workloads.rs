//! Brings what is captured in line with the documents, workload by workload.
//!
//! Invariants: a workload is captured while its document and its place both exist, and released as soon as one
//! of them goes; one that cannot be captured says why and does not hold up the others; what an earlier agent
//! left behind is taken over, or released when no document names it any more.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket};
use tokio::time::Instant;

use super::fast_path::FastPaths;
use crate::admin::{Ask, Enrolment as Shown, Enrolments, Readiness};
use crate::dns::{self, Resolver};
use crate::drain::DrainWatcher;
use crate::ebpf::{self, Capture, EnrolRequest, Enrolment, Listeners, PlaceIdentity};
use crate::identity::Identities;
use crate::lanes::Lanes;
use crate::model::{OnAgentDown, Place, Severity, Workload};
use crate::proxy::{Local, Proxy};
use crate::store::Store;

/// How often the places are looked at: a namespace that comes, goes or is replaced is noticed this soon.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long to wait before trying again what failed for another reason than a missing place.
const RETRY_AFTER: Duration = Duration::from_secs(1);

pub(super) struct Parts {
    pub(super) capture: Capture,
    pub(super) proxy: Arc<Proxy>,
    pub(super) identities: Identities,
    pub(super) store: Store,
    pub(super) cluster_domain: Arc<str>,
}

pub(super) struct Workloads {
    parts: Parts,
    lanes: Lanes,
    drain: DrainWatcher,
    /// What the documents say should be captured, as of `generation`.
    wanted: BTreeMap<String, Arc<Workload>>,
    generation: Option<u64>,
    enrolled: BTreeMap<String, Enrolled>,
    fast_paths: FastPaths,
    failed: BTreeMap<String, Instant>,
    /// What an earlier agent left is in order.
    settled: bool,
    shown: Arc<Mutex<Enrolments>>,
}

struct Enrolled {
    local: Arc<Local>,
    enrolment: Enrolment,
}

impl Workloads {
    pub(super) fn new(parts: Parts, lanes: Lanes, drain: DrainWatcher) -> Self {
        let fast_paths = FastPaths::new(parts.capture.clone(), parts.proxy.metrics().clone());
        Self {
            parts,
            fast_paths,
            lanes,
            drain,
            wanted: BTreeMap::new(),
            generation: None,
            enrolled: BTreeMap::new(),
            failed: BTreeMap::new(),
            settled: false,
            shown: Arc::default(),
        }
    }

    /// How far each workload is, for the admin page.
    pub(super) fn enrolments(&self) -> Ask<Enrolments> {
        let shown = Arc::clone(&self.shown);
        Box::new(move || shown.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    pub(super) fn fast_paths(&self) -> FastPaths {
        self.fast_paths.clone()
    }

    /// Keeps at it until the agent drains. `ready` holds after the first pass that had anything to read.
    pub(super) async fn run(mut self, readiness: Readiness, ready: &'static str) {
        tokio::spawn(self.fast_paths.clone().report());
        let mut changes = self.parts.store.watch();
        let mut drain = self.drain.clone();
        loop {
            // Entering namespaces and loading programs take their time: not on a runtime's thread.
            let pass = tokio::task::spawn_blocking(move || {
                self.pass();
                self
            });
            match pass.await {
                Ok(this) => self = this,
                Err(error) => {
                    tracing::error!(%error, "enrolment ended");
                    readiness.fails(ready, "enrolment ended by a fault; see the log");
                    return;
                }
            }
            if self.knows_nothing() {
                readiness.fails(ready, "no resource could be read; `mesh-agent status` says why");
            } else {
                readiness.holds(ready);
            }
            tokio::select! {
                // The store lives as long as `self`.
                _ = changes.changed() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = drain.draining() => return,
            }
        }
    }

    /// As with a misspelt path: an agent that would be ready so would mesh nothing and look well.
    fn knows_nothing(&self) -> bool {
        let snapshot = self.parts.store.load();
        let mut findings = snapshot.rejected.iter();
        snapshot.workloads.is_empty()
            && snapshot.services.is_empty()
            && findings.any(|finding| finding.severity == Severity::Error)
    }

    fn pass(&mut self) {
        let changed = self.read();
        let mut moved = self.release_gone();
        for (uid, workload) in self.wanted.clone() {
            if let Some(enrolled) = self.enrolled.get(&uid) {
                if changed {
                    self.update(&uid, enrolled, &workload);
                }
            } else if self.failed.get(&uid).is_none_or(|again| Instant::now() >= *again) {
                moved |= self.take_in(&uid, &workload);
            }
        }
        if !self.settled && self.is_settled() {
            self.settled = self.forget_strangers();
        }
        if moved || changed {
            self.publish();
        }
    }

    /// Reads the documents anew, if they changed.
    fn read(&mut self) -> bool {
        let snapshot = self.parts.store.load();
        if self.generation == Some(snapshot.generation) {
            return false;
        }
        self.generation = Some(snapshot.generation);
        self.wanted = snapshot
            .local_workloads
            .values()
            .map(|workload| (workload.uid(), Arc::clone(workload)))
            .collect();
        let identities: BTreeSet<_> = self
            .wanted
            .values()
            .map(|workload| workload.identity.clone())
            .collect();
        self.parts.identities.ensure(&identities);
        let agent = self.parts.proxy.metrics().agent();
        agent
            .workloads
            .set(i64::try_from(self.wanted.len()).unwrap_or(i64::MAX));
        agent.snapshot_generation.set(snapshot.generation);
        agent
            .rejected_resources
            .set(i64::try_from(snapshot.rejected.len()).unwrap_or(i64::MAX));
        self.failed.clear();
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.retain(|uid, _| self.wanted.contains_key(uid));
        true
    }

    fn release_gone(&mut self) -> bool {
        let gone: Vec<String> = self
            .enrolled
            .iter()
            .filter(|(uid, enrolled)| {
                self.wanted
                    .get(*uid)
                    .is_none_or(|workload| !enrolled.is_still_at(workload))
            })
            .map(|(uid, _)| uid.clone())
            .collect();
        let released: Vec<_> = gone.iter().map(|uid| self.enrolled.remove(uid)).collect();
        if !gone.is_empty() {
            // Nobody is led past the agent to one that it captures no longer.
            self.open_fast_paths();
        }
        for (uid, enrolled) in gone.iter().zip(released) {
            if let Some(enrolled) = enrolled {
                self.parts.proxy.forget(&enrolled.local);
                if let Err(error) = enrolled.enrolment.release() {
                    tracing::error!(%error, workload = %uid, "cannot release");
                }
                tracing::info!(workload = %uid, "released");
            }
            self.show(uid, "pending", "its place is gone".to_owned());
        }
        !gone.is_empty()
    }

    fn update(&self, uid: &str, enrolled: &Enrolled, workload: &Arc<Workload>) {
        let before = enrolled.local.workload();
        if Arc::ptr_eq(&before, workload) {
            return;
        }
        enrolled.local.update(Arc::clone(workload));
        if before.addresses == workload.addresses && before.on_agent_down == workload.on_agent_down {
            return;
        }
        match enrolled.enrolment.update(&workload.addresses, holds(workload)) {
            Ok(()) => self.show(uid, "enrolled", String::new()),
            Err(error) => {
                tracing::error!(%error, workload = %uid, "cannot change how it is captured");
                self.show(uid, "failed", error.to_string());
            }
        }
    }

    fn take_in(&mut self, uid: &str, workload: &Arc<Workload>) -> bool {
        let enrolled = place(workload).and_then(|place| {
            self.check_unshared(&place)?;
            let request = EnrolRequest {
                place,
                addresses: workload.addresses.clone(),
                hold: holds(workload),
            };
            self.parts
                .capture
                .enrol(request)
                .map_err(|error| (error.is_missing_place(), error.to_string()))
        });
        match enrolled {
            Ok((enrolment, listeners)) => {
                let resolver = Resolver::new(
                    enrolment.namespace(),
                    dns::Client {
                        namespace: Arc::clone(&workload.namespace),
                        cluster_domain: Arc::clone(&self.parts.cluster_domain),
                    },
                    self.parts.store.clone(),
                    self.parts.proxy.metrics().clone(),
                );
                let local = Local::new(Arc::clone(workload), enrolment.namespace(), resolver, &self.lanes);
                self.serve(&local, listeners);
                self.enrolled
                    .insert(uid.to_owned(), Enrolled { local, enrolment });
                self.show(uid, "enrolled", String::new());
                tracing::info!(workload = %uid, "captured");
                true
            }
            Err((missing, message)) => {
                if missing {
                    self.waits(uid, &message);
                } else {
                    self.failed.insert(uid.to_owned(), Instant::now() + RETRY_AFTER);
                    tracing::warn!(workload = %uid, error = %message, "cannot capture");
                }
                self.show(uid, if missing { "pending" } else { "failed" }, message);
                false
            }
        }
    }

    /// Says once what a workload waits for: it may be a place that comes in its time, or one that is misspelt.
    fn waits(&self, uid: &str, message: &str) {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let known = shown
            .get(uid)
            .is_some_and(|shown| shown.state == "pending" && shown.message == message);
        if !known {
            tracing::warn!(workload = %uid, place = %message, "not captured until its place is there");
        }
    }

    /// Two documents that name one place would take each other's connections.
    fn check_unshared(&self, place: &ebpf::Place) -> Result<(), (bool, String)> {
        let Ok(identity) = PlaceIdentity::of(place) else {
            return Ok(());
        };
        match self
            .enrolled
            .iter()
            .find(|(_, other)| other.enrolment.identity() == identity)
        {
            Some((other, _)) => Err((
                false,
                format!("{other} runs there already; a place is for one workload"),
            )),
            None => Ok(()),
        }
    }

    /// Hands the listeners to the data path.
    fn serve(&self, local: &Arc<Local>, listeners: Listeners) {
        let (proxy, drain) = (&self.parts.proxy, &self.drain);
        let lane = self.lanes.next();
        let _entered = lane.handle().enter();
        match TcpListener::from_std(listeners.outbound) {
            Ok(listener) => {
                let serving = Arc::clone(proxy).serve_outbound(Arc::clone(local), listener, drain.clone());
                lane.spawn(serving);
            }
            Err(error) => tracing::error!(%error, workload = %local.uid, "cannot serve what it opens"),
        }
        match listeners.inbound.map(TcpListener::from_std).transpose() {
            Ok(Some(listener)) => {
                let serving = Arc::clone(proxy).serve_inbound(Arc::clone(local), listener, drain.clone());
                lane.spawn(serving);
            }
            // The host's network namespace belongs to others.
            Ok(None) => {}
            Err(error) => tracing::error!(%error, workload = %local.uid, "cannot serve what comes to it"),
        }
        for socket in listeners.dns_v6.into_iter().chain([listeners.dns_v4]) {
            match UdpSocket::from_std(socket) {
                Ok(socket) => drop(lane.spawn(resolve(Arc::clone(local), socket, drain.clone()))),
                Err(error) => tracing::error!(%error, workload = %local.uid, "cannot serve its DNS"),
            }
        }
    }

    /// Whether every workload that is there is captured: one that could not be taken over yet must keep what an
    /// earlier agent left it, or it would be unmeshed meanwhile.
    fn is_settled(&self) -> bool {
        self.wanted.iter().all(|(uid, workload)| {
            self.enrolled.contains_key(uid)
                || place(workload).map_or(true, |place| PlaceIdentity::of(&place).is_err())
        })
    }

    /// Releases what an earlier agent captured and no document names; false if that is to be tried again.
    fn forget_strangers(&self) -> bool {
        let known: Vec<_> = self
            .enrolled
            .values()
            .map(|enrolled| enrolled.enrolment.key())
            .collect();
        match self.parts.capture.forget_unknown(&known) {
            Ok(gone) => {
                if !gone.is_empty() {
                    tracing::info!(count = gone.len(), "released what an earlier agent had captured");
                }
                true
            }
            Err(error) => {
                tracing::error!(%error, "cannot release what an earlier agent had captured, and will try again");
                false
            }
        }
    }

    /// Tells the proxy who is on this node.
    fn publish(&self) {
        let by_address: HashMap<IpAddr, Arc<Local>> = self
            .enrolled
            .values()
            .flat_map(|enrolled| {
                let addresses = enrolled.local.workload().addresses.clone();
                addresses
                    .into_iter()
                    .map(|address| (address, Arc::clone(&enrolled.local)))
            })
            .collect();
        let all = self.enrolled.values().map(|enrolled| Arc::clone(&enrolled.local));
        self.parts.proxy.locals.replace(by_address, all.collect());
        self.open_fast_paths();
    }

    fn open_fast_paths(&self) {
        let captured = self
            .enrolled
            .values()
            .map(|enrolled| (enrolled.enrolment.key(), enrolled.local.workload()));
        self.fast_paths.apply(self.parts.store.load(), captured.collect());
    }

    fn show(&self, uid: &str, state: &'static str, message: String) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if self.wanted.contains_key(uid) || self.enrolled.contains_key(uid) || state != "pending" {
            shown.insert(uid.to_owned(), Shown { state, message });
        } else {
            shown.remove(uid);
        }
    }
}

impl Enrolled {
    fn is_still_at(&self, workload: &Workload) -> bool {
        workload.place == self.local.workload().place
            && place(workload).is_ok_and(|place| {
                PlaceIdentity::of(&place).is_ok_and(|now| now == self.enrolment.identity())
            })
    }
}

async fn resolve(local: Arc<Local>, socket: UdpSocket, mut drain: DrainWatcher) {
    tokio::select! {
        ended = dns::serve(&local.resolver, socket) => {
            if let Err(error) = ended {
                tracing::error!(%error, workload = %local.uid, "its DNS is no longer served");
            }
        }
        () = local.released() => {}
        () = drain.draining() => {}
    }
}

fn holds(workload: &Workload) -> bool {
    workload.on_agent_down == OnAgentDown::Hold
}

fn place(workload: &Workload) -> Result<ebpf::Place, (bool, String)> {
    match &workload.place {
        Some(Place::Netns(path)) => Ok(ebpf::Place::NetnsPath(PathBuf::clone(path))),
        Some(Place::OpenNetns(file)) => file
            .try_clone()
            .map(|file| ebpf::Place::NetnsFile(File::from(file)))
            .map_err(|error: io::Error| (false, error.to_string())),
        Some(Place::Cgroup(path)) => Ok(ebpf::Place::Cgroup(PathBuf::clone(path))),
        None => Err((true, "its document does not say where it runs".to_owned())),
    }
}
