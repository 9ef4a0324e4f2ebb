//! Compiles the kernel side into `OUT_DIR/mesh-ebpf`, which the agent embeds.
//!
//! Without an eBPF compiler that file is empty, so that the workspace still builds; an agent built so refuses
//! to capture. Check and clippy runs compile it too: they share `OUT_DIR` with real builds, where a stub left
//! behind would be embedded, and an unchanged object costs nothing.

#[path = "../xtask/src/ebpf_toolchain.rs"]
#[expect(dead_code, reason = "what only xtask needs")]
mod ebpf_toolchain;

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use ebpf_toolchain::{Run, TARGET, Toolchain};

/// What decides how the object looks, besides the compiler.
const SOURCES: [&str; 8] = [
    "Cargo.lock",
    "Cargo.toml",
    "mesh-common/Cargo.toml",
    "mesh-common/src",
    "mesh-ebpf/Cargo.toml",
    "mesh-ebpf/src",
    "mesh-agent/build.rs",
    "xtask/src/ebpf_toolchain.rs",
];

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?);
    let workspace = manifest.parent().ok_or("mesh-agent lies outside a workspace")?;
    for path in SOURCES
        .iter()
        .map(|path| workspace.join(path))
        .chain(ebpf_toolchain::watched())
    {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    println!("cargo::rerun-if-env-changed=HOME");
    let object = out.join("mesh-ebpf");
    match Toolchain::locate() {
        Ok(toolchain) => compile(&toolchain, workspace, &out.join("ebpf-target"), &object),
        Err(missing) => {
            println!("cargo::warning=this agent will not be able to capture traffic: {missing}");
            Ok(fs::write(object, [])?)
        }
    }
}

fn compile(
    toolchain: &Toolchain,
    workspace: &Path,
    target_dir: &Path,
    object: &Path,
) -> Result<(), Box<dyn Error>> {
    let built = toolchain
        .command(Run::Build, workspace, target_dir)
        .arg("--quiet")
        .output()?;
    let said = String::from_utf8_lossy(&built.stderr);
    if !built.status.success() {
        // A failed build script's stderr is shown as it is.
        eprintln!("{said}");
        println!("cargo::error=mesh-ebpf does not compile for {TARGET}: see the compiler's messages below");
        return Err(format!("the eBPF build ended with {}", built.status).into());
    }
    for line in said.lines() {
        println!("cargo::warning={line}");
    }
    // Replaced, not overwritten: cargo may have hard-linked it elsewhere.
    fs::copy(
        target_dir.join(TARGET).join("release/mesh-ebpf"),
        object.with_extension("new"),
    )?;
    Ok(fs::rename(object.with_extension("new"), object)?)
}
