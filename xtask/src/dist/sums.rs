//! The checksums of a release, in the form that `sha256sum --check` reads.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell;

pub(super) const FILE: &str = "SHA256SUMS";

/// Writes the sums of `files`, and keeps those of other files that still lie in the folder: each architecture may
/// be packed by a run of its own.
pub(super) fn write(folder: &Path, files: &[String]) -> Result<()> {
    let path = folder.join(FILE);
    let before = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let made = shell::output(Command::new("sha256sum").current_dir(folder).args(files))?;
    let mut sums = BTreeMap::new();
    for line in before.lines().chain(made.lines()) {
        let Some((sum, file)) = line.split_once("  ") else {
            bail!("{} has a line that is no checksum: `{line}`", path.display());
        };
        sums.insert(file, sum);
    }
    sums.retain(|file, _| folder.join(file).is_file());
    let text: String = sums
        .iter()
        .map(|(file, sum)| format!("{sum}  {file}\n"))
        .collect();
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Checks all files as users do.
pub(super) fn check(folder: &Path) -> Result<()> {
    let mut check = Command::new("sha256sum");
    check
        .current_dir(folder)
        .args(["--check", "--strict", "--quiet", FILE]);
    shell::run(&mut check)
}
