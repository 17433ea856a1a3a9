#!/bin/sh
# cbindgen.sh VERSION ARGUMENTS...: run cbindgen of exactly that version, installing it if need be:
# another version may write the same header differently.
set -eu
version=$1
shift
has() { [ "$("$1" --version 2>/dev/null)" = "cbindgen $version" ]; }
tool=${CBINDGEN:-cbindgen}
if ! has "$tool"; then
    root=$(pwd)/build/cbindgen
    tool=$root/bin/cbindgen
    if ! has "$tool"; then
        echo "cbindgen $version is missing; installing it to build/cbindgen" >&2
        "${CARGO:-cargo}" install --quiet --locked --version "$version" --root "$root" cbindgen || {
            echo "could not; install it with: cargo install --locked --version $version cbindgen" >&2
            exit 1
        }
    fi
fi
exec "$tool" "$@"
