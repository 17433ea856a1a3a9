#!/bin/sh
# exports.sh LIBRARY ARCHIVE MAP HEADER: the library and the archive export exactly what the map
# names, the library each at its version; the header declares exactly those, with a QBLK_HAVE_ macro
# each; nothing of Rust, std or a dependency leaves them, nor does what only tests use.
set -eu
so=$1 archive=$2 map=$3 header=$4
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
same() { # WHAT A B
    diff -u "$2" "$3" > "$dir/diff" || { echo "exports: $1:"; cat "$dir/diff"; exit 1; }
}
# A name in several nodes is the default (@@) in the last of them, an old version (@) before.
awk '/^QBLK_/ { v = $1 }
     /^ *qblk_[a-z0-9_]*;/ { sub(";", ""); if ($1 in last) print $1 "@" last[$1]; last[$1] = v }
     END { for (n in last) print n "@@" last[n] }' "$map" | sort > "$dir/map"
# GNU ld also exports the nodes' names, as absolute symbols.
nm -D --defined-only "$so" | awk '$2 != "A" { print $3 }' | sort > "$dir/so"
[ -s "$dir/map" ] || { echo "exports: $map names nothing"; exit 1; }
same "the library differs from the map" "$dir/map" "$dir/so"
if grep -v '^qblk_[a-z]' "$dir/so"; then echo "exports: not ours"; exit 1; fi
sed 's/@.*//' "$dir/map" | sort -u > "$dir/names"
nm -g --defined-only "$archive" 2>/dev/null | awk 'NF == 3 { print $3 }' | sort > "$dir/archive"
same "the archive differs from the map" "$dir/names" "$dir/archive"
sed 's,/\*.*,,; /^ *\*/d; /^#/d' "$header" | tr '\n' ' ' | grep -o 'qblk_[a-z0-9_]* *(' | tr -d ' (' |
    sort -u > "$dir/header"
same "the header differs from the map" "$dir/names" "$dir/header"
sed -n 's/^#define QBLK_HAVE_\([A-Z0-9_]*\) 1$/qblk_\1/p' "$header" | tr 'A-Z' 'a-z' | sort > "$dir/have"
same "the QBLK_HAVE_ macros differ from the map" "$dir/names" "$dir/have"
readelf -d "$so" > "$dir/dynamic"
grep -q 'SONAME.*\[libqblk.so.1\]' "$dir/dynamic" || { echo "exports: wrong SONAME"; exit 1; }
grep -q 'NODELETE' "$dir/dynamic" || { echo "exports: not linked with -z nodelete"; exit 1; }
grep -q 'BIND_NOW\|FLAGS.*NOW' "$dir/dynamic" || { echo "exports: not linked with -z now"; exit 1; }
if grep -q 'TEXTREL\|STATIC_TLS' "$dir/dynamic"; then echo "exports: TEXTREL or STATIC_TLS"; exit 1; fi
echo "exports: $(wc -l < "$dir/so") symbols, as in the map and the header"
