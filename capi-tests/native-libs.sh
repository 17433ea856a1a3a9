#!/bin/sh
# native-libs.sh NATIVE PRIVATE: what rustc says that the archive needs is what the Makefile links
# with, and all of it but libgcc (which every C driver adds by itself) and libc is in qblk.pc.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
echo 'pub fn f() {}' > "$dir/f.rs"
said=$("${RUSTC:-rustc}" --edition 2024 --crate-type staticlib --print native-static-libs -o "$dir/f.a" "$dir/f.rs" 2>&1 |
    sed -n 's/.*native-static-libs: //p')
sorted() { printf '%s\n' $1 | sort -u; }
if [ "$(sorted "$said")" != "$(sorted "$1")" ]; then
    echo "native libraries: rustc says '$said', the Makefile has '$1'"
    exit 1
fi
for lib in $said; do
    case $lib in -lgcc_s | -lc) continue ;; esac
    case " $2 " in *" $lib "*) ;; *) echo "native libraries: $lib is not in Libs.private"; exit 1 ;; esac
done
echo "native libraries: as rustc says"
