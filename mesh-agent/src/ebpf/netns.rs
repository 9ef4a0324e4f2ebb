//! Network namespaces: what names one, and doing something inside.
//!
//! Invariant: a thread that entered a namespace is back in the agent's own before `within` returns, or the
//! process ends: a runtime thread in the wrong namespace would send traffic from the wrong workload.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::process;
use std::sync::Arc;

use mesh_common::{NetEndpoint, OwnSocket, WorkloadKey};
use nix::sched::{CloneFlags, setns};

use super::maps::Maps;
use super::{Shared, clock};

/// The namespace of the agent itself, opened before any other is entered.
#[derive(Clone, Debug)]
pub(super) struct Home(Arc<OwnedFd>);

impl Home {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self(Arc::new(File::open("/proc/thread-self/ns/net")?.into())))
    }
}

/// An open network namespace. It lives at least as long as this, even if its name is removed.
#[derive(Debug)]
pub(super) struct Netns {
    file: OwnedFd,
    cookie: WorkloadKey,
    home: Home,
}

impl Netns {
    /// The agent's own.
    pub(super) fn home(shared: &Shared) -> io::Result<Self> {
        Self::from_file(File::from(shared.home.0.try_clone()?), shared)
    }

    /// Fails with EINVAL if `file` is not a network namespace.
    pub(super) fn from_file(file: File, shared: &Shared) -> io::Result<Self> {
        let (file, home) = (OwnedFd::from(file), &shared.home);
        let cookie = within(file.as_fd(), home, || {
            if shared.features.netns_option {
                netns_cookie(&any_socket()?)
            } else {
                told_cookie(&any_socket()?, &shared.maps)
            }
        })??;
        Ok(Self {
            file,
            cookie,
            home: home.clone(),
        })
    }

    pub(super) fn cookie(&self) -> WorkloadKey {
        self.cookie
    }

    pub(super) fn as_file(&self) -> &OwnedFd {
        &self.file
    }

    /// Runs `action` on this thread inside the namespace.
    pub(super) fn within<R>(&self, action: impl FnOnce() -> R) -> io::Result<R> {
        within(self.file.as_fd(), &self.home, action)
    }
}

fn within<R>(netns: impl AsFd, home: &Home, action: impl FnOnce() -> R) -> io::Result<R> {
    /// Returns home even if `action` panics.
    struct Return<'a>(&'a Home);
    impl Drop for Return<'_> {
        fn drop(&mut self) {
            if let Err(error) = setns(&*self.0.0, CloneFlags::CLONE_NEWNET) {
                tracing::error!(%error, "cannot return to the agent's own network namespace: stopping at once");
                process::abort();
            }
        }
    }
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    let _return = Return(home);
    Ok(action())
}

/// `SO_NETNS_COOKIE` of `asm-generic/socket.h` (Linux 5.14), which libc does not have everywhere.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Whether a process can ask for the cookie of its namespace.
pub(super) fn has_cookie_option() -> io::Result<bool> {
    match netns_cookie(&any_socket()?) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Any socket of the namespace tells its cookie; nix can make one without binding it.
fn any_socket() -> io::Result<UdpSocket> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    Ok(socket.into())
}

fn netns_cookie(socket: &UdpSocket) -> io::Result<WorkloadKey> {
    get_u64(socket, SO_NETNS_COOKIE)
}

/// Lets our program at `connect`, which knows the cookie, write it into the entry of a socket of ours.
fn told_cookie(socket: &UdpSocket, maps: &Maps) -> io::Result<WorkloadKey> {
    let key = socket_cookie(socket)?;
    let asks = OwnSocket {
        workload: UNKNOWN,
        created_at: clock::monotonic_ns(),
        present: NetEndpoint::NONE,
        reserved: 0,
    };
    maps.own.insert(&key, &asks)?;
    // The program runs before there is a look for a route, so a namespace without one answers, too.
    let _ = socket.connect((Ipv4Addr::LOCALHOST, DISCARD));
    let answer = maps.own.get(&key);
    maps.own.remove(&key)?;
    match answer?.map_or(UNKNOWN, |own| own.workload) {
        UNKNOWN => Err(io::Error::other(
            "the programs at the cgroup root do not see the agent's own sockets, so they would see nobody's",
        )),
        cookie => Ok(cookie),
    }
}

/// No namespace has this cookie.
const UNKNOWN: WorkloadKey = 0;

/// A UDP socket that is connected sends nothing by it; the port just must not be zero.
const DISCARD: u16 = 9;

/// The number by which the kernel side knows a socket.
pub(super) fn socket_cookie(socket: &impl AsFd) -> io::Result<u64> {
    get_u64(socket, libc::SO_COOKIE)
}

fn get_u64(socket: &impl AsFd, option: libc::c_int) -> io::Result<u64> {
    let mut value = 0_u64;
    let mut len = libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?;
    // SAFETY: `value` is `len` bytes, which is what both options write.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}
