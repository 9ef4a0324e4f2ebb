//! Building for x86_64 and arm64, from either.
//!
//! What this machine is, it builds as always. For another architecture the compiler that cargo uses anyway does
//! if it has that one's standard library (`rustup target add`), else Debian's; and Debian's cross gcc links, and
//! compiles the C and the assembly of aws-lc, whose bindings and generated sources come with its crate.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::build_ebpf::{self, Built};
use crate::ebpf_toolchain::{DEBIAN_RUSTC, has_core};
use crate::setup::{self, Need};
use crate::shell::{self, Steps};

/// An architecture that the agent runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Arch {
    #[value(name = "x86_64", alias = "amd64")]
    X86_64,
    #[value(alias = "aarch64")]
    Arm64,
}

impl Arch {
    pub(crate) const ALL: [Self; 2] = [Self::X86_64, Self::Arm64];

    pub(crate) fn is_host(self) -> bool {
        self.rust_name() == env::consts::ARCH
    }

    pub(crate) fn target(self) -> String {
        format!("{}-unknown-linux-gnu", self.rust_name())
    }

    /// As Debian's packages are called.
    pub(crate) fn debian_name(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// A program of the GNU tools that makes or reads this architecture's files, such as `gcc`.
    pub(crate) fn gnu_tool(self, tool: &str) -> String {
        format!("{}-linux-gnu-{tool}", self.rust_name())
    }

    fn rust_name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::X86_64 => "x86_64",
            Self::Arm64 => "arm64",
        })
    }
}

/// Builds the agent, all programs of the packages in `also`, and the test programs of mesh-tests in `tests`.
pub(crate) fn build(steps: &mut Steps, arch: Arch, also: &[&str], tests: &[&str]) -> Result<Built> {
    if !arch.is_host() {
        setup::ensure(&[Need::Build, Need::Cross(arch)])?;
    }
    let mut built = build_ebpf::build_with(steps, &format!("build for {arch}"), cargo_build(arch)?, also)?;
    if !tests.is_empty() {
        let title = format!("build the tests for {arch}");
        build_ebpf::add_tests(steps, &title, cargo_build(arch)?, tests, &mut built)?;
    }
    Ok(built)
}

fn cargo_build(arch: Arch) -> Result<Command> {
    let mut cargo = shell::cargo("build");
    if !arch.is_host() {
        aim(&mut cargo, arch)?;
    }
    Ok(cargo)
}

/// Makes a cargo build for another architecture.
fn aim(cargo: &mut Command, arch: Arch) -> Result<()> {
    let target = arch.target();
    let variable = target.replace('-', "_");
    let gcc = arch.gnu_tool("gcc");
    let rustc =
        rustc(arch).with_context(|| format!("no Rust compiler here has the standard library of {target}"))?;
    cargo
        .args(["--target", &target])
        .env("RUSTC", rustc)
        // Rustup's cargo hands on where its own compiler's libraries are.
        .env_remove("LD_LIBRARY_PATH")
        .env(format!("CARGO_TARGET_{}_LINKER", variable.to_uppercase()), &gcc)
        // Before a CC that is meant for this machine.
        .env(format!("CC_{variable}"), &gcc);
    Ok(())
}

/// A compiler with the standard library of `arch`.
pub(crate) fn rustc(arch: Arch) -> Option<PathBuf> {
    let target = arch.target();
    let cargos = env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    [Path::new(&cargos), Path::new(DEBIAN_RUSTC)]
        .into_iter()
        .find(|rustc| has_core(rustc, &target))
        .map(Path::to_owned)
}

/// The C compiler for `arch`, and the C library that it links with.
pub(crate) fn c_compiler(arch: Arch) -> (Option<PathBuf>, Option<PathBuf>) {
    let gcc = shell::program(&arch.gnu_tool("gcc"));
    let library = gcc.as_ref().and_then(|gcc| {
        let answer = Command::new(gcc).arg("-print-file-name=libc.so").output().ok()?;
        let path = PathBuf::from(String::from_utf8(answer.stdout).ok()?.trim());
        // It repeats the bare name of what it does not find.
        path.is_absolute().then_some(path)
    });
    (gcc, library)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::{Arch, Command, aim, rustc};

    #[test]
    fn one_architecture_at_most_is_this_machine() {
        let hosts: Vec<_> = Arch::ALL.into_iter().filter(|arch| arch.is_host()).collect();
        assert!(hosts.len() <= 1, "{hosts:?}");
        #[cfg(target_arch = "x86_64")]
        assert_eq!(hosts, [Arch::X86_64]);
        #[cfg(target_arch = "aarch64")]
        assert_eq!(hosts, [Arch::Arm64]);
    }

    #[test]
    fn users_and_messages_call_them_alike() {
        for arch in Arch::ALL {
            assert_eq!(Arch::from_str(&arch.to_string(), false), Ok(arch));
        }
        // As container builders say it.
        assert_eq!(Arch::from_str("amd64", false), Ok(Arch::X86_64));
    }

    #[test]
    fn the_host_compiles_for_itself() {
        for arch in Arch::ALL.into_iter().filter(|arch| arch.is_host()) {
            assert!(rustc(arch).is_some());
            let mut cargo = Command::new("cargo");
            aim(&mut cargo, arch).unwrap();
            let linker = format!(
                "CARGO_TARGET_{}_UNKNOWN_LINUX_GNU_LINKER",
                arch.rust_name().to_uppercase()
            );
            let set = cargo.get_envs().find(|(name, _)| *name == linker.as_str());
            assert_eq!(
                set.and_then(|(_, value)| value),
                Some(arch.gnu_tool("gcc").as_ref())
            );
        }
    }
}
