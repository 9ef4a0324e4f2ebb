//! `cargo xtask build-ebpf`: builds the agent, and makes sure that the eBPF object is inside.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind};
use serde_json::Value;

use crate::cross::{self, Arch};
use crate::setup::{self, Need};
use crate::shell::{self, Steps};

/// A release build of the agent that can capture.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) agent: PathBuf,
    /// The object that the agent embeds.
    pub(crate) object: PathBuf,
    /// All programs that were built, the agent too, by name.
    programs: BTreeMap<String, PathBuf>,
}

impl Built {
    pub(crate) fn program(&self, name: &str) -> Result<&Path> {
        let path = self.programs.get(name);
        path.map(PathBuf::as_path)
            .with_context(|| format!("cargo names no executable of {name}"))
    }
}

pub(crate) fn run() -> Result<()> {
    setup::ensure(&[Need::Build])?;
    let built = build(&mut Steps::default(), &[])?;
    describe(&built.object)?;
    eprintln!("embedded in {}", built.agent.display());
    Ok(())
}

/// Builds the agent; an error if the object is missing inside.
///
/// Other packages that are wanted come with it: cargo builds what they share once instead of twice.
pub(crate) fn build(steps: &mut Steps, also: &[&str]) -> Result<Built> {
    build_with(
        steps,
        "build the agent",
        cross::cargo("build", Arch::host()?, &[])?,
        also,
    )
}

/// As [`build`], by a cargo that may be set up for another target.
pub(crate) fn build_with(steps: &mut Steps, title: &str, mut cargo: Command, also: &[&str]) -> Result<Built> {
    let built = steps.run(title, || {
        if also.is_empty() {
            // Cargo gives crates the features that any of the packages wants: so the agent that is released is,
            // to the byte, the one that the tests run (a trained one is tested with `test --trained`).
            cargo.args(["--package", "mesh-tests", "--bin", "mesh-agent"]);
        }
        cargo.args(also.iter().flat_map(|package| ["--package", package]));
        cargo
            .args(["--release", "--package", "mesh-agent"])
            .args(MESSAGES);
        find_outputs(&shell::output(&mut cargo)?)
    })?;
    let size = built
        .object
        .metadata()
        .with_context(|| format!("no {}", built.object.display()))?
        .len();
    if size == 0 {
        bail!("the agent was built without its eBPF object: see the warning of the build");
    }
    Ok(built)
}

/// Builds test programs of mesh-tests too.
///
/// Not in one go with the agent: its own tests' features would become those of both, so that the tests would run
/// another agent than users.
pub(crate) fn add_tests(
    steps: &mut Steps,
    title: &str,
    mut cargo: Command,
    tests: &[&str],
    built: &mut Built,
) -> Result<()> {
    cargo
        .args(["--release", "--package", "mesh-tests"])
        .args(MESSAGES);
    cargo.args(tests.iter().flat_map(|test| ["--test", test]));
    let messages = steps.run(title, || shell::output(&mut cargo))?;
    for message in parse(&messages) {
        built.programs.extend(program(&message?));
    }
    Ok(())
}

const MESSAGES: [&str; 2] = ["--message-format", "json-render-diagnostics"];

fn parse(messages: &str) -> impl Iterator<Item = Result<Value>> {
    messages
        .lines()
        .map(|line| serde_json::from_str(line).context("cargo's messages are not JSON"))
}

/// The program that a message tells of: its name and where it is.
fn program(message: &Value) -> Option<(String, PathBuf)> {
    let (name, file) = (
        message["target"]["name"].as_str()?,
        message["executable"].as_str()?,
    );
    Some((name.to_owned(), PathBuf::from(file)))
}

/// Cargo tells in its messages where it put things; guessing from the target folder could find an old build.
fn find_outputs(messages: &str) -> Result<Built> {
    let (mut programs, mut object) = (BTreeMap::new(), None);
    for message in parse(messages) {
        let message = message?;
        let package = message["package_id"].as_str().unwrap_or_default();
        if let Some(out) = message["out_dir"].as_str()
            && package.contains("/mesh-agent#")
        {
            object = Some(Path::new(out).join("mesh-ebpf"));
        }
        programs.extend(program(&message));
    }
    Ok(Built {
        agent: programs
            .get("mesh-agent")
            .cloned()
            .context("cargo names no executable of mesh-agent")?,
        object: object.context("cargo names no build script of mesh-agent")?,
        programs,
    })
}

/// Prints programs, maps and sizes.
fn describe(path: &Path) -> Result<()> {
    let bytes = std::fs::read(path)?;
    let file = object::File::parse(&*bytes).with_context(|| format!("{} is no ELF file", path.display()))?;
    let mut programs = BTreeMap::new();
    let mut maps = BTreeMap::new();
    for symbol in file.symbols() {
        let Some(section) = symbol
            .section_index()
            .and_then(|index| file.section_by_index(index).ok())
        else {
            continue;
        };
        let (name, section_name) = (symbol.name()?, section.name()?);
        // `.text` has what programs call; each program has a section of its own.
        let program = section.kind() == SectionKind::Text && section_name != ".text";
        if program && symbol.kind() == SymbolKind::Text && symbol.is_global() {
            programs.insert(name.to_owned(), (section_name.to_owned(), symbol.size()));
        } else if (section_name == "maps" || section_name == ".maps") && symbol.kind() == SymbolKind::Data {
            maps.insert(name.to_owned(), symbol.size());
        }
    }
    eprintln!("programs:");
    for (name, (section, size)) in &programs {
        // One eBPF instruction is 8 bytes.
        eprintln!("  {name:<32} {section:<24} {:>6} instructions", size / 8);
    }
    eprintln!("maps:");
    for name in maps.keys() {
        eprintln!("  {name}");
    }
    eprintln!(
        "object: {} programs, {} maps, {} bytes",
        programs.len(),
        maps.len(),
        bytes.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::find_outputs;

    #[test]
    fn outputs_are_those_that_cargo_names() {
        let messages = [
            r#"{"reason":"build-script-executed","package_id":"path+file:///x/other#0.1.0","out_dir":"/no"}"#,
            r#"{"reason":"build-script-executed","package_id":"path+file:///x/mesh-agent#0.1.0","out_dir":"/o"}"#,
            r#"{"reason":"compiler-artifact","target":{"name":"mesh_agent"},"executable":null}"#,
            r#"{"reason":"compiler-artifact","target":{"name":"mesh-agent"},"executable":"/b/a"}"#,
            r#"{"reason":"compiler-artifact","target":{"name":"kernel"},"executable":"/b/deps/kernel-1"}"#,
        ];
        let built = find_outputs(&messages.join("\n")).unwrap();
        assert_eq!(built.object.to_str(), Some("/o/mesh-ebpf"));
        assert_eq!(built.agent.to_str(), Some("/b/a"));
        assert_eq!(
            built.program("kernel").unwrap().to_str(),
            Some("/b/deps/kernel-1")
        );
        assert!(built.program("mesh_agent").is_err());
        assert!(find_outputs("").is_err());
    }
}
