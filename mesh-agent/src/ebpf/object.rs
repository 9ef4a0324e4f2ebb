//! The object with all programs, and the copies of it that are loaded.
//!
//! Invariants: copies share the pinned maps, and so work on the same state, but each has a [`maps::SERVES`] of its
//! own; a copy knows whom it serves before anything of it can be attached.

use std::io;
use std::sync::{Mutex, PoisonError};

use aya::maps::{Array, MapError};
use aya::{Ebpf, EbpfLoader};
use mesh_common::{Serves, maps};

use super::bpffs::Folders;
use super::{CaptureError, Features};

/// Made by `build.rs`; empty if the machine had no eBPF compiler.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf"));

/// As it is embedded; empty if the machine that built us had no eBPF compiler.
#[must_use]
pub fn object() -> &'static [u8] {
    OBJECT
}

/// Fails at once on an agent that was built without an eBPF compiler.
pub(super) fn require_object() -> Result<(), CaptureError> {
    if OBJECT.is_empty() {
        Err(CaptureError::NoPrograms)
    } else {
        Ok(())
    }
}

/// Loads copies of the object.
///
/// One does for all workloads, since aya reads and takes apart the kernel's own type information for each loader that
/// is made: 5.5 MB on a kernel of today, and 12 ms, for nothing that our programs use. (Locked since loading needs
/// `&mut`; workloads are enrolled one after the other.)
#[derive(Debug)]
pub(super) struct Loader(Mutex<EbpfLoader<'static>>);

impl Loader {
    /// For copies that share the maps pinned in `folders`: those that are not there yet are made and pinned.
    pub(super) fn new(folders: &Folders, features: &Features, max_flows: u32) -> Self {
        let mut loader = configured(features, max_flows);
        for name in maps::ALL {
            loader.map_pin_path(name, folders.maps.join(name));
        }
        Self(Mutex::new(loader))
    }

    /// For copies with maps of their own, of which nothing stays.
    pub(super) fn for_trial(features: &Features) -> Self {
        Self(Mutex::new(configured(features, maps::MAX_FLOWS)))
    }

    /// A copy, whose programs the verifier has not seen yet.
    pub(super) fn load(&self, serves: Serves) -> Result<Ebpf, CaptureError> {
        require_object()?;
        // A loader holds nothing of what it loads, so a panic leaves it as it was.
        let mut loader = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut copy = loader.load(OBJECT)?;
        drop(loader);
        tell(&mut copy, serves).map_err(|error| CaptureError::Map {
            map: maps::SERVES,
            source: match error {
                MapError::SyscallError(failed) => failed.io_error,
                other => io::Error::other(other),
            },
        })?;
        Ok(copy)
    }
}

fn configured(features: &Features, max_flows: u32) -> EbpfLoader<'static> {
    let presented = match features.netns_in_sockops {
        true => 1,
        false => maps::MAX_PRESENTED,
    };
    let mut loader = EbpfLoader::new();
    loader
        // The programs touch no kernel structures.
        .btf(None)
        .map_max_entries(maps::FLOWS, max_flows)
        .map_max_entries(maps::PRESENTED, presented)
        .override_global("CAN_SET_ERRNO", constant(features.set_errno), true)
        .override_global("NETNS_IN_SOCKOPS", constant(features.netns_in_sockops), true)
        .override_global("TELLS_NETNS", constant(!features.netns_option), true);
    loader
}

/// As the programs read it.
fn constant(holds: bool) -> &'static u32 {
    match holds {
        true => &1,
        false => &0,
    }
}

/// Tells a copy whom it serves.
fn tell(copy: &mut Ebpf, serves: Serves) -> Result<(), MapError> {
    let map = copy.map_mut(maps::SERVES).ok_or_else(|| MapError::InvalidName {
        name: maps::SERVES.to_owned(),
    })?;
    Array::<_, Serves>::try_from(map)?.set(0, serves, 0)
}
