#!/bin/sh
# Install what the tests need and this machine lacks, from Debian's packages.
set -eu
missing=
need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need gcc gcc
need g++ g++
need clang clang
need clang++ clang
need ld binutils
need pkg-config pkg-config
need valgrind valgrind
need qemu-img qemu-utils
need qemu-io qemu-utils
need setpriv util-linux
need unshare util-linux
need mount mount
need qemu-storage-daemon qemu-utils
need mandoc mandoc
need nbdinfo libnbd-bin
need nbdcopy libnbd-bin
need nbdkit nbdkit
need fio fio
need openssl openssl
need cryptsetup cryptsetup-bin
need ip iproute2
need mkfs.ext4 e2fsprogs
need sfdisk fdisk
need sgdisk gdisk
need nbdsh python3-libnbd
# Debian's own, which has Debian's modules, whatever python3 comes first in PATH.
/usr/bin/python3 -c 'import nbd' >/dev/null 2>&1 || missing="$missing python3-libnbd"
if [ -z "$missing" ]; then
    echo "check: everything that the tests need is there"
    exit 0
fi
missing=$(printf '%s\n' $missing | sort -u | tr '\n' ' ')
echo "check: installing what the tests need: $missing"
if [ "$(id -u)" = 0 ]; then
    as_root=
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "This needs root. Run: sudo apt-get install $missing" >&2
    exit 1
fi
command -v apt-get >/dev/null 2>&1 || {
    echo "No apt-get here. Install by other means: $missing" >&2
    exit 1
}
$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q update >/dev/null ||
    echo "apt-get update failed; trying with the lists that are there" >&2
$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends $missing >/dev/null || {
    echo "apt-get failed. Run yourself: apt-get install $missing" >&2
    exit 1
}
