//! The page for people: how the agent is, and where to look further. No script; nothing is loaded.

use std::fmt::{self, Display, Write};
use std::time::{Duration, SystemTime};

use super::api::{Ebpf, Status, Workload};

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
    ("/healthz", "200 while the data path runs, else 503"),
    ("/readyz", "200 when it is ready"),
];

/// Workloads that are listed; the rest is on their own page.
const MAX_WORKLOADS: usize = 100;
/// Findings that are listed; the rest is on the status page.
const MAX_FINDINGS: usize = 50;

/// What the page shows.
pub(super) struct Shown<'a> {
    pub(super) status: &'a Status,
    /// The workloads of this node.
    pub(super) local: &'a [Workload],
    pub(super) ebpf: &'a Ebpf,
    pub(super) filter: &'a str,
    pub(super) now: SystemTime,
}

impl Shown<'_> {
    pub(super) fn page(&self) -> String {
        let mut page = String::with_capacity(16 * 1024);
        // Writing to a string cannot fail.
        let _ = self.write(&mut page);
        page
    }

    fn write(&self, page: &mut String) -> fmt::Result {
        let status = self.status;
        let (class, word) = match (status.draining, status.ready) {
            (true, _) => ("warn", "draining"),
            (false, true) => ("good", "ready"),
            (false, false) => ("bad", "not ready"),
        };
        write!(
            page,
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
             <meta http-equiv=\"refresh\" content=\"10\"><meta name=\"viewport\" content=\"width=device-width\">\
             <title>{node} · mesh-agent</title><style>{STYLE}</style><main>\
             <header><h1>{node}</h1><span class=\"badge {class}\">{word}</span>\
             <p>mesh-agent {version} · up {uptime} · process {pid} · trust domain {domain} · log {filter}</p></header>",
            node = Escaped(&status.node),
            version = Escaped(&status.version),
            uptime = humantime::format_duration(Duration::from_secs(status.uptime_seconds)),
            pid = status.pid,
            domain = Escaped(&status.trust_domain),
            filter = Escaped(self.filter),
        )?;
        self.write_cards(page)?;
        write_findings(page, status)?;
        write_conditions(page, status)?;
        write_lacking(page, status)?;
        write_workloads(page, self.local)?;
        page.push_str("<section><h2>Look further</h2><table class=\"pages\">");
        for (path, about) in PAGES {
            write!(page, "<tr><td><a href=\"{path}\">{path}</a><td>{about}")?;
        }
        page.push_str("</table></section></main></html>\n");
        Ok(())
    }

    fn write_cards(&self, page: &mut String) -> fmt::Result {
        let (counts, ebpf) = (&self.status.counts, self.ebpf);
        let open = counts.inbound_connections + counts.outbound_connections;
        let first_end = self
            .status
            .next_certificate_expiry
            .as_deref()
            .and_then(|end| humantime::parse_rfc3339(end).ok());
        let life = first_end.map(|end| end.duration_since(self.now).unwrap_or_default().as_secs());
        let life = life.map(|life| format!("first ends in {} h {} min", life / 3600, life / 60 % 60));
        let kernel = match ebpf.message.as_str() {
            "" => format!("Linux {}", ebpf.kernel),
            message => message.to_owned(),
        };
        let cards = [
            (
                "workloads",
                "local workloads",
                counts.local_workloads.to_string(),
                format!("of {} known", counts.workloads),
            ),
            (
                "services",
                "services",
                counts.services.to_string(),
                format!("generation {}", self.status.generation),
            ),
            (
                "routes",
                "route rules",
                counts.routes.to_string(),
                "of HTTPRoutes".to_owned(),
            ),
            (
                "connections",
                "open connections",
                open.to_string(),
                format!(
                    "{} in, {} out",
                    counts.inbound_connections, counts.outbound_connections
                ),
            ),
            (
                "certificates",
                "certificates",
                counts.certificates.to_string(),
                life.unwrap_or_default(),
            ),
            ("ebpf", "kernel side", ebpf.state.clone(), kernel),
        ];
        page.push_str("<nav>");
        for (path, label, value, more) in cards {
            write!(
                page,
                "<a class=\"card\" href=\"/api/v1/{path}\"><b>{value}</b><span>{label}</span><small>{more}</small></a>",
                value = Escaped(&value),
                more = Escaped(&more)
            )?;
        }
        page.push_str("</nav>");
        Ok(())
    }
}

fn write_workloads(page: &mut String, local: &[Workload]) -> fmt::Result {
    if local.is_empty() {
        return Ok(());
    }
    page.push_str("<section><h2>Workloads of this node</h2><table>");
    for workload in local.iter().take(MAX_WORKLOADS) {
        let class = if workload.state == "enrolled" {
            "good"
        } else {
            "warn"
        };
        write!(
            page,
            "<tr><td><b>{}</b><br><small>{}</small><td class=\"{class}\">{}<br><small>{}</small>\
             <td><code>{}</code><td>mTLS {}<br><small>{} without an agent</small>",
            Escaped(&workload.name),
            Escaped(&workload.namespace),
            Escaped(&workload.state),
            Escaped(&workload.message),
            Escaped(&workload.addresses.join(" ")),
            Escaped(&workload.mtls.mode),
            Escaped(&workload.on_agent_down),
        )?;
    }
    page.push_str("</table></section>");
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

fn write_lacking(page: &mut String, status: &Status) -> fmt::Result {
    if status.lacking.is_empty() {
        return Ok(());
    }
    page.push_str("<section><h2>What this kernel lacks</h2><table>");
    for feature in &status.lacking {
        write!(
            page,
            "<tr><td class=\"warn\">{}<br><small>since Linux {}</small><td>{}",
            Escaped(&feature.name),
            Escaped(&feature.since),
            Escaped(&feature.without)
        )?;
    }
    page.push_str("</table></section>");
    Ok(())
}

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
