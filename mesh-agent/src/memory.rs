//! Giving memory back: what a peak left behind, and what only the start needed.
//!
//! The allocator keeps what was freed, page by page between what lives on, for whoever asks next; after loading
//! programs, reading many files or ten thousand connections nobody does. Invariant: this happens only where it is worth
//! it, and not again and again: pages that are given back must be made again, and a thread that allocates meanwhile
//! waits for a moment.

use std::fs;
use std::io;
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
    if let Err(error) = unmap_start() {
        tracing::debug!(%error, "code that only the start needed stays in memory");
    }
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

/// Our own code is on disk and in the kernel's cache; the part of it that the agent goes on with comes back to its
/// memory as it is used, and most of it never does.
fn unmap_start() -> io::Result<()> {
    let program = fs::read_link("/proc/self/exe")?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    // START-END PERMISSIONS OFFSET DEVICE INODE PATH
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(permissions), Some(path)) = (fields.next(), fields.next(), fields.nth(3))
        else {
            continue;
        };
        // Code is never written to: what is dropped is read again as it was.
        if permissions == "r-xp" && program.as_os_str() == path {
            let ends = range.split_once('-').and_then(|(start, end)| {
                let hex = |text| usize::from_str_radix(text, 16).ok();
                Some((hex(start)?, hex(end)?))
            });
            if let Some((start, end)) = ends {
                unmap(start, end)?;
            }
        }
    }
    Ok(())
}

fn unmap(start: usize, end: usize) -> io::Result<()> {
    let start = std::ptr::without_provenance_mut::<libc::c_void>(start);
    // SAFETY: the range is a mapping of our program's code as the kernel just listed it. It is private, file-backed and
    // not writable, so its pages are the file's, and the next use of one brings it back.
    match unsafe { libc::madvise(start, end.saturating_sub(start.addr()), libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
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
    fn a_peak_is_given_back_and_code_goes_on_without_its_pages() {
        // Every second one stays: freeing the others gives nothing back by itself.
        let piece = || vec![1_u8; 8 * 1024];
        let mut pieces: Vec<_> = (0..8192).map(|_| Some(piece())).collect();
        let full = in_use();
        pieces.iter_mut().step_by(2).for_each(|piece| *piece = None);
        // Other tests come and go meanwhile, but with less than this.
        assert!(full.saturating_sub(in_use()) > 16 << 20);
        let before = resident().unwrap();
        trim();
        assert!(before.saturating_sub(resident().unwrap()) > 8 << 20);
        unmap_start().unwrap();
        assert!(pieces.iter().flatten().all(|piece| piece[..] == [1; 8 * 1024]));
    }
}
