//! The harness of the end-to-end tests and of the demo: whole meshes on one machine.
//!
//! A [`Mesh`] is two "nodes" joined by a link that can be listened to, pods in network namespaces of their own,
//! and one agent per node. Everything carries the name of its [`Run`]: it goes when the run is dropped, and what
//! a crashed run left goes when the next one starts. It needs root.

mod agent;
mod capture;
pub mod http;
mod mesh;
mod metrics;
mod netns;
mod pod;
mod process;
mod record;
mod run;
pub mod shell;
mod wait;
mod wire;

pub use agent::Agent;
pub use capture::{Capture, Seen};
pub use mesh::{Mesh, Options, THREADS, program};
pub use metrics::{Sample, Samples};
pub use netns::Netns;
pub use pod::{Pod, PodSpec, Response};
pub use process::Process;
pub use record::{off, record};
pub use run::{Interrupt, Run};
pub use wait::{patience, until, until_ok};
