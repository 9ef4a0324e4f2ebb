//! The last good state on disk: the documents in force and the addresses given to services.
//!
//! One JSON value a line. What a later line says of a file or a service takes the place of what an earlier one said,
//! so that a change costs a line and not the whole state; when most of it is outdated, it is written anew. The first
//! line that is not whole, since the machine stopped before it was on the disk, ends it and is cut off with all behind
//! it. In memory there is only where each file's line is.

use std::collections::BTreeMap;
use std::fs::{self, File as Disk, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::config::{File, Origin, Text, Vips};
use crate::model::ServiceKey;

/// Of this file's format; another version's file is not read.
const VERSION: u32 = 2;
const FILE: &str = "resources.jsonl";
/// More than the sources may hold, so that what was read can be written; a bound against a file gone wild.
const MAX_BYTES: u64 = 1 << 30;
/// Outdated bytes that are let be. With more than this, at most half of the file is outdated.
const SLACK: u64 = 1 << 20;

/// The state of the last run, and this run's, which takes its place when it is [committed](Journal::commit).
#[derive(Debug)]
pub(super) struct Journal {
    directory: PathBuf,
    /// `resources.files`
    paths: Vec<PathBuf>,
    sheet: Sheet,
    next: Option<Sheet>,
}

/// One file of lines.
#[derive(Debug, Default)]
struct Sheet {
    disk: Option<Disk>,
    length: u64,
    /// Where the line is that holds for a file.
    lines: BTreeMap<Origin, Span>,
    /// Bytes in those lines.
    live: u64,
    numbers: BTreeMap<ServiceKey, u16>,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    length: u64,
}

/// What a line says.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
enum Line<'a> {
    /// In the first line.
    Version(u32),
    File {
        /// The path in `resources.files`.
        entry: PathBuf,
        file: String,
        /// [`Documents`]; none when the file is gone.
        #[serde(borrow)]
        documents: &'a RawValue,
    },
    Service {
        name: String,
        /// None when it was taken back.
        number: Option<u16>,
    },
}

/// Number, name and text of each document.
type Documents<Text> = Vec<(usize, String, Text)>;

impl Journal {
    /// Reads where things are, and begins this run's state. What cannot be used is as if it were not there.
    pub(super) fn open(directory: PathBuf, paths: Vec<PathBuf>) -> Self {
        let file = directory.join(FILE);
        let sheet = Sheet::read(&file, &paths).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(file = %file.display(), %error, "the last good state is not used");
            }
            Sheet::default()
        });
        let next = Sheet::create(&directory)
            .map_err(|error| tracing::warn!(%error, "the last good state cannot be written to stateDir"))
            .ok();
        Self {
            directory,
            paths,
            sheet,
            next,
        }
    }

    /// The addresses that the last run gave.
    pub(super) fn vips(&self) -> Vips {
        let numbers = self.sheet.numbers.iter();
        Vips::restore(numbers.map(|(key, number)| (key.clone(), *number)))
    }

    /// The files that the last run knew of a path in `resources.files`.
    pub(super) fn files(&self, order: usize) -> Vec<Origin> {
        let origins = self.sheet.lines.keys();
        origins.filter(|origin| origin.order == order).cloned().collect()
    }

    /// What was good of a file in the last run.
    pub(super) fn restore(&self, origin: &Origin) -> Option<File> {
        let line = self.sheet.line(origin).unwrap_or_else(|error| {
            tracing::warn!(file = %origin.file, %error, "its last good state cannot be read");
            None
        })?;
        let documents = documents::<Value>(&line)?.into_iter();
        let file = File::restore(documents.map(|(number, _, document)| (number, document)));
        Some(file)
    }

    /// Notes what is good of a file; nothing when it is gone. It is an error if a text is not known.
    pub(super) fn put_file(&mut self, origin: &Origin, texts: &[Text]) -> io::Result<()> {
        let Some(entry) = self.paths.get(origin.order) else {
            return Ok(());
        };
        // A text that is as it was is where it was.
        let last = match texts.iter().all(|text| text.json.is_some()) {
            true => None,
            false => self.sheet_of(origin).line(origin)?,
        };
        let last = last
            .as_deref()
            .and_then(documents::<&RawValue>)
            .unwrap_or_default();
        let good = texts.iter().map(|text| {
            let as_before = || {
                let before = last.get(text.before).filter(|(_, name, _)| *name == text.name);
                before.map(|(_, _, json)| *json)
            };
            let json = text.json.as_deref().or_else(as_before);
            let json = json.ok_or_else(|| invalid("what a document was before is not there"))?;
            Ok((text.number, text.name.clone(), json))
        });
        let good = good.collect::<io::Result<Documents<_>>>()?;
        let line = bytes(&Line::File {
            entry: entry.clone(),
            file: origin.file.to_string(),
            documents: &serde_json::value::to_raw_value(&good)?,
        })?;
        let sheet = self.writable()?;
        let span = sheet.append(&line)?;
        sheet.hold(origin, Some(span).filter(|_| !texts.is_empty()));
        Ok(())
    }

    /// Notes the address given to a service; none when it was taken back.
    pub(super) fn put_number(&mut self, service: &ServiceKey, number: Option<u16>) -> io::Result<()> {
        self.writable()?.put_number(service, number)
    }

    /// Where the newest line of a file is, if there is one.
    fn sheet_of(&self, origin: &Origin) -> &Sheet {
        let next = self.next.as_ref();
        next.filter(|next| next.lines.contains_key(origin))
            .unwrap_or(&self.sheet)
    }

    /// Where notes go. What could not be made at the start may be possible now.
    fn writable(&mut self) -> io::Result<&mut Sheet> {
        if self.next.is_none() && self.sheet.disk.is_none() {
            self.next = Some(Sheet::create(&self.directory)?);
        }
        Ok(self.next.as_mut().unwrap_or(&mut self.sheet))
    }

    /// Brings what was noted to the disk. If the machine stops meanwhile, then of a state that was written anew all is
    /// there or the one before it, and of lines that were added only the first ones may be. What failed can be tried
    /// again.
    pub(super) fn commit(&mut self) -> io::Result<()> {
        if self.next.is_none() && self.sheet.is_mostly_outdated() {
            self.next = Some(self.sheet.copy(&self.directory)?);
        }
        if let Some(next) = &self.next {
            next.sync()?;
            fs::rename(self.directory.join(draft()), self.directory.join(FILE))?;
        }
        match self.next.take() {
            Some(next) => self.sheet = next,
            None => self.sheet.sync()?,
        }
        // Each time, since it may have failed after the renaming.
        Disk::open(&self.directory)?.sync_all()
    }
}

impl Sheet {
    fn create(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let disk = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            // Documents may hold what is not everybody's business.
            .mode(0o600)
            .open(directory.join(draft()))?;
        let mut sheet = Self {
            disk: Some(disk),
            ..Self::default()
        };
        sheet.append(&bytes(&Line::Version(VERSION))?)?;
        Ok(sheet)
    }

    fn read(path: &Path, paths: &[PathBuf]) -> io::Result<Self> {
        let disk = OpenOptions::new().read(true).write(true).open(path)?;
        let mut sheet = Self::default();
        let mut lines = BufReader::new((&disk).take(MAX_BYTES));
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            let span = Span {
                start: sheet.length,
                length: line.len() as u64,
            };
            match serde_json::from_slice(&line) {
                Ok(said) if span.start > 0 && line.ends_with(b"\n") => sheet.take_in(&said, span, paths),
                // Cut off, in whatever way.
                _ if span.start > 0 => break,
                Ok(Line::Version(VERSION)) if line.ends_with(b"\n") => {}
                Ok(_) => return Err(invalid("it has another format")),
                Err(error) => return Err(error.into()),
            }
            sheet.length += span.length;
            line.clear();
        }
        // What is longer than the line that will be written there would stay behind it.
        disk.set_len(sheet.length)?;
        sheet.disk = Some(disk);
        Ok(sheet)
    }

    fn take_in(&mut self, line: &Line<'_>, span: Span, paths: &[PathBuf]) {
        match line {
            Line::Version(_) => {}
            Line::File {
                entry,
                file,
                documents,
            } => {
                let Some(order) = paths.iter().position(|path| path == entry) else {
                    return;
                };
                let file = file.as_str().into();
                let origin = Origin { order, file };
                self.hold(&origin, Some(span).filter(|_| documents.get() != "[]"));
            }
            Line::Service { name, number } => {
                let Some((namespace, name)) = name.split_once('/') else {
                    return;
                };
                let (namespace, name) = (namespace.into(), name.into());
                self.take_number(&ServiceKey { namespace, name }, *number);
            }
        }
    }

    /// From now on that line holds for a file, or none.
    fn hold(&mut self, origin: &Origin, span: Option<Span>) {
        let old = match span {
            Some(span) => {
                self.live += span.length;
                self.lines.insert(origin.clone(), span)
            }
            None => self.lines.remove(origin),
        };
        self.live -= old.map_or(0, |old| old.length);
    }

    fn put_number(&mut self, service: &ServiceKey, number: Option<u16>) -> io::Result<()> {
        let name = service.to_string();
        self.append(&bytes(&Line::Service { name, number })?)?;
        self.take_number(service, number);
        Ok(())
    }

    fn take_number(&mut self, service: &ServiceKey, number: Option<u16>) {
        match number {
            Some(number) => self.numbers.insert(service.clone(), number),
            None => self.numbers.remove(service),
        };
    }

    fn line(&self, origin: &Origin) -> io::Result<Option<Vec<u8>>> {
        let (Some(span), Some(disk)) = (self.lines.get(origin), &self.disk) else {
            return Ok(None);
        };
        let mut line = vec![0; usize::try_from(span.length).map_err(io::Error::other)?];
        disk.read_exact_at(&mut line, span.start)?;
        Ok(Some(line))
    }

    /// A line, whole or not at all.
    fn append(&mut self, line: &[u8]) -> io::Result<Span> {
        let disk = self
            .disk
            .as_ref()
            .ok_or_else(|| invalid("there is no state to add to"))?;
        let span = Span {
            start: self.length,
            length: line.len() as u64,
        };
        if span.start + span.length > MAX_BYTES {
            return Err(invalid("it would become larger than what is read"));
        }
        if let Err(error) = disk.write_all_at(line, span.start) {
            // What may be there of it is written over, or cut off.
            let _ = disk.set_len(span.start);
            return Err(error);
        }
        self.length += span.length;
        Ok(span)
    }

    fn is_mostly_outdated(&self) -> bool {
        self.length > 2 * self.live + SLACK
    }

    /// The same without what is outdated.
    fn copy(&self, directory: &Path) -> io::Result<Self> {
        let mut copy = Self::create(directory)?;
        for origin in self.lines.keys() {
            let line = self
                .line(origin)?
                .ok_or_else(|| invalid("it cannot be read again"))?;
            let span = copy.append(&line)?;
            copy.hold(origin, Some(span));
        }
        for (service, number) in &self.numbers {
            copy.put_number(service, Some(*number))?;
        }
        Ok(copy)
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.as_ref().map_or(Ok(()), Disk::sync_data)
    }
}

fn draft() -> String {
    format!("{FILE}.new")
}

fn bytes(line: &Line<'_>) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// The documents of a file's line.
fn documents<'a, Text: Deserialize<'a>>(line: &'a [u8]) -> Option<Documents<Text>> {
    match serde_json::from_slice(line).ok()? {
        Line::File { documents, .. } => serde_json::from_str(documents.get()).ok(),
        _ => None,
    }
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
