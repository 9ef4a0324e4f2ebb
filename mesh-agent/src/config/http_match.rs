//! HTTPRoute matches: paths, headers, query parameters and methods.

use http::{HeaderName, Method};
use regex::{Regex, RegexBuilder};
use serde::Deserialize;

use super::check::Issues;
use crate::model::{HeaderMatch, MethodMatch, PathMatch, QueryMatch, RequestMatch, StringMatch};

/// The API's own limits.
const MAX_MATCHES: usize = 64;
const MAX_CONDITIONS: usize = 16;
const MAX_PATH: usize = 1024;
const MAX_VALUE: usize = 4096;
/// Memory of one compiled expression: matching is linear in time whatever the pattern, its size is ours to bound.
const MAX_REGEX_BYTES: usize = 256 << 10;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawMatch {
    path: Option<RawPath>,
    #[serde(default)]
    headers: Vec<RawNamed>,
    #[serde(default)]
    query_params: Vec<RawNamed>,
    method: Option<RawMethod>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPath {
    #[serde(default)]
    r#type: RawPathType,
    #[serde(default = "slash")]
    value: String,
}

fn slash() -> String {
    "/".to_owned()
}

#[derive(Default, Deserialize)]
enum RawPathType {
    Exact,
    #[default]
    PathPrefix,
    RegularExpression,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNamed {
    #[serde(default)]
    r#type: RawValueType,
    name: String,
    value: String,
}

#[derive(Default, Deserialize)]
enum RawValueType {
    #[default]
    Exact,
    RegularExpression,
}

#[derive(Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum RawMethod {
    Get,
    Head,
    Post,
    Put,
    Delete,
    Connect,
    Options,
    Trace,
    Patch,
}

/// A rule without matches matches everything.
pub(super) fn parse(raw: Vec<RawMatch>, rule: &str, issues: &mut Issues) -> Vec<RequestMatch> {
    if raw.len() > MAX_MATCHES {
        issues.error(
            format!("{rule}.matches"),
            format!("{} matches; allowed: {MAX_MATCHES}", raw.len()),
        );
    }
    if raw.is_empty() {
        return vec![RequestMatch::default()];
    }
    raw.into_iter()
        .enumerate()
        .map(|(index, one)| request(one, &format!("{rule}.matches[{index}]"), issues))
        .collect()
}

fn request(raw: RawMatch, path: &str, issues: &mut Issues) -> RequestMatch {
    for (field, count) in [
        ("headers", raw.headers.len()),
        ("queryParams", raw.query_params.len()),
    ] {
        if count > MAX_CONDITIONS {
            issues.error(
                format!("{path}.{field}"),
                format!("{count} conditions; allowed: {MAX_CONDITIONS}"),
            );
        }
    }
    RequestMatch {
        path: raw.path.map_or(PathMatch::Any, |raw| {
            path_match(raw, &format!("{path}.path.value"), issues)
        }),
        headers: headers(raw.headers, path, issues),
        query: query(raw.query_params, path, issues),
        method: raw
            .method
            .map_or(MethodMatch::Any, |method| MethodMatch::Is(method.into())),
    }
}

fn path_match(raw: RawPath, path: &str, issues: &mut Issues) -> PathMatch {
    let RawPath { r#type, value } = raw;
    if value.len() > MAX_PATH {
        issues.error(path, format!("{} bytes; allowed: {MAX_PATH}", value.len()));
        return PathMatch::Any;
    }
    match r#type {
        RawPathType::RegularExpression => {
            regex(&value, path, issues).map_or(PathMatch::Any, PathMatch::Regex)
        }
        RawPathType::Exact => {
            literal_path(&value, path, issues);
            PathMatch::Exact(value.into())
        }
        RawPathType::PathPrefix => {
            literal_path(&value, path, issues);
            match value.trim_end_matches('/') {
                "" => PathMatch::Any,
                prefix => PathMatch::Prefix(prefix.into()),
            }
        }
    }
}

/// What the API refuses in a path: parts that never are in a normal form of one.
fn literal_path(value: &str, path: &str, issues: &mut Issues) {
    const NEVER: [&str; 6] = ["//", "/./", "/../", "%2f", "%2F", "#"];
    const NEVER_AT_THE_END: [&str; 2] = ["/..", "/."];
    if !value.starts_with('/') {
        issues.error(path, format!("{value:?} is not a path; it begins with `/`"));
    }
    for part in NEVER {
        if value.contains(part) {
            issues.error(path, format!("a path cannot contain `{part}`"));
        }
    }
    for part in NEVER_AT_THE_END {
        if value.ends_with(part) {
            issues.error(path, format!("a path cannot end in `{part}`"));
        }
    }
    if value.bytes().any(|b| b <= b' ' || b >= 0x7f || b == b'?') {
        issues.error(
            path,
            "a path has neither blanks, `?` nor other than ASCII characters; write these as %XX",
        );
    }
}

fn headers(raw: Vec<RawNamed>, path: &str, issues: &mut Issues) -> Vec<HeaderMatch> {
    let mut headers: Vec<HeaderMatch> = Vec::new();
    for (index, header) in raw.into_iter().enumerate() {
        let path = format!("{path}.headers[{index}]");
        let Ok(name) = header.name.parse::<HeaderName>() else {
            issues.error(
                format!("{path}.name"),
                format!("{:?} is not a header's name", header.name),
            );
            continue;
        };
        if headers.iter().any(|other| other.name == name) {
            issues.warning(
                format!("{path}.name"),
                format!("{name} is there already; this entry has no effect"),
            );
            continue;
        }
        if let Some(value) = value_match(header, &path, issues) {
            headers.push(HeaderMatch { name, value });
        }
    }
    headers
}

fn query(raw: Vec<RawNamed>, path: &str, issues: &mut Issues) -> Vec<QueryMatch> {
    let mut query: Vec<QueryMatch> = Vec::new();
    for (index, parameter) in raw.into_iter().enumerate() {
        let path = format!("{path}.queryParams[{index}]");
        let name: Box<str> = parameter.name.as_str().into();
        if name.is_empty() || name.len() > 256 {
            issues.error(
                format!("{path}.name"),
                "not a parameter's name; allowed: 1 to 256 bytes",
            );
            continue;
        }
        if query.iter().any(|other| other.name == name) {
            issues.warning(
                format!("{path}.name"),
                format!("{name} is there already; this entry has no effect"),
            );
            continue;
        }
        if let Some(value) = value_match(parameter, &path, issues) {
            query.push(QueryMatch { name, value });
        }
    }
    query
}

fn value_match(raw: RawNamed, path: &str, issues: &mut Issues) -> Option<StringMatch> {
    let path = format!("{path}.value");
    if raw.value.is_empty() || raw.value.len() > MAX_VALUE {
        issues.error(
            path,
            format!("{} bytes; allowed: 1 to {MAX_VALUE}", raw.value.len()),
        );
        return None;
    }
    match raw.r#type {
        RawValueType::Exact => Some(StringMatch::Exact(raw.value.into())),
        RawValueType::RegularExpression => regex(&raw.value, &path, issues).map(StringMatch::Regex),
    }
}

/// The pattern has to match the whole text, as in Envoy.
fn regex(pattern: &str, path: &str, issues: &mut Issues) -> Option<Regex> {
    let compile = |pattern: &str| RegexBuilder::new(pattern).size_limit(MAX_REGEX_BYTES).build();
    // On its own first: `a)|(b` is wrong by itself, but would close the group around it.
    match compile(pattern).and_then(|_| compile(&format!(r"\A(?:{pattern})\z"))) {
        Ok(regex) => Some(regex),
        Err(regex::Error::CompiledTooBig(limit)) => {
            issues.error(
                path,
                format!("the expression is too big; allowed: {limit} bytes when compiled"),
            );
            None
        }
        Err(error) => {
            // The library's text draws the pattern over several lines; the reason is the last.
            let reason = error.to_string();
            let reason = reason.lines().last().unwrap_or_default();
            issues.error(
                path,
                format!(
                    "not a regular expression (RE2 syntax): {}",
                    reason.trim_start_matches("error: ")
                ),
            );
            None
        }
    }
}

impl From<RawMethod> for Method {
    fn from(method: RawMethod) -> Self {
        match method {
            RawMethod::Get => Self::GET,
            RawMethod::Head => Self::HEAD,
            RawMethod::Post => Self::POST,
            RawMethod::Put => Self::PUT,
            RawMethod::Delete => Self::DELETE,
            RawMethod::Connect => Self::CONNECT,
            RawMethod::Options => Self::OPTIONS,
            RawMethod::Trace => Self::TRACE,
            RawMethod::Patch => Self::PATCH,
        }
    }
}
