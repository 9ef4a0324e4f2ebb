//! What the mesh itself answers: addresses of its services. No I/O.
//!
//! Invariants: only a well-formed question for the name of a service that exists is answered, with an address or
//! with "exists, but has none of that kind"; anything else is left, byte for byte, to the server that was asked.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::SOA;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use crate::model::{Service, ServiceKey, Snapshot};

/// Seconds; virtual addresses rarely change. Istio's value.
const TTL: u32 = 30;
/// Seconds; a headless service's endpoints come and go, and what is missing now may be there soon.
const SHORT_TTL: u32 = 5;
/// Without EDNS (RFC 1035, section 4.2.1).
const PLAIN_UDP_SIZE: u16 = 512;
/// The largest answer over UDP, whatever the client says: a usual limit, and it never leaves the machine.
const MAX_UDP_SIZE: u16 = 4096;
/// Of a headless service's endpoints this many are answered; with IPv6 addresses they fill half a message.
const MAX_RECORDS: usize = 1000;

/// What a client sees: the mesh, from its own namespace.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub snapshot: &'a Snapshot,
    /// The client's, for short names.
    pub namespace: &'a str,
    /// `cluster.local`
    pub cluster_domain: &'a str,
}

/// How the answer travels, which bounds its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    Udp,
    Tcp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Reply(Vec<u8>),
    /// The mesh has no say: ask the server that the client asked.
    Forward,
}

/// Decides about one query.
pub fn answer(view: View<'_>, carrier: Carrier, query: &[u8]) -> Answer {
    let reply = Question::read(query).and_then(|question| reply(view, carrier, question));
    reply.map_or(Answer::Forward, Answer::Reply)
}

/// The same query answered with "the server failed": clients then ask their next server at once.
pub(super) fn server_failure(query: &[u8]) -> Option<Vec<u8>> {
    let metadata = Header::read(&mut BinDecoder::new(query)).ok()?.metadata;
    if metadata.message_type != MessageType::Query {
        return None;
    }
    let mut reply = Message::error_msg(metadata.id, metadata.op_code, ResponseCode::ServFail);
    reply.metadata.recursion_desired = metadata.recursion_desired;
    if let Some(question) = Question::read(query) {
        reply.add_query(question.query);
    }
    reply.to_vec().ok()
}

/// A query with exactly one question and nothing that we do not understand.
struct Question {
    metadata: Metadata,
    query: Query,
    edns: Option<Edns>,
}

impl Question {
    fn read(query: &[u8]) -> Option<Self> {
        let mut decoder = BinDecoder::new(query);
        let Header { metadata, counts } = Header::read(&mut decoder).ok()?;
        let asks = metadata.message_type == MessageType::Query && metadata.op_code == OpCode::Query;
        // Checked before anything is read, so that no count in the header costs memory.
        if !asks || counts.queries != 1 || counts.additionals > 1 {
            return None;
        }
        if counts.answers > 0 || counts.authorities > 0 {
            return None;
        }
        let query = Query::read(&mut decoder).ok()?;
        let (others, edns, signature) =
            Message::read_records(&mut decoder, counts.additionals.into(), true, metadata.op_code).ok()?;
        let understood = others.is_empty() && signature.is_none() && decoder.is_empty();
        (understood && query.query_class() == DNSClass::IN).then_some(Self {
            metadata,
            query,
            edns,
        })
    }
}

fn reply(view: View<'_>, carrier: Carrier, question: Question) -> Option<Vec<u8>> {
    let Question {
        metadata,
        query,
        edns,
    } = question;
    let (service, zone) = find(view, query.name())?;
    let mut reply = Message::response(metadata.id, OpCode::Query);
    reply.metadata = Metadata::response_from_request(&metadata);
    reply.metadata.authoritative = true;
    reply.metadata.recursion_available = true;
    if edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        reply.metadata.response_code = ResponseCode::BADVERS;
    } else {
        reply.add_answers(records(service, &query, metadata.id));
        if reply.answers.is_empty() {
            reply.add_authority(start_of_authority(zone, view.snapshot.generation)?);
        }
    }
    let limit = match (carrier, &edns) {
        (Carrier::Tcp, _) => u16::MAX,
        (Carrier::Udp, None) => PLAIN_UDP_SIZE,
        (Carrier::Udp, Some(edns)) => edns.max_payload().clamp(PLAIN_UDP_SIZE, MAX_UDP_SIZE),
    };
    if let Some(asked) = edns {
        let mut ours = Edns::new();
        ours.set_max_payload(MAX_UDP_SIZE);
        ours.set_dnssec_ok(asked.flags().dnssec_ok);
        reply.set_edns(ours);
    }
    reply.add_query(query);

    let bytes = reply.to_vec().ok()?;
    if bytes.len() <= usize::from(limit) {
        return Some(bytes);
    }
    reply.truncate().to_vec().ok()
}

/// The service that a name stands for, and the zone that such names are in.
///
/// Full names are `<name>.<namespace>.svc.<cluster domain>`; the forms that search lists shorten them to are
/// understood too, for resolvers that do not search.
fn find<'a>(view: View<'a>, name: &Name) -> Option<(&'a Service, Name)> {
    let lower: Vec<String> = name
        .iter()
        .map(|label| Some(str::from_utf8(label).ok()?.to_ascii_lowercase()))
        .collect::<Option<_>>()?;
    let labels: Vec<&str> = lower.iter().map(String::as_str).collect();
    let domain = view.cluster_domain.to_ascii_lowercase();
    let domain: Vec<&str> = domain.split_terminator('.').collect();

    let (namespace, service, zone) = match labels.strip_suffix(domain.as_slice()) {
        Some(&[service, namespace, "svc"]) => (namespace, service, Name::from_labels(domain).ok()?),
        Some(_) => return None,
        None => match labels[..] {
            [service, namespace, "svc"] | [service, namespace] => (namespace, service, name.clone()),
            [service] => (view.namespace, service, name.clone()),
            _ => return None,
        },
    };
    let key = ServiceKey {
        namespace: namespace.into(),
        name: service.into(),
    };
    Some((view.snapshot.services.get(&key)?, zone))
}

/// The service's addresses of the kind that was asked for. Which one comes first differs from query to query
/// where there are endpoints to choose from: many clients take the first.
fn records(service: &Service, query: &Query, id: u16) -> Vec<Record> {
    let wanted = |ip: &IpAddr| match query.query_type() {
        RecordType::A => ip.is_ipv4(),
        RecordType::AAAA => ip.is_ipv6(),
        RecordType::ANY => true,
        _ => false,
    };
    let (mut addresses, ttl): (Vec<IpAddr>, u32) = match service.headless {
        true => (endpoints(service), SHORT_TTL),
        false => (service.vips.clone(), TTL),
    };
    addresses.retain(wanted);
    if service.headless && !addresses.is_empty() {
        let first = usize::from(id) % addresses.len();
        addresses.rotate_left(first);
    }
    addresses
        .into_iter()
        .take(MAX_RECORDS)
        .map(|ip| {
            let data = match ip {
                IpAddr::V4(ip) => RData::A(ip.into()),
                IpAddr::V6(ip) => RData::AAAA(ip.into()),
            };
            Record::from_rdata(query.name().clone(), ttl, data)
        })
        .collect()
}

/// Each ready endpoint once, whichever ports it serves.
fn endpoints(service: &Service) -> Vec<IpAddr> {
    let ports = service.ports.iter().flat_map(|port| port.endpoints.iter());
    let mut addresses: Vec<IpAddr> = ports
        .map(|endpoint| endpoint.address.ip().to_canonical())
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Says for how long "there is none" holds; without it some resolvers take the answer for a broken one.
fn start_of_authority(zone: Name, generation: u64) -> Option<Record> {
    const REFRESH: i32 = 7200;
    const RETRY: i32 = 1800;
    const EXPIRE: i32 = 86400;
    let under = |label: &str| zone.prepend_label(label).ok();
    let serial = u32::try_from(generation & u64::from(u32::MAX)).ok()?;
    let soa = SOA::new(
        under("ns")?,
        under("hostmaster")?,
        serial,
        REFRESH,
        RETRY,
        EXPIRE,
        SHORT_TTL,
    );
    Some(Record::from_rdata(zone, SHORT_TTL, RData::SOA(soa)))
}
