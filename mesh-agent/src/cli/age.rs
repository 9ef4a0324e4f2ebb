//! Times as kubectl shows them: the largest unit or two.

use std::time::{Duration, SystemTime};

/// How long ago an RFC 3339 time was.
pub(super) fn since(time: &str, now: SystemTime) -> String {
    between(parse(time), Some(now))
}

/// How long it is until an RFC 3339 time.
pub(super) fn until(time: Option<&str>, now: SystemTime) -> String {
    match time.and_then(parse) {
        Some(end) if end <= now => "ended".to_owned(),
        end => between(Some(now), end),
    }
}

pub(super) fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => format!("{minutes}m{}s", seconds % 60),
        600..10_800 => format!("{minutes}m"),
        10_800..172_800 => format!("{hours}h"),
        _ => format!("{days}d"),
    }
}

fn between(start: Option<SystemTime>, end: Option<SystemTime>) -> String {
    let duration = start
        .zip(end)
        .map(|(start, end)| end.duration_since(start).unwrap_or(Duration::ZERO));
    duration.map_or_else(|| "-".to_owned(), short)
}

fn parse(time: &str) -> Option<SystemTime> {
    humantime::parse_rfc3339(time).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        let now = parse("2026-01-02T00:00:00Z").unwrap();
        for (time, age) in [
            ("2026-01-01T23:59:59Z", "1s"),
            ("2026-01-01T23:57:59Z", "2m1s"),
            ("2026-01-01T23:00:00Z", "60m"),
            ("2026-01-01T12:00:00Z", "12h"),
            ("2025-12-01T00:00:00Z", "32d"),
            ("2026-01-03T00:00:00Z", "0s"),
            ("yesterday", "-"),
        ] {
            assert_eq!(since(time, now), age, "{time}");
        }
        assert_eq!(until(Some("2026-01-02T12:00:00Z"), now), "12h");
        assert_eq!(until(Some("2026-01-01T12:00:00Z"), now), "ended");
        assert_eq!(until(None, now), "-");
    }
}
