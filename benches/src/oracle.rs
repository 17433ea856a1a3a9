//! The limits: what plain system calls do with the same bytes. Where an image's bytes are is looked
//! up once, when it is opened; a request is then an index into memory and one `pread` or `pwrite`.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::work::{Device, Res};

const HOST: u64 = 0x00ff_ffff_ffff_fe00;
const ZERO: u64 = 1;
const COMPRESSED: u64 = 1 << 62;

/// What an error of the system was about.
pub fn at<T>(path: &Path, result: std::io::Result<T>) -> Res<T> {
    result.map_err(|e| format!("{}: {e}", path.display()))
}

/// The tables of one qcow2 image. Made for the images of the bench: it trusts them.
pub struct Tables {
    file: File,
    path: PathBuf,
    cluster_bits: u32,
    pub size: u64,
    l1: Vec<u64>,
}

impl Tables {
    pub fn open(path: &Path, write: bool) -> Res<Self> {
        let file = at(path, File::options().read(true).write(write).open(path))?;
        let mut header = [0; 48];
        at(path, file.read_exact_at(&mut header, 0))?;
        let u32_at =
            |o: usize| u32::from_be_bytes([header[o], header[o + 1], header[o + 2], header[o + 3]]);
        let u64_at = |o: usize| u64::from(u32_at(o)) << 32 | u64::from(u32_at(o + 4));
        if &header[..4] != b"QFI\xfb" {
            return Err(format!("{}: not a qcow2 image", path.display()));
        }
        let mut tables = Self {
            file,
            path: path.to_owned(),
            cluster_bits: u32_at(20),
            size: u64_at(24),
            l1: Vec::new(),
        };
        tables.l1 = tables.entries(u64_at(40), u32_at(36) as usize)?;
        Ok(tables)
    }

    fn entries(&self, offset: u64, count: usize) -> Res<Vec<u64>> {
        let mut bytes = vec![0; count * 8];
        at(&self.path, self.file.read_exact_at(&mut bytes, offset))?;
        Ok(bytes
            .chunks_exact(8)
            .map(|b| u64::from_be_bytes(b.try_into().unwrap_or_default()))
            .collect())
    }

    fn l2_bits(&self) -> u32 {
        self.cluster_bits - 3
    }

    /// Where each cluster is in the file; `None` = not in this image.
    fn clusters(&self) -> Res<Vec<Option<u64>>> {
        let count = self.size.div_ceil(1 << self.cluster_bits) as usize;
        let mut all = Vec::with_capacity(count);
        for &l1 in &self.l1 {
            match l1 & HOST {
                0 => all.extend(std::iter::repeat_n(None, 1 << self.l2_bits())),
                table => {
                    for e in self.entries(table, 1 << self.l2_bits())? {
                        let plain = e & (ZERO | COMPRESSED) == 0 && e & HOST != 0;
                        all.push(plain.then_some(e & HOST));
                    }
                }
            }
        }
        all.resize(count, None);
        Ok(all)
    }
}

/// A chain of qcow2 images with one flat map in memory.
pub struct Oracle {
    files: Vec<Tables>,
    /// For each cluster: which file, and where in it.
    map: Vec<Option<(u32, u64)>>,
    bits: u32,
    mapping: Option<Mapping>,
}

impl Oracle {
    /// The images from the top down.
    pub fn open(chain: &[PathBuf], write: bool, mmap: bool) -> Res<Self> {
        let files = chain.iter().map(|p| Tables::open(p, write)).collect::<Res<Vec<_>>>()?;
        let top = files.first().ok_or("a chain of nothing")?;
        let bits = top.cluster_bits;
        let mut map = vec![None; top.size.div_ceil(1 << bits) as usize];
        for (i, file) in files.iter().enumerate() {
            for (slot, found) in map.iter_mut().zip(file.clusters()?) {
                if slot.is_none() {
                    *slot = found.map(|offset| (i as u32, offset));
                }
            }
        }
        let mapping = if mmap { Some(Mapping::new(&top.file, &top.path)?) } else { None };
        Ok(Self { files, map, bits, mapping })
    }

    /// The longest run of bytes from `offset` on that lie together: file, offset in it, length.
    #[inline]
    fn run(&self, offset: u64, len: usize) -> Res<(&Tables, Option<u64>, usize)> {
        let cluster = 1u64 << self.bits;
        let mut i = (offset >> self.bits) as usize;
        let within = offset & (cluster - 1);
        let place = *self.map.get(i).ok_or("past the end")?;
        let mut run = cluster - within;
        let Some((file, host)) = place else {
            return Ok((&self.files[0], None, run.min(len as u64) as usize));
        };
        while run < len as u64 {
            i += 1;
            if self.map.get(i) != Some(&Some((file, host + within + run))) {
                break;
            }
            run += cluster;
        }
        Ok((&self.files[file as usize], Some(host + within), run.min(len as u64) as usize))
    }

    /// Where the first byte of `offset` is in the top image's file.
    pub fn host(&self, offset: u64) -> Res<Option<u64>> {
        Ok(self.run(offset, 1)?.1)
    }
}

impl Device for Oracle {
    fn read(&self, mut buf: &mut [u8], mut offset: u64) -> Res<()> {
        while !buf.is_empty() {
            let (file, host, n) = self.run(offset, buf.len())?;
            let (part, rest) = buf.split_at_mut(n);
            match (host, &self.mapping) {
                (None, _) => part.fill(0),
                (Some(host), Some(mapping)) => {
                    part.copy_from_slice(&mapping.bytes()[host as usize..][..n])
                }
                (Some(host), None) => at(&file.path, file.file.read_exact_at(part, host))?,
            }
            buf = rest;
            offset += n as u64;
        }
        Ok(())
    }

    fn write(&self, mut buf: &[u8], mut offset: u64) -> Res<()> {
        while !buf.is_empty() {
            let (file, host, n) = self.run(offset, buf.len())?;
            let host = host.ok_or("the oracle does not allocate")?;
            at(&file.path, file.file.write_all_at(&buf[..n], host))?;
            buf = &buf[n..];
            offset += n as u64;
        }
        Ok(())
    }
}

/// A file in memory.
struct Mapping {
    base: *mut libc::c_void,
    len: usize,
}

// SAFETY: memory that is only read.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, path: &Path) -> Res<Self> {
        let len = at(path, file.metadata())?.len() as usize;
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let base = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, flags, file.as_raw_fd(), 0)
        };
        match base {
            libc::MAP_FAILED => at(path, Err(std::io::Error::last_os_error())),
            base => Ok(Self { base, len }),
        }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for as long as `self` lives; nothing changes the file while the bench reads.
        unsafe { std::slice::from_raw_parts(self.base.cast(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by us, and nobody has a slice of it any more.
        unsafe { libc::munmap(self.base, self.len) };
    }
}

/// A file as it is: what raw costs.
pub struct Plain {
    file: File,
    path: PathBuf,
}

impl Plain {
    /// A new file of `size` bytes, all hole.
    pub fn sparse(path: &Path, size: u64) -> Res<Self> {
        let file = at(
            path,
            File::options().read(true).write(true).create(true).truncate(true).open(path),
        )?;
        at(path, file.set_len(size))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// A file that is there, for writing.
    pub fn open(path: &Path) -> Res<Self> {
        let file = at(path, File::options().read(true).write(true).open(path))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Open, read `buf` at `offset`, close.
    pub fn visit(path: &Path, buf: &mut [u8], offset: u64) -> Res<()> {
        let file = at(path, File::open(path))?;
        at(path, file.read_exact_at(buf, offset))
    }
}

impl Device for Plain {
    fn read(&self, buf: &mut [u8], offset: u64) -> Res<()> {
        at(&self.path, self.file.read_exact_at(buf, offset))
    }
    fn write(&self, buf: &[u8], offset: u64) -> Res<()> {
        at(&self.path, self.file.write_all_at(buf, offset))
    }
    fn flush(&self) -> Res<()> {
        at(&self.path, self.file.sync_data())
    }
}

/// The least that a read of zeroes can cost: writing them.
pub struct Zeroes;

impl Device for Zeroes {
    fn read(&self, buf: &mut [u8], _offset: u64) -> Res<()> {
        std::hint::black_box(buf).fill(0);
        Ok(())
    }
    fn write(&self, _buf: &[u8], _offset: u64) -> Res<()> {
        Err("reads only".to_owned())
    }
}

/// An image whose tables are too large for memory: one `pread` for 4 KiB of the L2 table, one for
/// the data.
pub struct TwoReads(Tables);

impl TwoReads {
    pub fn open(path: &Path) -> Res<Self> {
        Tables::open(path, false).map(Self)
    }
}

impl Device for TwoReads {
    fn read(&self, buf: &mut [u8], offset: u64) -> Res<()> {
        let t = &self.0;
        let l1 =
            t.l1.get((offset >> (t.cluster_bits + t.l2_bits())) as usize).copied().unwrap_or(0);
        let entry = (offset >> t.cluster_bits) & ((1 << t.l2_bits()) - 1);
        let mut slice = [0; 4096];
        at(&t.path, t.file.read_exact_at(&mut slice, (l1 & HOST) + entry * 8 / 4096 * 4096))?;
        let i = (entry * 8 % 4096) as usize;
        let e = u64::from_be_bytes(slice[i..i + 8].try_into().unwrap_or_default());
        at(&t.path, t.file.read_exact_at(buf, (e & HOST) + offset % (1 << t.cluster_bits)))
    }
    fn write(&self, _buf: &[u8], _offset: u64) -> Res<()> {
        Err("reads only".to_owned())
    }
}

/// What copying on write costs at least: a cluster read from below, changed, and written to the end
/// of a file.
pub struct CopyOnWrite {
    below: Oracle,
    to: Plain,
    end: std::sync::atomic::AtomicU64,
}

impl CopyOnWrite {
    pub fn new(below: &Path, to: &Path) -> Res<Self> {
        let below = Oracle::open(&[below.to_owned()], false, false)?;
        Ok(Self { below, to: Plain::sparse(to, 0)?, end: 0.into() })
    }
}

impl Device for CopyOnWrite {
    fn read(&self, _buf: &mut [u8], _offset: u64) -> Res<()> {
        Err("writes only".to_owned())
    }
    fn write(&self, buf: &[u8], offset: u64) -> Res<()> {
        thread_local!(static CLUSTER: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) });
        CLUSTER.with_borrow_mut(|cluster| {
            cluster.resize(1 << self.below.bits, 0);
            let within = (offset % cluster.len() as u64) as usize;
            self.below.read(cluster, offset - within as u64)?;
            cluster[within..within + buf.len()].copy_from_slice(buf);
            let end =
                self.end.fetch_add(cluster.len() as u64, std::sync::atomic::Ordering::Relaxed);
            self.to.write(cluster, end)
        })
    }
}
