//! What is written down, and what the next run makes of it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::FileSource;
use super::scan::Look;
use super::tests::{SERVICE, World, names, pod};

/// As the thread does that watches.
fn write_down(source: &mut FileSource) {
    let mut draft = source.take_draft();
    let journal = source.journal.as_mut().unwrap();
    draft.note(journal).unwrap();
    journal.commit().unwrap();
}

#[test]
fn the_last_good_state_outlives_the_agent() {
    let world = World::new(&["pods", "one.yaml"]);
    world.write("pods/a.yaml", &[pod("a", 1), SERVICE.to_owned()].concat());
    world.write("one.yaml", &pod("one", 9));
    let vips = {
        let mut source = world.open();
        write_down(&mut source);
        let services = source
            .snapshot()
            .services
            .values()
            .map(|service| service.vips.clone());
        services.collect::<Vec<_>>()
    };
    // Nothing can be read at the next start.
    fs::rename(world.path("pods"), world.path("away")).unwrap();
    fs::remove_file(world.path("one.yaml")).unwrap();
    let source = world.open();
    assert_eq!(names(source.snapshot()), ["a", "one"]);
    assert_eq!(
        source.snapshot().rejected.len(),
        2,
        "{:?}",
        source.snapshot().rejected
    );
    let services = source
        .snapshot()
        .services
        .values()
        .map(|service| service.vips.clone());
    assert_eq!(services.collect::<Vec<_>>(), vips);

    // A document that is bad at the start has a last good version, too; one that was taken away has not.
    world.write("one.yaml", &pod("one", 9).replace("10.0.0", "x"));
    fs::create_dir(world.path("pods")).unwrap();
    let mut source = world.open();
    assert_eq!(names(source.snapshot()), ["one"]);
    write_down(&mut source);
    assert_eq!(names(world.open().snapshot()), ["one"]);
}

#[test]
fn a_state_that_cannot_be_used_is_left() {
    let world = World::new(&["pods"]);
    for state in [
        "",
        "{",
        "[]",
        "{\"version\": 3}",
        "{\"version\": 2}",
        "{\"version\": 2}\n[]",
        "{\"file\": {}}\n",
        "{\"service\": {\"name\": \"default/web\", \"number\": 258}}\n",
    ] {
        fs::create_dir_all(&world.config.state_dir).unwrap();
        fs::write(world.state_file(), state).unwrap();
        assert_eq!(names(world.open().snapshot()), [""; 0], "{state}");
    }
    world.write("pods/a.yaml", &[pod("a", 1), SERVICE.to_owned()].concat());
    let mut source = world.open();
    write_down(&mut source);
    let state = world.state_file();
    assert_eq!(mode(&state), 0o600);
    // The bytes on disk are the whole truth.
    let text = fs::read_to_string(&state).unwrap();
    let given = "{\"service\":{\"name\":\"default/web\",\"number\":258}}\n";
    let whole = text.replace("10.0.0.1", "10.0.0.7") + given;
    fs::remove_dir_all(world.path("pods")).unwrap();
    // A line that lost its end, only its newline, or what was to be there.
    let other = given.replace("258", "259");
    for cut in [
        "{\"service\":{\"na",
        other.trim_end(),
        &"\0".repeat(5000),
        "\0\0\n",
    ] {
        fs::write(&state, whole.clone() + cut).unwrap();
        restores_what_was_changed(&world);
        assert_eq!(fs::read_to_string(&state).unwrap(), whole, "{cut:?} is cut off");
    }
}

fn restores_what_was_changed(world: &World) {
    let source = world.open();
    let web = source.snapshot().services.values().next().unwrap();
    assert_eq!(
        web.vips[0].to_string(),
        "240.240.1.2",
        "an address that was given stays"
    );
    assert_eq!(
        source.snapshot().workloads.get("default/a").unwrap().addresses[0].to_string(),
        "10.0.0.7"
    );
}

#[test]
fn a_state_that_was_cut_is_added_to() {
    let world = World::new(&["pods"]);
    world.write("pods/a.yaml", &pod("a", 1));
    write_down(&mut world.open());
    let state = world.state_file();
    // It cannot be written anew, so that what changes is added.
    fs::create_dir(state.with_extension("jsonl.new")).unwrap();
    let whole = fs::read_to_string(&state).unwrap();
    let number = "{\"service\":{\"name\":\"default/web\",\"number\":258}}";
    for (ip, cut) in [
        (2, "\0".repeat(5000)),
        (3, number.to_owned()),
        (4, whole.repeat(3)),
    ] {
        let mut text = fs::read_to_string(&state).unwrap();
        text.push_str(cut.strip_suffix('\n').unwrap_or(&cut));
        fs::write(&state, text).unwrap();
        world.write("pods/a.yaml", &pod("a", ip));
        write_down(&mut world.open());
        fs::rename(world.path("pods"), world.path("away")).unwrap();
        let source = world.open();
        let a = source.snapshot().workloads.get("default/a").unwrap();
        assert_eq!(a.addresses[0].to_string(), format!("10.0.0.{ip}"));
        fs::rename(world.path("away"), world.path("pods")).unwrap();
    }
    let text = fs::read_to_string(&state).unwrap();
    assert!(text.starts_with(&whole) && text.ends_with('\n'), "{text}");
}

#[test]
fn a_commit_that_fails_is_tried_again() {
    let world = World::new(&["pods"]);
    world.write("pods/a.yaml", &pod("a", 1));
    // Nothing can be put in its place.
    fs::create_dir_all(world.state_file()).unwrap();
    let mut source = world.open();
    let mut draft = source.take_draft();
    let journal = source.journal.as_mut().unwrap();
    draft.note(journal).unwrap();
    for _ in 0..2 {
        journal.commit().unwrap_err();
    }
    fs::remove_dir(world.state_file()).unwrap();
    journal.commit().unwrap();
    fs::remove_dir_all(world.path("pods")).unwrap();
    assert_eq!(names(world.open().snapshot()), ["a"]);
}

#[test]
fn a_version_that_waits_is_not_overtaken() {
    let world = World::new(&["pods"]);
    world.write("pods/a.yaml", &pod("a", 1));
    // For now the folder cannot be made.
    let above = world.config.state_dir.ancestors().nth(2).unwrap();
    fs::write(above, "").unwrap();
    let mut source = world.open();
    fs::remove_file(above).unwrap();
    world.write("pods/a.yaml", &pod("a", 2));
    source.scan(&Look::All);
    write_down(&mut source);
    fs::remove_dir_all(world.path("pods")).unwrap();
    let source = world.open();
    let a = source.snapshot().workloads.get("default/a").unwrap();
    assert_eq!(a.addresses[0].to_string(), "10.0.0.2");
}

#[test]
fn documents_of_one_name_are_told_apart() {
    let restored = |world: &World| {
        fs::rename(world.path("pods"), world.path("away")).unwrap();
        let source = world.open();
        fs::rename(world.path("away"), world.path("pods")).unwrap();
        let a = source.snapshot().workloads.get("default/a").unwrap();
        a.addresses[0].to_string()
    };
    let world = World::new(&["pods"]);
    let both = [pod("a", 1), pod("a", 2)].concat();
    world.write("pods/a.yaml", &both);
    let mut source = world.open();
    write_down(&mut source);
    let (first, second) = ("10.0.0.1", "10.0.0.2");
    assert_eq!(restored(&world), first);
    // Both are as they were, in the state, and then in a draft that was not written yet.
    world.write("pods/a.yaml", &[both.clone(), pod("b", 3)].concat());
    source.scan(&Look::All);
    write_down(&mut source);
    assert_eq!(restored(&world), first);
    world.write("pods/a.yaml", &[pod("b", 3), pod("a", 4), pod("a", 2)].concat());
    source.scan(&Look::All);
    world.write("pods/a.yaml", &[pod("c", 5), pod("a", 4), pod("a", 2)].concat());
    source.scan(&Look::All);
    write_down(&mut source);
    assert_eq!(restored(&world), "10.0.0.4");
    // What is left is the second.
    world.write("pods/a.yaml", &pod("a", 2));
    source.scan(&Look::All);
    write_down(&mut source);
    assert_eq!(restored(&world), second);
}

#[test]
fn a_state_does_not_shrink_when_it_cannot_be_read() {
    let world = World::new(&["pods"]);
    world.write("pods/a.yaml", &[pod("a", 1), pod("b", 2)].concat());
    world.write("pods/z.yaml", &pod("z", 9));
    let mut source = world.open();
    write_down(&mut source);
    // Its line is gone when it is looked for.
    let whole = fs::read(world.state_file()).unwrap();
    fs::write(world.state_file(), "").unwrap();
    world.write("pods/a.yaml", &[pod("a", 1), pod("b", 3)].concat());
    world.write("pods/z.yaml", &pod("z", 8));
    source.scan(&Look::All);
    let mut draft = source.take_draft();
    let journal = source.journal.as_mut().unwrap();
    draft.note(journal).unwrap_err();
    let waiting: Vec<_> = draft.files.keys().map(|origin| origin.file.to_string()).collect();
    assert_eq!(waiting, [world.path("pods/a.yaml").to_string_lossy()]);
    // It can be read again.
    let state = fs::OpenOptions::new()
        .write(true)
        .open(world.state_file())
        .unwrap();
    state.write_all_at(&whole, 0).unwrap();
    draft.note(journal).unwrap();
    journal.commit().unwrap();
    fs::remove_dir_all(world.path("pods")).unwrap();
    let source = world.open();
    assert_eq!(names(source.snapshot()), ["a", "b", "z"]);
    let address = |name: &str| source.snapshot().workloads.get(name).unwrap().addresses[0].to_string();
    assert_eq!(["default/b", "default/z"].map(address), ["10.0.0.3", "10.0.0.8"]);
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_change_costs_a_line_until_most_lines_are_outdated() {
    const LARGE: usize = 300_000;
    let world = World::new(&["pods"]);
    let write = |ip: u8| {
        let text = pod("a", ip).replace(
            "{name: a}",
            &format!("{{name: a, annotations: {{x: {}}}}}", "y".repeat(LARGE)),
        );
        world.write("pods/a.yaml", &text);
    };
    world.write("pods/b.yaml", &pod("b", 100));
    write(1);
    let mut source = world.open();
    write_down(&mut source);
    let mut before = fs::read(world.state_file()).unwrap();
    let mut shrunk = false;
    for ip in 2..10 {
        write(ip);
        assert!(source.scan(&Look::Files([world.path("pods/a.yaml")].into())));
        write_down(&mut source);
        let now = fs::read(world.state_file()).unwrap();
        shrunk |= now.len() < before.len();
        assert!(
            now.len() < before.len() || now.starts_with(&before),
            "what was written stays"
        );
        assert!(now.len() < 8 * LARGE, "what is outdated is bounded");
        before = now;
    }
    assert!(shrunk);
    fs::remove_dir_all(world.path("pods")).unwrap();
    let restored = world.open();
    assert_eq!(names(restored.snapshot()), ["a", "b"]);
    let a = restored.snapshot().workloads.get("default/a").unwrap();
    assert_eq!(a.addresses[0].to_string(), "10.0.0.9");
}

#[test]
fn what_was_written_once_is_not_lost_by_what_is_written_later() {
    let world = World::new(&["pods"]);
    let bad = pod("a", 1).replace("10.0.0", "x");
    world.write("pods/a.yaml", &[pod("a", 1), pod("b", 2), pod("c", 3)].concat());
    let mut source = world.open();
    write_down(&mut source);
    // The bad one stays as it was, the second is not even looked at, and the third is new.
    world.write("pods/a.yaml", &[bad.clone(), pod("b", 2), pod("c", 4)].concat());
    source.scan(&Look::All);
    write_down(&mut source);
    // Two changes before the first is written.
    world.write(
        "pods/a.yaml",
        &[bad.clone(), pod("b", 2), pod("c", 5), pod("d", 6)].concat(),
    );
    source.scan(&Look::All);
    world.write(
        "pods/a.yaml",
        &[bad, pod("b", 2), pod("c", 5), pod("d", 6), pod("e", 7)].concat(),
    );
    source.scan(&Look::All);
    write_down(&mut source);
    let expected = ["a", "b", "c", "d", "e"];
    assert_eq!(names(source.snapshot()), expected);
    fs::remove_dir_all(world.path("pods")).unwrap();
    let mut source = world.open();
    assert_eq!(names(source.snapshot()), expected);
    // And once more, without the files that it came from.
    write_down(&mut source);
    assert_eq!(names(world.open().snapshot()), expected);
}
