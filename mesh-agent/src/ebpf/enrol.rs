//! Taking a workload in and letting it go.
//!
//! Invariants: a workload's entry is written last on enrolment and removed first on release, so the kernel side
//! never captures for a workload that is not ready. Dropping an [`Enrolment`] changes nothing: what happens to
//! the workload when the agent ends is its own choice (hold or open); only [`Enrolment::release`] lets it go.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;

use mesh_common::maps::{self, DNS_V4_SLOTS, DNS_V6_SLOTS};
use mesh_common::{
    DnsKey, ListenerKey, NetAddr, NetPort, WorkloadEntry, WorkloadKey, listener_kind, workload_flags,
};
use nix::ifaddrs::getifaddrs;

use super::listeners::Listeners;
use super::namespace::KernelNamespace;
use super::netns::{Netns, NetnsIdentity};
use super::{CaptureError, Shared, programs};
use crate::sock::Namespace;

/// Where a workload runs.
#[derive(Debug)]
pub enum Place {
    /// A network namespace by name, as `ip netns` and container runtimes leave it on a file system.
    NetnsPath(PathBuf),
    /// A network namespace that somebody opened for us.
    NetnsFile(File),
}

/// A workload to be captured.
#[derive(Debug)]
pub struct EnrolRequest {
    pub place: Place,
    /// The workload's own addresses: one of a family at most, and at least one.
    pub addresses: Vec<IpAddr>,
    /// Without an agent, refuse its traffic rather than let it pass unmeshed.
    pub hold: bool,
}

/// A captured workload.
#[derive(Debug)]
pub struct Enrolment {
    shared: Arc<Shared>,
    namespace: Arc<KernelNamespace>,
}

impl Enrolment {
    /// Names the workload in the kernel's maps.
    #[must_use]
    pub fn key(&self) -> WorkloadKey {
        self.namespace.netns.cookie()
    }

    #[must_use]
    pub fn namespace(&self) -> Arc<dyn Namespace> {
        Arc::<KernelNamespace>::clone(&self.namespace)
    }

    /// Tells whether a path still names this workload's namespace (see [`NetnsIdentity::of`]).
    #[must_use]
    pub fn identity(&self) -> NetnsIdentity {
        self.namespace.netns.identity()
    }

    /// Changes addresses or the choice for when there is no agent, without touching the listeners.
    pub fn update(&self, addresses: &[IpAddr], hold: bool) -> Result<(), CaptureError> {
        let workloads = &self.shared.maps.workloads;
        let failed = |source| CaptureError::Map {
            map: maps::WORKLOADS,
            source,
        };
        let gone = || failed(io::Error::from(io::ErrorKind::NotFound));
        check_addresses(&self.namespace.netns, "its network namespace", addresses)?;
        let mut entry = workloads.get(&self.key()).map_err(failed)?.ok_or_else(gone)?;
        describe(&mut entry, addresses, hold);
        workloads.insert(&self.key(), &entry).map_err(failed)
    }

    /// Ends the capture: from now on the workload is as if it had never been enrolled.
    pub fn release(self) -> Result<(), CaptureError> {
        self.shared.forget(self.key())
    }
}

impl Shared {
    pub(super) fn enrol(
        self: &Arc<Self>,
        request: EnrolRequest,
    ) -> Result<(Enrolment, Listeners), CaptureError> {
        let (place, netns) = self.open(request.place)?;
        check_addresses(&netns, &place, &request.addresses)?;
        let key = netns.cookie();
        let before = self.maps.workloads.get(&key).ok().flatten();
        let listeners = netns
            .within(|| Listeners::open(before.as_ref()))
            .and_then(|opened| opened)
            .map_err(|source| CaptureError::Listeners {
                place: place.clone(),
                source,
            })?;
        let mut entry = EMPTY;
        describe(&mut entry, &request.addresses, request.hold);
        listeners
            .describe(&mut entry)
            .map_err(|source| CaptureError::Listeners {
                place: place.clone(),
                source,
            })?;
        programs::attach_lookup(&self.folders, key, netns.as_file().as_fd())?;
        for (kind, socket) in [
            (listener_kind::OUTBOUND, &listeners.outbound),
            (listener_kind::INBOUND, &listeners.inbound),
        ] {
            let listener = ListenerKey {
                workload: key,
                kind,
                reserved: 0,
            };
            self.maps
                .listeners
                .insert_socket(&listener, socket)
                .map_err(|source| CaptureError::Map {
                    map: maps::LISTENERS,
                    source,
                })?;
        }
        self.maps
            .workloads
            .insert(&key, &entry)
            .map_err(|source| CaptureError::Map {
                map: maps::WORKLOADS,
                source,
            })?;
        let dns_v6_ports = entry
            .dns_v6_ports
            .map(NetPort::host)
            .into_iter()
            .filter(|port| *port != 0)
            .collect();
        let namespace = Arc::new(KernelNamespace {
            netns,
            maps: Arc::clone(&self.maps),
            dns_v6_ports,
        });
        Ok((
            Enrolment {
                shared: Arc::clone(self),
                namespace,
            },
            listeners,
        ))
    }

    /// Removes whatever there is of a workload.
    pub(super) fn forget(&self, key: WorkloadKey) -> Result<(), CaptureError> {
        self.maps
            .workloads
            .remove(&key)
            .map_err(|source| CaptureError::Map {
                map: maps::WORKLOADS,
                source,
            })?;
        let link = self.folders.lookup_link(key);
        match fs::remove_file(&link) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(CaptureError::Pin { path: link, source });
            }
            _ => {}
        }
        for kind in [listener_kind::OUTBOUND, listener_kind::INBOUND] {
            // Gone already if the socket was closed.
            let _ = self.maps.listeners.remove(&ListenerKey {
                workload: key,
                kind,
                reserved: 0,
            });
        }
        for slot in 0..DNS_V4_SLOTS + DNS_V6_SLOTS {
            let _ = self.maps.dns_servers.remove(&DnsKey {
                workload: key,
                slot,
                reserved: 0,
            });
        }
        let flows: Vec<_> = self
            .maps
            .flows
            .keys()
            .filter(|flow| flow.workload == key)
            .collect();
        for flow in flows {
            let _ = self.maps.flows.remove(&flow);
        }
        Ok(())
    }

    fn open(&self, place: Place) -> Result<(String, Netns), CaptureError> {
        let (place, opened) = match place {
            Place::NetnsPath(path) => (path.display().to_string(), Netns::open(&path, &self.home)),
            Place::NetnsFile(file) => (format!("{file:?}"), Netns::from_file(file, &self.home)),
        };
        match opened {
            Ok(netns) => Ok((place, netns)),
            Err(source) => Err(CaptureError::Namespace { place, source }),
        }
    }
}

const EMPTY: WorkloadEntry = WorkloadEntry {
    v4: NetAddr::NONE,
    v6: NetAddr::NONE,
    flags: 0,
    outbound_port: NetPort::from_net(0),
    inbound_port: NetPort::from_net(0),
    dns_v4_port: NetPort::from_net(0),
    dns_v6_ports: [NetPort::from_net(0); DNS_V6_SLOTS as usize],
    reserved: 0,
};

fn describe(entry: &mut WorkloadEntry, addresses: &[IpAddr], hold: bool) {
    let first = |v4: bool| {
        addresses
            .iter()
            .find(|ip| ip.is_ipv4() == v4)
            .map_or(NetAddr::NONE, |ip| (*ip).into())
    };
    entry.v4 = first(true);
    entry.v6 = first(false);
    entry.flags = if hold { workload_flags::HOLD } else { 0 };
}

/// A workload under a wrong address would be captured into nowhere.
fn check_addresses(netns: &Netns, place: &str, wanted: &[IpAddr]) -> Result<(), CaptureError> {
    if wanted.is_empty() {
        return Err(CaptureError::NoAddress);
    }
    let present = netns
        .within(addresses_here)
        .and_then(|found| found)
        .map_err(|source| CaptureError::Namespace {
            place: place.to_owned(),
            source,
        })?;
    match wanted.iter().find(|address| !present.contains(address)) {
        None => Ok(()),
        Some(address) => Err(CaptureError::NoSuchAddress {
            place: place.to_owned(),
            address: *address,
            present,
        }),
    }
}

fn addresses_here() -> io::Result<Vec<IpAddr>> {
    let to_ip = |address: nix::sys::socket::SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    Ok(getifaddrs()?
        .filter_map(|interface| to_ip(interface.address?))
        .filter(|ip| !ip.is_loopback())
        .collect())
}
