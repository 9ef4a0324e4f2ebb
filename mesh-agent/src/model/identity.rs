//! SPIFFE identities of workloads: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

/// Who a workload is, as its certificate says. Cheap to hand on: every request bears two.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity(Arc<Names>);

/// What an [`Identity`] is made of.
#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Names {
    pub trust_domain: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

impl Deref for Identity {
    type Target = Names;

    fn deref(&self) -> &Names {
        &self.0
    }
}

impl From<Names> for Identity {
    fn from(names: Names) -> Self {
        Self(Arc::new(names))
    }
}

/// Not a SPIFFE ID of the form that Istio and we use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a workload identity; expected spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
pub struct InvalidIdentity;

/// SPIFFE caps an ID at this many bytes (SPIFFE-ID.md, section 2.3).
const MAX_LEN: usize = 2048;

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(id: &str) -> Result<Self, InvalidIdentity> {
        if id.len() > MAX_LEN {
            return Err(InvalidIdentity);
        }
        let mut parts = id.strip_prefix("spiffe://").ok_or(InvalidIdentity)?.split('/');
        let mut next = || {
            parts
                .next()
                .filter(|part| is_segment(part))
                .ok_or(InvalidIdentity)
        };
        let trust_domain = next()?;
        if next()? != "ns" {
            return Err(InvalidIdentity);
        }
        let namespace = next()?;
        if next()? != "sa" {
            return Err(InvalidIdentity);
        }
        let service_account = next()?;
        if parts.next().is_some() {
            return Err(InvalidIdentity);
        }
        Ok(Self::from(Names {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        }))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

/// Letters, digits, dots, dashes and underscores (SPIFFE-ID.md, section 2.2), never `.` or `..`.
fn is_segment(part: &str) -> bool {
    !part.is_empty()
        && part != "."
        && part != ".."
        && part
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let text = "spiffe://cluster.local/ns/shop/sa/reviews";
        assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "",
            "spiffe://",
            "http://cluster.local/ns/shop/sa/reviews",
            "spiffe://cluster.local/ns/shop/sa/reviews/",
            "spiffe://cluster.local/ns/shop/sa/reviews/more",
            "spiffe://cluster.local/ns//sa/reviews",
            "spiffe://cluster.local/ns/shop/sa/",
            "spiffe://cluster.local/ns/../sa/reviews",
            "spiffe://cluster.local/ns/shop/sa/re\0views",
            "spiffe://cluster.local/sa/shop/ns/reviews",
            "spiffe://cluster.local/ns/shop/sa/reviews?x=1",
        ] {
            assert_eq!(bad.parse::<Identity>(), Err(InvalidIdentity), "{bad:?}");
        }
    }
}
