/* Feeds random inputs to LLVMFuzzerTestOneInput, for compilers without libFuzzer. usage: fuzz_abi ITERATIONS [SEED] */
#include "support.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv) {
    long n_iterations = argc > 1 ? atol(argv[1]) : 10000;
    rng r = {argc > 2 ? strtoull(argv[2], NULL, 10) | 1 : 1};
    uint8_t data[96];
    for (long i = 0; i < n_iterations; i++) {
        size_t size = rng_between(&r, 0, sizeof data);
        for (size_t byte = 0; byte < size; byte++) data[byte] = (uint8_t)(rng_next(&r) >> 56);
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("fuzz_abi: %ld inputs\n", n_iterations);
    return 0;
}
