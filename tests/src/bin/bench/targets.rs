//! What is to be reached, as ratios within one run, and whether it was.

use serde::Serialize;

use crate::args::{Name, Peer};
use crate::record::{Figure, RowRecord, ScenarioRecord};
use crate::scenario::{Unit, Work};
use crate::stats::median;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Verdict {
    /// Its row's label, if it is about one.
    pub(crate) row: Option<String>,
    pub(crate) what: String,
    pub(crate) measured: Option<f64>,
    /// Why nothing is measured.
    pub(crate) unknown: Option<String>,
    pub(crate) limit: f64,
    pub(crate) bound: Bound,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Bound {
    AtMost,
    AtLeast,
}

impl Verdict {
    pub(crate) fn met(&self) -> Option<bool> {
        self.measured.map(|measured| match self.bound {
            Bound::AtMost => measured <= self.limit,
            Bound::AtLeast => measured >= self.limit,
        })
    }
}

/// A figure of one contestant in one row.
type Measure = fn(&RowRecord, Peer) -> Option<f64>;

const SYSTEM: (&str, Measure) = ("CPU of the whole system minus direct", |row, peer| {
    row.added(peer)
});
const PROXY: (&str, Measure) = ("CPU of the proxy alone", |row, peer| {
    row.contestant(peer)?.proxies()
});
const WHOLE: (&str, Measure) = ("CPU of the whole system", |row, peer| {
    row.contestant(peer)?.system()
});
const SPEED: (&str, Measure) = ("speed", |row, peer| row.contestant(peer)?.per_second());
const PER_CPU_SECOND: (&str, Measure) = (
    "Gbit per CPU second of the whole system minus direct",
    |row, peer| Some(1.0 / row.added(peer)?),
);
const P50: (&str, Measure) = ("added p50", |row, peer| {
    added_latency(row, peer, |paced| paced.p50)
});
const P99: (&str, Measure) = ("added p99", |row, peer| {
    added_latency(row, peer, |paced| paced.p99)
});

pub(crate) fn judge(record: &ScenarioRecord) -> Vec<Verdict> {
    let rows = record.rows.iter();
    match record.name {
        Name::L7SameNode => rows
            .filter(|row| connections(row) == 32)
            .flat_map(l7_same_node)
            .collect(),
        Name::L7TwoNodes => rows.flat_map(l7_two_nodes).collect(),
        Name::L4TwoNodes => {
            let bulk: Vec<&RowRecord> = rows.filter(|row| row.work.unit() == Unit::Gigabit).collect();
            let per_cpu_second = bulk
                .iter()
                .map(|row| ratio_over(row, PER_CPU_SECOND, Peer::Ztunnel, 1.5));
            per_cpu_second.chain(one_flow(&bulk)).collect()
        }
        Name::Connect => rows
            .map(|row| ratio(row, SYSTEM, &[Peer::Ztunnel], 0.5))
            .collect(),
        Name::FastPath => rows.flat_map(fast_path).collect(),
        Name::Idle | Name::Churn | Name::Soak => record.figures.iter().filter_map(at_most).collect(),
    }
}

fn at_most(figure: &Figure) -> Option<Verdict> {
    Some(Verdict {
        row: None,
        what: format!("{}, {}", figure.what, figure.unit),
        measured: median(figure.values.iter().copied()),
        unknown: None,
        limit: figure.target?,
        bound: Bound::AtMost,
    })
}

fn l7_same_node(row: &RowRecord) -> Vec<Verdict> {
    vec![
        ratio(row, SYSTEM, &[Peer::Nginx, Peer::Haproxy], 0.6),
        ratio(row, SYSTEM, &[Peer::Envoy], 0.25),
        ratio(row, PROXY, &[Peer::Nginx, Peer::Haproxy], 0.8),
        ratio(row, PROXY, &[Peer::Envoy], 0.3),
    ]
}

fn l7_two_nodes(row: &RowRecord) -> Vec<Verdict> {
    let (ztunnel, envoy) = if connections(row) == 1 {
        (0.8, 0.3)
    } else {
        (0.6, 0.27)
    };
    vec![
        ratio(row, SYSTEM, &[Peer::Ztunnel], ztunnel),
        ratio(row, SYSTEM, &[Peer::Envoy], envoy),
        ratio(row, P50, &[Peer::Ztunnel], 1.0),
        ratio(row, P50, &[Peer::Envoy], 1.0),
        ratio(row, P99, &[Peer::Ztunnel], 1.0),
        ratio(row, P99, &[Peer::Envoy], 1.0),
    ]
}

fn fast_path(row: &RowRecord) -> Vec<Verdict> {
    vec![
        ratio_over(row, SPEED, Peer::None, 0.97),
        ratio(row, WHOLE, &[Peer::None], 1.05),
    ]
}

/// That one flow is not slower than eight.
fn one_flow(bulk: &[&RowRecord]) -> Option<Verdict> {
    let speed = |flows| {
        let row = bulk.iter().find(|row| row.work == Work::Bulk { flows })?;
        row.contestant(Peer::Agent)?.per_second()
    };
    Some(Verdict {
        row: None,
        unknown: None,
        what: "Gbit/s of one flow, of eight flows'".to_owned(),
        measured: speed(1).zip(speed(8)).map(|(one, eight)| one / eight),
        limit: 1.0,
        bound: Bound::AtLeast,
    })
}

/// Where more is better.
fn ratio_over(row: &RowRecord, figure: (&str, Measure), peer: Peer, limit: f64) -> Verdict {
    Verdict {
        bound: Bound::AtLeast,
        ..ratio(row, figure, &[peer], limit)
    }
}

/// The agent's figure over the best one of the peers, all of whom have to have taken part.
fn ratio(row: &RowRecord, (what, figure): (&str, Measure), peers: &[Peer], limit: f64) -> Verdict {
    let theirs: Vec<Option<f64>> = peers.iter().map(|peer| figure(row, *peer)).collect();
    let missing = peers.iter().zip(&theirs).find(|(_, figure)| figure.is_none());
    let best = theirs.iter().copied().flatten().min_by(f64::total_cmp);
    let names: Vec<&str> = peers.iter().map(|peer| peer.title()).collect();
    let (measured, unknown) = match (figure(row, Peer::Agent), missing, best) {
        (None, ..) => (None, Some("the agent has no figure".to_owned())),
        (_, Some((peer, _)), _) => (None, Some(format!("{} has no figure", peer.title()))),
        (Some(ours), None, Some(best)) if best > 0.0 => (Some((ours / best).max(0.0)), None),
        _ => (None, Some("theirs is lost in the noise".to_owned())),
    };
    Verdict {
        row: Some(row.label.clone()),
        what: format!("{what}, of {}'s", names.join(" or ")),
        measured,
        unknown,
        limit,
        bound: Bound::AtMost,
    }
}

fn added_latency(row: &RowRecord, peer: Peer, of: fn(&crate::generator::Paced) -> f64) -> Option<f64> {
    let median = |peer| row.contestant(peer)?.median(|round| round.paced.as_ref().map(of));
    Some(median(peer)? - median(Peer::None)?)
}

fn connections(row: &RowRecord) -> usize {
    match row.work {
        Work::Requests { connections, .. } => connections,
        Work::Bulk { flows } => flows,
        Work::Connect { at_once } => at_once,
    }
}
