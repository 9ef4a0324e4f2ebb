//! The layers of mesh-agent: which module may import which. An edge that the tables lack is an error.
//!
//! Looked at are all paths in production code, inside macros and attributes too. Test code may import what it
//! likes: it is no part of the graph that the agent has.

use std::path::Path;

use proc_macro2::{Delimiter, Ident, Literal, TokenStream, TokenTree};
use quote::ToTokens;
use syn::{Item, ItemMod};

use super::source::{Problem, Source, each_run, is_test_item};

const SOURCES: &str = "mesh-agent/src";

enum Imports {
    Only(&'static [&'static str]),
    Everything,
}

/// Every module of the agent, lowest first, and the modules that it may import.
const LAYERS: [(&str, Imports); 27] = [
    ("model", Imports::Only(&[])),
    ("drain", Imports::Only(&[])),
    ("lanes", Imports::Only(&[])),
    ("memory", Imports::Only(&["lanes"])),
    ("log_filter", Imports::Only(&[])),
    ("telemetry", Imports::Only(&["log_filter"])),
    ("sock", Imports::Only(&[])),
    ("route", Imports::Only(&["model"])),
    ("balance", Imports::Only(&["model"])),
    ("retry", Imports::Only(&["model"])),
    ("authz", Imports::Only(&["model"])),
    ("fast_path", Imports::Only(&["authz", "model"])),
    ("metrics", Imports::Only(&["model"])),
    ("config", Imports::Only(&["log_filter", "model"])),
    ("store", Imports::Only(&["model"])),
    ("identity", Imports::Only(&["model"])),
    ("tls", Imports::Only(&["identity", "model"])),
    ("ebpf", Imports::Only(&["model", "sock"])),
    ("discovery", Imports::Only(&["config", "model", "store"])),
    ("dns", Imports::Only(DATA_PATH)),
    ("proxy", Imports::Only(DATA_PATH)),
    (
        "admin",
        Imports::Only(&["drain", "identity", "metrics", "model", "store", "telemetry"]),
    ),
    (
        "doctor",
        Imports::Only(&["config", "ebpf", "identity", "model", "tls"]),
    ),
    (
        "cli",
        Imports::Only(&["admin", "config", "doctor", "ebpf", "model"]),
    ),
    ("testing", Imports::Everything),
    ("app", Imports::Everything),
    (
        "main",
        Imports::Only(&["app", "cli", "config", "lanes", "telemetry"]),
    ),
];

/// What the data path may import: never where the configuration comes from, nor the kernel. The resolver is
/// part of it for the proxy, since queries over TCP arrive where all streams do.
const DATA_PATH: &[&str] = &[
    "authz",
    "balance",
    "dns",
    "drain",
    "identity",
    "lanes",
    "metrics",
    "model",
    "retry",
    "route",
    "sock",
    "store",
    "telemetry",
    "tls",
];

/// Crates for one module alone: only it knows the kernel's side.
const RESERVED_CRATES: [(&str, &str); 2] = [("aya", "ebpf"), ("mesh_common", "ebpf")];

/// Crates that a module is to do without: the model is plain data.
const BARRED_CRATES: [(&str, &[&str]); 1] = [("model", &["serde", "serde_json", "tokio"])];

/// All edges that are not allowed.
pub(super) fn check(sources: &[Source]) -> Vec<Problem> {
    let agent = sources
        .iter()
        .filter(|source| source.path.starts_with(SOURCES) && !source.is_test());
    agent.flat_map(check_file).collect()
}

fn check_file(source: &Source) -> Vec<Problem> {
    let module = module_path(&source.path);
    // The crate's root only lists modules; what else it did would be in no layer.
    let Some(own) = module.first() else {
        return Vec::new();
    };
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| name == own) else {
        let what = format!("module {own} has no layer: give it one in xtask/src/lint/layers.rs");
        return vec![Problem::new(&source.path, 1, what)];
    };
    let mut edges = Vec::new();
    // The binary's modules are its own crate, which sees the others as `mesh_agent`.
    let inside = if own == "main" { Vec::new() } else { module.clone() };
    collect_items(source.file.items.iter(), &inside, &mut edges);
    let mut problems: Vec<_> = edges
        .iter()
        .filter_map(|edge| Some((edge.line, edge.breach(own, allowed)?)))
        .map(|(line, what)| Problem::new(&source.path, line, what))
        .collect();
    problems.dedup();
    problems
}

/// `proxy/http.rs` → `[proxy, http]`, `proxy/mod.rs` → `[proxy]`, `main.rs` → `[main]`, `lib.rs` → `[]`.
fn module_path(path: &Path) -> Vec<String> {
    let inner = path.strip_prefix(SOURCES).unwrap_or(path).with_extension("");
    let mut module: Vec<_> = inner
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    if module.last().is_some_and(|last| last == "mod" || last == "lib") {
        module.pop();
    }
    module
}

#[derive(Debug, PartialEq, Eq)]
struct Edge {
    line: usize,
    to: Target,
}

#[derive(Debug, PartialEq, Eq)]
enum Target {
    Module(String),
    Crate(String),
}

impl Edge {
    /// What is wrong with importing this from `own`.
    fn breach(&self, own: &str, allowed: &Imports) -> Option<String> {
        let refused = match &self.to {
            Target::Module(module) => {
                if !LAYERS.iter().any(|(name, _)| name == module) {
                    return Some(format!("{module} is no module that has a layer"));
                }
                module != own
                    && match allowed {
                        Imports::Everything => false,
                        Imports::Only(modules) => !modules.contains(&module.as_str()),
                    }
            }
            Target::Crate(name) => {
                RESERVED_CRATES
                    .iter()
                    .any(|(reserved, owner)| reserved == name && *owner != own)
                    || BARRED_CRATES
                        .iter()
                        .any(|(module, barred)| *module == own && barred.contains(&name.as_str()))
            }
        };
        let (Target::Module(name) | Target::Crate(name)) = &self.to;
        refused.then(|| format!("{own} must not import {name}"))
    }
}

/// Walks items by syntax, which knows test code and the bounds of modules, and the paths in them by token,
/// since inside macros there is no other syntax.
fn collect_items<'a>(items: impl Iterator<Item = &'a Item>, module: &[String], edges: &mut Vec<Edge>) {
    for item in items.filter(|item| !is_test_item(item)) {
        if let Item::Mod(ItemMod {
            ident,
            content: Some((_, items)),
            ..
        }) = item
        {
            let inner: Vec<_> = module.iter().cloned().chain([ident.to_string()]).collect();
            collect_items(items.iter(), &inner, edges);
        } else {
            collect_tokens(item.to_token_stream(), module, edges);
        }
    }
}

fn collect_tokens(stream: TokenStream, module: &[String], edges: &mut Vec<Edge>) {
    each_run(stream, &mut |run| {
        for (index, token) in run.iter().enumerate() {
            let continues = index >= 2 && is_separator(&run[index - 2..]);
            match token {
                TokenTree::Ident(ident) if !continues && is_separator(&run[index + 1..]) => {
                    collect_path(ident, &run[index + 3..], module, edges);
                }
                TokenTree::Literal(literal) => collect_literal(literal, module, edges),
                _ => {}
            }
        }
    });
}

/// A path that begins with `head::` and goes on with `rest`.
fn collect_path(head: &Ident, rest: &[TokenTree], module: &[String], edges: &mut Vec<Edge>) {
    let line = head.span().start().line;
    match head.to_string().as_str() {
        "crate" | "mesh_agent" => descend(Vec::new(), rest, line, edges),
        "self" => descend(module.to_vec(), rest, line, edges),
        "super" => descend(parent(module), rest, line, edges),
        name => edges.push(Edge {
            line,
            to: Target::Crate(name.to_owned()),
        }),
    }
}

/// Follows a path, from module `at`, to the first module of each of its branches.
fn descend(at: Vec<String>, rest: &[TokenTree], line: usize, edges: &mut Vec<Edge>) {
    let mut arrive = |next: &str, line| {
        let name = at.first().map_or(next, String::as_str).to_owned();
        edges.push(Edge {
            line,
            to: Target::Module(name),
        });
    };
    match rest.first() {
        Some(TokenTree::Ident(ident)) if ident == "super" && is_separator(&rest[1..]) => {
            descend(parent(&at), &rest[3..], line, edges);
        }
        Some(TokenTree::Ident(ident)) if ident != "self" => {
            arrive(&ident.to_string(), ident.span().start().line);
        }
        Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
            let inside: Vec<_> = group.stream().into_iter().collect();
            for branch in
                inside.split(|token| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ','))
            {
                if !branch.is_empty() {
                    descend(at.clone(), branch, line, edges);
                }
            }
        }
        // `self` or `*`
        _ => arrive("*", line),
    }
}

/// Attributes such as serde's name paths in strings.
fn collect_literal(literal: &Literal, module: &[String], edges: &mut Vec<Edge>) {
    let text = literal.to_string();
    let text = text.trim_matches('"');
    if (text.starts_with("crate::") || text.starts_with("super::"))
        && let Ok(tokens) = text.parse::<TokenStream>()
    {
        let line = literal.span().start().line;
        let from = edges.len();
        collect_tokens(tokens, module, edges);
        edges[from..].iter_mut().for_each(|edge| edge.line = line);
    }
}

fn parent(module: &[String]) -> Vec<String> {
    module
        .split_last()
        .map_or_else(Vec::new, |(_, parent)| parent.to_vec())
}

/// Whether tokens begin with `::`.
fn is_separator(tokens: &[TokenTree]) -> bool {
    let colon = |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ':');
    tokens.len() >= 2 && tokens[..2].iter().all(colon)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{LAYERS, check};
    use crate::lint::source::Source;

    /// The problems of one file of the agent, as `line: what`.
    fn problems(file: &str, text: &str) -> Vec<String> {
        let source = Source::parse(&Path::new("mesh-agent/src").join(file), text).unwrap();
        check(&[source])
            .iter()
            .map(|problem| format!("{}: {}", problem.line, problem.what))
            .collect()
    }

    #[test]
    fn allowed_edges_pass() {
        assert!(problems("proxy/http.rs", "use crate::{model::Route, route, tls};").is_empty());
        assert!(problems("proxy/http.rs", "use super::pool::Pool; fn f() { self::g(); }").is_empty());
        assert!(problems("ebpf/mod.rs", "use aya::Ebpf; use mesh_common::maps;").is_empty());
        assert!(problems("app.rs", "use crate::{config, ebpf, proxy};").is_empty());
        assert!(problems("main.rs", "use mesh_agent::{app, config};").is_empty());
        assert!(problems("lib.rs", "pub mod proxy;").is_empty());
    }

    #[test]
    fn forbidden_edges_name_line_and_both_modules() {
        assert_eq!(
            problems("proxy/mod.rs", "\nuse crate::config::Raw;"),
            ["2: proxy must not import config"]
        );
        assert_eq!(
            problems("main.rs", "use mesh_agent::proxy;"),
            ["1: main must not import proxy"]
        );
    }

    #[test]
    fn nested_groups_are_followed_to_each_branch() {
        let text = "use crate::{\n model::{A, B},\n config::{self, C},\n ebpf,\n};";
        assert_eq!(
            problems("proxy/mod.rs", text),
            ["3: proxy must not import config", "4: proxy must not import ebpf"]
        );
    }

    #[test]
    fn every_kind_of_path_counts() {
        let forbidden = ["1: model must not import config"];
        assert_eq!(
            problems("model/mod.rs", "fn f() -> crate::config::X { todo() }"),
            forbidden
        );
        assert_eq!(
            problems("model/mod.rs", "fn f() { println!(\"{}\", crate::config::x()); }"),
            forbidden
        );
        assert_eq!(problems("model/a.rs", "use super::super::config::X;"), forbidden);
        assert_eq!(
            problems("model/a.rs", "use super::{super::config::X};"),
            forbidden
        );
        assert_eq!(
            problems("model/a.rs", "mod b { use super::super::super::config; }"),
            forbidden
        );
        assert_eq!(
            problems(
                "model.rs",
                "#[derive(D)] #[d(default = \"crate::config::x\")] struct S;"
            ),
            forbidden
        );
        assert_eq!(
            problems("model.rs", "use crate::*;"),
            ["1: * is no module that has a layer"]
        );
    }

    #[test]
    fn visibility_and_test_code_are_no_imports() {
        assert!(
            problems(
                "model/mod.rs",
                "pub(in crate::config) struct S; pub(crate) struct T;"
            )
            .is_empty()
        );
        assert!(problems("model/mod.rs", "#[cfg(test)] mod tests { use crate::config::X; }").is_empty());
        assert!(problems("model/tests.rs", "use crate::config::X;").is_empty());
    }

    #[test]
    fn reserved_and_barred_crates_are_refused() {
        assert_eq!(
            problems("app.rs", "use aya::Ebpf;"),
            ["1: app must not import aya"]
        );
        assert_eq!(
            problems("model.rs", "fn f() { tokio::spawn(); }"),
            ["1: model must not import tokio"]
        );
    }

    #[test]
    fn a_module_without_layer_is_refused() {
        assert_eq!(
            problems("fresh.rs", ""),
            ["1: module fresh has no layer: give it one in xtask/src/lint/layers.rs"]
        );
    }

    #[test]
    fn the_table_points_down_only() {
        for (index, (name, imports)) in LAYERS.iter().enumerate() {
            if let super::Imports::Only(modules) = imports {
                for module in *modules {
                    let at = LAYERS.iter().position(|(other, _)| other == module);
                    assert!(at.is_some_and(|at| at <= index), "{name} -> {module}");
                }
            }
        }
    }
}
