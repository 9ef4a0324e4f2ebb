//! The one table: a column per kernel and architecture, and below it what is off and why.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use comfy_table::presets::{ASCII_MARKDOWN, UTF8_BORDERS_ONLY};
use comfy_table::{CellAlignment, Table};
use serde_json::{Value, json};

use super::report::Report;
use super::rows::Row;

/// How one row went.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) row: Row,
    pub(super) report: Report,
    /// Why it did not pass.
    pub(super) problem: Option<String>,
    pub(super) seconds: u64,
}

/// How to draw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Markdown,
}

/// A fact's name, and the cell of each outcome that has one.
type Line = (String, Vec<Option<String>>);

pub(super) fn draw(outcomes: &[Outcome], format: Format) -> String {
    if format == Format::Json {
        return format!("{:#}\n", to_json(outcomes));
    }
    let markdown = format == Format::Markdown;
    let mut table = Table::new();
    table.load_style(if markdown {
        ASCII_MARKDOWN
    } else {
        UTF8_BORDERS_ONLY
    });
    let header = outcomes.iter().map(|outcome| {
        let row = outcome.row;
        if markdown {
            row.to_string()
        } else {
            format!("{}\n{}", row.kernel(), row.arch)
        }
    });
    table.set_header(std::iter::once("Linux".to_owned()).chain(header));
    for (fact, cells) in lines(outcomes) {
        let cells = cells
            .into_iter()
            .map(|cell| cell.unwrap_or_else(|| "-".to_owned()));
        table.add_row(std::iter::once(fact).chain(cells));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!("{table}\n");
    let notes = notes(outcomes);
    if !notes.is_empty() {
        text.push('\n');
    }
    for note in notes {
        let _infallible = writeln!(text, "{}{note}", if markdown { "* " } else { "" });
    }
    text
}

fn lines(outcomes: &[Outcome]) -> Vec<Line> {
    let each = |fact: &str, cell: &dyn Fn(&Outcome) -> Option<String>| -> Line {
        (fact.to_owned(), outcomes.iter().map(cell).collect())
    };
    let mut lines = vec![
        each("version", &|outcome| outcome.report.version()),
        each("doctor", &|outcome| {
            let can_run = outcome.report.doctor()?["canRun"].as_bool()?;
            Some(if can_run { "can run" } else { "cannot" }.to_owned())
        }),
        each("programs loaded", &|outcome| loaded(&outcome.report)),
        each("programs attached", &|outcome| {
            let attached = capture(&outcome.report)?["attached"].as_u64()?;
            Some(attached.to_string())
        }),
    ];
    for (feature, _) in features(outcomes) {
        lines.push(each(&feature, &|outcome| {
            let present = feature_of(&outcome.report, &feature)?["present"].as_bool()?;
            Some(if present { "yes" } else { "no" }.to_owned())
        }));
    }
    lines.push(each("tests passed", &|outcome| {
        let report = &outcome.report;
        // A test that found nothing to test has passed nothing.
        let off = report.records("off").count();
        let (passed, total) = (
            report.passed.saturating_sub(off),
            report.total.saturating_sub(off),
        );
        (report.total > 0).then(|| format!("{passed} of {total}"))
    }));
    lines.push(each("tests off", &|outcome| {
        let off = outcome.report.records("off").count();
        (outcome.report.total > 0).then(|| off.to_string())
    }));
    for program in programs(outcomes) {
        lines.push(each(&format!("{program}, insns/stack"), &|outcome| {
            let figures = outcome
                .report
                .records("verifier")
                .find(|record| record["program"] == program.as_str())?;
            Some(format!("{}/{}", figures["instructions"], figures["stack"]))
        }));
    }
    lines.push(each("time", &|outcome| Some(format!("{} s", outcome.seconds))));
    lines.push(each("result", &|outcome| {
        Some(match outcome.problem {
            None => "passed".to_owned(),
            Some(_) => "FAILED".to_owned(),
        })
    }));
    lines
}

/// Why something is off, with the kernels where it is; then why rows failed.
fn notes(outcomes: &[Outcome]) -> Vec<String> {
    let mut notes = Vec::new();
    for (name, feature) in features(outcomes) {
        let is_off =
            |report: &Report| feature_of(report, &name).is_some_and(|found| found["present"] == false);
        let off = rows_where(outcomes, is_off);
        if !off.is_empty() {
            notes.push(format!(
                "No {name} (since Linux {}) on {off}: {}.",
                text(&feature["since"]),
                text(&feature["without"])
            ));
        }
    }
    let off: BTreeSet<_> = outcomes
        .iter()
        .flat_map(|outcome| outcome.report.records("off"))
        .map(|record| text(&record["what"]))
        .collect();
    for what in off {
        let is_it = |record: &&Value| record["what"] == what.as_str();
        let rows = rows_where(outcomes, |report| {
            report.records("off").any(|record| is_it(&record))
        });
        let most = outcomes
            .iter()
            .map(|outcome| outcome.report.records("off").filter(is_it).count())
            .max();
        notes.push(format!(
            "Tests off for want of {what} in the kernel: {} on {rows}.",
            most.unwrap_or_default()
        ));
    }
    for outcome in outcomes {
        if let Some(problem) = &outcome.problem {
            notes.push(format!("{} FAILED: {problem}.", outcome.row));
        }
    }
    notes
}

fn rows_where(outcomes: &[Outcome], holds: impl Fn(&Report) -> bool) -> String {
    let rows: Vec<_> = outcomes
        .iter()
        .filter(|outcome| holds(&outcome.report))
        .map(|outcome| outcome.row.to_string())
        .collect();
    rows.join(", ")
}

fn to_json(outcomes: &[Outcome]) -> Value {
    let rows: Vec<_> = outcomes
        .iter()
        .map(|outcome| {
            let report = &outcome.report;
            json!({
                "kernel": outcome.row.kernel(),
                "arch": outcome.row.arch.to_string(),
                "version": report.version(),
                "passed": outcome.problem.is_none(),
                "problem": outcome.problem,
                "tests": {"total": report.total, "passed": report.passed, "failed": report.failed},
                "programs": report.records("verifier").collect::<Vec<_>>(),
                "attached": capture(report).map(|capture| &capture["attached"]),
                "features": features_of(report),
                "off": report.records("off").collect::<Vec<_>>(),
                "doctor": report.doctor(),
                "seconds": outcome.seconds,
            })
        })
        .collect();
    json!({ "rows": rows })
}

/// The programs that the verifier let pass: those that an agent loaded, else those that its doctor tried.
fn loaded(report: &Report) -> Option<String> {
    let count = report.records("verifier").count();
    if count > 0 {
        return Some(count.to_string());
    }
    let doctor = report.doctor()?;
    let tried = doctor["programs"].as_array()?;
    let loads = tried.iter().filter(|program| program["loads"] == true).count();
    Some(format!("{loads} of {}", tried.len()))
}

/// What an agent said of its kernel side.
fn capture(report: &Report) -> Option<&Value> {
    report.records("capture").next()
}

/// What a kernel has and has not: as the agent says, and of the rest as its doctor does.
fn features_of(report: &Report) -> Vec<Value> {
    let listed = |value: &Value| value["features"].as_array().cloned();
    let mut all = capture(report).and_then(listed).unwrap_or_default();
    for feature in report.doctor().as_ref().and_then(listed).unwrap_or_default() {
        if all.iter().all(|have| have["name"] != feature["name"]) {
            all.push(feature);
        }
    }
    all
}

fn feature_of(report: &Report, name: &str) -> Option<Value> {
    features_of(report)
        .into_iter()
        .find(|feature| feature["name"] == name)
}

/// Every feature that any kernel was asked for, in the order in which agents list them.
fn features(outcomes: &[Outcome]) -> Vec<(String, Value)> {
    let mut all = Vec::<(String, Value)>::new();
    for feature in outcomes.iter().flat_map(|outcome| features_of(&outcome.report)) {
        let name = text(&feature["name"]);
        if all.iter().all(|(have, _)| *have != name) {
            all.push((name, feature));
        }
    }
    all
}

fn programs(outcomes: &[Outcome]) -> Vec<String> {
    let mut all: Vec<_> = outcomes
        .iter()
        .flat_map(|outcome| outcome.report.records("verifier"))
        .map(|record| text(&record["program"]))
        .collect();
    all.sort();
    all.dedup();
    all
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("?").to_owned()
}

#[cfg(test)]
mod tests {
    use super::{Format, Outcome, draw};
    use crate::cross::Arch;
    use crate::kernels::report::Report;
    use crate::kernels::rows::{Kernel, wanted};

    fn outcome(kernel: Kernel, console: &str, problem: Option<&str>) -> Outcome {
        let mut report = Report::default();
        for line in console.lines() {
            report.console(line);
        }
        Outcome {
            row: wanted(&[kernel], &[Arch::X86_64]).unwrap()[0],
            report,
            problem: problem.map(str::to_owned),
            seconds: 61,
        }
    }

    fn outcomes() -> [Outcome; 3] {
        let feature = |present| {
            format!(
                r#"{{"name":"cookies","present":{present},"since":"5.14","without":"it asks another way"}}"#
            )
        };
        let told = |release: &str, present: bool| {
            format!(
                "@kernels booted {release}\n@kernels tests\nrunning 2 tests\ntest a ... ok\ntest b ... ok\n\
                 @kernels record {{\"about\":\"verifier\",\"program\":\"p\",\"instructions\":7,\"stack\":8}}\n\
                 @kernels record {{\"about\":\"capture\",\"attached\":9,\"features\":[{}]}}",
                feature(present)
            )
        };
        let old = format!(
            "{}\n@kernels record {{\"about\":\"off\",\"what\":\"MPTCP\",\"test\":\"a\"}}",
            told("5.10.0-46-x #1 SMP Debian 5.10.262-1 (x)", false)
        );
        [
            outcome(Kernel::V5_10, &old, None),
            outcome(Kernel::V6_1, &told("6.1.0+d", true), None),
            outcome(
                Kernel::V6_12,
                "@kernels doctor {\"canRun\":false,\"programs\":[{\"loads\":true},{\"loads\":false}]}",
                Some("the kernel did not come up"),
            ),
        ]
    }

    #[test]
    fn markdown_has_a_column_for_each_kernel_and_says_what_is_off() {
        let drawn = draw(&outcomes(), Format::Markdown);
        let cells: Vec<Vec<_>> = drawn
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(|line| line.split('|').map(str::trim).collect())
            .collect();
        assert_eq!(
            cells[0][1..5],
            ["Linux", "5.10 x86_64", "6.1 x86_64", "6.12 x86_64"]
        );
        let line = |fact: &str| cells.iter().find(|line| line[1] == fact).unwrap()[2..5].to_vec();
        assert_eq!(line("version"), ["5.10.262-1", "6.1.0", "-"]);
        assert_eq!(line("doctor"), ["-", "-", "cannot"]);
        assert_eq!(line("programs loaded"), ["1", "1", "1 of 2"]);
        assert_eq!(line("programs attached"), ["9", "9", "-"]);
        assert_eq!(line("cookies"), ["no", "yes", "-"]);
        assert_eq!(line("tests passed"), ["1 of 1", "2 of 2", "-"]);
        assert_eq!(line("tests off"), ["1", "0", "-"]);
        assert_eq!(line("p, insns/stack"), ["7/8", "7/8", "-"]);
        assert_eq!(line("result"), ["passed", "passed", "FAILED"]);
        let notes: Vec<_> = drawn.lines().filter(|line| line.starts_with("* ")).collect();
        assert_eq!(
            notes,
            [
                "* No cookies (since Linux 5.14) on 5.10 x86_64: it asks another way.",
                "* Tests off for want of MPTCP in the kernel: 1 on 5.10 x86_64.",
                "* 6.12 x86_64 FAILED: the kernel did not come up.",
            ]
        );
    }

    #[test]
    fn json_has_the_same() {
        let drawn: serde_json::Value = serde_json::from_str(&draw(&outcomes(), Format::Json)).unwrap();
        let rows = drawn["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[0]["features"][0]["present"], false);
        assert_eq!(rows[0]["off"][0]["what"], "MPTCP");
        assert_eq!(rows[1]["programs"][0]["stack"], 8);
        assert_eq!(rows[2]["passed"], false);
        assert_eq!(rows[2]["problem"], "the kernel did not come up");
    }
}
