//! What the bench is at, and how long it will still take, on stderr.

use std::io::{IsTerminal, stderr};

use tokio::time::Instant;

use crate::args::{Name, Peer};

pub(crate) struct Progress {
    scenario: Name,
    started: Instant,
    done: usize,
    all: usize,
    turn: String,
}

impl Progress {
    pub(crate) fn new(scenario: Name, all: usize) -> Self {
        Self {
            scenario,
            started: Instant::now(),
            done: 0,
            all,
            turn: String::new(),
        }
    }

    pub(crate) fn turn(&mut self, round: usize, peer: Peer) {
        self.turn = format!("{:?}, round {round}, {}", self.scenario, peer.title());
    }

    /// What begins now.
    pub(crate) fn row(&self, label: &str) {
        let start = if stderr().is_terminal() { "\r\x1b[K" } else { "" };
        let left = self
            .left()
            .map_or_else(String::new, |left| format!(" ({left} left)"));
        eprint!(
            "{start}{:>3}/{} {}: {label}{left} ... ",
            self.done + 1,
            self.all,
            self.turn
        );
    }

    pub(crate) fn done(&mut self, per_second: f64) {
        self.done += 1;
        eprint!("{per_second:.0}/s");
        if !stderr().is_terminal() || self.done == self.all {
            eprintln!();
        }
    }

    pub(crate) fn failed(&mut self, why: &str) {
        self.done += 1;
        eprintln!("FAILED\n      {why}");
    }

    fn left(&self) -> Option<String> {
        let each = self
            .started
            .elapsed()
            .checked_div(u32::try_from(self.done).ok()?)?;
        let left = each * u32::try_from(self.all - self.done).ok()?;
        Some(format!("{}:{:02}", left.as_secs() / 60, left.as_secs() % 60))
    }
}
