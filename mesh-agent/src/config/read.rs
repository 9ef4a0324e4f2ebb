//! Which files a path of `resources.files` means, and their text, within bounds.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::document::MAX_FILE_BYTES;

/// Files in one folder: far more than anybody keeps by hand.
const MAX_FILES: usize = 20_000;

/// What a path is.
#[derive(Debug, PartialEq, Eq)]
pub enum Listed {
    /// A folder: its `*.yaml`, `*.yml` and `*.json` files by name; hidden files and folders within are not read.
    Folder(Vec<PathBuf>),
    File,
}

/// Looks what a path is, and into it if it is a folder.
pub fn list(path: &Path) -> io::Result<Listed> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(Listed::File);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        let wanted = Path::new(&name)
            .extension()
            .is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json");
        let file = path.join(&name);
        // A link that leads nowhere is listed: reading it says what is wrong.
        if wanted && !name.as_encoded_bytes().starts_with(b".") && !file.is_dir() {
            files.push(file);
        }
        if files.len() > MAX_FILES {
            return Err(io::Error::other(format!(
                "more than {MAX_FILES} files in one folder; use several folders"
            )));
        }
    }
    files.sort();
    Ok(Listed::Folder(files))
}

/// The text of a file. The error is for the user: it says what is allowed.
pub fn read_text(path: &Path) -> Result<String, String> {
    let failed = |error: io::Error| format!("cannot be read: {error}");
    // Opening a FIFO would wait for its writer for ever.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE_BYTES) {
        return Err(format!(
            "is too large; allowed: {} MiB per file",
            MAX_FILE_BYTES >> 20
        ));
    }
    String::from_utf8(bytes)
        .map_err(|error| format!("is not UTF-8 text (byte {})", error.utf8_error().valid_up_to()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_listed_in_order_without_hidden_files() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.yml", "a.yaml", "c.json", ".d.yaml", "e.txt", "f.yaml~"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        fs::create_dir(folder.path().join("g.yaml")).unwrap();
        let expected = ["a.yaml", "b.yml", "c.json"].map(|name| folder.path().join(name));
        assert_eq!(list(folder.path()).unwrap(), Listed::Folder(expected.to_vec()));
        assert_eq!(list(&folder.path().join("a.yaml")).unwrap(), Listed::File);
        assert!(list(&folder.path().join("z.yaml")).is_err());
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        assert!(read_text(&path).unwrap_err().contains("cannot be read"));
        fs::write(&path, [b'a', 0xff]).unwrap();
        assert_eq!(read_text(&path).unwrap_err(), "is not UTF-8 text (byte 1)");
        fs::File::create(&path)
            .unwrap()
            .set_len(MAX_FILE_BYTES + 1)
            .unwrap();
        assert_eq!(
            read_text(&path).unwrap_err(),
            "is too large; allowed: 16 MiB per file"
        );
        assert_eq!(read_text(folder.path()).unwrap_err(), "is not a regular file");
        let fifo = folder.path().join("fifo.yaml");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read_text(&fifo).unwrap_err(), "is not a regular file");
    }
}
