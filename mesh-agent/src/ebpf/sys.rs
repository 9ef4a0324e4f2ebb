//! The few `bpf(2)` commands that aya does not offer: updating a pinned cgroup or netns link, and map access
//! through a shared handle (aya's needs `&mut`, which would put a lock on every connection).
//!
//! Invariant: everything unsafe about `bpf(2)` is in this file, behind safe functions.

use std::ffi::CString;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya::Pod;

/// `enum bpf_cmd` of `linux/bpf.h`.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
enum Command {
    MapCreate = 0,
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    MapGetNextKey = 4,
    ObjPin = 6,
    ObjGet = 7,
    ProgramFdById = 13,
    ObjGetInfo = 15,
    ProgramQuery = 16,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

/// `BPF_ANY`: create or replace.
const ANY: u64 = 0;

#[repr(C)]
struct MapElement {
    map: u32,
    pad: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ObjectPath {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct ObjectInfo {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
struct ObjectId {
    id: u32,
    next: u32,
    flags: u32,
}

/// All of it: newer kernels write its last field whatever size they are told.
#[repr(C)]
struct ProgramQuery {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    pad: u32,
    program_flags: u64,
    link_ids: u64,
    link_flags: u64,
    revision: u64,
}

/// The beginning of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_len: u32,
    translated_len: u32,
    jited: u64,
    translated: u64,
    load_time: u64,
    uid: u32,
    maps: u32,
    map_ids: u64,
    name: [u8; 16],
}

/// What is attached at a hook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Query {
    /// Of the attachment: 0 or `BPF_F_ALLOW_OVERRIDE` keep others out, `BPF_F_ALLOW_MULTI` does not.
    pub(super) flags: u32,
    pub(super) ids: Vec<u32>,
}

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MapInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    flags: u32,
}

/// The beginning of `struct bpf_link_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LinkInfo {
    kind: u32,
    pub(super) id: u32,
    pub(super) program_id: u32,
    pad: u32,
}

/// Opens the object pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjectPath {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    bpf(Command::ObjGet, &mut attr).and_then(owned)
}

pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjectPath {
        path: path.as_ptr() as u64,
        fd: raw(object),
        flags: 0,
    };
    bpf(Command::ObjPin, &mut attr).map(drop)
}

/// Attaches a program to a cgroup or a network namespace.
pub(super) fn create_link(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        program: raw(program),
        target: raw(target),
        attach_type,
        flags: 0,
    };
    bpf(Command::LinkCreate, &mut attr).and_then(owned)
}

/// Replaces a link's program in one step: no connection sees the hook without one.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate {
        link: raw(link),
        program: raw(program),
        flags: 0,
        old_program: 0,
    };
    bpf(Command::LinkUpdate, &mut attr).map(drop)
}

/// Makes the smallest of maps and drops it, to see whether `bpf(2)` can be used.
pub(super) fn probe() -> io::Result<()> {
    /// `BPF_MAP_TYPE_ARRAY`
    const ARRAY: u32 = 2;
    let mut attr = MapCreate {
        kind: ARRAY,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        flags: 0,
    };
    bpf(Command::MapCreate, &mut attr).and_then(owned).map(drop)
}

/// The programs attached directly at a cgroup or a network namespace.
pub(super) fn query(target: BorrowedFd<'_>, attach_type: u32) -> io::Result<Query> {
    /// The kernel's own limit for cgroups, and for network namespaces.
    const MOST: u32 = 64;
    let mut ids = vec![0_u32; MOST as usize];
    let mut attr = ProgramQuery {
        target: raw(target),
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: MOST,
        pad: 0,
        program_flags: 0,
        link_ids: 0,
        link_flags: 0,
        revision: 0,
    };
    bpf(Command::ProgramQuery, &mut attr)?;
    ids.truncate(attr.count.min(MOST) as usize);
    Ok(Query {
        flags: attr.attach_flags,
        ids,
    })
}

/// A program's name, cut by the kernel after 15 bytes. Takes CAP_SYS_ADMIN.
pub(super) fn program_name(id: u32) -> io::Result<String> {
    let mut attr = ObjectId {
        id,
        next: 0,
        flags: 0,
    };
    let program = bpf(Command::ProgramFdById, &mut attr).and_then(owned)?;
    let info: ProgramInfo = info(program.as_fd())?;
    let end = info.name.iter().position(|byte| *byte == 0);
    let name = &info.name[..end.unwrap_or(info.name.len())];
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// Takes a link's program off its hook at once. Without it that happens some time after the last pin is gone.
pub(super) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(Command::LinkDetach, &mut raw(link)).map(drop)
}

pub(super) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    info(map)
}

pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(link)
}

/// `T` must be the beginning of the object's info struct: the kernel fills as much as it is given room for.
fn info<T: Copy + Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let len = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let mut attr = ObjectInfo {
        fd: raw(object),
        len,
        info: (&raw mut info) as u64,
    };
    bpf(Command::ObjGetInfo, &mut attr)?;
    Ok(info)
}

/// `None` if the key is not there.
pub(super) fn lookup<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::zeroed();
    let mut attr = element(map, key, value.as_mut_ptr() as u64);
    if absent(bpf(Command::MapLookup, &mut attr))? {
        return Ok(None);
    }
    // SAFETY: the kernel wrote the value, and any bit pattern is a valid `V: Pod`.
    Ok(Some(unsafe { value.assume_init() }))
}

/// A value per possible CPU; `cpus` is their number.
pub(super) fn lookup_per_cpu(map: BorrowedFd<'_>, key: u32, cpus: usize) -> io::Result<Vec<u64>> {
    let mut values = vec![0_u64; cpus];
    let mut attr = element(map, &key, values.as_mut_ptr() as u64);
    bpf(Command::MapLookup, &mut attr)?;
    Ok(values)
}

pub(super) fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = element(map, key, std::ptr::from_ref(value) as u64);
    bpf(Command::MapUpdate, &mut attr).map(drop)
}

/// True if there was such a key.
pub(super) fn delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = element(map, key, 0);
    Ok(!absent(bpf(Command::MapDelete, &mut attr))?)
}

/// The key after `key`, or the first one.
pub(super) fn next_key<K: Pod>(map: BorrowedFd<'_>, key: Option<&K>) -> io::Result<Option<K>> {
    let mut next = MaybeUninit::<K>::zeroed();
    let mut attr = MapElement {
        map: raw(map),
        pad: 0,
        key: key.map_or(0, |key| std::ptr::from_ref(key) as u64),
        value: next.as_mut_ptr() as u64,
        flags: ANY,
    };
    if absent(bpf(Command::MapGetNextKey, &mut attr))? {
        return Ok(None);
    }
    // SAFETY: the kernel wrote the key, and any bit pattern is a valid `K: Pod`.
    Ok(Some(unsafe { next.assume_init() }))
}

fn element<K: Pod>(map: BorrowedFd<'_>, key: &K, value: u64) -> MapElement {
    MapElement {
        map: raw(map),
        pad: 0,
        key: std::ptr::from_ref(key) as u64,
        value,
        flags: ANY,
    }
}

fn absent(result: io::Result<libc::c_long>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(error) => Err(error),
    }
}

/// The descriptor that a command returned.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: a new descriptor that the kernel just gave to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    // A borrowed descriptor is never negative.
    fd.as_fd().as_raw_fd().unsigned_abs()
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

fn bpf<A>(command: Command, attr: &mut A) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is the beginning of `union bpf_attr` for this command (the kernel takes the rest for
    // zero), and each pointer in it is to memory that outlives the call, sized as the map's info says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            std::ptr::from_mut(attr),
            size_of::<A>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
