//! HTTPRoute timeouts and retries.

use serde::Deserialize;

use super::check::{Issues, duration};
use crate::model::{RetryPolicy, Timeouts};

/// More tries than this turn a small outage into a big one.
const MAX_ATTEMPTS: u32 = 100;
const MAX_CODES: usize = 64;

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawTimeouts {
    request: Option<String>,
    backend_request: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRetry {
    #[serde(default)]
    codes: Vec<u16>,
    attempts: Option<u32>,
    backoff: Option<String>,
}

pub(super) fn timeouts(raw: RawTimeouts, rule: &str, issues: &mut Issues) -> Timeouts {
    let mut parse = |field: &str, text: Option<String>| {
        text.and_then(|text| {
            duration(&text)
                .map_err(|message| issues.error(format!("{rule}.timeouts.{field}"), message))
                .ok()
        })
        // Zero means no timeout.
        .filter(|duration| !duration.is_zero())
    };
    let timeouts = Timeouts {
        request: parse("request", raw.request),
        per_try: parse("backendRequest", raw.backend_request),
    };
    if let (Some(request), Some(per_try)) = (timeouts.request, timeouts.per_try)
        && per_try > request
    {
        issues.error(
            format!("{rule}.timeouts.backendRequest"),
            format!(
                "{} is longer than the whole request may take ({})",
                humantime::format_duration(per_try),
                humantime::format_duration(request)
            ),
        );
    }
    timeouts
}

/// Without `retry` the mesh's default holds; what it leaves open is as in that default.
pub(super) fn retry(raw: Option<RawRetry>, rule: &str, issues: &mut Issues) -> RetryPolicy {
    let mut policy = RetryPolicy::default();
    let Some(raw) = raw else {
        return policy;
    };
    if raw.codes.len() > MAX_CODES {
        issues.error(
            format!("{rule}.retry.codes"),
            format!("{} codes; allowed: {MAX_CODES}", raw.codes.len()),
        );
    }
    for (index, code) in raw.codes.iter().enumerate() {
        if !(400..=599).contains(code) {
            issues.error(
                format!("{rule}.retry.codes[{index}]"),
                format!("{code} cannot be tried again; allowed: 400 to 599"),
            );
        }
    }
    policy.on.codes = raw.codes;
    if let Some(attempts) = raw.attempts {
        if attempts > MAX_ATTEMPTS {
            issues.error(
                format!("{rule}.retry.attempts"),
                format!("{attempts} is too many; allowed: 0 to {MAX_ATTEMPTS}"),
            );
        }
        policy.attempts = attempts;
    }
    if let Some(text) = raw.backoff {
        match duration(&text) {
            Ok(backoff) => policy.backoff = backoff,
            Err(message) => issues.error(format!("{rule}.retry.backoff"), message),
        }
    }
    policy
}
