//! What is wrong where: the findings of all documents, kept per document so that a change touches few.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::check::Issue;
use super::file::{At, Origin};
use super::index::{Change, Index};
use super::resource::{Entry, ResourceKey};
use crate::model::Rejected;

/// Findings in a snapshot. With more than this nobody reads on; the last says how many there are.
const MAX_REJECTED: usize = 1_000;

#[derive(Debug, Default)]
pub(super) struct Report {
    /// What the compiler found about resources whose document is good by itself.
    notes: BTreeMap<ResourceKey, Vec<Issue>>,
    /// Resources whose notes changed since the last report.
    changed: BTreeSet<ResourceKey>,
    /// Findings by document; documents without any are not here.
    by_document: BTreeMap<At, Vec<Rejected>>,
}

impl Report {
    /// Replaces what the compiler found about a resource.
    pub(super) fn note(&mut self, key: &ResourceKey, issues: Vec<Issue>) {
        let old = match issues.is_empty() {
            true => self.notes.remove(key).unwrap_or_default(),
            false => self.notes.insert(key.clone(), issues.clone()).unwrap_or_default(),
        };
        if old != issues {
            self.changed.insert(key.clone());
        }
    }

    /// Brings the findings up to date: those of the files that came, and of resources with other news.
    pub(super) fn compile(
        &mut self,
        index: &Index,
        origins: &[Origin],
        changes: &[Change],
    ) -> Arc<[Rejected]> {
        for origin in origins {
            let first = |index| At {
                origin: origin.clone(),
                index,
            };
            let stale: Vec<_> = self
                .by_document
                .range(first(0)..=first(usize::MAX))
                .map(|(at, _)| at.clone())
                .collect();
            for at in stale {
                self.by_document.remove(&at);
            }
            let entries = index.files().get(origin).map_or(0, |file| file.entries().len());
            for at in (0..entries).map(first) {
                self.document(index, at);
            }
        }
        let mut keys = std::mem::take(&mut self.changed);
        keys.extend(changes.iter().map(|change| change.key.clone()));
        for key in &keys {
            for at in index.candidates(key) {
                self.document(index, at.clone());
            }
        }
        self.flat()
    }

    fn document(&mut self, index: &Index, at: At) {
        let Some(entry) = index
            .files()
            .get(&at.origin)
            .and_then(|file| file.entries().get(at.index))
        else {
            return;
        };
        let mut issues = entry.issues.clone();
        if let Some(document) = &entry.document {
            match index.in_force(&document.key) {
                Some((first, _)) if first != at => issues.push(Issue::error(
                    "metadata.name",
                    format!(
                        "{} is there already ({}); this one is not used",
                        document.key,
                        index.place(&first)
                    ),
                )),
                _ => issues.extend(self.notes.get(&document.key).into_iter().flatten().cloned()),
            }
        }
        let rejected: Vec<_> = issues
            .into_iter()
            .map(|issue| rejected(&at, entry, issue))
            .collect();
        match rejected.is_empty() {
            true => self.by_document.remove(&at),
            false => self.by_document.insert(at, rejected),
        };
    }

    fn flat(&self) -> Arc<[Rejected]> {
        let total: usize = self.by_document.values().map(Vec::len).sum();
        let mut all: Vec<_> = self
            .by_document
            .values()
            .flatten()
            .take(MAX_REJECTED)
            .cloned()
            .collect();
        if let Some(last) = all.last_mut().filter(|_| total > MAX_REJECTED) {
            last.message = format!(
                "{} ({} more findings are not listed)",
                last.message,
                total - MAX_REJECTED
            )
            .into();
        }
        all.into()
    }
}

fn rejected(at: &At, entry: &Entry, issue: Issue) -> Rejected {
    let path = match issue.path.is_empty() {
        true => entry.prefix.trim_end_matches('.').to_owned(),
        false => format!("{}{}", entry.prefix, issue.path),
    };
    Rejected {
        severity: issue.severity,
        file: Arc::clone(&at.origin.file),
        document: entry.number,
        resource: printable(&entry.label()).into(),
        path: printable(&path).into(),
        message: printable(&issue.message).into(),
    }
}

/// Findings quote documents, and go to logs and terminals: no control characters, and no novels.
fn printable(text: &str) -> String {
    const MAX_CHARACTERS: usize = 600;
    let mut printable = String::with_capacity(text.len().min(MAX_CHARACTERS));
    for character in text.chars().take(MAX_CHARACTERS) {
        match character.is_control() {
            true => printable.extend(character.escape_default()),
            false => printable.push(character),
        }
    }
    if text.chars().nth(MAX_CHARACTERS).is_some() {
        printable.push('…');
    }
    printable
}
