//! Files as the compiler sees them: their entries, and what of an older version stays in force.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use serde_json::value::RawValue;

use super::check::Issue;
use super::document::{self, RawDocument};
use super::resource::{self, Document, Entry};
use crate::model::Severity;

/// Where documents come from. Its order is the order of precedence between documents of the same name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// The place of the file's entry in `resources.files`.
    pub order: usize,
    pub file: Arc<str>,
}

/// One document's place: its file, and its index among the file's entries.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct At {
    pub(super) origin: Origin,
    pub(super) index: usize,
}

/// The documents of one file, each checked on its own.
#[derive(Clone, Debug, Default)]
pub struct File {
    entries: Vec<Entry>,
}

impl File {
    pub fn parse(name: &Path, text: &str) -> Self {
        let json = name.extension().is_some_and(|extension| extension == "json");
        Self {
            entries: document::read(text, json)
                .into_iter()
                .map(resource::parse)
                .collect(),
        }
    }

    /// Documents that were good once, as [`File::good`] gave them.
    pub fn restore(documents: impl IntoIterator<Item = (usize, Value)>) -> Self {
        let entries = documents.into_iter().map(|(number, value)| {
            resource::parse(RawDocument {
                number,
                prefix: String::new(),
                value: Ok(value),
            })
        });
        Self {
            entries: entries.collect(),
        }
    }

    /// A file that cannot be read at all.
    pub fn unreadable(message: impl Into<String>) -> Self {
        Self {
            entries: vec![Entry {
                number: 1,
                prefix: String::new(),
                label: String::from("file"),
                key: None,
                document: None,
                issues: vec![Issue::error("", message)],
            }],
        }
    }

    /// The number and text of each document that is in force or could be.
    pub fn good(&self) -> impl Iterator<Item = (usize, &RawValue)> {
        self.entries
            .iter()
            .filter_map(|entry| Some((entry.number, &*entry.document.as_ref()?.json)))
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(super) fn documents(&self, origin: &Origin) -> impl Iterator<Item = (At, &Arc<Document>)> {
        self.entries.iter().enumerate().filter_map(|(index, entry)| {
            let at = At {
                origin: origin.clone(),
                index,
            };
            Some((at, entry.document.as_ref()?))
        })
    }

    /// This version of a file after `previous`: documents with the same text stay the same object, and a document
    /// that is bad now stays in force as it was.
    ///
    /// Where a broken document cannot even be named, it may be any that is missing: all of these stay.
    pub fn after(mut self, previous: &Self) -> Self {
        let old = |key: &_| {
            let same = |entry: &&Entry| {
                entry
                    .document
                    .as_ref()
                    .is_some_and(|document| document.key == *key)
            };
            previous.entries.iter().find(same)
        };
        for entry in &mut self.entries {
            let Some(old) = entry
                .key
                .as_ref()
                .and_then(old)
                .and_then(|old| old.document.as_ref())
            else {
                continue;
            };
            match &mut entry.document {
                Some(new) if new.json.get() == old.json.get() => *new = Arc::clone(old),
                Some(_) => {}
                None => {
                    entry.document = Some(Arc::clone(old));
                    entry.keep_note();
                }
            }
        }
        let Some(broken) = self.entries.iter().position(Entry::is_unknown) else {
            return self;
        };
        let named: BTreeSet<_> = self
            .entries
            .iter()
            .filter_map(|entry| entry.key.clone())
            .collect();
        let kept = previous
            .entries
            .iter()
            .filter(|entry| {
                entry.key.as_ref().is_some_and(|key| !named.contains(key)) && entry.document.is_some()
            })
            .map(|entry| Entry {
                issues: Vec::new(),
                ..entry.clone()
            });
        let kept: Vec<_> = kept.collect();
        if !kept.is_empty() {
            self.entries[broken].keep_note();
            self.entries.extend(kept);
        }
        self
    }
}

impl Entry {
    /// Broken so that not even its name can be read.
    fn is_unknown(&self) -> bool {
        self.key.is_none() && self.issues.iter().any(|issue| issue.severity == Severity::Error)
    }

    fn keep_note(&mut self) {
        if let Some(issue) = self
            .issues
            .iter_mut()
            .find(|issue| issue.severity == Severity::Error)
        {
            issue.message.push_str("; the last good version stays in force");
        }
    }
}
