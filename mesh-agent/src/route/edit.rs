//! Header edits of a route.

use http::HeaderMap;

use crate::model::HeaderEdit;

/// Sets, then adds, then removes, as a Gateway API `RequestHeaderModifier` or `ResponseHeaderModifier` asks.
pub fn apply(edit: &HeaderEdit, headers: &mut HeaderMap) {
    for (name, value) in &edit.set {
        headers.insert(name, value.clone());
    }
    for (name, value) in &edit.add {
        headers.append(name, value.clone());
    }
    for name in &edit.remove {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn lines(pairs: &[(&'static str, &'static str)]) -> Vec<(HeaderName, HeaderValue)> {
        pairs
            .iter()
            .map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn set_replaces_add_appends_remove_removes() {
        let mut headers: HeaderMap = lines(&[
            ("x-set", "old"),
            ("x-set", "older"),
            ("x-add", "old"),
            ("x-gone", "1"),
            ("x-kept", "1"),
        ])
        .into_iter()
        .fold(HeaderMap::new(), |mut map, (name, value)| {
            map.append(name, value);
            map
        });
        let edit = HeaderEdit {
            set: lines(&[("x-set", "new")]),
            add: lines(&[("x-add", "new"), ("x-fresh", "1")]),
            remove: vec![
                HeaderName::from_static("x-gone"),
                HeaderName::from_static("x-never-there"),
            ],
        };
        apply(&edit, &mut headers);
        let all = |name: &str| {
            headers
                .get_all(name)
                .iter()
                .map(|v| v.to_str().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(all("x-set"), ["new"]);
        assert_eq!(all("x-add"), ["old", "new"]);
        assert_eq!(all("x-fresh"), ["1"]);
        assert_eq!(all("x-kept"), ["1"]);
        assert!(all("x-gone").is_empty());
    }
}
