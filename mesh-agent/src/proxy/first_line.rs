//! Whether a stream's first line is a request line, in the eyes of the most lenient server.
//!
//! Servers differ in what they take for HTTP: many skip empty lines before a request, some split at any white
//! space, end a line at a lone CR, or do without a version. What one of them takes for a request must not pass for
//! something else, or its headers would be the client's own word.
//!
//! Invariants: it keeps a constant number of bytes however long the line is; what it said is final; it is pure.

/// The methods of the IANA registry, and QUERY: only these are waited for.
const METHODS: [&str; 40] = [
    "ACL",
    "BASELINE-CONTROL",
    "BIND",
    "CHECKIN",
    "CHECKOUT",
    "CONNECT",
    "COPY",
    "DELETE",
    "GET",
    "HEAD",
    "LABEL",
    "LINK",
    "LOCK",
    "MERGE",
    "MKACTIVITY",
    "MKCALENDAR",
    "MKCOL",
    "MKREDIRECTREF",
    "MKWORKSPACE",
    "MOVE",
    "OPTIONS",
    "ORDERPATCH",
    "PATCH",
    "POST",
    "PRI",
    "PROPFIND",
    "PROPPATCH",
    "PUT",
    "QUERY",
    "REBIND",
    "REPORT",
    "SEARCH",
    "TRACE",
    "UNBIND",
    "UNCHECKOUT",
    "UNLINK",
    "UNLOCK",
    "UPDATE",
    "UPDATEREDIRECTREF",
    "VERSION-CONTROL",
];

/// What a whole line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Ends in a version of HTTP.
    Request,
    /// A registered method and a path without a version: a request of HTTP/0.9, which some servers still take,
    /// headers and all, but also what a client of another protocol may say.
    Simple,
    Other,
}

/// What a line is that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begun {
    /// A registered method, and nothing or a path after it.
    Request,
    /// It may become a request line.
    Perhaps,
    /// Nobody begins a request so, though a lenient server may take what follows for one.
    Hardly,
}

/// Reads a first line in pieces.
#[derive(Clone, Debug, Default)]
pub(super) struct FirstLine {
    /// Words that have ended.
    words: usize,
    /// The word under way.
    word: Word,
    method: Word,
    /// The second word is a path, or a URL of HTTP.
    path: bool,
    /// The last word that has ended is a version of HTTP.
    version: bool,
    /// A CR was seen: the line may have ended there.
    returned: bool,
}

impl FirstLine {
    /// Takes the next bytes; `Some` as soon as they say what the line is.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Option<Line> {
        for byte in bytes {
            match *byte {
                b'\n' if !self.is_blank() => {
                    self.end_word();
                    return Some(self.ended());
                }
                b'\r' if !self.is_blank() => {
                    self.end_word();
                    self.returned = true;
                    // Lenient servers end the line here; for others it is white space.
                    match self.ended() {
                        Line::Other => {}
                        line => return Some(line),
                    }
                }
                byte if is_space(byte) => self.end_word(),
                byte if self.words == 0 && !is_token(byte) => return Some(Line::Other),
                byte => self.word.push(byte),
            }
        }
        None
    }

    /// What it is so far, if it has not ended.
    pub(super) fn begun(&self) -> Begun {
        if self.returned || self.is_blank() {
            return Begun::Hardly;
        }
        if self.words == 0 {
            let begins = |method: &&str| method.as_bytes().starts_with(self.word.start());
            return match self.word.is_whole() && METHODS.iter().any(begins) {
                true => Begun::Perhaps,
                false => Begun::Hardly,
            };
        }
        let nothing = self.words == 1 && self.word.len == 0;
        let path = self.path || self.words == 1 && self.word.is_path();
        match (self.method.is_registered(), path) {
            (true, true) => Begun::Request,
            (true, false) if nothing => Begun::Request,
            (true, false) | (false, true) => Begun::Perhaps,
            (false, false) => Begun::Hardly,
        }
    }

    fn ended(&self) -> Line {
        if self.words > 1 && self.version {
            Line::Request
        } else if self.path && self.method.is_registered() {
            Line::Simple
        } else {
            Line::Other
        }
    }

    fn is_blank(&self) -> bool {
        self.words == 0 && self.word.len == 0
    }

    fn end_word(&mut self) {
        if self.word.len == 0 {
            return;
        }
        let word = std::mem::take(&mut self.word);
        self.version = word.is_version();
        match self.words {
            0 => self.method = word,
            1 => self.path = word.is_path(),
            _ => {}
        }
        self.words += 1;
    }
}

/// A word's first bytes, and its length.
#[derive(Clone, Debug, Default)]
struct Word {
    start: [u8; Self::KEPT],
    len: usize,
}

impl Word {
    /// More than the longest registered method, the longest scheme and any version have.
    const KEPT: usize = 24;

    fn push(&mut self, byte: u8) {
        if let Some(free) = self.start.get_mut(self.len) {
            *free = byte;
        }
        self.len = self.len.saturating_add(1);
    }

    fn start(&self) -> &[u8] {
        &self.start[..self.len.min(Self::KEPT)]
    }

    fn is_whole(&self) -> bool {
        self.len <= Self::KEPT
    }

    fn is_registered(&self) -> bool {
        self.is_whole() && METHODS.iter().any(|method| method.as_bytes() == self.start())
    }

    fn is_path(&self) -> bool {
        let begins = |with: &[u8]| {
            self.start()
                .get(..with.len())
                .is_some_and(|s| s.eq_ignore_ascii_case(with))
        };
        begins(b"/") || begins(b"http://") || begins(b"https://")
    }

    fn is_version(&self) -> bool {
        let Some((name, number)) = self.start().split_at_checked(b"HTTP/".len()) else {
            return false;
        };
        self.is_whole()
            && name.eq_ignore_ascii_case(b"HTTP/")
            && !number.is_empty()
            && number.iter().all(|byte| byte.is_ascii_digit() || *byte == b'.')
    }
}

/// RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// What any server is known to split a request line at (Python's at all of these).
fn is_space(byte: u8) -> bool {
    matches!(byte, 0x09..=0x0d | 0x1c..=0x20 | 0x85 | 0xa0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines() {
        use Line::{Other, Request, Simple};
        let table: &[(&[u8], Option<Line>)] = &[
            (b"GET / HTTP/1.1\r\n", Some(Request)),
            (b"GET / HTTP/1.0\n", Some(Request)),
            (b"get / http/1.1\n", Some(Request)),
            (b"PROPFIND /a b HTTP/1.1\r\n", Some(Request)),
            (
                b"ANY-TOKEN-MAY-BE-A-METHOD-HOWEVER-LONG-IT-IS x HTTP/1.1\n",
                Some(Request),
            ),
            (b"GET HTTP/1.1\n", Some(Request)),
            (b"PRI * HTTP/2.0\r\n", Some(Request)),
            // What only lenient servers take.
            (b"\r\nGET / HTTP/1.1\r\n", Some(Request)),
            (b"\n\n \t\x0b\r\n GET / HTTP/1.1\r\n", Some(Request)),
            (b"GET / HTTP/1.1 \r\n", Some(Request)),
            (b"GET / HTTP/1.1\t \x0c\r\n", Some(Request)),
            (b"GET\t/\tHTTP/1.1\r\n", Some(Request)),
            (b"GET\x0b/\x1cHTTP/1.1\n", Some(Request)),
            (b"GET\xa0/\x85HTTP/1.1\n", Some(Request)),
            (b"GET / HTTP/1.1\rx: y", Some(Request)),
            (b"x /\r HTTP/1.1\n", Some(Request)),
            (b"GET / HTTP/01.10\n", Some(Request)),
            (b"GET /\r\n", Some(Simple)),
            (b"GET http://a/\n", Some(Simple)),
            (b"GET / HTTP/1.1 more\n", Some(Simple)),
            // What is something else.
            (b"GET key\r\n", Some(Other)),
            (b"get /key\r\n", Some(Other)),
            (b"PING\r\n", Some(Other)),
            (b"EHLO example.org\r\n", Some(Other)),
            (b"OPTIONS rtsp://a/ RTSP/1.0\r\n", Some(Other)),
            (b"HTTP/1.1 200 OK\r\n", Some(Other)),
            (b"HTTP/1.1\r\n", Some(Other)),
            (b"<13>Nov 1 web: GET / HTTP/1.1\n", Some(Other)),
            (b"Nov 1 web: \"GET / HTTP/1.1\"\n", Some(Other)),
            (b"\0", Some(Other)),
            (b"\x16\x03\x01", Some(Other)),
            (b"*1\r\n", Some(Other)),
            // What has not ended.
            (b"", None),
            (b"\r\n\r\n", None),
            (b"GET / HTTP/1.1", None),
            (b"MSH|^~\\&|A|B\r", Some(Other)),
        ];
        for (bytes, expected) in table {
            let text = String::from_utf8_lossy(bytes);
            assert_eq!(FirstLine::default().feed(bytes), *expected, "{text:?}");
            // However it is cut into pieces.
            let mut line = FirstLine::default();
            let bytewise = bytes.iter().find_map(|byte| line.feed(&[*byte]));
            assert_eq!(bytewise, *expected, "{text:?} byte by byte");
        }
    }

    #[test]
    fn a_line_without_bounds_is_followed_to_its_end() {
        let mut line = FirstLine::default();
        assert_eq!(line.feed(b"FOO /"), None);
        for _ in 0..1000 {
            assert_eq!(line.feed(&[b'a'; 1024]), None);
        }
        assert_eq!(line.feed(b" HTTP/1.1\r\n"), Some(Line::Request));
    }

    #[test]
    fn lines_that_have_not_ended() {
        use Begun::{Hardly, Perhaps, Request};
        let table: &[(&[u8], Begun)] = &[
            (b"", Hardly),
            (b"\r\n", Hardly),
            (b"G", Perhaps),
            (b"\r\nGET", Perhaps),
            (b"HELLO", Hardly),
            (b"get /", Perhaps),
            (b"get", Hardly),
            (b"GETS", Hardly),
            (b"GET ", Request),
            (b"GET\t", Request),
            (b"GET /a", Request),
            (b"GET /a b HTTP/1.1", Request),
            (b"POST http://a", Request),
            (b"POST http", Perhaps),
            (b"GET key", Perhaps),
            (b"FOO /", Perhaps),
            (b"FOO ", Hardly),
            (b"FOO bar", Hardly),
            (b"GET key\r", Hardly),
        ];
        for (bytes, expected) in table {
            let mut line = FirstLine::default();
            assert_eq!(line.feed(bytes), None);
            assert_eq!(line.begun(), *expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
