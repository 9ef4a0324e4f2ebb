//! Many connections that are used once and then stay open, until this program is killed.
//!
//! `--connections N`; each sends one HTTP/1.1 request and reads the answer, so that everything on the way is in place.
//! It says so on stderr when all are open.

use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::LocalSet;

use crate::load::Plan;

/// Opened at the same time.
const AT_ONCE: usize = 64;
/// An answer is head and a hundred bytes.
const ANSWER: usize = 4096;
/// Beside the connections themselves.
const OTHER_FILES: u64 = 100;

pub(crate) async fn run(url: &str, options: &[&str]) -> Result<()> {
    let plan = Rc::new(Plan::parse(url, options)?);
    let files = plan.connections + OTHER_FILES;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, files, hard.max(files)).context("so many files")?;
    let turns = Rc::new(Semaphore::new(AT_ONCE));
    let local = LocalSet::new();
    let opening: Vec<_> = (0..plan.connections)
        .map(|_| {
            let (plan, turns) = (Rc::clone(&plan), Rc::clone(&turns));
            local.spawn_local(async move {
                let _turn = turns.acquire().await?;
                tokio::time::timeout(plan.timeout, open(&plan)).await?
            })
        })
        .collect();
    let mut held = Vec::new();
    local
        .run_until(async {
            for one in opening {
                held.push(one.await??);
            }
            anyhow::Ok(())
        })
        .await?;
    eprintln!("holding {}", held.len());
    std::future::pending().await
}

async fn open(plan: &Plan) -> Result<TcpStream> {
    let (address, path) = plan.target()?;
    let mut stream = TcpStream::connect(address).await.context("connect")?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = [0; ANSWER];
    let mut read = 0;
    // The body is `x` throughout, and no header ends like this.
    while !answer[..read].ends_with(b"xxxxxxxx") {
        let more = stream.read(&mut answer[read..]).await?;
        ensure!(
            more > 0,
            "no good answer: {}",
            String::from_utf8_lossy(&answer[..read])
        );
        read += more;
    }
    ensure!(answer.starts_with(b"HTTP/1.1 200 "), "no good answer");
    Ok(stream)
}
