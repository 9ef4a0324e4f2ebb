//! What the mesh answers, and what it leaves alone, hostile queries included.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::model::{Endpoint, LoadBalancing, Protocol, Service, ServiceKey, ServicePort, Snapshot};

use super::answer::server_failure;
use super::{Answer, Carrier, View, answer};

pub(super) fn snapshot() -> Snapshot {
    let pods: Vec<String> = (1..=60).map(|last| format!("10.1.0.{last}")).collect();
    let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
    let mut snapshot = Snapshot::default();
    for service in [
        service("shop", "reviews", &["10.96.0.1"], None),
        service("shop", "dual", &["10.96.0.2", "fd00::2"], None),
        service("other", "reviews", &["10.96.0.3"], None),
        service("shop", "db", &[], Some(&["10.1.0.8", "10.1.0.9", "fd00::8"])),
        service("shop", "idle", &[], Some(&[])),
        service("shop", "large", &[], Some(&pods)),
    ] {
        snapshot.services.insert(service.key.clone(), Arc::new(service));
    }
    snapshot
}

fn service(namespace: &str, name: &str, vips: &[&str], endpoints: Option<&[&str]>) -> Service {
    let ip = |ip: &&str| ip.parse::<IpAddr>().unwrap();
    let endpoint = |ip: IpAddr| Endpoint {
        address: SocketAddr::new(ip, 8080),
        workload: None,
        load: Arc::default(),
    };
    let port = |port: u16| ServicePort {
        port,
        name: None,
        protocol: Protocol::Tcp,
        balancing: LoadBalancing::RoundRobin,
        endpoints: endpoints
            .unwrap_or_default()
            .iter()
            .map(ip)
            .map(endpoint)
            .collect(),
        routes: Arc::default(),
        consumer_routes: std::collections::BTreeMap::default(),
    };
    let key = ServiceKey {
        namespace: namespace.into(),
        name: name.into(),
    };
    Service {
        header: key.to_header(),
        key,
        hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
        vips: vips.iter().map(ip).collect(),
        headless: endpoints.is_some(),
        fast_path: true,
        ports: vec![port(80), port(81)],
    }
}

pub(super) fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn ask_raw(carrier: Carrier, bytes: &[u8]) -> Answer {
    let view = View {
        snapshot: &snapshot(),
        namespace: "shop",
        cluster_domain: "cluster.local",
    };
    answer(view, carrier, bytes)
}

fn ask_message(query: &Message) -> Option<Message> {
    match ask_raw(Carrier::Udp, &query.to_vec().unwrap()) {
        Answer::Reply(reply) => Some(Message::from_vec(&reply).unwrap()),
        Answer::Forward => None,
    }
}

fn ask(name: &str, kind: RecordType) -> Option<Message> {
    ask_message(&query(name, kind))
}

pub(super) fn addresses(message: &Message) -> Vec<String> {
    let address = |record: &Record| match &record.data {
        RData::A(ip) => ip.0.to_string(),
        RData::AAAA(ip) => ip.0.to_string(),
        other => panic!("{other}"),
    };
    message.answers.iter().map(address).collect()
}

#[test]
fn services_have_all_their_names() {
    for name in [
        "reviews.",
        "reviews.shop.",
        "reviews.shop.svc.",
        "reviews.shop.svc.cluster.local.",
        "reviews.shop.svc.cluster.local",
        "REVIEWS.Shop.sVc.CLUSTER.local.",
    ] {
        let reply = ask(name, RecordType::A).unwrap_or_else(|| panic!("{name} was forwarded"));
        assert_eq!(addresses(&reply), ["10.96.0.1"], "{name}");
        assert_eq!(reply.answers[0].ttl, 30);
        assert!(reply.authoritative && reply.recursion_available && reply.recursion_desired);
        assert_eq!(reply.response_code, ResponseCode::NoError);
    }
    let elsewhere = ask("reviews.other.", RecordType::A).unwrap();
    assert_eq!(addresses(&elsewhere), ["10.96.0.3"]);
}

#[test]
fn other_names_go_on() {
    for name in [
        ".",
        "example.com.",
        "ratings.",
        "ratings.shop.svc.cluster.local.",
        "reviews.nowhere.svc.cluster.local.",
        "svc.cluster.local.",
        "cluster.local.",
        "shop.svc.cluster.local.",
        "reviews.shop.cluster.local.",
        "reviews.cluster.local.",
        "pod.reviews.shop.svc.cluster.local.",
        "reviews.shop.svc.cluster.local.shop.svc.cluster.local.",
        "reviews.shop.svc.cluster.local.example.com.",
        "reviews.shop.pod.cluster.local.",
        r"reviews\.shop.",
    ] {
        assert_eq!(ask(name, RecordType::A), None, "{name}");
    }
    let mut odd = query(".", RecordType::A);
    odd.queries[0].set_name(Name::from_labels([&b"\xffreviews"[..], b"shop"]).unwrap());
    assert_eq!(ask_message(&odd), None);
}

#[test]
fn the_question_comes_back_as_it_was_asked() {
    let asked = query("rEvIeWs.ShOp.", RecordType::A);
    let reply = ask_message(&asked).unwrap();
    assert_eq!(reply.id, asked.id);
    assert!(reply.queries[0].name().eq_case(asked.queries[0].name()));
    assert!(reply.answers[0].name.eq_case(asked.queries[0].name()));
}

#[test]
fn a_missing_family_is_said_to_be_missing() {
    for (name, kind) in [
        ("reviews.shop.svc.cluster.local.", RecordType::AAAA),
        ("reviews.", RecordType::AAAA),
        ("reviews.shop.", RecordType::HTTPS),
        ("reviews.shop.", RecordType::MX),
        ("idle.shop.", RecordType::A),
    ] {
        let reply = ask(name, kind).unwrap();
        assert_eq!(reply.response_code, ResponseCode::NoError);
        assert_eq!(reply.answers, [], "{name} {kind}");
        let [soa] = &reply.authorities[..] else {
            panic!("{name} {kind}: no SOA")
        };
        assert!(matches!(&soa.data, RData::SOA(soa) if soa.minimum == 5));
        assert!(soa.name.zone_of(reply.queries[0].name()), "{}", soa.name);
    }
}

#[test]
fn both_families_and_headless_services() {
    for (name, kind, expected) in [
        ("dual.", RecordType::A, vec!["10.96.0.2"]),
        ("dual.", RecordType::AAAA, vec!["fd00::2"]),
        ("dual.", RecordType::ANY, vec!["10.96.0.2", "fd00::2"]),
        ("db.", RecordType::A, vec!["10.1.0.8", "10.1.0.9"]),
        ("db.", RecordType::AAAA, vec!["fd00::8"]),
    ] {
        let mut found = addresses(&ask(name, kind).unwrap());
        found.sort();
        assert_eq!(found, expected, "{name} {kind}");
    }
}

#[test]
fn endpoints_take_turns_in_being_first() {
    let firsts: std::collections::BTreeSet<String> = (0..2)
        .map(|id| {
            let mut asked = query("db.", RecordType::A);
            asked.metadata.id = id;
            addresses(&ask_message(&asked).unwrap()).remove(0)
        })
        .collect();
    assert_eq!(firsts.len(), 2);
}

#[test]
fn edns_is_answered_in_kind() {
    let mut asked = query("reviews.", RecordType::A);
    assert_eq!(ask_message(&asked).unwrap().edns, None);

    let mut edns = Edns::new();
    edns.set_max_payload(1232);
    edns.set_dnssec_ok(true);
    asked.set_edns(edns.clone());
    let reply = ask_message(&asked).unwrap();
    let ours = reply.edns.as_ref().unwrap();
    assert_eq!((ours.version(), ours.flags().dnssec_ok), (0, true));
    assert_eq!(addresses(&reply), ["10.96.0.1"]);

    edns.set_version(1);
    asked.set_edns(edns);
    let reply = ask_message(&asked).unwrap();
    // The same number has two names.
    assert_eq!(u16::from(reply.response_code), u16::from(ResponseCode::BADVERS));
    assert_eq!(reply.answers, []);
}

#[test]
fn too_large_for_udp_is_said_to_be_truncated() {
    let mut asked = query("large.", RecordType::A);
    let plain = ask_message(&asked).unwrap();
    assert!(plain.truncation && plain.answers.is_empty());
    assert_eq!(plain.queries, asked.queries);

    let Answer::Reply(whole) = ask_raw(Carrier::Tcp, &asked.to_vec().unwrap()) else {
        panic!("forwarded");
    };
    assert!(whole.len() > 512);
    let whole = Message::from_vec(&whole).unwrap();
    assert!(!whole.truncation);
    assert_eq!(whole.answers.len(), 60);

    let mut edns = Edns::new();
    edns.set_max_payload(1232);
    asked.set_edns(edns);
    assert_eq!(ask_message(&asked).unwrap().answers.len(), 60);
}

#[test]
fn what_is_not_one_plain_question_goes_on() {
    let good = query("reviews.", RecordType::A);
    let change = |change: &dyn Fn(&mut Message)| {
        let mut message = good.clone();
        change(&mut message);
        message
    };
    let record = Record::from_rdata(Name::root(), 0, RData::A(A::new(10, 0, 0, 1)));
    for odd in [
        change(&|message| message.queries.clear()),
        change(&|message| message.queries.extend_from_within(..)),
        change(&|message| message.metadata.op_code = OpCode::Notify),
        change(&|message| message.metadata.op_code = OpCode::Update),
        change(&|message| *message = message.clone().into_response()),
        change(&|message| message.answers.push(record.clone())),
        change(&|message| message.authorities.push(record.clone())),
        change(&|message| message.additionals.push(record.clone())),
        change(&|message| {
            message.queries[0].set_query_class(DNSClass::CH);
        }),
    ] {
        assert_eq!(ask_message(&odd), None, "{odd}");
    }
}

#[test]
fn hostile_packets_go_on() {
    let header = |counts: [u16; 4]| {
        let mut bytes = vec![0x12, 0x34, 1, 0];
        bytes.extend(counts.iter().flat_map(|count| count.to_be_bytes()));
        bytes
    };
    let packet = |counts, rest: &[u8]| [header(counts).as_slice(), rest].concat();
    let good = query("reviews.", RecordType::A).to_vec().unwrap();
    let long_label = [&[64][..], &[b'a'; 64], &[0, 0, 1, 0, 1]].concat();
    let long_name = [[3, b'a', b'b', b'c'].repeat(100), vec![0, 0, 1, 0, 1]].concat();
    for (what, bytes) in [
        ("nothing", vec![]),
        ("one byte", vec![0]),
        ("half a header", header([1, 0, 0, 0])[..7].to_vec()),
        ("only a header", header([1, 0, 0, 0])),
        ("zero questions", header([0, 0, 0, 0])),
        (
            "all counts at their most",
            packet([u16::MAX; 4], &[0, 0, 1, 0, 1]),
        ),
        (
            "counts that add up to zero",
            packet([1, 1, u16::MAX, 0], &good[12..]),
        ),
        (
            "a pointer to itself",
            packet([1, 0, 0, 0], &[0xc0, 12, 0, 1, 0, 1]),
        ),
        (
            "a pointer ahead",
            packet([1, 0, 0, 0], &[0xc0, 14, 0xc0, 12, 0, 1, 0, 1]),
        ),
        (
            "a loop through a label",
            packet([1, 0, 0, 0], &[1, b'a', 0xc0, 12, 0, 1, 0, 1]),
        ),
        (
            "a pointer past the end",
            packet([1, 0, 0, 0], &[0xff, 0xff, 0, 1, 0, 1]),
        ),
        ("a label of 64", packet([1, 0, 0, 0], &long_label)),
        ("a name of 400", packet([1, 0, 0, 0], &long_name)),
        ("a name without end", packet([1, 0, 0, 0], &[3, b'a', b'b'])),
        ("no type", packet([1, 0, 0, 0], &[1, b'a', 0])),
        ("64 KiB of zeros", vec![0; 65_535]),
        ("64 KiB of pointers", packet([1, 0, 0, 0], &[0xc0; 65_000])),
        ("something after the question", [good.as_slice(), &[0]].concat()),
        (
            "half of a record",
            packet([1, 0, 0, 1], &[&good[12..], &[0, 0, 41]].concat()),
        ),
    ] {
        assert_eq!(ask_raw(Carrier::Udp, &bytes), Answer::Forward, "{what}");
        assert_eq!(ask_raw(Carrier::Tcp, &bytes), Answer::Forward, "{what}");
        let _no_panic = server_failure(&bytes);
    }
}

#[test]
fn mangled_queries_do_no_harm() {
    let mut random = fastrand::Rng::with_seed(7);
    let mut asked = query("reviews.shop.svc.cluster.local.", RecordType::A);
    asked.set_edns(Edns::new());
    let good = asked.to_vec().unwrap();
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        bytes.truncate(random.usize(1..=bytes.len()));
        for _ in 0..random.usize(0..4) {
            let at = random.usize(..bytes.len());
            bytes[at] = random.u8(..);
        }
        if let Answer::Reply(reply) = ask_raw(Carrier::Udp, &bytes) {
            let reply = Message::from_vec(&reply).unwrap();
            assert_eq!(reply.id.to_be_bytes(), bytes[..2]);
            assert_eq!(reply.queries.len(), 1);
        }
        let _no_panic = server_failure(&bytes);
    }
}

#[test]
fn a_failure_repeats_the_question() {
    let asked = query("example.com.", RecordType::A);
    let reply = Message::from_vec(&server_failure(&asked.to_vec().unwrap()).unwrap()).unwrap();
    assert_eq!(reply.response_code, ResponseCode::ServFail);
    assert_eq!((reply.id, &reply.queries), (asked.id, &asked.queries));
    let response = asked.into_response().to_vec().unwrap();
    assert_eq!(server_failure(&response), None, "an answer is never answered");
}
