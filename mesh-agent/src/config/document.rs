//! Text to values: YAML streams and JSON files are cut into documents, each parsed on its own.
//!
//! A syntax error costs only the document that it is in: YAML allows `---` at the start of a line nowhere but
//! between documents, so the cut needs no parser. Size, depth, aliases and number of documents are bounded.

use serde_json::Value;
use serde_saphyr::{Options, RequireIndent};

use super::check::Issue;

/// Larger files are refused: what an operator writes is far smaller, and parsing takes memory several times the size.
pub(crate) const MAX_FILE_BYTES: u64 = 16 << 20;
/// Documents in one file, items of lists included.
pub(crate) const MAX_DOCUMENTS: usize = 20_000;
/// Nesting of maps and sequences. The deepest kind that exists has about 15 levels.
const MAX_DEPTH: usize = 48;
/// Values in one YAML document: room for a list of some ten thousand pods.
const MAX_NODES: usize = 1_000_000;
/// Aliases are for convenience, not for compression: what one document may replay.
const MAX_ALIASES: usize = 1_000;
const MAX_REPLAYED: usize = 100_000;

/// One document of a file, in whatever state it is.
#[derive(Debug)]
pub(crate) struct RawDocument {
    /// Counted from 1 within the file; documents with nothing but comments do not count.
    pub(crate) number: usize,
    /// `items[3].` for an item of a `v1 List`, else empty.
    pub(crate) prefix: String,
    pub(crate) value: Result<Value, Issue>,
}

/// Cuts a file into the texts of its documents, numbered from 1.
pub(crate) fn chunks(text: &str, json: bool) -> impl Iterator<Item = (usize, Chunk<'_>)> {
    let chunks = if json {
        vec![Chunk {
            line: 1,
            text,
            json: true,
        }]
    } else {
        split(text)
    };
    (1..).zip(chunks)
}

/// Parses one document's text: what it holds, or what is wrong with it. `room` is for how many more the file has.
pub(crate) fn read(number: usize, chunk: &Chunk<'_>, room: usize) -> Vec<RawDocument> {
    let mut documents = Vec::new();
    let value = if chunk.json {
        parse_json(chunk.text)
    } else {
        parse_yaml(chunk)
    };
    expand(number, value, room, &mut documents);
    documents
}

/// Parses one YAML text into a value, within the bounds of this module.
pub(crate) fn parse_single(text: &str) -> Result<Value, Issue> {
    parse_yaml(&Chunk {
        line: 1,
        text,
        json: false,
    })
}

/// A `v1 List`, as `kubectl get -o yaml` prints it, is the documents in it.
fn expand(number: usize, value: Result<Value, Issue>, room: usize, documents: &mut Vec<RawDocument>) {
    let is_list = |value: &Value| {
        value.get("apiVersion").and_then(Value::as_str) == Some("v1")
            && value.get("kind").and_then(Value::as_str) == Some("List")
    };
    match value {
        Ok(mut list) if is_list(&list) => match list.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => {
                let too_many = items.len() > room;
                documents.extend(items.into_iter().take(room).enumerate().map(|(item, mut value)| {
                    strip_nulls(&mut value);
                    RawDocument {
                        number,
                        prefix: format!("items[{item}]."),
                        value: Ok(value),
                    }
                }));
                if too_many {
                    documents.push(one_too_many(number));
                }
            }
            _ => documents.push(RawDocument {
                number,
                prefix: String::new(),
                value: Err(Issue::error("items", "a List needs an array of documents here")),
            }),
        },
        mut value => {
            if let Ok(value) = &mut value {
                strip_nulls(value);
            }
            documents.push(RawDocument {
                number,
                prefix: String::new(),
                value,
            });
        }
    }
}

pub(crate) fn one_too_many(number: usize) -> RawDocument {
    RawDocument {
        number,
        prefix: String::new(),
        value: Err(Issue::error(
            "",
            format!("a file may have {MAX_DOCUMENTS} documents; this and all after it are not used"),
        )),
    }
}

/// Kubernetes reads `field: null` as a field that is not there.
fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

/// The text of one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk<'a> {
    /// The file's line on which the text begins, from 1.
    line: usize,
    pub(crate) text: &'a str,
    json: bool,
}

/// Cuts at the lines that start with a document marker, and drops what holds nothing but comments.
fn split(text: &str) -> Vec<Chunk<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut chunks = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    let mut close = |from: usize, to: usize, line: usize| {
        let chunk = Chunk {
            line,
            text: &text[from..to],
            json: false,
        };
        if has_content(chunk.text) {
            chunks.push(chunk);
        }
    };
    for (line_number, line) in (1..).zip(text.split_inclusive('\n')) {
        let end = offset + line.len();
        if is_marker(line, "---") {
            // Directives (`%YAML 1.2`) belong to the document that the marker opens.
            if !text[start..offset].lines().any(|line| line.starts_with('%')) {
                close(start, offset, start_line);
                (start, start_line) = (offset, line_number);
            }
        } else if is_marker(line, "...") {
            close(start, offset, start_line);
            (start, start_line) = (end, line_number + 1);
        }
        offset = end;
    }
    close(start, text.len(), start_line);
    chunks
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

fn has_content(chunk: &str) -> bool {
    chunk.lines().any(|line| {
        let line = line.trim();
        !(line.is_empty() || line.starts_with('#') || line == "---")
    })
}

fn parse_yaml(chunk: &Chunk<'_>) -> Result<Value, Issue> {
    serde_saphyr::from_str_with_options(chunk.text, options()).map_err(|error| {
        let error = error.without_snippet();
        let place = error.location().map_or_else(
            || format!("line {}", chunk.line),
            |location| {
                let line = usize::try_from(location.line()).unwrap_or(usize::MAX);
                format!("line {}", line.saturating_add(chunk.line - 1))
            },
        );
        let message = error.to_string();
        // The parser counts lines from the chunk's start: ours replace its own.
        let message = message.split(" at line ").next().unwrap_or(&message);
        Issue::error("", format!("{place}: not YAML: {message}"))
    })
}

fn parse_json(text: &str) -> Result<Value, Issue> {
    serde_json::from_str(text).map_err(|error| Issue::error("", format!("not JSON: {error}")))
}

fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_events: 3 * MAX_NODES,
            max_aliases: MAX_ALIASES,
            max_anchors: MAX_ALIASES,
            max_recorded_anchor_events: MAX_REPLAYED,
            max_documents: 1,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_REPLAYED,
            max_replay_stack_depth: 16,
        },
        // `on`, `no` and `y` are words, as YAML 1.2 says: an app of that name is a name.
        strict_booleans: true,
        with_snippet: false,
        require_indent: RequireIndent::Unchecked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, json: bool) -> Vec<RawDocument> {
        chunks(text, json)
            .flat_map(|(number, chunk)| super::read(number, &chunk, MAX_DOCUMENTS))
            .collect()
    }

    fn texts(text: &str) -> Vec<(usize, &str)> {
        split(text).into_iter().map(|c| (c.line, c.text)).collect()
    }

    #[test]
    fn cuts_at_markers_only() {
        assert_eq!(texts("a: 1\n---\nb: 2\n"), [(1, "a: 1\n"), (2, "---\nb: 2\n")]);
        assert_eq!(texts("# head\n---\n\n---\na: 1"), [(4, "---\na: 1")]);
        assert_eq!(texts("a: |\n  ---\n  x\n"), [(1, "a: |\n  ---\n  x\n")]);
        assert_eq!(texts("a: ---x\n---x: 1\n").len(), 1);
        assert_eq!(texts("%YAML 1.2\n---\na: 1\n"), [(1, "%YAML 1.2\n---\na: 1\n")]);
        assert_eq!(
            texts("a: 1\n...\n# end\n---\nb: 1\n"),
            [(1, "a: 1\n"), (4, "---\nb: 1\n")]
        );
        assert_eq!(texts("--- {a: 1}\r\n--- {b: 1}\r\n").len(), 2);
        assert_eq!(texts(""), []);
    }

    #[test]
    fn one_broken_document_leaves_the_others() {
        let documents = read("a: 1\n---\nb: [1\n---\nc: 3\n", false);
        assert_eq!(documents.len(), 3);
        assert!(documents[0].value.is_ok() && documents[2].value.is_ok());
        let issue = documents[1].value.as_ref().unwrap_err();
        assert!(
            issue.message.starts_with("line 3: not YAML: ")
                || issue.message.starts_with("line 4: not YAML: "),
            "{issue:?}"
        );
    }

    #[test]
    fn lists_are_their_items() {
        let text = r#"{"apiVersion": "v1", "kind": "List", "items": [{"a": 1, "b": null}, {"c": 2}]}"#;
        for json in [true, false] {
            let documents = read(text, json);
            assert_eq!(documents.len(), 2);
            assert_eq!(documents[1].prefix, "items[1].");
            assert_eq!(documents[0].value, Ok(serde_json::json!({"a": 1})));
        }
    }

    #[test]
    fn hostile_texts_are_bounded() {
        let deep = format!("a: {}{}", "[".repeat(5_000), "]".repeat(5_000));
        let block: String = (0..500)
            .map(|depth| format!("{}a:\n", " ".repeat(depth)))
            .collect();
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
            bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
        }
        for text in [
            deep.as_str(),
            &block,
            &bomb,
            "a: 1\na: 2\n",
            "a: .nan\n",
            "\u{0}",
            "a: *b",
        ] {
            let documents = read(text, false);
            assert_eq!(documents.len(), 1);
            assert!(documents[0].value.is_err(), "{:.40}", text);
        }
        let json = "[".repeat(100_000);
        assert!(read(&json, true)[0].value.is_err());
        let list = r#"{"apiVersion": "v1", "kind": "List", "items": [1, 2, 3, 4]}"#;
        let chunk = chunks(list, true).next().unwrap().1;
        let documents = super::read(1, &chunk, 2);
        assert_eq!(documents.len(), 3);
        assert!(documents[2].value.is_err());
    }
}
