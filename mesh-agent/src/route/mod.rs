//! Which rule a request falls under, and which of the rule's backends it goes to.
//!
//! Pure: values in, values out, randomness passed in. Invariants: the rules come in the order of their
//! precedence, so the first match wins; regular expressions come anchored at both ends; nothing is allocated
//! unless a header stands on several lines or an escaped query parameter meets a regular expression.

mod edit;
mod path;
mod select;

pub use edit::apply;
pub use path::{BadPath, canonical_path};
pub use select::select;

use crate::model::Backend;

/// One of `backends`, each as often as its weight says. `None` when there is nothing to choose from or all
/// weights are 0: such a request gets 500, as the Gateway API says.
pub fn pick_backend(backends: &[Backend], random: u64) -> Option<&Backend> {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let mut ticket = random.checked_rem(total)?;
    backends.iter().find(|backend| {
        let weight = u64::from(backend.weight);
        let won = ticket < weight;
        ticket = ticket.saturating_sub(weight);
        won
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(weights: &[u32]) -> Vec<Backend> {
        weights
            .iter()
            .map(|&weight| Backend {
                service: None,
                weight,
                edits: Default::default(),
            })
            .collect()
    }

    #[test]
    fn nothing_to_choose_from() {
        assert!(pick_backend(&[], 7).is_none());
        assert!(pick_backend(&backends(&[0, 0]), 7).is_none());
    }

    #[test]
    fn each_backend_gets_exactly_its_share() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..200 {
            let weights: Vec<u32> = (0..random.usize(1..6)).map(|_| random.u32(0..8)).collect();
            let all = backends(&weights);
            let total: u32 = weights.iter().sum();
            let mut seen = vec![0; weights.len()];
            for ticket in 0..u64::from(total) {
                let picked = pick_backend(&all, ticket).unwrap();
                let index = all.iter().position(|b| std::ptr::eq(b, picked)).unwrap();
                seen[index] += 1;
            }
            assert_eq!(seen, weights);
        }
    }

    #[test]
    fn the_largest_weights_do_not_overflow() {
        let all = backends(&[u32::MAX, u32::MAX, u32::MAX]);
        assert!(pick_backend(&all, u64::MAX).is_some());
    }
}
