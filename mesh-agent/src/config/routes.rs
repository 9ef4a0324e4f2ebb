//! Routes of a service's port: whose they are, where they lead, and in which order they are tried.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::check::Issues;
use super::http_route::{BackendRef, HttpRoute, Parent, Rule};
use super::index::Index;
use super::resource::ResourceKey;
use super::service::{Service, ServicePort};
use crate::model::{
    Backend, HeaderEdits, MethodMatch, PathMatch, Protocol, RequestMatch, RouteRule, ServiceKey,
};

/// The rules of one port: for everybody, and for the clients of namespaces that made their own.
#[derive(Default)]
pub(super) struct PortRules {
    pub(super) producer: Vec<RouteRule>,
    pub(super) consumers: BTreeMap<Arc<str>, Vec<RouteRule>>,
}

pub(super) fn compile(index: &Index, service: &ServiceKey, port: &ServicePort) -> PortRules {
    let mut by_owner: BTreeMap<&Arc<str>, Vec<(&ResourceKey, &HttpRoute)>> = BTreeMap::new();
    if !port.protocol_is_http() {
        return PortRules::default();
    }
    for (key, route) in index.routes_of(service) {
        let mut parents = route.parents.iter();
        if parents.any(|parent| parent.service == *service && parent.means(port)) {
            by_owner.entry(&key.namespace).or_default().push((key, route));
        }
    }
    let mut rules = PortRules::default();
    for (namespace, routes) in by_owner {
        let ordered = in_order(index, service, &routes);
        match *namespace == service.namespace {
            true => rules.producer = ordered,
            false => {
                rules.consumers.insert(Arc::clone(namespace), ordered);
            }
        }
    }
    rules
}

/// What will surprise the author of a route: services that are not there, references that are not allowed.
pub(super) fn notes(index: &Index, key: &ResourceKey, route: &HttpRoute) -> Issues {
    let mut issues = Issues::default();
    for parent in &route.parents {
        let path = parent.path.as_str();
        match index.service(&parent.service) {
            None => issues.warning(
                path,
                format!(
                    "there is no Service {}; the route has no effect there",
                    parent.service
                ),
            ),
            Some(service) => {
                let mut ports = service.ports.iter().filter(|port| parent.means(port)).peekable();
                if ports.peek().is_none() {
                    issues.warning(
                        path,
                        format!(
                            "Service {} has no such port; {}",
                            parent.service,
                            ports_of(service)
                        ),
                    );
                } else if !ports.any(ServicePort::protocol_is_http) {
                    issues.warning(
                        path,
                        format!(
                            "Service {} does not speak HTTP there; the route has no effect",
                            parent.service
                        ),
                    );
                }
            }
        }
    }
    for backend in route.rules.iter().flat_map(|rule| &rule.backends) {
        if let Err(reason) = resolve(index, &key.namespace, backend, |service| {
            route.parents.iter().any(|parent| parent.service == *service)
        }) {
            issues.warning(
                backend.path.as_str(),
                format!("{reason}; its share of the requests gets 500"),
            );
        }
    }
    issues
}

fn ports_of(service: &Service) -> String {
    let ports: Vec<_> = service.ports.iter().map(|port| port.port.to_string()).collect();
    format!("it has {}", ports.join(", "))
}

impl Parent {
    fn means(&self, port: &ServicePort) -> bool {
        self.port.is_none_or(|wanted| wanted == port.port)
            && self
                .port_name
                .as_deref()
                .is_none_or(|wanted| port.name.as_deref() == Some(wanted))
    }
}

impl ServicePort {
    fn protocol_is_http(&self) -> bool {
        !matches!(self.protocol, Protocol::Tcp | Protocol::Tls)
    }
}

/// Where a backendRef leads, or why it leads nowhere.
fn resolve(
    index: &Index,
    namespace: &str,
    backend: &BackendRef,
    is_parent: impl Fn(&ServiceKey) -> bool,
) -> Result<(ServiceKey, u16), String> {
    let target = &backend.service;
    // Sending on to the service that was asked for anyway gives nobody more than he had.
    let allowed = *target.namespace == *namespace
        || is_parent(target)
        || index
            .grants(&target.namespace)
            .any(|grant| grant.allows(namespace, &target.name));
    if !allowed {
        return Err(format!(
            "no ReferenceGrant in namespace {} lets HTTPRoutes of {namespace} send to {target}",
            target.namespace
        ));
    }
    let Some(service) = index.service(target) else {
        return Err(format!("there is no Service {target}"));
    };
    if !service.ports.iter().any(|port| port.port == backend.port) {
        return Err(format!(
            "Service {target} has no port {}; {}",
            backend.port,
            ports_of(service)
        ));
    }
    Ok((target.clone(), backend.port))
}

/// The Gateway API's precedence, one key per match. Where it leaves the choice, expressions come after exact
/// paths and before prefixes, the longer pattern first.
type Precedence<'a> = (
    (u8, Reverse<usize>),
    bool,
    Reverse<usize>,
    Reverse<usize>,
    (bool, Option<SystemTime>),
    (&'a str, &'a str),
    (usize, usize),
);

fn in_order(index: &Index, service: &ServiceKey, routes: &[(&ResourceKey, &HttpRoute)]) -> Vec<RouteRule> {
    let mut ordered: Vec<(Precedence<'_>, RouteRule)> = Vec::new();
    for (key, route) in routes {
        for (rule_index, rule) in route.rules.iter().enumerate() {
            let backends = backends(index, service, key, rule);
            for (match_index, matches) in rule.matches.iter().enumerate() {
                let precedence = (
                    path_rank(&matches.path),
                    matches!(matches.method, MethodMatch::Any),
                    Reverse(matches.headers.len()),
                    Reverse(matches.query.len()),
                    (route.created.is_none(), route.created),
                    (&*key.namespace, &*key.name),
                    (rule_index, match_index),
                );
                ordered.push((precedence, rule_for(rule, matches, &backends)));
            }
        }
    }
    ordered.sort_by_key(|(precedence, _)| *precedence);
    ordered.into_iter().map(|(_, rule)| rule).collect()
}

fn path_rank(path: &PathMatch) -> (u8, Reverse<usize>) {
    match path {
        PathMatch::Exact(path) => (0, Reverse(path.len())),
        PathMatch::Regex(regex) => (1, Reverse(regex.as_str().len())),
        PathMatch::Prefix(path) => (2, Reverse(path.len())),
        PathMatch::Any => (3, Reverse(0)),
    }
}

fn rule_for(rule: &Rule, matches: &RequestMatch, backends: &[Backend]) -> RouteRule {
    RouteRule {
        name: Arc::clone(&rule.name),
        matches: matches.clone(),
        edits: rule.edits.clone(),
        backends: backends.to_vec(),
        timeouts: rule.timeouts,
        retry: rule.retry.clone(),
    }
}

fn backends(index: &Index, parent: &ServiceKey, key: &ResourceKey, rule: &Rule) -> Vec<Backend> {
    if rule.backends.is_empty() {
        // Nothing to send to is 500 for all, as the Gateway API says.
        return vec![Backend {
            service: None,
            weight: 1,
            edits: HeaderEdits::default(),
        }];
    }
    rule.backends
        .iter()
        .map(|backend| Backend {
            service: resolve(index, &key.namespace, backend, |service| service == parent).ok(),
            weight: backend.weight,
            edits: backend.edits.clone(),
        })
        .collect()
}
