//! What a run of the tests tells, read from its lines: of a guest's console, or of the tests' own output.
//!
//! Invariant: a run counts as passed only by what it says itself at its end. Nothing that is missing is a pass.

use serde_json::Value;

/// Begins the lines of `init.sh` that are for us. The kernel may have begun the line with something of its own.
const MARKER: &str = "@kernels ";
/// The console's last lines, shown when it says no more.
const LAST_LINES: usize = 25;
/// Lines of the tests' output that are kept: enough for the messages of all tests, if they all fail.
const MOST_OUTPUT: usize = 20_000;

/// Everything that one run told so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// The kernel's release and version, as `uname -rv` says them.
    pub(super) kernel: Option<String>,
    /// Tests there are.
    pub(super) total: usize,
    pub(super) passed: usize,
    pub(super) failed: Vec<String>,
    /// Of the tests' program.
    pub(super) exit: Option<i32>,
    /// `(passed, failed)`, as the tests' program counts them in the end.
    counted: Option<(usize, usize)>,
    records: Vec<Value>,
    doctor: String,
    broken: Vec<String>,
    /// What the tests printed.
    output: Vec<String>,
    last: Vec<String>,
    in_tests: bool,
    /// It has told everything.
    ended: bool,
}

/// What there must be for a pass.
#[derive(Debug, Default)]
pub(super) struct Expected {
    /// No test was left out by a filter.
    pub(super) all_tests: bool,
    /// Exactly what the kernel may lack; `None` where that is not known.
    pub(super) lacks: Option<&'static [&'static str]>,
}

/// Programs in the object.
const PROGRAMS: usize = 10;

/// Something that a person who waits wants to hear of at once.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    Booted(String),
    Failed(String),
    Passed,
}

impl Report {
    /// Takes one line of a guest's console.
    pub(super) fn console(&mut self, line: &str) -> Option<News> {
        if self.last.len() == LAST_LINES {
            self.last.remove(0);
        }
        self.last.push(line.to_owned());
        let Some((_, told)) = line.split_once(MARKER) else {
            return if self.in_tests { self.tests(line) } else { None };
        };
        let (what, rest) = told.split_once(' ').unwrap_or((told, ""));
        match what {
            "booted" => {
                self.kernel = Some(rest.to_owned());
                return Some(News::Booted(rest.to_owned()));
            }
            "broken" => self.broken.push(rest.to_owned()),
            "doctor" => {
                self.doctor.push_str(rest);
                self.doctor.push('\n');
            }
            "tests" => self.in_tests = true,
            "exit" => {
                self.in_tests = false;
                self.exit = rest.parse().ok();
            }
            "record" => self.record(rest),
            "end" => self.end(),
            _ => {}
        }
        None
    }

    /// Takes one line of the tests' own output.
    pub(super) fn tests(&mut self, line: &str) -> Option<News> {
        if self.output.len() < MOST_OUTPUT {
            self.output.push(line.to_owned());
        }
        if let Some(rest) = line.strip_prefix("running ") {
            let count = rest.split(' ').next().and_then(|count| count.parse().ok());
            self.total = count.unwrap_or(self.total);
        } else if let Some(rest) = line.strip_prefix("test result: ") {
            self.counted = Some((count_before(rest, " passed"), count_before(rest, " failed")));
        } else if let Some((name, outcome)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "))
        {
            if outcome == "ok" {
                self.passed += 1;
                return Some(News::Passed);
            }
            if outcome.starts_with("FAILED") {
                self.failed.push(name.to_owned());
                return Some(News::Failed(name.to_owned()));
            }
        }
        None
    }

    /// Takes a line of what tests record.
    pub(super) fn record(&mut self, line: &str) {
        match serde_json::from_str(line) {
            Ok(record) => self.records.push(record),
            Err(error) => self.broken.push(format!("a record is garbled ({error}): {line}")),
        }
    }

    /// Nothing more comes.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }

    pub(super) fn set_doctor(&mut self, told: String) {
        self.doctor = told;
    }

    /// The kernel's version. Debian's releases are called after the first of their series, whichever follow.
    pub(super) fn version(&self) -> Option<String> {
        let kernel = self.kernel.as_deref()?;
        let debian = kernel
            .split_once(" Debian ")
            .and_then(|(_, version)| version.split(' ').next());
        let release = kernel.split([' ', '-', '+']).next();
        debian.or(release).map(str::to_owned)
    }

    /// Why this run is no pass, in one line.
    pub(super) fn problem(&self, expected: &Expected) -> Option<String> {
        if let Some(broken) = self.broken.first() {
            return Some(broken.clone());
        }
        let Some(exit) = self.exit else {
            return Some(if self.kernel.is_none() {
                "the kernel did not come up".to_owned()
            } else {
                "the tests did not end".to_owned()
            });
        };
        match self.counted {
            _ if self.failed.len() == 1 => Some("one test failed".to_owned()),
            _ if !self.failed.is_empty() => Some(format!("{} tests failed", self.failed.len())),
            None => Some(format!(
                "the tests ended with status {exit} before they were done"
            )),
            Some((passed, failed)) if exit != 0 || failed != 0 || passed != self.total => Some(format!(
                "the tests ended with status {exit}: {passed} of {} passed",
                self.total
            )),
            Some((0, _)) => Some("there was no test to run".to_owned()),
            _ if !self.ended => Some("it ended before it had told everything".to_owned()),
            Some(_) => self
                .doctors_problem()
                .or_else(|| self.missing_record(expected))
                .or_else(|| self.unexpectedly_off(expected)),
        }
    }

    /// The tests found that the agent runs here, so doctor must say that it can.
    fn doctors_problem(&self) -> Option<String> {
        let Some(doctor) = self.doctor() else {
            return Some("the tests passed, but doctor said nothing that can be read".to_owned());
        };
        if doctor["canRun"] == true {
            return None;
        }
        let problems = doctor["checks"].as_array().into_iter().flatten();
        let problems: Vec<_> = problems
            .filter(|check| check["level"] == "problem")
            .map(|check| check["found"].to_string())
            .collect();
        Some(format!(
            "the tests passed, but doctor found {}",
            problems.join(", ")
        ))
    }

    fn missing_record(&self, expected: &Expected) -> Option<String> {
        let programs = self.records("verifier").count();
        let told = self.records("capture").count() > 0 && programs >= PROGRAMS;
        (expected.all_tests && !told).then(|| {
            format!(
                "the tests passed, but told of {programs} programs, and not of what is attached and probed"
            )
        })
    }

    /// A probe that errs would turn tests off that should run.
    fn unexpectedly_off(&self, expected: &Expected) -> Option<String> {
        let lacks = expected.lacks?;
        let mut off = self
            .records("off")
            .map(|record| record["what"].as_str().unwrap_or_default());
        let surprise = off.find(|what| !lacks.contains(what))?;
        Some(format!(
            "tests were off for want of {surprise}, which this kernel has"
        ))
    }

    /// What to show of a run that did not pass.
    pub(super) fn evidence(&self) -> String {
        let failures = self.output.iter().position(|line| line == "failures:");
        match failures {
            Some(start) => self.output[start..].join("\n"),
            None => self.last.join("\n"),
        }
    }

    /// What tests recorded about something.
    pub(super) fn records<'a>(&'a self, about: &'a str) -> impl Iterator<Item = &'a Value> {
        self.records.iter().filter(move |record| record["about"] == about)
    }

    /// What `mesh-agent doctor` said, if it said anything that can be read.
    pub(super) fn doctor(&self) -> Option<Value> {
        serde_json::from_str(&self.doctor).ok()
    }
}

/// The number in front of a word: `64 passed` in `ok. 64 passed; 0 failed`.
fn count_before(line: &str, word: &str) -> usize {
    let number = line.split_once(word).map_or("", |(before, _)| before);
    let number = number.rsplit([' ', ';']).next().unwrap_or_default();
    number.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{Expected, News, Report};

    const KNOWN: Expected = Expected {
        all_tests: false,
        lacks: Some(&["MPTCP"]),
    };

    const PASSED: &str = "@kernels booted 6.1.0-56-cloud-amd64 #1 SMP Debian 6.1.192-2 (2026-11-16)
@kernels doctor {
@kernels doctor   \"canRun\": true}
@kernels tests

running 2 tests
test a::one ... ok
[   12.3] some message of the kernel
test a::two ... ok

test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 1.00s

@kernels exit 0
@kernels record {\"about\":\"verifier\",\"program\":\"p\",\"instructions\":7,\"stack\":8}
[   12.3] @kernels record {\"about\":\"off\",\"what\":\"MPTCP\"}
@kernels end";

    fn read(text: &str) -> (Report, Vec<News>) {
        let mut report = Report::default();
        let news = text.lines().filter_map(|line| report.console(line)).collect();
        (report, news)
    }

    #[test]
    fn a_pass_is_told_in_full() {
        let (report, news) = read(PASSED);
        assert_eq!(report.problem(&KNOWN), None);
        assert_eq!((report.passed, report.total), (2, 2));
        let kernel = "6.1.0-56-cloud-amd64 #1 SMP Debian 6.1.192-2 (2026-11-16)";
        assert_eq!(news[0], News::Booted(kernel.to_owned()));
        assert_eq!(report.version().unwrap(), "6.1.192-2");
        assert_eq!(news.len(), 3);
        assert_eq!(report.records("verifier").next().unwrap()["stack"], 8);
        assert_eq!(report.records("off").count(), 1);
        assert_eq!(report.doctor().unwrap()["canRun"], true);
        let all = Expected {
            all_tests: true,
            ..KNOWN
        };
        assert!(report.problem(&all).unwrap().contains("told of 1 programs"));
        let newer = Expected {
            lacks: Some(&[]),
            ..KNOWN
        };
        assert!(report.problem(&newer).unwrap().contains("for want of MPTCP"));
        assert_eq!(report.problem(&Expected::default()), None);
    }

    #[test]
    fn every_end_before_the_end_is_a_problem() {
        let lines: Vec<_> = PASSED.lines().collect();
        for end in 0..lines.len() {
            let (report, _) = read(&lines[..end].join("\n"));
            assert!(report.problem(&KNOWN).is_some(), "{:?}", &lines[..end]);
        }
        for (from, to) in [
            ("exit 0", "exit 101"),
            ("exit 0", "exit 137"),
            ("a::two ... ok", "a::two ... FAILED"),
            ("2 passed; 0 failed", "1 passed; 1 failed"),
            ("running 2 tests", "running 3 tests"),
            ("{\"about\":\"off\"", "{\"about\":[  5.1] oops"),
            ("\"canRun\": true", "\"canRun\": false"),
            ("\"canRun\": true", "Segmentation fault"),
            ("@kernels end", "Kernel panic - not syncing"),
            (
                "@kernels doctor {",
                "@kernels broken the kernel does not take veth",
            ),
        ] {
            let (report, _) = read(&PASSED.replace(from, to));
            assert!(report.problem(&KNOWN).is_some(), "{to}");
        }
        let nothing = PASSED
            .replace("running 2 tests", "running 0 tests")
            .replace("2 passed", "0 passed");
        let nothing = nothing
            .replace("test a::one ... ok\n", "")
            .replace("test a::two ... ok\n", "");
        assert_eq!(
            read(&nothing).0.problem(&KNOWN).unwrap(),
            "there was no test to run"
        );
    }

    #[test]
    fn failures_are_shown_as_the_tests_told_them() {
        let failed = PASSED.replace("two ... ok", "two ... FAILED").replace(
            "test result: ok. 2 passed; 0 failed",
            "failures:\n\n---- a::two stdout ----\nwhy\n\ntest result: FAILED. 1 passed; 1 failed",
        );
        let (report, news) = read(&failed.replace("exit 0", "exit 101"));
        assert!(news.contains(&News::Failed("a::two".to_owned())));
        assert_eq!(report.problem(&KNOWN).unwrap(), "one test failed");
        assert!(report.evidence().contains("why"));
        let (hung, _) = read("one\ntwo");
        assert_eq!(hung.evidence(), "one\ntwo");
    }
}
