//! How a request or connection ended, in the words that Envoy's users know.

/// Envoy's response flags, as far as they apply here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flag {
    #[default]
    None,
    /// No route matched.
    NoRoute,
    /// The route's backend does not exist.
    NoCluster,
    /// No endpoint is ready.
    NoHealthyUpstream,
    UpstreamConnectFailure,
    /// The TLS handshake failed, or the peer was not who it should be. Istio's ztunnel's word; Envoy says `UF`.
    TlsFailure,
    /// The upstream's connection ended before the answer did.
    UpstreamReset,
    UpstreamProtocol,
    UpstreamTimeout,
    /// A bound was reached: too much in flight or waiting.
    UpstreamOverflow,
    /// All tries were used up.
    RetryLimit,
    DownstreamReset,
    DownstreamProtocol,
    /// A policy refused it. Istio's ztunnel's word; Envoy has no flag for its RBAC filter.
    Denied,
    /// Closed by this agent, for example at the end of a drain.
    LocalReset,
    /// The request's whole time was up.
    DurationTimeout,
    /// Nothing moved for too long.
    IdleTimeout,
}

impl Flag {
    pub(super) const ALL: [Self; 17] = [
        Self::None,
        Self::NoRoute,
        Self::NoCluster,
        Self::NoHealthyUpstream,
        Self::UpstreamConnectFailure,
        Self::TlsFailure,
        Self::UpstreamReset,
        Self::UpstreamProtocol,
        Self::UpstreamTimeout,
        Self::UpstreamOverflow,
        Self::RetryLimit,
        Self::DownstreamReset,
        Self::DownstreamProtocol,
        Self::Denied,
        Self::LocalReset,
        Self::DurationTimeout,
        Self::IdleTimeout,
    ];

    /// The value of the label `response_flags` and of the access log's field.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::NoRoute => "NR",
            Self::NoCluster => "NC",
            Self::NoHealthyUpstream => "UH",
            Self::UpstreamConnectFailure => "UF",
            Self::TlsFailure => "TLS_FAILURE",
            Self::UpstreamReset => "UC",
            Self::UpstreamProtocol => "UPE",
            Self::UpstreamTimeout => "UT",
            Self::UpstreamOverflow => "UO",
            Self::RetryLimit => "URX",
            Self::DownstreamReset => "DC",
            Self::DownstreamProtocol => "DPE",
            Self::Denied => "DENY",
            Self::LocalReset => "LR",
            Self::DurationTimeout => "DT",
            Self::IdleTimeout => "SI",
        }
    }

    /// Its place in [`Flag::ALL`].
    pub(super) fn index(self) -> u8 {
        self as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_is_in_its_place() {
        for (index, flag) in Flag::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(flag.index()), index, "{flag:?}");
        }
    }
}
