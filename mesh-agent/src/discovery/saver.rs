//! Writing the state down in a thread of its own: a disk may take seconds, for which no change must wait.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};

use super::journal::Journal;
use crate::config::{Origin, Text};
use crate::model::ServiceKey;

/// What changed since the last draft. Bounded by what there is: of a file or service only the newest is kept.
#[derive(Debug, Default)]
pub(super) struct Draft {
    /// What is good of each; nothing when it is gone.
    pub(super) files: BTreeMap<Origin, Vec<Text>>,
    pub(super) numbers: BTreeMap<ServiceKey, Option<u16>>,
}

impl Draft {
    fn is_empty(&self) -> bool {
        self.files.is_empty() && self.numbers.is_empty()
    }

    pub(super) fn add(&mut self, newer: Self) {
        for (origin, mut texts) in newer.files {
            if let Some(older) = self.files.remove(&origin) {
                take_over(&mut texts, &older);
            }
            self.files.insert(origin, texts);
        }
        self.numbers.extend(newer.numbers);
    }

    pub(super) fn has(&self, origin: &Origin) -> bool {
        self.files.contains_key(origin)
    }

    /// Notes all of it. What cannot be noted stays, and keeps nothing else from it.
    pub(super) fn note(&mut self, journal: &mut Journal) -> io::Result<()> {
        let mut first = None;
        let mut failed = |noted: io::Result<()>| {
            noted
                .map_err(|error| {
                    first.get_or_insert(error);
                })
                .is_err()
        };
        self.files
            .retain(|origin, texts| failed(journal.put_file(origin, texts)));
        self.numbers
            .retain(|service, number| failed(journal.put_number(service, *number)));
        first.map_or(Ok(()), Err)
    }
}

/// A text that is as it was when the older draft was made is there, or is as it was before that.
fn take_over(texts: &mut [Text], older: &[Text]) {
    for text in texts.iter_mut().filter(|text| text.json.is_none()) {
        if let Some(older) = older.get(text.before) {
            text.json.clone_from(&older.json);
            text.before = older.before;
        }
    }
}

/// The thread, and what waits for it.
#[derive(Debug)]
pub(super) struct Saver {
    drafts: Option<SyncSender<Draft>>,
    waiting: Draft,
    thread: Option<JoinHandle<()>>,
}

impl Saver {
    /// Commits what is noted, and then whatever is [saved](Saver::save).
    pub(super) fn start(journal: Journal) -> io::Result<Self> {
        let (drafts, queue) = sync_channel(1);
        let thread = thread::Builder::new()
            .name("state".to_owned())
            .spawn(move || write(journal, &queue))?;
        Ok(Self {
            drafts: Some(drafts),
            waiting: Draft::default(),
            thread: Some(thread),
        })
    }

    /// Hands the draft on with all that waits, as soon as there is room for it.
    pub(super) fn save(&mut self, draft: Draft) {
        self.waiting.add(draft);
        if let Some(drafts) = self.drafts.as_ref().filter(|_| !self.waiting.is_empty())
            && let Err(TrySendError::Full(draft) | TrySendError::Disconnected(draft)) =
                drafts.try_send(std::mem::take(&mut self.waiting))
        {
            self.waiting = draft;
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        if let Some(drafts) = self.drafts.take() {
            // A thread that is gone has said why.
            let _ = drafts.send(std::mem::take(&mut self.waiting));
        }
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// A failure costs only the next start its safety net, and what could not be written is tried again with the next.
fn write(mut journal: Journal, queue: &Receiver<Draft>) {
    let mut all = Draft::default();
    loop {
        // Until all is noted, the last state stays as it is rather than giving way to one that lacks something.
        let written = all.note(&mut journal).and_then(|()| journal.commit());
        if let Err(error) = written {
            tracing::warn!(%error, "the last good state cannot be written to stateDir");
        }
        match queue.recv() {
            Ok(draft) => all.add(draft),
            Err(_) => return,
        }
    }
}
