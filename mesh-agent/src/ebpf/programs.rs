//! The programs, and their pinned links.
//!
//! Invariant: a hook has one pinned link, created once and updated in place from then on, so that no agent leaves a
//! second one.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use aya::Ebpf;
use aya::programs::{CgroupSockAddr, Program, ProgramError, ProgramFd, SkLookup, SockOps};
use mesh_common::{Serves, WorkloadKey};
use serde::Serialize;

use super::bpffs::Folders;
use super::examine::Trial;
use super::object::Loader;
use super::sys;
use super::{CaptureError, Features};

/// A program attached at the cgroup root.
struct Hook {
    /// Of the link's pin.
    name: &'static str,
    /// Of the program in the object.
    program: &'static str,
    /// `enum bpf_attach_type`.
    attach_type: u32,
}

const fn hook(name: &'static str, program: &'static str, attach_type: u32) -> Hook {
    Hook {
        name,
        program,
        attach_type,
    }
}

/// In the order in which they are attached: what answers for a captured socket comes before what captures.
const HOOKS: [Hook; 9] = [
    hook("sockops", "mesh_sockops", 3),
    hook("getpeername4", "mesh_peername4", 29),
    hook("getpeername6", "mesh_peername6", 30),
    hook("recvmsg4", "mesh_recvmsg4", 19),
    hook("recvmsg6", "mesh_recvmsg6", 20),
    hook("sendmsg4", "mesh_sendmsg4", 14),
    hook("sendmsg6", "mesh_sendmsg6", 15),
    hook("connect4", "mesh_connect4", 10),
    hook("connect6", "mesh_connect6", 11),
];

const SOCKOPS: &str = HOOKS[0].name;

pub(super) const LOOKUP_TYPE: u32 = 36;

const LOOKUP: Hook = hook("lookup", "mesh_lookup", LOOKUP_TYPE);

/// An attached program, for the admin page.
#[derive(Clone, Debug, Serialize)]
pub struct HookState {
    pub name: String,
    pub program_id: u32,
    pub link_id: u32,
}

/// Loads the object once, which pins the maps that are not there yet, and attaches every cgroup hook.
pub(super) fn attach_root(loader: &Loader, folders: &Folders, cgroup: &File) -> Result<(), CaptureError> {
    let mut object = loader.load(Serves::ANYONE)?;
    for hook in &HOOKS {
        let program = verified(&mut object, hook.program)?;
        let fd = program_fd(program, hook.program)?;
        attach(
            fd.as_fd(),
            cgroup.as_fd(),
            hook.attach_type,
            &folders.links.join(hook.name),
        )?;
    }
    Ok(())
}

/// Attaches the workload's own instance of the `sk_lookup` program to its namespace.
pub(super) fn attach_lookup(
    loader: &Loader,
    folders: &Folders,
    workload: WorkloadKey,
    netns: BorrowedFd<'_>,
) -> Result<(), CaptureError> {
    let mut object = loader.load(Serves { workload, host: 0 })?;
    let program = verified(&mut object, LOOKUP.program)?;
    let fd = program_fd(program, LOOKUP.program)?;
    attach(
        fd.as_fd(),
        netns,
        LOOKUP.attach_type,
        &folders.workload_link(workload, LOOKUP.name),
    )
}

/// Attaches the workload's own instances to its cgroup. Sockets are noted by the `sockops` of the root.
pub(super) fn attach_workload_cgroup(
    loader: &Loader,
    folders: &Folders,
    workload: WorkloadKey,
    host: WorkloadKey,
    cgroup: &File,
) -> Result<(), CaptureError> {
    let mut object = loader.load(Serves { workload, host })?;
    for hook in HOOKS.iter().filter(|hook| hook.name != SOCKOPS) {
        let program = verified(&mut object, hook.program)?;
        let fd = program_fd(program, hook.program)?;
        let pin = folders.workload_link(workload, hook.name);
        attach(fd.as_fd(), cgroup.as_fd(), hook.attach_type, &pin)?;
    }
    Ok(())
}

/// Detaches what a workload has of its own.
pub(super) fn detach_workload(folders: &Folders, workload: WorkloadKey) -> Result<(), CaptureError> {
    for hook in HOOKS.iter().chain([&LOOKUP]) {
        detach(&folders.workload_link(workload, hook.name))?;
    }
    Ok(())
}

/// Ends a pinned link; false if there was none.
pub(super) fn detach(pin: &Path) -> Result<bool, CaptureError> {
    if let Ok(link) = sys::open_pin(pin) {
        // Fails for a link whose target is gone, and then there is nothing to do.
        let _ = sys::detach_link(link.as_fd());
    }
    match fs::remove_file(pin) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(CaptureError::Pin {
            path: pin.to_owned(),
            source,
        }),
    }
}

/// True for the pins that belong into the folder of links whatever the workloads are.
pub(super) fn is_hook(name: &str) -> bool {
    HOOKS.iter().any(|hook| hook.name == name)
}

/// The links that are pinned.
pub(super) fn states(folders: &Folders) -> Vec<HookState> {
    let names = super::bpffs::entries(&folders.links).unwrap_or_default();
    let state = |name: String| {
        let link = sys::open_pin(&folders.links.join(&name)).ok()?;
        let info = sys::link_info(link.as_fd()).ok()?;
        Some(HookState {
            name,
            program_id: info.program_id,
            link_id: info.id,
        })
    };
    names.into_iter().filter_map(state).collect()
}

/// Has the verifier look at every program, with maps of its own; nothing is attached, and nothing stays.
pub(super) fn trial(features: &Features) -> Result<Vec<Trial>, CaptureError> {
    let mut object = Loader::for_trial(features).load(Serves::ANYONE)?;
    let hooks = HOOKS.iter().chain([&LOOKUP]);
    Ok(hooks
        .map(|hook| Trial {
            hook: hook.name,
            refused: match verified(&mut object, hook.program) {
                Ok(_) => None,
                Err(CaptureError::Program { reason, .. }) => Some(reason),
                Err(error) => Some(error.to_string()),
            },
        })
        .collect())
}

/// The hooks at the cgroup root, by name and `enum bpf_attach_type`.
pub(super) fn hooks() -> impl Iterator<Item = (&'static str, u32)> {
    HOOKS.iter().map(|hook| (hook.name, hook.attach_type))
}

/// The program of that name, after the verifier has seen it.
fn verified<'a>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a Program, CaptureError> {
    let program = object
        .program_mut(name)
        .ok_or(CaptureError::MissingProgram(name))?;
    let loaded = match program {
        Program::CgroupSockAddr(program) => CgroupSockAddr::load(program),
        Program::SockOps(program) => SockOps::load(program),
        Program::SkLookup(program) => SkLookup::load(program),
        _ => return Err(CaptureError::MissingProgram(name)),
    };
    loaded.map_err(|error| CaptureError::program(name, &error))?;
    Ok(program)
}

fn program_fd<'a>(program: &'a Program, name: &'static str) -> Result<&'a ProgramFd, CaptureError> {
    let fd: Result<&ProgramFd, ProgramError> = program.fd();
    fd.map_err(|error| CaptureError::program(name, &error))
}

/// Puts `program` behind the link pinned at `pin`, making the link if it is not there, if its target is gone, or if
/// it is another: a cgroup2 hierarchy may have been mounted as a part, and then whole.
fn attach(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
    pin: &Path,
) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::Attach {
        name: pin.display().to_string(),
        source,
    };
    let earlier = match sys::open_pin(pin) {
        Ok(link) => Some(link),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(error)),
    };
    if let Some(link) = &earlier {
        let info = sys::link_info(link.as_fd()).map_err(failed)?;
        if info.is_of(inode(target).map_err(failed)?) {
            return sys::update_link(link.as_fd(), program).map_err(failed);
        }
    }
    // The new one is there before the old one goes.
    let link = sys::create_link(program, target, attach_type).map_err(failed)?;
    if let Some(earlier) = earlier {
        fs::remove_file(pin).map_err(failed)?;
        // Fails for a link whose target is gone, and then there is nothing to do.
        let _ = sys::detach_link(earlier.as_fd());
    }
    sys::pin(link.as_fd(), pin).map_err(failed)
}

/// By which the kernel tells cgroups and namespaces apart.
fn inode(target: BorrowedFd<'_>) -> io::Result<u64> {
    let file = File::from(target.try_clone_to_owned()?);
    Ok(file.metadata()?.ino())
}
