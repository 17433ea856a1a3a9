#!/bin/sh
# Build the fuzz targets and run each for SECONDS (60), from the kept corpus in fuzz/corpus/.
#
#   fuzz/run.sh [SECONDS [TARGET]]
#   fuzz/run.sh keep            bring what was found since into the kept corpus, as little as covers all
#
# Coverage guidance needs no nightly compiler: the passes are in stable's LLVM and are asked for by
# name. A crash leaves its input in fuzz/artifacts/TARGET/; `cargo run -p qblk-fuzz --bin TARGET FILE`
# runs it again.
set -eu
cd "$(dirname "$0")/.."

seconds=${1:-60}
targets=${2:-luks_header qcow2_header qcow2_ops qcow2_snapshots qcow2_bitmaps partition_table nbd_server_handshake nbd_server_transmission nbd_client_handshake nbd_client_transmission}
command -v c++ >/dev/null || { echo "install a C++ compiler (apt-get install g++): libFuzzer is built from source" >&2; exit 1; }

host=$(rustc -vV | sed -n 's/^host: //p')
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/fuzz
export CARGO_TARGET_DIR
cov='-Cllvm-args=-sanitizer-coverage'
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module $cov-level=4 $cov-inline-8bit-counters \
$cov-pc-table $cov-trace-compares -Ccodegen-units=1"
# What overflows or breaks an assertion in a debug build must crash here, too.
export CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true
export CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true
export CARGO_PROFILE_RELEASE_LTO=off
export CARGO_PROFILE_RELEASE_OPT_LEVEL=2
# With --target the flags are for the targets only, not for build scripts.
cargo build --quiet --release --target "$host" -p qblk-fuzz --bins
bins=$CARGO_TARGET_DIR/$host/release

if [ "$seconds" = keep ]; then
    for target in $targets; do
        new=$(mktemp -d)
        # What reaches new code, not what reaches it more often; short ones: it is kept in git.
        "$bins/$target" -set_cover_merge=1 -use_counters=0 -max_len=5000 -timeout=10 \
            -rss_limit_mb=2048 "$new" "fuzz/corpus/$target" "$CARGO_TARGET_DIR/found/$target" 2>&1 |
            tail -n 1
        rm -rf "fuzz/corpus/$target"
        mv "$new" "fuzz/corpus/$target"
        chmod 755 "fuzz/corpus/$target"
        du -sh "fuzz/corpus/$target"
    done
    exit
fi

failed=0
for target in $targets; do
    found=$CARGO_TARGET_DIR/found/$target
    log=$CARGO_TARGET_DIR/$target.log
    mkdir -p "$found" "fuzz/artifacts/$target"
    echo "fuzz: $target for $seconds s"
    if "$bins/$target" -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=2048 \
        -artifact_prefix="fuzz/artifacts/$target/" -print_final_stats=1 \
        "$found" "fuzz/corpus/$target" >"$log" 2>&1; then
        grep -E '^stat::(number_of_executed_units|peak_rss_mb)|DONE' "$log" | tail -n 3
    else
        failed=1
        tail -n 40 "$log"
        echo "fuzz: $target failed; its input is in fuzz/artifacts/$target/ (named above)" >&2
    fi
done
exit $failed
