//! `cargo xtask dist`: what users download, for each architecture.
//!
//! One tarball with everything to run the agent, its debugging information in a file beside it, and the checksums
//! of all. The same agent packed twice gives the same bytes: nothing of the machine or of the hour goes in, but with
//! `--trained` the profile that lies beside it.

mod notices;
mod sums;
mod tarball;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use self::tarball::Entry;
use crate::build_ebpf::Built;
use crate::cross::{self, Arch};
use crate::kernels::needed_by;
use crate::setup::{self, Need};
use crate::shell::{self, Steps};
use crate::train;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the name of the file with debugging information ends with.
const DEBUG_SUFFIX: &str = ".debug";

/// What the name of a trained agent's profile ends with.
const PROFILE_SUFFIX: &str = ".profdata";

#[derive(Debug, clap::Args)]
#[command(after_help = "\
In the output folder, for each architecture:
  mesh-agent-VERSION-linux-ARCH.tar.gz   the agent and what belongs to it
  mesh-agent-VERSION-linux-ARCH.debug    its debugging information: put it beside the agent
  mesh-agent-VERSION-linux-ARCH.profdata with --trained: the profile, which whoever wants to make the same needs
  SHA256SUMS                             of all these files: sha256sum --check SHA256SUMS

Times in the tarball are that of the commit, or $SOURCE_DATE_EPOCH.")]
pub(crate) struct Args {
    /// What to build for; as often as wanted. Default: this machine.
    #[arg(long, value_enum)]
    arch: Vec<Arch>,
    /// Optimise the agent with the profile of the last `cargo xtask train`, and put that beside it.
    #[arg(long)]
    trained: bool,
    /// Where to put it; `dist` in the target folder without it.
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut wanted = args.arch.clone();
    if wanted.is_empty() {
        wanted.push(Arch::host()?);
    }
    if wanted.is_empty() {
        bail!("no agent runs on {}: say --arch", env::consts::ARCH);
    }
    wanted.sort();
    wanted.dedup();
    let folder = match &args.output {
        Some(folder) => env::current_dir()?.join(folder),
        None => shell::target_dir().join("dist"),
    };
    if args.trained && wanted.iter().any(|arch| !arch.is_host()) {
        bail!(
            "a profile is of the architecture that it was made on: leave out --trained, or the other --arch"
        );
    }
    let trained = args.trained.then(train::profile).transpose()?;
    // All that can be missing, before anything long.
    let foreign = wanted.iter().filter(|arch| !arch.is_host());
    let needs: Vec<_> = [Need::Build]
        .into_iter()
        .chain(foreign.map(|arch| Need::Cross(*arch)))
        .collect();
    setup::ensure(&needs)?;
    let time = source_time()?;
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut steps = Steps::default();
    let built: Vec<_> = wanted
        .into_iter()
        .map(|arch| {
            let built = match &trained {
                Some(profile) => train::build(&mut steps, profile)?,
                None => cross::build(&mut steps, arch, &[], &[])?,
            };
            Ok((arch, built))
        })
        .collect::<Result<_>>()?;
    check_objects(&built)?;
    let mut files = Vec::new();
    for (arch, built) in &built {
        let package = Package { arch: *arch, time };
        files.extend(steps.run(&format!("pack for {arch}"), || {
            package.make(&built.agent, &folder)
        })?);
        if let Some(profile) = &trained {
            // Whoever wants to make the same agent needs it.
            let name = format!("{}{PROFILE_SUFFIX}", package.name());
            fs::copy(profile, folder.join(&name))?;
            files.push(name);
        }
    }
    steps.run("check", || {
        sums::write(&folder, &files, time)?;
        sums::check(&folder)
    })?;
    for file in files.iter().map(String::as_str).chain([sums::FILE]) {
        let size = folder.join(file).metadata()?.len();
        eprintln!("{:>9.1} MB  {}", size as f64 / 1e6, folder.join(file).display());
    }
    Ok(())
}

/// What is tested of the kernel side on one architecture holds for the others too: it is the same object.
fn check_objects(built: &[(Arch, Built)]) -> Result<()> {
    let objects: Vec<_> = built
        .iter()
        .map(|(_, built)| fs::read(&built.object))
        .collect::<Result<_, _>>()?;
    if objects.windows(2).any(|pair| pair[0] != pair[1]) {
        bail!(
            "the agents have different eBPF objects inside: is one of an older build? See mesh-agent/build.rs"
        );
    }
    Ok(())
}

/// When the packed sources are from, in seconds of Unix time: what every entry carries.
fn source_time() -> Result<u64> {
    if let Ok(text) = env::var("SOURCE_DATE_EPOCH") {
        return text.parse().with_context(|| {
            format!("SOURCE_DATE_EPOCH is `{text}`, which is no number of seconds since 1970")
        });
    }
    let git = |words: &[&str]| {
        let mut git = Command::new("git");
        shell::output(git.current_dir(shell::workspace()).args(words))
    };
    let time = git(&["log", "-1", "--format=%ct"])
        .context("the time of the commit is not to be had: outside a git clone set SOURCE_DATE_EPOCH")?;
    if !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty() {
        eprintln!("warning: there are changes that no commit has, so nobody else can make these files");
    }
    time.trim().parse().context("git shows no time of the commit")
}

/// A release for one architecture.
struct Package {
    arch: Arch,
    time: u64,
}

impl Package {
    /// Of the files, and of the folder in the tarball.
    fn name(&self) -> String {
        format!("mesh-agent-{VERSION}-linux-{}", self.arch)
    }

    /// Makes the tarball of a built agent, and the file with its debugging information; returns their names.
    fn make(&self, agent: &Path, folder: &Path) -> Result<Vec<String>> {
        let name = self.name();
        let (archive, debug) = (
            format!("{name}{}", tarball::SUFFIX),
            format!("{name}{DEBUG_SUFFIX}"),
        );
        let stripped = self.split(agent, &folder.join(&debug))?;
        let needed = needed_by(&stripped).context("the agent cannot be read")?;
        ensure!(
            needed.is_empty(),
            "the agent asks nodes for {}: it should have all inside",
            needed.join(", ")
        );
        let mut entries = tarball::belongings(shell::workspace())?;
        entries.push(Entry::new("mesh-agent", 0o755, stripped.clone()));
        entries.push(Entry::new(
            "THIRD-PARTY-LICENSES",
            0o644,
            notices::collect(&self.arch.target(), &stripped)?,
        ));
        tarball::write(&folder.join(&archive), &name, entries, self.time)?;
        tarball::check(&folder.join(&archive), &name)?;
        Ok(vec![archive, debug])
    }

    /// Moves what only debuggers and backtraces read out of the agent into `debug`, which the rest names.
    fn split(&self, agent: &Path, debug: &Path) -> Result<Vec<u8>> {
        let objcopy = match self.arch.is_host() {
            true => "objcopy".to_owned(),
            false => self.arch.gnu_tool("objcopy"),
        };
        let scratch = tempfile::tempdir()?;
        let stripped = scratch.path().join("mesh-agent");
        shell::run(
            Command::new(&objcopy)
                .args(["--only-keep-debug", "--compress-debug-sections"])
                .args([agent, debug]),
        )?;
        fs::set_permissions(debug, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        let mut link = std::ffi::OsString::from("--add-gnu-debuglink=");
        link.push(debug);
        shell::run(
            Command::new(&objcopy)
                .arg("--strip-all")
                .arg(link)
                .args([agent, &stripped]),
        )?;
        Ok(fs::read(stripped)?)
    }
}

#[cfg(test)]
mod tests;
