//! Where the eBPF compiler and linker are, and how they are run.
//!
//! Two installations can compile the kernel side: Debian's rustc with its precompiled `core` for the bpf
//! target, or a rustup nightly with `rust-src`; either with bpf-linker. `mesh-agent/build.rs` and xtask both
//! include this file, so it may use nothing but `std`, and it never installs anything.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target that the kernel side is compiled for. (Every machine we support is little-endian.)
pub(crate) const TARGET: &str = "bpfel-unknown-none";

/// Debian's compiler. Always this path: a rustup proxy earlier in `PATH` has no `core` for the target.
pub(crate) const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// What `aya-ebpf` calls the architecture whose kernel loads the object. That decides how it declares saved CPU
/// registers, which only tracing programs read, and C's `char`, and we have neither: the same for all, so that the
/// object is one file for all.
const KERNEL_ARCH: &str = "x86_64";

/// What a rustup nightly must contain for `-Z build-std`.
const CORE_SOURCE: &str = "lib/rustlib/src/rust/library/core/Cargo.toml";

/// Variables of ours (or of the cargo that runs us) that the inner cargo must keep; all others that steer
/// cargo or rustc were meant for the host's compiler and would break or silently change the kernel side.
const KEPT_VARIABLES: [&str; 8] = [
    "CARGO_HOME",
    "CARGO_HTTP_",
    "CARGO_MAKEFLAGS",
    "CARGO_NET_",
    "CARGO_REGISTR",
    "CARGO_SOURCE_",
    "RUST_BACKTRACE",
    "RUSTUP_HOME",
];

/// A compiler and a linker that can make the kernel side's object.
#[derive(Debug)]
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: PathBuf,
}

/// A rustc that has or can build `core` for the target.
#[derive(Debug)]
pub(crate) struct Compiler {
    pub(crate) rustc: PathBuf,
    core: Core,
}

/// Where the target's `core` library comes from.
#[derive(Debug)]
enum Core {
    Precompiled,
    /// Built by this cargo of the same nightly.
    FromSource {
        cargo: PathBuf,
    },
}

impl Toolchain {
    /// The best complete toolchain of this machine, or what is missing.
    pub(crate) fn locate() -> Result<Self, Missing> {
        match (compiler(), linker()) {
            (Some(compiler), Some(linker)) => Ok(Self { compiler, linker }),
            (compiler, linker) => Err(Missing {
                compiler: compiler.is_none(),
                linker: linker.is_none(),
            }),
        }
    }

    /// A cargo run for mesh-ebpf, complete but for options of the subcommand: `workspace` is the folder of
    /// the workspace, and `target_dir` must not be the one of a cargo that waits for us.
    pub(crate) fn command(&self, run: Run, workspace: &Path, target_dir: &Path) -> Command {
        let cargo = match &self.compiler.core {
            Core::Precompiled => env::var_os("CARGO").unwrap_or_else(|| "cargo".into()),
            Core::FromSource { cargo } => cargo.into(),
        };
        let mut command = match run {
            Run::Build => Command::new(&cargo),
            // It runs the cargo that CARGO names.
            Run::Clippy => Command::new(self.compiler.cargo_clippy()),
        };
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            // LD_LIBRARY_PATH points into the host toolchain when cargo or rustup starts us.
            let steers = text.starts_with("CARGO") || text.starts_with("RUST") || text == "LD_LIBRARY_PATH";
            if steers && !KEPT_VARIABLES.iter().any(|kept| text.starts_with(kept)) {
                command.env_remove(&name);
            }
        }
        command
            .arg(if run == Run::Build { "build" } else { "clippy" })
            .args([
                "--package",
                "mesh-ebpf",
                "--bins",
                "--release",
                "--target",
                TARGET,
            ])
            .arg("--target-dir")
            .arg(target_dir);
        match &self.compiler.core {
            // aya-ebpf needs one unstable feature, `asm_experimental_arch`.
            Core::Precompiled => command.env("RUSTC_BOOTSTRAP", "1"),
            Core::FromSource { .. } => command.args(["-Z", "build-std=core"]),
        };
        let flags = [
            format!("-Clinker={}", self.linker.display()),
            // BTF is made from the debug information.
            "-Clink-arg=--btf".to_owned(),
            "-Cdebuginfo=2".to_owned(),
            format!("--cfg=bpf_target_arch=\"{KERNEL_ARCH}\""),
        ];
        command
            .current_dir(workspace)
            .env("CARGO", cargo)
            .env("RUSTC", &self.compiler.rustc)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
        command
    }
}

impl Compiler {
    /// The clippy that belongs to the compiler, whether it is installed or not.
    pub(crate) fn cargo_clippy(&self) -> PathBuf {
        self.rustc.with_file_name("cargo-clippy")
    }
}

/// What is run for the kernel side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Run {
    Build,
    Clippy,
}

/// What a machine lacks to compile the kernel side.
#[derive(Debug)]
pub(crate) struct Missing {
    compiler: bool,
    linker: bool,
}

impl fmt::Display for Missing {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (self.compiler, self.linker) {
            (true, true) => "no Rust compiler for the bpf target and no bpf-linker",
            (true, false) => "no Rust compiler for the bpf target",
            _ => "no bpf-linker",
        };
        write!(
            out,
            "this machine has {what}; `cargo xtask build-ebpf` installs what is missing"
        )
    }
}

/// Where xtask installs tools that no package brings.
pub(crate) fn tools_dir() -> PathBuf {
    home().join(".cache/mesh-agent/tools")
}

/// Files whose change can change what [`Toolchain::locate`] finds: the tools themselves, and where one is
/// missing, files that change when it is installed. Nearly all exist: cargo takes a path that does not exist
/// for one that always changes, and would rebuild every time.
pub(crate) fn watched() -> Vec<PathBuf> {
    let (compiler, linker) = (compiler(), linker());
    let mut paths = Vec::new();
    match &compiler {
        Some(compiler) => paths.push(compiler.rustc.clone()),
        None => {
            let rustup = rustup_home();
            paths.extend([
                PathBuf::from("/var/lib/dpkg/status"),
                rustup.join("update-hashes"),
            ]);
            paths.extend(
                nightlies(&rustup)
                    .into_iter()
                    .map(|folder| folder.join("lib/rustlib/components")),
            );
            paths.retain(|path| path.exists());
        }
    }
    match linker {
        Some(linker) => paths.push(linker),
        // Missing, so looked for in every build. Only then, since whoever has the compiler wants the linker.
        None if compiler.is_some() => paths.push(tools_dir().join("bin/bpf-linker")),
        None => {}
    }
    paths
}

pub(crate) fn compiler() -> Option<Compiler> {
    let debian = PathBuf::from(DEBIAN_RUSTC);
    if has_core(&debian, TARGET) {
        return Some(Compiler {
            rustc: debian,
            core: Core::Precompiled,
        });
    }
    let nightly = nightlies(&rustup_home())
        .into_iter()
        .rfind(|folder| folder.join(CORE_SOURCE).exists())?;
    let core = Core::FromSource {
        cargo: nightly.join("bin/cargo"),
    };
    Some(Compiler {
        rustc: nightly.join("bin/rustc"),
        core,
    })
}

/// Whether a compiler brings the `core` library of a target.
pub(crate) fn has_core(rustc: &Path, target: &str) -> bool {
    let answer = Command::new(rustc)
        .args(["--print", "target-libdir", "--target", target])
        .env_remove("LD_LIBRARY_PATH")
        .output();
    let Ok(answer) = answer else { return false };
    let folder = String::from_utf8_lossy(&answer.stdout);
    let Ok(entries) = Path::new(folder.trim()).read_dir() else {
        return false;
    };
    answer.status.success()
        && entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libcore-") && name.ends_with(".rlib")
        })
}

/// The folders of all installed nightlies; the undated one, which `rustup update` moves, is last.
fn nightlies(rustup: &Path) -> Vec<PathBuf> {
    let Ok(entries) = rustup.join("toolchains").read_dir() else {
        return Vec::new();
    };
    let mut found: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("nightly-"))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// Ours before others: it was built with the LLVM that Debian's compiler has.
pub(crate) fn linker() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    std::iter::once(tools_dir().join("bin"))
        .chain(env::split_paths(&path))
        .chain([cargo_home().join("bin")])
        .map(|folder| folder.join("bpf-linker"))
        .find(|file| file.is_file())
}

fn home() -> PathBuf {
    env::home_dir().unwrap_or_default()
}

fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME").map_or_else(|| home().join(".cargo"), PathBuf::from)
}

fn rustup_home() -> PathBuf {
    env::var_os("RUSTUP_HOME").map_or_else(|| home().join(".rustup"), PathBuf::from)
}
