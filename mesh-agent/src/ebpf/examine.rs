//! What a node offers, and who else is at our hooks, without changing anything: nothing is pinned or attached.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::bpffs::{self, Folders};
use super::maps::Maps;
use super::mounts;
use super::{CaptureError, Features, lift_memlock_limit, object, programs, sys, uninstall};

/// Folders that are looked into for an agent's pins: more than any machine has.
const MAX_FOLDERS: usize = 4096;

/// `BPF_F_ALLOW_MULTI`: what was attached so, and every link, lets others attach beside it.
const ALLOW_MULTI: u32 = 2;

/// How the verifier judged one program of the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// The hook that it is for.
    pub hook: &'static str,
    /// In the kernel's words.
    pub refused: Option<String>,
}

/// A hook, and the programs that are attached there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookUse {
    pub hook: &'static str,
    /// Whoever is there keeps others out.
    pub exclusive: bool,
    pub programs: Vec<AttachedProgram>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedProgram {
    pub id: u32,
    /// Cut after 15 bytes; empty where it cannot be asked for.
    pub name: String,
    /// Where the agent that it belongs to has its pins.
    pub agent: Option<PathBuf>,
    /// That agent is gone.
    pub is_left: bool,
}

/// A folder with an agent's pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentFolder {
    pub path: PathBuf,
    pub owner: AgentOwner,
    /// Programs behind its links.
    programs: Vec<u32>,
}

/// Who has a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentOwner {
    Nobody,
    Process(u32),
    /// A process that is not seen from here, as from a container.
    Hidden,
}

/// Fails on an agent that was built without an eBPF compiler.
pub fn programs_inside() -> Result<(), CaptureError> {
    object::require_object()
}

/// Whether this process may use `bpf(2)` at all, with its limit of locked memory lifted as for an agent: before 5.11
/// all processes of a user share one account.
pub fn bpf_syscall() -> io::Result<()> {
    lift_memlock_limit();
    sys::probe()
}

/// Has the kernel's verifier judge every program that this agent would load on this kernel.
pub fn trial() -> Result<(Features, Vec<Trial>), CaptureError> {
    lift_memlock_limit();
    let features = Features::probe()?;
    let trials = programs::trial(&features)?;
    Ok((features, trials))
}

/// Who is at the hooks of a cgroup.
pub fn hooks(cgroup: &Path, agents: &[AgentFolder]) -> io::Result<Vec<HookUse>> {
    let cgroup = File::open(cgroup)?;
    programs::hooks()
        .map(|(hook, attach_type)| {
            let found = sys::query(cgroup.as_fd(), attach_type)?;
            let exclusive = !found.ids.is_empty() && found.flags & ALLOW_MULTI == 0;
            Ok(hook_use(hook, exclusive, &found.ids, agents))
        })
        .collect()
}

/// Who is at the `sk_lookup` hook of this process's network namespace.
pub fn lookup_hook(agents: &[AgentFolder]) -> io::Result<HookUse> {
    let netns = File::open("/proc/thread-self/ns/net")?;
    let found = sys::query(netns.as_fd(), programs::LOOKUP_TYPE)?;
    // Several fit in a network namespace always.
    Ok(hook_use("sk_lookup", false, &found.ids, agents))
}

fn hook_use(hook: &'static str, exclusive: bool, ids: &[u32], agents: &[AgentFolder]) -> HookUse {
    let program = |id: &u32| {
        let agent = agents.iter().find(|agent| agent.programs.contains(id));
        AttachedProgram {
            id: *id,
            name: sys::program_name(*id).unwrap_or_default(),
            agent: agent.map(|agent| agent.path.clone()),
            is_left: agent.is_some_and(|agent| agent.owner == AgentOwner::Nobody),
        }
    };
    HookUse {
        hook,
        exclusive,
        programs: ids.iter().map(program).collect(),
    }
}

/// Every folder with an agent's pins on the BPF filesystems that are seen from here.
pub fn agents() -> io::Result<Vec<AgentFolder>> {
    let mut folders = Vec::new();
    for mount in mounts::all()?.iter().filter(|mount| mount.kind == "bpf") {
        // An agent's folder is the filesystem itself, or one or two below it.
        let below = folders_in(&mount.path);
        let deeper: Vec<_> = below.iter().flat_map(|folder| folders_in(folder)).collect();
        folders.push(mount.path.clone());
        folders.extend(below.into_iter().chain(deeper).take(MAX_FOLDERS));
    }
    folders.sort();
    folders.dedup();
    Ok(folders
        .iter()
        .filter_map(|folder| AgentFolder::at(folder))
        .collect())
}

fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.take(MAX_FOLDERS).map(|entry| entry.path()).collect()
}

impl AgentFolder {
    /// `None` if no agent has or left anything there.
    pub fn at(folder: &Path) -> Option<Self> {
        let names = bpffs::entries(folder).ok()?;
        let layouts = names.iter().filter(|name| uninstall::is_layout(name));
        let links: Vec<_> = layouts.map(|name| folder.join(name).join("links")).collect();
        if !links.iter().any(|links| links.is_dir()) {
            return None;
        }
        let pins = links.iter().flat_map(|links| {
            let names = bpffs::entries(links).unwrap_or_default();
            names.into_iter().map(|name| links.join(name))
        });
        let program = |pin: PathBuf| {
            let link = sys::open_pin(&pin).ok()?;
            Some(sys::link_info(link.as_fd()).ok()?.program_id)
        };
        Some(Self {
            path: folder.to_owned(),
            owner: owner(folder),
            programs: pins.filter_map(program).collect(),
        })
    }
}

/// Asks nobody for the lock: an agent that just starts must not find it taken.
fn owner(folder: &Path) -> AgentOwner {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let holder = fs::metadata(folder).ok().and_then(|metadata| {
        let device = (libc::major(metadata.dev()), libc::minor(metadata.dev()));
        lock_holder(&locks, device, metadata.ino())
    });
    match holder {
        Some(process) => AgentOwner::Process(process),
        // Of locks from elsewhere this list is silent, but the kernel side hears from whoever is alive.
        None if Maps::open(&Folders::new(folder).maps).is_ok_and(|maps| uninstall::is_alive(&maps)) => {
            AgentOwner::Hidden
        }
        None => AgentOwner::Nobody,
    }
}

/// Who holds the lock of `flock(2)` on a file, in the text of `/proc/locks`.
fn lock_holder(locks: &str, (major, minor): (u32, u32), inode: u64) -> Option<u32> {
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    locks.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        // `1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF`; who waits has an arrow before the kind.
        match words.as_slice() {
            [_, "FLOCK", _, _, process, place, ..] if *place == file => process.parse().ok(),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_known_by_device_and_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 00:29:42 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 812 00:29:42 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 900 00:29:42 0 EOF\n";
        assert_eq!(lock_holder(locks, (0, 0x29), 42), Some(812));
        assert_eq!(lock_holder(locks, (0, 0x2a), 42), None);
        assert_eq!(lock_holder("", (0, 0x29), 42), None);
    }
}
