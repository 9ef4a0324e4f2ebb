//! Files checked as the agent would: every finding, without an agent.

use std::path::{Path, PathBuf};

use super::read::{Listed, list, read_text};
use super::{Compiler, File, Origin, Settings, Vips};
use crate::model::{Rejected, Severity};

/// What checking files found.
#[derive(Debug)]
pub struct Checked {
    pub files: usize,
    pub documents: usize,
    /// In the order of the files.
    pub findings: Vec<Rejected>,
}

impl Checked {
    pub fn count(&self, severity: Severity) -> usize {
        let of = |finding: &&Rejected| finding.severity == severity;
        self.findings.iter().filter(of).count()
    }
}

/// Checks files and folders, each document by itself and all of them together.
pub fn validate(paths: &[PathBuf], settings: Settings) -> Checked {
    let mut checked = Vec::new();
    for (order, path) in paths.iter().enumerate() {
        let mut add = |path: &Path, file: File| {
            let origin = Origin {
                order,
                file: path.to_string_lossy().into(),
            };
            checked.push((origin, Some(file)));
        };
        match list(path) {
            Ok(Listed::File) => add(path, read(path)),
            Ok(Listed::Folder { files, .. }) if files.is_empty() => {
                add(path, File::unreadable("has no *.yaml, *.yml or *.json file"));
            }
            Ok(Listed::Folder { files, .. }) => files.iter().for_each(|path| add(path, read(path))),
            Err(error) => add(path, File::unreadable(format!("cannot be read: {error}"))),
        }
    }
    let mut compiler = Compiler::new(settings, Vips::default());
    let counts = (
        checked.len(),
        checked.iter().flat_map(|(_, file)| file).map(File::len).sum(),
    );
    let findings = compiler.update(checked).rejected.to_vec();
    Checked {
        files: counts.0,
        documents: counts.1,
        findings,
    }
}

fn read(path: &Path) -> File {
    match read_text(path) {
        Ok(text) => File::parse(path, &text),
        Err(message) => File::unreadable(message),
    }
}
