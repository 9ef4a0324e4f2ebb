//! Targets: the sockets that services have as endpoints, and whose they are.

use super::{Protocol, ServiceKey};

/// A socket that at least one service has as an endpoint. The endpoints of one service port share theirs, as long
/// as no other service has them too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// By service and port.
    users: Box<[TargetUser]>,
}

/// A service port that has a socket as its endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TargetUser {
    pub service: ServiceKey,
    pub port: u16,
    pub protocol: Protocol,
}

impl Target {
    /// `None` without users.
    pub fn new(mut users: Vec<TargetUser>) -> Option<Self> {
        users.sort();
        users.dedup();
        (!users.is_empty()).then(|| Self {
            users: users.into_boxed_slice(),
        })
    }

    pub fn users(&self) -> &[TargetUser] {
        &self.users
    }

    /// The service that connections by pod IP are counted under: the first by name.
    pub fn service(&self) -> Option<&ServiceKey> {
        self.users.first().map(|user| &user.service)
    }

    /// What the first service that says anything says.
    pub fn protocol(&self) -> Protocol {
        let mut protocols = self.users.iter().map(|user| user.protocol);
        protocols
            .find(|protocol| *protocol != Protocol::Detect)
            .unwrap_or(Protocol::Detect)
    }
}
