use http::{HeaderValue, Method, Request};
use regex::Regex;

use super::*;
use crate::model::{RetryPolicy, Timeouts};

fn rule(name: &str, matches: RequestMatch) -> RouteRule {
    RouteRule {
        name: name.into(),
        matches,
        edits: Default::default(),
        backends: Vec::new(),
        timeouts: Timeouts::default(),
        retry: RetryPolicy::default(),
    }
}

fn request(method: Method, uri: &str, headers: &[(&str, &[u8])]) -> Parts {
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, HeaderValue::from_bytes(value).unwrap());
    }
    request.body(()).unwrap().into_parts().0
}

fn anchored(pattern: &str) -> Regex {
    Regex::new(&format!("^(?:{pattern})$")).unwrap()
}

#[test]
fn the_first_match_wins_and_no_match_is_none() {
    let path = |path| RequestMatch {
        path,
        ..RequestMatch::default()
    };
    let rules = [
        rule("exact", path(PathMatch::Exact("/a/b".into()))),
        rule("long", path(PathMatch::Prefix("/a/b".into()))),
        rule("short", path(PathMatch::Prefix("/a".into()))),
        rule("regex", path(PathMatch::Regex(anchored("/r[0-9]+")))),
    ];
    for (uri, expected) in [
        ("/a/b", Some("exact")),
        ("/a/b/", Some("long")),
        ("/a/b/c?x=/a", Some("long")),
        ("/a/bc", Some("short")),
        ("/a", Some("short")),
        ("/ab", None),
        ("/a%2Fb", None),
        ("/A", None),
        ("/r12", Some("regex")),
        ("/r12x", None),
        ("/x/r12", None),
        ("/", None),
    ] {
        let selected = select(&rules, &request(Method::GET, uri, &[]));
        assert_eq!(selected.map(|rule| &*rule.name), expected, "{uri}");
    }
    let everything = [rule("all", path(PathMatch::Prefix("".into())))];
    assert!(select(&everything, &request(Method::GET, "/", &[])).is_some());
    assert!(select(&everything, &request(Method::GET, "/x", &[])).is_some());
}

#[test]
fn headers() {
    let wants = |name: &'static str, value: StringMatch| HeaderMatch {
        name: HeaderName::from_static(name),
        value,
    };
    let exact = |text: &str| StringMatch::Exact(text.into());
    let list = wants("x-list", exact("a, b"));
    let cookie = wants(
        "cookie",
        StringMatch::Regex(anchored("(?:.*; )?user=jason(?:;.*)?")),
    );
    let host = wants("host", exact("shop"));
    for (wanted, uri, headers, expected) in [
        (&list, "/", &[("x-list", &b"a, b"[..])][..], true),
        (&list, "/", &[("X-List", b"a"), ("x-list", b"b")], true),
        (&list, "/", &[("x-list", b"b"), ("x-list", b"a")], false),
        (&list, "/", &[("x-list", b"a")], false),
        (&list, "/", &[("x-list", b"a"), ("x-list", b"\xff")], false),
        (&list, "/", &[], false),
        (&cookie, "/", &[("cookie", b"a=1; user=jason")], true),
        (
            &cookie,
            "/",
            &[("cookie", b"a=1"), ("cookie", b"user=jason")],
            true,
        ),
        (&cookie, "/", &[("cookie", b"a=1; user=jasonx")], false),
        (&host, "http://shop/", &[], true),
        (&host, "http://other/", &[], false),
        (&host, "/", &[("host", b"shop")], true),
        (&host, "http://shop/", &[("host", b"other")], false),
    ] {
        let request = request(Method::GET, uri, headers);
        assert_eq!(
            header_matches(wanted, &request),
            expected,
            "{} {uri} {headers:?}",
            wanted.name
        );
    }
}

#[test]
fn query_parameters() {
    let exact = |name: &str, value: &str| QueryMatch {
        name: name.into(),
        value: StringMatch::Exact(value.into()),
    };
    let regex = QueryMatch {
        name: "q".into(),
        value: StringMatch::Regex(anchored("a b+")),
    };
    for (wanted, query, expected) in [
        (exact("q", "x"), Some("q=x"), true),
        (exact("q", "x"), Some("p=1&q=x"), true),
        (exact("q", "x"), Some("q=y&q=x"), false),
        (exact("q", "x"), Some("q=x&q=y"), true),
        (exact("q", "x"), Some("Q=x"), false),
        (exact("q", "x"), None, false),
        (exact("q", ""), Some("q"), true),
        (exact("q", ""), Some("q="), true),
        (exact("q", "a b"), Some("q=a+b"), true),
        (exact("q", "a b"), Some("%71=a%20b"), true),
        (exact("q", "100%"), Some("q=100%"), true),
        (exact("q", "a=b"), Some("q=a=b"), true),
        (exact("q", "\u{e9}"), Some("q=%c3%A9"), true),
        (regex.clone(), Some("q=a+bb"), true),
        (regex.clone(), Some("q=a%20bb"), true),
        (regex.clone(), Some("q=a+bbc"), false),
        (regex, Some("q=a+b%ff"), false),
    ] {
        assert_eq!(query_matches(&wanted, query), expected, "{wanted:?} {query:?}");
    }
}

#[test]
fn all_parts_of_a_match_must_hold() {
    let rules = [rule(
        "r",
        RequestMatch {
            path: PathMatch::Prefix("/a".into()),
            headers: vec![HeaderMatch {
                name: HeaderName::from_static("x"),
                value: StringMatch::Exact("1".into()),
            }],
            query: vec![QueryMatch {
                name: "q".into(),
                value: StringMatch::Exact("1".into()),
            }],
            method: MethodMatch::Is(Method::PUT),
        },
    )];
    let x: &[(&str, &[u8])] = &[("x", b"1")];
    assert!(select(&rules, &request(Method::PUT, "/a?q=1", x)).is_some());
    assert!(select(&rules, &request(Method::GET, "/a?q=1", x)).is_none());
    assert!(select(&rules, &request(Method::PUT, "/b?q=1", x)).is_none());
    assert!(select(&rules, &request(Method::PUT, "/a?q=2", x)).is_none());
    assert!(select(&rules, &request(Method::PUT, "/a?q=1", &[])).is_none());
}

/// By path elements, written as the Gateway API says it.
#[test]
fn prefixes_agree_with_the_naive_model() {
    let mut random = fastrand::Rng::with_seed(3);
    let mut text = |most: usize| -> String {
        (0..random.usize(1..=most))
            .map(|_| ["/", "a", "b"][random.usize(..3)])
            .collect()
    };
    for _ in 0..20_000 {
        let path = format!("/{}", text(6));
        let given = format!("/{}", text(4));
        let prefix = given.strip_suffix('/').unwrap_or(&given);
        let elements: Vec<&str> = prefix.split('/').collect();
        let naive = path.split('/').collect::<Vec<_>>().starts_with(&elements);
        let wanted = PathMatch::Prefix(prefix.into());
        assert_eq!(path_matches(&wanted, &path), naive, "{prefix} {path}");
    }
}
