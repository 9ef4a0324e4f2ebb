//! What is wrong with a document, and the small checks that several kinds share.
//!
//! A check never stops at the first finding: it notes an [`Issue`] with the path of the field and goes on.

use std::net::IpAddr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::strict::Strict;
use crate::model::Severity;

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Issue {
    pub(crate) severity: Severity,
    /// `spec.rules[0].name`; empty for the document as a whole.
    pub(crate) path: String,
    /// What is wrong and what is allowed.
    pub(crate) message: String,
}

impl Issue {
    pub(crate) fn error(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            path: path.into(),
            message: message.into(),
        }
    }

    pub(crate) fn warning(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            path: path.into(),
            message: message.into(),
        }
    }
}

/// More findings than this in one document help nobody, and a hostile one could have millions.
const MAX_ISSUES: usize = 50;

/// The findings of one document.
#[derive(Debug, Default)]
pub(crate) struct Issues(Vec<Issue>);

impl Issues {
    pub(crate) fn error(&mut self, path: impl Into<String>, message: impl Into<String>) {
        // An error is never crowded out by warnings: it decides whether the document is in force.
        if self.0.len() < MAX_ISSUES || !self.has_errors() {
            self.0.push(Issue::error(path, message));
        }
    }

    pub(crate) fn warning(&mut self, path: impl Into<String>, message: impl Into<String>) {
        if self.0.len() < MAX_ISSUES {
            self.0.push(Issue::warning(path, message));
        }
    }

    pub(crate) fn push(&mut self, issue: Issue) {
        match issue.severity {
            Severity::Error => self.error(issue.path, issue.message),
            Severity::Warning => self.warning(issue.path, issue.message),
        }
    }

    pub(crate) fn has_errors(&self) -> bool {
        self.0.iter().any(|issue| issue.severity == Severity::Error)
    }

    pub(crate) fn into_vec(self) -> Vec<Issue> {
        self.0
    }
}

/// Deserializes, and says at which field it failed. `prefix` is the path of `value` itself.
pub(crate) fn typed<T: DeserializeOwned>(value: Value, prefix: &str) -> Result<T, Issue> {
    serde_path_to_error::deserialize(Strict(value)).map_err(|error| {
        let path = error.path().to_string();
        let path = match (prefix, path.as_str()) {
            (prefix, "." | "") => prefix.to_owned(),
            ("", path) => path.to_owned(),
            (prefix, path) if path.starts_with('[') => format!("{prefix}{path}"),
            (prefix, path) => format!("{prefix}.{path}"),
        };
        Issue::error(path, error.into_inner().to_string())
    })
}

/// A TCP port; 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "i64")]
pub(crate) struct Port(pub(crate) u16);

impl TryFrom<i64> for Port {
    type Error = String;

    fn try_from(number: i64) -> Result<Self, String> {
        match u16::try_from(number) {
            Ok(port) if port > 0 => Ok(Self(port)),
            _ => Err(format!("{number} is not a port; allowed: 1 to 65535")),
        }
    }
}

/// RFC 1123 label: what Kubernetes asks of namespaces and services.
pub(crate) fn is_dns_label(name: &str) -> bool {
    name.len() <= 63 && is_label_text(name)
}

/// RFC 1123 subdomain: what Kubernetes asks of most other names.
pub(crate) fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_label_text)
}

fn is_label_text(label: &str) -> bool {
    !label.is_empty()
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

pub(crate) const DNS_LABEL: &str =
    "allowed: at most 63 lower-case letters, digits and dashes, with a letter or digit at both ends";
pub(crate) const DNS_SUBDOMAIN: &str = "allowed: at most 253 lower-case letters, digits, dashes and dots, \
     each part with a letter or digit at both ends";

/// What Kubernetes allows as a label's value: it ends up in metrics.
pub(crate) fn is_label_value(value: &str) -> bool {
    let end = |b: Option<u8>| b.is_none_or(|b| b.is_ascii_alphanumeric());
    value.len() <= 63
        && end(value.bytes().next())
        && end(value.bytes().next_back())
        && value
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

pub(crate) const LABEL_VALUE: &str =
    "allowed: at most 63 letters, digits, dashes, dots and underscores, with a letter or digit at both ends";

/// An address that a pod or service can have.
pub(crate) fn address(text: &str) -> Result<IpAddr, String> {
    let address = text
        .parse::<IpAddr>()
        .map_err(|_| format!("`{text}` is not an IP address"))?
        .to_canonical();
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
        return Err(format!(
            "{address} is unspecified, loopback or multicast; allowed: an address that others can reach"
        ));
    }
    Ok(address)
}

/// A Gateway API duration (GEP-2257): `1h30m`, `10s`, `250ms`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    const ALLOWED: &str =
        "allowed: one to four numbers of at most 5 digits with h, m, s or ms, as in 1h30m or 250ms";
    let wrong = || format!("`{text}` is not a duration; {ALLOWED}");
    let mut rest = text;
    let mut total = Duration::ZERO;
    for _ in 0..4 {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if !(1..=5).contains(&digits) {
            return Err(wrong());
        }
        let (number, tail) = rest.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let unit = tail.bytes().take_while(u8::is_ascii_lowercase).count();
        let (unit, tail) = tail.split_at(unit);
        total += match unit {
            "h" => Duration::from_secs(number * 3600),
            "m" => Duration::from_secs(number * 60),
            "s" => Duration::from_secs(number),
            "ms" => Duration::from_millis(number),
            _ => return Err(wrong()),
        };
        rest = tail;
        if rest.is_empty() {
            return Ok(total);
        }
    }
    Err(wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in [
            ("0s", 0),
            ("10s", 10_000),
            ("1h30m", 5_400_000),
            ("1m2s3ms", 62_003),
            ("99999h", 359_996_400_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for bad in [
            "",
            "s",
            "10",
            "1.5s",
            "-1s",
            "123456s",
            "1h1m1s1ms1s",
            "1d",
            "1 s",
            "1S",
            "١s",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names() {
        assert!(is_dns_label("a-1"));
        assert!(is_dns_subdomain("reviews.v1-abc"));
        let long = "a".repeat(64);
        for bad in ["", "A", "a_b", "-a", "a-", "a..b", "a/b", "ä", long.as_str()] {
            assert!(!is_dns_label(bad), "{bad}");
        }
        assert!(!is_dns_subdomain("a..b"));
        assert!(!is_dns_subdomain(&"a.".repeat(127)));
    }

    #[test]
    fn addresses() {
        assert!(address("10.0.0.1").is_ok());
        assert_eq!(address("::ffff:10.0.0.1").unwrap().to_string(), "10.0.0.1");
        for bad in [
            "",
            "10.0.0",
            "10.0.0.1/24",
            "0.0.0.0",
            "::",
            "127.0.0.1",
            "224.0.0.1",
            "fe80::1%eth0",
        ] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }
}
