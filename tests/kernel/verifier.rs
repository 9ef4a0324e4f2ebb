//! What the kernel's verifier thinks of each program: how much work it is, and how much stack it takes.
//!
//! aya throws away what the verifier says of a program that it lets pass. So each program that an agent has loaded
//! is loaded once more, from the same object, on the same maps, with the globals that the agent gave to it here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};

use aya::maps::{MapFd, MapInfo};
use aya::programs::{ProgramInfo, loaded_programs};
use aya_obj::generated::{bpf_attr, bpf_cmd};
use aya_obj::{Function, Object, ProgramSection};
use mesh_agent::ebpf;
use mesh_tests::record;
use serde_json::json;

use crate::cgroup::Cgroup;
use crate::world::World;

/// A twentieth of what the kernel allows: so much may a program grow before an older kernel, which sees less, balks.
const MOST_INSTRUCTIONS: u64 = 50_000;
/// Of the kernel's 512, all functions of a program together: room for one more key and value.
const MOST_STACK: u64 = 384;
/// `BPF_LOG_STATS` of the kernel's `bpf_verifier.h`.
const LOG_STATISTICS: u32 = 4;

#[test]
fn every_program_leaves_room() {
    let world = World::new();
    let _pod = world.enrol(true);
    let state = world.capture.state();
    let about_all = json!({ "attached": state.links.len(), "features": state.features });
    record("capture", about_all).unwrap();
    let cgroup = Cgroup::create(&world.run);
    world
        .pod
        .enter(|| {
            let (capture, _host) = crate::cgroup::start(&world, &cgroup, true);
            let mut figures = BTreeMap::<String, Figures>::new();
            for state in [state, capture.state()] {
                let mut pinned = BTreeMap::new();
                for pin in fs::read_dir(state.bpffs.join(state.layout).join("maps")).unwrap() {
                    let pin = pin.unwrap();
                    let name = pin.file_name().to_string_lossy().into_owned();
                    pinned.insert(name, MapInfo::from_pin(pin.path()).unwrap().fd().unwrap());
                }
                for link in &state.links {
                    let info = loaded_programs()
                        // Others come and go beside this test.
                        .filter_map(Result::ok)
                        .find(|info| info.id() == link.program_id)
                        .unwrap();
                    let (name, found) = examine(&info, &pinned);
                    figures.entry(name).or_default().raise(&found);
                }
            }
            check(&figures);
        })
        .unwrap();
}

fn check(figures: &BTreeMap<String, Figures>) {
    for (program, figures) in figures {
        record(
            "verifier",
            json!({ "program": program, "instructions": figures.instructions, "stack": figures.stack }),
        )
        .unwrap();
    }
    let all = Object::parse(ebpf::object()).unwrap().programs;
    assert_eq!(
        figures.len(),
        all.len(),
        "an agent loads every program of the object"
    );
    for (program, figures) in figures {
        assert!(
            figures.instructions > 0 && figures.instructions <= MOST_INSTRUCTIONS,
            "{program}: {figures:?}"
        );
        assert!(figures.stack <= MOST_STACK, "{program}: {figures:?}");
    }
}

/// Of the costliest instance of a program.
#[derive(Debug, Default)]
struct Figures {
    /// Looked at, on all ways through the program.
    instructions: u64,
    /// Bytes, of all functions together.
    stack: u64,
}

impl Figures {
    fn raise(&mut self, other: &Self) {
        self.instructions = self.instructions.max(other.instructions);
        self.stack = self.stack.max(other.stack);
    }
}

/// Loads a loaded program again; returns its name in the object and what the verifier says.
fn examine(loaded: &ProgramInfo, pinned: &BTreeMap<String, MapFd>) -> (String, Figures) {
    let mut object = Object::parse(ebpf::object()).unwrap();
    let own: BTreeMap<_, _> = loaded
        .map_ids()
        .unwrap()
        .unwrap()
        .into_iter()
        .map(|id| MapInfo::from_id(id).unwrap())
        .map(|map| (map.name_as_str().unwrap().to_owned(), map.fd().unwrap()))
        .collect();
    // Those that are not pinned are what the compiler made of globals: each load has its own. One that this program
    // does not use can be any.
    let fd_of = |name: &str| {
        let fd = pinned
            .get(name)
            .or_else(|| own.get(name))
            .unwrap_or_else(|| &pinned["SETTINGS"]);
        fd.as_fd().as_raw_fd()
    };
    let maps = object.maps.clone();
    let text = object.functions.keys().map(|(section, _)| *section).collect();
    object
        .relocate_maps(
            maps.iter().map(|(name, map)| (name.as_str(), fd_of(name), map)),
            &text,
        )
        .unwrap();
    object.relocate_calls(&text).unwrap();
    object.sanitize_functions(aya::features());

    let name = loaded.name_as_str().unwrap();
    let (full_name, program) = object
        .programs
        .iter()
        .find(|(full, _)| full.starts_with(name))
        .unwrap();
    let log = load(
        &object.functions[&program.function_key()],
        &program.section,
        loaded,
    )
    .unwrap();
    let figures = parse(&log);
    if let Some(seen) = loaded.verified_instruction_count() {
        assert_eq!(
            figures.instructions,
            u64::from(seen),
            "{full_name} is the program that was loaded"
        );
    }
    (full_name.clone(), figures)
}

/// `BPF_PROG_LOAD` with the verifier's statistics, which it returns.
fn load(function: &Function, section: &ProgramSection, loaded: &ProgramInfo) -> io::Result<String> {
    let btf = loaded.btf_id().map(btf_by_id).transpose()?;
    let functions = function.func_info.func_info_bytes();
    let lines = function.line_info.line_info_bytes();
    let mut log = vec![0_u8; 1 << 16];
    // SAFETY: all zero is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the variant of `BPF_PROG_LOAD`, all of whose fields may be zero.
    let fields = unsafe { &mut attr.__bindgen_anon_3 };
    fields.prog_type = loaded.program_type() as u32;
    fields.expected_attach_type = attach_type(section);
    fields.insns = function.instructions.as_ptr() as u64;
    fields.insn_cnt = u32::try_from(function.instructions.len()).unwrap();
    fields.license = c"GPL".as_ptr() as u64;
    fields.log_level = LOG_STATISTICS;
    fields.log_buf = log.as_mut_ptr() as u64;
    fields.log_size = u32::try_from(log.len()).unwrap();
    if let Some(btf) = &btf {
        fields.prog_btf_fd = btf.as_raw_fd().unsigned_abs();
        fields.func_info = functions.as_ptr() as u64;
        fields.func_info_cnt = u32::try_from(function.func_info.len()).unwrap();
        fields.func_info_rec_size = u32::try_from(function.func_info_rec_size).unwrap();
        fields.line_info = lines.as_ptr() as u64;
        fields.line_info_cnt = u32::try_from(function.line_info.len()).unwrap();
        fields.line_info_rec_size = u32::try_from(function.line_info_rec_size).unwrap();
    }
    let loaded = bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr);
    let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
    let log = String::from_utf8_lossy(&log[..end]).into_owned();
    loaded.map_err(|error| io::Error::other(format!("{error}: {log}")))?;
    Ok(log)
}

fn attach_type(section: &ProgramSection) -> u32 {
    use aya_obj::generated::bpf_attach_type as kind;
    match section {
        ProgramSection::CgroupSockAddr { attach_type } => kind::from(*attach_type) as u32,
        ProgramSection::SockOps => kind::BPF_CGROUP_SOCK_OPS as u32,
        ProgramSection::SkLookup => kind::BPF_SK_LOOKUP as u32,
        other => panic!("no agent attaches {other:?}"),
    }
}

fn btf_by_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: all zero is a valid `bpf_attr`.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.__bindgen_anon_6.__bindgen_anon_1.btf_id = id;
    bpf(bpf_cmd::BPF_BTF_GET_FD_BY_ID, &mut attr)
}

/// A command that returns a descriptor.
fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    // SAFETY: every pointer in it is to memory that outlives the call, with its length beside it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as u32,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that the kernel just gave to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `stack depth 88+16` and `processed 1234 insns (limit …`, each on a line.
fn parse(log: &str) -> Figures {
    let after = |start: &str| {
        log.lines()
            .find_map(|line| line.strip_prefix(start))
            .unwrap_or_else(|| panic!("no {start:?} in {log}"))
    };
    let instructions = after("processed ").split(' ').next().unwrap().parse().unwrap();
    let stack = after("stack depth ")
        .split('+')
        .map(|depth| depth.trim().parse::<u64>().unwrap())
        .sum();
    Figures { instructions, stack }
}
