//! `mesh-agent get`: what an agent knows, as tables.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::SystemTime;

use anyhow::bail;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::client::{Client, parse};
use super::table::Table;
use super::{Format, Kind, Output, age, yaml};
use crate::admin::api::{
    Backend, Certificate, Connection, Ebpf, Mtls, Policy, Route, RouteMatch, Service, ServicePort, Workload,
};

/// What was asked for.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) kind: Kind,
    pub(super) name: Option<String>,
    pub(super) namespace: Option<String>,
}

pub(super) fn run(wanted: &Wanted, output: &Output, out: &mut impl Write) -> anyhow::Result<()> {
    let now = SystemTime::now();
    match wanted.kind {
        Kind::Workloads => list(wanted, output, out, workloads),
        Kind::Services => list(wanted, output, out, services),
        Kind::Routes => list(wanted, output, out, routes),
        Kind::Policies => list(wanted, output, out, policies),
        Kind::Certificates => list(wanted, output, out, |items, wide| certificates(items, wide, now)),
        Kind::Connections => list(wanted, output, out, |items, wide| connections(items, wide, now)),
        Kind::Ebpf => {
            if wanted.name.is_some() || wanted.namespace.is_some() {
                bail!("`get ebpf` takes neither a name nor a namespace: it is about the whole node");
            }
            let body = Client::new(&output.admin).get(wanted.kind.path())?;
            write(output, out, &body, ebpf)
        }
    }
}

fn list<T: Serialize + DeserializeOwned>(
    wanted: &Wanted,
    output: &Output,
    out: &mut impl Write,
    render: impl FnOnce(&Vec<T>, bool) -> String,
) -> anyhow::Result<()> {
    let body = Client::new(&output.admin).get(&wanted.path())?;
    let found: Vec<T> = parse(&body)?;
    if found.is_empty() && wanted.name.is_some() {
        bail!("{}", wanted.not_found());
    }
    if found.is_empty() && matches!(output.output, Format::Table | Format::Wide) {
        // Not on stdout, where a table would be.
        eprintln!("{}", wanted.not_found());
        return Ok(());
    }
    write(output, out, &body, render)
}

fn write<T: Serialize + DeserializeOwned>(
    output: &Output,
    out: &mut impl Write,
    body: &[u8],
    render: impl FnOnce(&T, bool) -> String,
) -> anyhow::Result<()> {
    let text = match output.output {
        Format::Json => return Ok(out.write_all(body)?),
        Format::Yaml => yaml(&parse::<T>(body)?)?,
        format => render(&parse(body)?, format == Format::Wide),
    };
    Ok(out.write_all(text.as_bytes())?)
}

impl Kind {
    fn path(self) -> &'static str {
        match self {
            Self::Workloads => "/api/v1/workloads",
            Self::Services => "/api/v1/services",
            Self::Routes => "/api/v1/routes",
            Self::Policies => "/api/v1/policies",
            Self::Certificates => "/api/v1/certificates",
            Self::Connections => "/api/v1/connections",
            Self::Ebpf => "/api/v1/ebpf",
        }
    }
}

impl Wanted {
    fn path(&self) -> String {
        let parameters = [("namespace", &self.namespace), ("name", &self.name)];
        let given = parameters
            .iter()
            .filter_map(|(key, value)| Some((key, value.as_ref()?)));
        let query: Vec<_> = given
            .map(|(key, value)| format!("{key}={}", encode(value)))
            .collect();
        match query.is_empty() {
            true => self.kind.path().to_owned(),
            false => format!("{}?{}", self.kind.path(), query.join("&")),
        }
    }

    fn not_found(&self) -> String {
        let kind = self.kind.path().rsplit('/').next().unwrap_or_default();
        let name = self
            .name
            .as_ref()
            .map(|name| format!(" named `{name}`"))
            .unwrap_or_default();
        let namespace = self
            .namespace
            .as_ref()
            .map(|namespace| format!(" in namespace `{namespace}`"));
        let hint = match (&self.name, &self.namespace) {
            (None, None) => "",
            _ => "; without a name and -n all are listed",
        };
        format!(
            "the agent knows no {kind}{name}{}{hint}",
            namespace.unwrap_or_default()
        )
    }
}

/// Percent-encoding of whatever is not a letter, a digit, or of a name's other characters.
fn encode(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'/');
    let encoded = value.bytes().map(|byte| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    });
    encoded.collect()
}

pub(super) fn workloads(items: &Vec<Workload>, wide: bool) -> String {
    let narrow = ["NAMESPACE", "NAME", "STATE", "NODE", "ADDRESSES", "MTLS"];
    let mut table = Table::new(&narrow, &["IDENTITY", "AGENT-DOWN", "PLACE", "SOURCE"], wide);
    for item in items {
        let state = match item.message.as_str() {
            "" => item.state.clone(),
            message => format!("{} ({message})", item.state),
        };
        table.row([
            item.namespace.clone(),
            item.name.clone(),
            state,
            item.node.clone(),
            item.addresses.join(","),
            if item.meshed {
                mtls(&item.mtls)
            } else {
                String::new()
            },
            item.identity.clone(),
            item.on_agent_down.clone(),
            item.place.clone().unwrap_or_default(),
            item.source.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

pub(super) fn services(items: &Vec<Service>, wide: bool) -> String {
    let narrow = ["NAMESPACE", "NAME", "ADDRESSES", "PORTS", "ENDPOINTS"];
    let mut table = Table::new(&narrow, &["ROUTES", "HOSTNAME", "SOURCE"], wide);
    for item in items {
        let ports = item
            .ports
            .iter()
            .map(|port| format!("{}/{}", port.port, port.protocol));
        table.row([
            item.namespace.clone(),
            item.name.clone(),
            if item.headless {
                "None".to_owned()
            } else {
                item.addresses.join(",")
            },
            ports.collect::<Vec<_>>().join(","),
            endpoints(&item.ports, wide),
            item.ports
                .iter()
                .map(|port| port.routes)
                .sum::<usize>()
                .to_string(),
            item.hostname.clone(),
            item.source.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

/// A few addresses like kubectl, all of them when there is room.
fn endpoints(ports: &[ServicePort], wide: bool) -> String {
    const FEW: usize = 3;
    let mut addresses: Vec<_> = ports
        .iter()
        .flat_map(|port| &port.endpoints)
        .map(|endpoint| &*endpoint.address)
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    let shown = if wide { addresses.len() } else { FEW };
    let listed = addresses
        .iter()
        .take(shown)
        .copied()
        .collect::<Vec<_>>()
        .join(",");
    match addresses.len().saturating_sub(shown) {
        0 => listed,
        more => format!("{listed} + {more} more"),
    }
}

pub(super) fn routes(items: &Vec<Route>, wide: bool) -> String {
    let narrow = ["NAMESPACE", "NAME", "SERVICE", "MATCHES", "BACKENDS"];
    let mut table = Table::new(&narrow, &["CLIENTS", "TIMEOUT", "TRY-TIMEOUT", "RETRIES"], wide);
    let milliseconds = |timeout: Option<u64>| timeout.map(|time| format!("{time}ms")).unwrap_or_default();
    for item in items {
        table.row([
            item.namespace.clone(),
            item.name.clone(),
            format!("{}:{}", item.service, item.port),
            matches(&item.matches),
            backends(&item.backends),
            item.clients.clone().unwrap_or_default(),
            milliseconds(item.request_timeout_ms),
            milliseconds(item.try_timeout_ms),
            item.retries.to_string(),
        ]);
    }
    table.render()
}

fn matches(matches: &RouteMatch) -> String {
    let parts = matches
        .method
        .iter()
        .chain(&matches.path)
        .chain(&matches.headers)
        .chain(&matches.query);
    match parts.map(String::as_str).collect::<Vec<_>>().join(" ") {
        all if all.is_empty() => "*".to_owned(),
        some => some,
    }
}

/// With shares in percent where there are several.
fn backends(backends: &[Backend]) -> String {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let share = |backend: &Backend| {
        let name = backend.service.as_deref().unwrap_or("nowhere");
        match (backends.len(), u64::from(backend.weight) * 100) {
            (1, _) => name.to_owned(),
            (_, weight) => format!("{name} {}%", weight.checked_div(total).unwrap_or(0)),
        }
    };
    backends.iter().map(share).collect::<Vec<_>>().join(", ")
}

pub(super) fn policies(items: &Vec<Policy>, wide: bool) -> String {
    let mut table = Table::new(&["NAMESPACE", "NAME", "MTLS", "AGENT-DOWN"], &[], wide);
    for item in items {
        table.row([
            item.namespace.clone(),
            item.name.clone(),
            mtls(&item.mtls),
            item.on_agent_down.clone(),
        ]);
    }
    table.render()
}

/// `strict`, or `strict, 9090 permissive`.
fn mtls(mtls: &Mtls) -> String {
    let ports = |(port, mode): (&u16, &String)| format!(", {port} {mode}");
    mtls.mode.clone() + &mtls.ports.iter().map(ports).collect::<String>()
}

pub(super) fn certificates(items: &Vec<Certificate>, wide: bool, now: SystemTime) -> String {
    let narrow = ["NAMESPACE", "NAME", "STATE", "ENDS-IN"];
    let mut table = Table::new(&narrow, &["IDENTITY", "SERIAL", "NOT-BEFORE", "NOT-AFTER"], wide);
    for item in items {
        let state = match &item.error {
            None => item.state.clone(),
            Some(error) => format!("{} ({error})", item.state),
        };
        table.row([
            item.namespace.clone(),
            item.name.clone(),
            state,
            age::until(item.not_after.as_deref(), now),
            item.identity.clone(),
            item.serial.clone().unwrap_or_default(),
            item.not_before.clone().unwrap_or_default(),
            item.not_after.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

pub(super) fn connections(items: &Vec<Connection>, wide: bool, now: SystemTime) -> String {
    let narrow = [
        "NAMESPACE",
        "NAME",
        "DIRECTION",
        "PROTOCOL",
        "PEER",
        "DESTINATION",
        "RECEIVED",
        "SENT",
        "AGE",
    ];
    let mut table = Table::new(&narrow, &["PEER-IDENTITY"], wide);
    for item in items {
        table.row([
            item.namespace.clone(),
            item.name.clone(),
            item.direction.clone(),
            item.protocol.clone(),
            item.peer.clone(),
            item.destination.clone(),
            item.bytes_received.to_string(),
            item.bytes_sent.to_string(),
            age::since(&item.start_time, now),
            item.peer_identity.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

pub(super) fn ebpf(state: &Ebpf, wide: bool) -> String {
    let mut tables = vec![Table::new(
        &["STATE", "KERNEL", "LAYOUT", "BPFFS"],
        &["MESSAGE"],
        wide,
    )];
    let message = match state.message.as_str() {
        "" => state.state.clone(),
        message => format!("{} ({message})", state.state),
    };
    let kernel = state.kernel.clone();
    tables[0].row([
        message,
        kernel,
        state.layout.clone(),
        state.bpffs.clone(),
        String::new(),
    ]);
    let mut features = Table::new(&["FEATURE", "PRESENT", "SINCE", "WITHOUT"], &[], wide);
    for feature in state.features.iter().filter(|feature| wide || !feature.present) {
        features.row([
            feature.name.clone(),
            feature.present.to_string(),
            feature.since.clone(),
            feature.without.clone(),
        ]);
    }
    let mut hooks = Table::new(&["HOOK", "PROGRAM", "LINK"], &[], wide);
    for hook in &state.hooks {
        hooks.row([
            hook.name.clone(),
            hook.program_id.to_string(),
            hook.link_id.to_string(),
        ]);
    }
    let mut maps = Table::new(&["MAP", "ENTRIES", "CAPACITY"], &[], wide);
    for map in &state.maps {
        maps.row([
            map.name.clone(),
            map.entries.to_string(),
            map.capacity.to_string(),
        ]);
    }
    let mut workloads = Table::new(
        &["WORKLOAD", "ADDRESSES", "AGENT-DOWN", "SERVED"],
        &["OUTBOUND", "INBOUND"],
        wide,
    );
    for workload in &state.workloads {
        workloads.row([
            workload.key.clone(),
            workload.addresses.join(","),
            if workload.hold { "hold" } else { "open" }.to_owned(),
            workload.served.to_string(),
            workload.outbound_port.to_string(),
            workload.inbound_port.to_string(),
        ]);
    }
    if wide || state.features.iter().any(|feature| !feature.present) {
        tables.push(features);
    }
    tables.extend([hooks, maps, workloads, counters(&state.counters, wide)]);
    tables.iter().map(Table::render).collect::<Vec<_>>().join("\n")
}

/// Those that never counted are shown when there is room.
fn counters(counters: &BTreeMap<String, u64>, wide: bool) -> Table {
    let mut table = Table::new(&["COUNTER", "COUNT"], &[], wide);
    for (name, count) in counters.iter().filter(|(_, count)| wide || **count > 0) {
        table.row([name.clone(), count.to_string()]);
    }
    table
}
