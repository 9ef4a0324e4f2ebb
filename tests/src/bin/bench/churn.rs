//! One endpoint changes among many: how soon requests use the new one, and what the change costs the agent.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::time::Instant;

use crate::cpu;
use crate::crowd::{self, Crowd};
use crate::idle::agent;
use crate::proxies::{start_agents, stop_agents};
use crate::record::Figure;
use crate::scenario::{Door, Place};
use crate::world::{self, World};

const SERVICE: &str = "10.96.1.9:80";
/// Changes of one measurement.
const CHANGES: usize = 20;
/// Between two changes: longer than any of them takes.
const PAUSE: Duration = Duration::from_millis(500);
/// A change that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn run(world: &mut World, figures: &mut Vec<Figure>) -> Result<()> {
    let _crowd = Crowd::write(world)?;
    point(world, Door::Http)?;
    start_agents(world)?;
    let measured = measure(world, figures);
    stop_agents(world)?;
    world.mesh.remove("moving")?;
    measured
}

fn measure(world: &mut World, figures: &mut Vec<Figure>) -> Result<()> {
    Crowd::wait_known(world)?;
    let among = format!("of {} endpoints", crowd::ENDPOINTS);
    let mut soon = Figure::new(&format!("a change {among} until it is used"), "ms", Some(50.0));
    eprintln!("    {CHANGES} changes under requests");
    let doors = [Door::Routed, Door::Http].into_iter().cycle().take(CHANGES);
    for door in doors.clone() {
        soon.values.push(until_used(world, door)?.as_secs_f64() * 1e3);
        thread::sleep(PAUSE);
    }
    figures.push(soon);
    eprintln!("    {CHANGES} changes without requests");
    let mut cost = Figure::new(&format!("CPU of a change {among}"), "ms", Some(5.0));
    let agent = agent(world, 0)?;
    let spend = |change: &dyn Fn() -> Result<()>| -> Result<f64> {
        let before = cpu::cpu_time(agent)?;
        change()?;
        thread::sleep(PAUSE);
        Ok(cpu::cpu_time(agent)? - before)
    };
    // What the agent does anyway in such a time, averaged: its poll does not fall into every pause.
    let nothing = (0..CHANGES).map(|_| spend(&|| Ok(()))).sum::<Result<f64>>()? / CHANGES as f64;
    let changes = doors
        .map(|door| spend(&|| point(world, door)))
        .sum::<Result<f64>>()?;
    cost.values.push((changes / CHANGES as f64 - nothing) * 1e3);
    figures.push(cost);
    Ok(())
}

/// Has the service's only endpoint be this port of the near server.
fn point(world: &World, door: Door) -> Result<()> {
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: moving, namespace: shop}}\n\
         spec: {{clusterIP: {ip}, ports: [{{name: http, port: 80}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: moving-a, namespace: shop, labels: {{kubernetes.io/service-name: moving}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: {port}}}]\nendpoints: [{{addresses: [{address}]}}]\n",
        ip = SERVICE.split(':').next().unwrap_or_default(),
        port = world::port(door),
        address = world.meshed.server(Place::SameNode).v4,
    );
    world.mesh.apply("moving", &text)
}

/// From the change of the file to the first answer from there, under requests that never pause.
fn until_used(world: &World, door: Door) -> Result<Duration> {
    let client = &world.meshed.client;
    client.netns.enter(|| -> Result<Duration> {
        let mut connection = Connection::open(SERVICE.parse()?)?;
        let port = world::port(door).to_string();
        ensure!(connection.answered_from()? != port, "it is used already");
        let started = Instant::now();
        point(world, door)?;
        while connection.answered_from()? != port {
            if started.elapsed() > PATIENCE {
                bail!("the new endpoint is not used after {PATIENCE:?}");
            }
        }
        Ok(started.elapsed())
    })?
}

/// One keep-alive HTTP/1.1 connection.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends a request; the port that the server says it has.
    fn answered_from(&mut self) -> Result<String> {
        let request = format!("GET /100 HTTP/1.1\r\nhost: {SERVICE}\r\n\r\n");
        self.0.get_mut().write_all(request.as_bytes())?;
        let (mut port, mut length) = (None, 0);
        loop {
            let mut line = String::new();
            ensure!(self.0.read_line(&mut line)? > 0, "the connection ended");
            let Some((name, value)) = line.trim_end().split_once(": ") else {
                if line == "\r\n" {
                    break;
                }
                continue;
            };
            match name.to_ascii_lowercase().as_str() {
                "x-port" => port = Some(value.to_owned()),
                "content-length" => length = value.parse()?,
                _ => {}
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        port.context("an answer that is not the server's")
    }
}
