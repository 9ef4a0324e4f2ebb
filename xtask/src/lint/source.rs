//! The workspace's Rust files, parsed once for all checks, and what the checks say about them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use syn::{Attribute, Item, Meta};

/// Where Rust code is.
const CRATES: [&str; 5] = ["mesh-agent", "mesh-common", "mesh-ebpf", "tests", "xtask"];

/// One Rust file.
pub(super) struct Source {
    /// Relative to the workspace.
    pub(super) path: PathBuf,
    pub(super) lines: usize,
    pub(super) file: syn::File,
}

impl Source {
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self> {
        let file = syn::parse_file(text).with_context(|| format!("{}: no Rust", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            lines: text.lines().count(),
            file,
        })
    }

    /// Whether the file is in the `tests` of a module, which are a file or a folder beside its code.
    pub(super) fn is_test(&self) -> bool {
        let mut below_src = self.path.iter().skip_while(|part| *part != "src");
        below_src.any(|part| part == "tests.rs" || part == "tests")
    }
}

/// A breach of a rule at one place.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) path: PathBuf,
    pub(super) line: usize,
    pub(super) what: String,
    /// Advice, which fails nothing.
    pub(super) only_a_warning: bool,
}

impl Problem {
    pub(super) fn new(path: &Path, line: usize, what: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            line,
            what: what.into(),
            only_a_warning: false,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.only_a_warning { "warning: " } else { "" };
        write!(out, "{}:{}: {kind}{}", self.path.display(), self.line, self.what)
    }
}

/// All Rust files of the workspace, in order.
pub(super) fn read_all(workspace: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for crate_name in CRATES {
        for path in files_below(&workspace.join(crate_name))? {
            if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                sources.push(Source::parse(path.strip_prefix(workspace)?, &text)?);
            }
        }
    }
    Ok(sources)
}

/// Every file in a folder and the folders in it, in order; but not what builds and git leave there.
pub(super) fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    entries.sort();
    let mut files = Vec::new();
    for entry in entries {
        let name = entry.file_name().unwrap_or_default();
        if entry.is_symlink() || name == "target" || name == ".git" {
            continue;
        }
        if entry.is_dir() {
            files.extend(files_below(&entry)?);
        } else {
            files.push(entry);
        }
    }
    Ok(files)
}

/// Whether an item exists in test builds only.
pub(super) fn is_test_item(item: &Item) -> bool {
    let attributes: &[Attribute] = match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    };
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) => attribute.path().is_ident("cfg") && list.tokens.to_string() == "test",
        _ => false,
    })
}

/// Calls `visit` with each run of sibling tokens: the whole stream, and the inside of each group in it.
pub(super) fn each_run(stream: TokenStream, visit: &mut impl FnMut(&[TokenTree])) {
    let run: Vec<_> = stream.into_iter().collect();
    visit(&run);
    for (index, token) in run.iter().enumerate() {
        if let TokenTree::Group(group) = token {
            // `pub(in crate::x)` says who may import this, and imports nothing.
            let visibility = group.delimiter() == Delimiter::Parenthesis
                && index > 0
                && matches!(&run[index - 1], TokenTree::Ident(ident) if ident == "pub");
            if !visibility {
                each_run(group.stream(), visit);
            }
        }
    }
}
