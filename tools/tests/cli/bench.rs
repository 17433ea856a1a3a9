use crate::support::*;

#[test]
fn bench_counts_and_orders_its_times() {
    let dir = Dir::new();
    dir.qblk("create a.qcow2 16M").good();
    let line = "bench --json --write -c 500 -t 2 --flush-every 50 -b 8k a.qcow2";
    let json = dir.qblk(line).json();
    assert_eq!((&json["requests"], &json["bytes"]), (&500.into(), &(500 * 8192).into()));
    assert_eq!((&json["operation"], &json["threads"]), (&"write".into(), &2.into()));
    // One thread may have done most of them, but no more than nine in each are not followed by one.
    let flushes = json["flush_latency"]["count"].as_u64().unwrap();
    assert!((9..=10).contains(&flushes), "{flushes}");
    assert!(json["final_flush_seconds"].as_f64().is_some());
    let latency = |key: &str| json["latency"][key].as_u64().unwrap();
    let times = ["p50_ns", "p99_ns", "p99_9_ns", "max_ns"].map(latency);
    assert!(times.is_sorted() && times[0] > 0, "{times:?}");
    let rate = json["iops"].as_f64().unwrap() * json["seconds"].as_f64().unwrap();
    assert!((rate - 500.0).abs() < 1.0, "{json}");
    dir.qemu_img("check -q a.qcow2");
    // Random writes of 500 blocks cannot all have met the same place.
    assert!(dir.on_disk("a.qcow2") > 1 << 20);
}

#[test]
fn bench_of_reads_changes_nothing() {
    let dir = Dir::new();
    dir.write("a.raw", &noise(1, 1 << 20));
    let before = dir.read("a.raw");
    let text = dir.qblk("bench -p sequential -s 0.05 -b 64k a.raw").good();
    assert!(text.starts_with("a.raw: sequential reads of 64 KiB, 1 thread"), "{text}");
    assert!(text.contains("p99.9") && text.contains("MB/s"), "{text}");
    assert_eq!(dir.read("a.raw"), before);
    assert_eq!(dir.names(), ["a.raw"]);
}

#[test]
fn bench_keeps_to_its_range() {
    let dir = Dir::new();
    dir.qblk("create -f raw a.raw 1M").good();
    dir.qblk("bench -f raw --write -c 300 --offset 256k --length 128k a.raw").good();
    let bytes = dir.read("a.raw");
    let outside = bytes[..256 << 10].iter().chain(&bytes[384 << 10..]);
    assert!(outside.copied().all(|b| b == 0));
    assert!(bytes[256 << 10..384 << 10].contains(&0x5a));
    dir.qblk("bench --offset 1M --length 1 a.raw").bad(1, &["'a.raw'", "1048576"]);
    dir.qblk("bench -b 2M a.raw").bad(1, &["'a.raw'", "2097152"]);
    dir.qblk("bench -c 1 --write -o nonsense=1 a.raw").bad(2, &["nonsense"]);
}
