//! The checksums of a release, in the form that `sha256sum --check` reads.
//!
//! Invariant: what is listed together was packed from the same commit, as far as the times in the tarballs tell.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::tarball;
use crate::shell;

pub(super) const FILE: &str = "SHA256SUMS";

/// Writes the sums of `files`, whose entries have this time, and keeps those of other files of the same time that still
/// lie in the folder: each architecture may be packed by a run of its own.
pub(super) fn write(folder: &Path, files: &[String], time: u64) -> Result<()> {
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
    sums.retain(|file, _| {
        let is_new = files.iter().any(|new| new == file);
        let is_there = folder.join(file).is_file();
        let belongs = is_new || (is_there && packed_at(folder, file) == Some(time));
        if is_there && !belongs {
            eprintln!(
                "warning: {file} is of another commit, so {FILE} does not list it any more: pack it again"
            );
        }
        belongs
    });
    let text: String = sums
        .iter()
        .map(|(file, sum)| format!("{sum}  {file}\n"))
        .collect();
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The time that a file of a release was packed with: that of the tarball, also for the file beside it.
fn packed_at(folder: &Path, file: &str) -> Option<u64> {
    let name = file
        .strip_suffix(tarball::SUFFIX)
        .or_else(|| file.strip_suffix(super::DEBUG_SUFFIX))
        .or_else(|| file.strip_suffix(super::PROFILE_SUFFIX))?;
    tarball::time(&folder.join(format!("{name}{}", tarball::SUFFIX))).ok()
}

/// Checks all files as users do.
pub(super) fn check(folder: &Path) -> Result<()> {
    let mut check = Command::new("sha256sum");
    check
        .current_dir(folder)
        .args(["--check", "--strict", "--quiet", FILE]);
    shell::run(&mut check)
}
