//! `cargo xtask train`: runs the agent under load, and keeps what its code did for the builds that users get.
//!
//! Profile-guided optimisation: the compiler then knows which code is hot. That is what the agent's CPU per request
//! hangs on where it shares its caches with the applications, and what keeps code that is hardly ever run out of
//! memory. A profile is of one compiler, and good for sources that have changed a little since: functions that it
//! does not know are compiled as without it.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build_ebpf::{self, Built};
use crate::cross::Arch;
use crate::prerequisites;
use crate::setup::{self, Need};
use crate::shell::{self, Steps};

/// What the agent is trained with: each kind of traffic that it carries, for a short time each.
const LESSONS: [&str; 4] = ["l7-same-node", "l7-two-nodes", "l4-two-nodes", "connect"];

/// Debian's LLVM, which compiling the kernel side needs anyway.
const DEBIAN_LLVM: &str = "/usr/lib/llvm-22/bin";

pub(crate) fn run() -> Result<()> {
    setup::ensure(&[Need::Build, Need::Peers, Need::Bench])?;
    let missing = prerequisites::missing();
    if !missing.is_empty() {
        bail!("no training here:\n  - {}", missing.join("\n  - "));
    }
    Steps::timed(|steps| {
        let profile = profile()?;
        let merge = profdata()?;
        let folder = folder();
        // Counts of another build would be merged with today's.
        let counts = folder.join("counts");
        match fs::remove_dir_all(&counts) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot empty {}", counts.display()));
            }
            _ => fs::create_dir_all(&counts)?,
        }
        let mut cargo = apart("counting")?;
        flags(&mut cargo, &format!("-Cprofile-generate={}", counts.display()))?;
        let counting = build_ebpf::build_with(steps, "build an agent that counts", cargo, &[])?;
        let tools = build_ebpf::build(steps, &["mesh-tests"])?;
        steps.run("train", || train(&counting, &tools, &folder))?;
        steps.run("merge the counts", || {
            shell::run(
                Command::new(merge)
                    .args(["merge", "--sparse", "--output"])
                    .args([&profile, &counts]),
            )
        })?;
        eprintln!(
            "{}: `cargo xtask dist` and `cargo xtask bench` build with it from now on",
            profile.display()
        );
        Ok(())
    })
}

/// Builds the agent with the profile of the last training, if there was one by the compiler in use.
pub(crate) fn build(steps: &mut Steps) -> Result<Option<Built>> {
    let profile = profile()?;
    if !profile.is_file() {
        return Ok(None);
    }
    let mut cargo = apart("trained")?;
    flags(&mut cargo, &format!("-Cprofile-use={}", profile.display()))?;
    let title = "build the agent with the profile of the last training";
    build_ebpf::build_with(steps, title, cargo, &[]).map(Some)
}

fn train(counting: &Built, tools: &Built, folder: &Path) -> Result<()> {
    shell::run(
        Command::new(tools.program("bench")?)
            .args(LESSONS)
            .args(["--peer", "none", "--rounds", "2", "--seconds", "1", "--output"])
            .arg(folder.join("training.json"))
            .env("MESH_AGENT_BIN", &counting.agent)
            .env("MESH_PEER_BIN", tools.program("mesh-peer")?)
            // One file for each process, so that none overwrites another's.
            .env("LLVM_PROFILE_FILE", folder.join("counts/%p.profraw")),
    )
}

/// Where a profile is kept, for this compiler.
fn profile() -> Result<PathBuf> {
    let about = shell::output(rustc().arg("--version"))?;
    // The commit, too: nightly ones share a number.
    let version: Vec<_> = about.split_whitespace().skip(1).take(2).collect();
    let version = version.join("-").replace('(', "");
    Ok(folder().join(format!("agent-{version}.profdata")))
}

fn folder() -> PathBuf {
    shell::target_dir().join("training")
}

fn rustc() -> Command {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.current_dir(shell::workspace());
    rustc
}

/// A cargo build beside the usual one, in a target folder of its own: all would be compiled anew at each change
/// between builds with one set of flags and another.
fn apart(name: &str) -> Result<Command> {
    let host = Arch::ALL.into_iter().find(|arch| arch.is_host());
    let host = host.with_context(|| format!("no agent runs on {}", std::env::consts::ARCH))?;
    let mut cargo = shell::cargo("build");
    cargo
        .env("CARGO_TARGET_DIR", folder().join(name))
        // Named, or the flags would be those of build scripts and macros too.
        .args(["--target", &host.target()]);
    Ok(cargo)
}

/// Sets the compiler's flags, where the user has none.
fn flags(cargo: &mut Command, flags: &str) -> Result<()> {
    for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        if std::env::var_os(variable).is_some_and(|value| !value.is_empty()) {
            bail!("{variable} is set, and a profile needs flags of its own: unset it");
        }
    }
    // Paths may have spaces.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags);
    Ok(())
}

/// The program that merges counts, of the compiler's LLVM: each version has a format of its own.
fn profdata() -> Result<PathBuf> {
    let libraries = shell::output(rustc().args(["--print", "target-libdir"]))?;
    let component = Path::new(libraries.trim()).with_file_name("bin");
    [component.as_path(), Path::new(DEBIAN_LLVM)]
        .into_iter()
        .map(|folder| folder.join(OsStr::new("llvm-profdata")))
        .find(|file| file.is_file())
        .context("no llvm-profdata: `rustup component add llvm-tools` brings it")
}
