#!/usr/bin/env bash
# Builds library and C tests with AddressSanitizer + UBSan and runs them at every kernel level that this CPU supports;
# then with ThreadSanitizer, for the pool. usage: run_sanitized.sh [BUILD_FOLDER] [ITERATIONS]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=${1:-$(mktemp -d)}
iterations=${2:-300}

compile() { # FOLDER SANITIZERS TARGET; -O0, in a build type of its own: with -O1 gcc takes minutes for the kernels
    cmake -S "$here" -B "$1" -DKSORT_SANITIZE="$2" -DCMAKE_BUILD_TYPE=Sanitize -DCMAKE_C_FLAGS=-O0 >"$1.log" 2>&1 &&
        cmake --build "$1" --parallel 2 --target "$3" >>"$1.log" 2>&1 || { cat "$1.log" >&2; exit 1; }
}

mkdir -p "$build"
compile "$build/address" "address;undefined" all
compile "$build/thread" thread pool_race & # while the programs run, each on one core
building=$!
"$build/address/struct_sizes"
status=0
"$build/address/levels" "$iterations" || status=$?
[ "$status" = 0 ] || [ "$status" = 77 ] || exit "$status" # 77: this CPU has no level but scalar
for level in scalar avx2 avx512bw avx512 neon; do
    status=0
    KSORT_KERNELS=$level "$build/address/guard_pages" "$iterations" || status=$?
    if [ "$status" = 77 ]; then continue; fi # this CPU does not run the level
    [ "$status" = 0 ] || exit "$status"
    KSORT_KERNELS=$level "$build/address/fuzz_abi" $((iterations * 50))
    KSORT_KERNELS=$level "$build/address/attend_example"
done

wait $building
"$build/thread/pool_race" "$iterations"
