//! The guest's root file system, an initramfs: a shell, the programs that the tests use, and ours.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use object::elf::{DT_NEEDED, FileHeader64};
use object::read::elf::{Dyn as _, FileHeader as _, ProgramHeader as _};
use object::{Endianness, FileKind};

use super::debian::{self, Archive};
use super::image::Image;
use crate::cross::Arch;
use crate::shell;

const INIT: &str = include_str!("init.sh");

/// Debian's packages that the guest's programs and libraries are taken from.
const PACKAGES: [&str; 3] = ["busybox-static", "bash", "iproute2"];

/// Those programs, and where tests look for them. busybox is linked to everything else that it can do.
const PROGRAMS: [(&str, &str); 3] = [
    ("bin/busybox", "bin/busybox"),
    ("bin/bash", "bin/bash"),
    ("bin/ip", "bin/ip"),
];
/// What busybox is called as: what `init.sh` and the tests run.
const BUSYBOX: [&str; 22] = [
    "cat", "chmod", "echo", "env", "grep", "head", "insmod", "kill", "ls", "mkdir", "mount", "nc", "reboot",
    "rm", "setpriv", "sh", "sleep", "timeout", "true", "umount", "uname", "unshare",
];

/// Programs and libraries of an architecture.
#[derive(Debug)]
pub(super) struct Userland {
    folder: PathBuf,
}

impl Userland {
    /// As it was fetched once, or fetches it from the suite of this machine: what is built here runs with that.
    pub(super) fn get(cache: &Path, arch: Arch, update: bool) -> Result<Self> {
        let suite = debian::own_suite()?;
        let name = format!("{suite}-{}", arch.debian_name());
        let folder = cache.join("userland").join(&name);
        if update || !folder.exists() {
            let archive = Archive::open(&cache.join("apt"), &suite, arch.debian_name())?;
            fs::create_dir_all(cache.join("userland"))?;
            let scratch = tempfile::tempdir_in(cache.join("userland"))?;
            let new = scratch.path().join(&name);
            fs::create_dir(&new)?;
            archive
                .unpack_all(&PACKAGES, &new)
                .with_context(|| format!("cannot get the guest's programs for {arch}"))?;
            if folder.exists() {
                fs::remove_dir_all(&folder)?;
            }
            fs::rename(&new, &folder)?;
        }
        Ok(Self { folder })
    }

    /// A library, wherever its package puts it.
    fn library(&self, name: &str, arch: Arch) -> Result<PathBuf> {
        let triplet = match arch {
            Arch::X86_64 => "x86_64-linux-gnu",
            Arch::Arm64 => "aarch64-linux-gnu",
        };
        ["lib", "usr/lib"]
            .map(|folder| self.folder.join(folder).join(triplet).join(name))
            .into_iter()
            .find(|file| file.is_file())
            .with_context(|| format!("none of the guest's packages has {name}"))
    }
}

/// What is put into the guest.
#[derive(Debug)]
pub(super) struct Contents<'a> {
    pub(super) arch: Arch,
    pub(super) userland: &'a Userland,
    pub(super) image: &'a Image,
    /// Our own: a file, and its name in `/bin`.
    pub(super) programs: &'a [(&'a Path, &'static str)],
    /// Lines of shell that `init.sh` reads first.
    pub(super) settings: &'a str,
}

/// Writes the initramfs to `file`; `scratch` is an empty folder.
pub(super) fn write(contents: &Contents<'_>, scratch: &Path, file: &Path) -> Result<()> {
    for folder in [
        "bin", "dev", "etc", "lib", "modules", "proc", "run", "sys", "tmp", "var/lib",
    ] {
        fs::create_dir_all(scratch.join(folder))?;
    }
    // The loader is asked for under a name that depends on the architecture.
    symlink("lib", scratch.join("lib64"))?;
    let mut programs = Vec::new();
    for (from, to) in PROGRAMS {
        programs.push((contents.userland.folder.join(from), scratch.join(to)));
    }
    for (from, name) in contents.programs {
        programs.push((from.to_path_buf(), scratch.join("bin").join(name)));
    }
    let mut libraries = BTreeSet::new();
    for (from, to) in &programs {
        install(from, to, contents.arch)?;
        collect_libraries(contents, to, &mut libraries)?;
    }
    for library in &libraries {
        let from = contents.userland.library(library, contents.arch)?;
        fs::copy(&from, scratch.join("lib").join(library))?;
    }
    for name in BUSYBOX {
        symlink("busybox", scratch.join("bin").join(name))?;
    }
    for module in &contents.image.modules {
        fs::copy(
            module,
            scratch
                .join("modules")
                .join(module.file_name().unwrap_or_default()),
        )?;
    }
    fs::write(scratch.join("settings"), contents.settings)?;
    fs::write(scratch.join("etc/hostname"), "guest\n")?;
    // `ip netns exec` binds a pod's own over it.
    fs::write(scratch.join("etc/resolv.conf"), "")?;
    fs::write(scratch.join("init"), INIT)?;
    fs::set_permissions(scratch.join("init"), Permissions::from_mode(0o755))?;
    pack(scratch, file)
}

/// Copies a program without what only debuggers read, which is four fifths of ours.
fn install(from: &Path, to: &Path, arch: Arch) -> Result<()> {
    let tool = if arch.is_host() {
        "objcopy".to_owned()
    } else {
        arch.gnu_tool("objcopy")
    };
    shell::run(Command::new(tool).arg("--strip-debug").arg(from).arg(to))
}

/// What a program is linked with, and what that is linked with.
fn collect_libraries(contents: &Contents<'_>, program: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    let needed = needed_by(&fs::read(program)?).with_context(|| program.display().to_string())?;
    for library in needed {
        if found.insert(library.clone()) {
            let file = contents.userland.library(&library, contents.arch)?;
            collect_libraries(contents, &file, found)?;
        }
    }
    Ok(())
}

/// The names of libraries and loader that an ELF file asks for.
pub(crate) fn needed_by(bytes: &[u8]) -> Result<Vec<String>> {
    if FileKind::parse(bytes)? != FileKind::Elf64 {
        bail!("not a 64-bit ELF file");
    }
    let header = FileHeader64::<Endianness>::parse(bytes)?;
    let endian = header.endian()?;
    let mut names = Vec::new();
    for segment in header.program_headers(endian, bytes)? {
        if let Some(loader) = segment.interpreter(endian, bytes)? {
            let name = Path::new(std::str::from_utf8(loader)?).file_name();
            names.extend(name.map(|name| name.to_string_lossy().into_owned()));
        }
    }
    if let Some((entries, strings)) = header.sections(endian, bytes)?.dynamic(endian, bytes)? {
        let strings = header.sections(endian, bytes)?.strings(endian, bytes, strings)?;
        for entry in entries
            .iter()
            .filter(|entry| entry.tag32(endian).map(i64::from) == Some(DT_NEEDED))
        {
            let name = entry.string(endian, strings)?;
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    }
    Ok(names)
}

/// The folder as an archive that the kernel unpacks. Not compressed: an emulated processor takes longer for that.
fn pack(folder: &Path, file: &Path) -> Result<()> {
    let mut names = String::from(".\n");
    list(folder, Path::new(""), &mut names)?;
    let list = folder.with_extension("list");
    fs::write(&list, names)?;
    let status = Command::new("cpio")
        .args(["--create", "--format=newc", "--owner=0:0", "--quiet"])
        .current_dir(folder)
        .stdin(File::open(&list)?)
        .stdout(File::create(file)?)
        .stderr(Stdio::inherit())
        .status()
        .context("cannot run cpio")?;
    if !status.success() {
        bail!("cpio ended with {status}");
    }
    Ok(())
}

fn list(folder: &Path, below: &Path, names: &mut String) -> Result<()> {
    for entry in fs::read_dir(folder.join(below))? {
        let entry = entry?;
        let name = below.join(entry.file_name());
        names.push_str(&format!("{}\n", name.display()));
        if entry.file_type()?.is_dir() {
            list(folder, &name, names)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::needed_by;

    #[test]
    fn a_program_asks_for_its_loader_and_libraries() {
        let shell = std::fs::read("/bin/sh").unwrap();
        let needed = needed_by(&shell).unwrap();
        assert!(
            needed.iter().any(|name| name.starts_with("ld-linux")),
            "{needed:?}"
        );
        assert!(needed.iter().any(|name| name == "libc.so.6"), "{needed:?}");
        assert!(needed_by(b"#!/bin/sh\n").is_err());
    }
}
