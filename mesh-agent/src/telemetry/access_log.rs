//! The access log: one line on stdout for each request or TCP connection.
//!
//! A line is made where the request ends and written by a thread of its own, behind a bounded queue. When
//! whoever reads stdout is too slow, lines are dropped and counted, never waited for.

use std::fmt::{self, Display, Write as _};
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime};

use super::Format;
use super::escape::Escaped;

/// Lines waiting to be written: a few milliseconds' worth at full load, 16 MB if all were as long as can be.
const QUEUE: usize = 4096;
/// The writer rests this long after each batch, so that one wake-up serves many lines.
const REST: Duration = Duration::from_millis(5);
/// A path longer than this is cut.
const MAX_PATH: usize = 1024;
/// Any other value longer than this is cut.
const MAX_VALUE: usize = 256;

/// Cheap to clone; all clones write to the same place.
#[derive(Clone, Debug, Default)]
pub struct AccessLog(Option<Arc<Writer>>);

/// What is told of a request or TCP connection. Absent text is empty or `None`.
#[derive(Clone, Copy)]
pub struct AccessRecord<'a> {
    pub start: SystemTime,
    pub duration: Duration,
    /// `inbound` or `outbound`, seen from the workload.
    pub direction: &'a str,
    /// `HTTP/1.1`, `HTTP/2`, `TCP`.
    pub protocol: &'a str,
    pub method: &'a str,
    pub authority: &'a str,
    pub path: &'a str,
    /// 0 where there is none.
    pub status: u16,
    pub grpc_status: Option<u16>,
    /// `metrics::Flag::as_str`.
    pub flags: &'a str,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub downstream: Option<SocketAddr>,
    pub upstream: Option<SocketAddr>,
    pub source: Option<&'a dyn Display>,
    pub source_identity: Option<&'a dyn Display>,
    pub destination: Option<&'a dyn Display>,
    pub destination_identity: Option<&'a dyn Display>,
    pub request_id: &'a str,
    pub route: &'a str,
    pub attempts: u32,
}

impl AccessLog {
    pub fn off() -> Self {
        Self(None)
    }

    /// Writes to stdout.
    pub fn stdout(format: Format) -> io::Result<Self> {
        Self::to(format, io::stdout())
    }

    pub fn to(format: Format, output: impl Write + Send + 'static) -> io::Result<Self> {
        let (queue, lines) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::default());
        let failed = Arc::clone(&dropped);
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_lines(&lines, BufWriter::new(output), &failed))?;
        Ok(Self(Some(Arc::new(Writer {
            format,
            queue,
            dropped,
        }))))
    }

    /// Whether a record is worth making.
    pub fn enabled(&self) -> bool {
        self.0.is_some()
    }

    /// Writes one line, soon; never waits.
    pub fn log(&self, record: &AccessRecord<'_>) {
        let Some(writer) = &self.0 else { return };
        let mut line = String::with_capacity(TYPICAL_LINE);
        let made = match writer.format {
            Format::Text => record.write_text(&mut line),
            Format::Json => record.write_json(&mut line),
        };
        if made.is_err() || writer.queue.try_send(Item::Line(line)).is_err() {
            writer.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lines that were not written.
    pub fn dropped(&self) -> u64 {
        let writer = self.0.as_ref();
        writer.map_or(0, |writer| writer.dropped.load(Ordering::Relaxed))
    }

    /// Waits until all lines so far are written, at most for `limit`; `false` when that was too short.
    pub fn flush(&self, limit: Duration) -> bool {
        let Some(writer) = &self.0 else { return true };
        let (done, wait) = sync_channel(1);
        let mut item = Item::Flush(done);
        let mut waited = Duration::ZERO;
        while let Err(TrySendError::Full(back)) = writer.queue.try_send(item) {
            if waited >= limit {
                return false;
            }
            std::thread::sleep(REST);
            waited += REST;
            item = back;
        }
        wait.recv_timeout(limit.saturating_sub(waited)) != Err(RecvTimeoutError::Timeout)
    }
}

const TYPICAL_LINE: usize = 512;

#[derive(Debug)]
struct Writer {
    format: Format,
    queue: SyncSender<Item>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Item {
    Line(String),
    /// Answered once everything before it is written.
    Flush(SyncSender<()>),
}

fn write_lines(items: &Receiver<Item>, mut output: impl Write, dropped: &AtomicU64) {
    while let Ok(first) = items.recv() {
        let mut waiting = Vec::new();
        for item in std::iter::once(first).chain(items.try_iter().take(QUEUE)) {
            match item {
                Item::Line(line) if output.write_all(line.as_bytes()).is_ok() => {}
                Item::Line(_) => {
                    dropped.fetch_add(1, Ordering::Relaxed);
                }
                Item::Flush(done) => waiting.push(done),
            }
        }
        // A reader that is gone makes every later write fail, and that is counted.
        let _ = output.flush();
        for done in waiting {
            let _ = done.try_send(());
        }
        std::thread::sleep(REST);
    }
}

impl AccessRecord<'_> {
    /// Envoy's default format, then who spoke to whom.
    fn write_text(&self, line: &mut String) -> fmt::Result {
        let start = humantime::format_rfc3339_millis(self.start);
        write!(line, "[{start}] \"")?;
        if !self.method.is_empty() {
            quoted(line, &self.method, MAX_VALUE)?;
            line.push(' ');
            quoted(line, &self.path, MAX_PATH)?;
            line.push(' ');
        }
        write!(line, "{}\" {} {} ", self.protocol, self.status, self.flags)?;
        let milliseconds = self.duration.as_secs_f64() * 1e3;
        write!(
            line,
            "{} {} {milliseconds:.3}",
            self.bytes_received, self.bytes_sent
        )?;
        if let Some(status) = self.grpc_status {
            write!(line, " grpc={status}")?;
        }
        write!(line, " {}", self.direction)?;
        for (name, value) in self.texts() {
            if let Some(value) = value {
                write!(line, " {name}=\"")?;
                quoted(line, value, MAX_VALUE)?;
                line.push('"');
            }
        }
        writeln!(line, " attempts={}", self.attempts)
    }

    fn write_json(&self, line: &mut String) -> fmt::Result {
        let start = humantime::format_rfc3339_millis(self.start);
        write!(
            line,
            "{{\"startTime\":\"{start}\",\"direction\":\"{}\"",
            self.direction
        )?;
        write!(line, ",\"protocol\":\"{}\"", self.protocol)?;
        if !self.method.is_empty() {
            line.push_str(",\"method\":\"");
            quoted(line, &self.method, MAX_VALUE)?;
            line.push_str("\",\"path\":\"");
            quoted(line, &self.path, MAX_PATH)?;
            line.push('"');
        }
        write!(
            line,
            ",\"responseCode\":{},\"responseFlags\":\"{}\"",
            self.status, self.flags
        )?;
        if let Some(status) = self.grpc_status {
            write!(line, ",\"grpcStatus\":{status}")?;
        }
        let milliseconds = self.duration.as_secs_f64() * 1e3;
        write!(
            line,
            ",\"bytesReceived\":{},\"bytesSent\":{}",
            self.bytes_received, self.bytes_sent
        )?;
        write!(
            line,
            ",\"durationMs\":{milliseconds:.3},\"attempts\":{}",
            self.attempts
        )?;
        for (name, value) in self.texts() {
            if let Some(value) = value {
                write!(line, ",\"{name}\":\"")?;
                quoted(line, value, MAX_VALUE)?;
                line.push('"');
            }
        }
        line.push_str("}\n");
        Ok(())
    }

    /// The values that may be absent.
    fn texts(&self) -> [(&'static str, Option<&dyn Display>); 9] {
        [
            ("requestId", present(&self.request_id)),
            ("authority", present(&self.authority)),
            ("route", present(&self.route)),
            (
                "downstream",
                self.downstream.as_ref().map(|address| address as &dyn Display),
            ),
            (
                "upstream",
                self.upstream.as_ref().map(|address| address as &dyn Display),
            ),
            ("source", self.source),
            ("sourceIdentity", self.source_identity),
            ("destination", self.destination),
            ("destinationIdentity", self.destination_identity),
        ]
    }
}

fn present<'a>(text: &'a &str) -> Option<&'a dyn Display> {
    (!text.is_empty()).then_some(text as &dyn Display)
}

fn quoted(line: &mut String, value: &dyn Display, limit: usize) -> fmt::Result {
    write!(Escaped::new(line, limit), "{value}")
}

impl fmt::Debug for AccessRecord<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = String::new();
        self.write_text(&mut line)?;
        f.write_str(line.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// Somewhere to write that the test can read.
    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Page {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn record<'a>(path: &'a str, request_id: &'a str) -> AccessRecord<'a> {
        AccessRecord {
            start: SystemTime::UNIX_EPOCH,
            duration: Duration::from_micros(1234),
            direction: "outbound",
            protocol: "HTTP/1.1",
            method: "GET",
            authority: "reviews",
            path,
            status: 200,
            grpc_status: None,
            flags: "-",
            bytes_received: 3,
            bytes_sent: 100,
            downstream: Some(([10, 0, 0, 1], 40_000).into()),
            upstream: Some(([10, 0, 0, 2], 8080).into()),
            source: Some(&"shop/client"),
            source_identity: Some(&"spiffe://cluster.local/ns/shop/sa/client"),
            destination: Some(&"shop/reviews-1"),
            destination_identity: None,
            request_id,
            route: "shop/reviews",
            attempts: 1,
        }
    }

    #[test]
    fn a_line_of_text() {
        let page = Page::default();
        let log = AccessLog::to(Format::Text, page.clone()).unwrap();
        log.log(&record("/a?b=c", "id-1"));
        log.log(&AccessRecord {
            protocol: "TCP",
            method: "",
            status: 0,
            flags: "UF",
            ..record("", "")
        });
        assert!(log.flush(LIMIT));
        let lines = [
            r#"[1970-01-01T00:00:00.000Z] "GET /a?b=c HTTP/1.1" 200 - 3 100 1.234 outbound requestId="id-1" authority="reviews" route="shop/reviews" downstream="10.0.0.1:40000" upstream="10.0.0.2:8080" source="shop/client" sourceIdentity="spiffe://cluster.local/ns/shop/sa/client" destination="shop/reviews-1" attempts=1"#,
            r#"[1970-01-01T00:00:00.000Z] "TCP" 0 UF 3 100 1.234 outbound authority="reviews" route="shop/reviews" downstream="10.0.0.1:40000" upstream="10.0.0.2:8080" source="shop/client" sourceIdentity="spiffe://cluster.local/ns/shop/sa/client" destination="shop/reviews-1" attempts=1"#,
        ];
        assert_eq!(page.text().lines().collect::<Vec<_>>(), lines);
    }

    #[test]
    fn a_line_of_json() {
        let page = Page::default();
        let log = AccessLog::to(Format::Json, page.clone()).unwrap();
        log.log(&AccessRecord {
            grpc_status: Some(14),
            ..record("/a", "id-1")
        });
        assert!(log.flush(LIMIT));
        let found: serde_json::Value = serde_json::from_str(&page.text()).unwrap();
        let expected = serde_json::json!({
            "startTime": "1970-01-01T00:00:00.000Z", "direction": "outbound", "protocol": "HTTP/1.1",
            "method": "GET", "path": "/a", "responseCode": 200, "responseFlags": "-", "grpcStatus": 14,
            "bytesReceived": 3, "bytesSent": 100, "durationMs": 1.234, "attempts": 1, "requestId": "id-1",
            "authority": "reviews", "route": "shop/reviews", "downstream": "10.0.0.1:40000",
            "upstream": "10.0.0.2:8080", "source": "shop/client",
            "sourceIdentity": "spiffe://cluster.local/ns/shop/sa/client", "destination": "shop/reviews-1",
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn clients_cannot_write_lines_of_their_own() {
        let forged = "/x\" 200\r\n[1970] \"GET /forged\x1b[2J \u{9b}31m";
        let long = "y".repeat(100_000);
        for format in [Format::Text, Format::Json] {
            let page = Page::default();
            let log = AccessLog::to(format, page.clone()).unwrap();
            log.log(&record(forged, &long));
            log.log(&record(&long, forged));
            assert!(log.flush(LIMIT));
            let text = page.text();
            assert_eq!(text.lines().count(), 2, "{text:?}");
            assert!(!text.contains(['\r', '\x1b', '\u{9b}']), "{text:?}");
            assert!(text.lines().all(|line| line.len() < 2048), "{text:?}");
            if format == Format::Json {
                let first = text.lines().next().unwrap();
                let value: serde_json::Value = serde_json::from_str(first).unwrap();
                assert_eq!(value["path"], forged, "what was asked for can be read back");
            }
        }
    }

    /// Writes nothing until it is let go.
    struct Stuck(Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slow_reader_costs_lines_not_time() {
        let (release, wait) = sync_channel(0);
        let log = AccessLog::to(Format::Text, Stuck(wait)).unwrap();
        let lines = 4 * QUEUE as u64;
        for _ in 0..lines {
            log.log(&record("/", ""));
        }
        assert!(log.dropped() >= lines - 3 * QUEUE as u64, "{}", log.dropped());
        assert!(!log.flush(Duration::ZERO), "it cannot have been written");
        drop(release);
        assert!(log.flush(LIMIT));
    }

    #[test]
    fn off_is_off() {
        let log = AccessLog::off();
        log.log(&record("/", ""));
        assert!(!log.enabled() && log.flush(Duration::ZERO) && log.dropped() == 0);
    }
}
