//! The tarball of a release: what is in it, and how it is written and checked.
//!
//! Invariant: its bytes depend on names, contents and time of the entries alone.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap_complete::Shell;
use flate2::read::GzDecoder;
use flate2::{Compression, GzBuilder};
use tar::{Archive, Builder, EntryType, Header};

use crate::agent_args;
use crate::shell;

/// What names of tarballs end with.
pub(super) const SUFFIX: &str = ".tar.gz";

/// What is taken from the sources as it is. (The Dockerfile builds from sources, so it stays with them.)
const FROM_SOURCES: [&str; 8] = [
    "LICENSE",
    "README.md",
    "deploy/agent.yaml",
    "deploy/kubernetes.yaml",
    "deploy/mesh-agent.service",
    "deploy/shop/pods.yaml",
    "deploy/shop/policies.yaml",
    "deploy/shop/services.yaml",
];

/// Named as each shell looks for them.
const COMPLETIONS: [(&str, Shell); 3] = [
    ("completions/mesh-agent.bash", Shell::Bash),
    ("completions/_mesh-agent", Shell::Zsh),
    ("completions/mesh-agent.fish", Shell::Fish),
];

/// What is made for each release.
const MADE: [&str; 2] = ["THIRD-PARTY-LICENSES", "mesh-agent"];

/// A file of the tarball.
#[derive(Debug)]
pub(super) struct Entry {
    name: String,
    mode: u32,
    content: Vec<u8>,
}

impl Entry {
    pub(super) fn new(name: &str, mode: u32, content: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            mode,
            content,
        }
    }
}

/// All that is the same for every architecture.
pub(super) fn belongings(workspace: &Path) -> Result<Vec<Entry>> {
    let sources = FROM_SOURCES.into_iter().map(|name| {
        let content = fs::read(workspace.join(name)).with_context(|| format!("cannot read {name}"))?;
        Ok(Entry::new(name, 0o644, content))
    });
    let completions = COMPLETIONS
        .into_iter()
        .map(|(name, shell)| Ok(Entry::new(name, 0o644, agent_args::completions(shell))));
    sources.chain(completions).collect()
}

/// Writes the tarball; everything in it lies in `folder`.
pub(super) fn write(path: &Path, folder: &str, mut entries: Vec<Entry>, time: u64) -> Result<()> {
    entries.sort_by(|one, other| one.name.cmp(&other.name));
    // Not at `path`: who interrupts us shall find no half of a release.
    let unfinished = path.with_extension("unfinished");
    let file = File::create(&unfinished).with_context(|| format!("cannot write {}", unfinished.display()))?;
    // Without a time and a system of its own in the header.
    let gzip = GzBuilder::new().write(file, Compression::best());
    let mut tarball = Builder::new(gzip);
    for entry in &entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(entry.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(time);
        header.set_size(entry.content.len() as u64);
        tarball.append_data(&mut header, format!("{folder}/{}", entry.name), &*entry.content)?;
    }
    tarball.into_inner()?.finish()?.sync_all()?;
    Ok(fs::rename(unfinished, path)?)
}

/// The time that its entries have.
pub(super) fn time(path: &Path) -> Result<u64> {
    let mut tarball = Archive::new(GzDecoder::new(File::open(path)?));
    let first = tarball.entries()?.next().context("it is empty")??;
    Ok(first.header().mtime()?)
}

/// Unpacks a tarball as users do, and compares what comes out with what should be in.
pub(super) fn check(path: &Path, folder: &str) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    shell::run(
        Command::new("tar")
            .arg("-xzf")
            .arg(path)
            .arg("-C")
            .arg(scratch.path()),
    )?;
    let found = shell::output(
        Command::new("find")
            .current_dir(scratch.path())
            .args([".", "-type", "f", "-printf", "%P\n"]),
    )?;
    let mut found: Vec<_> = found.lines().map(str::to_owned).collect();
    found.sort();
    let expected: Vec<_> = names()
        .into_iter()
        .map(|name| format!("{folder}/{name}"))
        .collect();
    if found != expected {
        bail!("{} should have {expected:?}, and has {found:?}", path.display());
    }
    Ok(())
}

/// What is in every tarball, sorted.
pub(super) fn names() -> Vec<&'static str> {
    let mut names: Vec<_> = FROM_SOURCES
        .into_iter()
        .chain(COMPLETIONS.map(|(name, _)| name))
        .chain(MADE)
        .collect();
    names.sort_unstable();
    names
}
