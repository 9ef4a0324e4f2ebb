//! The licences of the crates that are inside a release: nearly all ask that their text comes along.

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
mesh-agent contains these crates, unchanged, and the Rust standard library (MIT OR Apache-2.0). Their sources are
at https://crates.io/crates/NAME/VERSION. The texts that they bring follow the list; a crate that brings none is
here under the Apache License 2.0, the text of which is that of LICENSE.

";

/// One document: every crate with its licence, then each text once, with the crates that bring it.
pub(super) fn collect(target: &str) -> Result<Vec<u8>> {
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
    Ok(list.into_bytes())
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
