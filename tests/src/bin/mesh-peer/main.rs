//! The other side of the tests: servers and a load generator that run inside pods.
//!
//! `mesh-peer http|greeter|echo|dns NAME PORT` listens at all addresses, IPv4 and IPv6, and says so when it does;
//! `mesh-peer front NAME PORT` is an HTTP server that answers with what the service `reviews` answers;
//! `mesh-peer load URL [OPTIONS]` sends requests and prints a report as JSON; `mesh-peer paced URL [OPTIONS]` sends
//! them at fixed times, whatever becomes of the earlier ones; `mesh-peer connects URL [OPTIONS]` one per
//! connection; `mesh-peer hold URL [OPTIONS]` keeps connections open; `mesh-peer relay|relay-tls` is a proxy that
//! decides nothing.

mod client;
mod connects;
mod dns;
mod front;
mod hold;
mod http;
mod load;
mod paced;
mod relay;
mod tcp;

use std::io::Write;
use std::net::Ipv6Addr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tokio::net::TcpListener;

use tokio::runtime::Builder;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // What measures is to have no scheduler of its own between request and answer.
    let mut single = Builder::new_current_thread();
    let mut threads = Builder::new_multi_thread();
    match args[..] {
        ["--version"] => Ok(writeln!(
            std::io::stdout(),
            "mesh-peer {}",
            env!("CARGO_PKG_VERSION")
        )?),
        // Without timers: they would cost what it has no use for.
        ["relay", ref ways @ ..] => single.enable_io().build()?.block_on(relay::run(ways)),
        ["relay-tls", end, certificate, key, root, ref ways @ ..] => single
            .enable_io()
            .build()?
            .block_on(relay::run_tls(end, [certificate, key, root], ways)),
        ["paced", url, ref options @ ..] => single.enable_all().build()?.block_on(paced::run(url, options)),
        ["connects", url, ref options @ ..] => {
            single.enable_all().build()?.block_on(connects::run(url, options))
        }
        ["hold", url, ref options @ ..] => single.enable_all().build()?.block_on(hold::run(url, options)),
        ["load", url, ref options @ ..] => threads.enable_all().build()?.block_on(load::run(url, options)),
        [kind, name, port] => threads
            .enable_all()
            .build()?
            .block_on(serve(kind, name, port.parse()?)),
        _ => bail!(
            "usage: mesh-peer http|front|greeter|echo|dns NAME PORT | mesh-peer load|paced|connects|hold URL [OPTIONS] \
             | mesh-peer relay LISTEN=TO... | mesh-peer relay-tls client|server CERTIFICATE KEY ROOT LISTEN=TO..."
        ),
    }
}

async fn serve(kind: &str, name: &str, port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .await
        .with_context(|| format!("cannot listen at port {port}"))?;
    if kind == "dns" {
        tokio::spawn(dns::serve_udp(name.to_owned(), port));
    }
    eprintln!("listening at port {port}");
    let pool = Arc::default();
    loop {
        let (stream, peer) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let peer = (peer.ip().to_canonical(), peer.port()).into();
        let name = name.to_owned();
        match kind {
            "http" => tokio::spawn(http::serve(stream, peer, name)),
            "front" => tokio::spawn(front::serve(stream, Arc::clone(&pool))),
            "greeter" => tokio::spawn(tcp::greet(stream, peer, name)),
            "dns" => tokio::spawn(dns::serve_tcp(stream, name)),
            "echo" => tokio::spawn(tcp::echo(stream)),
            other => bail!("there is no server {other}"),
        };
    }
}
