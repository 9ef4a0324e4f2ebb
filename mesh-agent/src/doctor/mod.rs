//! What a node needs to run the agent: looked at and tried by `mesh-agent doctor` before an agent is installed, and
//! by the agent itself before it starts.
//!
//! Invariants: nothing is changed on the machine; each judgement is a pure function of what was found, so that nodes
//! which are not at hand can be tested; a [`Level::Problem`] is said only where the agent cannot do its work.

mod cgroup;
mod kernel;
mod neighbours;
mod privileges;
mod programs;
mod settings;

use std::error::Error;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::config::AgentConfig;
use crate::ebpf::examine::{self, AgentFolder};
use crate::ebpf::{Cgroups, Feature};

/// How bad it is; ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    /// Good to know.
    Note,
    /// The agent works, but not in everything as one might expect.
    Warning,
    /// The agent cannot do its work.
    Problem,
}

/// What a check is about; causes come before their effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    Privileges,
    Kernel,
    Cgroup,
    Configuration,
    Programs,
}

/// One thing that was looked at. The names of fields and the ids are stable: automation reads them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    pub id: &'static str,
    pub group: Group,
    pub level: Level,
    pub found: String,
    /// One line each, where there are several things.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
    /// What to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub advice: String,
}

impl Check {
    fn ok(group: Group, id: &'static str, found: impl Into<String>) -> Self {
        Self {
            id,
            group,
            level: Level::Ok,
            found: found.into(),
            details: Vec::new(),
            advice: String::new(),
        }
    }

    /// The same with something to say about it.
    fn but(self, level: Level, advice: impl Into<String>) -> Self {
        Self {
            level,
            advice: advice.into(),
            ..self
        }
    }

    fn with(self, details: Vec<String>) -> Self {
        Self { details, ..self }
    }
}

/// In one line, for a log.
impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.found)?;
        if !self.details.is_empty() {
            write!(f, " ({})", self.details.join(", "))?;
        }
        if !self.advice.is_empty() {
            write!(f, "; {}", self.advice)?;
        }
        Ok(())
    }
}

/// Everything about a node. The names of fields are stable: automation reads them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub can_run: bool,
    /// An agent runs with the configured `bpffs`: a second one there would refuse to start.
    pub agent_runs: bool,
    pub summary: String,
    /// Of the agent that looked.
    pub version: &'static str,
    pub kernel: String,
    pub arch: &'static str,
    pub checks: Vec<Check>,
    pub programs: Vec<programs::Verdict>,
    /// What only newer kernels have.
    pub features: Vec<Feature>,
    /// Who is at the hooks of the cgroup root.
    pub hooks: Vec<neighbours::Neighbour>,
}

/// Looks at everything. `config` is the agent's configuration, as for `mesh-agent run`.
#[must_use]
pub fn examine(config: Option<&Path>, node_name: Option<&str>) -> Report {
    let config = AgentConfig::load(config, node_name);
    let Node {
        mut checks,
        neighbours,
        agents,
    } = Node::look(config.as_ref().ok().map(|config| &*config.bpffs));
    let mut running = None;
    match config {
        Ok(config) => {
            let owner = settings::owner(&config.bpffs, &agents);
            checks.extend(settings::check(&config, owner));
            running = settings::running(&config.bpffs, owner);
        }
        Err(invalid) => checks.push(settings::invalid(invalid.findings)),
    }
    let (trial, outcome) = programs::check();
    checks.extend(trial);
    let problems: Vec<_> = checks
        .iter()
        .filter(|check| check.level == Level::Problem)
        .collect();
    let can_run = problems.is_empty();
    Report {
        can_run,
        agent_runs: running.is_some(),
        summary: summary(&problems, running.as_deref()),
        version: env!("CARGO_PKG_VERSION"),
        kernel: kernel::release(),
        arch: std::env::consts::ARCH,
        programs: outcome.verdicts,
        features: outcome.features,
        hooks: neighbours,
        checks,
    }
}

/// `running` is the agent that runs, in words.
fn summary(problems: &[&Check], running: Option<&str>) -> String {
    let ids: Vec<_> = problems.iter().map(|check| check.id).collect();
    match (ids.len(), running) {
        (0, None) => "this node can run mesh-agent".to_owned(),
        (0, Some(running)) => format!("this node can run mesh-agent, and does: {running}"),
        (1, _) => format!("this node cannot run mesh-agent: 1 problem ({})", ids[0]),
        (count, _) => format!(
            "this node cannot run mesh-agent: {count} problems ({})",
            ids.join(", ")
        ),
    }
}

/// What keeps an agent from starting.
#[derive(Debug, thiserror::Error)]
#[error("this node cannot run the agent: {0} (`mesh-agent doctor` shows all that it takes)")]
pub struct Refusal(Check);

/// What an agent looks at before it makes anything: refuses where capture is impossible, and returns what is worth a
/// warning.
pub fn before_start(config: &AgentConfig) -> Result<Vec<Check>, Refusal> {
    if let Some(missing) = programs::missing() {
        return Err(Refusal(missing));
    }
    let mut checks = Node::look(Some(&config.bpffs)).checks;
    checks.push(settings::bpffs(&config.bpffs));
    checks.extend(settings::kernel_tls(config));
    match checks.iter().position(|check| check.level == Level::Problem) {
        Some(first) => Err(Refusal(checks.swap_remove(first))),
        None => {
            checks.retain(|check| check.level == Level::Warning);
            Ok(checks)
        }
    }
}

/// What does not depend on a configuration. Causes come before their effects.
struct Node {
    checks: Vec<Check>,
    neighbours: Vec<neighbours::Neighbour>,
    agents: Vec<AgentFolder>,
}

impl Node {
    /// `own` is the folder of this agent's pins.
    fn look(own: Option<&Path>) -> Self {
        let version = kernel::Version::running();
        let mut checks = privileges::check(version);
        checks.extend(kernel::check(version));
        let agents = examine::agents().unwrap_or_default();
        let mut neighbours = Vec::new();
        match Cgroups::find() {
            Ok(cgroups) => {
                checks.extend(cgroup::check(&cgroups, version));
                if let Some(cgroup) = cgroups.v2.first() {
                    let (check, found) = neighbours::check(&cgroup.path, &agents, own);
                    checks.extend(check);
                    neighbours = found;
                }
            }
            Err(error) => checks.push(cgroup::unreadable(&error)),
        }
        checks.sort_by_key(|check| check.group as u8);
        Self {
            checks,
            neighbours,
            agents,
        }
    }
}

/// An error with its causes, each said once.
#[must_use]
pub fn explain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Many errors quote what caused them.
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_counts_problems_and_tells_of_an_agent() {
        let check = |id| Check::ok(Group::Kernel, id, "").but(Level::Problem, "");
        let (one, other) = (check("bpf"), check("hooks"));
        assert_eq!(summary(&[], None), "this node can run mesh-agent");
        assert_eq!(
            summary(&[], Some("process 7 is an agent")),
            "this node can run mesh-agent, and does: process 7 is an agent"
        );
        assert_eq!(
            summary(&[&one], Some("process 7 is an agent")),
            "this node cannot run mesh-agent: 1 problem (bpf)"
        );
        assert_eq!(
            summary(&[&one, &other], None),
            "this node cannot run mesh-agent: 2 problems (bpf, hooks)"
        );
    }
}
