//! What the demo found, for a person to read. Colours only where they mean the same as the words beside them.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write, stdout};

use anyhow::Result;
use mesh_tests::{Mesh, Pod};
use serde_json::Value;

use crate::NAME;
use crate::scenes::{Before, Killed, Latency, Link, Now, REQUESTS};
use crate::shop::Shop;

pub(crate) struct Findings {
    pub(crate) before: Before,
    pub(crate) now: Now,
    pub(crate) killed: Killed,
}

/// Prints the summary; true when every check in it holds.
pub(crate) fn print(mesh: &Mesh, shop: &Shop, found: &Findings) -> Result<bool> {
    let mut page = Page::new();
    page.text.push_str(&nodes(mesh, shop));
    split(&mut page, &found.now.load);
    killed(&mut page, &found.killed);
    link(&mut page, found);
    identities(&mut page, &found.now);
    page.title("A server that speaks first");
    let speaks = found.now.greeting.contains(&shop.client.v4.to_string());
    page.check(
        speaks,
        &format!(
            "it said \"{}\": it knows the client's own address",
            found.now.greeting
        ),
    );
    latency(&mut page, found.before.latency, found.now.latency);
    page.title("Look inside");
    for agent in &mesh.agents {
        page.line(&format!(
            "{}: http://{}/   metrics: http://{}/metrics",
            agent.node, agent.admin, agent.metrics
        ));
    }
    let verdict = match page.failed {
        0 => "Everything was as it should be.".to_owned(),
        failed => format!("{failed} of the checks FAILED, see above."),
    };
    page.title(&verdict);
    stdout().write_all(page.text.as_bytes())?;
    Ok(page.failed == 0)
}

/// What to try while it runs.
pub(crate) fn print_commands(mesh: &Mesh) -> Result<()> {
    let mut page = Page::new();
    let resources = mesh.run.dir().join("resources");
    page.title("It runs until you press Ctrl-C. In another terminal, try");
    let client = format!("ip netns exec {NAME}-client");
    page.line(&format!("{client} curl -s http://frontend/"));
    page.line(&format!("{client} curl -si http://reviews.shop/ | grep x-pod"));
    page.line(&format!("ip netns exec {NAME}-node-a tcpdump -nAi trunk tcp"));
    page.line(&format!(
        "$EDITOR {}    (the weights of the route, say)",
        resources.join("shop.yaml").display()
    ));
    for agent in &mesh.agents {
        let program = agent.command();
        let program = program.get_program().display();
        page.line(&format!(
            "{program} get workloads --admin {}    ({})",
            agent.admin, agent.node
        ));
    }
    stdout().write_all(page.text.as_bytes())?;
    Ok(())
}

fn nodes(mesh: &Mesh, shop: &Shop) -> String {
    /// Inside the boxes.
    const WIDTH: usize = 30;
    let rule = "─".repeat(WIDTH);
    let mut columns = [Vec::new(), Vec::new()];
    for pod in shop.pods() {
        columns[pod.spec.node].push(described(pod));
    }
    for (column, agent) in columns.iter_mut().zip(&mesh.agents) {
        column.resize(3, String::new());
        column.push(format!("agent       {}", agent.admin));
    }
    let mut text = format!(
        "\n     {:<WIDTH$}            {}\n   ┌{rule}┐          ┌{rule}┐\n",
        "node-a", "node-b"
    );
    for (line, (a, b)) in columns[0].iter().zip(&columns[1]).enumerate() {
        let between = if line == 3 {
            "══ mTLS ══"
        } else {
            "          "
        };
        let _infallible = writeln!(text, "   │ {a:<28} │{between}│ {b:<28} │");
    }
    let _infallible = writeln!(text, "   └{rule}┘          └{rule}┘");
    text
}

fn described(pod: &Pod) -> String {
    format!("{:<11} {}", pod.spec.name, pod.v4)
}

fn split(page: &mut Page, load: &Value) {
    page.title("Traffic: client → frontend → reviews, 90/10 by an HTTPRoute");
    let count = |pod: &str| load["pods"][pod].as_u64().unwrap_or(0);
    for pod in ["reviews-v1", "reviews-v2"] {
        let share = count(pod) * 100 / REQUESTS;
        let bar = "█".repeat(usize::try_from(share / 2).unwrap_or(0));
        page.line(&format!("{pod}  {bar} {share} % ({} requests)", count(pod)));
    }
    let answered = load["statuses"]["200"].as_u64().unwrap_or(0);
    page.check(
        answered == REQUESTS,
        &format!("{answered} of {REQUESTS} requests were answered with 200"),
    );
    // Five standard deviations of 1000 requests at 10 %.
    let fair = (50..=150).contains(&count("reviews-v2"));
    page.check(fair, "the split is what the route asks for");
}

fn killed(page: &mut Page, killed: &Killed) {
    page.title("kill -9 one of two pods of a service, under load");
    let good = killed.load["statuses"]["200"].as_u64().unwrap_or(0);
    let errors = killed.load["failed"].as_u64().unwrap_or(0);
    let answers = killed.load["answers"].as_u64().unwrap_or(0);
    let failed = answers + errors - good;
    page.check(
        failed == 0 && killed.retries > 0,
        &format!(
            "{failed} of {} requests failed; {} more tries hid the dead pod",
            answers + errors,
            killed.retries
        ),
    );
}

fn link(page: &mut Page, found: &Findings) {
    page.title("What tcpdump saw between the nodes, markers in headers and bodies");
    let Link { bytes, marker, .. } = &found.before.link;
    let before = if *marker {
        "the marker is there to read"
    } else {
        "the marker is not seen"
    };
    page.check(*marker, &format!("before: {bytes} bytes of TCP; {before}"));
    let Link {
        bytes,
        agent_bytes,
        marker,
        tls,
    } = &found.now.link;
    let only = *tls && agent_bytes == bytes && *bytes > 0;
    let framed = if only {
        "all of them TLS to port 15008"
    } else {
        "NOT all of them TLS to port 15008"
    };
    let now = if *marker {
        "the marker is there to READ"
    } else {
        "no marker in clear"
    };
    page.check(
        only && !marker,
        &format!("now: {bytes} bytes of TCP, {framed}; {now}"),
    );
}

fn identities(page: &mut Page, now: &Now) {
    page.title("Who talked to whom, as the servers' agents verified it");
    for (from, to, count) in &now.principals {
        page.line(&format!("{count:>6}  {} → {}", plain(from), plain(to)));
    }
    let all = !now.principals.is_empty()
        && now
            .principals
            .iter()
            .all(|(from, to, _)| from.contains("/sa/") && to.contains("/sa/"));
    page.check(all, "every connection has an identity at both ends");
}

/// `unknown` would be a peer without identity.
fn plain(principal: &str) -> &str {
    if principal.is_empty() {
        "unknown"
    } else {
        principal
    }
}

fn latency(page: &mut Page, before: Latency, now: Latency) {
    let ms = |micros: u64| format!("{}.{:03} ms", micros / 1000, micros % 1000);
    page.title("Latency of one request after the other, from node to node");
    page.line(&format!(
        "half of them within   {} before   {} now",
        ms(before.p50),
        ms(now.p50)
    ));
    page.line(&format!(
        "99 % of them within   {} before   {} now",
        ms(before.p99),
        ms(now.p99)
    ));
    let added = now.p50.saturating_sub(before.p50);
    page.line(&format!("two proxies with mTLS between add {}", ms(added)));
}

struct Page {
    text: String,
    colours: bool,
    failed: u32,
}

impl Page {
    fn new() -> Self {
        Self {
            text: String::new(),
            colours: stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
            failed: 0,
        }
    }

    fn title(&mut self, title: &str) {
        let title = self.coloured("1", title);
        self.text.push_str(&format!("\n {title}\n"));
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(&format!("   {line}\n"));
    }

    fn check(&mut self, holds: bool, line: &str) {
        let mark = if holds {
            self.coloured("32", "✓")
        } else {
            self.coloured("1;31", "✗ FAILED:")
        };
        self.failed += u32::from(!holds);
        self.line(&format!("{mark} {line}"));
    }

    fn coloured(&self, code: &str, text: &str) -> String {
        if self.colours {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}
