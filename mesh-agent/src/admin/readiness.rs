//! Whether the agent is ready: a few named conditions that the parts of the agent report.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::api::Condition;

/// Cheap to clone; all clones are the same. Ready when every condition holds and it is not stopping.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// What is missing, by condition.
    conditions: BTreeMap<&'static str, Option<String>>,
    draining: bool,
}

impl Readiness {
    /// None of these holds yet.
    pub fn new(conditions: &[&'static str]) -> Self {
        let pending = |name: &&'static str| (*name, Some("not done yet".to_owned()));
        Self(Arc::new(Mutex::new(State {
            conditions: conditions.iter().map(pending).collect(),
            draining: false,
        })))
    }

    pub fn holds(&self, condition: &'static str) {
        self.lock().conditions.insert(condition, None);
    }

    pub fn fails(&self, condition: &'static str, missing: impl Into<String>) {
        self.lock().conditions.insert(condition, Some(missing.into()));
    }

    /// The agent is about to stop: from now on it is not ready.
    pub fn drain(&self) {
        self.lock().draining = true;
    }

    pub fn is_draining(&self) -> bool {
        self.lock().draining
    }

    pub fn is_ready(&self) -> bool {
        let state = self.lock();
        !state.draining && state.conditions.values().all(Option::is_none)
    }

    pub fn conditions(&self) -> Vec<Condition> {
        let state = self.lock();
        let condition = |(name, missing): (&&str, &Option<String>)| Condition {
            name: (*name).to_owned(),
            holds: missing.is_none(),
            message: missing.clone().unwrap_or_default(),
        };
        let draining = state.draining.then(|| Condition {
            name: "running".to_owned(),
            holds: false,
            message: "the agent is stopping".to_owned(),
        });
        state.conditions.iter().map(condition).chain(draining).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment: whole after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
