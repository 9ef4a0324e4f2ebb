//! Sources of resources. The file source watches files and folders, compiles what changed and publishes it.
//!
//! All of it runs on a thread of its own: reading and compiling never hold up the data path. Invariants: what was
//! good stays in force until something good replaces it or its file is taken away; what is in force is on disk, so
//! that an agent that starts while its files cannot be read goes on where the last one stopped.

mod events;
mod journal;
mod saver;
mod scan;
mod stamp;
mod watch;

pub use scan::FileSource;
pub use watch::Watching;

#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod tests;
