//! One form of a path, for routing, authorization and the application alike.
//!
//! What Istio does by default (`pathNormalization: BASE`, Envoy's `normalize_path`): RFC 3986 sections 5.2.4 and
//! 6.2.2.2, and a backslash is a slash. Slashes are not merged, and escaped ones (`%2F`, `%5C`) stay escaped.
//! Invariant: the canonical form of a canonical path is that path, so two agents in a row agree.

use http::Uri;
use http::uri::PathAndQuery;

/// A path that no two programs read alike.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadPath {
    #[error("the path holds a NUL byte (%00)")]
    Nul,
    #[error("the path does not start with a slash")]
    Relative,
    #[error("the path has no valid canonical form")]
    Unrepresentable,
}

/// The URI with its path made canonical; `None` when it is so already, which costs one scan of the path.
///
/// CONNECT's authority form and OPTIONS' `*` have no path and are left alone.
pub fn canonical_path(uri: &Uri) -> Result<Option<Uri>, BadPath> {
    let path = uri.path();
    if path.is_empty() || path == "*" {
        return Ok(None);
    }
    if !path.starts_with('/') {
        return Err(BadPath::Relative);
    }
    if is_clean(path.as_bytes()) {
        return Ok(None);
    }
    let canonical = remove_dot_segments(&unescape_unreserved(path)?);
    if canonical == path {
        return Ok(None);
    }
    with_path(uri, canonical).map(Some)
}

/// True when nothing in the path can need a change: most paths.
fn is_clean(path: &[u8]) -> bool {
    let mut before = 0;
    path.iter().all(|&byte| {
        let clean = byte != b'%' && byte != b'\\' && !(byte == b'.' && before == b'/');
        before = byte;
        clean
    })
}

/// Decodes escaped letters, digits and `-._~`, which mean the same unescaped; backslashes become slashes. A `%`
/// that starts no escape becomes `%25`: what tolerant servers read it as, and what cannot be decoded twice.
fn unescape_unreserved(path: &str) -> Result<String, BadPath> {
    let mut plain = String::with_capacity(path.len() + 8);
    let mut rest = path;
    while let Some(at) = rest.find(['%', '\\']) {
        plain.push_str(&rest[..at]);
        let special = &rest[at..];
        let escape = special.get(..3).filter(|_| special.starts_with('%'));
        let used = match escape.map(|escape| (escape, decode(escape.as_bytes()))) {
            Some((_, Some(0))) => return Err(BadPath::Nul),
            Some((_, Some(byte))) if is_unreserved(byte) => {
                plain.push(char::from(byte));
                3
            }
            Some((escape, Some(_))) => {
                plain.push_str(escape);
                3
            }
            _ if special.starts_with('%') => {
                plain.push_str("%25");
                1
            }
            _ => {
                plain.push('/');
                1
            }
        };
        rest = &special[used..];
    }
    plain.push_str(rest);
    Ok(plain)
}

/// The byte that `%XX` stands for.
pub(super) fn decode(escape: &[u8]) -> Option<u8> {
    let digit = |at: usize| {
        let digit = char::from(*escape.get(at)?).to_digit(16)?;
        u8::try_from(digit).ok()
    };
    Some(digit(1)? << 4 | digit(2)?)
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// RFC 3986 section 5.2.4. Empty segments are segments: `/a//..` is `/a/`.
fn remove_dot_segments(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." => {}
            ".." => {
                kept.pop();
            }
            other => {
                kept.push(other);
                continue;
            }
        }
        if last {
            kept.push("");
        }
    }
    let mut out = String::with_capacity(path.len());
    for segment in kept {
        out.push('/');
        out.push_str(segment);
    }
    out
}

fn with_path(uri: &Uri, mut path: String) -> Result<Uri, BadPath> {
    if let Some(query) = uri.query() {
        path.push('?');
        path.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(path).map_err(|_invalid| BadPath::Unrepresentable)?);
    Uri::from_parts(parts).map_err(|_invalid| BadPath::Unrepresentable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(uri: &str) -> Result<String, BadPath> {
        let uri: Uri = uri.parse().unwrap();
        canonical_path(&uri).map(|changed| changed.unwrap_or(uri).to_string())
    }

    #[test]
    fn clean_paths_cost_nothing() {
        for path in [
            "/",
            "/a",
            "/a/b.css",
            "/a//b",
            "/a/",
            "/a;p=1",
            "*",
            "/?x=%00/../\\",
            "/~a/-/_",
        ] {
            assert_eq!(canonical_path(&path.parse().unwrap()), Ok(None), "{path}");
        }
        let authority: Uri = "example.com:443".parse().unwrap();
        assert_eq!(canonical_path(&authority), Ok(None));
    }

    #[test]
    fn hostile_paths_get_one_form() {
        for (path, expected) in [
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/a/..", "/"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/..", "/"),
            ("/../../etc", "/etc"),
            ("/a//../b", "/a/b"),
            ("/a/%2e%2E/b", "/b"),
            ("/a/.%2e/b?q=../x", "/b?q=../x"),
            ("/a\\b", "/a/b"),
            ("/a\\..\\b", "/b"),
            ("/%61dmin", "/admin"),
            ("/a%2fb", "/a%2fb"),
            ("/a%2F..%2Fb", "/a%2F..%2Fb"),
            ("/a%5cb", "/a%5cb"),
            ("/a%252e", "/a%252e"),
            ("/100%", "/100%25"),
            ("/a%zz", "/a%25zz"),
            ("/%%361", "/%2561"),
            ("/.well-known/x", "/.well-known/x"),
            ("/...", "/..."),
            ("/a;x=../b", "/a;x=../b"),
            ("/%c3%a9", "/%c3%a9"),
            ("/%2e%2e%2f", "/..%2f"),
            ("http://shop:80/a/../b?c", "http://shop:80/b?c"),
        ] {
            assert_eq!(canonical(path).as_deref(), Ok(expected), "{path}");
        }
    }

    #[test]
    fn nul_is_refused() {
        assert_eq!(canonical("/a%00b"), Err(BadPath::Nul));
        assert_eq!(canonical("/%00"), Err(BadPath::Nul));
    }

    #[test]
    fn canonical_means_canonical() {
        let pieces = [
            "/", "\\", ".", "..", "%2e", "%2F", "%", "a", "%61", "%25", "2", "6", "e", ";", "\u{e9}",
        ];
        let mut random = fastrand::Rng::with_seed(2);
        for _ in 0..20_000 {
            let mut path = String::from("/");
            for _ in 0..random.usize(0..9) {
                path.push_str(pieces[random.usize(..pieces.len())]);
            }
            let Ok(uri) = path.parse::<Uri>() else { continue };
            let once = canonical_path(&uri).unwrap().unwrap_or(uri);
            assert_eq!(canonical_path(&once), Ok(None), "{path} gives {once}");
            let dotted = once
                .path()
                .split('/')
                .any(|segment| matches!(segment, "." | ".."));
            assert!(!dotted && !once.path().contains('\\'), "{path} gives {once}");
        }
    }
}
