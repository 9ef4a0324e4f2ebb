//! Taking a workload in and letting it go.
//!
//! Invariants: a workload's entry is written last on enrolment and removed first on release, so the kernel side
//! never captures for a workload that is not ready. Dropping an [`Enrolment`] changes nothing: what happens to
//! the workload when the agent ends is its own choice (hold or open); only [`Enrolment::release`] lets it go.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::maps::{self, DNS_V4_SLOTS, DNS_V6_SLOTS};
use mesh_common::{
    DnsKey, ListenerKey, NetAddr, NetPort, WorkloadEntry, WorkloadKey, listener_kind, workload_flags,
};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;

use super::listeners::Listeners;
use super::namespace::KernelNamespace;
use super::netns::Netns;
use super::place::{Place, PlaceIdentity, Site};
use super::{CaptureError, Shared, programs, uninstall};
use crate::sock::Namespace;

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
    identity: PlaceIdentity,
}

impl Enrolment {
    /// Names the workload in the kernel's maps.
    #[must_use]
    pub fn key(&self) -> WorkloadKey {
        self.namespace.key
    }

    #[must_use]
    pub fn namespace(&self) -> Arc<dyn Namespace> {
        Arc::<KernelNamespace>::clone(&self.namespace)
    }

    /// To compare with what a place names later on (see [`PlaceIdentity::of`]).
    #[must_use]
    pub fn identity(&self) -> PlaceIdentity {
        self.identity
    }

    /// Changes addresses or the choice for when there is no agent, without touching the listeners.
    pub fn update(&self, addresses: &[IpAddr], hold: bool) -> Result<(), CaptureError> {
        let workloads = &self.shared.maps.workloads;
        let failed = |source| CaptureError::Map {
            map: maps::WORKLOADS,
            source,
        };
        let gone = || failed(io::Error::from(io::ErrorKind::NotFound));
        check_addresses(&self.namespace.netns, "the workload", addresses)?;
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
        let site = Site::open(request.place, self)?;
        check_addresses(&site.netns, &site.name, &request.addresses)?;
        let before = self.maps.workloads.get(&site.key).ok().flatten();
        let failed = |source| CaptureError::Listeners {
            place: site.name.clone(),
            source,
        };
        let listeners = site
            .netns
            .within(|| Listeners::open(before.as_ref(), !site.shares_host()))
            .and_then(|opened| opened)
            .map_err(failed)?;
        let mut entry = EMPTY;
        describe(&mut entry, &request.addresses, request.hold);
        listeners.describe(&mut entry).map_err(failed)?;
        if let Err(error) = self.activate(&site, &entry, &listeners) {
            // Half a workload is none, unless it was whole before.
            if before.is_none() {
                let _ = self.forget(site.key);
            }
            return Err(error);
        }
        let dns_v6_ports = entry
            .dns_v6_ports
            .map(NetPort::host)
            .into_iter()
            .filter(|port| *port != 0)
            .collect();
        let enrolment = Enrolment {
            shared: Arc::clone(self),
            identity: site.identity,
            namespace: Arc::new(KernelNamespace {
                key: site.key,
                netns: site.netns,
                maps: Arc::clone(&self.maps),
                dns_v6_ports,
            }),
        };
        Ok((enrolment, listeners))
    }

    /// Tells the kernel side, what captures last.
    fn activate(
        &self,
        site: &Site,
        entry: &WorkloadEntry,
        listeners: &Listeners,
    ) -> Result<(), CaptureError> {
        site.attach(&self.loader, &self.folders)?;
        let inbound = listeners
            .inbound
            .iter()
            .map(|socket| (listener_kind::INBOUND, socket));
        for (kind, socket) in inbound.chain([(listener_kind::OUTBOUND, &listeners.outbound)]) {
            self.maps
                .listeners
                .insert_socket(
                    &ListenerKey {
                        workload: site.key,
                        kind,
                        reserved: 0,
                    },
                    socket,
                )
                .map_err(|source| CaptureError::Map {
                    map: maps::LISTENERS,
                    source,
                })?;
        }
        self.maps
            .workloads
            .insert(&site.key, entry)
            .map_err(|source| CaptureError::Map {
                map: maps::WORKLOADS,
                source,
            })?;
        // Only now: until here its choice for when there is no agent held, by what the older agent left.
        uninstall::release_from_other_layouts(&self.folders, site.key)
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
        programs::detach_workload(&self.folders, key)?;
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
        for flows in [&self.maps.flows, &self.maps.presented] {
            let own: Vec<_> = flows.keys().filter(|flow| flow.workload == key).collect();
            for flow in own {
                let _ = flows.remove(&flow);
            }
        }
        Ok(())
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

/// A workload under a wrong address would be captured into nowhere, and so would one without loopback.
fn check_addresses(netns: &Netns, place: &str, wanted: &[IpAddr]) -> Result<(), CaptureError> {
    if wanted.is_empty() {
        return Err(CaptureError::NoAddress);
    }
    let here = netns
        .within(Addresses::here)
        .and_then(|found| found)
        .map_err(|source| CaptureError::Namespace {
            place: place.to_owned(),
            source,
        })?;
    if !here.loopback {
        return Err(CaptureError::LoopbackDown {
            place: place.to_owned(),
        });
    }
    match wanted.iter().find(|address| !here.present.contains(address)) {
        None => Ok(()),
        Some(address) => Err(CaptureError::NoSuchAddress {
            place: place.to_owned(),
            address: *address,
            present: here.present,
        }),
    }
}

/// What a namespace has.
struct Addresses {
    present: Vec<IpAddr>,
    loopback: bool,
}

impl Addresses {
    /// Of the calling thread's namespace.
    fn here() -> io::Result<Self> {
        let mut found = Self {
            present: Vec::new(),
            loopback: false,
        };
        for interface in getifaddrs()? {
            let up = interface.flags.contains(InterfaceFlags::IFF_UP);
            found.loopback |= up && interface.flags.contains(InterfaceFlags::IFF_LOOPBACK);
            let v4 = |address: &SockaddrStorage| address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            let v6 = |address: &SockaddrStorage| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()));
            let ip = interface
                .address
                .and_then(|address| v4(&address).or_else(|| v6(&address)));
            found.present.extend(ip.filter(|ip| !ip.is_loopback()));
        }
        Ok(found)
    }
}
