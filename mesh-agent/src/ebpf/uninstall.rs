//! Removing what agents left in the kernel.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use mesh_common::WorkloadKey;
use mesh_common::maps::{self, HEARTBEAT_LIMIT_NS};

use super::bpffs::{self, Claim, Folders, entries, link_owner};
use super::maps::Maps;
use super::{CaptureError, clock, programs, sys};

/// Removes every pin of an absent agent, and with them its programs, links and maps; returns what was there.
///
/// Refuses while an agent is alive: it would go on serving connections that no longer come.
pub fn uninstall(bpffs: &Path) -> Result<Vec<PathBuf>, CaptureError> {
    if !bpffs::may_have_pins(bpffs)? {
        return Err(CaptureError::NoPins);
    }
    // An agent has it from before its first pin, whatever its layout and its workloads, and none starts meanwhile.
    let _claim = Claim::on_existing(bpffs).map_err(|error| match error {
        CaptureError::Claimed(_) => CaptureError::AgentAlive,
        error => error,
    })?;
    let folders = Folders::new(bpffs);
    if Maps::open(&folders.maps).is_ok_and(|maps| is_alive(&maps)) {
        return Err(CaptureError::AgentAlive);
    }
    let mut removed = Vec::new();
    for name in listed(bpffs)?.into_iter().filter(|name| is_layout(name)) {
        remove_layout(&bpffs.join(name), &mut removed)?;
    }
    // Stays if something of others lies in it, or if it never was.
    let _ = fs::remove_dir(bpffs);
    Ok(removed)
}

/// Removes what agents of other layouts left. Called when all workloads are enrolled: until then what these chose for
/// when there is no agent holds.
pub(super) fn remove_other_layouts(folders: &Folders) -> Result<(), CaptureError> {
    let mut removed = Vec::new();
    for layout in other_layouts(folders)? {
        remove_layout(&layout, &mut removed)?;
    }
    tell(&removed);
    Ok(())
}

/// Takes one workload, now captured by this agent, out of what agents of other layouts left: these would refuse its
/// connections, and the agent's own beside it, for as long as another workload of theirs waits to be taken over.
pub(super) fn release_from_other_layouts(
    folders: &Folders,
    workload: WorkloadKey,
) -> Result<(), CaptureError> {
    for layout in other_layouts(folders)? {
        let path = layout.join("maps").join(maps::WORKLOADS);
        let failed = |source| CaptureError::Pin {
            path: path.clone(),
            source,
        };
        match sys::open_pin(&path) {
            // The keys are the same in all layouts.
            Ok(map) if sys::map_info(map.as_fd()).map_err(failed)?.key_size == KEY_SIZE => {
                sys::delete(map.as_fd(), &workload).map_err(failed)?;
            }
            Ok(_) => return Err(CaptureError::ForeignMap { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let links = layout.join("links");
        let own = |name: &String| link_owner(name) == Some(workload);
        for name in listed(&links)?.into_iter().filter(own) {
            programs::detach(&links.join(name))?;
        }
    }
    Ok(())
}

/// Of a [`WorkloadKey`].
const KEY_SIZE: u32 = 8;

fn other_layouts(folders: &Folders) -> Result<Vec<PathBuf>, CaptureError> {
    let other = |name: &String| is_layout(name) && name != maps::LAYOUT;
    let names = listed(&folders.root)?.into_iter().filter(other);
    Ok(names.map(|name| folders.root.join(name)).collect())
}

/// Removes pins in the folder of this agent's layout that no part of it accounts for.
pub(super) fn remove_strays(folders: &Folders, maps: &Maps) -> Result<(), CaptureError> {
    let mut removed = Vec::new();
    let known = |name: &str| {
        programs::is_hook(name)
            || link_owner(name).is_some_and(|key| maps.workloads.get(&key).is_ok_and(|e| e.is_some()))
    };
    for name in listed(&folders.links)?.into_iter().filter(|name| !known(name)) {
        detach(folders.links.join(name), &mut removed)?;
    }
    for name in listed(&folders.maps)?
        .into_iter()
        .filter(|name| !maps::ALL.contains(&name.as_str()))
    {
        remove(folders.maps.join(name), &mut removed)?;
    }
    tell(&removed);
    Ok(())
}

fn tell(removed: &[PathBuf]) {
    for path in removed {
        tracing::info!(path = %path.display(), "removed a stray pin");
    }
}

pub(super) fn is_alive(maps: &Maps) -> bool {
    let beat = maps
        .settings
        .get(&0)
        .ok()
        .flatten()
        .map_or(0, |settings| settings.heartbeat);
    let fresh = clock::monotonic_ns().saturating_sub(beat) < HEARTBEAT_LIMIT_NS;
    fresh && maps.listeners.keys().next().is_some()
}

/// `v1`, `v2`, ...
pub(super) fn is_layout(name: &str) -> bool {
    name.strip_prefix('v')
        .is_some_and(|version| !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Links first: programs without maps would be worse than none.
fn remove_layout(layout: &Path, removed: &mut Vec<PathBuf>) -> Result<(), CaptureError> {
    let (links, maps) = (layout.join("links"), layout.join("maps"));
    for name in listed(&links)? {
        detach(links.join(name), removed)?;
    }
    for name in listed(&maps)? {
        remove(maps.join(name), removed)?;
    }
    for folder in [links, maps] {
        let _ = fs::remove_dir(folder);
    }
    let _ = fs::remove_dir(layout);
    Ok(())
}

fn listed(folder: &Path) -> Result<Vec<String>, CaptureError> {
    entries(folder).map_err(|source| CaptureError::Pin {
        path: folder.to_owned(),
        source,
    })
}

fn detach(link: PathBuf, removed: &mut Vec<PathBuf>) -> Result<(), CaptureError> {
    if programs::detach(&link)? {
        removed.push(link);
    }
    Ok(())
}

fn remove(path: PathBuf, removed: &mut Vec<PathBuf>) -> Result<(), CaptureError> {
    match fs::remove_file(&path) {
        Ok(()) => removed.push(path),
        // Another did it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(CaptureError::Pin { path, source }),
    }
    Ok(())
}
