//! What some of the kernels that we run on lack, found out by trying, and what is done without it.
//!
//! Invariant: nothing is concluded from a version number: distributions carry changes back.

use std::io;

use aya::programs::{ProgramError, ProgramType};
use aya::sys::{BpfHelper, is_helper_supported};
use serde::Serialize;

use super::{CaptureError, netns};

/// What the kernel has of that which the agent can do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// A process can ask for the cookie of its network namespace (`SO_NETNS_COOKIE`).
    pub netns_option: bool,
    /// `sockops` programs can ask for the one of their socket (`bpf_get_netns_cookie`).
    pub netns_in_sockops: bool,
    /// `connect` programs can choose the error that the application gets (`bpf_set_retval`).
    pub set_errno: bool,
}

/// One of them, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    pub name: &'static str,
    pub present: bool,
    /// The first kernel that has it.
    pub since: &'static str,
    /// What is otherwise.
    pub without: &'static str,
}

impl Features {
    /// Asks the kernel, which takes the right to load programs.
    pub fn probe() -> Result<Self, CaptureError> {
        let connect = ProgramType::CgroupSockAddr;
        Ok(Self {
            netns_option: netns::has_cookie_option().map_err(|source| CaptureError::Probe {
                what: "SO_NETNS_COOKIE",
                source,
            })?,
            netns_in_sockops: has_helper(ProgramType::SockOps, BpfHelper::BPF_FUNC_get_netns_cookie)?,
            set_errno: has_helper(connect, BpfHelper::BPF_FUNC_set_retval)?,
        })
    }

    /// True where connections between two workloads of the node can do without the agent.
    #[must_use]
    pub fn fast_path(&self) -> bool {
        self.netns_in_sockops
    }

    /// In the order of the kernels that brought them.
    #[must_use]
    pub fn list(&self) -> [Feature; 4] {
        [
            Feature {
                name: "SO_NETNS_COOKIE",
                present: self.netns_option,
                since: "5.14",
                without: "the agent asks its own connect program instead",
            },
            Feature {
                name: "bpf_get_netns_cookie in sockops",
                present: self.netns_in_sockops,
                since: "5.15",
                without: "an application learns its real client when it asks for its peer, not before",
            },
            Feature {
                name: "fast path",
                present: self.fast_path(),
                since: "5.15",
                without: "connections between two pods of the node all go through the agent, since sockops \
                          programs cannot tell whose a socket is",
            },
            Feature {
                name: "bpf_set_retval",
                present: self.set_errno,
                since: "5.18",
                without: "refused connections are led to a port where nobody listens; refused DNS queries fail \
                          with EPERM, not ECONNREFUSED",
            },
        ]
    }
}

fn has_helper(program: ProgramType, helper: BpfHelper) -> Result<bool, CaptureError> {
    is_helper_supported(program, helper).map_err(|error| CaptureError::Probe {
        what: "the helpers of eBPF programs",
        source: match error {
            ProgramError::SyscallError(failed) => failed.io_error,
            other => io::Error::other(other),
        },
    })
}
