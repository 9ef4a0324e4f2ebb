//! House rules that keep files readable and the tree the user's: sizes, depth, module docs, where `unsafe` may
//! be, what lies at the top, no ignored tests, no paths of one machine.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use proc_macro2::TokenTree;
use quote::ToTokens;
use syn::spanned::Spanned;
use syn::{AttrStyle, Attribute};

use super::source::{Problem, Source, each_run, files_below, is_test_item};

/// Lines of a file without its tests.
const MAX_LINES: usize = 500;
const ADVISED_LINES: usize = 400;

/// `src/proxy/http.rs` is 2 deep.
const MAX_DEPTH: usize = 2;

/// The only places that may have `unsafe` code: the kernel's side, what talks to the kernel, and the tests of it,
/// which make calls that no safe function offers.
const UNSAFE_PLACES: [&str; 6] = [
    "mesh-agent/src/ebpf",
    "mesh-agent/src/memory.rs",
    "mesh-agent/src/sock.rs",
    "mesh-common/src",
    "mesh-ebpf/src",
    "tests/kernel",
];

/// What a user sees in the project's folder. Configuration of tools goes into dot-files, which are not listed.
const TOP_LEVEL: [&str; 12] = [
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "deploy",
    "mesh-agent",
    "mesh-common",
    "mesh-ebpf",
    "rust-toolchain.toml",
    "target",
    "tests",
    "xtask",
];

/// Checks every Rust file for itself.
pub(super) fn check(sources: &[Source]) -> Vec<Problem> {
    sources
        .iter()
        .flat_map(|source| [check_shape(source), check_tokens(source)])
        .flatten()
        .collect()
}

/// Checks what else is in the project's folder.
pub(super) fn check_listing(workspace: &Path) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    for entry in fs::read_dir(workspace).context("cannot list the workspace")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && !TOP_LEVEL.contains(&name.as_str()) {
            problems.push(Problem::new(
                Path::new(&name),
                1,
                "does not belong at the top of the project",
            ));
        }
    }
    let needles = machine_paths(workspace);
    for path in files_below(workspace)? {
        // What is no text names no paths either.
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        for (index, line) in text.lines().enumerate() {
            if let Some(needle) = needles.iter().find(|needle| line.contains(*needle)) {
                let relative = path.strip_prefix(workspace).unwrap_or(&path);
                problems.push(Problem::new(
                    relative,
                    index + 1,
                    format!("names {needle}, a path of one machine"),
                ));
            }
        }
    }
    Ok(problems)
}

/// Folders that exist on the author's machine only.
fn machine_paths(workspace: &Path) -> Vec<String> {
    let mut folders: Vec<_> = ["home", "Users"].map(|name| format!("/{name}/")).into();
    folders.push(format!("{}/", workspace.display()));
    folders.extend(std::env::home_dir().map(|home| format!("{}/", home.display())));
    // A workspace in `/src` says nothing about other uses of that word.
    folders.retain(|folder| {
        folder.matches('/').count() > 2 || folder.starts_with("/home") || folder.starts_with("/Users")
    });
    folders
}

fn check_shape(source: &Source) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut report = |what: String| problems.push(Problem::new(&source.path, 1, what));
    if !source.is_test() && !source.file.attrs.iter().any(is_module_doc) {
        report("a module begins with `//!`, saying its purpose".to_owned());
    }
    if depth(&source.path) > MAX_DEPTH && !source.is_test() {
        report(format!("modules are at most {MAX_DEPTH} deep"));
    }
    let lines = production_lines(source);
    if lines > MAX_LINES {
        report(format!("{lines} lines; at most {MAX_LINES}: split it"));
    } else if lines > ADVISED_LINES {
        report(format!("{lines} lines; better at most {ADVISED_LINES}"));
        problems
            .iter_mut()
            .last()
            .into_iter()
            .for_each(|problem| problem.only_a_warning = true);
    }
    problems
}

/// How deep a module is in its crate; each folder in `src/bin` is a crate.
fn depth(path: &Path) -> usize {
    let parts: Vec<_> = path.iter().skip_while(|part| *part != "src").skip(1).collect();
    let inside = if parts.first().is_some_and(|part| *part == "bin") {
        &parts[2..]
    } else {
        &parts[..]
    };
    inside.iter().filter(|part| **part != "mod.rs").count()
}

fn is_module_doc(attribute: &Attribute) -> bool {
    matches!(attribute.style, AttrStyle::Inner(_)) && attribute.path().is_ident("doc")
}

/// Lines without test modules; a file with nothing else has none.
fn production_lines(source: &Source) -> usize {
    if source.is_test() {
        return 0;
    }
    let tests = source
        .file
        .items
        .iter()
        .filter(|item| is_test_item(item))
        .map(|item| {
            let span = item.span();
            span.end().line - span.start().line + 1
        });
    source.lines - tests.sum::<usize>()
}

fn check_tokens(source: &Source) -> Vec<Problem> {
    let may_be_unsafe = UNSAFE_PLACES.iter().any(|place| source.path.starts_with(place));
    let mut problems = Vec::new();
    each_run(source.file.to_token_stream(), &mut |run| {
        for (index, token) in run.iter().enumerate() {
            let line = token.span().start().line;
            let mut report = |what: String| problems.push(Problem::new(&source.path, line, what));
            match token {
                TokenTree::Ident(ident) if ident == "unsafe" && !may_be_unsafe => {
                    report(format!("unsafe code belongs into {}", UNSAFE_PLACES.join(", ")));
                }
                TokenTree::Group(group) if index > 0 && is_punct(&run[index - 1], '#') => {
                    if matches!(group.stream().into_iter().next(), Some(TokenTree::Ident(name)) if name == "ignore")
                    {
                        report("no test is ignored: make it run or remove it".to_owned());
                    }
                }
                _ => {}
            }
        }
    });
    problems
}

fn is_punct(token: &TokenTree, character: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == character)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{check, check_listing, machine_paths, production_lines};
    use crate::lint::source::Source;

    fn source(path: &str, text: &str) -> Source {
        Source::parse(Path::new(path), text).unwrap()
    }

    fn problems(path: &str, text: &str) -> Vec<String> {
        check(&[source(path, text)])
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn sizes_count_production_lines() {
        let long = format!(
            "//! Doc.\n{}#[cfg(test)]\nmod tests {{\n\n\n}}\n",
            "fn f() {}\n".repeat(7)
        );
        assert_eq!(production_lines(&source("xtask/src/a.rs", &long)), 8);
        let lines = |count: usize| format!("//! Doc.\n{}", "\n".repeat(count - 1));
        assert!(problems("xtask/src/a.rs", &lines(400)).is_empty());
        assert_eq!(
            problems("xtask/src/a.rs", &lines(401)),
            ["xtask/src/a.rs:1: warning: 401 lines; better at most 400"]
        );
        assert_eq!(
            problems("xtask/src/a.rs", &lines(501)),
            ["xtask/src/a.rs:1: 501 lines; at most 500: split it"]
        );
    }

    #[test]
    fn shape_is_checked() {
        assert_eq!(
            problems("xtask/src/a.rs", "fn f() {}"),
            ["xtask/src/a.rs:1: a module begins with `//!`, saying its purpose"]
        );
        assert!(problems("xtask/src/a/b/mod.rs", "//! Doc.").is_empty());
        assert!(problems("tests/src/bin/peer/a/b.rs", "//! Doc.").is_empty());
        assert!(problems("tests/src/bin/peer.rs", "//! Doc.").is_empty());
        assert!(problems("xtask/src/a/tests/mod.rs", "").is_empty());
        assert!(problems("xtask/src/a/tests/b.rs", "").is_empty());
        assert_eq!(problems("tests/src/a.rs", "").len(), 1);
        assert_eq!(
            problems("xtask/src/a/b/c.rs", "//! Doc."),
            ["xtask/src/a/b/c.rs:1: modules are at most 2 deep"]
        );
    }

    #[test]
    fn unsafe_code_has_its_places() {
        let text = "//! Doc.\nfn f() {\n unsafe { g() } }";
        assert!(problems("mesh-agent/src/ebpf/load.rs", text).is_empty());
        let found = problems("mesh-agent/src/proxy/mod.rs", text);
        assert!(
            found[0].starts_with("mesh-agent/src/proxy/mod.rs:3: unsafe code belongs into"),
            "{found:?}"
        );
        let harmless = "//! Doc of unsafe.\n#![deny(unsafe_code)]\nconst A: &str = \"unsafe\";";
        assert!(problems("mesh-agent/src/proxy/mod.rs", harmless).is_empty());
    }

    #[test]
    fn ignored_tests_are_found() {
        let found = "tests/it/main.rs:2: no test is ignored: make it run or remove it";
        assert_eq!(
            problems("tests/it/main.rs", "//! Doc.\n#[ignore]\nfn f() {}"),
            [found]
        );
        assert_eq!(
            problems("tests/it/main.rs", "//! Doc.\n#[ignore = \"slow\"]\nfn f() {}"),
            [found]
        );
        assert!(problems("tests/it/main.rs", "//! Doc.\nfn f() { ignore(1); g([ignore]); }").is_empty());
    }

    #[test]
    fn the_top_level_is_the_users() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("README.md"), "fine\n").unwrap();
        std::fs::write(
            folder.path().join(".dot"),
            format!("\n{}/x\n", folder.path().display()),
        )
        .unwrap();
        std::fs::write(folder.path().join("notes.txt"), "").unwrap();
        let found: Vec<_> = check_listing(folder.path())
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found.contains(&"notes.txt:1: does not belong at the top of the project".to_owned()));
        assert!(
            found.iter().any(|line| line.starts_with(".dot:2: names ")),
            "{found:?}"
        );
        assert!(!machine_paths(Path::new("/src")).contains(&"/src/".to_owned()));
    }
}
