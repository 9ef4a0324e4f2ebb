//! Giving back the memory that a peak left behind.
//!
//! The allocator keeps what was freed, page by page between what lives on, for whoever asks next; after loading
//! programs, reading many files or ten thousand connections nobody does. Invariant: this happens only where it is worth
//! it, and not again and again: pages that are given back must be made again, and a thread that allocates meanwhile
//! waits for a moment.

use std::fs;
use std::time::Duration;

/// How often it is looked how much there is. A look walks the allocator's lists of free memory.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Bytes that are worth it.
const WORTH: usize = 4 << 20;

/// What the allocator may keep for itself at the end of each of its areas, and the size from which a piece of memory has
/// an area of its own. Left alone it raises both with what it sees freed, to 32 MiB and more.
const SLACK: libc::c_int = 1 << 20;

/// Bounds what the allocator keeps. Call it once, early.
pub fn bound_slack() {
    for parameter in [libc::M_TRIM_THRESHOLD, libc::M_MMAP_THRESHOLD] {
        // SAFETY: it only sets a parameter, under the allocator's locks.
        if unsafe { libc::mallopt(parameter, SLACK) } == 0 {
            tracing::debug!(parameter, "the allocator does not take its bounds");
        }
    }
}

/// Gives back for as long as it is polled.
pub async fn keep_small() {
    let mut every = tokio::time::interval(LOOK_EVERY);
    // The start itself takes a while.
    every.tick().await;
    every.tick().await;
    // What cannot be given back: pages that are used in part.
    let mut kept = 0;
    loop {
        let unused = unused();
        if unused > kept + WORTH {
            trim();
            kept = self::unused();
            tracing::debug!(bytes = unused.saturating_sub(kept), "gave memory back");
        }
        kept = kept.min(unused);
        every.tick().await;
    }
}

/// Bytes that are in memory and that nobody uses.
fn unused() -> usize {
    resident().unwrap_or(0).saturating_sub(in_use())
}

/// Resident bytes that are no file's.
fn resident() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kilobytes: usize = line.split_whitespace().next()?.parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// Bytes that the allocator has handed out.
fn in_use() -> usize {
    // SAFETY: it only reads the allocator's own books, under its locks.
    let books = unsafe { libc::mallinfo2() };
    books.uordblks + books.hblkhd
}

fn trim() {
    // SAFETY: it gives back whole pages that are free, under the allocator's locks; nothing that is in use moves.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_given_back() {
        // The figures are the whole process's, and other tests come and go meanwhile.
        assert!((0..10).any(|_| gives_a_peak_back()));
    }

    fn gives_a_peak_back() -> bool {
        // Every second one stays: freeing the others gives nothing back by itself.
        let piece = || vec![1_u8; 8 * 1024];
        let mut pieces: Vec<_> = (0..8192).map(|_| Some(piece())).collect();
        let full = in_use();
        pieces.iter_mut().step_by(2).for_each(|piece| *piece = None);
        let freed = full.saturating_sub(in_use());
        let before = resident().unwrap();
        trim();
        let given = before.saturating_sub(resident().unwrap());
        assert!(pieces.iter().flatten().all(|piece| piece[..] == [1; 8 * 1024]));
        freed > 16 << 20 && given > 8 << 20
    }
}
