use std::cell::{Cell, RefCell};
use std::io;

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use super::*;
use crate::config::tests::Mesh;

const POD: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: NAME
  namespace: shop
  labels: {app: NAME}
  annotations: {mesh-agent.dev/netns: /run/netns/NAME}
spec: {nodeName: node-a}
status: {podIP: 10.1.0.KEY}
---";

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: db}, ports: [{name: tcp, port: 5432, targetPort: 9}]}
";

const WEB: Key = 2;
const DB: Key = 9;

type Backends = Vec<(Key, SocketAddr)>;

/// Does as it is told, unless it fails.
#[derive(Default)]
struct Fake {
    open: RefCell<HashMap<(Key, SocketAddr), Backends>>,
    /// An old kernel.
    lacks: Cell<bool>,
    /// Opening for this client fails.
    refuses: Cell<Option<Key>>,
    /// Closing fails.
    keeps: Cell<bool>,
    traffic: RefCell<Vec<(FastPair, FastTraffic)>>,
    /// What has nothing new.
    idle: RefCell<HashSet<FastPair>>,
}

impl Kernel for Fake {
    fn has_fast_path(&self) -> bool {
        !self.lacks.get()
    }

    fn open(&self, client: Key, to: SocketAddr, backends: &[(Key, SocketAddr)]) -> Result<(), CaptureError> {
        if self.refuses.get() == Some(client) {
            return Err(failure());
        }
        self.open.borrow_mut().insert((client, to), backends.to_vec());
        Ok(())
    }

    fn close(&self, client: Key, to: SocketAddr) -> Result<(), CaptureError> {
        if self.keeps.get() {
            return Err(failure());
        }
        self.open.borrow_mut().remove(&(client, to));
        Ok(())
    }

    fn report(&self, mut take: impl FnMut(FastPair, FastTraffic) -> bool) {
        self.traffic
            .borrow_mut()
            .retain(|(pair, traffic)| !take(*pair, *traffic));
    }

    fn forget(&self, unwanted: impl Fn(&FastPair) -> bool) -> HashSet<FastPair> {
        let mut idle = self.idle.borrow_mut();
        let gone: HashSet<_> = idle.iter().filter(|pair| unwanted(pair)).copied().collect();
        idle.retain(|pair| !gone.contains(pair));
        gone
    }
}

impl Fake {
    fn clients(&self, to: SocketAddr) -> Vec<Key> {
        let open = self.open.borrow();
        let mut clients: Vec<_> = open.keys().filter(|key| key.1 == to).map(|key| key.0).collect();
        clients.sort_unstable();
        clients
    }
}

fn failure() -> CaptureError {
    CaptureError::Map {
        map: "FAST",
        source: io::ErrorKind::OutOfMemory.into(),
    }
}

fn vip() -> SocketAddr {
    ([10, 96, 0, 1], 5432).into()
}

fn pod() -> SocketAddr {
    ([10, 1, 0, 9], 9).into()
}

fn pair() -> FastPair {
    FastPair {
        client: WEB,
        server: DB,
        destination: vip(),
    }
}

/// `web` and `db`, and a service of `db` if there are such `documents`.
fn state(documents: &str) -> State {
    let pods = [("web", "2"), ("db", "9")].map(|(name, key)| POD.replace("NAME", name).replace("KEY", key));
    let snapshot = Mesh::of(&(pods.concat() + documents)).snapshot().clone();
    assert!(snapshot.rejected.is_empty(), "{:?}", snapshot.rejected);
    let captured = snapshot
        .local_workloads
        .values()
        .map(|workload| {
            (
                if &*workload.name == "web" { WEB } else { DB },
                Arc::clone(workload),
            )
        })
        .collect();
    State {
        snapshot: snapshot.into(),
        captured,
        ..State::default()
    }
}

fn is_settled(state: &State) -> bool {
    !state.needs(&state.snapshot, &state.captured)
}

#[test]
fn a_kernel_that_cannot_is_told_nothing() {
    let (kernel, mut state) = (Fake::default(), state(SERVICE));
    kernel.lacks.set(true);
    state.change(&kernel);
    assert!(kernel.open.borrow().is_empty());
    assert!(is_settled(&state));
    assert_eq!(state.held.open(), 0);
}

#[test]
fn what_the_kernel_refused_is_tried_again() {
    let (kernel, mut state) = (Fake::default(), state(SERVICE));
    kernel.refuses.set(Some(WEB));
    state.change(&kernel);
    assert_eq!(
        (kernel.clients(vip()), kernel.clients(pod())),
        (vec![DB], vec![DB])
    );
    assert_eq!(state.held.open(), 2);
    assert!(!is_settled(&state));
    kernel.refuses.set(None);
    state.change(&kernel);
    assert_eq!(kernel.clients(vip()), [WEB, DB]);
    assert_eq!(state.held.open(), 4);
    assert!(is_settled(&state));
}

#[test]
fn where_other_backends_are_refused_the_old_ones_are_gone() {
    let (kernel, mut state) = (Fake::default(), state(SERVICE));
    state.change(&kernel);
    // As if another server had been there.
    for path in state.held.plan.values_mut() {
        path.backends[0].0 += 1;
    }
    kernel.refuses.set(Some(WEB));
    state.change(&kernel);
    assert_eq!(
        (kernel.clients(vip()), kernel.clients(pod())),
        (vec![DB], vec![DB])
    );
    // Nor may it be lost that they are still there.
    kernel.refuses.set(None);
    state.change(&kernel);
    for path in state.held.plan.values_mut() {
        path.backends[0].0 += 1;
    }
    kernel.refuses.set(Some(WEB));
    kernel.keeps.set(true);
    state.change(&kernel);
    assert_eq!(kernel.clients(vip()), [WEB, DB]);
    kernel.keeps.set(false);
    state.captured.clear();
    state.change(&kernel);
    assert!(kernel.open.borrow().is_empty());
    assert!(is_settled(&state));
}

#[test]
fn what_could_not_be_closed_is_tried_again() {
    let (kernel, mut state) = (Fake::default(), state(SERVICE));
    state.change(&kernel);
    kernel.keeps.set(true);
    state.captured.remove(&WEB);
    for _ in 0..2 {
        state.change(&kernel);
        assert_eq!(kernel.clients(vip()), [WEB, DB]);
        assert!(!is_settled(&state));
    }
    kernel.keeps.set(false);
    state.change(&kernel);
    assert_eq!(kernel.clients(vip()), [DB]);
    assert!(is_settled(&state));
}

#[test]
fn a_series_stays_while_a_connection_is_open() {
    let (kernel, mut state) = (Fake::default(), state(SERVICE));
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let mut count = |opened, closed| {
        let traffic = FastTraffic {
            opened,
            closed,
            ..FastTraffic::default()
        };
        kernel.traffic.borrow_mut().push((pair(), traffic));
        state.report(&kernel, &metrics);
        assert!(kernel.traffic.borrow().is_empty());
    };
    count(1, 0);
    for _ in 0..3 {
        metrics.forget_idle();
    }
    count(0, 1);
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    for family in ["opened", "closed"] {
        let samples = text.lines().filter(|line| {
            line.starts_with(&format!("istio_tcp_connections_{family}_total{{")) && line.ends_with(" 1")
        });
        assert_eq!(samples.count(), 2, "both report it: {text}");
    }

    // Once its rows are gone, nothing holds it.
    kernel.idle.borrow_mut().insert(pair());
    state.captured.remove(&DB);
    state.report(&kernel, &metrics);
    assert!(state.named.is_empty());
    for _ in 0..2 {
        metrics.forget_idle();
    }
    text.clear();
    encode(&mut text, &registry).unwrap();
    assert!(!text.contains("istio_tcp_connections_opened_total{"), "{text}");
}

#[test]
fn rows_that_nobody_can_name_any_more_are_dropped() {
    let kernel = Fake::default();
    let metrics = Metrics::new(&mut Registry::default());
    kernel.idle.borrow_mut().insert(pair());
    state(SERVICE).report(&kernel, &metrics);
    assert_eq!(kernel.idle.borrow().len(), 1, "it is known who they are");
    // As after a restart: nothing was ever named.
    state("").report(&kernel, &metrics);
    assert!(kernel.idle.borrow().is_empty(), "the service is gone");
}
