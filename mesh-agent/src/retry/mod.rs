//! Whether a failed try is followed by another, after how long, and how many may be under way.
//!
//! Pure: time and randomness are passed in. Invariants: what a server may have begun to work on is repeated only
//! when the method is idempotent or the user asked for the status code; such repeats stay within a [`Budget`].

mod budget;

pub use budget::Budget;

use std::time::Duration;

use http::Method;

use crate::model::RetryPolicy;

/// How a try failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection, so nothing was sent.
    ConnectFailure,
    /// HTTP/2 `REFUSED_STREAM`, or a `GOAWAY` below this stream: the server promises that it did nothing.
    RefusedStream,
    /// The connection or stream ended before response headers; the server may have done the work.
    ResetBeforeHeaders,
    /// An answer with this code.
    Status(u16),
    /// No answer within the time for one try.
    PerTryTimeout,
    /// Anything else, such as a failure of the client's.
    Other,
}

impl Failure {
    /// The server did nothing for this try: repeating it is safe for any method and costs the server nothing.
    pub fn is_harmless(self) -> bool {
        matches!(self, Self::ConnectFailure | Self::RefusedStream)
    }
}

/// What to do after a failed try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Retry,
    /// It would be tried again, had there not been as many tries as the policy allows.
    Exhausted,
    /// Not a failure to retry, or the body is gone.
    Stop,
}

/// Decides after `tries` tries, the failed one included. `replayable`: the whole request can be sent again.
///
/// A retry that is not [harmless](Failure::is_harmless) also needs the [`Budget`]'s leave.
pub fn decide(
    failure: Failure,
    method: &Method,
    tries: u32,
    replayable: bool,
    policy: &RetryPolicy,
) -> Decision {
    if !replayable || !is_asked_for(failure, method, policy) {
        Decision::Stop
    } else if tries > policy.attempts {
        Decision::Exhausted
    } else {
        Decision::Retry
    }
}

/// How long to wait before the try after `tries` tries: exponential with full jitter, at most ten times the base.
pub fn backoff(base: Duration, tries: u32, random: u64) -> Duration {
    /// As in Envoy, where the cap is not set.
    const CAP: u32 = 10;
    let doubled = 1_u32
        .checked_shl(tries)
        .map_or(CAP, |factor| (factor - 1).clamp(1, CAP));
    let most = base.saturating_mul(doubled).as_nanos();
    let wait = u128::from(random).checked_rem(most).unwrap_or(0);
    u64::try_from(wait).map_or(Duration::MAX, Duration::from_nanos)
}

fn is_asked_for(failure: Failure, method: &Method, policy: &RetryPolicy) -> bool {
    /// A try that took too long is answered with this, when it is not repeated.
    const GATEWAY_TIMEOUT: u16 = 504;
    let on = &policy.on;
    match failure {
        Failure::ConnectFailure => on.connect_failure,
        Failure::RefusedStream => on.refused_stream,
        Failure::ResetBeforeHeaders => on.reset && method.is_idempotent(),
        Failure::Status(code) => on.codes.contains(&code),
        Failure::PerTryTimeout => on.codes.contains(&GATEWAY_TIMEOUT) || on.reset && method.is_idempotent(),
        Failure::Other => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::RetryOn;

    fn policy(codes: &[u16]) -> RetryPolicy {
        RetryPolicy {
            on: RetryOn {
                codes: codes.to_vec(),
                ..RetryPolicy::default().on
            },
            ..RetryPolicy::default()
        }
    }

    #[test]
    fn what_is_tried_again() {
        use Failure::{ConnectFailure, Other, PerTryTimeout, RefusedStream, ResetBeforeHeaders, Status};
        let none = policy(&[]);
        let codes = policy(&[503, 504]);
        for (failure, method, policy, again) in [
            (ConnectFailure, Method::POST, &none, true),
            (RefusedStream, Method::POST, &none, true),
            (ResetBeforeHeaders, Method::GET, &none, true),
            (ResetBeforeHeaders, Method::HEAD, &none, true),
            (ResetBeforeHeaders, Method::OPTIONS, &none, true),
            (ResetBeforeHeaders, Method::TRACE, &none, true),
            (ResetBeforeHeaders, Method::PUT, &none, true),
            (ResetBeforeHeaders, Method::DELETE, &none, true),
            (ResetBeforeHeaders, Method::POST, &none, false),
            (ResetBeforeHeaders, Method::PATCH, &none, false),
            (
                ResetBeforeHeaders,
                Method::from_bytes(b"MAKE").unwrap(),
                &none,
                false,
            ),
            (Status(503), Method::GET, &none, false),
            (Status(503), Method::POST, &codes, true),
            (Status(500), Method::GET, &codes, false),
            (PerTryTimeout, Method::GET, &none, true),
            (PerTryTimeout, Method::POST, &none, false),
            (PerTryTimeout, Method::POST, &codes, true),
            (Other, Method::GET, &codes, false),
        ] {
            let expected = if again { Decision::Retry } else { Decision::Stop };
            assert_eq!(
                decide(failure, &method, 1, true, policy),
                expected,
                "{failure:?} {method}"
            );
            assert_eq!(
                decide(failure, &method, 1, false, policy),
                Decision::Stop,
                "{failure:?} {method}"
            );
        }
    }

    #[test]
    fn a_policy_can_turn_everything_off() {
        let off = RetryPolicy {
            on: RetryOn {
                connect_failure: false,
                refused_stream: false,
                reset: false,
                codes: Vec::new(),
            },
            ..RetryPolicy::default()
        };
        for failure in [
            Failure::ConnectFailure,
            Failure::RefusedStream,
            Failure::ResetBeforeHeaders,
        ] {
            assert_eq!(decide(failure, &Method::GET, 1, true, &off), Decision::Stop);
        }
    }

    #[test]
    fn as_many_more_tries_as_the_policy_says() {
        let twice = policy(&[]);
        let after = |tries| decide(Failure::ConnectFailure, &Method::GET, tries, true, &twice);
        assert_eq!(
            [after(1), after(2), after(3)],
            [Decision::Retry, Decision::Retry, Decision::Exhausted]
        );
        let never = RetryPolicy { attempts: 0, ..twice };
        assert_eq!(
            decide(Failure::ConnectFailure, &Method::GET, 1, true, &never),
            Decision::Exhausted
        );
    }

    #[test]
    fn backoff_grows_to_its_cap_and_uses_the_whole_range() {
        let base = Duration::from_millis(25);
        let mut random = fastrand::Rng::with_seed(7);
        for (tries, most) in [
            (1, 25),
            (2, 75),
            (3, 175),
            (4, 250),
            (31, 250),
            (32, 250),
            (u32::MAX, 250),
        ] {
            let waits: Vec<Duration> = (0..2_000).map(|_| backoff(base, tries, random.u64(..))).collect();
            let most = Duration::from_millis(most);
            assert!(waits.iter().all(|wait| *wait < most), "{tries}");
            assert!(waits.iter().any(|wait| *wait > most * 9 / 10), "{tries}");
            assert!(waits.iter().any(|wait| *wait < most / 10), "{tries}");
        }
        assert_eq!(backoff(Duration::ZERO, 1, 5), Duration::ZERO);
    }
}
