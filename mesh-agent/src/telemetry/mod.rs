//! What the agent says while it runs: its own log on stderr, and the access log on stdout.
//!
//! Invariants: what a peer or a client sent never breaks a line; the data path never waits for whoever reads
//! the access log.

mod access_log;
mod escape;

use std::io::IsTerminal;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::Dispatch;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::log_filter::{self, InvalidFilter};

pub use self::access_log::{AccessLog, AccessRecord};

/// How the log looks, the agent's own and the access log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Text,
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!(
                "`{}` is no log format; use text or json",
                other.escape_debug()
            )),
        }
    }
}

/// Logs to stderr from now on, in the whole process. Fails when `filter` is not one, or when called twice.
pub fn init(format: Format, filter: &str) -> anyhow::Result<LogHandle> {
    let (dispatch, handle) = build(format, filter)?;
    tracing::dispatcher::set_global_default(dispatch)?;
    Ok(handle)
}

/// As [`init`], but nothing logs there yet.
pub fn build(format: Format, filter: &str) -> Result<(Dispatch, LogHandle), InvalidFilter> {
    let targets = log_filter::parse(filter)?;
    let (targets, reload) = reload::Layer::new(targets);
    let output = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let output: Box<dyn Layer<_> + Send + Sync> = match format {
        Format::Text => Box::new(output.with_ansi(colours())),
        Format::Json => Box::new(output.json().flatten_event(true)),
    };
    let subscriber = tracing_subscriber::registry().with(targets).with(output);
    let handle = LogHandle {
        current: Arc::new(Mutex::new(filter.to_owned())),
        reload,
    };
    Ok((Dispatch::new(subscriber), handle))
}

/// Reads and changes what is logged, at run time.
#[derive(Clone, Debug)]
pub struct LogHandle {
    current: Arc<Mutex<String>>,
    reload: reload::Handle<Targets, Registry>,
}

impl LogHandle {
    /// The filter in force.
    pub fn get(&self) -> String {
        self.current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Puts `filter` in force, such as `info` or `warn,mesh_agent::proxy=debug`.
    pub fn set(&self, filter: &str) -> Result<(), InvalidFilter> {
        let targets = log_filter::parse(filter)?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // Fails only once the subscriber is gone, and with it all that could log.
        if self.reload.reload(targets).is_ok() {
            filter.clone_into(&mut current);
        }
        Ok(())
    }
}

/// See no-color.org.
fn colours() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_changes_at_run_time() {
        let (dispatch, handle) = build(Format::Json, "warn").unwrap();
        tracing::dispatcher::with_default(&dispatch, || {
            assert!(!tracing::enabled!(tracing::Level::DEBUG));
            handle.set("info,mesh_agent::telemetry=debug").unwrap();
            assert!(tracing::enabled!(tracing::Level::DEBUG));
            assert_eq!(handle.get(), "info,mesh_agent::telemetry=debug");
            handle.set("debgu").unwrap_err();
            assert_eq!(handle.get(), "info,mesh_agent::telemetry=debug");
            assert!(tracing::enabled!(tracing::Level::DEBUG));
        });
    }
}
