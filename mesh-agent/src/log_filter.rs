//! What is logged: `LEVEL` and `TARGET=LEVEL`, separated by commas.
//!
//! Stricter than tracing-subscriber's own syntax, for which a mistyped level is a target's name. Invariant: this is
//! the only parser, so that the configuration accepts exactly what the log will.

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;

/// What is wrong with a filter, and what is allowed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidFilter {
    #[error("the filter is longer than {MAX_LEN} bytes")]
    TooLong,
    #[error(
        "`{0}` is no level; use off, error, warn, info, debug or trace, or target=level, separated by commas"
    )]
    Level(String),
    #[error("`{0}` is no target; use a module's path such as mesh_agent::proxy")]
    Target(String),
}

/// Enough for a level for every module there is.
const MAX_LEN: usize = 2048;

pub fn parse(filter: &str) -> Result<Targets, InvalidFilter> {
    if filter.len() > MAX_LEN {
        return Err(InvalidFilter::TooLong);
    }
    filter.split(',').try_fold(Targets::new(), |targets, part| {
        match part.trim().split_once('=') {
            None => Ok(targets.with_default(level(part.trim())?)),
            Some((target, _)) if !is_path(target) => {
                Err(InvalidFilter::Target(target.escape_debug().to_string()))
            }
            Some((target, named)) => Ok(targets.with_target(target, level(named)?)),
        }
    })
}

fn level(text: &str) -> Result<LevelFilter, InvalidFilter> {
    match text {
        "off" => Ok(LevelFilter::OFF),
        "error" => Ok(LevelFilter::ERROR),
        "warn" => Ok(LevelFilter::WARN),
        "info" => Ok(LevelFilter::INFO),
        "debug" => Ok(LevelFilter::DEBUG),
        "trace" => Ok(LevelFilter::TRACE),
        other => Err(InvalidFilter::Level(other.escape_debug().to_string())),
    }
}

fn is_path(target: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b':');
    !target.is_empty() && target.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn levels_and_targets() {
        let targets = parse("warn, mesh_agent::proxy=debug,h2=off").unwrap();
        assert!(targets.would_enable("mesh_agent::proxy::http", &Level::DEBUG));
        assert!(!targets.would_enable("mesh_agent::dns", &Level::INFO));
        assert!(targets.would_enable("mesh_agent::dns", &Level::WARN));
        assert!(!targets.would_enable("h2", &Level::ERROR));
    }

    #[test]
    fn anything_else_is_refused() {
        let level = |text: &str| Err(InvalidFilter::Level(text.into()));
        for (bad, error) in [
            ("", level("")),
            ("debgu", level("debgu")),
            ("INFO", level("INFO")),
            ("info,", level("")),
            ("mesh_agent", level("mesh_agent")),
            ("mesh_agent=loud", level("loud")),
            ("a=b=info", level("b=info")),
            ("info\r\nx", level("info\\r\\nx")),
            ("=info", Err(InvalidFilter::Target(String::new()))),
            ("a b=info", Err(InvalidFilter::Target("a b".into()))),
            (&"a".repeat(2049), Err(InvalidFilter::TooLong)),
        ] {
            assert_eq!(parse(bad).map(drop), error, "{bad:?}");
        }
    }
}
