//! Which endpoint takes a request.
//!
//! Pure: the round robin's counter, the randomness and the time are passed in. Invariants: an endpoint that was
//! tried for this request is taken again only when there is no other; one that rests is taken only when all
//! others rest or were tried.

use std::net::SocketAddr;
use std::time::Duration;

use crate::model::{Endpoint, LoadBalancing};

/// How long an endpoint that could not be reached is left alone: at first, and at most when it fails again and again
/// (Envoy's base time for ejected hosts). One that fails at once is never busy, so without this the less busy of two
/// would be the dead one, for every request.
pub const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// The endpoint for the next try; `None` when there are none.
///
/// `round_robin` is a counter of the caller's, one higher with each request.
pub fn pick<'a>(
    endpoints: &'a [Endpoint],
    policy: LoadBalancing,
    tried: &[SocketAddr],
    now: Duration,
    round_robin: u64,
    random: u64,
) -> Option<&'a Endpoint> {
    let past = Past { tried, now };
    match policy {
        LoadBalancing::RoundRobin => next_in_turn(endpoints, past, round_robin),
        LoadBalancing::LeastRequest => less_busy_of_two(endpoints, past, random),
    }
}

/// What speaks against an endpoint.
#[derive(Clone, Copy)]
struct Past<'a> {
    tried: &'a [SocketAddr],
    now: Duration,
}

impl Past<'_> {
    fn is_untried(self, endpoint: &Endpoint) -> bool {
        !self.tried.contains(&endpoint.address)
    }

    fn is_good(self, endpoint: &Endpoint) -> bool {
        self.is_untried(endpoint) && !endpoint.load.rests(self.now)
    }
}

fn next_in_turn<'a>(endpoints: &'a [Endpoint], past: Past<'_>, turn: u64) -> Option<&'a Endpoint> {
    let (before, from) = endpoints.split_at_checked(share(turn, endpoints.len())?)?;
    let mut round = from.iter().chain(before);
    round
        .clone()
        .find(|endpoint| past.is_good(endpoint))
        .or_else(|| round.find(|endpoint| past.is_untried(endpoint)))
        .or_else(|| from.first())
}

/// The power of two choices: nearly as even as asking all of them, and no herd runs to the one least busy.
fn less_busy_of_two<'a>(endpoints: &'a [Endpoint], past: Past<'_>, random: u64) -> Option<&'a Endpoint> {
    let count = endpoints.len();
    let first = share(random & 0xffff_ffff, count)?;
    let good = |at: usize| endpoints.get(at).filter(|endpoint| past.is_good(endpoint));
    // Any of the others: as many steps further round as there are others.
    let second = share(random >> 32, count - 1).and_then(|step| good((first + 1 + step) % count));
    match (good(first), second) {
        (Some(one), Some(other)) if other.load.active() < one.load.active() => Some(other),
        (Some(one), _) => Some(one),
        (None, Some(other)) => Some(other),
        (None, None) => next_in_turn(endpoints, past, random),
    }
}

/// A number below `count`; `None` when there is none.
fn share(number: u64, count: usize) -> Option<usize> {
    let count = u64::try_from(count).ok()?;
    usize::try_from(number.checked_rem(count)?).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use super::*;

    const POLICIES: [LoadBalancing; 2] = [LoadBalancing::RoundRobin, LoadBalancing::LeastRequest];

    const NOW: Duration = Duration::from_secs(100);

    fn endpoints(count: u16) -> Vec<Endpoint> {
        (0..count)
            .map(|port| Endpoint {
                address: ([192, 0, 2, 1], port).into(),
                workload: None,
                load: Arc::default(),
            })
            .collect()
    }

    #[test]
    fn none_of_none() {
        for policy in POLICIES {
            assert!(pick(&[], policy, &[], NOW, 3, 3).is_none());
        }
    }

    #[test]
    fn round_robin_takes_turns_and_wraps() {
        let all = endpoints(3);
        let ports: Vec<u16> = [0, 1, 2, 3, u64::MAX]
            .iter()
            .map(|&turn| {
                pick(&all, LoadBalancing::RoundRobin, &[], NOW, turn, 9)
                    .unwrap()
                    .address
                    .port()
            })
            .collect();
        assert_eq!(ports, [0, 1, 2, 0, 0]);
    }

    /// Both policies, against the rule written naively: a tried endpoint only when all were tried.
    #[test]
    fn tried_endpoints_are_avoided_while_others_are_left() {
        let mut random = fastrand::Rng::with_seed(4);
        for _ in 0..20_000 {
            let all = endpoints(random.u16(1..6));
            let tried: Vec<SocketAddr> = all.iter().map(|e| e.address).filter(|_| random.bool()).collect();
            let all_tried = tried.len() == all.len();
            for policy in POLICIES {
                let picked = pick(&all, policy, &tried, NOW, random.u64(..), random.u64(..)).unwrap();
                assert_eq!(tried.contains(&picked.address), all_tried);
            }
        }
    }

    /// Tried ones last, resting ones before those.
    #[test]
    fn resting_endpoints_are_avoided_while_others_are_left() {
        let mut random = fastrand::Rng::with_seed(8);
        for _ in 0..20_000 {
            let all = endpoints(random.u16(1..6));
            let tried: Vec<SocketAddr> = all
                .iter()
                .map(|e| e.address)
                .filter(|_| random.u8(..) < 64)
                .collect();
            for endpoint in &all {
                if random.bool() {
                    let (shortest, _) = REST;
                    endpoint.load.rest([NOW - shortest, NOW][random.usize(..2)], REST);
                }
            }
            let rank = |endpoint: &Endpoint| {
                let rests = endpoint.load.rests(NOW);
                if tried.contains(&endpoint.address) {
                    2
                } else {
                    u8::from(rests)
                }
            };
            let best = all.iter().map(rank).min().unwrap();
            for policy in POLICIES {
                let picked = pick(&all, policy, &tried, NOW, random.u64(..), random.u64(..)).unwrap();
                assert_eq!(rank(picked), best);
            }
        }
    }

    #[test]
    fn least_request_takes_the_less_busy_of_two() {
        let all = endpoints(2);
        let _busy = all[0].load.enter();
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..100 {
            let picked = pick(&all, LoadBalancing::LeastRequest, &[], NOW, 0, random.u64(..)).unwrap();
            assert_eq!(picked.address.port(), 1);
        }
    }

    #[test]
    fn least_request_avoids_the_busiest_and_spreads_evenly_when_idle() {
        let all = endpoints(4);
        let mut random = fastrand::Rng::with_seed(6);
        let mut seen: HashMap<u16, u32> = HashMap::new();
        for _ in 0..40_000 {
            let picked = pick(&all, LoadBalancing::LeastRequest, &[], NOW, 0, random.u64(..)).unwrap();
            *seen.entry(picked.address.port()).or_default() += 1;
        }
        assert!(
            seen.values().all(|count| (9_500..10_500).contains(count)),
            "{seen:?}"
        );

        let _busiest = [all[2].load.enter(), all[2].load.enter()];
        for _ in 0..1_000 {
            let picked = pick(&all, LoadBalancing::LeastRequest, &[], NOW, 0, random.u64(..)).unwrap();
            assert_ne!(picked.address.port(), 2);
        }
    }
}
