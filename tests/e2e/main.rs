//! End-to-end tests: real kernel, real network namespaces, two agents, real peers.

mod fixture;
