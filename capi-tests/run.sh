#!/bin/bash
# run.sh STAGE OUT [PROGRAM...]: compile each program of this directory against the staged install by
# pkg-config, in each variant, and run it. One line for each program and variant; fails if any does.
#
#   c-shared     C99, gcc, shared library          cxx-shared  C++11, g++, shared library
#   c-static     C11, clang, static archive        cxx-static  C++17, clang++, static archive
#   valgrind     c-shared under memcheck           asan        C, gcc, ASan and UBSan, shared
#   asan-static  C++, clang++, ASan and UBSan, static archive
#   static-exe   C, gcc -static (programs that say "RUN: static-exe" in their first line)
#
# "RUN: plugin" programs load what is built from plugins/, frozen/ and examples/ (QBLK_TEST_PLUGINS is where).
# "RUN: dlopen" programs are not linked with the library; "RUN: panic" programs are linked with one
# that was built for them, with a function more, which the product must not have. In "RUN: fork"
# programs nobody looks for leaks: a child has the memory of threads that it does not have. In "RUN: tls"
# programs valgrind looks at addresses and leaks only: what ring's assembler computes it takes for
# uninitialised.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
stage=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2
jobs=${JOBS:-$(nproc)}
limit=${QBLK_TEST_TIMEOUT:-600}

export PKG_CONFIG_SYSROOT_DIR=$stage PKG_CONFIG_LIBDIR=$stage/usr/lib/pkgconfig
cflags=$(pkg-config --cflags qblk)
libs=$(pkg-config --libs qblk)
private=$(pkg-config --static --libs qblk | tr ' ' '\n' | grep -v -e '^-L' -e '^-lqblk$' | tr '\n' ' ')
QBLK_TEST_VERSION=$(pkg-config --modversion qblk)
export QBLK_TEST_VERSION
warn="-Wall -Wextra -Wpedantic -Werror -pthread -g"
static_libs="-L$stage/usr/lib -Wl,-Bstatic -lqblk -Wl,-Bdynamic $private"
# The sanitizers must not end what a program looks for itself.
sane="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1"

programs=("$@")
if [ ${#programs[@]} -eq 0 ]; then
    for file in "$here"/*.c; do programs+=("$(basename "$file" .c)"); done
fi

# The plugins of plugins/, by the compilers of the variants: all that the tests load.
plugins() {
    local kind source flags
    for kind in gcc clang g++ clang++; do
        mkdir -p "$out/plugins/$kind"
        for source in "$here"/plugins/*.c "$here"/frozen/*.c "$here"/../examples/plugin-*.c; do
            case $kind in
                *++) flags="-std=c++11 -x c++" ;;
                *) flags=-std=c99 ;;
            esac
            $kind $flags $warn -O1 -shared -fPIC -fvisibility=hidden $cflags -o "$out/plugins/$kind/$(basename "$source" .c).so" \
                "$source" -x none $libs || { echo "capi-tests: $source: does not compile with $kind"; exit 1; }
        done
    done
}

# The library with the function that panics: a debug build, quick to make.
panic_lib() {
    [ -n "${panic:-}" ] && return
    panic=$out/panic-lib
    mkdir -p "$panic"
    (cd "$here/.." && "${CARGO:-cargo}" rustc --quiet --lib --crate-type cdylib --features test-panic)
    cp "${CARGO_TARGET_DIR:-$here/../target}/debug/libqblk.so" "$panic/libqblk.so.1"
    ln -sf libqblk.so.1 "$panic/libqblk.so"
}

# name variant: compile, run, one line.
one() {
    local name=$1 variant=$2 log=$out/$1.$2.log bin=$out/$1.$2 source=$here/$1.c
    local kind=link link_shared=$libs path=$stage/usr/lib started=$SECONDS
    local tmp rdynamic=
    case $(head -n 4 "$source") in
        *"RUN: dlopen"*) kind=dlopen link_shared="-ldl" ;;
        *"RUN: panic"*) kind=panic path=$out/panic-lib link_shared="-L$path -lqblk" ;;
        # Where the library is in the program, plugins find it there.
        *"RUN: plugin"*) rdynamic=-rdynamic ;;
    esac
    tmp=$(mktemp -d "${TMPDIR:-/tmp}/qblk-run-XXXXXX")
    local run=("$bin") leaks=1
    case $(head -n 4 "$source") in *"RUN: fork"*) leaks=0 ;; esac
    unset QBLK_TEST_QUICK
    export QBLK_TEST_PLUGINS=$out/plugins/gcc QBLK_TEST_FROZEN=$here/frozen
    case $variant in
        c-static) QBLK_TEST_PLUGINS=$out/plugins/clang ;;
        cxx-shared) QBLK_TEST_PLUGINS=$out/plugins/g++ ;;
        cxx-static | asan-static) QBLK_TEST_PLUGINS=$out/plugins/clang++ ;;
    esac
    : > "$log"
    compile() { "$@" >> "$log" 2>&1 || { echo "FAIL $name $variant: does not compile"; cat "$log"; rm -rf "$tmp"; exit 1; }; }
    case $variant in
        c-shared) compile gcc -std=c99 $warn $cflags -o "$bin" "$source" $link_shared ;;
        c-static) compile clang -std=c11 $warn $cflags -o "$bin" "$source" $rdynamic $static_libs ;;
        cxx-shared) compile g++ -std=c++11 $warn $cflags -x c++ "$source" -x none -o "$bin" $link_shared ;;
        cxx-static) compile clang++ -std=c++17 $warn $cflags -x c++ "$source" -x none -o "$bin" $rdynamic $static_libs ;;
        static-exe) compile gcc -static -std=c17 $warn $cflags -o "$bin" "$source" -L"$stage/usr/lib" -lqblk $private ;;
        asan) compile gcc -std=gnu17 $sane $warn $cflags -o "$bin" "$source" $link_shared; export QBLK_TEST_QUICK=1 ;;
        asan-static) compile clang++ -std=c++20 $sane $warn $cflags -x c++ "$source" -x none -o "$bin" $rdynamic $static_libs; export QBLK_TEST_QUICK=1 ;;
        valgrind)
            compile gcc -std=c99 $warn $cflags -o "$bin" "$source" $link_shared
            export QBLK_TEST_QUICK=1
            run=(valgrind -q --error-exitcode=99)
            case $(head -n 4 "$source") in *"RUN: tls"*) run+=(--undef-value-errors=no) ;; esac
            [ $leaks = 0 ] || run+=(--leak-check=full --errors-for-leak-kinds=definite,indirect)
            run+=("$bin") ;;
    esac
    local status=0
    TMPDIR=$tmp LD_LIBRARY_PATH=$path ASAN_OPTIONS=handle_sigbus=0:detect_leaks=$leaks \
        timeout --signal=ABRT "$limit" "${run[@]}" >> "$log" 2>&1 || status=$?
    rm -rf "$tmp"
    if [ $status -ne 0 ]; then
        echo "FAIL $name $variant: exit status $status"
        tail -n 30 "$log" | sed 's/^/    /'
        exit 1
    fi
    rm -f "$bin" "$log"
    echo "ok   $name $variant ($((SECONDS - started)) s)"
}

if [ "${QBLK_TEST_ONE:-}" ]; then
    one "${programs[0]}" "$QBLK_TEST_ONE"
    exit 0
fi

list=$out/list
: > "$list"
rm -rf "$out/plugins"
for name in "${programs[@]}"; do
    head=$(head -n 4 "$here/$name.c")
    variants="c-shared cxx-shared asan valgrind"
    case $head in
        *"RUN: dlopen"*) ;;
        *"RUN: panic"*) panic_lib ;;
        *"RUN: plugin"*) [ -d "$out/plugins" ] || plugins; variants+=" c-static cxx-static asan-static" ;;
        *"RUN: static-exe"*) variants+=" c-static cxx-static asan-static static-exe" ;;
        *) variants+=" c-static cxx-static asan-static" ;;
    esac
    for variant in $variants; do
        case " ${VARIANTS:-$variants} " in *" $variant "*) echo "$name $variant" >> "$list" ;; esac
    done
done
total=$(wc -l < "$list")
xargs -P "$jobs" -L 1 env bash -c 'QBLK_TEST_ONE=$4 exec bash "$1" "$2" "$3" "$5"' \
    run "$here/run.sh" "$stage" "$out" 2>&1 < <(awk '{ print $2, $1 }' "$list") | tee "$out/results" || true
passed=$(grep -c '^ok ' "$out/results" || true)
failed=$((total - passed))
echo "capi-tests: $passed of $total passed"
[ "$failed" -eq 0 ]
