//! `stats`.

use qblk::block::Device;
use qblk::{Image, Options, ReqFlags};

use crate::common::*;
use crate::model;
use crate::recorder::*;

fn told(dev: &Device, key: &str) -> String {
    let all = dev.driver().describe().properties;
    let found = all.iter().find(|p| p.0 == key).unwrap_or_else(|| panic!("no {key}"));
    String::from_utf8(found.1.clone()).unwrap()
}

fn number(dev: &Device, key: &str) -> u64 {
    told(dev, key).parse().unwrap()
}

#[test]
fn calls_pass_as_they_are_and_are_counted() {
    let r = Recorder::new(64 << 10, able());
    let dev = on(&r, "stats", &[], true).unwrap();
    let mut some = [qblk::Extent::default(); 8];
    let mut list = qblk::block::ExtentList::for_c(&mut some);
    dev.read_slice(&mut [0; 512], 0).unwrap();
    dev.read_slice(&mut [0; 1000], 5).unwrap();
    dev.write_slice(&[7; 512], 512, ReqFlags::FUA).unwrap();
    dev.zero(1024, 300, ReqFlags::MAY_TRIM).unwrap();
    dev.trim(2048, 200, ReqFlags::FUA).unwrap();
    dev.cache(0, 4096).unwrap();
    dev.driver().extents(0, 4095, &mut list).unwrap();
    dev.flush().unwrap();
    r.fail("read", libc::EIO, 2);
    dev.read_slice(&mut [0; 512], 0).unwrap_err();
    dev.read_slice(&mut [0; 512], 0).unwrap_err();
    // What would have had to wait is made again, and counts then.
    let mut some = [0; 512];
    assert!(!dev.read_now(qblk::OneIov::dst(&mut some).iov(), 0).unwrap());
    let expected = [
        "open 1 rw",
        "1 read 0+512",
        "1 read 5+1000",
        "1 write 512+512 FUA",
        "1 zero 1024+300 MAY_TRIM",
        "1 trim 2048+200 FUA",
        "1 cache 0+4096",
        "1 extents 0+4095",
        "1 flush",
        "1 read 0+512",
        "1 read 0+512",
    ];
    assert_eq!(r.log(), expected);
    for (call, count, bytes, errors) in [
        ("read", 4, 1512, 2),
        ("write", 1, 512, 0),
        ("zero", 1, 300, 0),
        ("trim", 1, 200, 0),
        ("flush", 1, 0, 0),
        ("cache", 1, 4096, 0),
        ("extents", 1, 4095, 0),
    ] {
        let n = |field: &str| number(&dev, &format!("stats.{call}.{field}"));
        assert_eq!((n("count"), n("bytes"), n("errors")), (count, bytes, errors), "{call}");
        let (p50, p99, max) = (n("p50-ns"), n("p99-ns"), n("max-ns"));
        assert!(p50 <= p99 && p99 <= max && n("mean-ns") <= max && max > 0, "{call}");
    }
}

#[test]
fn times_are_those_of_the_calls() {
    // Above a layer that takes its time, and beneath it.
    let name = "layers:stats,delay;read=20ms;flush=60ms,stats:mem:1M";
    let image = Image::open(name.as_ref(), &Options::new(), RW).unwrap();
    for _ in 0..9 {
        image.read_at(&mut [0; 512], 0).unwrap();
    }
    image.flush().unwrap();
    let get = |key: &str| String::from_utf8(image.property(key).unwrap().unwrap()).unwrap();
    let n = |key: &str| get(key).parse::<u64>().unwrap();
    assert_eq!(n("stats.read.count"), 9);
    for key in
        ["stats.read.mean-ns", "stats.read.p50-ns", "stats.read.p99.9-ns", "stats.read.max-ns"]
    {
        assert!(n(key) >= 20_000_000, "{key}: {}", n(key));
    }
    assert!(n("stats.flush.max-ns") >= 60_000_000 && n("stats.flush.count") == 1);
    let histogram = get("stats.read.histogram-ns");
    let calls: u64 =
        histogram.split(' ').map(|b| b.split_once(':').unwrap().1.parse::<u64>().unwrap()).sum();
    assert_eq!(calls, 9, "{histogram}");
    assert!(get("stats.seconds").parse::<f64>().unwrap() >= 0.24);
    let list = get("properties");
    assert!(list.lines().any(|l| l == "stats.write.bytes") && list.lines().any(|l| l == "layers"));
}

#[test]
fn many_threads_lose_no_count() {
    let image = Image::open("layers:stats:mem:2M".as_ref(), &Options::new(), RW).unwrap();
    let mut model = vec![0; 2 << 20];
    model::run_many(&image, &mut model, 300, 4, seed("stats"));
    let get = |key: &str| {
        String::from_utf8(image.property(key).unwrap().unwrap()).unwrap().parse::<u64>().unwrap()
    };
    let before = get("stats.write.count");
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| (0..5000).for_each(|_| image.write_at(&[1; 16], 0, NONE).unwrap()));
        }
    });
    assert_eq!(get("stats.write.count") - before, 20_000);
}

#[test]
fn the_file_has_them_at_the_end_however_that_comes() {
    let tmp = Tmp::new("layers-stats");
    let path = tmp.join("stats");
    let open = |flags| {
        let options = Options::new().with("layers", "stats");
        let options = options.with("stats.file", path.to_str().unwrap());
        Image::open("mem:1M".as_ref(), &options, flags).unwrap()
    };
    let value = |key: &str| {
        let text = std::fs::read_to_string(&path).unwrap();
        let found =
            text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('=').map(str::to_owned));
        found.unwrap_or_else(|| panic!("no {key} in {text}"))
    };
    // What was there before is gone, though longer.
    std::fs::write(&path, vec![b'x'; 100_000]).unwrap();
    let image = open(RW);
    image.write_at(&[1; 512], 0, NONE).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 100_000, "not before the end");
    image.close().unwrap();
    assert_eq!(
        (value("stats.write.bytes"), value("stats.flush.count")),
        ("512".into(), "1".into())
    );
    assert!(!std::fs::read_to_string(&path).unwrap().contains("xx"));
    // One that was only read, closed and dropped.
    let image = open(RO);
    image.read_at(&mut [0; 100], 0).unwrap();
    image.close().unwrap();
    assert_eq!((value("stats.read.bytes"), value("stats.write.bytes")), ("100".into(), "0".into()));
    drop(open(RO));
    assert_eq!(value("stats.read.bytes"), "0");
    // A place that can not be is found out at once.
    let at = tmp.join("no/such");
    for at in [at.to_str().unwrap(), tmp.path().to_str().unwrap(), "/dev/null"] {
        let e = on(&Recorder::new(512, able()), "stats", &[("file", at)], true).err().unwrap();
        assert!(e.to_string().contains("layer 'stats'"), "{e}");
    }
}
