//! Where the agents' CPU time goes in one row: a flame graph of each, from a run of its own that is not measured.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use inferno::collapse::Collapse;
use inferno::collapse::perf::Folder;
use inferno::flamegraph;
use mesh_tests::shell;
use nix::unistd::Pid;
use tempfile::Builder;

/// Samples per second and thread; not a divisor of any timer's rate.
const FREQUENCY: &str = "499";
/// By the debugging information: release builds keep no frame pointers. So many bytes of stack per sample, as many as
/// there can be: a stack that is cut off in the middle puts one function at many places of the graph, and 32 KB
/// are less than half of the stacks where streams arrive.
const CALL_GRAPH: &str = "dwarf,65528";
/// Room for such samples while perf is busy with the last ones.
const BUFFER: &str = "16M";
/// Longer than a round of a quick run, which has too few samples.
const SECONDS: u64 = 5;

/// Records while `work` runs, which is told for how many seconds. For each agent a flame graph (`.svg`) and the stacks
/// that it shows (`.folded`: one per line, with its nanoseconds) are left in the folder, named after the row and the
/// agent's node.
pub(crate) fn record(
    agents: &[(String, Pid)],
    folder: &Path,
    title: &str,
    work: impl FnOnce(u64) -> Result<()>,
) -> Result<()> {
    if agents.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(folder)?;
    let name = file_name(title);
    // Hundreds of megabytes, which go whatever happens.
    let data = Builder::new().suffix(".perf").tempfile_in(folder)?;
    let pids: Vec<String> = agents.iter().map(|(_, pid)| pid.to_string()).collect();
    let mut perf = Command::new("perf")
        .args(["record", "--quiet", "--event", "cpu-clock", "--freq", FREQUENCY])
        .args(["--call-graph", CALL_GRAPH, "--mmap-pages", BUFFER])
        .args(["--pid", &pids.join(","), "--output"])
        .arg(data.path())
        .args(["--", "sleep", &SECONDS.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run perf")?;
    let worked = work(SECONDS + 1);
    let ended = perf.wait()?;
    worked?;
    ensure!(ended.success(), "perf record ended with {ended}");
    for (node, pid) in agents {
        let folded = folder.join(format!("{name}-{node}.folded"));
        let graph = folded.with_extension("svg");
        let mut script = Command::new("perf");
        script.args(["script", "--no-inline", "--pid", &pid.to_string(), "--input"]);
        let stacks = shell::output(script.arg(data.path()))?;
        Folder::default().collapse(stacks.as_bytes(), BufWriter::new(File::create(&folded)?))?;
        let mut options = flamegraph::Options::default();
        options.title = format!("{title}: the agent of {node}");
        "ns".clone_into(&mut options.count_name);
        flamegraph::from_files(&mut options, &[folded], BufWriter::new(File::create(&graph)?))?;
        eprint!("{} ... ", graph.display());
    }
    Ok(())
}

/// `l4-two-nodes, bulk, 1 flow` is `l4-two-nodes-bulk-1-flow`.
fn file_name(title: &str) -> String {
    let words = title.split(|letter: char| !letter.is_ascii_alphanumeric());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    words.join("-").to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::file_name;

    #[test]
    fn a_title_is_a_file_of_one_folder() {
        assert_eq!(
            file_name("l7-same-node, HTTP/1.1, 10 KB, 1 connection"),
            "l7-same-node-http-1-1-10-kb-1-connection"
        );
    }
}
