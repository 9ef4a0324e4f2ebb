//! What may be asked, by whom: names of hosts, origins, query strings.

use std::net::IpAddr;

use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::uri::Authority;

/// Whether the request was meant for this machine. A page on the web can make a browser send requests to
/// loopback under a name of its own (DNS rebinding); it cannot make it send an address or `localhost`.
pub(super) fn is_local_host(parts: &Parts) -> bool {
    // Browsers always send one; HTTP/1.0 clients need not.
    let Some(host) = parts.headers.get(HOST) else {
        return true;
    };
    let authority = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
    authority.is_some_and(|authority| {
        let host = authority.host();
        let address = host.trim_start_matches('[').trim_end_matches(']');
        host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
    })
}

/// Whether a page of another site sent this, which must not change anything.
pub(super) fn is_cross_origin(parts: &Parts) -> bool {
    let Some(origin) = parts.headers.get(ORIGIN) else {
        return false;
    };
    let host = parts.headers.get(HOST).and_then(|host| host.to_str().ok());
    let site = origin
        .to_str()
        .ok()
        .and_then(|origin| origin.strip_prefix("http://"));
    site.is_none() || site != host
}

/// The values of the parameters `allowed`, in that order; the error says what is wrong.
pub(super) fn query<const N: usize>(
    parts: &Parts,
    allowed: [&str; N],
) -> Result<[Option<String>; N], String> {
    let mut values = [const { None }; N];
    for pair in parts
        .uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty())
    {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let slot = allowed
            .iter()
            .position(|known| *known == name)
            .ok_or_else(|| match N {
                0 => "this path takes no parameters".to_owned(),
                _ => format!("unknown parameter; this path takes {}", allowed.join(", ")),
            })?;
        let value =
            decode(value).ok_or_else(|| format!("the value of `{}` is not well encoded", allowed[slot]))?;
        if values[slot].replace(value).is_some() {
            return Err(format!("`{}` is given twice", allowed[slot]));
        }
    }
    Ok(values)
}

/// Percent-encoding; `None` if it is not.
fn decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || u8::try_from(char::from(bytes.next()?).to_digit(16)?).ok();
                digit()? * 16 + digit()?
            }
            b'+' => b' ',
            byte => byte,
        });
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = http::Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn only_names_of_this_machine_are_served() {
        for good in [
            "127.0.0.1:15000",
            "localhost",
            "LOCALHOST:1",
            "[::1]:15000",
            "10.0.0.1",
            "[fe80::1]",
        ] {
            assert!(is_local_host(&parts("/", &[("host", good)])), "{good}");
        }
        for bad in [
            "evil.example",
            "localhost.evil.example:15000",
            "",
            "127.0.0.1.evil.example",
            "a@b@c",
            "[::1",
        ] {
            assert!(!is_local_host(&parts("/", &[("host", bad)])), "{bad}");
        }
        assert!(is_local_host(&parts("/", &[])));
    }

    #[test]
    fn other_sites_are_told_apart() {
        let own = [("host", "127.0.0.1:15000"), ("origin", "http://127.0.0.1:15000")];
        assert!(!is_cross_origin(&parts("/", &own)));
        assert!(!is_cross_origin(&parts("/", &[("host", "127.0.0.1:15000")])));
        for origin in [
            "http://evil.example",
            "null",
            "https://127.0.0.1:15000",
            "http://127.0.0.1:8080",
        ] {
            let headers = [("host", "127.0.0.1:15000"), ("origin", origin)];
            assert!(is_cross_origin(&parts("/", &headers)), "{origin}");
        }
    }

    #[test]
    fn parameters() {
        let [namespace, name] = query(&parts("/?name=a%2Fb+c", &[]), ["namespace", "name"]).unwrap();
        assert_eq!((namespace, name.as_deref()), (None, Some("a/b c")));
        for bad in [
            "/?other=1",
            "/?name=%4",
            "/?name=%zz",
            "/?name=%ff",
            "/?name=1&name=2",
        ] {
            query(&parts(bad, &[]), ["name"]).unwrap_err();
        }
        query(&parts("/?", &[]), []).unwrap();
    }
}
