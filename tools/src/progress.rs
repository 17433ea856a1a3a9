//! How far long work is: a bar on a terminal, lines elsewhere if they are asked for.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::signals;
use crate::units::{human, percent};

/// Who looks, and how.
enum Look {
    Bar(ProgressBar),
    Lines { begun: Instant, shown: Instant },
    None,
}

/// Do `work`, of so many bytes if that is known already, and show how far it is. A signal that asks us to
/// end stops it.
pub fn watched<T>(
    quiet: bool,
    lines: bool,
    size: Option<u64>,
    work: impl FnOnce(qblk::block::Progress<'_>) -> T,
) -> T {
    let look = Mutex::new(Look::new(quiet, lines, size));
    let tell = |done, total| {
        look.lock().unwrap_or_else(PoisonError::into_inner).show(done, total);
        signals::asked_to_end().is_none()
    };
    let answer = work(qblk::block::Progress::new(&tell));
    look.into_inner().unwrap_or_else(PoisonError::into_inner).end();
    answer
}

impl Look {
    fn new(quiet: bool, lines: bool, size: Option<u64>) -> Self {
        if quiet {
            return Self::None;
        }
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(size, ProgressDrawTarget::stderr());
            let look = "{wide_bar} {percent:>3}%  {binary_bytes} of {binary_total_bytes}  \
                        {binary_bytes_per_sec}  {eta} left";
            if let Ok(style) = ProgressStyle::with_template(look) {
                bar.set_style(style.progress_chars("=> "));
            }
            return Self::Bar(bar);
        }
        let now = Instant::now();
        match lines {
            true => Self::Lines { begun: now, shown: now },
            false => Self::None,
        }
    }

    fn show(&mut self, done: u64, total: u64) {
        match self {
            Self::Bar(bar) => {
                if bar.length() != Some(total) {
                    bar.set_length(total);
                }
                bar.set_position(done);
            }
            Self::Lines { begun, shown } => {
                if done >= total || shown.elapsed() >= Duration::from_secs(1) {
                    *shown = Instant::now();
                    let text = format!(
                        "{} of {} ({}) after {:.0} s\n",
                        human(done),
                        human(total),
                        percent(done, total),
                        begun.elapsed().as_secs_f64()
                    );
                    // Whoever wanted to watch may have gone; the work goes on.
                    let _ = std::io::stderr().write_all(text.as_bytes());
                }
            }
            Self::None => {}
        }
    }

    fn end(self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
