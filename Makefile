# libqblk: build, try, test, install.
#
#   make demo             build, then run a C program that uses a disk image through the library
#   make check            all tests; installs what they need that is missing
#   make                  the library (build/) and the tool qblk
#   make install          to PREFIX (/usr/local), below DESTDIR; LIBDIR, INCLUDEDIR, BINDIR, MANDIR,
#                         PLUGINDIR (LIBDIR/qblk)
#   make uninstall        the same paths
#   make header           write include/qblk.h anew from src/capi/
#   make bench            measure, beside the peers
#   make lint             format, clippy, rustdoc
#   make fuzz SECONDS=60  each fuzz target for so long
#   make clean

PREFIX     ?= /usr/local
LIBDIR     ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
BINDIR     ?= $(PREFIX)/bin
MANDIR     ?= $(PREFIX)/share/man
DESTDIR    ?=
CC         ?= cc
CARGO      ?= cargo
CBINDGEN   ?= cbindgen
INSTALL    ?= install
OBJCOPY    ?= objcopy
SECONDS    ?= 60

CBINDGEN_VERSION := 0.29.4
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SONAME  := libqblk.so.1
REAL    := $(SONAME).$(VERSION)
OUT     := $(abspath build)
STAGE   := $(OUT)/stage
# Where cargo builds; the caller's choice is kept.
CARGO_TARGET_DIR ?= $(abspath target)
export CARGO_TARGET_DIR
A       := $(CARGO_TARGET_DIR)/release/libqblk.a
TOOL    := $(CARGO_TARGET_DIR)/release/qblk

# What rustc --print native-static-libs says; capi-tests/native-libs.sh checks it.
NATIVE_LIBS := -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc
# The C driver adds libgcc_s or libgcc_eh itself; naming -lgcc_s here breaks `cc -static`.
LIBS_PRIVATE := -lutil -lrt -lpthread -ldl -lm

# The lock manager that ships.
LEASE   := libqblk-lockmgr-lease.so
PLUGINDIR ?= $(LIBDIR)/qblk

SOURCES := $(shell find src -name '*.rs') Cargo.toml $(wildcard Cargo.lock) build.rs
TOOL_SOURCES := $(shell find tools -name '*.rs' -o -name Cargo.toml)
CAPI := $(wildcard src/capi/*.rs)
MAN1 := $(wildcard docs/*.1)
MAN3 := $(wildcard docs/*.3)

.PHONY: all lib tool lockmgr demo check check-deps check-rust check-capi check-header header bench lint fuzz \
        stage install uninstall clean
.DELETE_ON_ERROR:

all: lib tool lockmgr
lib: $(OUT)/$(REAL) $(OUT)/libqblk.a
tool: $(TOOL)
lockmgr: $(OUT)/$(LEASE)

# In recipes and not as prerequisites: `sudo make install` needs none of them once all is built.
NEED_CARGO = @command -v $(CARGO) >/dev/null || { echo "Rust is missing: install it with rustup, or as root: apt-get install cargo (1.88 or later)."; exit 1; }
NEED_CC = @command -v $(CC) >/dev/null || { echo "A C compiler is missing. As root: apt-get install gcc"; exit 1; }
NEED_PKG_CONFIG = @command -v pkg-config >/dev/null || { echo "pkg-config is missing. As root: apt-get install pkg-config"; exit 1; }

# The archive by itself: in one run with the rlib cargo leaves LTO out.
$(A): $(SOURCES)
	$(NEED_CARGO)
	$(NEED_CC)
	$(CARGO) rustc --release --lib --crate-type staticlib
	@touch $@

$(TOOL): $(SOURCES) $(TOOL_SOURCES)
	$(NEED_CARGO)
	$(NEED_CC)
	$(CARGO) build --release -p qblk-tool
	@touch $@

# All of it as one object with the qblk_* names alone left global: the constructor cannot be left
# out of a static link, two Rust archives can meet in one program, and neither ar nor nm meets
# LLVM bitcode that is newer than their plugin.
$(OUT)/qblk.o: $(A)
	@mkdir -p $(OUT)
	$(LD) -r -o $@ --force-group-allocation --whole-archive $(A) --no-whole-archive
	$(OBJCOPY) -w --keep-global-symbol='qblk_[!_]*' -R .llvmbc -R .llvmcmd $@

$(OUT)/libqblk.a: $(OUT)/qblk.o
	rm -f $@
	$(AR) rcs $@ $<

# Linked by the C driver, for rustc gives the linker an anonymous version script that no other can
# be combined with. nodelete: the library has threads, so a dlclose must not unmap it.
$(OUT)/$(REAL): $(OUT)/qblk.o qblk.map
	$(CC) -shared -o $@ $< -Wl,-soname,$(SONAME) -Wl,--version-script=qblk.map -Wl,--no-undefined-version \
	    -Wl,--gc-sections -Wl,--as-needed -Wl,-z,relro,-z,now,-z,noexecstack,-z,defs,-z,nodelete \
	    -Wl,-O1 -Wl,--build-id=sha1 $(LDFLAGS) $(NATIVE_LIBS)
	ln -sf $(REAL) $(OUT)/$(SONAME)
	ln -sf $(SONAME) $(OUT)/libqblk.so

$(OUT)/$(LEASE): $(wildcard lockmgr-lease/*.[ch]) include/qblk-lockmgr.h
	$(NEED_CC)
	@mkdir -p $(OUT)
	$(CC) -std=c11 -O2 -Wall -Wextra -Wpedantic -Werror -shared -fPIC -fvisibility=hidden $(CFLAGS) \
	    -o $@ $(filter %.c,$^) -Wl,-z,relro,-z,now,-z,noexecstack,-z,defs $(LDFLAGS)

# Installs the pinned version where it is missing.
CBINDGEN_RUN := CBINDGEN='$(CBINDGEN)' CARGO='$(CARGO)' sh capi-tests/cbindgen.sh $(CBINDGEN_VERSION)
header:
	$(CBINDGEN_RUN) -q --config cbindgen.toml --output include/qblk.h src/capi/mod.rs
check-header:
	$(CBINDGEN_RUN) -q --config cbindgen.toml --verify --output include/qblk.h src/capi/mod.rs

# An install to try and to test with; the real one is the same with other paths.
stage: all
	@rm -rf $(STAGE)
	@$(MAKE) --no-print-directory install DESTDIR=$(STAGE) PREFIX=/usr LIBDIR=/usr/lib INCLUDEDIR=/usr/include \
	    BINDIR=/usr/bin MANDIR=/usr/share/man >$(OUT)/stage.log || { cat $(OUT)/stage.log; exit 1; }

STAGE_ENV := PKG_CONFIG_SYSROOT_DIR=$(STAGE) PKG_CONFIG_LIBDIR=$(STAGE)/usr/lib/pkgconfig

demo: stage
	$(NEED_PKG_CONFIG)
	$(CC) -Wall -Wextra -o $(OUT)/demo examples/demo.c $$($(STAGE_ENV) pkg-config --cflags --libs qblk)
	@echo
	@LD_LIBRARY_PATH=$(STAGE)/usr/lib $(OUT)/demo

check: check-deps check-rust check-capi
	@echo "make check: all passed"

check-deps:
	sh capi-tests/install-deps.sh

check-rust:
	$(NEED_CARGO)
	$(CARGO) test --locked -p qblk -p qblk-tool -p qblk-fuzz

check-capi: check-header stage
	sh capi-tests/header-check.sh $(STAGE)/usr/include
	sh capi-tests/exports.sh $(OUT)/$(REAL) $(OUT)/libqblk.a qblk.map include/qblk.h
	sh capi-tests/native-libs.sh "$(NATIVE_LIBS)" "$(LIBS_PRIVATE)"
	for program in examples/*.c; do \
	    case $$program in */lockmgr-* | */plugin-*) kind='-shared -fPIC' ;; *) kind= ;; esac; \
	    $(CC) -Wall -Wextra -Werror $$kind -o $(OUT)/example $$program $$($(STAGE_ENV) pkg-config --cflags --libs qblk) || exit 1; \
	done; rm -f $(OUT)/example
	bash capi-tests/run.sh $(STAGE) $(OUT)/capi-tests

bench:
	$(NEED_CARGO)
	$(CARGO) run --locked --release -p qblk-bench -- $(BENCH_ARGS)

lint:
	$(NEED_CARGO)
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

fuzz:
	$(NEED_CARGO)
	sh fuzz/run.sh $(SECONDS)

# The .pc file is written here and not in `all`: only now are the paths known.
install: all
	$(INSTALL) -d $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(INCLUDEDIR) $(DESTDIR)$(BINDIR) \
	    $(DESTDIR)$(MANDIR)/man1 $(DESTDIR)$(MANDIR)/man3 $(DESTDIR)$(PLUGINDIR)
	$(INSTALL) -m 644 include/qblk.h include/qblk-lockmgr.h include/qblk-plugin.h $(DESTDIR)$(INCLUDEDIR)/
	$(INSTALL) -m 755 $(OUT)/$(LEASE) $(DESTDIR)$(PLUGINDIR)/
	$(INSTALL) -m 755 $(OUT)/$(REAL) $(DESTDIR)$(LIBDIR)/
	ln -sf $(REAL) $(DESTDIR)$(LIBDIR)/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(LIBDIR)/libqblk.so
	$(INSTALL) -m 644 $(OUT)/libqblk.a $(DESTDIR)$(LIBDIR)/
	$(INSTALL) -m 755 $(TOOL) $(DESTDIR)$(BINDIR)/
	sed -e 's|@prefix@|$(PREFIX)|; s|@libdir@|$(LIBDIR)|; s|@includedir@|$(INCLUDEDIR)|' \
	    -e 's|@version@|$(VERSION)|; s|@libs_private@|$(LIBS_PRIVATE)|' pkgconfig/qblk.pc.in \
	    > $(DESTDIR)$(LIBDIR)/pkgconfig/qblk.pc
	for page in $(MAN1); do $(INSTALL) -m 644 $$page $(DESTDIR)$(MANDIR)/man1/ || exit 1; done
	for page in $(MAN3); do $(INSTALL) -m 644 $$page $(DESTDIR)$(MANDIR)/man3/ || exit 1; done

uninstall:
	rm -f $(DESTDIR)$(INCLUDEDIR)/qblk.h $(DESTDIR)$(LIBDIR)/pkgconfig/qblk.pc $(DESTDIR)$(BINDIR)/qblk \
	    $(DESTDIR)$(LIBDIR)/$(REAL) $(DESTDIR)$(LIBDIR)/$(SONAME) $(DESTDIR)$(LIBDIR)/libqblk.so \
	    $(DESTDIR)$(LIBDIR)/libqblk.a $(DESTDIR)$(INCLUDEDIR)/qblk-lockmgr.h $(DESTDIR)$(INCLUDEDIR)/qblk-plugin.h $(DESTDIR)$(PLUGINDIR)/$(LEASE)
	-rmdir $(DESTDIR)$(PLUGINDIR) 2>/dev/null
	for page in $(notdir $(MAN1)); do rm -f $(DESTDIR)$(MANDIR)/man1/$$page; done
	for page in $(notdir $(MAN3)); do rm -f $(DESTDIR)$(MANDIR)/man3/$$page; done

clean:
	rm -rf $(OUT)
	$(CARGO) clean
