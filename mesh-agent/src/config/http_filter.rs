//! HTTPRoute filters: edits of request and response headers.

use http::{HeaderName, HeaderValue, header};
use serde::Deserialize;
use serde_json::Value;

use super::check::Issues;
use crate::model::{HeaderEdit, HeaderEdits};

/// The API's own limits.
const MAX_FILTERS: usize = 16;
const MAX_HEADERS: usize = 16;
const MAX_VALUE: usize = 4096;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawFilter {
    r#type: RawType,
    request_header_modifier: Option<RawEdit>,
    response_header_modifier: Option<RawEdit>,
    request_mirror: Option<Value>,
    request_redirect: Option<Value>,
    url_rewrite: Option<Value>,
    cors: Option<Value>,
    external_auth: Option<Value>,
    extension_ref: Option<Value>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
enum RawType {
    RequestHeaderModifier,
    ResponseHeaderModifier,
    RequestMirror,
    RequestRedirect,
    URLRewrite,
    #[serde(rename = "CORS")]
    Cors,
    ExternalAuth,
    ExtensionRef,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEdit {
    #[serde(default)]
    set: Vec<RawHeader>,
    #[serde(default)]
    add: Vec<RawHeader>,
    #[serde(default)]
    remove: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeader {
    name: String,
    value: String,
}

/// The filters of a rule or of a backendRef, at `owner`.
pub(super) fn parse(raw: Vec<RawFilter>, owner: &str, issues: &mut Issues) -> HeaderEdits {
    if raw.len() > MAX_FILTERS {
        issues.error(
            format!("{owner}.filters"),
            format!("{} filters; allowed: {MAX_FILTERS}", raw.len()),
        );
    }
    let mut edits = HeaderEdits::default();
    let (mut seen_request, mut seen_response) = (false, false);
    for (index, filter) in raw.into_iter().enumerate() {
        let path = format!("{owner}.filters[{index}]");
        let (field, raw, side, seen) = match filter.r#type {
            RawType::RequestHeaderModifier => (
                "requestHeaderModifier",
                filter.request_header_modifier,
                &mut edits.0,
                &mut seen_request,
            ),
            RawType::ResponseHeaderModifier => (
                "responseHeaderModifier",
                filter.response_header_modifier,
                &mut edits.1,
                &mut seen_response,
            ),
            other => {
                issues.error(
                    format!("{path}.type"),
                    format!(
                        "{} is not supported by this version; supported: RequestHeaderModifier, ResponseHeaderModifier",
                        other.name()
                    ),
                );
                continue;
            }
        };
        let extra = [
            ("requestMirror", filter.request_mirror),
            ("requestRedirect", filter.request_redirect),
            ("urlRewrite", filter.url_rewrite),
            ("cors", filter.cors),
            ("externalAuth", filter.external_auth),
            ("extensionRef", filter.extension_ref),
        ];
        for (name, _) in extra.into_iter().filter(|(_, value)| value.is_some()) {
            issues.error(
                format!("{path}.{name}"),
                "does not belong to a filter of this type",
            );
        }
        if std::mem::replace(seen, true) {
            issues.error(format!("{path}.type"), "there may be one filter of this type");
        }
        match raw {
            Some(raw) => *side = edit(raw, &format!("{path}.{field}"), issues),
            None => issues.error(format!("{path}.{field}"), "needed for a filter of this type"),
        }
    }
    edits
}

fn edit(raw: RawEdit, path: &str, issues: &mut Issues) -> HeaderEdit {
    for (field, count) in [
        ("set", raw.set.len()),
        ("add", raw.add.len()),
        ("remove", raw.remove.len()),
    ] {
        if count > MAX_HEADERS {
            issues.error(
                format!("{path}.{field}"),
                format!("{count} headers; allowed: {MAX_HEADERS}"),
            );
        }
    }
    HeaderEdit {
        set: headers(raw.set, &format!("{path}.set"), issues),
        add: headers(raw.add, &format!("{path}.add"), issues),
        remove: raw
            .remove
            .into_iter()
            .enumerate()
            .filter_map(|(index, text)| name(&text, &format!("{path}.remove[{index}]"), issues))
            .collect(),
    }
}

fn headers(raw: Vec<RawHeader>, path: &str, issues: &mut Issues) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (index, header) in raw.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Some(name) = name(&header.name, &format!("{path}.name"), issues) else {
            continue;
        };
        let value = match HeaderValue::from_str(&header.value) {
            Ok(value) if !value.is_empty() && value.len() <= MAX_VALUE => value,
            _ => {
                issues.error(
                    format!("{path}.value"),
                    format!(
                        "not a header's value; allowed: 1 to {MAX_VALUE} bytes without control characters"
                    ),
                );
                continue;
            }
        };
        if headers.iter().any(|(other, _)| *other == name) {
            issues.warning(
                format!("{path}.name"),
                format!("{name} is there already; this entry has no effect"),
            );
            continue;
        }
        headers.push((name, value));
    }
    headers
}

/// Headers that say how a message travels: editing them would break its framing.
const FRAMING: [HeaderName; 7] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];
/// What agents tell each other.
const OURS: &str = "mesh-agent-";

fn name(text: &str, path: &str, issues: &mut Issues) -> Option<HeaderName> {
    let Ok(name) = text.parse::<HeaderName>() else {
        issues.error(path, format!("{text:?} is not a header's name"));
        return None;
    };
    if FRAMING.contains(&name) || matches!(name.as_str(), "keep-alive" | "proxy-connection") {
        issues.error(
            path,
            format!("{name} says how the message travels and cannot be edited"),
        );
        return None;
    }
    if name.as_str().starts_with(OURS) {
        issues.error(path, format!("names that begin with {OURS} belong to the agents"));
        return None;
    }
    Some(name)
}

impl RawType {
    fn name(&self) -> &'static str {
        match self {
            Self::RequestHeaderModifier => "RequestHeaderModifier",
            Self::ResponseHeaderModifier => "ResponseHeaderModifier",
            Self::RequestMirror => "RequestMirror",
            Self::RequestRedirect => "RequestRedirect",
            Self::URLRewrite => "URLRewrite",
            Self::Cors => "CORS",
            Self::ExternalAuth => "ExternalAuth",
            Self::ExtensionRef => "ExtensionRef",
        }
    }
}
