//! What a round's image is like, and making it: by this library or by qemu-img, on what chain.

use std::fs;
use std::path::{Path, PathBuf};

use super::common::*;
use qblk::OpenFlags;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Chain {
    None,
    Raw,
    Qcow2 {
        compressed: bool,
        zstd: bool,
    },
    /// Raw, compressed qcow2, qcow2: each of another length.
    Deep,
}

/// Where the data of the image lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Data {
    InImage,
    /// In a data file, which may have anything where the image says nothing.
    Apart,
    /// In a data file that is always to be what the guest sees.
    Raw,
}

#[derive(Clone, Debug)]
pub struct Setup {
    pub format: &'static str,
    pub v3: bool,
    pub cluster_bits: u32,
    pub refcount_bits: u32,
    pub zstd: bool,
    pub extended: bool,
    pub data: Data,
    pub chain: Chain,
    pub size: u64,
    pub backing_size: u64,
    pub l2_cache: Option<&'static str>,
    pub direct: bool,
    pub by_qemu: bool,
    /// Some of its clusters are compressed at first.
    pub some_compressed: bool,
}

impl Setup {
    pub fn random(rng: &mut Rng) -> Self {
        let raw = rng.one_in(8);
        let v3 = !rng.one_in(4);
        let cluster_bits = rng.pick(&[9, 9, 10, 12, 12, 14, 16, 16, 18, 21]);
        let chain = match rng.below(8) {
            0..=2 => Chain::None,
            3 => Chain::Raw,
            4 | 5 => Chain::Qcow2 { compressed: rng.one_in(2), zstd: rng.one_in(2) },
            _ => Chain::Deep,
        };
        let extended = !raw && v3 && cluster_bits >= 14 && rng.one_in(2);
        let data = match rng.below(8) {
            0 if !raw && v3 => Data::Apart,
            1 if !raw && v3 => Data::Raw,
            _ => Data::InImage,
        };
        let size_unit = match rng.below(3) {
            0 => 1 << cluster_bits,
            1 => 512,
            _ => 1,
        };
        let small = cluster_bits < 12;
        let size = rng.range(1, if small { 3 << 20 } else { 12 << 20 });
        let size = (size / size_unit).max(1) * size_unit;
        // Shorter than the image, longer, or nearly the same.
        let backing_size = match rng.below(3) {
            0 => size / 2 + rng.below(1000),
            1 => size + rng.below(1 << 20),
            _ => size.saturating_sub(rng.below(1024)),
        }
        .max(1);
        Self {
            format: if raw { "raw" } else { "qcow2" },
            v3,
            cluster_bits,
            refcount_bits: if v3 { rng.pick(&[1, 2, 4, 8, 16, 16, 32, 64]) } else { 16 },
            zstd: v3 && rng.one_in(2),
            extended,
            data,
            chain: if raw || data == Data::Raw { Chain::None } else { chain },
            size,
            backing_size,
            l2_cache: rng.pick(&[None, None, Some("1"), Some("64k")]),
            direct: rng.one_in(6),
            by_qemu: rng.one_in(3),
            some_compressed: data == Data::InImage && rng.one_in(3),
        }
    }

    pub fn flags(&self) -> OpenFlags {
        if self.direct { RW | OpenFlags::DIRECT } else { RW }
    }

    /// Images are kept small enough to be compared as a whole, often.
    pub fn max_size(&self) -> u64 {
        if self.cluster_bits < 12 { 5 << 20 } else { 16 << 20 }
    }

    /// Make the image: its path, and what it should hold.
    pub fn build(&self, rng: &mut Rng, dir: &Tmp) -> (PathBuf, Vec<u8>) {
        let path = dir.join("top");
        if self.format == "raw" {
            let model = patchy(rng, self.size);
            fs::write(&path, &model).unwrap();
            return (path, model);
        }
        let (backing, mut model) = self.build_chain(rng, dir);
        let compat = if self.v3 { "1.1" } else { "0.10" };
        let cluster = (1u64 << self.cluster_bits).to_string();
        let bits = self.refcount_bits.to_string();
        let kind = if self.zstd { "zstd" } else { "zlib" };
        let mut pairs = vec![("compat", compat), ("cluster-size", &cluster)];
        if self.v3 {
            pairs.extend([("refcount-bits", &bits[..]), ("compression-type", kind)]);
        }
        if self.extended {
            pairs.push(("extended-l2", "on"));
        }
        // QEMU looks for it from where it is run.
        let data = data_file(&path).to_str().unwrap().to_owned();
        if self.data != Data::InImage {
            pairs.push(("data-file", &data));
        }
        if self.data == Data::Raw {
            pairs.push(("data-file-raw", "on"));
        }
        let backing_name;
        if let Some((name, format)) = &backing {
            backing_name = name.file_name().unwrap().to_str().unwrap().to_owned();
            pairs.extend([("backing-file", &backing_name[..]), ("backing-fmt", format)]);
        }
        if self.by_qemu {
            let list: Vec<String> =
                pairs.iter().map(|(k, v)| format!("{}={v}", k.replace('-', "_"))).collect();
            let list = list.join(",");
            qemu_img!("create", "-q", "-f", "qcow2", "-o", list, path, self.size.to_string());
            // It makes whole sectors of it.
            model.resize(self.size.next_multiple_of(512) as usize, 0);
        } else {
            create(&path, "qcow2", self.size, &pairs);
            model.resize(self.size as usize, 0);
        }
        if backing.is_some() {
            // Bytes of a longer backing image past the end of this one are not part of it; those
            // between a shorter one's end and this one's are zeroes.
            let whole = self.backing_view(rng, dir, &backing, model.len());
            model = whole;
        }
        // Several share a host cluster, whose refcount must be able to say so.
        if self.some_compressed && self.refcount_bits >= 8 {
            self.compress_some(rng, &path, &mut model);
        }
        (path, model)
    }

    fn backing_view(
        &self,
        _rng: &mut Rng,
        dir: &Tmp,
        backing: &Option<(PathBuf, &'static str)>,
        len: usize,
    ) -> Vec<u8> {
        let (name, format) = backing.as_ref().unwrap();
        // What qemu-img reads of it is the truth that this library is held against.
        let flat = dir.join("flat");
        if *format == "raw" {
            fs::copy(name, &flat).unwrap();
        } else {
            qemu_img!("convert", "-f", format, "-O", "raw", name, flat);
        }
        let mut bytes = fs::read(&flat).unwrap();
        bytes.resize(len, 0);
        bytes
    }

    fn build_chain(&self, rng: &mut Rng, dir: &Tmp) -> (Option<(PathBuf, &'static str)>, Vec<u8>) {
        let raw = dir.join("base.raw");
        let sectors = |n: u64| n.next_multiple_of(512);
        match self.chain {
            Chain::None => (None, Vec::new()),
            Chain::Raw => {
                fs::write(&raw, patchy(rng, self.backing_size)).unwrap();
                (Some((raw, "raw")), Vec::new())
            }
            Chain::Qcow2 { compressed, zstd } => {
                fs::write(&raw, patchy(rng, sectors(self.backing_size))).unwrap();
                let mid = dir.join("mid.qcow2");
                convert(rng, &raw, &mid, compressed, zstd);
                (Some((mid, "qcow2")), Vec::new())
            }
            Chain::Deep => {
                fs::write(&raw, patchy(rng, sectors(self.backing_size))).unwrap();
                let low = dir.join("low.qcow2");
                convert(rng, &raw, &low, true, rng.clone().one_in(2));
                let high = dir.join("high.qcow2");
                let size = sectors(self.backing_size * 2 / 3 + rng.below(self.backing_size));
                let (bits, extended) = rng.pick(&[
                    ("512", "off"),
                    ("4k", "off"),
                    ("64k", "off"),
                    ("16k", "on"),
                    ("64k", "on"),
                ]);
                let mut pairs = vec![
                    ("backing-file", "low.qcow2"),
                    ("backing-fmt", "qcow2"),
                    ("cluster-size", bits),
                    ("extended-l2", extended),
                ];
                let data = data_file(&high).to_str().unwrap().to_owned();
                if rng.one_in(4) {
                    pairs.push(("data-file", &data));
                }
                create(&high, "qcow2", size, &pairs);
                for _ in 0..rng.below(20) {
                    let at = rng.below(size / 512) * 512;
                    let n = (rng.range(1, 100) * 512).min(size - at);
                    qemu_io(&high, "qcow2", &[&format!("write -P {} {at} {n}", rng.range(1, 256))]);
                }
                (Some((high, "qcow2")), Vec::new())
            }
        }
    }

    /// Let QEMU write some clusters in compressed form.
    fn compress_some(&self, rng: &mut Rng, path: &Path, model: &mut [u8]) {
        let cluster = 1u64 << self.cluster_bits;
        let whole = model.len() as u64 / cluster;
        if whole == 0 {
            return;
        }
        let mut commands = Vec::new();
        let mut seen = Vec::new();
        for _ in 0..rng.range(1, 30) {
            let at = rng.below(whole) * cluster;
            // QEMU writes no compressed cluster a second time.
            if seen.contains(&at) {
                continue;
            }
            seen.push(at);
            let byte = rng.range(1, 256) as u8;
            commands.push(format!("write -c -P {byte} {at} {cluster}"));
            model[at as usize..][..cluster as usize].fill(byte);
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu_io(path, "qcow2", &commands);
    }
}

/// Where the data file of an image is, if it has one.
pub fn data_file(image: &Path) -> PathBuf {
    image.with_extension("data")
}

/// Bytes with data and holes.
fn patchy(rng: &mut Rng, size: u64) -> Vec<u8> {
    let mut out = vec![0; size as usize];
    for _ in 0..rng.range(1, 12) {
        let at = rng.below(size);
        let n = rng.range(1, 1 + size / 4).min(size - at);
        let text = rng.one_in(2);
        let mut data = rng.bytes(n as usize);
        if text {
            // Compresses well.
            data.iter_mut().for_each(|b| *b &= 3);
        }
        out[at as usize..][..n as usize].copy_from_slice(&data);
    }
    out
}

fn convert(rng: &mut Rng, from: &Path, to: &Path, compressed: bool, zstd: bool) {
    let cluster = rng.pick(&["4k", "64k", "64k", "512k", "32k,extended_l2=on"]);
    let kind = if zstd { "zstd" } else { "zlib" };
    let opts = format!("cluster_size={cluster},compression_type={kind}");
    if compressed {
        qemu_img!("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", opts, from, to);
    } else {
        qemu_img!("convert", "-f", "raw", "-O", "qcow2", "-o", opts, from, to);
    }
}
