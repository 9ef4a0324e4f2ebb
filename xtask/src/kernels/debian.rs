//! Debian's packages of any suite and architecture, without touching what this machine's apt knows or installs.
//!
//! apt itself fetches them, so each is what Debian signed. Where from is derived from the machine's own sources,
//! which lead to a mirror that can be reached from here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::sources;
use crate::shell;

/// One suite for one architecture, in a folder of ours.
#[derive(Debug)]
pub(super) struct Archive {
    config: PathBuf,
    folder: PathBuf,
}

impl Archive {
    /// Reads the suite's index anew.
    pub(super) fn open(folder: &Path, suite: &str, architecture: &str) -> Result<Self> {
        ensure!(
            shell::program("apt-get").is_some(),
            "kernels come as Debian packages, and there is no apt-get here"
        );
        let folder = folder.join(format!("{suite}-{architecture}"));
        for part in ["lists/partial", "archives/partial", "sources"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let found = sources::of_suite(&sources::read()?, &own_suite()?, suite);
        ensure!(
            !found.is_empty(),
            "apt's sources on this machine name no Debian archive, so there is none for {suite}"
        );
        fs::write(folder.join("sources/suite.sources"), found)?;
        // Nothing is installed there, so everything that a package needs counts as missing.
        fs::write(folder.join("status"), "")?;
        let archive = Self {
            config: folder.join("apt.conf"),
            folder,
        };
        fs::write(&archive.config, archive.settings(architecture))?;
        shell::output(archive.apt("apt-get").args(["update", "--quiet=2"]))
            .with_context(|| format!("cannot read the index of {suite} for {architecture}"))?;
        Ok(archive)
    }

    fn settings(&self, architecture: &str) -> String {
        let folder = self.folder.display();
        format!(
            "Dir::Etc::sourcelist \"/nonexistent\";\n\
             Dir::Etc::sourceparts \"{folder}/sources\";\n\
             Dir::State::Lists \"{folder}/lists\";\n\
             Dir::State::status \"{folder}/status\";\n\
             Dir::Cache::archives \"{folder}/archives\";\n\
             Dir::Cache::pkgcache \"\";\n\
             Dir::Cache::srcpkgcache \"\";\n\
             APT::Architecture \"{architecture}\";\n\
             APT::Architectures:: \"{architecture}\";\n\
             APT::Sandbox::User \"root\";\n\
             Debug::NoLocking \"true\";\n\
             # The index of a suite that gets no more updates is not signed anew either.\n\
             Acquire::Check-Valid-Until \"false\";\n"
        )
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config).current_dir(&self.folder);
        command
    }

    /// What each version of a package that only names another one leads to, the newest first.
    pub(super) fn led_to_by(&self, package: &str) -> Result<Vec<String>> {
        let said = shell::output(self.apt("apt-cache").args(["show", package]))?;
        Ok(said
            .lines()
            .filter_map(|line| line.strip_prefix("Depends: ")?.split([' ', ',']).next())
            .map(str::to_owned)
            .collect())
    }

    /// Unpacks one package, without what it depends on.
    pub(super) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        self.clean()?;
        let mut apt = self.apt("apt-get");
        apt.args(["download", "--quiet=2", package]);
        shell::output(apt.current_dir(self.folder.join("archives")))
            .with_context(|| format!("cannot fetch {package}"))?;
        self.unpack_fetched(into)
    }

    /// Unpacks packages with everything that they depend on.
    pub(super) fn unpack_all(&self, packages: &[&str], into: &Path) -> Result<()> {
        self.clean()?;
        let mut apt = self.apt("apt-get");
        apt.args([
            "install",
            "--quiet=2",
            "--yes",
            "--download-only",
            "--no-install-recommends",
        ]);
        shell::output(apt.args(packages)).with_context(|| format!("cannot fetch {}", packages.join(" ")))?;
        self.unpack_fetched(into)
    }

    fn unpack_fetched(&self, into: &Path) -> Result<()> {
        let mut any = false;
        for entry in fs::read_dir(self.folder.join("archives"))? {
            let file = entry?.path();
            if file.extension().is_some_and(|extension| extension == "deb") {
                shell::run(Command::new("dpkg").arg("--extract").arg(&file).arg(into))?;
                any = true;
            }
        }
        ensure!(any, "apt fetched nothing");
        self.clean()
    }

    fn clean(&self) -> Result<()> {
        shell::run(self.apt("apt-get").arg("clean"))
    }
}

/// The suite that this machine is installed from.
pub(super) fn own_suite() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("cannot tell which Linux this is")?;
    let field = |name: &str| {
        let start = format!("{name}=");
        release
            .lines()
            .find_map(|line| Some(line.strip_prefix(&start)?.trim_matches('"').to_owned()))
    };
    if field("ID").as_deref() != Some("debian") {
        bail!("kernels come as Debian packages, and this is no Debian");
    }
    field("VERSION_CODENAME").context("this Debian has no codename in /etc/os-release")
}
