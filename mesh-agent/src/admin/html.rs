//! The page for people: how the agent is, and where to look further. No script; nothing is loaded.

use std::fmt::{self, Display, Write};

use super::api::Status;

const STYLE: &str = include_str!("index.css");

/// What can be looked at, and what it tells.
const PAGES: [(&str, &str); 13] = [
    ("/api/v1/status", "node, readiness, counts, refused documents"),
    (
        "/api/v1/workloads",
        "pods that are known, and how far their capture is",
    ),
    ("/api/v1/services", "names, addresses, ports and their endpoints"),
    (
        "/api/v1/routes",
        "rules by service and port, in order of precedence",
    ),
    ("/api/v1/policies", "what holds for each workload"),
    (
        "/api/v1/certificates",
        "identities of this node and how long they last",
    ),
    ("/api/v1/connections", "captured connections that are open now"),
    ("/api/v1/ebpf", "programs, maps and counters in the kernel"),
    ("/config_dump", "all of the above at once"),
    ("/metrics", "Prometheus metrics"),
    ("/logging", "the log's filter; PUT ?level= changes it"),
    ("/healthz", "200 while the agent answers"),
    ("/readyz", "200 when it is ready"),
];

pub(super) fn index(status: &Status, filter: &str) -> String {
    let mut page = String::with_capacity(16 * 1024);
    // Writing to a string cannot fail.
    let _ = write_index(&mut page, status, filter);
    page
}

fn write_index(page: &mut String, status: &Status, filter: &str) -> fmt::Result {
    let (class, word) = match (status.draining, status.ready) {
        (true, _) => ("warn", "draining"),
        (false, true) => ("good", "ready"),
        (false, false) => ("bad", "not ready"),
    };
    write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"10\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{node} · mesh-agent</title>\
         <style>{STYLE}</style><main><header><h1>{node}</h1><span class=\"badge {class}\">{word}</span>\
         <p>mesh-agent {version} · up {uptime} · process {pid} · trust domain {domain} · log {filter}</p></header>",
        node = Escaped(&status.node),
        version = Escaped(&status.version),
        uptime = uptime(status.uptime_seconds),
        pid = status.pid,
        domain = Escaped(&status.trust_domain),
        filter = Escaped(filter),
    )?;
    write_cards(page, status)?;
    write_conditions(page, status)?;
    write_findings(page, status)?;
    page.push_str("<section><h2>Look further</h2><table class=\"pages\">");
    for (path, about) in PAGES {
        write!(page, "<tr><td><a href=\"{path}\">{path}</a><td>{about}")?;
    }
    page.push_str("</table></section></main></html>\n");
    Ok(())
}

fn write_cards(page: &mut String, status: &Status) -> fmt::Result {
    let counts = &status.counts;
    let cards = [
        (
            "/api/v1/workloads",
            "local workloads",
            counts.local_workloads,
            format!("of {} known", counts.workloads),
        ),
        (
            "/api/v1/services",
            "services",
            counts.services,
            format!("generation {}", status.generation),
        ),
        ("/api/v1/routes", "route rules", counts.routes, String::new()),
        (
            "/api/v1/connections",
            "open connections",
            counts.inbound_connections + counts.outbound_connections,
            format!(
                "{} in, {} out",
                counts.inbound_connections, counts.outbound_connections
            ),
        ),
        (
            "/api/v1/certificates",
            "certificates",
            counts.certificates,
            status
                .next_certificate_expiry
                .as_ref()
                .map(|expiry| format!("first ends {expiry}"))
                .unwrap_or_default(),
        ),
    ];
    page.push_str("<nav>");
    for (path, label, count, more) in cards {
        write!(
            page,
            "<a class=\"card\" href=\"{path}\"><b>{count}</b><span>{label}</span><small>{more}</small></a>",
            more = Escaped(&more)
        )?;
    }
    page.push_str("</nav>");
    Ok(())
}

fn write_conditions(page: &mut String, status: &Status) -> fmt::Result {
    page.push_str("<section><h2>Readiness</h2><table>");
    for condition in &status.conditions {
        let (class, sign) = if condition.holds {
            ("good", "✓")
        } else {
            ("bad", "✗")
        };
        write!(
            page,
            "<tr><td class=\"sign {class}\">{sign}<td>{}<td>{}",
            Escaped(&condition.name),
            Escaped(&condition.message)
        )?;
    }
    page.push_str("</table></section>");
    Ok(())
}

/// More are on the status page.
const MAX_FINDINGS: usize = 50;

fn write_findings(page: &mut String, status: &Status) -> fmt::Result {
    if status.findings.is_empty() {
        return Ok(());
    }
    write!(
        page,
        "<section><h2>Documents that need a look ({})</h2><table>",
        status.findings.len()
    )?;
    for finding in status.findings.iter().take(MAX_FINDINGS) {
        let class = if finding.severity == "error" {
            "bad"
        } else {
            "warn"
        };
        write!(
            page,
            "<tr><td class=\"{class}\">{}<td><b>{}</b><br><code>{}</code><td>{}<br><small>{}, document {}</small>",
            Escaped(&finding.severity),
            Escaped(&finding.resource),
            Escaped(&finding.path),
            Escaped(&finding.message),
            Escaped(&finding.file),
            finding.document,
        )?;
    }
    page.push_str("</table></section>");
    Ok(())
}

fn uptime(seconds: u64) -> impl Display {
    humantime::format_duration(std::time::Duration::from_secs(seconds))
}

/// Text from outside, as text.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}
