//! A pod, a place outside of it, and the capture between them.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mesh_agent::ebpf::{Capture, CaptureOptions, EnrolRequest, Enrolment, Features, Listeners, Place};
use mesh_agent::sock;
use mesh_tests::{Netns, Run, off, shell, until};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::runtime::Runtime;

pub(crate) const POD4: &str = "10.77.0.2";
pub(crate) const POD6: &str = "fd77::2";
/// The outside has three addresses of each family.
pub(crate) const OUT4: [&str; 3] = ["10.77.0.1", "10.77.0.3", "10.77.0.53"];
pub(crate) const OUT6: [&str; 3] = ["fd77::1", "fd77::3", "fd77::53"];

/// Nothing here takes longer, unless it hangs, even on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Dropped in this order: the keeper stops before the run's bpffs goes.
pub(crate) struct World {
    pub(crate) runtime: Runtime,
    pub(crate) capture: Capture,
    pub(crate) pod: Netns,
    pub(crate) outside: Netns,
    pub(crate) run: Run,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with_flows(1024)
    }

    pub(crate) fn with_flows(max_flows: u32) -> Self {
        Self::make(max_flows, None)
    }

    /// As on the oldest kernel that we run on, as far as that can be had on another.
    pub(crate) fn as_on_the_oldest_kernel() -> Self {
        let nothing = Features {
            netns_option: false,
            netns_in_sockops: false,
            set_errno: false,
        };
        Self::make(1024, Some(nothing))
    }

    fn make(max_flows: u32, features: Option<Features>) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let run = Run::start(&format!("k{:x}-{number}", std::process::id())).unwrap();
        let pod = Netns::create(&run.netns("pod")).unwrap();
        let outside = Netns::create(&run.netns("out")).unwrap();
        shell::ip(
            pod.name(),
            &[format!(
                "link add eth0 type veth peer name eth0 netns {}",
                outside.name()
            )],
        )
        .unwrap();
        configure(&pod, &[POD4], &[POD6]);
        configure(&outside, &OUT4, &OUT6);
        let options = CaptureOptions {
            bpffs: run.bpffs().join("agent"),
            max_flows,
            features,
        };
        let capture = Capture::start(&options).unwrap();
        Self {
            runtime: keeper(&capture),
            capture,
            pod,
            outside,
            run,
        }
    }

    pub(crate) fn enrol(&self, hold: bool) -> Agent {
        enrol(&self.capture, &self.pod, hold)
    }

    /// What an application in the pod listens on.
    pub(crate) fn listen(&self, on: SocketAddr) -> TcpListener {
        self.pod.enter(|| TcpListener::bind(on)).unwrap().unwrap()
    }

    /// A connection of the agent to an application, on behalf of a client.
    pub(crate) fn speak_for(
        &self,
        agent: &Agent,
        client: SocketAddr,
        app: SocketAddr,
    ) -> tokio::net::TcpStream {
        let namespace = agent.enrolment.namespace();
        let connecting = sock::connect(&*namespace, app, Some(client));
        self.runtime.block_on(connecting).unwrap()
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        let counters = self.capture.counters().unwrap();
        counters.iter().find(|(have, _)| *have == name).unwrap().1
    }

    /// What a query that is not let through fails with.
    pub(crate) fn refused_datagram(&self) -> i32 {
        if self.capture.features().set_errno {
            libc::ECONNREFUSED
        } else {
            libc::EPERM
        }
    }

    pub(crate) fn entries(&self, map: &str) -> usize {
        let state = self.capture.state();
        state.maps.iter().find(|state| state.name == map).unwrap().entries
    }

    pub(crate) fn wait_for_entries(&self, map: &str, wanted: usize) {
        until(&format!("{wanted} entries in {map}"), PATIENCE, || {
            (self.entries(map) == wanted).then_some(())
        })
        .unwrap();
    }
}

/// Gives the capture's signs of life, until dropped.
pub(crate) fn keeper(capture: &Capture) -> Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let capture = capture.clone();
    runtime.spawn(async move { capture.keep_alive(|| true).await });
    runtime
}

pub(crate) fn enrol(capture: &Capture, pod: &Netns, hold: bool) -> Agent {
    let request = EnrolRequest {
        place: Place::NetnsPath(pod.path()),
        addresses: vec![ip(POD4), ip(POD6)],
        hold,
    };
    let (enrolment, listeners) = capture.enrol(request).unwrap();
    Agent { enrolment, listeners }
}

fn configure(netns: &Netns, v4: &[&str], v6: &[&str]) {
    let mut lines = vec!["link set eth0 up".to_owned()];
    lines.extend(v4.iter().map(|ip| format!("addr add {ip}/24 dev eth0")));
    lines.extend(v6.iter().map(|ip| format!("addr add {ip}/64 dev eth0 nodad")));
    shell::ip(netns.name(), &lines).unwrap();
}

/// The agent's part, played by the test.
pub(crate) struct Agent {
    pub(crate) enrolment: Enrolment,
    pub(crate) listeners: Listeners,
}

impl Agent {
    /// Closes everything, as the kernel does when an agent dies. (A program that another test is just starting
    /// may hold a copy of a listener for a moment.)
    pub(crate) fn die(self, capture: &Capture) {
        drop(self);
        until("the listeners to be closed", PATIENCE, || {
            capture
                .state()
                .workloads
                .iter()
                .all(|workload| !workload.served)
                .then_some(())
        })
        .unwrap();
    }

    /// The next captured outgoing connection, and where it wanted to go.
    pub(crate) fn accept(&self) -> (TcpStream, Option<SocketAddr>) {
        let (stream, peer) = accept(&self.listeners.outbound);
        let local = stream.local_addr().unwrap();
        let wanted = self.enrolment.namespace().original_destination(peer, local);
        (stream, wanted)
    }

    /// The next captured incoming connection: (stream, client, where it wanted to go).
    pub(crate) fn accept_inbound(&self) -> (TcpStream, SocketAddr, SocketAddr) {
        let (stream, peer) = accept(self.listeners.inbound.as_ref().unwrap());
        let local = plain(stream.local_addr().unwrap());
        (stream, plain(peer), local)
    }
}

/// Accepts within a bounded time.
pub(crate) fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    try_accept(listener, PATIENCE).unwrap()
}

pub(crate) fn try_accept(listener: &TcpListener, patience: Duration) -> io::Result<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(false)?;
    SockRef::from(listener).set_read_timeout(Some(patience))?;
    let (stream, peer) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok((stream, peer))
}

pub(crate) fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

pub(crate) fn tcp_socket(like: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(like), Type::STREAM, None).unwrap()
}

/// Whether the kernel is built without multipath TCP; then programs get no such socket that could be captured.
pub(crate) fn without_multipath() -> bool {
    let Err(error) = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)) else {
        return false;
    };
    assert_eq!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT));
    assert!(!Path::new("/proc/sys/net/mptcp").exists());
    off("multipath TCP").unwrap();
    true
}

/// What one end writes the other end reads, both ways.
pub(crate) fn exchange(one: &mut TcpStream, other: &mut TcpStream) {
    one.write_all(b"ping").unwrap();
    let mut bytes = [0; 4];
    other.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ping");
    other.write_all(b"pong").unwrap();
    one.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pong");
}

/// Without IPv4-mapping.
pub(crate) fn plain(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// Of both families: (the pod's address, an address outside).
pub(crate) const FAMILIES: [(&str, &str); 2] = [(POD4, OUT4[0]), (POD6, OUT6[0])];
