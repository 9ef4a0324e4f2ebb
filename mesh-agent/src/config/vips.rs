//! Stable addresses for services without one, from 240.240.0.0/16 and fd00:240:240::/64.
//!
//! A service's address follows from its name; where two names meet, the second takes the next free one, and keeps
//! it as long as it exists, restarts included: whoever looked it up may hold it for long.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::ServiceKey;

/// Host numbers 1 to this: neither the network nor the broadcast address.
const LAST: u16 = u16::MAX - 1;

/// Host numbers by service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vips {
    given: BTreeMap<ServiceKey, u16>,
    taken: BTreeMap<u16, ServiceKey>,
    /// Services whose number is another than when somebody last asked.
    changed: BTreeSet<ServiceKey>,
}

impl Vips {
    /// What an earlier run gave; contradictions in it are dropped.
    pub fn restore(given: impl IntoIterator<Item = (ServiceKey, u16)>) -> Self {
        let mut vips = Self::default();
        for (key, number) in given {
            let is_new = !vips.given.contains_key(&key) && !vips.taken.contains_key(&number);
            if (1..=LAST).contains(&number) && is_new {
                vips.taken.insert(number, key.clone());
                vips.given.insert(key, number);
            }
        }
        vips
    }

    pub fn given(&self) -> impl Iterator<Item = (&ServiceKey, u16)> {
        self.given.iter().map(|(key, number)| (key, *number))
    }

    /// What was given (`None`: taken back) since the last call.
    pub fn take_changes(&mut self) -> Vec<(ServiceKey, Option<u16>)> {
        let changed = std::mem::take(&mut self.changed).into_iter();
        changed
            .map(|key| {
                let number = self.given.get(&key).copied();
                (key, number)
            })
            .collect()
    }

    /// The service's addresses; `None` when all are taken. `free` says that nobody else uses an address.
    pub(super) fn give(&mut self, key: &ServiceKey, free: impl Fn(IpAddr) -> bool) -> Option<[IpAddr; 2]> {
        if let Some(number) = self.given.get(key) {
            let addresses = addresses(*number);
            if addresses.iter().all(|address| free(*address)) {
                return Some(addresses);
            }
            self.release(key);
        }
        let start = hash(key) % LAST;
        let number = (0..LAST)
            .map(|step| {
                1 + u16::try_from((u32::from(start) + u32::from(step)) % u32::from(LAST)).unwrap_or(0)
            })
            .find(|number| {
                !self.taken.contains_key(number) && addresses(*number).iter().all(|address| free(*address))
            })?;
        self.taken.insert(number, key.clone());
        self.given.insert(key.clone(), number);
        self.changed.insert(key.clone());
        Some(addresses(number))
    }

    /// The service that an address was given to.
    pub(super) fn holder(&self, address: IpAddr) -> Option<&ServiceKey> {
        // The number is at the end of both of its addresses.
        let [.., high, low] = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let number = u16::from_be_bytes([high, low]);
        let ours = addresses(number).contains(&address);
        self.taken.get(&number).filter(|_| ours)
    }

    pub(super) fn release(&mut self, key: &ServiceKey) {
        if let Some(number) = self.given.remove(key) {
            self.taken.remove(&number);
            self.changed.insert(key.clone());
        }
    }

    /// Forgets services that are no more.
    pub(super) fn retain(&mut self, keep: impl Fn(&ServiceKey) -> bool) {
        let gone: Vec<_> = self.given.keys().filter(|key| !keep(key)).cloned().collect();
        for key in gone {
            self.release(&key);
        }
    }
}

fn addresses(number: u16) -> [IpAddr; 2] {
    let [high, low] = number.to_be_bytes();
    [
        Ipv4Addr::new(240, 240, high, low).into(),
        Ipv6Addr::new(0xfd00, 0x240, 0x240, 0, 0, 0, 0, number).into(),
    ]
}

/// FNV-1a folded to 16 bits: it must not change from one version to the next, as the standard library's may.
fn hash(key: &ServiceKey) -> u16 {
    let bytes = key.namespace.bytes().chain([b'/']).chain(key.name.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let [a, b, c, d, e, f, g, h] = hash.to_be_bytes();
    u16::from_be_bytes([a ^ c ^ e ^ g, b ^ d ^ f ^ h])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ServiceKey {
        ServiceKey {
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    #[test]
    fn addresses_follow_from_names_and_stay() {
        let mut vips = Vips::default();
        let reviews = vips.give(&key("reviews"), |_| true).unwrap();
        let expected: [IpAddr; 2] = [
            "240.240.189.3".parse().unwrap(),
            "fd00:240:240::bd03".parse().unwrap(),
        ];
        assert_eq!(
            reviews, expected,
            "a change here moves the addresses of everybody who upgrades"
        );
        for other in 0..5_000 {
            vips.give(&key(&format!("s{other}")), |_| true).unwrap();
        }
        assert_eq!(vips.give(&key("reviews"), |_| true), Some(reviews));
        let given = vips.take_changes().into_iter();
        let mut again = Vips::restore(given.filter_map(|(key, number)| Some((key, number?))));
        assert_eq!(again, vips);
        let holder = again.holder(reviews[1]);
        assert_eq!(holder, Some(&key("reviews")));
        assert_eq!(again.holder("10.0.189.3".parse().unwrap()), None);
        assert_eq!(again.take_changes(), []);
        assert_eq!(again.give(&key("reviews"), |_| true), Some(reviews));
    }

    #[test]
    fn all_are_given_once_and_then_none() {
        let mut vips = Vips::default();
        let mut seen = BTreeSet::new();
        for number in 0..LAST {
            let [v4, v6] = vips.give(&key(&number.to_string()), |_| true).unwrap();
            assert!(seen.insert(v4) && seen.insert(v6));
        }
        assert_eq!(vips.give(&key("one-more"), |_| true), None);
        vips.take_changes();
        vips.release(&key("7"));
        assert_eq!(vips.take_changes(), [(key("7"), None)]);
        assert!(vips.give(&key("one-more"), |_| true).is_some());
    }

    #[test]
    fn an_address_in_use_is_passed_over() {
        let mut vips = Vips::default();
        let first = vips.give(&key("reviews"), |_| true).unwrap();
        let second = vips.give(&key("reviews"), |address| address != first[0]).unwrap();
        assert_ne!(first, second);
    }
}
