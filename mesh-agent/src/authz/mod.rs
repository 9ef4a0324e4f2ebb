//! Whether a peer may come in.
//!
//! Pure. Invariant: every way into a workload asks here, with the identity that its certificate (or this agent)
//! proves, or none. `AuthorizationPolicy` is to join here: one more reason to deny, from the same question.

use std::fmt;

use crate::model::{Identity, MtlsMode, MtlsPolicy};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    Deny(Reason),
}

/// Why a peer is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Clear text to a port whose mode is STRICT.
    ClearText,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClearText => {
                f.write_str("clear text from a peer without identity, and the mTLS mode is STRICT")
            }
        }
    }
}

/// Asks for a connection to `port` of a workload with this policy. A peer without identity came in clear text.
pub fn check(mtls: &MtlsPolicy, port: u16, peer: Option<&Identity>) -> Verdict {
    match (mtls.mode(port), peer) {
        (MtlsMode::Strict, None) => Verdict::Deny(Reason::ClearText),
        (MtlsMode::Strict | MtlsMode::Permissive | MtlsMode::Disable, _) => Verdict::Allow,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn strict_asks_for_an_identity_per_port() {
        use MtlsMode::{Disable, Permissive, Strict};
        let peer: Identity = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        let refused = Verdict::Deny(Reason::ClearText);
        for (default, port_80, peer, expected) in [
            (Strict, None, Some(&peer), Verdict::Allow),
            (Strict, None, None, refused),
            (Strict, Some(Permissive), None, Verdict::Allow),
            (Strict, Some(Disable), None, Verdict::Allow),
            (Permissive, None, None, Verdict::Allow),
            (Permissive, None, Some(&peer), Verdict::Allow),
            (Permissive, Some(Strict), None, refused),
            (Permissive, Some(Strict), Some(&peer), Verdict::Allow),
            (Disable, None, None, Verdict::Allow),
            (Disable, None, Some(&peer), Verdict::Allow),
        ] {
            let policy = MtlsPolicy {
                default,
                ports: port_80
                    .map(|mode| (80, mode))
                    .into_iter()
                    .collect::<BTreeMap<_, _>>(),
            };
            assert_eq!(check(&policy, 80, peer), expected, "{policy:?} {peer:?}");
            let elsewhere = if default == Strict && peer.is_none() {
                refused
            } else {
                Verdict::Allow
            };
            assert_eq!(check(&policy, 81, peer), elsewhere, "{policy:?} {peer:?}");
        }
    }
}
