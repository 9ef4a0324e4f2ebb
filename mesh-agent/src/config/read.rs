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
    Folder {
        files: Vec<PathBuf>,
        /// Those that are links, or would be files if they led somewhere.
        links: Vec<PathBuf>,
    },
    File,
}

/// Looks what a path is, and into it if it is a folder.
pub fn list(path: &Path) -> io::Result<Listed> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(Listed::File);
    }
    let (mut files, mut links) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let file = entry.path();
        if !is_listed(&file) {
            continue;
        }
        let kind = entry.file_type()?;
        // A link that leads nowhere is listed: reading it says what is wrong.
        if kind.is_symlink() && !file.is_dir() {
            links.push(file.clone());
            files.push(file);
        } else if !kind.is_symlink() && !kind.is_dir() {
            files.push(file);
        }
        if files.len() > MAX_FILES {
            return Err(io::Error::other(format!(
                "more than {MAX_FILES} files in one folder; use several folders"
            )));
        }
    }
    files.sort();
    Ok(Listed::Folder { files, links })
}

/// Whether a folder's file of that name is read.
pub fn is_listed(file: &Path) -> bool {
    let wanted = file
        .extension()
        .is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json");
    let name = file.file_name().unwrap_or_default();
    wanted && !name.as_encoded_bytes().starts_with(b".")
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
        let in_folder = |name| folder.path().join(name);
        std::os::unix::fs::symlink("nowhere", in_folder("h.yaml")).unwrap();
        std::os::unix::fs::symlink("g.yaml", in_folder("i.yaml")).unwrap();
        let listed = Listed::Folder {
            files: ["a.yaml", "b.yml", "c.json", "h.yaml"].map(in_folder).to_vec(),
            links: vec![in_folder("h.yaml")],
        };
        assert_eq!(list(folder.path()).unwrap(), listed);
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
