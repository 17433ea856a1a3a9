//! Our server, with nbdsh: what the protocol says in detail.

use super::common::*;
use super::peers::*;

const SIZE: u64 = 4 << 20;

/// A raw image: data, a hole, data.
fn served(dir: &Tmp) -> (Served, qblk::Image) {
    let image = raw_file(&dir.join("raw"), SIZE);
    image.write_at(&[1; 65536], 0, NONE).unwrap();
    image.write_at(&[2; 65536], SIZE - 65536, NONE).unwrap();
    (Served::new(dir, &[("x", &image)], &[]), image)
}

/// What the scripts share.
const HEAD: &str = r#"
import errno
size = h.get_size()
def fails(code, f, *args, **named):
    try:
        f(*args, **named)
    except nbd.Error as e:
        assert e.errnum == code, (e.errnum, str(e))
    else:
        assert False, "no error"
"#;

fn script(uri: &str, text: &str) {
    nbdsh(uri, &format!("{HEAD}{text}"));
}

#[test]
fn reads_come_in_chunks_or_in_one() {
    let dir = Tmp::new("nbd-sh-read");
    let (served, _image) = served(&dir);
    for uri in served.both("x") {
        script(
            &uri,
            r#"
assert h.get_protocol() == "newstyle-fixed"
assert h.get_structured_replies_negotiated()
assert h.can_df()
def read(count, offset, flags=0):
    chunks = []
    def f(part, at, status, err):
        chunks.append((at, len(part), status))
    buf = h.pread_structured(count, offset, f, flags)
    at = offset
    for c in sorted(chunks):
        assert c[0] == at, chunks
        at += c[1]
    assert at == offset + count, chunks
    return buf, sorted(chunks)
expected = b'\x01' * 65536 + bytes(size - 2 * 65536) + b'\x02' * 65536
buf, chunks = read(size, 0)
assert buf == expected
# The hole is told as one, not sent.
assert (65536, size - 2 * 65536, nbd.READ_HOLE) in chunks, chunks
assert sum(c[1] for c in chunks if c[2] == nbd.READ_DATA) == 2 * 65536
# In one piece, if asked.
buf, chunks = read(size, 0, nbd.CMD_FLAG_DF)
assert buf == expected
assert chunks == [(0, size, nbd.READ_DATA)], chunks
for count, offset in [(1, 0), (1, size - 1), (513, 65535), (70000, 60001), (65536, 1 << 20)]:
    for flags in [0, nbd.CMD_FLAG_DF]:
        assert read(count, offset, flags)[0] == expected[offset:offset + count]
"#,
        );
        // A client that knows no chunks.
        nbdsh_opt(
            &uri,
            r#"
h.set_request_structured_replies(False)
h.connect_uri(uri)
assert not h.get_structured_replies_negotiated()
assert not h.can_df()
assert not h.can_meta_context("base:allocation")
assert h.pread(h.get_size(), 0)[65530:65540] == b'\x01' * 6 + bytes(4)
try:
    h.pread(512, h.get_size() - 256)
    assert False
except nbd.Error as e:
    assert e.errnum == 22
"#,
        );
        // Nor the details of newstyle.
        nbdsh_opt(
            &uri,
            r#"
h.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)
h.connect_uri(uri)
assert h.pread(1, 0) == b'\x01'
"#,
        );
    }
}

/// A script that connects by itself.
fn nbdsh_opt(uri: &str, text: &str) {
    peer!("nbdsh", "-c", format!("uri = {uri:?}\n{text}")).ok();
}

#[test]
fn block_status_is_told_by_context() {
    let dir = Tmp::new("nbd-sh-status");
    let (served, _image) = served(&dir);
    for uri in served.both("x") {
        nbdsh_opt(
            &uri,
            r#"
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.add_meta_context("nobody:knows")
h.connect_uri(uri)
assert h.can_meta_context("base:allocation")
assert h.can_meta_context("qemu:allocation-depth")
assert not h.can_meta_context("nobody:knows")
size = h.get_size()
def status(count, offset, flags=0):
    found = {}
    def f(context, at, entries, err):
        assert at == offset
        found[context] = entries
    h.block_status(count, offset, f, flags)
    return found
n = size - 2 * 65536
s = status(size, 0)
assert s["base:allocation"] == [65536, 0, n, 3, 65536, 0], s
assert sum(s["qemu:allocation-depth"][::2]) == size, s
assert set(s["qemu:allocation-depth"][1::2]) == {1}, s
# One run only, not beyond what was asked for.
for ctx in s:
    pass
s = status(100000, 0, nbd.CMD_FLAG_REQ_ONE)
assert s["base:allocation"] == [65536, 0], s
assert len(s["qemu:allocation-depth"]) == 2, s
s = status(4096, 1 << 20, nbd.CMD_FLAG_REQ_ONE)
assert s["base:allocation"] == [4096, 3], s
try:
    status(4096, size - 512)
    assert False
except nbd.Error as e:
    assert e.errnum == 22
"#,
        );
        nbdsh_opt(
            &uri,
            r#"
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list_meta_context(lambda n: names.append(n))
assert sorted(names) == ["base:allocation", "qemu:allocation-depth"], names
def listed(query):
    names.clear()
    h.clear_meta_contexts()
    h.add_meta_context(query)
    h.opt_list_meta_context(lambda n: names.append(n))
    return sorted(names)
assert listed("base:") == ["base:allocation"], names
assert listed("qemu:") == ["qemu:allocation-depth"], names
assert listed("none:") == []
h.clear_meta_contexts()
# Negotiation goes on after mistakes.
h.set_export_name("missing")
try:
    h.opt_info()
    assert False
except nbd.Error as e:
    assert e.errnum == 2, str(e)
try:
    h.opt_go()
    assert False
except nbd.Error as e:
    assert e.errnum == 2, str(e)
found = []
h.opt_list(lambda name, description: found.append((name, description)))
assert found == [("x", "")], found
h.set_export_name("x")
h.opt_info()
assert h.get_size() == 4 << 20
h.opt_go()
assert h.pread(1, 0) == b'\x01'
h.shutdown()
"#,
        );
        nbdsh_opt(
            &uri,
            "h.set_opt_mode(True)\nh.connect_uri(uri)\nh.opt_abort()\nassert h.aio_is_closed()",
        );
    }
}

#[test]
fn writes_zeroes_trims_and_their_flags() {
    let dir = Tmp::new("nbd-sh-write");
    let (served, image) = served(&dir);
    for uri in served.both("x") {
        script(
            &uri,
            r#"
for can in [h.can_fua, h.can_zero, h.can_fast_zero, h.can_trim, h.can_flush, h.can_cache, h.can_multi_conn]:
    assert can()
assert not h.is_read_only()
h.pwrite(b'abc', 1000001, nbd.CMD_FLAG_FUA)
assert h.pread(5, 1000000) == b'\0abc\0'
h.pwrite(b'x' * 300000, 2000000)
h.flush()
h.zero(100000, 2100000, nbd.CMD_FLAG_FUA)
assert h.pread(100002, 2099999) == b'x' + bytes(100000) + b'x'
h.zero(65536, 0, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(65536, 0) == bytes(65536)
h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)
h.pwrite(b'y' * 65536, 0)
h.trim(65536, 0, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 0) in (bytes(65536), b'y' * 65536)
h.cache(65536, 0)
h.pwrite(b'\x01' * 65536, 0)
# The same, many at a time.
cookies = [h.aio_pwrite(bytes([n + 1]) * 4096, n * 4096) for n in range(64)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
bufs = [nbd.Buffer(4096) for n in range(64)]
cookies = [h.aio_pread(b, n * 4096) for n, b in enumerate(bufs)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
for n, b in enumerate(bufs):
    assert b.to_bytearray() == bytes([n + 1]) * 4096
h.pwrite(b'\x01' * 65536, 0)
h.zero(1 << 20, 65536)
h.shutdown()
"#,
        );
        assert_eq!(read_range(&image, 1_999_999, 3), [0, b'x', b'x']);
        image.zero(65536, SIZE - 2 * 65536, NONE).unwrap();
    }
    assert_eq!(served.server.stats().errors, 0);
}

#[test]
fn wrong_requests_are_answered_and_the_connection_stays() {
    let dir = Tmp::new("nbd-sh-wrong");
    let (served, image) = served(&dir);
    for uri in served.both("x") {
        script(
            &uri,
            r#"
h.set_strict_mode(0)
past = [(1, size), (2, size - 1), (512, size + 4096), (4096, (1 << 63) - 4096)]
for count, offset in past:
    fails(errno.EINVAL, h.pread, count, offset)
    fails(errno.ENOSPC, h.pwrite, b'z' * count, offset)
    fails(errno.ENOSPC, h.zero, count, offset)
    fails(errno.EINVAL, h.trim, count, offset)
    fails(errno.EINVAL, h.cache, count, offset)
    # The connection is as good as before.
    assert h.pread(1, 0) == b'\x01'
fails(errno.EINVAL, h.flush, nbd.CMD_FLAG_DF)
fails(errno.EINVAL, h.pread, 1, 0, 1 << 12)
fails(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_DF)
# No context was negotiated.
fails(errno.EINVAL, h.block_status, 512, 0, lambda *a: 0)
assert h.pread(1, size - 1) == b'\x02'
h.flush()
h.shutdown()
"#,
        );
    }
    assert!(served.server.stats().errors >= 2 * 23, "{:?}", served.server.stats());
    assert_eq!(read_range(&image, SIZE - 2, 2), [2, 2]);
}

#[test]
fn a_read_only_export_answers_eperm() {
    let dir = Tmp::new("nbd-sh-ro");
    let image = raw_file(&dir.join("raw"), SIZE);
    image.write_at(&[1; 512], 0, NONE).unwrap();
    let served = Served::new(&dir, &[], &[]);
    export(&served.server, "ro", "", &image, true);
    for uri in served.both("ro") {
        script(
            &uri,
            r#"
assert h.is_read_only()
assert h.can_multi_conn() and h.can_flush() and h.can_df()
h.set_strict_mode(0)
fails(errno.EPERM, h.pwrite, b'z', 0)
fails(errno.EPERM, h.pwrite, b'z' * 100000, 0)
fails(errno.EPERM, h.zero, 512, 0)
fails(errno.EPERM, h.trim, 512, 0)
h.flush()
h.cache(512, 0)
assert h.pread(2, 511) == b'\x01\0'
"#,
        );
    }
    assert_eq!(read_range(&image, 0, 1), [1]);
}

#[test]
fn a_request_longer_than_may_be_is_refused() {
    let dir = Tmp::new("nbd-sh-long");
    let image = raw_file(&dir.join("raw"), 8 << 20);
    let served = Served::new(&dir, &[("", &image)], &[("max-request", "1M")]);
    for uri in served.both("") {
        script(
            &uri,
            r#"
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 1 << 20
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
h.set_strict_mode(0)
assert h.pread(1 << 20, 0) == bytes(1 << 20)
h.pwrite(b'q' * (1 << 20), 1 << 20)
fails(errno.EINVAL, h.pread, (1 << 20) + 1, 0)
# Zeroes and trims carry no data: any length.
h.zero(8 << 20, 0)
h.trim(8 << 20, 0)
h.cache(1 << 20, 0)
assert h.pread(1 << 20, 1 << 20) == bytes(1 << 20)
"#,
        );
    }
}
