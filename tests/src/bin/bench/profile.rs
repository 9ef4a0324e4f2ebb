//! Where the proxies' CPU time goes: a flame graph of one row, from a run of its own that is not measured.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use inferno::collapse::Collapse;
use inferno::collapse::perf::Folder;
use inferno::flamegraph;
use mesh_tests::shell;
use nix::unistd::Pid;

/// Samples per second and thread; not a divisor of any timer's rate.
const FREQUENCY: &str = "499";
/// By the debugging information: release builds keep no frame pointers. So many bytes of stack per sample.
const CALL_GRAPH: &str = "dwarf,8192";

/// Records while `work` runs; the flame graph's file. The collapsed stacks lie beside it.
pub(crate) fn profile(
    pids: &[Pid],
    file: &Path,
    seconds: u64,
    work: impl FnOnce() -> Result<()>,
) -> Result<PathBuf> {
    let folder = file.parent().context("a file in no folder")?;
    fs::create_dir_all(folder)?;
    let (data, folded, graph) = (
        file.with_extension("perf"),
        file.with_extension("folded"),
        file.with_extension("svg"),
    );
    let pids: Vec<String> = pids.iter().map(Pid::to_string).collect();
    let mut perf = Command::new("perf")
        .args(["record", "--quiet", "--event", "cpu-clock", "--freq", FREQUENCY])
        .args(["--call-graph", CALL_GRAPH, "--pid", &pids.join(","), "--output"])
        .arg(&data)
        .args(["--", "sleep", &seconds.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run perf")?;
    let worked = work();
    let ended = perf.wait()?;
    worked?;
    ensure!(ended.success(), "perf record ended with {ended}");
    let mut script = Command::new("perf");
    script.args(["script", "--no-inline", "--input"]).arg(&data);
    let stacks = shell::output(&mut script)?;
    Folder::default().collapse(stacks.as_bytes(), BufWriter::new(File::create(&folded)?))?;
    let mut options = flamegraph::Options::default();
    flamegraph::from_files(&mut options, &[folded], BufWriter::new(File::create(&graph)?))?;
    fs::remove_file(data)?;
    Ok(graph)
}
