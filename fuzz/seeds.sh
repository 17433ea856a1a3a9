#!/bin/sh
# Make the first inputs of the fuzz targets: small images by qemu-img, of every kind that it makes,
# and some with bytes changed; disks with partitions; and what NBD clients say. Usage: fuzz/seeds.sh DIRECTORY
set -eu

out=${1:?usage: fuzz/seeds.sh DIRECTORY}
command -v qemu-img >/dev/null || { echo "install qemu-utils (apt-get install qemu-utils)" >&2; exit 1; }
command -v sfdisk >/dev/null || { echo "install fdisk (apt-get install fdisk)" >&2; exit 1; }
command -v sgdisk >/dev/null || { echo "install gdisk (apt-get install gdisk)" >&2; exit 1; }
mkdir -p "$out/luks_header" "$out/qcow2_header" "$out/qcow2_ops" "$out/qcow2_bitmaps"
out=$(cd "$out" && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT INT TERM
cd "$tmp"
image=image

# How to open, six operations of six bytes each: read, write, zero, trim, flush, extents.
script() {
    printf "\\$1\\006"
    printf '\017\000\000\000\000\377'
    printf '\000\000\002\000\000\041'
    printf '\004\000\004\000\000\020'
    printf '\006\000\000\000\000\020'
    printf '\007\000\000\000\000\000'
    printf '\010\000\000\000\000\376'
}

# keep NAME [HOW...]: the image is an input of both targets.
keep() {
    name=$1
    shift
    cp "$image" "$out/qcow2_header/$name"
    for how in "${@:-000}"; do
        { script $how; cat "$image"; } > "$out/qcow2_ops/$name-$how"
    done
}

# patch OFFSET OCTAL-ESCAPES
patch() {
    printf "$2" | dd of="$image" bs=1 seek="$1" conv=notrunc 2>/dev/null
}

make() {
    rm -f "$image"
    qemu-img create -q -f qcow2 "$@" "$image" $size
}

size=100k
put() {
    for command; do
        qemu-io -f qcow2 -c "$command" "$image" >/dev/null
    done
}

for opts in compat=0.10 compat=1.1 refcount_bits=1 refcount_bits=64 lazy_refcounts=on; do
    make -o "cluster_size=512,$opts"
    put "write -P 1 3000 2000" "write -P 2 99k 1k"
    keep "plain-$opts"
done
make -o cluster_size=512
put "write -P 1 0 8k" "write -z 512 1024" "write -zu 2k 1k"
keep zeroed
qemu-img snapshot -c one "$image"
put "write -P 3 1k 4k"
keep snapshot
qemu-img snapshot -c two "$image"
# Apply, delete, create, write to the state, change the width and the version.
mkdir -p "$out/qcow2_snapshots"
seed() {
    {
        printf "\\$1\\007"
        printf '\002\000\000\000\000\000'
        printf '\013\001\000\010\000\040'
        printf '\004\002\000\000\000\000'
        printf '\005\001\000\000\000\040'
        printf '\000\005\000\000\000\000'
        printf '\011\000\000\000\000\006'
        printf '\012\000\000\000\000\000'
        cat "$image"
    } > "$out/qcow2_snapshots/$2"
}
seed 000 one
seed 007 two-hostile
make -o cluster_size=512,refcount_bits=2
put "write -P 1 3k 6k"
qemu-img snapshot -c one "$image"
put "write -z 4k 1k"
qemu-img snapshot -c two "$image"
seed 003 narrow
for type in zlib zstd; do
    make -o "cluster_size=1k,compression_type=$type"
    put "write -c -P 1 0 1k" "write -c -P 2 1k 1k" "write -c -P 3 12k 1k"
    keep "compressed-$type"
done
make -o cluster_size=512
keep empty
size=8k
make -o cluster_size=512,preallocation=metadata
keep preallocated
size=100k
qemu-img create -q -f raw base 200k
make -o cluster_size=512 -b base -F raw
put "write -P 1 1k 600"
keep overlay 000 002 006
qemu-img bitmap --add -f qcow2 "$image" b
cp "$image" "$out/qcow2_header/bitmap"
# Bitmaps: with clusters of 512 bytes and 2 MiB of disk a fine one has several of them.
size=2M
make -o cluster_size=512
qemu-img bitmap --add -f qcow2 -g 512 "$image" fine
qemu-img bitmap --add -f qcow2 "$image" coarse
qemu-img bitmap --add -f qcow2 --disable "$image" off
put "write -P 1 0 512" "write -z 1M 100k"
for how in 000 001 002; do
    {
        printf "\\$how\\010"
        printf '\016\000\007\000\010\000'
        printf '\004\002\000\000\000\000'
        printf '\001\002\000\000\000\000'
        printf '\010\000\000\001\000\000'
        printf '\014\000\000\000\000\000'
        printf '\003\001\000\000\000\000'
        printf '\005\003\000\000\014\000'
        printf '\000\000\000\000\000\000'
        cat "$image"
    } > "$out/qcow2_bitmaps/bitmaps-$how"
done
size=100k
make -o extended_l2=on,cluster_size=16k
head -c 16384 "$image" > "$out/qcow2_header/extended-l2"
# Headers of LUKS with the key they open with (fuzz/src/lib.rs), and the old AES.
for opts in aes-128,cipher-mode=cbc,ivgen-alg=essiv aes-256,cipher-mode=xts cast5-128,cipher-mode=cbc; do
    qemu-img create -q -f luks --object "secret,id=s,data=open sesame" \
        -o "key-secret=s,iter-time=10,hash-alg=sha1,cipher-alg=$opts" "$image" 2k
    head -c 592 "$image" > "$out/luks_header/${opts%%,*}"
done
make -o cluster_size=512
put "write -P 1 3000 2000"
patch 32 '\000\000\000\001'
keep aes 010 013
# What a header may lie about: sizes, table places, features.
make -o cluster_size=512
put "write -P 1 0 4k"
patch 24 '\000\000\000\377\377\377\377\377'
keep huge
make -o cluster_size=512
put "write -P 1 0 4k"
patch 48 '\000\000\000\000\000\000\000\000'
keep table-at-0
make -o cluster_size=512
patch 72 '\000\000\000\000\000\000\000\003'
keep dirty-corrupt

# Disks, of each their beginning only, and what to open of them (fuzz/src/partition.rs).
mkdir -p "$out/partition_table"
disk() {
    name=$1 bytes=$2
    shift 2
    for how; do
        { printf "\\$(echo "$how" | sed 's/-/\\/g')"; head -c "$bytes" "$image"; } > "$out/partition_table/$name-$how"
    done
}
label() {
    sfdisk --quiet --no-reread --no-tell-kernel "$image"
}
rm -f "$image"; truncate -s 1M "$image"
label <<END
label: dos
start=2, size=3, type=83
start=8, size=4, type=c, bootable
END
disk mbr 2560 001-000-001 002-011-002 001-002-007 005-000-001
rm -f "$image"; truncate -s 1M "$image"
# Closer to each other than sfdisk puts them: entries by hand.
record() {
    patch "$(($1 * 512 + 510))" '\125\252'
    patch "$(($1 * 512 + 446))" "\\000\\000\\000\\000\\$2\\000\\000\\000\\$3\\000\\000\\000\\$4\\000\\000\\000"
    [ $# -lt 5 ] || patch "$(($1 * 512 + 462))" "\\000\\000\\000\\000\\$5\\000\\000\\000\\$6\\000\\000\\000\\$7\\000\\000\\000"
}
record 0 203 001 001 017 002 020
record 2 203 001 001 005 003 003
record 5 203 001 002 005 006 003
record 8 203 001 001
disk logical 4608 005-000-002 006-011-002 007-000-003 010-000-003 007-002-017
record 8 203 001 001 005 003 003
disk logical-loop 4608 010-000-003 006-000-003
rm -f "$image"; truncate -s 60k "$image"
sgdisk --clear --set-alignment=1 --new=1:34:40 --change-name=1:one --new=3:41:50 "$image" >/dev/null
disk gpt 1408 001-000-016 003-011-016 002-000-016 001-003-017 003-004-003
# A header alone, with an entry in the next sector, and the same at the end; sums are made there.
header() {
    patch "$(($1 * $2))" 'EFI PART\000\000\001\000\134\000\000\000'
    patch "$(($1 * $2 + 24))" "\\00$1\\000\\000\\000\\000\\000\\000\\000\\00$3"
    patch "$(($1 * $2 + 40))" '\003\000\000\000\000\000\000\000\003'
    patch "$(($1 * $2 + 72))" '\002\000\000\000\000\000\000\000\004\000\000\000\200'
    patch "$((2 * $2))" 'ABCDEFGHIJKLMNOPabcdefghijklmnop\003\000\000\000\000\000\000\000\003'
}
for sector in 512 4096; do
    rm -f "$image"; truncate -s "$((5 * sector))" "$image"
    record 0 356 001 004
    header 1 "$sector" 4
    # The disk's end is the input's end here, or some zeroes further.
    disk "gpt-$sector" "$((2 * sector + 128))" 001-004-003 001-014-004 002-004-003
    patch "$sector" '\000'
    header 4 "$sector" 1
    [ "$sector" = 512 ] || continue
    disk "gpt-backup-$sector" "$((5 * sector))" 001-004-000 001-015-000 001-000-000
done

# What a client says: its flags, options (a magic word, a number, a length, a payload), a request.
mkdir -p "$out/nbd_server_handshake" "$out/nbd_server_transmission"
hello='\000\000\000\003'
export_name="${hello}IHAVEOPT\000\000\000\001\000\000\000\001x"
option() {
    printf 'IHAVEOPT\\000\\000\\000\\0%o\\000\\000\\000\\0%o%s' "$1" "$2" "$3"
}
go=$(option 7 9 '\000\000\000\001x\000\001\000\003')
meta='\000\000\000\001x\000\000\000\001\000\000\000\017base:allocation'
structured=$(option 8 0 '')$(option 10 28 "$meta")
read='\045\140\225\023\000\000\000\000\000\000\000\000\000\000\000\001\000\000\000\000\000\000\000\000\000\000\002\000'
printf "$export_name$read" > "$out/nbd_server_handshake/export-name"
printf "$hello$(option 3 0 '')$(option 9 28 "$meta")$(option 2 0 '')" > "$out/nbd_server_handshake/list"
printf "$hello$(option 6 9 '\000\000\000\001x\000\001\000\001')$go$read" > "$out/nbd_server_handshake/go"
printf "$hello$structured$go$read" > "$out/nbd_server_handshake/structured"
printf "$hello$(option 11 0 '')$(option 10 28 "$meta")$go" > "$out/nbd_server_handshake/extended"
# Simple, structured, extended; read, write, flush, trim, cache, zero, block status, goodbye.
for mode in 000 001 002; do
    {
        printf "\\$mode"
        printf '\001\001\000\000\020\000\000\002\007'
        printf '\000\000\000\000\020\000\000\002\000'
        printf '\003\000\000\000\000\000\000\000\000'
        printf '\004\000\000\000\020\000\000\002\000'
        printf '\005\000\000\000\020\000\000\002\000'
        printf '\006\002\003\000\000\000\000\020\000'
        printf '\007\010\000\000\000\002\000\000\000'
        printf '\007\040\000\000\000\000\020\000\100'
        printf '\002\000\000\000\000\000\000\000\000'
    } > "$out/nbd_server_transmission/mode-$mode"
done
