//! `mesh-agent doctor` and the start of an agent, by the real program, on nodes that lack something.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use mesh_tests::{program, shell, until};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgid, setuid};

use crate::cgroup::Cgroup;
use crate::foreign::{self, Attach};
use crate::node::{Node, taken};
use crate::world::PATIENCE;

/// Numbers of `linux/capability.h`.
const NET_ADMIN: libc::c_ulong = 12;
const SYS_ADMIN: libc::c_ulong = 21;
const SYS_RESOURCE: libc::c_ulong = 24;
const REFUSAL: &str = "mesh-agent: this node cannot run the agent: ";

/// One line, that begins as every refusal and has these parts; nothing was made before it was said.
fn assert_refused(node: &Node, parts: &[&str]) {
    let said = node.refused();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with(REFUSAL), "{said}");
    for part in parts {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    assert!(!node.config.folder.join("ca").exists(), "{said}");
    assert!(!node.config.bpffs.exists(), "{said}");
}

#[test]
fn a_good_node_passes_and_nothing_is_changed() {
    let node = Node::new();
    let report = node.doctor();
    assert!(
        report.success && report.problems().is_empty(),
        "{:#}",
        report.json
    );
    assert_eq!(report.json["canRun"], true);
    assert_eq!(report.json["agentRuns"], false);
    assert_eq!(report.json["summary"], "this node can run mesh-agent");
    let checks = report.json["checks"].as_array().unwrap().iter();
    let ids: Vec<_> = checks.map(|check| check["id"].as_str().unwrap()).collect();
    for id in [
        "user-namespace",
        "capabilities",
        "namespaces",
        "kernel",
        "bpf",
        "btf",
        "jit",
        "lockdown",
        "cgroup2",
        "hooks",
        "bpffs",
        "agent",
        "admin",
        "metrics",
        "state",
        "ca",
        "resources",
        "programs",
        "features",
    ] {
        assert!(ids.contains(&id), "no {id} in {ids:?}");
    }
    let programs = report.json["programs"].as_array().unwrap();
    assert_eq!(programs.len(), 10);
    assert!(programs.iter().all(|program| program["loads"] == true));
    for name in ["ca", "state"] {
        assert!(!node.config.folder.join(name).exists(), "{name} was made");
    }
    assert!(!node.config.bpffs.exists());
    let said = node.runs();
    assert!(!said.contains("WARN"), "{said}");
    assert_eq!(node.doctor().told("agent").0, "ok", "it ended");
}

#[test]
fn an_agent_that_runs_is_known() {
    let mut node = Node::new();
    let (listener, address) = taken();
    drop(listener);
    node.config.admin = address;
    let process = node.start();
    let report = node.doctor();
    assert!(report.success, "{:#}", report.json);
    let (level, found, _) = report.told("agent");
    assert_eq!(level, "note");
    let number = format!("process {} is an agent", process.id());
    assert!(found.starts_with(&number), "{found}");
    assert_eq!(report.json["agentRuns"], true);
    let summary = report.json["summary"].as_str().unwrap();
    let (can, running) = summary.split_once(": ").unwrap();
    assert_eq!((can, running), ("this node can run mesh-agent, and does", found));
    assert_eq!(report.told("admin").0, "ok", "{:?}", report.told("admin"));
    let connect = report.json["hooks"].as_array().unwrap();
    let connect = connect.iter().find(|hook| hook["hook"] == "connect4").unwrap();
    let owners = connect["programs"].as_array().unwrap().iter();
    assert!(
        owners.filter(|program| program["owner"] == "this agent").count() == 1,
        "{connect:#}"
    );
}

#[test]
fn who_has_a_port_is_named() {
    let mut node = Node::new();
    let (_listener, address) = taken();
    node.config.admin = address;
    let report = node.doctor();
    assert!(!report.success);
    assert_eq!(report.problems(), ["admin"]);
    let (_, found, advice) = report.told("admin");
    let process = format!("(process {})", std::process::id());
    assert!(
        found.contains(&address.to_string()) && found.ends_with(&process),
        "{found}"
    );
    assert!(advice.contains("admin.address"), "{advice}");
    let said = node.refused();
    assert!(
        said.contains(&format!("cannot listen on {address}, the admin.address")),
        "{said}"
    );
    assert_eq!(said.matches("in use").count(), 1, "{said}");
}

#[test]
fn a_program_that_is_attached_exclusively_keeps_us_out() {
    let node = Node::new();
    let cgroup = Cgroup::create(&node.run);
    let below = Below::create(&cgroup);
    foreign::attach(&cgroup.path, c"gate", Attach::Exclusive);
    let node = node.with_part_of_cgroup2(&cgroup.path);
    let report = node.doctor();
    assert!(!report.success);
    assert_eq!(report.problems(), ["hooks"]);
    let hooks = report.check("hooks");
    let detail = hooks["details"][0].as_str().unwrap();
    assert!(detail.starts_with("connect4: `gate` (id "), "{hooks:#}");
    let all = report.json["hooks"].as_array().unwrap();
    let connect = all.iter().find(|hook| hook["hook"] == "connect4").unwrap();
    assert_eq!(
        (&connect["exclusive"], &connect["programs"][0]["name"]),
        (&true.into(), &"gate".into())
    );
    assert_refused(&node, &["exclusively", "connect4: `gate`", "BPF_F_ALLOW_MULTI"]);
    drop(below);
}

#[test]
fn cilium_is_known_by_its_programs_and_lets_us_in() {
    let node = Node::new();
    let cgroup = Cgroup::create(&node.run);
    let below = Below::create(&cgroup);
    foreign::attach(&cgroup.path, c"cil_sock4_conne", Attach::Shared);
    let node = node.with_part_of_cgroup2(&cgroup.path);
    let report = node.doctor();
    assert!(report.success, "{:#}", report.json);
    let (level, _, advice) = report.told("hooks");
    assert_eq!(level, "warning");
    assert!(advice.contains("socketLB.hostNamespaceOnly=true"), "{advice}");
    let said = node.runs();
    assert!(
        said.contains("WARN") && said.contains("Cilium (socket load balancing): connect4"),
        "{said}"
    );
    drop(below);
}

#[test]
fn without_capabilities() {
    let node = Node::new().without_capability(SYS_ADMIN);
    let report = node.doctor();
    assert!(!report.success);
    let (level, found, advice) = report.told("capabilities");
    assert_eq!(level, "problem");
    assert!(
        found.starts_with("this process is root, but lacks CAP_SYS_ADMIN"),
        "{found}"
    );
    assert!(advice.contains("privileged"), "{advice}");
    assert_refused(&node, &["lacks CAP_SYS_ADMIN"]);
}

#[test]
fn with_no_more_capabilities_than_are_needed() {
    // The last is for kernels before 5.11, which count what is loaded as locked memory.
    let node = Node::new().with_capabilities(&[NET_ADMIN, SYS_ADMIN, SYS_RESOURCE]);
    let report = node.doctor();
    assert!(report.success, "{:#}", report.json);
    node.runs();
}

#[test]
fn the_network_capability_is_asked_for_where_the_kernel_asks_for_it() {
    let node = Node::new().with_capabilities(&[SYS_ADMIN, SYS_RESOURCE]);
    let report = node.doctor();
    // Up to Linux 6.8, and what the verifier says is the truth.
    assert_eq!(
        report.told("capabilities").0 == "problem",
        report.told("programs").0 == "problem",
        "{:#}",
        report.json
    );
}

#[test]
fn without_root() {
    let nobody = || {
        setgid(Gid::from_raw(65_534))?;
        Ok(setuid(Uid::from_raw(65_534))?)
    };
    let node = Node::new().but(nobody);
    let report = node.doctor();
    assert!(!report.success);
    assert!(report.problems().contains(&"capabilities"));
    assert_eq!(report.told("capabilities").2, "run it as root");
    assert_refused(&node, &["runs as user 65534", "; run it as root ("]);
}

#[test]
fn in_a_user_namespace() {
    let node = Node::new().but(|| {
        unshare(CloneFlags::CLONE_NEWUSER)?;
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", "0 0 1")?;
        fs::write("/proc/self/gid_map", "0 0 1")
    });
    let report = node.doctor();
    assert!(!report.success);
    assert_eq!(report.told("user-namespace").0, "problem");
    assert_refused(&node, &["in a user namespace", "not in rootless containers"]);
}

#[test]
fn without_cgroup2() {
    let node = Node::new().without_cgroups();
    let report = node.doctor();
    assert_eq!(report.problems(), ["cgroup2"]);
    assert_refused(
        &node,
        &["cgroup2 is not mounted; run `mount -t cgroup2 cgroup2 /sys/fs/cgroup`"],
    );
}

/// A hierarchy of version 1 without controllers, which takes none from anybody.
fn mount_version_1(place: &Path) -> io::Result<()> {
    let options = Some("none,name=mesh-tests");
    Ok(mount(
        Some("cgroup"),
        place,
        Some("cgroup"),
        MsFlags::empty(),
        options,
    )?)
}

#[test]
fn with_cgroups_of_version_1() {
    let node = Node::new().without_cgroups();
    let place = node.config.folder.join("v1");
    fs::create_dir(&place).unwrap();
    let node = node.but(move || mount_version_1(&place));
    assert_refused(&node, &["only cgroup version 1", "/sys/fs/cgroup/unified"]);

    let both = Node::new();
    let place = both.config.folder.join("v1");
    fs::create_dir(&place).unwrap();
    let both = both.but(move || mount_version_1(&place));
    let report = both.doctor();
    assert!(report.success, "{:#}", report.json);
    assert!(
        report.told("cgroup2").1.contains("of version 1"),
        "{:?}",
        report.told("cgroup2")
    );
    both.runs();
}

#[test]
fn a_part_of_the_hierarchy_captures_a_part_of_the_machine() {
    let node = Node::new();
    let cgroup = Cgroup::create(&node.run);
    let node = node.with_part_of_cgroup2(&cgroup.path);
    assert_eq!(node.doctor().problems(), ["cgroup2"]);
    assert_refused(
        &node,
        &[
            "not the root of the hierarchy",
            "no pod would be captured",
            "hostPath",
        ],
    );
    // A cgroup in which nothing runs is nobody.
    let nobody = cgroup.path.join("nobody");
    fs::create_dir(&nobody).unwrap();
    assert_eq!(node.doctor().problems(), ["cgroup2"]);
    fs::remove_dir(&nobody).unwrap();
    // Who has others below itself may be a node in a container.
    let below = Below::create(&cgroup);
    let report = node.doctor();
    assert!(report.success);
    assert_eq!(report.told("cgroup2").0, "warning");
    let said = node.runs();
    assert!(
        said.contains("WARN") && said.contains("what runs outside of it is not captured"),
        "{said}"
    );
    drop(below);
}

/// As container runtimes do it on cgroup v2.
#[test]
fn a_cgroup_namespace_is_a_part_of_the_hierarchy() {
    let node = Node::new();
    let cgroup = Cgroup::create(&node.run);
    let node = node.in_a_cgroup_namespace(cgroup.path.join("cgroup.procs"));
    let report = node.doctor();
    assert_eq!(report.problems(), ["cgroup2"]);
    let (_, found, _) = report.told("cgroup2");
    assert!(found.contains("not the root of the hierarchy"), "{found}");
    assert_refused(&node, &["not the root of the hierarchy"]);
}

#[test]
fn without_a_place_for_pins() {
    let mut node = Node::new();
    node.config.bpffs = node.config.folder.join("agent");
    let report = node.doctor();
    assert_eq!(report.problems(), ["bpffs"]);
    assert_refused(
        &node,
        &["is on no BPF filesystem", "mount -t bpf bpf /sys/fs/bpf"],
    );

    let mut empty = Node::new();
    let place = empty.config.folder.join("empty");
    fs::create_dir(&place).unwrap();
    empty.config.bpffs = place.join("agent");
    let report = empty.doctor();
    assert!(report.success, "{:#}", report.json);
    assert!(
        report
            .told("bpffs")
            .1
            .starts_with("the agent can mount a BPF filesystem at")
    );
    assert!(empty.runs().contains("mounted a BPF filesystem"));

    let node = Node::new();
    let bpffs = node.run.bpffs();
    let node = node.but(move || {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        Ok(mount(None::<&str>, &bpffs, None::<&str>, flags, None::<&str>)?)
    });
    assert_refused(&node, &["Read-only file system"]);
}

#[test]
fn with_a_seccomp_filter() {
    let node = Node::new().with_bpf_failing(libc::EPERM);
    assert_eq!(node.doctor().told("bpf").0, "problem");
    assert_refused(&node, &["a seccomp filter is in force", "seccompProfile"]);
    let node = Node::new().with_bpf_failing(libc::ENOSYS);
    assert_refused(
        &node,
        &["the kernel has no bpf system call", "CONFIG_BPF_SYSCALL"],
    );
}

#[test]
fn what_the_kernel_shows_is_read() {
    let node = Node::new()
        .but(|| {
            let nothing =
                |place: &str| mount(Some("none"), place, Some("tmpfs"), MsFlags::empty(), None::<&str>);
            nothing("/sys/kernel/btf")?;
            nothing("/sys/kernel/security")?;
            fs::write(
                "/sys/kernel/security/lockdown",
                "none integrity [confidentiality]\n",
            )
        })
        .with_file("/proc/sys/net/core/bpf_jit_enable", "0\n");
    let report = node.doctor();
    assert!(report.success, "{:#}", report.json);
    assert!(report.told("btf").1.contains("no BTF, which is not needed"));
    assert!(report.told("lockdown").1.contains("(confidentiality)"));
    let (level, _, advice) = report.told("jit");
    assert_eq!(level, "warning");
    assert!(advice.contains("sysctl net.core.bpf_jit_enable=1"), "{advice}");
    let said = node.runs();
    assert!(
        said.contains("WARN") && said.contains("the BPF JIT is off"),
        "{said}"
    );
}

#[test]
fn a_configuration_that_cannot_be_used() {
    let node = Node::new();
    let file = node.config.folder.join("bad.yaml");
    fs::write(&file, "nodes: a\n").unwrap();
    let agent = program("mesh-agent", "MESH_AGENT_BIN").unwrap();
    let output = shell::raw(Command::new(agent).args(["doctor", "--config"]).arg(&file)).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success());
    assert!(text.contains("PROBLEM  config"), "{text}");
    assert!(text.contains("nodes: unknown field `nodes`"), "{text}");
    assert!(
        text.ends_with("This node cannot run mesh-agent: 1 problem (config).\n"),
        "{text}"
    );
}

#[test]
fn uninstalling_the_wrong_folder_says_so() {
    let node = Node::new();
    let agent = program("mesh-agent", "MESH_AGENT_BIN").unwrap();
    let uninstall = |folder: &Path| {
        let output = shell::raw(Command::new(&agent).args(["uninstall", "--bpffs"]).arg(folder)).unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    };
    let (success, text) = uninstall(&node.config.folder);
    assert!(!success);
    assert!(text.contains("that is no folder on a BPF filesystem"), "{text}");
    node.runs();
    let (success, text) = uninstall(&node.run.bpffs().join("other"));
    assert!(success);
    let own = node.config.bpffs.display();
    assert!(text.starts_with("Nothing to remove"), "{text}");
    assert!(
        text.contains(&format!("mesh-agent uninstall --bpffs {own}")),
        "{text}"
    );
    let (success, text) = uninstall(&node.config.bpffs);
    assert!(success && text.contains("removed "), "{text}");
    assert!(!node.config.bpffs.exists());
}

/// A process in a cgroup below another, as a container's are below a node's.
struct Below {
    path: PathBuf,
    process: Child,
}

impl Below {
    fn create(cgroup: &Cgroup) -> Self {
        let path = cgroup.path.join("below");
        fs::create_dir(&path).unwrap();
        // It lives for as long as its input is open.
        let process = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        fs::write(path.join("cgroup.procs"), process.id().to_string()).unwrap();
        Self { path, process }
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        // Waiting closes its input.
        self.process.wait().unwrap();
        let removed = until("the cgroup to be empty", PATIENCE, || {
            fs::remove_dir(&self.path).ok()
        });
        removed.unwrap();
    }
}
