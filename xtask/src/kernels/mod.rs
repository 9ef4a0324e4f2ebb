//! `cargo xtask kernels`: the kernel tests on every kernel that we support, and one table of what came of it.
//!
//! Debian's kernels are booted in QEMU with a small root file system; the machine's own runs the tests as it is. No
//! row is left out: what cannot be run is a row that failed, with the reason.

#![expect(
    clippy::disallowed_types,
    reason = "wall-clock times of a program without a tokio runtime"
)]

mod debian;
mod guest;
mod image;
mod report;
mod rootfs;
mod rows;
mod sources;
mod table;

pub(crate) use rootfs::needed_by;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::build_ebpf::Built;
use crate::cross::{self, Arch};
use crate::ebpf_toolchain::tools_dir;
use crate::prerequisites;
use crate::setup::{self, Need};
use crate::shell::Steps;
use guest::Guest;
use report::{Expected, News, Report};
use rootfs::{Contents, Userland};
use rows::{Kernel, Row};
use table::{Format, Outcome};

/// What the tests of one guest may take, and its start and end besides.
const TESTS: Duration = Duration::from_secs(900);
const AROUND_TESTS: Duration = Duration::from_secs(120);
/// `mesh-agent doctor` only looks around.
const DOCTOR: Duration = Duration::from_secs(60);
/// An emulated processor is that much slower than the machines that the tests' patience was made for.
const PATIENCE: u32 = 5;
/// Tests wait more than they work.
const TEST_THREADS: &str = "4";
/// How often a person hears how many tests are done.
const NEWS_EVERY: Duration = Duration::from_secs(15);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only guests of this architecture; may be given several times.
    #[arg(long, value_name = "ARCH")]
    arch: Vec<Arch>,
    /// Only this kernel; may be given several times. `host` is the one of this machine.
    #[arg(long, value_name = "KERNEL")]
    kernel: Vec<Kernel>,
    /// Guests at one time; one per processor if it is not given.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Fetch the kernels and the guests' programs anew, the newest that there are.
    #[arg(long)]
    update: bool,
    /// How to print what came of it.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Write it to a file too, as JSON.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Run only tests whose name contains this.
    filter: Option<String>,
}

impl Args {
    /// One kernel beside the machine's own, on each architecture.
    pub(crate) fn for_ci() -> Self {
        Self {
            arch: Vec::new(),
            kernel: vec![Kernel::V6_1],
            jobs: None,
            update: false,
            format: Format::Table,
            output: None,
            filter: None,
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    Steps::timed(|steps| run_steps(steps, args))
}

pub(crate) fn run_steps(steps: &mut Steps, args: &Args) -> Result<()> {
    let rows = rows::wanted(&args.kernel, &args.arch)?;
    let shared = Shared::prepare(steps, args, &rows);
    let outcomes = steps.run(&format!("{} kernels", rows.len()), || {
        Ok(run_all(&rows, shared.jobs, |row| run_row(&shared, row)))
    })?;
    for outcome in outcomes.iter().filter(|outcome| outcome.problem.is_some()) {
        let evidence = outcome.report.evidence();
        if !evidence.is_empty() {
            eprintln!("\n---- {}:\n{evidence}", outcome.row);
        }
    }
    if let Some(file) = &args.output {
        fs::write(file, table::draw(&outcomes, Format::Json))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    eprintln!();
    std::io::stdout().write_all(table::draw(&outcomes, args.format).as_bytes())?;
    let failed = outcomes
        .iter()
        .filter(|outcome| outcome.problem.is_some())
        .count();
    ensure!(failed == 0, "{failed} of {} kernels failed", outcomes.len());
    Ok(())
}

/// What the rows share.
struct Shared<'a> {
    filter: Option<&'a str>,
    update: bool,
    jobs: usize,
    cache: PathBuf,
    /// What guests need of this machine, or why that is not there.
    guests: Result<()>,
    /// Per architecture, in the order of [`Arch::ALL`]: our programs, or why there are none.
    programs: Vec<Result<Built>>,
    userlands: Vec<Result<Userland>>,
}

impl<'a> Shared<'a> {
    fn prepare(steps: &mut Steps, args: &'a Args, rows: &[Row]) -> Self {
        let cache = tools_dir().join("kernels");
        let any_guest = rows.iter().any(|row| row.release.is_some());
        let guests = if any_guest {
            setup::ensure(&[Need::Kernels])
        } else {
            Ok(())
        };
        let (mut programs, mut userlands) = (Vec::new(), Vec::new());
        for arch in Arch::ALL {
            let wanted = |row: &&Row| row.arch == arch;
            programs.push(if rows.iter().any(|row| wanted(&row)) {
                build(steps, arch)
            } else {
                Err(anyhow!("not wanted"))
            });
            let any_guest = rows.iter().filter(wanted).any(|row| row.release.is_some());
            userlands.push(if any_guest && guests.is_ok() {
                Userland::get(&cache, arch, args.update)
            } else {
                Err(anyhow!("not wanted"))
            });
        }
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            filter: args.filter.as_deref(),
            update: args.update,
            jobs: args.jobs.unwrap_or(cores).max(1),
            cache,
            guests,
            programs,
            userlands,
        }
    }

    fn of_arch<'b, T>(&self, all: &'b [Result<T>], arch: Arch) -> Result<&'b T> {
        let index = Arch::ALL.iter().position(|other| *other == arch);
        let of_arch = index.and_then(|index| all.get(index));
        match of_arch.context("an architecture that is none")? {
            Ok(it) => Ok(it),
            Err(error) => Err(anyhow!("{error:#}")),
        }
    }
}

/// The agent, its peer and the kernel tests.
fn build(steps: &mut Steps, arch: Arch) -> Result<Built> {
    setup::ensure(&[Need::Build])?;
    cross::build(steps, arch, &["mesh-tests"], &["kernel"])
}

/// Runs the rows, some at a time, and returns the outcomes in their order.
fn run_all(rows: &[Row], jobs: usize, run: impl Fn(Row) -> Outcome + Sync) -> Vec<Outcome> {
    let left = Mutex::new(rows.iter().copied().enumerate());
    let done = Mutex::new(Vec::new());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        for _ in 0..jobs.min(rows.len()) {
            scope.spawn(|| {
                while let Some((index, row)) = next() {
                    let outcome = run(row);
                    done.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((index, outcome));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

fn run_row(shared: &Shared<'_>, row: Row) -> Outcome {
    let started = Instant::now();
    let mut report = Report::default();
    let mut teller = Teller::new(row);
    teller.say("begins");
    let ran = match row.release {
        Some(_) => in_guest(shared, row, &mut report, &mut teller),
        None => here(shared, row, &mut report, &mut teller),
    };
    // A failure to run says more than what the run then did not say.
    let problem = match ran {
        Err(error) => Some(format!("{error:#}")),
        Ok(()) => report.problem(&Expected {
            all_tests: shared.filter.is_none(),
            lacks: row.release.map(|release| release.lacks),
        }),
    };
    teller.say(problem.as_deref().unwrap_or("passed"));
    Outcome {
        row,
        report,
        problem,
        seconds: started.elapsed().as_secs(),
    }
}

fn in_guest(shared: &Shared<'_>, row: Row, report: &mut Report, teller: &mut Teller) -> Result<()> {
    if let Err(error) = &shared.guests {
        bail!("no guests here: {error:#}");
    }
    let release = row.release.context("a guest has a release")?;
    let programs = shared.of_arch(&shared.programs, row.arch)?;
    let userland = shared.of_arch(&shared.userlands, row.arch)?;
    let image = image::get(&shared.cache, release, row.arch, shared.update)?;
    let scratch = tempfile::tempdir()?;
    let (root, initramfs) = (scratch.path().join("root"), scratch.path().join("initramfs"));
    let contents = Contents {
        arch: row.arch,
        userland,
        image: &image,
        programs: &[
            (&programs.agent, "mesh-agent"),
            (programs.program("mesh-peer")?, "mesh-peer"),
            (programs.program("kernel")?, "kernel-tests"),
        ],
        settings: &settings(shared.filter),
    };
    rootfs::write(&contents, &root, &initramfs)?;
    let guest = Guest {
        arch: row.arch,
        kernel: &image.kernel,
        initramfs: &initramfs,
        processors: 2,
        limit: TESTS + AROUND_TESTS,
    };
    guest.run(|line| {
        let news = report.console(line);
        teller.tell(report, news);
    })
}

/// What `init.sh` reads: variables, and the arguments of the tests.
fn settings(filter: Option<&str>) -> String {
    let mut arguments = vec!["--test-threads", TEST_THREADS];
    arguments.extend(filter);
    let arguments: Vec<_> = arguments.into_iter().map(quoted).collect();
    format!(
        "export PATH=/bin MESH_AGENT_BIN=/bin/mesh-agent MESH_PEER_BIN=/bin/mesh-peer\n\
         export MESH_TESTS_RECORD=/run/record MESH_TESTS_PATIENCE={PATIENCE} RUST_BACKTRACE=0\n\
         DOCTOR_SECONDS={} TESTS_SECONDS={}\nset -- {}\n",
        DOCTOR.as_secs(),
        TESTS.as_secs(),
        arguments.join(" ")
    )
}

/// For a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The machine's own kernel: what a guest does, done here.
fn here(shared: &Shared<'_>, row: Row, report: &mut Report, teller: &mut Teller) -> Result<()> {
    setup::ensure(&[Need::Peers])?;
    let missing = prerequisites::missing();
    if !missing.is_empty() {
        bail!("{}", missing.join("; "));
    }
    let programs = shared.of_arch(&shared.programs, row.arch)?;
    let kernel = |file: &str| fs::read_to_string(Path::new("/proc/sys/kernel").join(file));
    let (release, version) = (kernel("osrelease")?, kernel("version")?);
    report.kernel = Some(format!("{} {}", release.trim(), version.trim()));
    report.set_doctor(prerequisites::doctor(&programs.agent)?.to_string());
    let scratch = tempfile::tempdir()?;
    let record = scratch.path().join("record");
    let mut tests = Command::new(programs.program("kernel")?);
    tests
        .args(shared.filter)
        .env("MESH_AGENT_BIN", &programs.agent)
        .env("MESH_PEER_BIN", programs.program("mesh-peer")?)
        .env("MESH_TESTS_RECORD", &record);
    report.exit = guest::run_here(&mut tests, TESTS, |line| {
        let news = report.tests(line);
        teller.tell(report, news);
    })?;
    for line in fs::read_to_string(&record).unwrap_or_default().lines() {
        report.record(line);
    }
    report.end();
    Ok(())
}

/// Tells the person who waits how a row goes.
struct Teller {
    row: Row,
    told: Instant,
}

impl Teller {
    fn new(row: Row) -> Self {
        Self {
            row,
            told: Instant::now(),
        }
    }

    fn say(&mut self, what: &str) {
        eprintln!("    {:<12} {what}", self.row.to_string());
        self.told = Instant::now();
    }

    fn tell(&mut self, report: &Report, news: Option<News>) {
        match news {
            Some(News::Booted(kernel)) => self.say(&format!("booted {kernel}")),
            Some(News::Failed(test)) => self.say(&format!("FAILED {test}")),
            Some(News::Passed) if self.told.elapsed() > NEWS_EVERY => {
                self.say(&format!("{} of {} tests passed", report.passed, report.total));
            }
            Some(News::Passed) | None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{quoted, settings};

    #[test]
    fn a_filter_reaches_the_tests_as_it_is() {
        assert_eq!(quoted("it's; reboot"), "'it'\\''s; reboot'");
        let last = settings(Some("fast::")).lines().last().map(str::to_owned);
        assert_eq!(last.as_deref(), Some("set -- '--test-threads' '4' 'fast::'"));
    }
}
