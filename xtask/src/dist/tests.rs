use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use super::tarball::Entry;
use super::*;

/// The Unix time that the packed files are given.
const TIME: u64 = 1_700_000_000;

fn package() -> Package {
    let arch = Arch::host().unwrap();
    Package { arch, time: TIME }
}

fn prints(folder: &Path, words: &[&str]) -> String {
    let mut command = Command::new(words[0]);
    shell::output(command.current_dir(folder).args(&words[1..])).unwrap()
}

/// Says which C library it has, and fails if it is asked anything.
const PROGRAM: &str = r#"
unsafe extern "C" { fn gnu_get_libc_version() -> *const std::ffi::c_char; }
fn fail() { panic!("asked"); }
fn main() {
    println!("{:?}", unsafe { std::ffi::CStr::from_ptr(gnu_get_libc_version()) });
    if std::env::args().len() > 1 { fail(); }
}
"#;

/// A program with debugging information, linked `with` (`+`) or without (`-`) its C library inside, as the agent is.
fn program(folder: &Path, with: &str) -> PathBuf {
    fs::write(folder.join("program.rs"), PROGRAM).unwrap();
    let link = format!("-Ctarget-feature={with}crt-static");
    prints(folder, &["rustc", "--edition=2024", "-g", &link, "program.rs"]);
    folder.join("program")
}

fn release(folder: &Path) -> Vec<String> {
    let scratch = tempfile::tempdir().unwrap();
    let files = package().make(&program(scratch.path(), "+"), folder).unwrap();
    sums::write(folder, &files, TIME).unwrap();
    files
}

#[test]
fn names_say_version_and_architecture() {
    for (arch, name) in [(Arch::X86_64, "x86_64"), (Arch::Arm64, "arm64")] {
        let package = Package { arch, time: TIME };
        assert_eq!(package.name(), format!("mesh-agent-{VERSION}-linux-{name}"));
    }
}

#[test]
fn a_release_verifies_and_unpacks_to_what_the_readme_says() {
    let folder = tempfile::tempdir().unwrap();
    let files = release(folder.path());
    sums::check(folder.path()).unwrap();
    let name = package().name();
    assert_eq!(files, [format!("{name}.tar.gz"), format!("{name}.debug")]);
    prints(folder.path(), &["tar", "-xzf", &files[0]]);

    let readme = fs::read_to_string(shell::workspace().join("README.md")).unwrap();
    let (_, section) = readme.split_once("\n## Releases\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let told: BTreeSet<_> = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .flat_map(|row| row.split(" | ").next().unwrap().split('`'))
        .filter(|word| !word.trim_matches([',', ' ']).is_empty())
        .collect();
    let there: BTreeSet<_> = tarball::names().into_iter().collect();
    assert_eq!(told, there);
    let unpacked = folder.path().join(name);
    assert!(there.iter().all(|name| unpacked.join(name).is_file()));
    // It runs, and is not what was built, but that without its symbols.
    prints(&unpacked, &["./mesh-agent"]);
    let symbols = prints(&unpacked, &["readelf", "--symbols", "--wide", "mesh-agent"]);
    assert!(!symbols.contains(".symtab"), "{symbols}");
    let notices = fs::read_to_string(unpacked.join("THIRD-PARTY-LICENSES")).unwrap();
    for part in [
        "\nrustls 0.",
        "\naya-ebpf ",
        "MPL-2.0",
        "Mozilla Public License",
        "\nThe GNU C Library (",
        "), unchanged, is in mesh-agent too",
        "GNU LESSER GENERAL PUBLIC LICENSE",
    ] {
        assert!(notices.contains(part), "no {part:?}");
    }
    // What only builds or tests is not in it.
    assert!(!notices.contains("\ninferno ") && !notices.contains("\ncc "));
}

#[test]
fn a_file_that_changed_is_found_out() {
    let folder = tempfile::tempdir().unwrap();
    let files = release(folder.path());
    let path = folder.path().join(&files[0]);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(sums::check(folder.path()).is_err());
}

#[test]
fn packed_twice_it_is_the_same() {
    let entry = |name: &str| Entry::new(name, 0o644, name.as_bytes().to_vec());
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("one"), folder.path().join("other"));
    tarball::write(&one, "top", vec![entry("a"), entry("b")], TIME).unwrap();
    tarball::write(&other, "top", vec![entry("b"), entry("a")], TIME).unwrap();
    assert_eq!(fs::read(&one).unwrap(), fs::read(&other).unwrap());
    let listed = Command::new("tar")
        .env("TZ", "UTC")
        .args(["--numeric-owner", "-tvzf"])
        .arg(&one)
        .output()
        .unwrap();
    let line = "-rw-r--r-- 0/0               1 2023-11-14 22:13 top/a\n";
    assert!(String::from_utf8(listed.stdout).unwrap().starts_with(line));
}

#[test]
fn a_backtrace_reads_the_file_beside_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let files = release(folder.path());
    let name = package().name();
    prints(folder.path(), &["tar", "-xzf", &files[0]]);
    let unpacked = folder.path().join(&name);
    // Makes the packed program fail: how often does it say where?
    let places = || {
        let failed = Command::new(unpacked.join("mesh-agent"))
            .arg("fail")
            .env("RUST_BACKTRACE", "1")
            .output()
            .unwrap();
        assert!(!failed.status.success());
        let said = String::from_utf8(failed.stderr).unwrap();
        said.matches("program.rs:").count()
    };
    assert_eq!(places(), 1, "only where it panicked");
    fs::rename(folder.path().join(&files[1]), unpacked.join(&files[1])).unwrap();
    assert!(places() > 1);
}

/// Two files as of a release.
fn pack(folder: &Path, name: &str, time: u64) -> Vec<String> {
    let files = [tarball::SUFFIX, DEBUG_SUFFIX].map(|suffix| format!("{name}{suffix}"));
    let entry = Entry::new("mesh-agent", 0o755, name.as_bytes().to_vec());
    tarball::write(&folder.join(&files[0]), name, vec![entry], time).unwrap();
    fs::write(folder.join(&files[1]), name).unwrap();
    files.to_vec()
}

fn listed(folder: &Path) -> Vec<String> {
    let sums = fs::read_to_string(folder.join(sums::FILE)).unwrap();
    sums.lines().map(|line| line[66..].to_owned()).collect()
}

#[test]
fn sums_of_another_run_are_kept_while_their_files_are() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut files = pack(folder, "one", TIME);
    files.extend(pack(folder, "gone", TIME));
    sums::write(folder, &files, TIME).unwrap();
    assert_eq!(listed(folder).len(), 4);
    for file in &files[2..] {
        fs::remove_file(folder.join(file)).unwrap();
    }
    sums::write(folder, &pack(folder, "two", TIME), TIME).unwrap();
    assert_eq!(
        listed(folder),
        ["one.debug", "one.tar.gz", "two.debug", "two.tar.gz"]
    );
    sums::check(folder).unwrap();
    fs::write(folder.join("one.debug"), "changed").unwrap();
    assert!(sums::check(folder).is_err());
}

#[test]
fn sums_of_another_commit_are_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    sums::write(folder, &pack(folder, "old", TIME - 1), TIME - 1).unwrap();
    sums::write(folder, &pack(folder, "new", TIME), TIME).unwrap();
    assert_eq!(listed(folder), ["new.debug", "new.tar.gz"]);
    // A file without its tarball has no commit.
    let two = pack(folder, "two", TIME);
    sums::write(folder, &two, TIME).unwrap();
    fs::remove_file(folder.join(&two[0])).unwrap();
    sums::write(folder, &pack(folder, "new", TIME), TIME).unwrap();
    assert_eq!(listed(folder), ["new.debug", "new.tar.gz"]);
}

#[test]
fn an_agent_that_needs_a_library_is_no_release() {
    let folder = tempfile::tempdir().unwrap();
    let dynamic = program(folder.path(), "-");
    let error = package().make(&dynamic, folder.path()).unwrap_err();
    assert!(error.to_string().contains("libc.so.6"), "{error}");
}
