//! `cargo xtask setup`: finds what building and testing need, and installs what is missing.
//!
//! Debian packages come from apt, which needs root; two Rust programs that no package brings are compiled into
//! our own tools folder. Nothing is removed or upgraded, and no service that a package brings is started.

mod apt;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cross::{self, Arch};
use crate::ebpf_toolchain;
use crate::shell;

/// The last one that goes with aya 0.14; it must have the LLVM that the eBPF compiler has, or a newer one.
const BPF_LINKER: &str = "0.13.0";
pub(crate) const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
const CARGO_DENY: &str = "0.20.2";

/// Debian's compiler for the bpf target: rustc with LLVM 22, and a precompiled `core`.
const COMPILER_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];
/// What compiling bpf-linker needs.
const LINKER_PACKAGES: [&str; 2] = ["llvm-22-dev", "libpolly-22-dev"];

/// The peers of the tests and the demo: a program or file that must be there, and the package that brings it.
const PEERS: [(&str, &str); 11] = [
    (
        "/usr/lib/python3/dist-packages/grpc/__init__.py",
        "python3-grpcio",
    ),
    ("curl", "curl"),
    ("dig", "bind9-dnsutils"),
    ("h2load", "nghttp2-client"),
    ("ip", "iproute2"),
    ("nginx", "nginx-light"),
    ("openssl", "openssl"),
    ("perf", "linux-perf"),
    ("ping", "iputils-ping"),
    ("tcpdump", "tcpdump"),
    // It tells valgrind what to do, and is in one package with it.
    ("vgdb", "valgrind"),
];

/// What the bench runs beside them.
const BENCH: [(&str, &str); 3] = [("haproxy", "haproxy"), ("iperf3", "iperf3"), ("nft", "nftables")];

/// What boots other kernels with a root file system of ours.
const KERNELS: [(&str, &str); 4] = [
    ("cpio", "cpio"),
    ("qemu-system-aarch64", "qemu-system-arm"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("xz", "xz-utils"),
];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only report what is there and what is missing; fails if something is.
    #[arg(long)]
    check: bool,
}

/// What a command needs from the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// The eBPF compiler and linker, and the C library that goes into programs.
    Build,
    /// Clippy for the eBPF compiler, and cargo-deny.
    Lint,
    /// Servers, clients and tools that tests and the demo run.
    Peers,
    /// Proxies to compare with, and a generator of bulk traffic.
    Bench,
    /// Compilers for an architecture that this machine is not.
    Cross(Arch),
    /// QEMU, and what makes a root file system.
    Kernels,
}

/// What `cargo xtask setup` installs.
const ALWAYS: [Need; 4] = [Need::Build, Need::Lint, Need::Peers, Need::Bench];

/// What only the commands that need it install.
fn on_demand() -> impl Iterator<Item = Need> {
    Arch::ALL
        .into_iter()
        .filter(|arch| !arch.is_host())
        .map(Need::Cross)
        .chain([Need::Kernels])
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (mut found, plan) = examine(&ALWAYS);
    let (more, later) = examine(&on_demand().collect::<Vec<_>>());
    found.extend(more);
    for (what, place) in &found {
        eprintln!("    {what:<28} {}", place.display());
    }
    if !later.is_empty() {
        eprintln!("left to the commands that need it:\n{later}");
    }
    if plan.is_empty() {
        eprintln!("==> setup: everything is there");
        return Ok(());
    }
    if args.check {
        bail!("missing:\n{plan}\n`cargo xtask setup` installs it");
    }
    ensure(&ALWAYS)
}

/// Installs what is missing of `needs`; says nothing if that is nothing.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let (_, plan) = examine(needs);
    if plan.is_empty() {
        return Ok(());
    }
    eprintln!("==> setup: will install\n{plan}");
    apt::install(&plan.packages)?;
    for tool in &plan.tools {
        eprintln!(
            "==> setup: compile {} {} (a few minutes, once)",
            tool.name, tool.version
        );
        tool.install()?;
    }
    let (_, left) = examine(needs);
    if !left.is_empty() {
        bail!("still missing after the installation:\n{left}");
    }
    eprintln!("==> setup: everything is there");
    Ok(())
}

/// What is to be installed, in this order.
#[derive(Debug, Default)]
struct Plan {
    packages: Vec<&'static str>,
    tools: Vec<Tool>,
}

impl Plan {
    fn is_empty(&self) -> bool {
        self.packages.is_empty() && self.tools.is_empty()
    }

    fn add(&mut self, packages: &[&'static str]) {
        for package in packages {
            if !self.packages.contains(package) && !apt::is_installed(package) {
                self.packages.push(package);
            }
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = Vec::new();
        if !self.packages.is_empty() {
            lines.push(format!("    Debian packages: {}", self.packages.join(" ")));
        }
        for tool in &self.tools {
            let root = ebpf_toolchain::tools_dir();
            lines.push(format!(
                "    {} {} (cargo install, into {})",
                tool.name,
                tool.version,
                root.display()
            ));
        }
        write!(out, "{}", lines.join("\n"))
    }
}

/// A program that `cargo install` brings.
#[derive(Debug)]
struct Tool {
    name: &'static str,
    version: &'static str,
    options: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
}

const BPF_LINKER_TOOL: Tool = Tool {
    name: "bpf-linker",
    version: BPF_LINKER,
    options: &["--no-default-features", "--features", "llvm-22"],
    environment: &[("LLVM_PREFIX", LLVM_PREFIX)],
};

/// Checks a few hundred crates once per lint: half the time to compile matters more than its speed.
const CARGO_DENY_TOOL: Tool = Tool {
    name: "cargo-deny",
    version: CARGO_DENY,
    options: &["--debug"],
    environment: &[("CARGO_PROFILE_DEV_DEBUG", "false")],
};

impl Tool {
    fn install(&self) -> Result<()> {
        let root = ebpf_toolchain::tools_dir();
        // Not the workspace's target folder, which would keep gigabytes that are of no more use.
        let scratch = root.join("build");
        let mut cargo = shell::cargo("install");
        cargo
            .args([self.name, "--version", self.version, "--locked"])
            .args(self.options)
            .arg("--root")
            .arg(&root)
            .arg("--target-dir")
            .arg(&scratch)
            .envs(self.environment.iter().copied());
        shell::run(&mut cargo)?;
        fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))
    }

    fn find(&self) -> Option<PathBuf> {
        let ours = ebpf_toolchain::tools_dir().join("bin").join(self.name);
        if ours.is_file() {
            Some(ours)
        } else {
            shell::program(self.name)
        }
    }
}

/// Where cargo-deny is, once setup has run.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    CARGO_DENY_TOOL
        .find()
        .context("no cargo-deny: run `cargo xtask setup`")
}

type Found = Vec<(String, PathBuf)>;

/// Looks at the machine: what is there of `needs`, and what to install for the rest.
fn examine(needs: &[Need]) -> (Found, Plan) {
    let (mut found, mut plan) = (Found::new(), Plan::default());
    for need in needs {
        match need {
            Need::Build => examine_build(&mut found, &mut plan),
            Need::Lint => examine_lint(&mut found, &mut plan),
            Need::Peers => examine_programs(&PEERS, &mut found, &mut plan),
            Need::Bench => examine_programs(&BENCH, &mut found, &mut plan),
            Need::Kernels => examine_programs(&KERNELS, &mut found, &mut plan),
            Need::Cross(arch) => examine_cross(*arch, &mut found, &mut plan),
        }
    }
    (found, plan)
}

fn examine_build(found: &mut Found, plan: &mut Plan) {
    match ebpf_toolchain::compiler() {
        Some(compiler) => found.push(("eBPF compiler".to_owned(), compiler.rustc)),
        None => plan.add(&COMPILER_PACKAGES),
    }
    match cross::c_library(Path::new("cc")) {
        Some(library) => found.push(("C library".to_owned(), library)),
        None => plan.add(&["libc6-dev"]),
    }
    // One that lost its LLVM library is to be made anew.
    let runs = |linker: &PathBuf| {
        Command::new(linker)
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success())
    };
    match ebpf_toolchain::linker().filter(runs) {
        Some(linker) => found.push(("eBPF linker".to_owned(), linker)),
        None => {
            plan.add(&LINKER_PACKAGES);
            plan.tools.push(BPF_LINKER_TOOL);
        }
    }
}

fn examine_lint(found: &mut Found, plan: &mut Plan) {
    match ebpf_toolchain::compiler()
        .map(|compiler| compiler.cargo_clippy())
        .filter(|clippy| clippy.is_file())
    {
        Some(clippy) => found.push(("clippy of the eBPF compiler".to_owned(), clippy)),
        None => plan.add(&["rust-web-clippy"]),
    }
    match CARGO_DENY_TOOL.find() {
        Some(place) => found.push(("cargo-deny".to_owned(), place)),
        None => plan.tools.push(CARGO_DENY_TOOL),
    }
}

fn examine_cross(arch: Arch, found: &mut Found, plan: &mut Plan) {
    let [gcc, library, rust] = match arch {
        Arch::X86_64 => [
            "gcc-x86-64-linux-gnu",
            "libc6-dev-amd64-cross",
            "libstd-rust-web-dev:amd64",
        ],
        Arch::Arm64 => [
            "gcc-aarch64-linux-gnu",
            "libc6-dev-arm64-cross",
            "libstd-rust-web-dev:arm64",
        ],
    };
    let (compiler, libc) = cross::c_compiler(arch);
    let parts = [("C compiler", compiler, gcc), ("C library", libc, library)];
    for (what, place, package) in parts {
        match place {
            Some(place) => found.push((format!("{what} for {arch}"), place)),
            None => plan.add(&[package]),
        }
    }
    match cross::rustc(arch) {
        Some(rustc) => found.push((format!("Rust compiler for {arch}"), rustc)),
        None => plan.add(&["rustc-web", rust]),
    }
}

fn examine_programs(programs: &[(&'static str, &'static str)], found: &mut Found, plan: &mut Plan) {
    for &(name, package) in programs {
        match shell::program(name) {
            // A library is known by its package.
            Some(place) if name.starts_with('/') => found.push((package.to_owned(), place)),
            Some(place) => found.push((name.to_owned(), place)),
            None => plan.add(&[package]),
        }
    }
}
