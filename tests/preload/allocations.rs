//! A library to be loaded into a program ahead of all others (`LD_PRELOAD`): counts what the program asks the
//! allocator for, in a file that others can read meanwhile.
//!
//! Invariants: every request goes on to glibc's allocator unchanged; nothing is allocated here; a program that is not
//! given a file is not counted.

use std::ffi::{c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// Names the file: 8 bytes, which the program counts up in native byte order.
const FILE: &std::ffi::CStr = c"MESH_TESTS_ALLOCATIONS";

/// The file's first 8 bytes, once it is mapped.
static COUNT: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());

// glibc's own, under the names by which it means them to be called from here.
unsafe extern "C" {
    fn __libc_malloc(size: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
    fn __libc_realloc(old: *mut c_void, size: usize) -> *mut c_void;
    fn __libc_memalign(alignment: usize, size: usize) -> *mut c_void;
}

fn count() {
    let counter = COUNT.load(Ordering::Relaxed);
    if !counter.is_null() {
        // SAFETY: mapped once, for as long as the program runs.
        unsafe { (*counter).fetch_add(1, Ordering::Relaxed) };
    }
}

/// # Safety
/// As of malloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc(size: usize) -> *mut c_void {
    count();
    // SAFETY: the caller's promise.
    unsafe { __libc_malloc(size) }
}

/// # Safety
/// As of calloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn calloc(number: usize, size: usize) -> *mut c_void {
    count();
    // SAFETY: the caller's promise.
    unsafe { __libc_calloc(number, size) }
}

/// # Safety
/// As of realloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(old: *mut c_void, size: usize) -> *mut c_void {
    count();
    // SAFETY: the caller's promise.
    unsafe { __libc_realloc(old, size) }
}

/// # Safety
/// As of `posix_memalign(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(to: *mut *mut c_void, alignment: usize, size: usize) -> c_int {
    count();
    // SAFETY: the caller's promise.
    let allocated = unsafe { __libc_memalign(alignment, size) };
    if allocated.is_null() {
        return libc::ENOMEM;
    }
    // SAFETY: the caller's promise.
    unsafe { *to = allocated };
    0
}

/// Runs before the program does.
#[unsafe(link_section = ".init_array")]
#[used]
static START: extern "C" fn() = start;

extern "C" fn start() {
    // SAFETY: before there is a second thread that could change the environment.
    let path: *const c_char = unsafe { libc::getenv(FILE.as_ptr()) };
    if path.is_null() {
        return;
    }
    // SAFETY: a string from the environment; a fresh mapping of 8 bytes of a file, checked before it is used.
    unsafe {
        let file = libc::open(path, libc::O_RDWR | libc::O_CLOEXEC);
        let shared = libc::PROT_READ | libc::PROT_WRITE;
        let place = libc::mmap(ptr::null_mut(), 8, shared, libc::MAP_SHARED, file, 0);
        libc::close(file);
        if place != libc::MAP_FAILED {
            COUNT.store(place.cast(), Ordering::Relaxed);
        }
    }
}
