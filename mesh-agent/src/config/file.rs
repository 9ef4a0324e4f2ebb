//! Files as the compiler sees them: their entries, and what of an older version stays in force.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use serde_json::value::RawValue;

use super::check::Issue;
use super::document::{self, MAX_DOCUMENTS, RawDocument};
use super::resource::{self, Document, Entry};
use crate::model::Severity;

/// Where documents come from. Its order is the order of precedence between documents of the same name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// The place of the file's entry in `resources.files`.
    pub order: usize,
    pub file: Arc<str>,
}

/// One document's place: its file, and its index among the file's entries.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct At {
    pub(super) origin: Origin,
    pub(super) index: usize,
}

/// The documents of one file, each checked on its own.
#[derive(Clone, Debug, Default)]
pub struct File {
    entries: Vec<Entry>,
    /// The hash of each document's text, and how many entries it gave, in the order of the entries.
    texts: Vec<(u64, usize)>,
    hasher: RandomState,
}

/// A document to be written down.
#[derive(Debug)]
pub struct Text {
    pub number: usize,
    /// `Pod shop/reviews`
    pub name: String,
    /// `None`: it is as it was when the file was last written down.
    pub json: Option<Box<RawValue>>,
    /// Its place among the file's documents then: a name may be there twice.
    pub before: usize,
}

impl File {
    pub fn parse(name: &Path, text: &str) -> Self {
        Self::parse_after(name, text, &Self::default())
    }

    /// A new version of a file: what is written in it as before is not parsed again, what says the same stays the
    /// same object, and what is bad now stays in force as it was.
    pub fn parse_after(name: &Path, text: &str, previous: &Self) -> Self {
        let json = name.extension().is_some_and(|extension| extension == "json");
        let hasher = previous.hasher.clone();
        let known = previous.good_texts();
        let mut entries = Vec::new();
        let mut texts = Vec::new();
        for (number, chunk) in document::chunks(text, json) {
            let Some(room) = MAX_DOCUMENTS.checked_sub(entries.len()).filter(|room| *room > 0) else {
                entries.push(resource::parse(document::one_too_many(number)));
                break;
            };
            let (hash, before) = (hasher.hash_one(chunk.text), entries.len());
            match known.get(&hash).filter(|known| known.len() <= room) {
                Some(known) => entries.extend(known.iter().map(|entry| Entry {
                    number,
                    ..entry.clone()
                })),
                None => entries.extend(
                    document::read(number, &chunk, room)
                        .into_iter()
                        .map(resource::parse),
                ),
            }
            texts.push((hash, entries.len() - before));
        }
        entries.shrink_to_fit();
        let file = Self {
            entries,
            texts,
            hasher,
        };
        file.after(previous)
    }

    /// The entries of each text that can be taken as they are: an error may hide what is kept in force instead.
    fn good_texts(&self) -> HashMap<u64, &[Entry]> {
        let mut rest = &self.entries[..];
        let mut known = HashMap::new();
        for (hash, count) in &self.texts {
            let (entries, after) = rest.split_at(*count);
            rest = after;
            if !entries.iter().any(Entry::has_error) {
                known.insert(*hash, entries);
            }
        }
        known
    }

    /// Documents that were good once, as [`File::take_texts`] gave them.
    pub fn restore(documents: impl IntoIterator<Item = (usize, Value)>) -> Self {
        let entries = documents.into_iter().enumerate().map(|(place, (number, value))| {
            let entry = resource::parse(RawDocument {
                number,
                prefix: String::new(),
                value: Ok(value),
            });
            Entry {
                json: None,
                place,
                ..entry
            }
        });
        Self {
            entries: entries.collect(),
            ..Self::default()
        }
    }

    /// A file that cannot be read at all.
    pub fn unreadable(message: impl Into<String>) -> Self {
        let entry = Entry {
            number: 1,
            prefix: Box::default(),
            key: None,
            fragment: "file".into(),
            document: None,
            issues: vec![Issue::error("", message)],
            json: None,
            place: 0,
        };
        Self {
            entries: vec![entry],
            ..Self::default()
        }
    }

    /// Each document that is in force or could be, to be written down.
    pub fn take_texts(&mut self) -> Vec<Text> {
        let good = self.entries.iter_mut().filter(|entry| entry.document.is_some());
        good.enumerate()
            .map(|(place, entry)| Text {
                number: entry.number,
                name: entry.label(),
                json: entry.json.take(),
                before: std::mem::replace(&mut entry.place, place),
            })
            .collect()
    }

    /// Whether anything in it is in force or could be.
    pub fn is_good(&self) -> bool {
        self.entries.iter().any(|entry| entry.document.is_some())
    }

    /// Whether anything in it is wrong, so that an earlier version may have to stay in force.
    pub fn has_errors(&self) -> bool {
        self.entries.iter().any(Entry::has_error)
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

    /// Its documents, but for those that `other` has in the same places.
    pub(super) fn documents_beside(
        &self,
        origin: &Origin,
        other: Option<&Self>,
    ) -> impl Iterator<Item = (At, &Arc<Document>)> {
        let same = move |index: usize, document: &Arc<Document>| {
            let other = other.and_then(|other| other.entries.get(index)?.document.as_ref());
            other.is_some_and(|other| Arc::ptr_eq(other, document))
        };
        let entries = self.entries.iter().enumerate();
        let documents = entries.filter_map(|(index, entry)| Some((index, entry.document.as_ref()?)));
        documents
            .filter(move |(index, document)| !same(*index, document))
            .map(|(index, document)| {
                let at = At {
                    origin: origin.clone(),
                    index,
                };
                (at, document)
            })
    }

    /// This version of a file after `previous`: documents that say the same stay the same object, and a document
    /// that is bad now stays in force as it was.
    ///
    /// Where a broken document cannot even be named, it may be any that is missing: all of these stay.
    pub fn after(mut self, previous: &Self) -> Self {
        let mut old = BTreeMap::new();
        for entry in &previous.entries {
            if let Some(document) = &entry.document {
                old.entry(&document.key).or_insert((document, entry.place));
            }
        }
        for entry in &mut self.entries {
            let Some((old, place)) = entry.key.as_ref().and_then(|key| old.get(key)) else {
                continue;
            };
            match &mut entry.document {
                Some(new) if *new == **old => *new = Arc::clone(old),
                Some(_) => {}
                None => {
                    entry.document = Some(Arc::clone(old));
                    entry.place = *place;
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
    fn has_error(&self) -> bool {
        self.issues.iter().any(|issue| issue.severity == Severity::Error)
    }

    /// Broken so that not even its name can be read.
    fn is_unknown(&self) -> bool {
        self.key.is_none() && self.has_error()
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
