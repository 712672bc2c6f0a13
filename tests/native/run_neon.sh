#!/usr/bin/env bash
# Cross-builds library and C tests for AArch64 and runs them under user-mode emulation, at level neon and on an emulated
# CPU that lacks the dot product. Needs, on Debian: gcc-aarch64-linux-gnu, qemu-user, cmake.
# usage: run_neon.sh [BUILD_FOLDER] [ITERATIONS]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
for tool in aarch64-linux-gnu-gcc qemu-aarch64 cmake; do
    command -v $tool >/dev/null ||
        { echo "run_neon.sh: $tool is missing: install gcc-aarch64-linux-gnu, qemu-user and cmake" >&2; exit 1; }
done
build=${1:-$(mktemp -d)}
iterations=${2:-300}

mkdir -p "$build"
{ cmake -S "$here" -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc && cmake --build "$build" --parallel 2; } >"$build/build.log" 2>&1 ||
    { cat "$build/build.log" >&2; exit 1; }

run() { qemu-aarch64 -L /usr/aarch64-linux-gnu "$@"; } # where Debian puts the C library of gcc-aarch64-linux-gnu
run "$build/levels" "$iterations"
KSORT_KERNELS=neon run "$build/guard_pages" "$iterations"
KSORT_KERNELS=neon run "$build/fuzz_abi" $((iterations * 50))
KSORT_KERNELS=neon run "$build/attend_example"
run "$build/pool_race" "$iterations"
run "$build/struct_sizes"

chosen=$(run -cpu cortex-a72 "$build/attend_example") # ARMv8.0: SDOT would end the program
[ "${chosen%% *}" = scalar ] || { echo "run_neon.sh: a CPU without dot product was given: $chosen" >&2; exit 1; }
echo "run_neon.sh: passed"
