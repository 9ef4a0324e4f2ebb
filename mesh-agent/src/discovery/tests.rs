//! Real files, real events.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::Instant;

use super::events::Events;
use super::scan::Look;
use super::watch::Folders;
use super::{FileSource, Watching};
use crate::config::AgentConfig;
use crate::model::Snapshot;
use crate::store::Store;

/// A machine that builds something else at the same time is slow; the events themselves take some milliseconds.
const SOON: Duration = Duration::from_secs(5);
const NEVER: Duration = Duration::from_secs(3600);

pub(super) struct World {
    folder: TempDir,
    /// Elsewhere: writing the state must not wake the watcher, which a test may wait for.
    state: TempDir,
    pub(super) config: AgentConfig,
}

impl World {
    /// Watches `paths`, which are relative to the world's folder.
    pub(super) fn new(paths: &[&str]) -> Self {
        let (folder, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut config = AgentConfig::load(None, Some("node-a")).unwrap();
        config.files = paths.iter().map(|path| folder.path().join(path)).collect();
        config.state_dir = state.path().join("made/when/needed");
        Self {
            folder,
            state,
            config,
        }
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    pub(super) fn write(&self, path: &str, text: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), text).unwrap();
    }

    pub(super) fn state_file(&self) -> PathBuf {
        assert!(self.config.state_dir.starts_with(self.state.path()));
        self.config.state_dir.join("resources.jsonl")
    }

    pub(super) fn open(&self) -> FileSource {
        FileSource::open(&self.config)
    }

    /// With events alone: the poll would come too late for any test.
    fn watch(&self) -> Running {
        let source = self.open();
        let store = Store::new(source.snapshot().clone());
        let watching = source.watch_every(NEVER, store.clone(), Folders::new).unwrap();
        Running {
            store,
            _watching: watching,
        }
    }
}

struct Running {
    store: Store,
    _watching: Watching,
}

impl Running {
    fn until(&self, what: &str, condition: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
        let start = Instant::now();
        loop {
            let snapshot = self.store.load();
            if condition(&snapshot) {
                return snapshot;
            }
            assert!(
                start.elapsed() < SOON,
                "{what}: {:#?}",
                (names(&snapshot), &snapshot.rejected)
            );
            thread::park_timeout(Duration::from_millis(2));
        }
    }

    fn until_names(&self, expected: &[&str]) -> Arc<Snapshot> {
        self.until(&format!("{expected:?}"), |snapshot| names(snapshot) == expected)
    }
}

pub(super) fn names(snapshot: &Snapshot) -> Vec<String> {
    let mut names: Vec<_> = snapshot
        .workloads
        .values()
        .map(|workload| workload.name.to_string())
        .collect();
    names.sort();
    names
}

pub(super) fn pod(name: &str, ip: u8) -> String {
    format!("---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nstatus: {{podIP: 10.0.0.{ip}}}\n")
}

pub(super) const SERVICE: &str =
    "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n";

#[test]
fn files_come_change_and_go() {
    let world = World::new(&["pods", "one.yaml"]);
    world.write("pods/a.yaml", &pod("a", 1));
    world.write("one.yaml", &pod("one", 9));
    let running = world.watch();
    running.until_names(&["a", "one"]);

    world.write("pods/b.yaml", &pod("b", 2));
    running.until_names(&["a", "b", "one"]);
    world.write("pods/b.yaml", &pod("c", 2));
    running.until_names(&["a", "c", "one"]);
    // The same length at once after: no time stamp has to tell them apart.
    world.write("pods/b.yaml", &pod("d", 2));
    running.until_names(&["a", "d", "one"]);
    // As editors do.
    world.write("pods/.a.yaml.swp", "x");
    world.write("pods/a.yaml~", &pod("x", 1));
    world.write("pods/.new", &pod("e", 1));
    fs::rename(world.path("pods/.new"), world.path("pods/a.yaml")).unwrap();
    running.until_names(&["d", "e", "one"]);
    fs::remove_file(world.path("pods/b.yaml")).unwrap();
    running.until_names(&["e", "one"]);
    fs::remove_file(world.path("one.yaml")).unwrap();
    let snapshot = running.until_names(&["e"]);
    assert!(
        snapshot.rejected[0].message.contains("cannot be read"),
        "{:?}",
        snapshot.rejected
    );
    world.write("one.yaml", &pod("two", 9));
    let snapshot = running.until_names(&["e", "two"]);
    assert_eq!(*snapshot.rejected, []);
}

#[test]
fn links_are_swapped_as_kubernetes_does() {
    let world = World::new(&["map"]);
    world.write("map/..1/a.yaml", &pod("old", 1));
    world.write("map/..2/a.yaml", &pod("new", 1));
    symlink("..1", world.path("map/..data")).unwrap();
    symlink("..data/a.yaml", world.path("map/a.yaml")).unwrap();
    let running = world.watch();
    running.until_names(&["old"]);
    symlink("..2", world.path("map/..data_tmp")).unwrap();
    fs::rename(world.path("map/..data_tmp"), world.path("map/..data")).unwrap();
    running.until_names(&["new"]);
}

#[test]
fn what_a_link_leads_to_is_watched_too() {
    let world = World::new(&["pods"]);
    world.write("elsewhere/a.yaml", &pod("old", 1));
    fs::create_dir(world.path("pods")).unwrap();
    symlink(world.path("elsewhere/a.yaml"), world.path("pods/a.yaml")).unwrap();
    let running = world.watch();
    running.until_names(&["old"]);
    // Several times: the first change may be seen by a look that something else caused.
    for name in ["new", "newer", "newest"] {
        world.write("elsewhere/a.yaml", &pod(name, 1));
        running.until_names(&[name]);
    }
}

#[test]
fn a_folder_may_come_later_and_be_replaced() {
    let world = World::new(&["not/yet"]);
    let running = world.watch();
    let snapshot = running.until_names(&[]);
    assert_eq!(
        snapshot.rejected.len(),
        1,
        "a folder that is not there is reported"
    );
    world.write("not/yet/a.yaml", &pod("a", 1));
    let snapshot = running.until_names(&["a"]);
    assert_eq!(*snapshot.rejected, []);
    // Another folder in its place.
    world.write("not/next/b.yaml", &pod("b", 1));
    fs::rename(world.path("not/yet"), world.path("not/old")).unwrap();
    fs::rename(world.path("not/next"), world.path("not/yet")).unwrap();
    running.until_names(&["b"]);
    world.write("not/yet/c.yaml", &pod("c", 2));
    running.until_names(&["b", "c"]);
}

#[test]
fn what_becomes_bad_stays_as_it_was() {
    let world = World::new(&["pods"]);
    world.write("pods/a.yaml", &[pod("a", 1), pod("b", 2)].concat());
    let running = world.watch();
    let good = running.until_names(&["a", "b"]);

    world.write(
        "pods/a.yaml",
        &[pod("a", 3), "---\nkind: [\n".to_owned()].concat(),
    );
    let snapshot = running.until("a moves", |snapshot| snapshot.rejected.len() == 1);
    assert_eq!(names(&snapshot), ["a", "b"]);
    assert_ne!(
        snapshot.workloads.get("default/a"),
        good.workloads.get("default/a")
    );
    assert_eq!(
        snapshot.workloads.get("default/b"),
        good.workloads.get("default/b")
    );

    fs::write(world.path("pods/a.yaml"), [0xff, 0xfe]).unwrap();
    let snapshot = running.until("not text", |snapshot| {
        snapshot.rejected[0].message.contains("is not UTF-8")
    });
    assert_eq!(names(&snapshot), ["a", "b"]);
    // A folder that is not there is more likely not mounted than meant.
    fs::rename(world.path("pods"), world.path("away")).unwrap();
    let snapshot = running.until("folder gone", |snapshot| {
        snapshot
            .rejected
            .iter()
            .any(|finding| finding.message.contains("cannot be read"))
    });
    assert_eq!(names(&snapshot), ["a", "b"]);
    fs::create_dir(world.path("pods")).unwrap();
    running.until_names(&[]);
}

#[test]
fn without_events_the_poll_sees_it() {
    let world = World::new(&["pods"]);
    world.write("pods/a.yaml", &pod("a", 1));
    let source = world.open();
    let store = Store::new(source.snapshot().clone());
    let watching = source
        .watch_every(Duration::from_millis(20), store.clone(), |_| {
            Folders::new(Events::new().0)
        })
        .unwrap();
    let running = Running {
        store,
        _watching: watching,
    };
    world.write("pods/b.yaml", &pod("b", 2));
    running.until_names(&["a", "b"]);
}

#[test]
fn nothing_is_published_when_nothing_changed() {
    let world = World::new(&["pods"]);
    world.write("pods/a.yaml", &pod("a", 1));
    let mut source = world.open();
    assert!(!source.scan(&Look::All));
    world.write("pods/a.yaml", &pod("a", 1));
    assert!(!source.scan(&Look::All), "the same text again");
    let generation = source.snapshot().generation;
    world.write("pods/a.yaml", &pod("b", 1));
    assert!(source.scan(&Look::All));
    assert_eq!(source.snapshot().generation, generation + 1);
}

#[test]
fn an_event_calls_for_what_it_names() {
    let world = World::new(&["pods", "one.yaml", "not/yet"]);
    world.write("pods/a.yaml", &pod("a", 1));
    world.write("one.yaml", &pod("one", 9));
    let source = world.open();
    let look = |source: &FileSource, path: &str| source.look_for(&world.path(path));
    let file = |path: &str| Some(Look::Files([world.path(path)].into()));
    for (path, expected) in [
        ("pods/a.yaml", file("pods/a.yaml")),
        ("pods/new.yaml", file("pods/new.yaml")),
        ("pods/.a.yaml.swp", None),
        ("pods/README", None),
        ("one.yaml", file("one.yaml")),
        ("two.yaml", None),
        ("pods", Some(Look::All)),
        ("not", Some(Look::All)),
    ] {
        assert_eq!(look(&source, path), expected, "{path}");
    }
    // Where there are links, any name may be a part of their way.
    symlink(world.path("elsewhere.yaml"), world.path("pods/b.yaml")).unwrap();
    assert_eq!(look(&world.open(), "two.yaml"), Some(Look::All));
    // A file that is gone, or a link, is not looked at alone.
    for path in ["pods/gone.yaml", "pods/b.yaml"] {
        assert_eq!(source.widened(file(path).unwrap()), Look::All, "{path}");
    }
    assert_eq!(
        source.widened(file("one.yaml").unwrap()),
        file("one.yaml").unwrap()
    );
}
