//! What is mounted where, as this process sees it.

use std::fs;
use std::io;
use std::path::PathBuf;

/// A line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// The folder of the file system that is mounted.
    pub(super) root: PathBuf,
    pub(super) path: PathBuf,
    pub(super) kind: String,
}

/// All mounts, the oldest first; later ones may hide earlier ones.
pub(super) fn all() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read_to_string("/proc/self/mountinfo")?))
}

fn parse(text: &str) -> Vec<Mount> {
    let line = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        Some(Mount {
            root: unescape(place.next()?).into(),
            path: unescape(place.next()?).into(),
            kind: kind.split(' ').next()?.to_owned(),
        })
    };
    text.lines().filter_map(line).collect()
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    escapes.iter().fold(text.to_owned(), |text, (escape, plain)| {
        text.replace(escape, plain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_has_a_root_a_place_and_a_kind() {
        let text = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n\
                    42 27 254:0 /a\\040b /x\\134040 rw shared:1 master:2 - ext4 /dev/vda rw\n\
                    what is no mount\n";
        let mount = |root: &str, path: &str, kind: &str| Mount {
            root: root.into(),
            path: path.into(),
            kind: kind.into(),
        };
        assert_eq!(
            parse(text),
            [
                mount("/", "/sys/fs/cgroup/unified", "cgroup2"),
                mount("/a b", "/x\\040", "ext4")
            ]
        );
    }
}
