//! Installs Debian packages without starting the services that some of them bring.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell;

/// Debian's packages ask this program whether they may start a service.
const POLICY: &str = "/usr/sbin/policy-rc.d";
const POLICY_NO: &str =
    "#!/bin/sh\n# Written by mesh-agent's `cargo xtask setup`, which removes it.\nexit 101\n";

/// Services of packages that we install for their program alone: package and unit.
const SERVICES: [(&str, &str); 2] = [("haproxy", "haproxy.service"), ("nginx-light", "nginx.service")];

/// Installs the packages, of other architectures too. Nothing that is installed is removed for them.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let wanted = packages.join(" ");
    let foreign = foreign_architectures(packages);
    if shell::program("apt-get").is_none() {
        bail!(
            "there is no apt-get here to install {wanted}: install their programs by other means \
             (for the eBPF compiler: rustup's nightly with rust-src, and `cargo install bpf-linker`)"
        );
    }
    if !nix::unistd::geteuid().is_root() {
        let adding: String = foreign
            .iter()
            .map(|arch| format!("sudo dpkg --add-architecture {arch} && "))
            .collect();
        bail!(
            "installing packages needs root; run this first:\n    \
             {adding}sudo apt-get update && sudo apt-get install --no-install-recommends {wanted}"
        );
    }
    for arch in &foreign {
        shell::run(Command::new("dpkg").args(["--add-architecture", arch]))?;
    }
    let _policy = NoStart::new()?;
    shell::run(apt_get().arg("update").arg("--quiet"))?;
    shell::run(
        apt_get()
            .args([
                "install",
                "--yes",
                "--quiet",
                "--no-install-recommends",
                "--no-remove",
            ])
            .args(packages),
    )
    .context(
        "apt cannot install what is needed. If it would remove a package, decide that yourself. The eBPF \
             compiler is in Debian 12's security suite; rustup's nightly with rust-src does as well",
    )?;
    for (package, unit) in SERVICES {
        // It was not started; nor shall it be with the next boot. Without systemd nothing would start it.
        if packages.contains(&package) && shell::program("systemctl").is_some() {
            shell::run(Command::new("systemctl").args(["disable", "--quiet", unit]))?;
        }
    }
    Ok(())
}

pub(super) fn is_installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Status}", package]);
    query.output().is_ok_and(|output| output.stdout == b"installed")
}

/// Architectures of which packages are wanted, such as `libstd-rust-web-dev:arm64`, and which dpkg does not know.
fn foreign_architectures<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    let known = ["--print-architecture", "--print-foreign-architectures"].map(|question| {
        let answer = Command::new("dpkg").arg(question).output();
        answer.map_or_else(
            |_| String::new(),
            |answer| String::from_utf8_lossy(&answer.stdout).into_owned(),
        )
    });
    let is_known = |arch: &str| known.iter().any(|known| known.lines().any(|line| line == arch));
    let mut foreign: Vec<_> = packages
        .iter()
        .filter_map(|package| package.split_once(':'))
        .map(|(_, arch)| arch)
        .filter(|arch| !is_known(arch))
        .collect();
    foreign.dedup();
    foreign
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    // Another apt may be at work: that one ends.
    command.env("DEBIAN_FRONTEND", "noninteractive").args([
        "-o",
        "DPkg::Lock::Timeout=300",
        "-o",
        "Dpkg::Use-Pty=0",
    ]);
    command
}

/// Forbids that packages start services, while it lives.
struct NoStart {
    ours: bool,
}

impl NoStart {
    fn new() -> Result<Self> {
        // One that we wrote is left of a run that was interrupted; another's says what its owner wants.
        let ours = fs::read_to_string(POLICY).map_or(true, |text| text == POLICY_NO);
        if ours {
            fs::write(POLICY, POLICY_NO).with_context(|| format!("cannot write {POLICY}"))?;
            fs::set_permissions(Path::new(POLICY), Permissions::from_mode(0o755))?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoStart {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("cannot remove {POLICY}, so no package can start a service: {error}");
        }
    }
}
