//! Who owns an address: of several documents that give the same one, the first in file order.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::file::At;
use super::resource::ResourceKey;

#[derive(Debug, Default)]
pub(super) struct Claims {
    by_address: BTreeMap<IpAddr, BTreeSet<(At, ResourceKey)>>,
    by_key: BTreeMap<ResourceKey, (At, Vec<IpAddr>)>,
}

impl Claims {
    /// Replaces what a resource claims, and tells which others this may concern.
    pub(super) fn replace(
        &mut self,
        key: &ResourceKey,
        claim: Option<(At, Vec<IpAddr>)>,
    ) -> BTreeSet<ResourceKey> {
        let mut concerned = BTreeSet::new();
        if let Some((at, addresses)) = self.by_key.remove(key) {
            for address in addresses {
                if let Some(owners) = self.by_address.get_mut(&address) {
                    owners.remove(&(at.clone(), key.clone()));
                    concerned.extend(owners.iter().map(|(_, key)| key.clone()));
                    if owners.is_empty() {
                        self.by_address.remove(&address);
                    }
                }
            }
        }
        if let Some((at, addresses)) = claim {
            for address in &addresses {
                let owners = self.by_address.entry(*address).or_default();
                concerned.extend(owners.iter().map(|(_, key)| key.clone()));
                owners.insert((at.clone(), key.clone()));
            }
            self.by_key.insert(key.clone(), (at, addresses));
        }
        concerned
    }

    pub(super) fn owner(&self, address: IpAddr) -> Option<&(At, ResourceKey)> {
        self.by_address.get(&address)?.first()
    }
}
