//! `mesh-agent status`: one screen about one agent.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use super::age;
use super::table::{Table, printable};
use crate::admin::api::{Counts, Finding, Status};

pub(super) fn render(status: &Status, now: SystemTime) -> String {
    let counts = &status.counts;
    let state = match (status.draining, status.ready) {
        (true, _) => "draining",
        (false, true) => "ready",
        (false, false) => "not ready",
    };
    let certificates = match &status.next_certificate_expiry {
        Some(expiry) => format!(
            "{}, the first ends in {}",
            counts.certificates,
            age::until(Some(expiry), now)
        ),
        None => counts.certificates.to_string(),
    };
    let uptime = age::short(Duration::from_secs(status.uptime_seconds));
    let mut text = String::new();
    for (label, value) in [
        ("Node", status.node.clone()),
        ("State", state.to_owned()),
        ("Version", status.version.clone()),
        ("Running for", format!("{uptime} (process {})", status.pid)),
        ("Trust domain", status.trust_domain.clone()),
        ("Workloads", workloads(counts)),
        ("Services", counts.services.to_string()),
        ("Route rules", counts.routes.to_string()),
        ("Certificates", certificates),
        ("Encryption", encryption(status.kernel_tls).to_owned()),
        (
            "Connections",
            format!(
                "{} in, {} out",
                counts.inbound_connections, counts.outbound_connections
            ),
        ),
        (
            "Fast path",
            format!(
                "{} connections made, {} ways open",
                counts.fast_path_connections, counts.fast_paths
            ),
        ),
        ("Generation", status.generation.to_string()),
    ] {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{:<14}{}", format!("{label}:"), printable(&value));
    }
    let missing = status.conditions.iter().filter(|condition| !condition.holds);
    for condition in missing {
        let _ = writeln!(
            text,
            "Not ready:    {}: {}",
            printable(&condition.name),
            printable(&condition.message)
        );
    }
    for feature in &status.lacking {
        let (name, since) = (printable(&feature.name), printable(&feature.since));
        let without = printable(&feature.without);
        let _ = writeln!(text, "Kernel lacks: {name} (Linux {since}): {without}");
    }
    text + &findings(&status.findings)
}

fn encryption(kernel_tls: bool) -> &'static str {
    match kernel_tls {
        true => "by the kernel, where the other agent agrees",
        false => "by the agent",
    }
}

fn findings(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["SEVERITY", "RESOURCE", "WHERE", "MESSAGE"], &[], false);
    for finding in findings {
        let place = format!("{}:{} {}", finding.file, finding.document, finding.path);
        table.row([
            finding.severity.clone(),
            finding.resource.clone(),
            place.trim_end().to_owned(),
            finding.message.clone(),
        ]);
    }
    format!("\n{}", table.render())
}

fn workloads(counts: &Counts) -> String {
    let (here, known) = (counts.local_workloads, counts.workloads);
    match counts.pending_workloads {
        0 => format!("{here} here, {known} known"),
        pending => {
            format!("{here} here, {pending} of them not captured (`get workloads` says why), {known} known")
        }
    }
}
