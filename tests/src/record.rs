//! What tests tell beside passing or failing: figures, and what this kernel does not have.
//!
//! `cargo xtask kernels` reads it and puts it beside the kernel's row.

use std::env;
use std::fs::File;
use std::io::{self, Write as _};
use std::thread;

use serde_json::Value;

/// The file to which records are appended. Without it, they go to the test's output.
const VARIABLE: &str = "MESH_TESTS_RECORD";

/// Writes one record: what it is about, and its fields.
pub fn record(about: &str, mut fields: Value) -> io::Result<()> {
    fields["about"] = about.into();
    let Some(file) = env::var_os(VARIABLE) else {
        eprintln!("{about}: {fields}");
        return Ok(());
    };
    // In one piece, since tests run side by side.
    let line = format!("{fields}\n");
    let mut file = File::options().create(true).append(true).open(file)?;
    file.write_all(line.as_bytes())
}

/// Says that this kernel has no `what`, so that the calling test could only look at what is there instead.
pub fn off(what: &str) -> io::Result<()> {
    let test = thread::current().name().map(str::to_owned);
    record("off", serde_json::json!({ "what": what, "test": test }))
}
