//! The kernel side's keeper, and the only user of aya: loads and attaches the programs of `mesh-ebpf`, enrols
//! workloads, and answers the proxy through [`crate::sock::Namespace`].
//!
//! Invariants: everything in the kernel is pinned under one folder, so it outlives the agent and the next one
//! takes it over in place; nothing outside that folder is touched. Several agents with folders of their own may
//! run on one machine: each knows its own workloads only.
//!
//! `Capture::start` -> [`Capture::enrol`] for each workload -> [`Capture::forget_unknown`] once all that exist
//! are enrolled. [`Capture::keep_alive`] must be polled all the time: an agent that stops giving signs is taken
//! for gone, and the kernel side falls back to each workload's choice (hold or open).

mod bpffs;
mod cgroups;
mod clock;
mod enrol;
mod error;
pub mod examine;
mod fast;
mod features;
mod listeners;
mod maps;
mod mounts;
mod namespace;
mod netns;
mod object;
mod place;
mod programs;
mod state;
mod sys;
mod uninstall;

pub use bpffs::{Claim, PinSite};
pub use cgroups::{Cgroup2, Cgroups};
pub use enrol::{EnrolRequest, Enrolment};
pub use error::CaptureError;
pub use fast::{FastPair, FastTraffic, MAX_BACKENDS};
pub use features::{Feature, Features};
pub use listeners::Listeners;
pub use mesh_common::WorkloadKey;
pub use object::object;
pub use place::{Place, PlaceIdentity};
pub use programs::HookState;
pub use state::{CaptureState, MapState, WorkloadState};
pub use uninstall::uninstall;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_common::{Flow, Settings, flow_kind};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use tokio::time::MissedTickBehavior;

use bpffs::Folders;
use maps::Maps;
use netns::Home;
use object::Loader;

/// A tenth of what the kernel side waits before it takes the agent for gone.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// How long the data of a connection that its initiator closed may wait to be accepted.
const CLOSED_FLOW_AGE_NS: u64 = 60_000_000_000;

/// Longer than Linux tries to connect (127 s): what a server has not taken by then it never will.
const DIRECT_FLOW_AGE_NS: u64 = 180_000_000_000;

/// Longer than any connect takes.
const OWN_SOCKET_AGE_NS: u64 = 600_000_000_000;

/// What may differ between agents.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// The folder for pins; its parent is, or becomes, a BPF filesystem.
    pub bpffs: PathBuf,
    /// Connections that may wait for the agent to accept them.
    pub max_flows: u32,
    /// What the kernel is taken to have; for tests of what is done without.
    pub features: Option<Features>,
}

impl CaptureOptions {
    #[must_use]
    pub fn new(bpffs: impl Into<PathBuf>) -> Self {
        Self {
            bpffs: bpffs.into(),
            max_flows: mesh_common::maps::MAX_FLOWS,
            features: None,
        }
    }
}

/// The kernel side, loaded and attached.
#[derive(Clone, Debug)]
pub struct Capture {
    shared: Arc<Shared>,
}

/// What enrolments need of it, too.
#[derive(Debug)]
struct Shared {
    loader: Loader,
    folders: Folders,
    maps: Arc<Maps>,
    home: Home,
    features: Features,
}

impl Capture {
    /// Loads and attaches the programs, or takes over from an agent that did before.
    pub fn start(options: &CaptureOptions) -> Result<Self, CaptureError> {
        object::require_object()?;
        let folders = Folders::new(&options.bpffs);
        folders.create()?;
        let cgroup = bpffs::open_cgroup(&bpffs::cgroup_root()?)?;
        lift_memlock_limit();
        let features = options.features.map_or_else(Features::probe, Ok)?;
        for lacking in features.list().iter().filter(|feature| !feature.present) {
            let (feature, since, without) = (lacking.name, lacking.since, lacking.without);
            tracing::info!(feature, since, without, "this kernel lacks something");
        }
        let loader = Loader::new(&folders, &features, options.max_flows);
        programs::attach_root(&loader, &folders, &cgroup)?;
        let maps = Arc::new(Maps::open(&folders.maps)?);
        uninstall::remove_strays(&folders, &maps)?;
        fast::close_all(&maps)?;
        let home = Home::open().map_err(|source| CaptureError::Namespace {
            place: "/proc/thread-self/ns/net".into(),
            source,
        })?;
        let capture = Self {
            shared: Arc::new(Shared {
                loader,
                folders,
                maps,
                home,
                features,
            }),
        };
        capture.beat().map_err(|source| CaptureError::Map {
            map: mesh_common::maps::SETTINGS,
            source,
        })?;
        Ok(capture)
    }

    /// Captures a workload's traffic from now on; a workload that an earlier agent left is taken over without a
    /// gap.
    ///
    /// The connections come at the [`Listeners`]: the caller must serve them.
    pub fn enrol(&self, request: EnrolRequest) -> Result<(Enrolment, Listeners), CaptureError> {
        self.shared.enrol(request)
    }

    /// Releases every workload that is not in `known`: those that vanished while no agent was there; and takes what
    /// agents of another version left off its hooks.
    pub fn forget_unknown(&self, known: &[WorkloadKey]) -> Result<Vec<WorkloadKey>, CaptureError> {
        let gone: Vec<_> = self
            .shared
            .maps
            .workloads
            .keys()
            .filter(|key| !known.contains(key))
            .collect();
        let forgotten = gone.iter().try_for_each(|key| {
            fast::forget(&self.shared.maps, *key);
            self.shared.forget(*key)
        });
        // Whatever came of that: an older layout left in place goes on refusing.
        uninstall::remove_other_layouts(&self.shared.folders)?;
        forgotten.map(|()| gone)
    }

    /// What the kernel side counted, by metric label.
    pub fn counters(&self) -> io::Result<Vec<(&'static str, u64)>> {
        self.shared.counters()
    }

    /// What the kernel has of that which is not needed.
    #[must_use]
    pub fn features(&self) -> &Features {
        &self.shared.features
    }

    #[must_use]
    pub fn state(&self) -> CaptureState {
        self.shared.state()
    }

    /// Gives signs of life as long as the data path is `alive`, and sweeps what connections that came to nothing
    /// left. Never ends.
    pub async fn keep_alive(&self, alive: impl Fn() -> bool) {
        let mut ticks = tokio::time::interval(HEARTBEAT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            if alive()
                && let Err(error) = self.beat()
            {
                tracing::error!(%error, "cannot tell the kernel side that the agent is alive");
            }
            self.sweep();
        }
    }

    fn beat(&self) -> io::Result<()> {
        self.shared.maps.settings.insert(
            &0,
            &Settings {
                heartbeat: clock::monotonic_ns(),
            },
        )
    }

    fn sweep(&self) {
        let maps = &self.shared.maps;
        let now = clock::monotonic_ns();
        let old = |since: u64, age: u64| now.saturating_sub(since) > age;
        let age = |flow: &Flow| match flow.kind {
            flow_kind::DIRECT => DIRECT_FLOW_AGE_NS,
            _ => CLOSED_FLOW_AGE_NS,
        };
        let flows: Vec<_> = maps.flows.keys().collect();
        for key in flows {
            if let Ok(Some(flow)) = maps.flows.get(&key)
                && flow.closed_at != 0
                && old(flow.closed_at, age(&flow))
            {
                let _ = maps.flows.remove(&key);
            }
        }
        let own: Vec<_> = maps.own.keys().collect();
        for cookie in own {
            if let Ok(Some(socket)) = maps.own.get(&cookie)
                && old(socket.created_at, OWN_SOCKET_AGE_NS)
            {
                let _ = maps.own.remove(&cookie);
            }
        }
    }
}

/// Before 5.11 what is loaded counts as locked memory of the process, which may have 64 KB of that.
fn lift_memlock_limit() {
    let all = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    // As much as there is for who may not do that.
    let lifted = all.or_else(|_| {
        let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
        setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard)
    });
    if let Err(error) = lifted {
        // It matters to old kernels only, and these say so when something is loaded.
        tracing::debug!(%error, "cannot lift the limit of locked memory");
    }
}
