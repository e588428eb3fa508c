// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as
// accullm_cli/quant/philox.py has it: the number of a weight is a function of its place, so every device draws the same.
#pragma once
#include <ptx.cuh>

// Uniform in [0, 1), a multiple of 2^-24: word row % 4 of counter (row / 4, column, stream, 0) under key `seed`.
__device__ __forceinline__ float uniform(u64 seed, u32 stream, u32 column, u32 row) {
    u32 counter[4] = {row / 4, column, stream, 0};
    u32 low = static_cast<u32>(seed), high = static_cast<u32>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 a = static_cast<u64>(0xD2511F53) * counter[0], b = static_cast<u64>(0xCD9E8D57) * counter[2];
        counter[0] = static_cast<u32>(b >> 32) ^ counter[1] ^ low;
        counter[1] = static_cast<u32>(b);
        counter[2] = static_cast<u32>(a >> 32) ^ counter[3] ^ high;
        counter[3] = static_cast<u32>(a);
        low += 0x9E3779B9;
        high += 0xBB67AE85;
    }
    const u32 which = row % 4;
    const u32 word = which == 0 ? counter[0] : which == 1 ? counter[1] : which == 2 ? counter[2] : counter[3];
    return static_cast<float>(word >> 8) * 0x1p-24f;
}
