//! Asks a running agent.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::admin::api;

/// An agent that is not answering by then hangs.
const LIMIT: Duration = Duration::from_secs(10);
/// More than the largest mesh's answer.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

#[derive(Debug)]
pub(super) struct Client<'a> {
    address: &'a str,
}

impl<'a> Client<'a> {
    pub(super) fn new(address: &'a str) -> Self {
        Self { address }
    }

    /// The body of a page.
    pub(super) fn get(&self, path: &str) -> anyhow::Result<Bytes> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let answer = runtime.block_on(async { timeout(LIMIT, self.ask(path)).await });
        let (status, body) = answer.map_err(|_| {
            anyhow!(
                "the agent at {} does not answer within {} s",
                self.address,
                LIMIT.as_secs()
            )
        })??;
        if status == StatusCode::OK {
            return Ok(body);
        }
        let failure =
            parse::<api::Failure>(&body).map_or_else(|_| "no reason given".to_owned(), |it| it.error);
        bail!("http://{}{path} answers {status}: {failure}", self.address);
    }

    async fn ask(&self, path: &str) -> anyhow::Result<(StatusCode, Bytes)> {
        let stream = TcpStream::connect(self.address).await.map_err(|error| {
            anyhow!(
                "cannot reach an agent at {}: {error}\n\
                 Is it running (`mesh-agent run`)? If its `admin.address` is another, say so with --admin HOST:PORT \
                 or in $MESH_AGENT_ADMIN.",
                self.address
            )
        })?;
        let peer = stream.peer_addr()?;
        let exchange = async {
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            let request = Request::get(path).header(http::header::HOST, peer.to_string());
            let answer = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|error| anyhow!("{error}"))?;
            Ok::<_, anyhow::Error>((status, body.to_bytes()))
        };
        exchange
            .await
            .with_context(|| format!("what listens at {} does not talk like an agent", self.address))
    }
}

/// What an agent said.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(body)
        .context("the agent's answer cannot be read; is it of another version than this command?")
}
