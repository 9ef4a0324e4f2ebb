//! One request on its way out: route, then try endpoints until one answers, then pass the answer on.
//!
//! Invariants: a request takes one snapshot and keeps it; every request is recorded once, whatever becomes of it,
//! also when its client goes away before there is an answer; a body is sent again only from the replay buffer, and
//! only while all of it is there.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, request};
use http_body::Body as _;
use hyper::body::Incoming;

use super::asked::{Asked, Tried};
use super::body::Body;
use super::error::{Error, Kind};
use super::message::Message;
use super::outbound::{Candidates, Outbound, Target};
use super::record::Exchange;
use super::replay::Replayable;
use super::upstream::Way;
use super::{headers, inbound_http, reply, upgrade};
use crate::model::{Backend, Endpoint, HeaderEdits, RetryPolicy, RouteRule, Snapshot, Timeouts, Workload};
use crate::retry::{self, Decision, Failure};
use crate::route;

pub(super) fn handle(
    outbound: Arc<Outbound>,
    request: Request<Incoming>,
) -> impl Future<Output = Response<Body>> + Send {
    let (parts, body) = request.into_parts();
    // Boxed for the same reason as a `Message`.
    answer(outbound, Box::new(parts), body)
}

async fn answer(outbound: Arc<Outbound>, mut parts: Box<request::Parts>, body: Incoming) -> Response<Body> {
    let audience = reply::Audience::of(&parts);
    let switch = headers::upgrade(&parts);
    let fit = headers::from_application(&mut parts, outbound.original);
    let line = outbound.proxy.access_log.enabled().then(|| {
        let source = outbound.local.workload();
        inbound_http::log_line(
            &parts,
            outbound.client,
            Some(Arc::clone(&outbound.local.uid)),
            Some(source.identity.clone()),
        )
    });
    outbound.proxy.retries.deposit();
    let snapshot = outbound.proxy.store.load();
    let source = outbound.local.workload();
    let mut planned = None;
    let mut asked = Asked::begin(&outbound, (&snapshot, &source), Exchange::begin(line));
    let (exchange, tried) = (&asked.exchange, &mut asked.tried);
    let sent = async {
        fit?;
        inbound_http::canonical(&mut parts)?;
        let plan = &*planned.insert(Plan::make(&outbound, &snapshot, &source, &mut parts)?);
        tried.service = plan.candidates.service;
        tried.rule = plan.rule;
        tried.deadline = plan.timeouts.request.map(|limit| exchange.started + limit);
        let attempts = Attempts {
            outbound: &outbound,
            source: &source,
            plan,
        };
        let deadline = tried.deadline;
        let answering = pin!(async {
            match switch {
                Some(protocol) => Box::pin(attempts.switch((*parts, body, protocol), tried)).await,
                None => attempts.run(parts, body, exchange, tried).await,
            }
        });
        let answered = match deadline {
            None => answering.await,
            Some(deadline) => tokio::time::timeout_at(deadline, answering)
                .await
                .unwrap_or_else(|_| Err(Kind::RequestTimeout.into())),
        };
        answered.map(|mut response| {
            plan.edit_response(response.headers_mut());
            response
        })
    };
    let sent = sent.await;
    asked.finish(sent, audience)
}

/// What was decided for a request before the first try.
struct Plan<'a> {
    rule: Option<&'a RouteRule>,
    backend: Option<&'a Backend>,
    candidates: Candidates<'a>,
    timeouts: Timeouts,
    retry: RetryPolicy,
}

impl<'a> Plan<'a> {
    fn make(
        outbound: &Outbound,
        snapshot: &'a Snapshot,
        source: &Workload,
        parts: &mut request::Parts,
    ) -> Result<Self, Error> {
        let candidates = outbound.candidates(snapshot);
        let rules = match &outbound.target {
            Target::Service(key, port) => snapshot
                .service_port(key, *port)
                .map_or(&[][..], |port| port.routes_for(&source.namespace)),
            Target::Workload(_) | Target::Unknown => &[],
        };
        if rules.is_empty() {
            let (timeouts, retry) = (Timeouts::default(), RetryPolicy::default());
            return Ok(Self {
                rule: None,
                backend: None,
                candidates,
                timeouts,
                retry,
            });
        }
        let rule = route::select(rules, parts).ok_or(Kind::NoRoute)?;
        let backend = route::pick_backend(&rule.backends, fastrand::u64(..)).ok_or(Kind::NoBackend)?;
        let (key, port) = backend.service.as_ref().ok_or(Kind::NoBackend)?;
        let candidates = Outbound::of_service(snapshot, key, *port);
        route::apply(&rule.edits.0, &mut parts.headers);
        route::apply(&backend.edits.0, &mut parts.headers);
        Ok(Self {
            rule: Some(rule),
            backend: Some(backend),
            candidates,
            timeouts: rule.timeouts,
            retry: rule.retry.clone(),
        })
    }

    fn edit_response(&self, headers: &mut http::HeaderMap) {
        let edits: [Option<&HeaderEdits>; 2] = [
            self.backend.map(|backend| &backend.edits),
            self.rule.map(|rule| &rule.edits),
        ];
        for (_, response) in edits.into_iter().flatten() {
            route::apply(response, headers);
        }
    }

    /// What the application is to be spoken to in: what its port says, else what the client speaks.
    fn http2(&self, parts: &request::Parts) -> bool {
        inbound_http::speaks_http2(self.candidates.protocol, parts)
    }
}

struct Attempts<'a> {
    outbound: &'a Outbound,
    source: &'a Workload,
    plan: &'a Plan<'a>,
}

impl<'a> Attempts<'a> {
    async fn run(
        &self,
        parts: Box<request::Parts>,
        body: Incoming,
        exchange: &Arc<Exchange>,
        tried: &mut Tried<'a>,
    ) -> Result<Response<Body>, Error> {
        let http2 = self.plan.http2(&parts);
        let replay = (!body.is_end_stream()).then(|| Replayable::new(body));
        let method = parts.method.clone();
        loop {
            let mut body = Body::default();
            if let Some(replay) = &replay {
                body = Body::replay(replay.start());
                body.count(Arc::clone(exchange));
            }
            let message = Message::new((*parts).clone(), body, http2);
            let result = self.one(message, tried).await;
            let failure = match &result {
                Ok(response) => Failure::Status(response.status().as_u16()),
                Err(error) => failure(error.kind),
            };
            match (&result, tried.last) {
                (Ok(_), Some((endpoint, _))) => endpoint.load.reached(),
                (Err(error), Some((endpoint, _)))
                    if matches!(error.kind, Kind::Connect | Kind::PeerIdentity) =>
                {
                    self.outbound.proxy.rest(endpoint);
                }
                _ => {}
            }
            let replayable = replay.as_ref().is_none_or(Replayable::is_replayable);
            let decision = retry::decide(failure, &method, tried.tries, replayable, &self.plan.retry);
            tried.exhausted = decision == Decision::Exhausted;
            let again =
                decision == Decision::Retry && (failure.is_harmless() || self.outbound.proxy.may_retry());
            if !again {
                if let Some(replay) = &replay {
                    replay.settle();
                }
                return result;
            }
            drop(result);
            self.pause(tried).await;
        }
    }

    /// Before another try.
    async fn pause(&self, tried: &mut Tried<'_>) {
        tried.in_flight = None;
        self.outbound.proxy.metrics().agent().retries.inc();
        let wait = retry::backoff(self.plan.retry.backoff, tried.tries, fastrand::u64(..));
        // Another endpoint can be asked at once; the same one gets time to recover.
        if self.plan.candidates.endpoints.len() <= tried.addresses.len() && wait > Duration::ZERO {
            tokio::time::sleep(wait).await;
        }
    }

    /// One try.
    async fn one(&self, message: Box<Message>, tried: &mut Tried<'a>) -> Result<Response<Body>, Error> {
        let (endpoint, way) = self.next(tried)?;
        let from = self.outbound.from(self.source, tried.service);
        let sending = pin!(from.send(&way, endpoint.address, message));
        match self.plan.timeouts.per_try {
            None => sending.await,
            Some(limit) => tokio::time::timeout(limit, sending)
                .await
                .unwrap_or_else(|_| Err(Kind::PerTryTimeout.into())),
        }
    }

    /// A request that switches protocols, on a connection of its own: tried again only as long as none was made.
    async fn switch(
        &self,
        switching: upgrade::Switching,
        tried: &mut Tried<'a>,
    ) -> Result<Response<Body>, Error> {
        let from = self.outbound.from(self.source, tried.service);
        loop {
            let (endpoint, way) = self.next(tried)?;
            let error = match from.stream(&way, endpoint.address).await {
                Ok(stream) => {
                    endpoint.load.reached();
                    let Way::Local(dest) = &way else {
                        let held = tried.in_flight.take();
                        return upgrade::switch(stream, switching, from.life, None, held).await;
                    };
                    let (caller, to) = (from.caller(dest), endpoint.address);
                    let app = Some(stream);
                    return Ok(upgrade::inbound(from.proxy, dest, &caller, to, switching, app).await);
                }
                Err(error) => error,
            };
            if matches!(error.kind, Kind::Connect | Kind::PeerIdentity) {
                self.outbound.proxy.rest(endpoint);
            }
            let failure = failure(error.kind);
            let decision = retry::decide(failure, &switching.0.method, tried.tries, true, &self.plan.retry);
            tried.exhausted = decision == Decision::Exhausted;
            if decision != Decision::Retry {
                return Err(error);
            }
            self.pause(tried).await;
        }
    }

    fn next(&self, tried: &mut Tried<'a>) -> Result<(&'a Endpoint, Way<'a>), Error> {
        tried.tries += 1;
        let endpoint = self
            .outbound
            .pick(&self.plan.candidates, &tried.addresses)
            .ok_or(Kind::NoEndpoint)?;
        let way = Way::to(&self.outbound.proxy, &self.outbound.local, self.source, endpoint);
        tried.addresses.push(endpoint.address);
        tried.in_flight = Some(endpoint.load.enter());
        tried.last = Some((endpoint, way.security()));
        Ok((endpoint, way))
    }
}

fn failure(kind: Kind) -> Failure {
    match kind {
        Kind::Connect | Kind::PeerIdentity | Kind::Overload => Failure::ConnectFailure,
        Kind::RefusedStream => Failure::RefusedStream,
        Kind::Reset => Failure::ResetBeforeHeaders,
        Kind::PerTryTimeout => Failure::PerTryTimeout,
        Kind::BadRequest
        | Kind::DownstreamReset
        | Kind::NoRoute
        | Kind::NoBackend
        | Kind::NoEndpoint
        | Kind::BadResponse
        | Kind::RequestTimeout
        | Kind::Denied
        | Kind::Internal => Failure::Other,
    }
}
