//! One scenario as a table: a block per row, a line per contestant, then the targets and how quiet the machine was.

use std::fmt::Write;
use std::io::{IsTerminal, stdout};

use crate::args::Peer;
use crate::generator::Paced;
use crate::record::{Contestant, Round, RowRecord, ScenarioRecord};
use crate::scenario::{Door, Unit, Work};
use crate::stats::median;
use crate::targets::{Bound, Verdict};

/// Above these the figures of a run are doubtful: share of the CPUs that others used, and spread of the direct runs.
const FOREIGN: f64 = 0.10;
const SPREAD: f64 = 0.10;

pub(crate) fn scenario(record: &ScenarioRecord, cpus: usize) -> String {
    let mut text = format!("\n{}\n", bold(&format!("{} · {}", record.name, record.title)));
    for row in &record.rows {
        block(&mut text, row);
        let of_row = |verdict: &&Verdict| verdict.row.as_ref() == Some(&row.label);
        for verdict in record.verdicts.iter().filter(of_row) {
            line(&mut text, &format!("  {}", judged(verdict)));
        }
    }
    if !record.figures.is_empty() {
        text.push('\n');
    }
    for figure in &record.figures {
        let middle = median(figure.values.iter().copied());
        let least = figure.values.iter().copied().reduce(f64::min);
        let greatest = figure.values.iter().copied().reduce(f64::max);
        let range = match (least, greatest) {
            (Some(least), Some(greatest)) if figure.values.len() > 1 => {
                format!("({least:.1} to {greatest:.1} of {})", figure.values.len())
            }
            _ => String::new(),
        };
        let shown = shown(middle, 1);
        line(
            &mut text,
            &format!("{:<62}{shown:>9} {:<3} {range}", figure.what, figure.unit),
        );
    }
    text.push('\n');
    for verdict in record.verdicts.iter().filter(|verdict| verdict.row.is_none()) {
        line(&mut text, &judged(verdict));
    }
    for problem in &record.problems {
        line(&mut text, &coloured("1;31", &format!("FAILED {problem}")));
    }
    if !record.rows.is_empty() {
        noise(&mut text, record, cpus);
    }
    text
}

/// What is counted, as the columns call it, and what CPU seconds per unit are shown in.
struct Titles {
    speed: &'static str,
    cost: &'static str,
    scale: f64,
    digits: usize,
}

fn titles(unit: Unit) -> Titles {
    let (speed, cost, scale, digits) = match unit {
        Unit::Request => ("requests/s", "CPU µs per request", 1e6, 0),
        Unit::Gigabit => ("Gbit/s", "CPU ms per Gbit", 1e3, 2),
        Unit::Connection => ("connections/s", "CPU µs per connection", 1e6, 0),
    };
    Titles {
        speed,
        cost,
        scale,
        digits,
    }
}

fn block(text: &mut String, row: &RowRecord) {
    let titles = titles(row.work.unit());
    let label = bold(&format!("{:<36}", row.label));
    let rate = row
        .rate
        .map(|rate| format!("ms at {}/s", grouped(rate as f64, 0)));
    let (latency, latency_columns) = match &rate {
        Some(rate) => (
            format!("   {rate:^23}{:>11}", "proxies"),
            format!("   {:>7} {:>7} {:>7}{:>11}", "p50", "p99", "p99.9", "waiting µs"),
        ),
        None => Default::default(),
    };
    let _infallible = writeln!(
        text,
        "\n  {label}{:>14}{latency}   {:^28}   {:>7}\n  {:<50}{latency_columns}   {:>9}{:>10}{:>9}   {:>7}",
        titles.speed, titles.cost, "peak MB", "", "system", "− direct", "proxies", "",
    );
    for contestant in &row.contestants {
        let direct = contestant.peer == Peer::None;
        let cost = |seconds: Option<f64>| shown(seconds.map(|seconds| seconds * titles.scale), 1);
        let unless_direct = |value: Option<f64>| value.filter(|_| !direct);
        let times = rate.as_ref().map_or_else(String::new, |_| times(contestant));
        let rss = contestant.median(|round| Some(round.peak_rss as f64 / 1e6));
        let _infallible = writeln!(
            text,
            "    {:<32}{:>16}{times}   {:>9}{:>10}{:>9}   {:>7}",
            title(row, contestant.peer),
            speed(contestant, titles.digits),
            cost(contestant.system()),
            cost(unless_direct(row.added(contestant.peer))),
            cost(unless_direct(contestant.proxies())),
            shown(unless_direct(rss), 1),
        );
    }
}

/// Who is not held to what a row asks of the others is not to look as if it were.
fn title(row: &RowRecord, peer: Peer) -> String {
    let routed = matches!(
        row.work,
        Work::Requests {
            door: Door::Routed,
            ..
        }
    );
    if routed && peer == Peer::Bare {
        format!("{} (routing not checked)", peer.title())
    } else {
        peer.title().to_owned()
    }
}

/// Percentiles of the paced runs, and the proxies' delay in run queues.
fn times(contestant: &Contestant) -> String {
    let millis = |of: fn(&Paced) -> f64| {
        let micros = contestant.median(|round| round.paced.as_ref().map(of));
        shown(micros.map(|micros| micros / 1e3), 3)
    };
    let [p50, p99, p999] = [
        millis(|paced| paced.p50),
        millis(|paced| paced.p99),
        millis(|paced| paced.p999),
    ];
    let waiting = shown(contestant.median(Round::waiting).map(|seconds| seconds * 1e6), 0);
    format!("   {p50:>7} {p99:>7} {p999:>7}{waiting:>11}")
}

fn speed(contestant: &Contestant, digits: usize) -> String {
    let spread = contestant.spread(|round| Some(round.load.per_second()));
    match (contestant.per_second(), spread) {
        (Some(speed), Some(spread)) => format!("{} ±{:>2.0} %", grouped(speed, digits), spread * 100.0),
        _ => "–".to_owned(),
    }
}

fn judged(verdict: &Verdict) -> String {
    let bound = match verdict.bound {
        Bound::AtMost => "≤",
        Bound::AtLeast => "≥",
    };
    let target = format!("(target {bound} {})", verdict.limit);
    match (verdict.met(), verdict.measured) {
        (Some(met), Some(measured)) => {
            let mark = if met {
                coloured("32", "✓ met    ")
            } else {
                coloured("1;31", "✗ NOT met")
            };
            format!("{mark} {measured:>6.2} {target:<15} {}", verdict.what)
        }
        _ => format!(
            "– unknown        {target:<15} {}: {}",
            verdict.what,
            verdict.unknown.as_deref().unwrap_or("nothing was measured")
        ),
    }
}

fn noise(text: &mut String, record: &ScenarioRecord, cpus: usize) {
    let (foreign, steal) = record.disturbance(cpus);
    let spread = record.direct_spread().unwrap_or(0.0);
    let figures = format!(
        "others used up to {:.0} % of the CPUs, the hypervisor took up to {:.0} %, CPU of the direct runs ±{:.0} %",
        foreign * 100.0,
        steal * 100.0,
        spread * 100.0
    );
    let noisy = foreign > FOREIGN || steal > FOREIGN || spread > SPREAD;
    let verdict = if noisy {
        coloured("33", "NOISY: ")
    } else {
        "quiet: ".to_owned()
    };
    text.push('\n');
    line(text, &format!("{verdict}{figures}"));
}

fn line(text: &mut String, line: &str) {
    let _infallible = writeln!(text, "  {line}");
}

fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
}

/// 12,345.67
fn grouped(number: f64, digits: usize) -> String {
    let text = format!("{number:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

fn bold(text: &str) -> String {
    coloured("1", text)
}

fn coloured(code: &str, text: &str) -> String {
    if stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn digits_in_groups_of_three() {
        for (number, text) in [(7.0, "7"), (999.6, "1,000"), (1_234_567.0, "1,234,567")] {
            assert_eq!(grouped(number, 0), text);
        }
        assert_eq!(grouped(1234.567, 2), "1,234.57");
    }
}
