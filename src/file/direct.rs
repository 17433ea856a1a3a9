//! Direct I/O (`O_DIRECT`): what alignment a file asks for, found without believing anybody.

use std::alloc::{Layout, alloc, dealloc};
use std::fs::File;

use libc::iovec;

use super::sys;

/// Good for every file system that does not tell.
const SAFE: u32 = 4096;
/// The same for requests and for memory.
pub const ANY: (u32, u32) = (SAFE, SAFE);

/// The alignment of offsets and lengths, and of memory, that a file opened with `O_DIRECT` asks
/// for, in bytes. `None` if the file does not do direct I/O after all.
pub fn alignment(file: &File, is_block: bool) -> Option<(u32, u32)> {
    match sys::direct_alignment(file) {
        Some((_, 0)) => return None,
        Some((memory, offset)) if offset.is_power_of_two() => {
            return Some((offset, memory.max(1).next_power_of_two()));
        }
        _ => {}
    }
    if is_block {
        let block = sys::logical_block(file);
        return Some((block, block));
    }
    let align = probe(file);
    Some((align, align))
}

/// Find the alignment by trial reads. A read at the end of the file succeeds however it is aligned,
/// so only one that brings bytes counts.
fn probe(file: &File) -> u32 {
    // It takes the flag and has no use for it.
    if sys::file_system(file) == sys::TMPFS {
        return 1;
    }
    let Ok(layout) = Layout::from_size_align(2 * SAFE as usize, SAFE as usize) else { return SAFE };
    // SAFETY: the layout's size is not 0.
    let memory = unsafe { alloc(layout) };
    if memory.is_null() {
        return SAFE;
    }
    let reads = |at: u32, len: u32| {
        // SAFETY: inside the memory, which is 2 * SAFE long: neither is above SAFE.
        let base = unsafe { memory.add(at as usize) };
        let vecs = [iovec { iov_base: base.cast(), iov_len: len as usize }];
        // SAFETY: the piece is memory of ours.
        matches!(unsafe { sys::preadv(file, &vecs, at.into()) }, Ok(n) if n > 0)
    };
    let mut align = SAFE;
    if reads(1, 1) {
        align = 1;
    } else {
        for n in [512, 1024, 2048] {
            // At 0 every memory is aligned well; at n it is aligned to n only.
            if reads(n, n) {
                align = n;
                break;
            }
        }
    }
    // SAFETY: allocated with this layout.
    unsafe { dealloc(memory, layout) };
    align
}
