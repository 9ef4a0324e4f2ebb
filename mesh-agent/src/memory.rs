//! Giving back the memory that a peak left behind.
//!
//! The allocator keeps what was freed, page by page between what lives on, for whoever asks next; after loading
//! programs, reading many files or ten thousand connections nobody does. Invariant: this happens only where it is worth
//! it, and not again and again: pages that are given back must be made again, and a thread that allocates meanwhile
//! waits for a moment.

use std::fs;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};

use crate::lanes::Lanes;

/// When the start is over, or nearly so.
const STARTED: Duration = Duration::from_secs(2);
/// How often it is looked how much there is. A look walks the allocator's lists of free memory.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Bytes that are worth it.
const WORTH: usize = 4 << 20;

/// What the allocator may keep for itself at the end of each of its areas, and the size from which a piece of memory has
/// an area of its own. Left alone it raises both with what it sees freed, to 32 MiB and more.
const SLACK: libc::c_int = 1 << 20;

/// The same while buffers come and go faster than that: a server's end of eight busy flows spent a sixth of its time on
/// making pages that it had just given back.
const BUSY_SLACK: libc::c_int = 32 << 20;
/// Pages made for the data path in [`LOOK_EVERY`] from which it is so, and how many looks long it is taken to stay so.
const BUSY_FAULTS: u64 = 10_000;
const BUSY_LOOKS: u32 = 12;
/// Larger than what the allocator puts aside without a look at its neighbours (FASTBIN_CONSOLIDATION_THRESHOLD).
const LARGE: usize = 128 << 10;

/// Bounds what the allocator keeps. Call it once, early.
pub fn bound_slack() {
    set(libc::M_MMAP_THRESHOLD, SLACK);
    set(libc::M_TRIM_THRESHOLD, SLACK);
}

/// Gives back for as long as it is polled.
pub async fn keep_small(lanes: Lanes) {
    // Always worth it: nothing needs it again.
    tokio::time::sleep(STARTED).await;
    give_back(&lanes).await;
    let mut every = tokio::time::interval(LOOK_EVERY);
    every.tick().await;
    // What cannot be given back: pages that are used in part.
    let mut kept = unused();
    let (mut faults, mut busy) = (made_pages(&lanes).await, 0_u32);
    loop {
        let unused = unused();
        if unused > kept + WORTH {
            give_back(&lanes).await;
            kept = self::unused();
            tracing::debug!(bytes = unused.saturating_sub(kept), "gave memory back");
        }
        kept = kept.min(unused);
        let before = std::mem::replace(&mut faults, made_pages(&lanes).await);
        busy = match faults.saturating_sub(before) > BUSY_FAULTS {
            true => BUSY_LOOKS,
            false => busy.saturating_sub(1),
        };
        set(libc::M_TRIM_THRESHOLD, if busy > 0 { BUSY_SLACK } else { SLACK });
        every.tick().await;
    }
}

/// Gives back all that is worth it.
async fn give_back(lanes: &Lanes) {
    set(libc::M_TRIM_THRESHOLD, SLACK);
    for lane in lanes.all() {
        // A lane that ends takes the process with it.
        let _ = lane.spawn(async { free_own_end() }).await;
    }
    trim();
}

/// The end of a thread's area is given back only when that thread frees something large.
fn free_own_end() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(LARGE)));
}

fn set(parameter: libc::c_int, value: libc::c_int) {
    // SAFETY: it only sets a parameter, under the allocator's locks.
    if unsafe { libc::mallopt(parameter, value) } == 0 {
        tracing::debug!(parameter, "the allocator does not take its bounds");
    }
}

/// Pages that the data path's threads were given so far.
async fn made_pages(lanes: &Lanes) -> u64 {
    let mut pages = 0;
    for lane in lanes.all() {
        let usage = lane.spawn(async { getrusage(UsageWho::RUSAGE_THREAD) }).await;
        if let Ok(Ok(usage)) = usage {
            pages += usage.minor_page_faults().unsigned_abs();
        }
    }
    pages
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

    /// The end of a thread's area is out of reach for whoever asks from another thread.
    #[test]
    fn a_peak_of_the_data_path_is_given_back() {
        let lanes = Lanes::start(Some(1)).unwrap();
        let control = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let gives_back = |_| {
            control.block_on(async {
                set(libc::M_TRIM_THRESHOLD, BUSY_SLACK);
                let lane = lanes.next();
                let peak = lane.spawn(async {
                    let buffers: Vec<_> = (0..256).map(|_| vec![1_u8; 64 * 1024]).collect();
                    std::hint::black_box(&buffers).len()
                });
                peak.await.unwrap();
                let before = resident().unwrap();
                give_back(&lanes).await;
                before.saturating_sub(resident().unwrap()) > 8 << 20
            })
        };
        // The figure is the whole process's, and other tests come and go meanwhile.
        assert!((0..10).any(gives_back));
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
