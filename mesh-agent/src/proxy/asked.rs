//! A request on its way out, from its head to its record.
//!
//! Invariant: recorded once: with its answer's end, or when its client goes away before there is one.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{Response, StatusCode};
use tokio::time::Instant;

use super::body::Body;
use super::error::Error;
use super::outbound::{Outbound, peers};
use super::record::{Exchange, Outcome, Tail};
use super::recorders::Exchanging;
use super::{failure, reply};
use crate::metrics::{Flag, HttpRecorder, Peers, Reporter, Security};
use crate::model::{Endpoint, InFlight, RouteRule, Service, Snapshot, Workload};

/// A request under way.
pub(super) struct Asked<'a> {
    outbound: &'a Outbound,
    snapshot: &'a Snapshot,
    source: &'a Workload,
    pub(super) exchange: Arc<Exchange>,
    pub(super) tried: Tried<'a>,
    finished: bool,
}

impl<'a> Asked<'a> {
    pub(super) fn begin(
        outbound: &'a Outbound,
        (snapshot, source): (&'a Snapshot, &'a Workload),
        exchange: Arc<Exchange>,
    ) -> Self {
        Self {
            outbound,
            snapshot,
            source,
            exchange,
            tried: Tried::default(),
            finished: false,
        }
    }

    /// Turns what came of a request into the client's answer, measured to its end.
    pub(super) fn finish(
        mut self,
        sent: Result<Response<Body>, Error>,
        audience: reply::Audience,
    ) -> Response<Body> {
        let (mut response, flag, deadline) = match sent {
            Ok(response) => {
                let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
                let deadline = self.tried.deadline.filter(|_| !switched);
                (response, Flag::None, deadline)
            }
            Err(error) => {
                let (workload, to) = (&self.outbound.local.uid, self.outbound.original);
                tracing::debug!(%error, %workload, %to, "request failed");
                (reply::error(&error, audience), error.answer().1, None)
            }
        };
        let flag = if self.tried.exhausted {
            Flag::RetryLimit
        } else {
            flag
        };
        response.headers_mut().remove(failure::FAILURE);
        let tail = self.tail().head(response.status(), response.headers(), flag);
        response.map(|body| match deadline {
            Some(deadline) => body.measured(tail).until(deadline),
            None => body.measured(tail),
        })
    }

    /// Measures from here on; called once.
    fn tail(&mut self) -> Box<Tail> {
        self.finished = true;
        let recorder = self.recorder();
        let tried = std::mem::take(&mut self.tried);
        let logged = self.exchange.line.is_some();
        let log = logged.then(|| (self.outbound.proxy.access_log.clone(), tried.outcome()));
        Tail::new(Arc::clone(&self.exchange), recorder, log, "outbound").counting(tried.in_flight)
    }

    fn recorder(&self) -> Arc<HttpRecorder> {
        let last = self.tried.last;
        // Where nothing was tried, the service that was dialled.
        let dialled = match last {
            Some(_) => None,
            None => self.outbound.candidates(self.snapshot).service,
        };
        let service = self.tried.service.or(dialled);
        let key = Exchanging {
            inbound: false,
            one: self.outbound.original,
            other: last.map(|(endpoint, _)| endpoint.address),
            service: service.map(|service| &service.header),
        };
        self.outbound.recorders.get(self.snapshot.generation, &key, || {
            self.outbound.proxy.metrics().http(&match last {
                Some((endpoint, security)) => peers(self.source, endpoint, service, security),
                None => Peers {
                    reporter: Reporter::Source,
                    source: Some(self.source),
                    source_identity: None,
                    destination: None,
                    destination_identity: None,
                    service,
                    security: Security::Unknown,
                },
            })
        })
    }
}

impl Drop for Asked<'_> {
    /// The client went away while there was no answer.
    fn drop(&mut self) {
        if !self.finished {
            drop(self.tail());
        }
    }
}

/// How far a request got.
#[derive(Default)]
pub(super) struct Tried<'a> {
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) tries: u32,
    pub(super) last: Option<(&'a Endpoint, Security)>,
    /// Whose endpoints are tried.
    pub(super) service: Option<&'a Service>,
    pub(super) in_flight: Option<InFlight>,
    pub(super) rule: Option<&'a RouteRule>,
    pub(super) deadline: Option<Instant>,
    pub(super) exhausted: bool,
}

impl Tried<'_> {
    /// For the access log.
    fn outcome(&self) -> Outcome {
        let last = self.last;
        let workload = last.and_then(|(endpoint, _)| endpoint.workload.as_deref());
        let mutual = last.is_some_and(|(_, security)| security == Security::MutualTls);
        Outcome {
            upstream: last.map(|(endpoint, _)| endpoint.address),
            destination: workload.map(|workload| workload.uid().into()),
            identity: workload
                .filter(|_| mutual)
                .map(|workload| workload.identity.clone()),
            route: self.rule.map(|rule| Arc::clone(&rule.name)),
            attempts: self.tries,
        }
    }
}
