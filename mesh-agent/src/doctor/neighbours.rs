//! Who else is at our hooks, and what that means.
//!
//! The programs of a hook all run, the oldest first, and each may change where a connection goes; only who attached
//! exclusively keeps us out.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::{Check, Group, Level};
use crate::ebpf::examine::{self, AgentFolder, AttachedProgram, HookUse};

/// The kernel's limit for a hook of one cgroup.
const MOST_PROGRAMS: usize = 64;

/// What is at a hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Neighbour {
    pub hook: &'static str,
    /// It keeps others out.
    pub exclusive: bool,
    pub programs: Vec<NeighbourProgram>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NeighbourProgram {
    pub id: u32,
    /// Cut by the kernel after 15 bytes.
    pub name: String,
    /// Who it probably is.
    pub owner: String,
}

/// Somebody who is known to be at these hooks.
struct Known {
    /// What the names of its programs begin with, cut as the kernel cuts them.
    names: &'static [&'static str],
    owner: &'static str,
    /// What it means and what to do; empty if nothing.
    advice: &'static str,
}

const SYSTEMD: &str = "systemd";

const KNOWN: [Known; 7] = [
    Known {
        names: &["cil_sock", "sock4_", "sock6_"],
        owner: "Cilium (socket load balancing)",
        advice: "set `socketLB.hostNamespaceOnly=true` in Cilium: else it turns the address of a Service into that of a pod before this agent sees it, and routes of Services hold for HTTP with a Host header only",
    },
    Known {
        names: &["calico_connect", "calico_sendmsg", "calico_recvmsg"],
        owner: "Calico (connect-time load balancing)",
        advice: "set `bpfConnectTimeLoadBalancing: Disabled` in Calico's FelixConfiguration: else it turns the address of a Service into that of a pod before this agent sees it, and routes of Services hold for HTTP with a Host header only",
    },
    Known {
        names: &["cgroup_connect4", "cgroup_connect6", "sockops_prog"],
        owner: "Kmesh",
        advice: "let one mesh capture a pod: take the pods of one out of the other",
    },
    Known {
        names: &["mb_sock", "mb_"],
        owner: "Merbridge",
        advice: "let one mesh capture a pod: take the pods of one out of the other",
    },
    Known {
        names: &["tproxy_wan_cg"],
        owner: "dae",
        advice: "keep the pods out of dae's reach: it redirects connections too",
    },
    Known {
        names: &["sd_"],
        owner: SYSTEMD,
        advice: "",
    },
    Known {
        names: &["mesh_"],
        owner: "another mesh-agent, whose pins are not seen from here",
        advice: "",
    },
];

/// Looks at the hooks of `cgroup`, and at that of this network namespace. `own` is the folder of this agent's pins.
pub(super) fn check(
    cgroup: &Path,
    agents: &[AgentFolder],
    own: Option<&Path>,
) -> (Vec<Check>, Vec<Neighbour>) {
    match examine::hooks(cgroup, agents) {
        Ok(mut hooks) => {
            let check = judge(&hooks, own);
            hooks.extend(examine::lookup_hook(agents).ok());
            let shown = hooks.iter().map(|hook| describe(hook, own)).collect();
            (vec![check], shown)
        }
        Err(error) => (vec![unknown(&error)], Vec::new()),
    }
}

fn unknown(error: &io::Error) -> Check {
    let check = |found: String| Check::ok(Group::Cgroup, "hooks", found);
    match error.raw_os_error() {
        Some(libc::EINVAL) => check("the kernel attaches no programs to cgroups".to_owned())
            .but(Level::Problem, "use a kernel with CONFIG_CGROUP_BPF=y"),
        _ => check(format!("who is at our hooks cannot be asked: {error}"))
            .but(Level::Note, "run this as root to see"),
    }
}

fn judge(hooks: &[HookUse], own: Option<&Path>) -> Check {
    let check = |found: &str| Check::ok(Group::Cgroup, "hooks", found);
    let list = |hook: &HookUse| {
        let programs = hook.programs.iter();
        let names: Vec<_> = programs.map(|program| named(program, own)).collect();
        format!("{}: {}", hook.hook, names.join(", "))
    };
    let blocked: Vec<_> = hooks.iter().filter(|hook| hook.exclusive).collect();
    if !blocked.is_empty() {
        return check("a program that is attached exclusively keeps ours out")
            .with(blocked.into_iter().map(list).collect())
            .but(
                Level::Problem,
                "stop its owner or detach it (`bpftool cgroup detach`), or have it attached with BPF_F_ALLOW_MULTI",
            );
    }
    let ours = |program: &AttachedProgram| own.is_some() && program.agent.as_deref() == own;
    let full = hooks
        .iter()
        .find(|hook| hook.programs.len() >= MOST_PROGRAMS && !hook.programs.iter().any(ours));
    if let Some(hook) = full {
        return check(&format!(
            "{MOST_PROGRAMS} programs are at {}, all that fit",
            hook.hook
        ))
        .but(
            Level::Problem,
            "remove some; `mesh-agent uninstall --bpffs DIR` removes those of an agent that is gone",
        );
    }
    let mut owners: BTreeMap<String, Vec<&'static str>> = BTreeMap::new();
    let mut advice: Vec<&'static str> = Vec::new();
    for hook in hooks {
        for program in hook.programs.iter().filter(|program| !ours(program)) {
            let at = owners.entry(owner(program, own)).or_default();
            if !at.contains(&hook.hook) {
                at.push(hook.hook);
            }
            let more = known(program).map_or("", |known| known.advice);
            if program.agent.is_none() && !more.is_empty() && !advice.contains(&more) {
                advice.push(more);
            }
        }
    }
    let details = owners
        .iter()
        .map(|(owner, hooks)| format!("{owner}: {}", hooks.join(" ")));
    let details: Vec<_> = details.collect();
    let is_left = hooks
        .iter()
        .flat_map(|hook| &hook.programs)
        .any(|program| program.is_left && !ours(program));
    match (details.is_empty(), advice.is_empty()) {
        (true, _) => check("nobody else is at our hooks"),
        (false, true) => {
            let check = check("others are at our hooks too, which does no harm").with(details);
            match is_left {
                false => check,
                true => check.but(
                    Level::Note,
                    "run `mesh-agent uninstall --bpffs FOLDER` for those that are gone and do not come back",
                ),
            }
        }
        (false, false) => check("others at our hooks change connections too")
            .with(details)
            .but(Level::Warning, advice.join("; ")),
    }
}

fn describe(hook: &HookUse, own: Option<&Path>) -> Neighbour {
    let program = |program: &AttachedProgram| NeighbourProgram {
        id: program.id,
        name: program.name.clone(),
        owner: owner(program, own),
    };
    Neighbour {
        hook: hook.hook,
        exclusive: hook.exclusive,
        programs: hook.programs.iter().map(program).collect(),
    }
}

fn known(program: &AttachedProgram) -> Option<&'static Known> {
    KNOWN
        .iter()
        .find(|known| known.names.iter().any(|name| program.name.starts_with(name)))
}

fn owner(program: &AttachedProgram, own: Option<&Path>) -> String {
    match (&program.agent, known(program)) {
        (Some(folder), _) if Some(folder.as_path()) == own => "this agent".to_owned(),
        (Some(folder), _) => format!(
            "the mesh-agent of {}{}",
            folder.display(),
            if program.is_left { ", which is gone" } else { "" }
        ),
        (None, Some(known)) => known.owner.to_owned(),
        (None, None) => format!("an unknown program {}", named_only(program)),
    }
}

fn named(program: &AttachedProgram, own: Option<&Path>) -> String {
    match (&program.agent, known(program)) {
        (None, None) => named_only(program),
        _ => format!("{} of {}", named_only(program), owner(program, own)),
    }
}

fn named_only(program: &AttachedProgram) -> String {
    match program.name.as_str() {
        "" => format!("(id {})", program.id),
        name => format!("`{name}` (id {})", program.id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "/sys/fs/bpf/mesh-agent";

    fn program(id: u32, name: &str, agent: Option<&str>) -> AttachedProgram {
        AttachedProgram {
            id,
            name: name.to_owned(),
            agent: agent.map(Into::into),
            is_left: false,
        }
    }

    fn at(exclusive: bool, programs: Vec<AttachedProgram>) -> Vec<HookUse> {
        vec![HookUse {
            hook: "connect4",
            exclusive,
            programs,
        }]
    }

    fn judged(hooks: &[HookUse]) -> (Level, String) {
        let check = judge(hooks, Some(Path::new(OWN)));
        (check.level, check.to_string())
    }

    #[test]
    fn who_is_alone_or_among_agents_has_no_worry() {
        assert_eq!(judged(&at(false, vec![])).0, Level::Ok);
        let hooks = at(
            false,
            vec![
                program(1, "mesh_connect4", Some(OWN)),
                program(2, "mesh_connect4", Some("/sys/fs/bpf/b")),
                program(3, "mesh_connect4", None),
                program(4, "other", None),
            ],
        );
        let (level, text) = judged(&hooks);
        assert_eq!(level, Level::Ok);
        for part in [
            "the mesh-agent of /sys/fs/bpf/b: connect4",
            "not seen from here",
            "an unknown program `other` (id 4)",
        ] {
            assert!(text.contains(part), "no {part} in {text}");
        }
        assert!(!text.contains("this agent"), "{text}");
    }

    #[test]
    fn what_an_agent_left_can_be_removed() {
        let mut left = program(2, "mesh_connect4", Some("/sys/fs/bpf/b"));
        left.is_left = true;
        let (level, text) = judged(&at(false, vec![left.clone()]));
        assert_eq!(level, Level::Note);
        assert!(text.contains("/sys/fs/bpf/b, which is gone"), "{text}");
        assert!(text.contains("mesh-agent uninstall --bpffs FOLDER"), "{text}");
        left.agent = Some(OWN.into());
        assert_eq!(judged(&at(false, vec![left])).0, Level::Ok, "it takes these over");
    }

    #[test]
    fn those_that_change_connections_are_known_by_name() {
        for (name, part) in [
            ("cil_sock4_conne", "socketLB.hostNamespaceOnly"),
            ("sock6_connect", "Cilium"),
            ("calico_connect_", "bpfConnectTimeLoadBalancing"),
            ("cgroup_connect4", "Kmesh"),
            ("mb_sock4_connec", "Merbridge"),
            ("tproxy_wan_cg_c", "dae"),
        ] {
            let (level, text) = judged(&at(false, vec![program(1, name, None)]));
            assert_eq!(level, Level::Warning, "{name}");
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn who_attached_exclusively_keeps_us_out() {
        let (level, text) = judged(&at(true, vec![program(7, "gate", None)]));
        assert_eq!(level, Level::Problem);
        assert!(text.contains("connect4: `gate` (id 7)"), "{text}");
        assert!(text.contains("BPF_F_ALLOW_MULTI"), "{text}");
    }

    #[test]
    fn a_full_hook_has_room_for_who_is_there_already() {
        let mut programs: Vec<_> = (0..64).map(|id| program(id, "x", None)).collect();
        assert_eq!(judged(&at(false, programs.clone())).0, Level::Problem);
        programs[5].agent = Some(OWN.into());
        assert_eq!(judged(&at(false, programs)).0, Level::Ok);
    }
}
