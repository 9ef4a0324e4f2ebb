//! `mesh-agent doctor`: what a node needs, and what to do where it lacks something.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::process::ExitCode;

use super::args::{DoctorArgs, Shape};
use super::table::printable;
use crate::doctor::{Check, Group, Level, Report, examine};

/// Shows what it finds; fails if the node cannot run the agent.
pub(super) fn run(args: &DoctorArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let node = std::env::var("NODE_NAME").ok();
    let report = examine(args.config.as_deref(), node.as_deref());
    match args.output {
        Shape::Table => out.write_all(render(&report).as_bytes())?,
        Shape::Json => {
            serde_json::to_writer_pretty(&mut *out, &report).map_err(io::Error::from)?;
            writeln!(out)?;
        }
        Shape::Yaml => out.write_all(super::yaml(&report)?.as_bytes())?,
    }
    Ok(match report.can_run {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn render(report: &Report) -> String {
    let mut text = String::new();
    let mut group = None;
    for check in &report.checks {
        if group != Some(check.group) {
            let gap = if group.is_some() { "\n" } else { "" };
            let _ = writeln!(text, "{gap}{}", title(check.group));
            group = Some(check.group);
        }
        show(check, &mut text);
    }
    let _ = writeln!(
        text,
        "\nThis{}.",
        report.summary.strip_prefix("this").unwrap_or_default()
    );
    text
}

fn show(check: &Check, text: &mut String) {
    // Writing to a string cannot fail.
    let word = match check.level {
        Level::Ok => "ok",
        Level::Note => "note",
        Level::Warning => "WARNING",
        Level::Problem => "PROBLEM",
    };
    let _ = writeln!(text, "  {word:<8} {:<15} {}", check.id, printable(&check.found));
    for detail in &check.details {
        let _ = writeln!(text, "{:26} {}", "", printable(detail));
    }
    if !check.advice.is_empty() {
        let _ = writeln!(text, "{:26} → {}", "", printable(&check.advice));
    }
}

fn title(group: Group) -> &'static str {
    match group {
        Group::Kernel => "Kernel",
        Group::Privileges => "Privileges",
        Group::Cgroup => "Cgroup",
        Group::Configuration => "Configuration",
        Group::Programs => "Programs",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_check_has_a_line_and_what_to_do_below() {
        let check = |id, group, level, advice: &str| Check {
            id,
            group,
            level,
            found: format!("found {id}"),
            details: Vec::new(),
            advice: advice.to_owned(),
        };
        let mut hooks = check("hooks", Group::Cgroup, Level::Problem, "detach it");
        hooks.details.push("connect4: \x1b[31mx".to_owned());
        let report = Report {
            can_run: false,
            agent_runs: false,
            summary: "this node cannot run mesh-agent: 1 problem (hooks)".to_owned(),
            version: "1",
            kernel: "6.1".to_owned(),
            arch: "x86_64",
            checks: vec![
                check("kernel", Group::Kernel, Level::Ok, ""),
                check("jit", Group::Kernel, Level::Warning, "turn it on"),
                hooks,
            ],
            programs: Vec::new(),
            features: Vec::new(),
            hooks: Vec::new(),
        };
        let text = "\
Kernel
  ok       kernel          found kernel
  WARNING  jit             found jit
                           → turn it on

Cgroup
  PROBLEM  hooks           found hooks
                           connect4: \u{fffd}[31mx
                           → detach it

This node cannot run mesh-agent: 1 problem (hooks).
";
        assert_eq!(render(&report), text);
    }
}
