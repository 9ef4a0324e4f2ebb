use std::cell::RefCell;
use std::collections::HashMap;

use super::*;

/// A map with room for so many rows, of which any may be replaced.
struct Room {
    rows: RefCell<HashMap<TrafficKey, Traffic>>,
    most: usize,
}

impl Room {
    fn new(most: usize) -> Self {
        Self {
            rows: RefCell::default(),
            most,
        }
    }

    fn count(&self, server: WorkloadKey, opened: u64, closed: u64) {
        let row = Traffic {
            opened,
            closed,
            ..Traffic::default()
        };
        self.rows.borrow_mut().insert(counted(server), row);
    }

    /// What is reported now: (server, opened).
    fn reports(&self) -> Vec<(WorkloadKey, u64)> {
        let mut all = Vec::new();
        report_rows(self, |pair, traffic| {
            all.push((pair.server, traffic.opened));
            true
        });
        all
    }

    fn forgets(&self) -> usize {
        forget_rows(self, |_| true).len()
    }
}

impl Rows for Room {
    fn counted(&self) -> HashSet<TrafficKey> {
        let rows = self.rows.borrow();
        let keys = rows.keys().filter(|key| key.kind == traffic_kind::COUNTED);
        keys.copied().collect()
    }

    fn row(&self, key: &TrafficKey) -> Option<Traffic> {
        self.rows.borrow().get(key).copied()
    }

    fn put(&self, key: &TrafficKey, row: &Traffic) -> io::Result<()> {
        let mut rows = self.rows.borrow_mut();
        if rows.len() >= self.most && !rows.contains_key(key) {
            return Err(io::ErrorKind::ArgumentListTooLong.into());
        }
        rows.insert(*key, *row);
        Ok(())
    }

    fn drop_row(&self, key: &TrafficKey) {
        let mut rows = self.rows.borrow_mut();
        rows.remove(key);
        rows.remove(&reported(key));
    }
}

fn counted(server: WorkloadKey) -> TrafficKey {
    TrafficKey {
        client: 1,
        server,
        destination: SocketAddr::from(([10, 96, 0, 1], 80)).into(),
        kind: traffic_kind::COUNTED,
    }
}

#[test]
fn what_cannot_be_noted_is_reported_once_there_is_room() {
    let mut rows = Room::new(1);
    rows.count(2, 5, 0);
    assert_eq!(rows.reports(), []);
    assert_eq!(rows.reports(), []);
    rows.most = 2;
    assert_eq!(rows.reports(), [(2, 5)]);
    assert_eq!(rows.reports(), []);
    // Full again, and what is noted there is replaced.
    rows.count(2, 6, 0);
    assert_eq!(rows.reports(), [(2, 1)]);
    assert_eq!(rows.reports(), []);
}

#[test]
fn what_nobody_took_is_reported_again() {
    let rows = Room::new(2);
    rows.count(2, 5, 0);
    report_rows(&rows, |_, _| false);
    assert_eq!(rows.reports(), [(2, 5)]);
}

#[test]
fn a_row_is_kept_while_there_is_something_to_say_of_it() {
    let rows = Room::new(2);
    rows.count(2, 5, 4);
    assert_eq!(rows.reports(), [(2, 5)]);
    assert_eq!(rows.forgets(), 0, "one is open");
    rows.count(2, 5, 5);
    assert_eq!(rows.forgets(), 0, "its end is not reported");
    assert_eq!(rows.reports(), [(2, 0)]);
    assert_eq!(rows.forgets(), 1);
    assert!(rows.rows.borrow().is_empty());
}
