//! The licences of the crates and of the C library that are inside a release: nearly all ask that their text comes
//! along.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::shell;

/// What a release is made of: the agent, and the object inside.
const ROOTS: [&str; 2] = ["mesh-agent", "mesh-ebpf"];

/// Beginnings of names of files that are no code and must come along.
const NAMES: [&str; 6] = [
    "copying",
    "copyright",
    "licence",
    "license",
    "notice",
    "unlicense",
];

const HEAD: &str = "\
mesh-agent contains these crates, unchanged, the Rust standard library (MIT OR Apache-2.0), GCC's unwinder (GPL 3 with
the GCC Runtime Library Exception) and the GNU C Library (see the end). The crates' sources are
at https://crates.io/crates/NAME/VERSION. The texts that they bring follow the list; a crate that brings none is
here under the Apache License 2.0, the text of which is that of LICENSE.

";

/// What the C library says of itself: before its version and whose it is (`Debian GLIBC 2.36-9+deb12u14`), and after.
const C_LIBRARY: [&[u8]; 2] = [b"GNU C Library (", b") stable release version "];
/// No version is longer.
const LONGEST_VERSION: usize = 100;

/// Where Debian and Fedora keep what must come along with the C library: its licence, and what authors of parts say.
const C_LIBRARY_TEXTS: [[&str; 2]; 2] = [
    [
        "/usr/share/common-licenses/LGPL-2.1",
        "/usr/share/licenses/glibc/COPYING.LIB",
    ],
    [
        "/usr/share/doc/libc6-dev/copyright",
        "/usr/share/licenses/glibc/LICENSES",
    ],
];

/// One document: every crate with its licence, then each text once, with the crates that bring it, and the C library
/// that is in the agent's program.
pub(super) fn collect(target: &str, agent: &[u8]) -> Result<Vec<u8>> {
    let metadata = shell::output(shell::cargo("metadata").args([
        "--format-version",
        "1",
        "--locked",
        "--filter-platform",
        target,
    ]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo's metadata is no JSON")?;
    let inside = inside(&metadata)?;
    let mut list = HEAD.to_owned();
    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in array(&metadata["packages"])? {
        // Our own have the licence beside this file.
        if package["source"].is_null() || !inside.contains(text(&package["id"])?) {
            continue;
        }
        let name = format!("{} {}", text(&package["name"])?, text(&package["version"])?);
        let license = package["license"].as_str().unwrap_or("see its text");
        writeln!(list, "{name}: {license}")?;
        let folder = Path::new(text(&package["manifest_path"])?).parent();
        let found = texts_in(folder.context("a crate lies in no folder")?)?;
        if found.is_empty() && !license.contains("Apache-2.0") {
            bail!("{name} brings no text of its licence, {license}: add it by hand");
        }
        for found in found {
            texts.entry(found).or_default().insert(name.clone());
        }
    }
    let mut texts: Vec<_> = texts.into_iter().collect();
    // By who brings them: nobody looks for a text by its first letter.
    texts.sort_by(|(_, one), (_, other)| one.cmp(other));
    for (content, crates) in texts {
        let crates: Vec<_> = crates.into_iter().collect();
        write!(
            list,
            "\n{}\n{}:\n\n{content}\n",
            "-".repeat(100),
            crates.join(", ")
        )?;
    }
    list.push_str(&of_the_c_library(agent)?);
    Ok(list.into_bytes())
}

/// What its licence asks for: that it is said to be inside, where its sources are, that the agent can be made with
/// another one, and the text.
fn of_the_c_library(agent: &[u8]) -> Result<String> {
    let version = version_of_the_c_library(agent)
        .context("no C library is in the agent, or one that does not say which")?;
    let mut all = format!(
        "\n{}\nThe GNU C Library ({version}), unchanged, is in mesh-agent too, under the GNU Lesser\n\
         General Public License 2.1 or later. Its sources are at https://sourceware.org/glibc, and with Debian's changes at\n\
         https://snapshot.debian.org/package/glibc/. Whoever wants another version inside installs that and runs\n\
         `cargo xtask dist` in mesh-agent's sources. The licence, and what authors of parts ask for:\n",
        "-".repeat(100),
    );
    for places in C_LIBRARY_TEXTS {
        let text = places.into_iter().find_map(|file| fs::read_to_string(file).ok());
        let text = text.with_context(|| {
            format!(
                "a release needs the licences of its C library: there is no {}",
                places.join(" and no ")
            )
        })?;
        write!(all, "\n{}\n", text.trim())?;
    }
    Ok(all)
}

fn version_of_the_c_library(agent: &[u8]) -> Option<&str> {
    let [before, after] = C_LIBRARY;
    let mut places = agent.windows(before.len()).enumerate();
    places.find_map(|(place, bytes)| {
        let version = (bytes == before).then(|| &agent[place + before.len()..])?;
        let length = version
            .iter()
            .take(LONGEST_VERSION)
            .position(|byte| *byte == b')')?;
        let version = version[length..].starts_with(after).then(|| &version[..length])?;
        std::str::from_utf8(version).ok()
    })
}

/// Ids of all packages that the roots are linked with, one by way of the other.
fn inside(metadata: &Value) -> Result<BTreeSet<&str>> {
    let nodes = array(&metadata["resolve"]["nodes"])?;
    let nodes: BTreeMap<_, _> = nodes
        .iter()
        .map(|node| Ok((text(&node["id"])?, node)))
        .collect::<Result<_>>()?;
    let mut open = Vec::new();
    for package in array(&metadata["packages"])? {
        if package["source"].is_null() && ROOTS.contains(&text(&package["name"])?) {
            open.push(text(&package["id"])?);
        }
    }
    if open.len() != ROOTS.len() {
        bail!("cargo does not know {ROOTS:?}");
    }
    let mut inside = BTreeSet::new();
    while let Some(id) = open.pop() {
        if !inside.insert(id) {
            continue;
        }
        let node = nodes
            .get(id)
            .context("cargo's metadata names an unknown package")?;
        for dependency in array(&node["deps"])? {
            // Neither what builds nor what tests is linked; a null says that it is.
            if array(&dependency["dep_kinds"])?
                .iter()
                .any(|kind| kind["kind"].is_null())
            {
                open.push(text(&dependency["pkg"])?);
            }
        }
    }
    Ok(inside)
}

/// The texts that come with a crate, as authors wrote them but for ends of lines.
fn texts_in(folder: &Path) -> Result<BTreeSet<String>> {
    let mut texts = BTreeSet::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_lowercase();
        if entry.path().is_file()
            && NAMES.iter().any(|begin| name.starts_with(begin))
            && !name.ends_with(".rs")
        {
            let bytes = fs::read(entry.path())?;
            texts.insert(
                String::from_utf8_lossy(&bytes)
                    .replace("\r\n", "\n")
                    .trim()
                    .to_owned(),
            );
        }
    }
    Ok(texts)
}

fn array(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().context("cargo's metadata is of another form")
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().context("cargo's metadata is of another form")
}
