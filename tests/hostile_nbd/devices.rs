//! A device that does not answer: it costs its own clients their time, and nobody else.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use qblk::Image;

use super::client::Client;
use super::common::*;
use super::hangups::add_packed;
use super::scene::{AT_ONCE, Scene, alone, counts, until};
use super::wire::*;

/// A server of zeroes that answers no request before it is told to, and counts writes.
struct Silent(Arc<AtomicBool>, Arc<AtomicU64>);

impl Silent {
    fn listen(path: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let told = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let (answer, count) = (told.clone(), writes.clone());
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            // The end of the connection ends it.
            let _ = Self::serve(stream, &answer, &count);
        });
        Self(told, writes)
    }

    fn serve(mut s: UnixStream, answer: &AtomicBool, writes: &AtomicU64) -> std::io::Result<()> {
        s.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
        s.read_exact(&mut [0; 4])?;
        loop {
            let mut head = [0; 16];
            s.read_exact(&mut head)?;
            let mut payload = vec![0; be32(&head[12..]) as usize];
            s.read_exact(&mut payload)?;
            let reply = |kind: u32, payload: &[u8]| {
                let mut out = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
                out.extend_from_slice(&head[8..12]);
                out.extend_from_slice(&kind.to_be_bytes());
                out.extend_from_slice(&string(payload));
                out
            };
            if be32(&head[8..]) != opt::GO {
                s.write_all(&reply(rep::ERR_UNSUP, &[]))?;
                continue;
            }
            // 64 MiB; HAS_FLAGS, SEND_FLUSH.
            let facts = [&[0, 0][..], &(64u64 << 20).to_be_bytes(), &[0, 5]].concat();
            s.write_all(&reply(rep::INFO, &facts))?;
            s.write_all(&reply(rep::ACK, &[]))?;
            break;
        }
        loop {
            let mut head = [0; 28];
            s.read_exact(&mut head)?;
            let (kind, length) = (u16::from_be_bytes([head[6], head[7]]), be32(&head[24..]));
            if kind == cmd::WRITE {
                s.read_exact(&mut vec![0; length as usize])?;
                writes.fetch_add(1, SeqCst);
            }
            while !answer.load(SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
            let mut out = 0x6744_6698u32.to_be_bytes().to_vec();
            out.extend_from_slice(&[0; 4]);
            out.extend_from_slice(&head[8..16]);
            if kind == cmd::READ {
                out.resize(16 + length as usize, 0);
            }
            s.write_all(&out)?;
        }
    }

    fn answer(&self) {
        self.0.store(true, SeqCst);
    }

    fn writes(&self) -> u64 {
        self.1.load(SeqCst)
    }
}

/// Exports "hung", which reads from it, and "packed", which needs the pool, too.
fn scene() -> (Scene, Silent) {
    let mut silent = None;
    let scene = Scene::with(&[], |s| {
        add_packed(s);
        let path = s.tmp.join("silent");
        silent = Some(Silent::listen(&path));
        let uri = format!("nbd+unix:///?socket={}", path.display());
        let opts = options(&[("format", "raw"), ("nbd.connections", "1"), ("nbd.reconnect", "0")]);
        let image = Image::open(uri.as_ref(), &opts, RW).unwrap_or_else(|e| panic!("{e}"));
        s.add_image(b"hung", image, false);
    });
    (scene, silent.unwrap())
}

/// What needs the pool is done at once.
fn others(scene: &Scene) {
    let begun = Instant::now();
    let mut c = scene.client("packed", Mode::Structured);
    for i in 0..5 {
        assert_eq!(c.ask(cmd::READ, 0, i << 20, 70_000, &[]).error, 0);
        assert_eq!(c.ask(cmd::CACHE, 0, i << 20, 4096, &[]).error, 0);
    }
    assert!(begun.elapsed() < AT_ONCE, "others waited for {:?}", begun.elapsed());
    scene.honest();
}

#[test]
fn a_device_that_hangs_holds_up_nobody_else() {
    alone(|| {
        let (scene, silent) = scene();
        let mut waiting: Vec<Client> = Vec::new();
        for i in 0..24 {
            let mut c = scene.client("hung", MODES[i % 3]);
            for n in 0..4 {
                let request = c.request(cmd::READ, 0, n << 20, 100_000).0;
                c.say(&request);
            }
            // One job more, of another device, while threads are being taken.
            others(&scene);
            waiting.push(c);
        }
        // Those who go away are done with when the device answers.
        drop(waiting.split_off(12));
        others(&scene);
        silent.answer();
        for c in &mut waiting {
            for _ in 0..4 {
                let reply = c.reply();
                assert_eq!((reply.error, reply.data.len()), (0, 100_000));
            }
        }
        drop(waiting);
        scene.end();
    });
}

#[test]
fn stopping_with_a_device_that_hangs() {
    alone(|| {
        let (scene, silent) = scene();
        let mut c = scene.client("hung", Mode::Simple);
        let write = c.request(cmd::WRITE, FUA, 0, 512).0;
        c.say(&[write, vec![1; 512]].concat());
        let read = c.request(cmd::READ, 0, 0, 512).0;
        c.say(&read);
        // They have reached the device.
        until(AT_ONCE, counts, |c| c.pool == 2).unwrap();
        let begun = Instant::now();
        // It did not answer: that is what we are told, and in time.
        let result = scene.server.stop(Duration::from_millis(200));
        let took = begun.elapsed();
        assert!(result.is_err(), "stopped though a device hangs");
        assert!(took < Duration::from_secs(6), "it took {took:?}");
        silent.answer();
        drop(c);
        scene.calm("a device that hung");
    });
}

/// "The server MUST handle all outstanding requests" (NBD_CMD_DISC): those that had not begun when the
/// client, having said goodbye, hung up were thrown away.
#[test]
fn who_says_goodbye_and_is_gone_has_everything_done() {
    alone(|| {
        let (scene, silent) = scene();
        let mut c = scene.client("hung", Mode::Structured);
        let mut all = Vec::new();
        for i in 0..48 {
            all.extend_from_slice(&c.request(cmd::WRITE, 0, i << 12, 512).0);
            all.extend_from_slice(&[1; 512]);
        }
        all.extend_from_slice(&c.request(cmd::DISC, 0, 0, 0).0);
        c.say(&all);
        drop(c);
        // Time to see that it is gone, for a server that looks; the outcome is not for time to tell.
        let _ = until(Duration::from_millis(300), counts, |c| c.conns == 0);
        silent.answer();
        if let Err(n) = until(Duration::from_secs(8), || silent.writes(), |n| *n == 48) {
            panic!("{n} of 48 writes have reached the device");
        }
        scene.end();
    });
}
