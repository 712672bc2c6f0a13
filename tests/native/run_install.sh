#!/usr/bin/env bash
# Builds libksort, installs it, moves the prefix, and builds native/examples/attend.c against it from outside the tree:
# through pkg-config and through find_package, with gcc and clang where they are present, with and without
# AddressSanitizer. Needs cmake and pkg-config. usage: run_install.sh [BUILD_FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
native=$here/../../native
for tool in cmake pkg-config; do
    command -v $tool >/dev/null || { echo "run_install.sh: $tool is missing: install cmake and pkg-config" >&2; exit 1; }
done
build=${1:-$(mktemp -d)}
mkdir -p "$build"

quietly() { "$@" >"$build/log" 2>&1 || { cat "$build/log" >&2; echo "run_install.sh: failed: $*" >&2; exit 1; }; }

quietly cmake -S "$native" -B "$build/library" -DKSORT_CUDA=OFF
quietly cmake --build "$build/library" --parallel 2
quietly cmake --install "$build/library" --prefix "$build/first"
rm -rf "$build/prefix"
mv "$build/first" "$build/prefix" # what was installed must not know where
prefix=$build/prefix
[ ! -e "$prefix/lib/libksort_run.so" ] && [ ! -e "$prefix/include/ksort_run.h" ] ||
    { echo "run_install.sh: the private libksort_run was installed" >&2; exit 1; }

project=$build/project
mkdir -p "$project"
cp "$native/examples/attend.c" "$project/"
cat >"$project/CMakeLists.txt" <<'PROJECT'
cmake_minimum_required(VERSION 3.18)
project(attend C)
find_package(ksort REQUIRED)
add_executable(attend attend.c)
target_link_libraries(attend PRIVATE ksort::ksort)
PROJECT

export PKG_CONFIG_PATH=$prefix/lib/pkgconfig
for compiler in gcc clang; do
    command -v $compiler >/dev/null || { echo "run_install.sh: $compiler is not here, skipped"; continue; }
    for sanitizer in "" -fsanitize=address; do
        # shellcheck disable=SC2046 # flags are words
        quietly $compiler -std=c11 -Wall -Wextra -Werror $sanitizer "$project/attend.c" -o "$build/attend" \
            $(pkg-config --cflags --libs ksort) -Wl,-rpath,"$prefix/lib"
        "$build/attend"
        rm -rf "$build/out"
        quietly cmake -S "$project" -B "$build/out" -DCMAKE_C_COMPILER=$compiler -DCMAKE_C_FLAGS="$sanitizer" \
            -DCMAKE_PREFIX_PATH="$prefix"
        quietly cmake --build "$build/out"
        "$build/out/attend"
    done
done
[ "$(pkg-config --modversion ksort)" = "$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$here/../../ksort_gguf/__init__.py")" ] ||
    { echo "run_install.sh: ksort.pc has another version than the package" >&2; exit 1; }
echo "run_install.sh: passed"
