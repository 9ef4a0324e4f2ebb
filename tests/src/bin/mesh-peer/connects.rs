//! Connections one after the other: connect, one HTTP/1.1 request, the answer, the end.
//!
//! The server ends each connection, as the request asks it to, so that no port of the client is left waiting.
//! `--connections N` at a time, `--seconds N`; `--timeout-ms` per connection. The report is JSON.

use std::collections::BTreeMap;
use std::io::Write;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use tokio::time::{Instant, timeout};

use crate::load::Plan;

pub(crate) async fn run(url: &str, options: &[&str]) -> Result<()> {
    let plan = Rc::new(Plan::parse(url, options)?);
    ensure!(plan.connections > 0, "--connections is 0");
    let until = Instant::now() + plan.length;
    let local = LocalSet::new();
    let workers: Vec<_> = (0..plan.connections)
        .map(|_| local.spawn_local(work(Rc::clone(&plan), until)))
        .collect();
    let mut good: u64 = 0;
    let mut errors = BTreeMap::<String, u64>::new();
    local
        .run_until(async {
            for worker in workers {
                let (more, failed) = worker.await?;
                good += more;
                for why in failed {
                    *errors.entry(why).or_default() += 1;
                }
            }
            anyhow::Ok(())
        })
        .await?;
    let failed: u64 = errors.values().sum();
    let report = json!({"connections": good, "failed": failed, "errors": errors});
    writeln!(std::io::stdout(), "{report}")?;
    Ok(())
}

/// How many went well, and why the others did not.
async fn work(plan: Rc<Plan>, until: Instant) -> (u64, Vec<String>) {
    /// A way that does not work is not tried for ever.
    const MOST_ERRORS: usize = 100;
    let mut good = 0;
    let mut failed = Vec::new();
    while Instant::now() < until && failed.len() < MOST_ERRORS {
        match timeout(plan.timeout, once(&plan)).await {
            Ok(Ok(())) => good += 1,
            Ok(Err(error)) => failed.push(format!("{error:#}")),
            Err(_late) => failed.push("timed out".to_owned()),
        }
    }
    (good, failed)
}

async fn once(plan: &Plan) -> Result<()> {
    let (address, path) = plan.target()?;
    let mut stream = TcpStream::connect(address).await.context("connect")?;
    stream.set_nodelay(true)?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.context("send")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.context("receive")?;
    ensure!(
        answer.starts_with(b"HTTP/1.1 200 "),
        anyhow!("no good answer: {}", String::from_utf8_lossy(&answer))
    );
    Ok(())
}
