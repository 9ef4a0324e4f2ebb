//! The node agent: eBPF capture, one shared proxy, and a page to look inside.

pub mod model;
pub mod sock;
pub mod store;
