//! Who owns an address: of several documents that give the same one, the first in file order.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::file::At;
use super::resource::ResourceKey;

#[derive(Debug, Default)]
pub(super) struct Claims {
    by_address: BTreeSet<(IpAddr, At, ResourceKey)>,
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
                self.by_address.remove(&(address, at.clone(), key.clone()));
                concerned.extend(self.owners(address).map(|(_, key)| key.clone()));
            }
        }
        if let Some((at, addresses)) = claim {
            for address in &addresses {
                concerned.extend(self.owners(*address).map(|(_, key)| key.clone()));
                self.by_address.insert((*address, at.clone(), key.clone()));
            }
            self.by_key.insert(key.clone(), (at, addresses));
        }
        concerned
    }

    pub(super) fn owner(&self, address: IpAddr) -> Option<(&At, &ResourceKey)> {
        self.owners(address).next()
    }

    /// In file order.
    fn owners(&self, address: IpAddr) -> impl Iterator<Item = (&At, &ResourceKey)> {
        let first = (address, At::default(), ResourceKey::default());
        let from = self.by_address.range(first..);
        from.take_while(move |(other, ..)| *other == address)
            .map(|(_, at, key)| (at, key))
    }
}
