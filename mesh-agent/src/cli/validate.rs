//! `mesh-agent validate`: resources and agent configurations checked as the agent would.

use std::io::{self, Write};
use std::process::ExitCode;

use serde_json::json;

use super::args::{Report, ValidateArgs};
use crate::config::{AgentConfig, Checked, validate};
use crate::model::{Rejected, Severity};

/// Prints what it finds; fails on any error.
pub fn run(args: &ValidateArgs, out: &mut impl Write) -> io::Result<ExitCode> {
    let config = match AgentConfig::load(args.config.as_deref(), None) {
        Ok(config) => config,
        Err(invalid) => {
            match args.output {
                Report::Text => writeln!(out, "{invalid}")?,
                Report::Json => writeln!(
                    out,
                    "{}",
                    json!({ "errors": invalid.findings.len(), "config": invalid.findings })
                )?,
            }
            return Ok(ExitCode::FAILURE);
        }
    };
    let files = if args.files.is_empty() {
        &config.files
    } else {
        &args.files
    };
    let checked = validate(files, config.settings());
    match args.output {
        Report::Text => print_text(&checked, out)?,
        Report::Json => print_json(&checked, out)?,
    }
    let errors = checked.count(Severity::Error);
    let warnings = checked.count(Severity::Warning);
    Ok(match errors > 0 || args.strict && warnings > 0 {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

fn print_text(checked: &Checked, out: &mut impl Write) -> io::Result<()> {
    for finding in &checked.findings {
        match finding.severity {
            Severity::Error => writeln!(out, "{finding}")?,
            Severity::Warning => writeln!(out, "warning: {finding}")?,
        }
    }
    writeln!(
        out,
        "{}, {}: {}, {}",
        counted(checked.files, "file"),
        counted(checked.documents, "document"),
        counted(checked.count(Severity::Error), "error"),
        counted(checked.count(Severity::Warning), "warning"),
    )
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn print_json(checked: &Checked, out: &mut impl Write) -> io::Result<()> {
    let findings: Vec<_> = checked.findings.iter().map(finding).collect();
    let report = json!({
        "files": checked.files,
        "documents": checked.documents,
        "errors": checked.count(Severity::Error),
        "warnings": checked.count(Severity::Warning),
        "findings": findings,
    });
    serde_json::to_writer_pretty(&mut *out, &report)?;
    writeln!(out)
}

fn finding(finding: &Rejected) -> serde_json::Value {
    json!({
        "severity": match finding.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        },
        "file": &*finding.file,
        "document": finding.document,
        "resource": &*finding.resource,
        "path": &*finding.path,
        "message": &*finding.message,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: ValidateArgs,
    }

    fn validate(args: &[&str]) -> (bool, String) {
        let cli = Cli::try_parse_from([&["validate"], args].concat()).unwrap();
        let mut out = Vec::new();
        let code = run(&cli.args, &mut out).unwrap();
        (code == ExitCode::SUCCESS, String::from_utf8(out).unwrap())
    }

    #[test]
    fn what_is_wrong_is_printed_and_fails() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (good, warns, bad) = (path("a.yaml"), path("b.yaml"), path("c.yaml"));
        std::fs::write(&good, "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n").unwrap();
        std::fs::write(&warns, "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n").unwrap();
        std::fs::write(
            &bad,
            "# x\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: b}\n---\napiVersion: v1\nkind: Pod\n",
        )
        .unwrap();

        assert_eq!(
            validate(&[&good]),
            (true, "1 file, 1 document: 0 errors, 0 warnings\n".to_owned())
        );
        let warning = format!(
            "warning: {warns}:document 1: Secret a: kind: kind Secret of v1 is not used by the agent\n1 file, 1 document: 0 errors, 1 warning\n"
        );
        assert_eq!(validate(&[&warns]), (true, warning.clone()));
        assert_eq!(validate(&[&warns, "--strict"]), (false, warning));
        let (ok, text) = validate(&[&good, &bad]);
        assert!(!ok);
        assert_eq!(
            text,
            format!(
                "{bad}:document 2: Pod: metadata.name: a name is needed here\n2 files, 3 documents: 1 error, 0 warnings\n"
            )
        );
        let (ok, text) = validate(&[folder.path().to_str().unwrap(), "-o", "json"]);
        assert!(!ok);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["errors"], 1);
        assert_eq!(json["findings"][1]["path"], "metadata.name");
        let (ok, text) = validate(&[&path("none.yaml")]);
        assert!(
            !ok && text.contains("none.yaml:document 1: file: cannot be read: No such file"),
            "{text}"
        );

        let config = path("agent.yml");
        std::fs::write(&config, "node: a\nresources: {files: [a.yaml]}\n").unwrap();
        assert_eq!(
            validate(&["--config", &config]).1,
            "1 file, 1 document: 0 errors, 0 warnings\n"
        );
        std::fs::write(&config, "nodes: a\n").unwrap();
        let (ok, text) = validate(&["--config", &config]);
        assert!(
            !ok && text.contains("agent.yml: nodes: unknown field `nodes`"),
            "{text}"
        );
    }
}
