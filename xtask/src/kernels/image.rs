//! Kernels of Debian's, ready to boot: the image, and the modules that the tests need.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use object::{Object, ObjectSection};

use super::debian::Archive;
use super::rows::Release;
use crate::cross::Arch;

/// What a test's network is made of; Debian has it as modules, with what they need in turn.
const MODULES: [&str; 2] = ["veth", "bridge"];
/// Those of its TLS, with the cipher's parts, which the kernel asks for by what they do. Not every kernel has them:
/// the tests say so then, and the row must know of it.
const MODULES_OF_TLS: [&str; 4] = ["tls", "chacha20poly1305", "chacha_generic", "poly1305_generic"];

/// The file beside an image that names the modules that were looked for.
const LISTED: &str = "modules.txt";

/// A kernel that can boot.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    /// In the order in which they can be loaded.
    pub(super) modules: Vec<PathBuf>,
}

/// The kernel as it was fetched once, or fetches the newest of its suite.
pub(super) fn get(cache: &Path, release: &Release, arch: Arch, update: bool) -> Result<Image> {
    let folder = cache.join("images").join(format!("{}-{arch}", release.name));
    // Those of an earlier version of this program had others.
    let has_all = fs::read_to_string(folder.join(LISTED)).is_ok_and(|listed| listed == list());
    if update || !has_all {
        fetch(cache, release, arch, &folder)
            .with_context(|| format!("cannot get Linux {} for {arch}", release.name))?;
    }
    let mut modules: Vec<_> = fs::read_dir(folder.join("modules"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    modules.sort();
    Ok(Image {
        kernel: folder.join("vmlinuz"),
        modules,
    })
}

fn fetch(cache: &Path, release: &Release, arch: Arch, folder: &Path) -> Result<()> {
    let archive = Archive::open(&cache.join("apt"), release.suite, arch.debian_name())?;
    let newest = format!("linux-image-cloud-{}", arch.debian_name());
    fs::create_dir_all(cache.join("images"))?;
    // Beside its place, so that it is moved there as a whole.
    let scratch = tempfile::tempdir_in(cache.join("images"))?;
    let unpacked = scratch.path().join("package");
    fs::create_dir(&unpacked)?;
    unpack_first(&archive, &archive.led_to_by(&newest)?, release, &unpacked)?;

    let image = scratch.path().join("image");
    fs::create_dir_all(image.join("modules"))?;
    let kernel = entries(&unpacked.join("boot"))?
        .into_iter()
        .find(|path| name_of(path).starts_with("vmlinuz-"))
        .context("no kernel in the package")?;
    fs::rename(kernel, image.join("vmlinuz"))?;
    for (number, (name, bytes)) in in_order(&unpacked)?.into_iter().enumerate() {
        fs::write(
            image.join("modules").join(format!("{number:02}-{name}.ko")),
            bytes,
        )?;
    }
    fs::write(image.join(LISTED), list())?;
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::rename(&image, folder)?;
    Ok(())
}

/// Unpacks the newest of `packages` that is to be had: the index of an old suite may name what is there no more.
fn unpack_first(archive: &Archive, packages: &[String], release: &Release, into: &Path) -> Result<()> {
    let mut problem = anyhow!("{} has no kernel for clouds", release.suite);
    for package in packages {
        if !package.starts_with(&format!("linux-image-{}.", release.name)) {
            problem = anyhow!("{package} is no Linux {}", release.name);
            continue;
        }
        match archive.unpack(package, into) {
            Ok(()) => return Ok(()),
            Err(error) => problem = error,
        }
    }
    Err(problem)
}

/// The modules, each after those that it needs.
fn in_order(unpacked: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let folder = ["lib/modules", "usr/lib/modules"]
        .map(|folder| unpacked.join(folder))
        .into_iter()
        .find(|folder| folder.is_dir())
        .context("the package has no modules")?;
    let files = files_below(&folder)?;
    let built_in = files
        .iter()
        .find(|file| name_of(file) == "modules.builtin")
        .context("the package does not say what is built in")?;
    let built_in = fs::read_to_string(built_in)?;
    let mut done = Vec::new();
    for name in MODULES {
        add(name, &files, &built_in, &mut done)?;
    }
    for name in MODULES_OF_TLS {
        if files.iter().any(|file| module_name(file) == name) {
            add(name, &files, &built_in, &mut done)?;
        }
    }
    Ok(done)
}

/// All that were looked for.
fn list() -> String {
    [&MODULES[..], &MODULES_OF_TLS].concat().join("\n")
}

fn add(name: &str, files: &[PathBuf], built_in: &str, done: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    let is_there = done.iter().any(|(have, _)| have == name);
    if is_there || built_in.lines().any(|line| module_name(Path::new(line)) == name) {
        return Ok(());
    }
    let file = files
        .iter()
        .find(|file| module_name(file) == name)
        .with_context(|| format!("the kernel has no {name}, neither built in nor as a module"))?;
    let bytes = if file.extension().is_some_and(|extension| extension == "xz") {
        let unpacked = Command::new("xz")
            .args(["--decompress", "--stdout"])
            .arg(file)
            .output()?;
        if !unpacked.status.success() {
            bail!("{} cannot be decompressed", file.display());
        }
        unpacked.stdout
    } else {
        fs::read(file)?
    };
    for needed in needed_by(&bytes).with_context(|| file.display().to_string())? {
        add(&needed, files, built_in, done)?;
    }
    done.push((name.to_owned(), bytes));
    Ok(())
}

/// What a module says that it depends on.
fn needed_by(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module)?;
    let section = file.section_by_name(".modinfo").context("no kernel module")?;
    let depends = section
        .data()?
        .split(|byte| *byte == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="))
        .unwrap_or_default();
    let depends = String::from_utf8_lossy(depends).into_owned();
    Ok(depends
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect())
}

/// `nf-nat.ko.xz` and `nf_nat` are one.
fn module_name(path: &Path) -> String {
    let name = name_of(path);
    name.split_once(".ko")
        .map_or_else(String::new, |(stem, _)| stem.replace('-', "_"))
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    fs::read_dir(folder)
        .with_context(|| format!("no {}", folder.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in entries(folder)? {
        // What a link leads to is not in the package.
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else {
            files.push(path);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::module_name;

    #[test]
    fn a_module_is_known_by_its_name_however_it_is_written() {
        assert_eq!(module_name(Path::new("kernel/net/nf-nat.ko.xz")), "nf_nat");
        assert_eq!(module_name(Path::new("kernel/net/veth.ko")), "veth");
        assert_eq!(module_name(Path::new("modules.order")), "");
    }
}
