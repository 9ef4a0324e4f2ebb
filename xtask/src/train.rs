//! `cargo xtask train`: runs the agent under load, and keeps what its code did for the builds that are asked for it.
//!
//! Profile-guided optimisation: the compiler then knows which code is hot and which never ran. That is what the agent's
//! CPU per request hangs on where it shares its caches with the applications. Invariants: a profile is of one
//! compiler and one architecture; nothing is built with one unless the user says so (`--trained`); a training in which
//! anything failed leaves the last one's profile. What has changed since a training is compiled as without a profile, and
//! the compiler says so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::build_ebpf::{self, Built};
use crate::cross::{self, Arch};
use crate::prerequisites;
use crate::setup::{self, LLVM_PREFIX, Need};
use crate::shell::{self, Steps};

/// What the agent is trained with: each kind of traffic that it carries, for a short time each.
const LESSONS: [&str; 4] = ["l7-same-node", "l7-two-nodes", "l4-two-nodes", "connect"];
/// The agents of these: two in each of two rounds. Each leaves a file of counts.
const LEAST_COUNTS: usize = 2 * 2 * LESSONS.len();

pub(crate) fn run() -> Result<()> {
    setup::ensure(&[Need::Build, Need::Peers, Need::Bench])?;
    let missing = prerequisites::missing();
    if !missing.is_empty() {
        bail!("no training here:\n  - {}", missing.join("\n  - "));
    }
    Steps::timed(|steps| {
        let profile = path()?;
        let merge = profdata()?;
        let counts = empty_folder("counts")?;
        let cargo = apart("counting", &format!("-Cprofile-generate={}", counts.display()))?;
        let counting = build_ebpf::build_with(steps, "build an agent that counts", cargo, &[])?;
        let tools = build_ebpf::build(steps, &["mesh-tests"])?;
        steps.run("train", || train(&counting, &tools, &counts))?;
        steps.run("merge the counts", || {
            // Broken off, it leaves no half of a profile.
            let new = profile.with_extension("new");
            // Not sparse: what never ran must be known, too.
            let mut merge = Command::new(merge);
            shell::run(merge.args(["merge", "--output"]).args([&new, &counts]))?;
            fs::rename(&new, &profile)?;
            Ok(fs::remove_dir_all(&counts)?)
        })?;
        eprintln!(
            "{}: `bench`, `dist` and `test` build with it when they are told --trained",
            profile.display()
        );
        Ok(())
    })
}

/// The profile of the last training by this compiler.
pub(crate) fn profile() -> Result<PathBuf> {
    let profile = path()?;
    if !profile.is_file() {
        bail!(
            "there was no training by this compiler (no {}): run `cargo xtask train` first",
            profile.display()
        );
    }
    Ok(profile)
}

/// Builds the agent with a profile.
pub(crate) fn build(steps: &mut Steps, profile: &Path) -> Result<Built> {
    let cargo = apart("trained", &format!("-Cprofile-use={}", profile.display()))?;
    build_ebpf::build_with(steps, "build the trained agent", cargo, &[])
}

fn train(counting: &Built, tools: &Built, counts: &Path) -> Result<()> {
    shell::run(
        Command::new(tools.program("bench")?)
            .args(LESSONS)
            .args(["--peer", "none", "--rounds", "2", "--seconds", "1", "--output"])
            .arg(counts.with_file_name("training.json"))
            .env("MESH_AGENT_BIN", &counting.agent)
            .env("MESH_PEER_BIN", tools.program("mesh-peer")?)
            // One file for each process, so that none overwrites another's.
            .env("LLVM_PROFILE_FILE", counts.join("%p.profraw")),
    )?;
    let files = fs::read_dir(counts)?.count();
    ensure!(
        files >= LEAST_COUNTS,
        "only {files} agents left their counts, of {LEAST_COUNTS} that ran"
    );
    Ok(())
}

/// Where a profile is kept, for this compiler and this machine's architecture.
fn path() -> Result<PathBuf> {
    let about = shell::output(rustc().arg("--version"))?;
    // The commit, too: nightly ones share a number.
    let version: Vec<_> = about.split_whitespace().skip(1).take(2).collect();
    let version = version.join("-").replace('(', "");
    Ok(folder().join(format!("{}-{version}.profdata", Arch::host()?)))
}

fn folder() -> PathBuf {
    shell::target_dir().join("training")
}

/// One of its folders, without what an earlier training left there.
fn empty_folder(name: &str) -> Result<PathBuf> {
    let folder = folder().join(name);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot empty {}", folder.display()))
        }
        _ => {
            fs::create_dir_all(&folder)?;
            Ok(folder)
        }
    }
}

fn rustc() -> Command {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.current_dir(shell::workspace());
    rustc
}

/// A cargo build with one more flag for the compiler, in a target folder of its own: all would be compiled anew at each
/// change between builds with one set of flags and another.
fn apart(name: &str, flag: &str) -> Result<Command> {
    let mut cargo = cross::cargo("build", Arch::host()?, &[flag])?;
    cargo.env("CARGO_TARGET_DIR", folder().join(name));
    Ok(cargo)
}

/// The program that merges counts: the compiler's own, or that of the LLVM which compiling the kernel side needs.
fn profdata() -> Result<PathBuf> {
    let libraries = shell::output(rustc().args(["--print", "target-libdir"]))?;
    let component = Path::new(libraries.trim()).with_file_name("bin");
    [component, Path::new(LLVM_PREFIX).join("bin")]
        .into_iter()
        .map(|folder| folder.join("llvm-profdata"))
        .find(|file| file.is_file())
        .context("no llvm-profdata: `rustup component add llvm-tools` brings it")
}
