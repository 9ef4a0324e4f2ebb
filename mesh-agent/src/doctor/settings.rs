//! What the agent's configuration asks of the node: addresses, folders, documents.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};
use socket2::{Domain, Socket, Type};

use super::privileges::Privileges;
use super::{Check, Group, Level, explain};
use crate::config::{AgentConfig, validate};
use crate::ebpf::PinSite;
use crate::ebpf::examine::{AgentFolder, AgentOwner};
use crate::identity::Identities;
use crate::model::Severity;
use crate::tls;

/// Who runs with a folder.
pub(super) fn owner(bpffs: &Path, agents: &[AgentFolder]) -> AgentOwner {
    agents
        .iter()
        .find(|agent| agent.path == bpffs)
        .map_or(AgentOwner::Nobody, |agent| agent.owner)
}

/// The same in words; `None` if nobody does.
pub(super) fn running(bpffs: &Path, owner: AgentOwner) -> Option<String> {
    let folder = bpffs.display();
    match owner {
        AgentOwner::Nobody => None,
        AgentOwner::Process(process) => {
            Some(format!("process {process} is an agent that runs with {folder}"))
        }
        AgentOwner::Hidden => Some(format!("an agent that is not seen from here runs with {folder}")),
    }
}

pub(super) fn check(config: &AgentConfig, owner: AgentOwner) -> Vec<Check> {
    let mut checks = vec![
        bpffs(&config.bpffs),
        agent(&config.bpffs, owner),
        address("admin", "admin.address", config.admin, owner),
        address("metrics", "metrics.address", config.metrics, owner),
        state(&config.state_dir),
        authority(config),
        resources(config),
    ];
    checks.extend(kernel_tls(config));
    checks
}

/// Whether the kernel can do what it is asked to, if it is.
pub(super) fn kernel_tls(config: &AgentConfig) -> Option<Check> {
    let check = |found: String| Check::ok(Group::Configuration, "kernelTls", found);
    config.kernel_tls.then(|| match tls::probe_kernel() {
        Ok(()) => check("the kernel can encrypt what goes between agents (kernelTls)".to_owned()),
        Err(error) => check(format!("kernelTls is on, but {}", explain(&error))).but(
            Level::Warning,
            "the agent encrypts, as with `kernelTls: false`; load the modules on the host (`modprobe -a tls \
             chacha20poly1305`) and start it again, or turn the option off",
        ),
    })
}

/// A configuration that cannot be used.
pub(super) fn invalid(findings: Vec<String>) -> Check {
    let check = Check::ok(
        Group::Configuration,
        "config",
        "the agent's configuration cannot be used",
    );
    check.with(findings).but(
        Level::Problem,
        "mend the file; `mesh-agent validate --config` checks it",
    )
}

pub(super) fn bpffs(folder: &Path) -> Check {
    let check = |found: String| Check::ok(Group::Configuration, "bpffs", found);
    let tried = PinSite::of(folder).and_then(|site| site.try_out().map(|()| site));
    match tried {
        Ok(PinSite::Bpffs(_)) => check(format!("{} is on a BPF filesystem", folder.display())),
        Ok(PinSite::MountAt(parent)) => check(format!(
            "the agent can mount a BPF filesystem at {}",
            parent.display()
        )),
        Err(error) if !Privileges::own().may_mount() => {
            check(explain(&error)).but(Level::Problem, "run it as the machine's root, with CAP_SYS_ADMIN")
        }
        Err(error) => check(explain(&error)).but(
            Level::Problem,
            "run `mount -t bpf bpf /sys/fs/bpf` on the host, give it to containers (`hostPath`), and set `bpffs` to a folder on it",
        ),
    }
}

fn agent(folder: &Path, owner: AgentOwner) -> Check {
    let check = |found: String| Check::ok(Group::Configuration, "agent", found);
    match running(folder, owner) {
        None => check(format!("no agent runs with {}", folder.display())),
        Some(running) => check(running).but(
            Level::Note,
            "a second one there would refuse to start: stop it first, or give the new one another `bpffs`",
        ),
    }
}

/// Whether the agent could listen there. Nobody can reach what is bound but does not listen.
fn address(id: &'static str, field: &str, address: SocketAddr, owner: AgentOwner) -> Check {
    let check = |found: String| Check::ok(Group::Configuration, id, found);
    let tried = Socket::new(Domain::for_address(address), Type::STREAM, None).and_then(|socket| {
        // As for the agent's own listener: connections that linger are not in the way.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())
    });
    let Err(error) = tried else {
        return check(format!("{address} ({field}) is free"));
    };
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            let taken = check(format!("{address} ({field}) is taken"));
            match (holder(address.port()), owner) {
                (Some((process, _)), AgentOwner::Process(agent)) if process == agent => check(format!(
                    "{address} ({field}) is in use by the agent that runs here"
                )),
                (None, AgentOwner::Process(_) | AgentOwner::Hidden) => taken.but(
                    Level::Note,
                    "probably by the agent that runs here; if not, set another in its configuration",
                ),
                (Some((process, name)), _) => check(format!(
                    "{address} ({field}) is taken by {name} (process {process})"
                ))
                .but(Level::Problem, format!("stop it, or set another {field}")),
                (None, _) => taken.but(
                    Level::Problem,
                    format!(
                        "set another {field}, or stop who listens there (`ss -ltnp 'sport = {}'`)",
                        address.port()
                    ),
                ),
            }
        }
        io::ErrorKind::AddrNotAvailable => check(format!("this machine has no address {}", address.ip()))
            .but(
                Level::Problem,
                format!("set {field} to an address of this machine, or to 0.0.0.0"),
            ),
        _ => check(format!("the agent cannot listen on {address} ({field}): {error}"))
            .but(Level::Problem, format!("set another {field}")),
    }
}

/// The process that listens on a port, and its name, as far as this one may see.
fn holder(port: u16) -> Option<(u32, String)> {
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];
    let tables: Vec<_> = tables
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .collect();
    let wanted: Vec<_> = tables
        .iter()
        .flat_map(|table| listeners(table, port))
        .map(|inode| PathBuf::from(format!("socket:[{inode}]")))
        .collect();
    if wanted.is_empty() {
        return None;
    }
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .find(|process| {
            let descriptors = fs::read_dir(format!("/proc/{process}/fd"));
            descriptors
                .into_iter()
                .flatten()
                .flatten()
                .any(|entry| fs::read_link(entry.path()).is_ok_and(|link| wanted.contains(&link)))
        })
        .map(|process| {
            let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            (process, name.trim().to_owned())
        })
}

/// The inodes of the sockets that listen on `port`, in the text of `/proc/net/tcp`.
fn listeners(table: &str, port: u16) -> impl Iterator<Item = &str> {
    /// `TCP_LISTEN`
    const LISTEN: &str = "0A";
    table.lines().skip(1).filter_map(move |line| {
        let mut words = line.split_whitespace();
        let local = words.nth(1)?.rsplit_once(':')?.1;
        let state = words.nth(1)?;
        let inode = words.nth(5)?;
        (state == LISTEN && u16::from_str_radix(local, 16) == Ok(port)).then_some(inode)
    })
}

fn state(folder: &Path) -> Check {
    let check = |found: String| Check::ok(Group::Configuration, "state", found);
    let shown = folder.display();
    match writable(folder) {
        Ok(true) => check(format!("{shown} (stateDir) can be written")),
        Ok(false) => check(format!("{shown} (stateDir) can be made")),
        Err((place, error)) => check(format!(
            "{} cannot be written: {}",
            place.display(),
            error.desc()
        ))
        .but(
            Level::Warning,
            "let the agent write its stateDir: without it, it starts without resources when their files are bad or gone",
        ),
    }
}

/// True if the folder is there, false if it can be made; else what is in the way.
fn writable(folder: &Path) -> Result<bool, (PathBuf, Errno)> {
    let nearest = folder.ancestors().find(|ancestor| ancestor.exists());
    let nearest = match nearest {
        Some(nearest) if !nearest.as_os_str().is_empty() => nearest,
        // A relative path of which nothing is there yet.
        _ => Path::new("."),
    };
    if !nearest.is_dir() {
        return Err((nearest.to_owned(), Errno::ENOTDIR));
    }
    let may = AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK;
    faccessat(AT_FDCWD, nearest, may, AtFlags::AT_EACCESS).map_err(|error| (nearest.to_owned(), error))?;
    Ok(nearest == folder)
}

fn authority(config: &AgentConfig) -> Check {
    let folder = &config.ca_directory;
    let check = |found: String| Check::ok(Group::Configuration, "ca", found);
    let shown = folder.display();
    let there = |name: &str| fs::exists(folder.join(name)).unwrap_or(true);
    match (there("ca-key.pem"), there("ca-cert.pem")) {
        // With both there, opening makes nothing.
        (true, true) => match Identities::open_embedded(folder, &config.trust_domain) {
            Ok(_) => check(format!("the certificate authority in {shown} can be used")),
            Err(error) => check(format!(
                "the certificate authority cannot be used: {}",
                explain(&error)
            ))
            .but(Level::Problem, "mend or move what is named there"),
        },
        (false, true) => check(format!("{shown} has a certificate (ca-cert.pem), but not its key")).but(
            Level::Problem,
            "restore ca-key.pem, or move ca-cert.pem away and a new root is made",
        ),
        (_, false) => match writable(folder) {
            Ok(_) => check(format!("a new certificate authority will be made in {shown}")).but(
                Level::Note,
                "put the root that the nodes share there (ca-key.pem and ca-cert.pem) before the agent starts: nodes with roots of their own do not trust each other",
            ),
            Err((place, error)) => check(format!(
                "{} cannot be written, and {shown} has no certificate authority: {}",
                place.display(),
                error.desc()
            ))
            .but(Level::Problem, "let the agent write it, or put a root there"),
        },
    }
}

fn resources(config: &AgentConfig) -> Check {
    let check = |found: String| Check::ok(Group::Configuration, "resources", found);
    let unreadable: Vec<_> = config
        .files
        .iter()
        .filter_map(|path| {
            let error = File::open(path).err()?;
            Some(format!("{}: {error}", path.display()))
        })
        .collect();
    if !unreadable.is_empty() {
        return check("resources cannot be read".to_owned())
            .with(unreadable)
            .but(
                Level::Warning,
                "put them there, or set `resources.files`; the agent runs without, and captures nothing until they come",
            );
    }
    let found = validate(&config.files, config.settings());
    let counted = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let documents = counted(found.documents, "document");
    let text = format!("{documents} in {}", counted(found.files, "file"));
    match found.count(Severity::Error) {
        0 => check(text),
        errors => check(format!("{text}, with {}", counted(errors, "error"))).but(
            Level::Warning,
            "`mesh-agent validate` shows them; bad documents are refused, each for itself",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_taken_port_names_who_has_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = listener.local_addr().unwrap();
        let taken = address("admin", "admin.address", here, AgentOwner::Nobody);
        assert_eq!(taken.level, Level::Problem);
        let own = format!("(process {})", std::process::id());
        assert!(taken.found.contains(&own), "{taken}");
        let agents = address(
            "admin",
            "admin.address",
            here,
            AgentOwner::Process(std::process::id()),
        );
        assert_eq!(agents.level, Level::Ok, "{agents}");
        drop(listener);
        let free = address("admin", "admin.address", here, AgentOwner::Nobody);
        assert_eq!(free.level, Level::Ok, "{free}");
        let elsewhere = "192.0.2.1:80".parse().unwrap();
        let check = address("admin", "admin.address", elsewhere, AgentOwner::Nobody);
        assert!(check.to_string().contains("no address 192.0.2.1"), "{check}");
    }

    #[test]
    fn an_agent_is_known_by_its_folder() {
        let folder = Path::new("/sys/fs/bpf/mesh-agent");
        assert_eq!(owner(folder, &[]), AgentOwner::Nobody);
        assert_eq!(running(folder, AgentOwner::Nobody), None);
        let seen = running(folder, AgentOwner::Process(812)).unwrap();
        assert_eq!(
            seen,
            "process 812 is an agent that runs with /sys/fs/bpf/mesh-agent"
        );
        let check = agent(folder, AgentOwner::Hidden);
        assert_eq!(check.level, Level::Note);
        assert!(check.found.contains("not seen from here"), "{check}");
        assert_eq!(agent(folder, AgentOwner::Nobody).level, Level::Ok);
    }

    #[test]
    fn only_listeners_of_the_port_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
             0: 0100007F:3A98 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0\n   \
             1: 0100007F:3A98 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 100 0\n   \
             2: 0100007F:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0 100 0\n";
        assert_eq!(listeners(table, 15000).collect::<Vec<_>>(), ["4711"]);
    }

    #[test]
    fn folders_are_there_or_can_be_made_and_are_not_made() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(writable(dir.path()), Ok(true));
        let inside = dir.path().join("a/b");
        assert_eq!(writable(&inside), Ok(false));
        assert!(!inside.exists());
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(writable(&file.join("x")), Err((file, Errno::ENOTDIR)));
    }
}
