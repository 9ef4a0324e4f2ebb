//! Traffic in Prometheus' words. (prometheus-client appends `_total` to the names of counters.)

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;

use super::flag::Flag;
use super::histogram::Observed;
use super::http::{Cell, HttpRecorder};
use super::table::Table;
use super::tcp::TcpSeries;

#[derive(Debug)]
pub(super) struct Traffic {
    pub(super) http: Arc<Table<HttpRecorder>>,
    pub(super) tcp: Arc<Table<TcpSeries>>,
}

/// Name, help, where its values are, and what they are counted in.
type HistogramFamily = (&'static str, &'static str, fn(&Cell) -> Observed);
/// Name, help and where its value is.
type CounterFamily = (&'static str, &'static str, fn(&TcpSeries) -> u64);

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let http = self.http.all();
        encode_requests(&mut encoder, &http)?;
        let histograms: [HistogramFamily; 3] = [
            (
                "istio_request_duration_milliseconds",
                "Time from the arrival of a request to the end of its response",
                Cell::duration,
            ),
            (
                "istio_request_bytes",
                "Size of request bodies",
                Cell::request_bytes,
            ),
            (
                "istio_response_bytes",
                "Size of response bodies",
                Cell::response_bytes,
            ),
        ];
        for (name, help, histogram) in histograms {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for (labels, cell) in http.iter().flat_map(|recorder| recorder.cells()) {
                let observed = histogram(cell);
                family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
                    observed.sum,
                    observed.count,
                    &observed.buckets,
                    None,
                )?;
            }
        }
        encode_tcp(&mut encoder, &self.tcp.all())
    }
}

fn encode_requests(encoder: &mut DescriptorEncoder<'_>, http: &[Arc<HttpRecorder>]) -> fmt::Result {
    let mut family = encoder.encode_descriptor(
        "istio_requests",
        "HTTP and gRPC requests",
        None,
        MetricType::Counter,
    )?;
    for (labels, cell) in http.iter().flat_map(|recorder| recorder.cells()) {
        ConstCounter::new(cell.requests()).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn encode_tcp(encoder: &mut DescriptorEncoder<'_>, tcp: &[Arc<TcpSeries>]) -> fmt::Result {
    let counters: [CounterFamily; 3] = [
        (
            "istio_tcp_connections_opened",
            "TCP connections opened",
            TcpSeries::opened,
        ),
        (
            "istio_tcp_sent_bytes",
            "Bytes sent to clients over TCP connections",
            TcpSeries::sent,
        ),
        (
            "istio_tcp_received_bytes",
            "Bytes received from clients over TCP connections",
            TcpSeries::received,
        ),
    ];
    for (name, help, count) in counters {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for series in tcp.iter().filter(|series| !series.is_unused()) {
            let labels = series.labels(Flag::None);
            ConstCounter::new(count(series)).encode(family.encode_family(&labels)?)?;
        }
    }
    let mut family = encoder.encode_descriptor(
        "istio_tcp_connections_closed",
        "TCP connections closed",
        None,
        MetricType::Counter,
    )?;
    for series in tcp {
        for (flag, count) in series.closed() {
            ConstCounter::new(count).encode(family.encode_family(&series.labels(flag))?)?;
        }
    }
    Ok(())
}
