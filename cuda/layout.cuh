// How a 4-bit weight with outlier features lies in the GPU's memory, and how 16-bit numbers are made of it.
//
// A weight W [N, K] is cut into tiles of 16 output features (a strip) by 64 input features:
//
//             K ->   tile 0      tile 1                     outlier steps
//     strip 0     +-----------+-----------+-- ... --+    +--------+--------+
//      N  |       | 512 bytes | 512 bytes |         |    | 512 B  | 512 B  |
//      v          +-----------+-----------+-- ... --+    +--------+--------+
//     strip 1     |           |           |         |    |        |        |
//                    16 x 64 codes of 4 bits              16 x 16 numbers of 16 bits
//
// A tile is 32 x 16 bytes: lane `4 row + t` of a warp owns bytes 16 lane to 16 lane + 15, so that a warp reads 512
// consecutive bytes. Of its tile a lane owns input features 16t to 16t+15 of two output features, `row` and `row + 8`:
//
//     features of the tile    0 ........ 15  16 ....... 31  32 ....... 47  48 ....... 63
//     output row                 lane t=0       lane t=1       lane t=2       lane t=3
//     output row + 8             the same       the same       the same       the same
//
// As a product does not ask in which order its terms are summed, nothing says that the tensor core's column 2t has to
// be input feature 2t. Here its columns 2t, 2t+1, 2t+8, 2t+9 of step s are features 16t + 4s + 0..3. So
//   - the activations of a lane for all four steps are 32 consecutive bytes,
//   - all 32 weights of a lane lie in two groups (one per row) as long as 16 divides the group size.
//
// Word s of a lane's four holds step s, its nibbles in the order in which they become registers a[0] to a[3] of
// `multiply_accumulate`; j is the feature 16t + 4s + j:
//
//     bits      28..31    24..27    20..23    16..19    12..15    8..11     4..7      0..3
//     row       row+8     row       row+8     row       row+8     row       row+8     row
//     feature   j=3       j=3       j=1       j=1       j=2       j=2       j=0       j=0
//     register  a[3]      a[2]      a[1]      a[0]      a[3]      a[2]      a[1]      a[0]
//               (the upper half of each register)       (the lower half of each register)
//
// In a build with LEVELS j = 1 and j = 2 change places (byte j is feature j), so that each half of the word is all of two
// registers. Code 0 is the level 0; 1 to 7 are the levels below it and 8 to 15 those above it, the next ones first.
//
// Scales are float16 and lie as [strip][group][row 0..7][row, row + 8]; zero points as a byte [strip][group][row 0..7],
// that of `row` in the low nibble and that of `row + 8` in the high one.
//
// An outlier step is 16 outlier features; the lane's 16 bytes are a[0] to a[3] themselves, with slots 4t + j in place
// of features 16t + 4s + j. Unused slots hold zeros and have index -1.
//
// Padding: rows at or above N have code, zero point and scale 0, as have groups that begin at or above K. A feature at
// or above K in the last group has code 0, and its activation counts as 0, so it adds exactly 0 too.
#pragma once
#include <ptx.cuh>

constexpr int STRIP = 16;        // output features of a tile: rows of the tensor core's first operand
constexpr int TILE_K = 64;       // input features of a tile: what makes 16 bytes per lane
constexpr int STEP_K = 16;       // input features that the tensor core takes at once
constexpr int TILE_BYTES = 512;  // of a tile and of an outlier step
constexpr int LANES = 32;

// Everything that stands for one weight.
struct Weight {
    const u8* tiles;           // [strips, tiles_k, 512]
    const u32* scales;         // float16 pairs [strips, groups, 8]
    const u8* zeros;           // nibble pairs [strips, groups, 8]; null where symmetric
    const u8* outlier_tiles;   // [strips, outlier_steps, 512], in the compute format
    const int* outlier_index;  // [outlier_steps * 16], -1 where unused
    int out_features;          // N
    int in_features;           // K
    int tiles_k;               // ceil(K / 64)
    int groups;                // per strip, those of padding included
    int group_shift;           // a group is 2**group_shift features, at least 16; 31: one group per row
    int symmetric_zero;        // the zero point where `zeros` is null
    int outlier_steps;
    u32 levels[4];             // with LEVELS: the magnitude of each code's level, a byte of at most 127
};

__device__ __forceinline__ int strips_of(const Weight& weight) { return (weight.out_features + STRIP - 1) / STRIP; }

__device__ __forceinline__ bool has_zeros(const Weight& weight) { return !LEVELS && weight.zeros != nullptr; }

// -- from nibbles to numbers ---------------------------------------------------------------------------------------
//
// The one meaning of scales: a weight is (code - zero) * scale, or level * scale, rounded once to the compute format; then
// the product is accumulated in float32. Scaling sums of codes instead gives other results, and no kernel here does it.
//
// A nibble becomes a number by sitting in the mantissa of a power of two (the way of FasterTransformer and Marlin):
//   float16   0x6400 | c      = 1024 + c        nibble in bits 0..3
//             0x6400 | c << 4 = 1024 + 16c      nibble in bits 4..7; times 1/16: 64 + c
//   bfloat16  0x4300 | c      = 128 + c         its mantissa has room for one position alone
// Subtracting the same power of two plus the zero point is exact, and so one rounding remains, that of the product.
// With bfloat16 the float16 scale does not fit into the compute format: it is taken apart into high + low, both exact
// in bfloat16 (8 and 3 significant bits). Then q * low is exact and fma(q, high, q * low) rounds q * scale once.
//
// Levels are looked up four at a time: `permute_bytes` takes half a word as it is, and gives the magnitudes of codes 0 to
// 7, and 0 for others, as no magnitude has its upper bit set. With the upper bits of all codes turned round it gives those
// of codes 8 to 15, and 0 for others. One subtraction, in which nothing is borrowed, makes bytes of 128 + level of them.
//   float16   0x6400 | byte = 1152 + level, and from there as above
//   bfloat16  holds neither that nor the level times `low`. In float32 0x47000000 | byte << 8 = 32896 + level, and
//             fma(that, scale, -32896 * scale) is level * scale: exact, as 32896 is 257 * 128. Two are rounded at once.

#if !LEVELS

// What a lane needs to know about its two rows' groups.
struct RowPair {
#if COMPUTE_BF16
    u32 zero_low, zero_high;    // -(128 + zero), twice each: of `row` and of `row + 8`
    u32 scale_low, scale_high;  // the high parts of the scales, twice each
    u32 rest_low, rest_high;    // the low parts
#else
    u32 zero_low, zero_high;    // 1024 + zero of `row`; -(64 + zero) of `row + 8`
    u32 scale_low, scale_high;  // twice each
#endif
};

// scales: the pair of `row` and `row + 8`. zeros: their nibbles, nothing above.
__device__ __forceinline__ RowPair row_pair(u32 scales, u32 zeros) {
    RowPair pair;
    const u32 zero_low = zeros & 15, zero_high = zeros >> 4;
#if COMPUTE_BF16
    pair.zero_low = zero_low * 0x00010001 + 0xC300C300;
    pair.zero_high = zero_high * 0x00010001 + 0xC300C300;
    const float low = float_from_half(scales & 0xFFFF), high = float_from_half(scales >> 16);
    const u32 low_bits = bfloat_from_float(low), high_bits = bfloat_from_float(high);
    pair.scale_low = low_bits * 0x00010001;
    pair.scale_high = high_bits * 0x00010001;
    pair.rest_low = (__float_as_uint(low - float_from_bfloat(low_bits)) >> 16) * 0x00010001;
    pair.rest_high = (__float_as_uint(high - float_from_bfloat(high_bits)) >> 16) * 0x00010001;
#else
    pair.zero_low = zero_low * 0x00010001 + 0x64006400;
    pair.zero_high = zero_high * 0x00100010 + 0xD400D400;  // one sixteenth is the last place of 64.0
    pair.scale_low = (scales & 0xFFFF) * 0x00010001;
    pair.scale_high = (scales >> 16) * 0x00010001;
#endif
    return pair;
}

// One word of a tile to the registers a[0] to a[3] of a step.
__device__ __forceinline__ void dequantize(u32 word, const RowPair& pair, const Weight&, u32 (&a)[4]) {
#if COMPUTE_BF16
    constexpr u32 ONE = 0x3F803F80, MINUS_ZERO = 0x80008000;  // adding -0 changes nothing, adding +0 changes -0
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bool upper = i & 1;  // of row + 8
        const u32 shifted = and_or<0x000F000F, 0x43004300>(word >> 4 * i);
        const u32 q = fma_bfloat2(shifted, ONE, upper ? pair.zero_high : pair.zero_low);
        const u32 rest = fma_bfloat2(q, upper ? pair.rest_high : pair.rest_low, MINUS_ZERO);
        a[i] = fma_bfloat2(q, upper ? pair.scale_high : pair.scale_low, rest);
    }
#else
    constexpr u32 SIXTEENTH = 0x2C002C00;
    const u32 next = word >> 8;
    a[0] = subtract_half2(and_or<0x000F000F, 0x64006400>(word), pair.zero_low);
    a[1] = fma_half2(and_or<0x00F000F0, 0x64006400>(word), SIXTEENTH, pair.zero_high);
    a[2] = subtract_half2(and_or<0x000F000F, 0x64006400>(next), pair.zero_low);
    a[3] = fma_half2(and_or<0x00F000F0, 0x64006400>(next), SIXTEENTH, pair.zero_high);
    a[0] = multiply_half2(a[0], pair.scale_low);
    a[1] = multiply_half2(a[1], pair.scale_high);
    a[2] = multiply_half2(a[2], pair.scale_low);
    a[3] = multiply_half2(a[3], pair.scale_high);
#endif
}

#else

struct RowPair {
#if COMPUTE_BF16
    float scale[2], rest[2];  // of `row` and of `row + 8`, and -32896 times that
#else
    u32 scale[2];  // twice each
#endif
};

// scales: the pair of `row` and `row + 8`. There are no zeros.
__device__ __forceinline__ RowPair row_pair(u32 scales, u32) {
    RowPair pair;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u16 own = static_cast<u16>(scales >> 16 * i);
#if COMPUTE_BF16
        pair.scale[i] = float_from_half(own);
        pair.rest[i] = -32896 * pair.scale[i];
#else
        pair.scale[i] = own * 0x00010001;
#endif
    }
    return pair;
}

// One word of a tile to the registers a[0] to a[3] of a step.
__device__ __forceinline__ void dequantize(u32 word, const RowPair& pair, const Weight& weight, u32 (&a)[4]) {
    const u32 turned = word ^ 0x88888888;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 below = permute_bytes(weight.levels[0], weight.levels[1], word >> 16 * half);
        const u32 above = permute_bytes(weight.levels[2], weight.levels[3], turned >> 16 * half);
        const u32 bytes = above - below + 0x80808080;
#pragma unroll
        for (int i = 0; i < 2; i++) {  // `row`, in bytes 0 and 2, and `row + 8`, in bytes 1 and 3
#if COMPUTE_BF16
            float weights[2];
#pragma unroll
            for (int element = 0; element < 2; element++) {
                const u32 number = permute_bytes(bytes, 0x47, 0x4505 + 0x10 * (2 * element + i));
                weights[element] = fmaf(__uint_as_float(number), pair.scale[i], pair.rest[i]);
            }
            a[2 * half + i] = bfloat2_from_floats(weights[0], weights[1]);
#else
            const u32 numbers = permute_bytes(bytes, 0x64, i ? 0x4341 : 0x4240);
            a[2 * half + i] = multiply_half2(subtract_half2(numbers, 0x64806480), pair.scale[i]);
#endif
        }
    }
}

#endif
