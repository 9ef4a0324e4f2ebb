//! Programs of others at our hooks.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

/// How the others' program is attached.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attach {
    Exclusive,
    Shared,
}

/// `BPF_CGROUP_INET4_CONNECT`
const CONNECT4: u32 = 10;

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

/// That for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachTo {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

/// Attaches a program that lets everything pass to `connect4` of a cgroup; it goes with the cgroup.
pub(crate) fn attach(cgroup: &Path, name: &CStr, how: Attach) {
    /// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`
    const KIND: u32 = 18;
    const PROG_LOAD: libc::c_long = 5;
    const PROG_ATTACH: libc::c_long = 8;
    // Before 5.11 what all processes of a user have loaded counts.
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).unwrap();
    // r0 = 1; exit
    let code: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let mut load = Load {
        kind: KIND,
        instructions: 2,
        code: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: CONNECT4,
        ..Load::default()
    };
    let bytes = name.to_bytes();
    load.name[..bytes.len()].copy_from_slice(bytes);
    let program = bpf(PROG_LOAD, &mut load).unwrap();
    // SAFETY: a descriptor that the kernel just gave to us alone.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    let cgroup = File::open(cgroup).unwrap();
    let mut attach = AttachTo {
        target: cgroup.as_raw_fd().unsigned_abs(),
        program: program.as_raw_fd().unsigned_abs(),
        attach_type: CONNECT4,
        flags: match how {
            Attach::Exclusive => 0,
            // BPF_F_ALLOW_MULTI
            Attach::Shared => 2,
        },
    };
    bpf(PROG_ATTACH, &mut attach).unwrap();
}

fn bpf<A>(command: libc::c_long, attr: &mut A) -> io::Result<i32> {
    // SAFETY: `attr` is the beginning of `union bpf_attr` for this command, and what it points to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}
