#!/bin/sh
# header-check.sh INCLUDE: qblk.h and qblk-plugin.h, in both of its versions, compile alone, and twice,
# under every dialect, with both compilers, and nothing is warned of.
set -eu
include=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat > "$dir/h.c" <<'C'
#include <qblk.h>
#include <qblk.h>
#if QBLK_VERSION < 0 || QBLK_EINTERNAL > -4096
#error "the macros are no numbers for the preprocessor"
#endif
int use(qblk *dev);
int use(qblk *dev)
{
    struct qblk_info info;
    qblk_extent extent;
    struct iovec iov = { &extent, sizeof extent };
    int rc = qblk_get_info(dev, &info);
    if (rc == QBLK_ELOCKED || rc - QBLK_EPOLICY == 0)
        return QBLK_LOG_WARN;
    return qblk_preadv(dev, &iov, 1, UINT64_C(1) << 40, QBLK_OPEN_RDWR | QBLK_OPEN_DIRECT);
}
C
for version in 1 2; do
    cat > "$dir/p$version.c" <<C
#define QBLK_API_VERSION $version
#define QBLK_PLUGIN_FUNCTIONS
#include <qblk-plugin.h>
#include <qblk-plugin.h>
static qblk_plugin plugin;
void fail(int how);
void fail(int how)
{
    qblk_plugin_error("it failed: %d", how);
    qblk_plugin_debug("%s", QBLK_REGISTER_PLUGIN(&plugin, QBLK_PLUGIN_NO_HANDLE) < 0 ? "no" : "yes");
    plugin.thread_model = QBLK_THREAD_INSTANCE;
}
QBLK_PLUGIN_REGISTER(plugin)
C
done
for name in h p1 p2; do cp "$dir/$name.c" "$dir/$name.cpp"; done
strict="-Wall -Wextra -Wpedantic -Werror -Wundef -Wcast-qual -Wredundant-decls -Wshadow -Wconversion"
for name in h p1 p2; do
for std in c99 gnu99 c11 gnu11 c17 gnu17 c2x gnu2x; do
    gcc -std=$std $strict -Wstrict-prototypes -Wmissing-prototypes -Wc++-compat -I"$include" \
        -c -o "$dir/h.o" "$dir/$name.c"
    clang -std=$std -Weverything -Werror -Wno-padded -Wno-unsafe-buffer-usage -Wno-unknown-warning-option \
        -Wno-declaration-after-statement -I"$include" -c -o "$dir/h.o" "$dir/$name.c"
done
done
for name in h p1 p2; do
for std in c++11 c++14 c++17 c++20 c++2b; do
    g++ -std=$std $strict -Wold-style-cast -Wzero-as-null-pointer-constant -I"$include" \
        -c -o "$dir/h.o" "$dir/$name.cpp"
    clang++ -std=$std -Weverything -Werror -Wno-padded -Wno-c++98-compat -Wno-c++98-compat-pedantic \
        -Wno-unsafe-buffer-usage -Wno-unknown-warning-option -I"$include" -c -o "$dir/h.o" "$dir/$name.cpp"
done
done
echo "header: clean as C99 to C23 and C++11 to C++23, gcc and clang"
