//! Building for x86_64 and arm64, from either.
//!
//! Programs have their C library inside: an agent runs on nodes with any or none, and takes 3 MB less memory. Cargo is
//! told the target for this machine too: macros cannot be built so, and without a target they would share its flags.
//!
//! For another architecture the compiler that cargo uses anyway does if it has that one's standard library (`rustup
//! target add`), else Debian's; and Debian's cross gcc links, and compiles the C and the assembly of aws-lc, whose
//! bindings and generated sources come with its crate.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::build_ebpf::{self, Built};
use crate::ebpf_toolchain::{DEBIAN_RUSTC, has_core};
use crate::setup::{self, Need};
use crate::shell::{self, Steps};

/// Has the compiler put the C library inside. Debian has the archive in libc6-dev, Fedora in glibc-static.
const STATIC: &str = "-Ctarget-feature=+crt-static";
/// Has random numbers come from the system call: a static program finds no symbols by name, for which the crate then
/// takes `/dev/urandom`, and that may not be there.
const RANDOM: &str = "--cfg=getrandom_backend=\"linux_getrandom\"";
/// Has the linker put 0.8 MB of relocations into 10 KB, where it can (Debian 12's cannot for arm64).
const PACKED: &str = "-Clink-arg=-Wl,-z,pack-relative-relocs";

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

    /// This machine's.
    pub(crate) fn host() -> Result<Self> {
        let host = Self::ALL.into_iter().find(|arch| arch.is_host());
        host.with_context(|| format!("no agent runs on {}", env::consts::ARCH))
    }

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
    let title = format!("build for {arch}");
    let mut built = build_ebpf::build_with(steps, &title, cargo("build", arch, &[])?, also)?;
    if !tests.is_empty() {
        let title = format!("build the tests for {arch}");
        build_ebpf::add_tests(steps, &title, cargo("build", arch, &[])?, tests, &mut built)?;
    }
    Ok(built)
}

/// A cargo that builds for `arch`, with more flags for the compiler.
pub(crate) fn cargo(subcommand: &str, arch: Arch, more: &[&str]) -> Result<Command> {
    let mut cargo = shell::cargo(subcommand);
    for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        if env::var_os(variable).is_some_and(|value| !value.is_empty()) {
            bail!("{variable} is set, and would replace the flags that the agent is built with: unset it");
        }
        // An empty one would replace them too.
        cargo.env_remove(variable);
    }
    let gcc = if arch.is_host() {
        "cc".to_owned()
    } else {
        arch.gnu_tool("gcc")
    };
    let packed = packs_relocations(Path::new(&gcc)).then_some(PACKED);
    let always = [STATIC, RANDOM].into_iter();
    let flags: Vec<_> = always.chain(packed).chain(more.iter().copied()).collect();
    let target = arch.target();
    // A list of strings looks the same in TOML. Paths among the flags may have spaces.
    let flags = format!("target.{target}.rustflags={flags:?}");
    cargo.args(["--target", &target, "--config", &flags]);
    if !arch.is_host() {
        aim(&mut cargo, arch)?;
    }
    Ok(cargo)
}

/// Whether the C library that a C compiler puts into programs can start one with packed relocations: from 2.36 on.
fn packs_relocations(gcc: &Path) -> bool {
    let ask = || {
        let mut asked = Command::new(gcc)
            .args(["-E", "-P", "-x", "c", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        // Closed, so that the compiler begins.
        writeln!(
            asked.stdin.take()?,
            "#include <features.h>\n__GLIBC__ __GLIBC_MINOR__"
        )
        .ok()?;
        let answer = String::from_utf8(asked.wait_with_output().ok()?.stdout).ok()?;
        let mut words = answer.split_whitespace().map(str::parse::<u32>);
        Some((words.next()?.ok()?, words.next()?.ok()?))
    };
    ask() >= Some((2, 36))
}

/// Gives a cargo the tools for another architecture.
fn aim(cargo: &mut Command, arch: Arch) -> Result<()> {
    let target = arch.target();
    let variable = target.replace('-', "_");
    let gcc = arch.gnu_tool("gcc");
    let rustc =
        rustc(arch).with_context(|| format!("no Rust compiler here has the standard library of {target}"))?;
    cargo
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
    let library = gcc.as_deref().and_then(c_library);
    (gcc, library)
}

/// The C library that a C compiler puts into programs.
pub(crate) fn c_library(gcc: &Path) -> Option<PathBuf> {
    let answer = Command::new(gcc).arg("-print-file-name=libc.a").output().ok()?;
    let path = PathBuf::from(String::from_utf8(answer.stdout).ok()?.trim());
    // It repeats the bare name of what it does not find.
    path.is_absolute().then_some(path)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::{Arch, aim, cargo, rustc};

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
            let mut command = cargo("build", arch, &["-Cprofile-use=a folder/x"]).unwrap();
            let args: Vec<_> = command.get_args().map(|arg| arg.to_str().unwrap()).collect();
            let target = arch.target();
            assert_eq!(args[..4], ["build", "--target", &target, "--config"]);
            let flags = args[4]
                .strip_prefix(&format!("target.{target}.rustflags="))
                .unwrap();
            let flags: Vec<String> = serde_json::from_str(flags).unwrap();
            assert_eq!(flags.first().unwrap(), "-Ctarget-feature=+crt-static");
            assert_eq!(flags.last().unwrap(), "-Cprofile-use=a folder/x");
            aim(&mut command, arch).unwrap();
            let linker = format!(
                "CARGO_TARGET_{}_UNKNOWN_LINUX_GNU_LINKER",
                arch.rust_name().to_uppercase()
            );
            let set = command.get_envs().find(|(name, _)| *name == linker.as_str());
            assert_eq!(
                set.and_then(|(_, value)| value),
                Some(arch.gnu_tool("gcc").as_ref())
            );
        }
    }
}
