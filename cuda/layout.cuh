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
// consecutive bytes. Of its tile a lane owns input features 16t to 16t+15 of two output features, 2 row and 2 row + 1,
// which are rows `row` and `row + 8` of the tensor core's operand:
//
//     features of the tile    0 ........ 15  16 ....... 31  32 ....... 47  48 ....... 63
//     output 2 row               lane t=0       lane t=1       lane t=2       lane t=3
//     output 2 row + 1           the same       the same       the same       the same
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
// In a build for a trellis (LEVELS=2, below) a lane's words hold eight neighbouring features each, the first in the
// lowest nibble: word 0 features 16t to 16t+7 of output 2 row, word 1 the same of output 2 row + 1, 2 and 3 the rest.
// A code hangs on those of the two output features above it. So a lane reads the words of the lane above (lane - 4),
// too, which lie ABOVE_BYTES before its own; and the lanes of the first two output features, in place of them, those of
// the last two of the strip above: nothing is stored twice. Above the first strip of a segment there is nothing.
//
// Scales are float16 and lie as [strip][group][output feature 0..15]; zero points as a byte [strip][group][row 0..7],
// that of output 2 row in the low nibble and that of output 2 row + 1 in the high one.
//
// An outlier step is 16 outlier features; the lane's 16 bytes are a[0] to a[3] themselves, with slots 4t + j in place
// of features 16t + 4s + j. Unused slots hold zeros and have index -1.
//
// Padding: outputs at or above N have zero point and scale 0 (and code 0 but in a trellis), as have groups that begin at
// or above K. A feature at or above K in the last group has code 0, and its activation counts as 0: it adds 0, too.
#pragma once
#include <ptx.cuh>

constexpr int STRIP = 16;        // output features of a tile: rows of the tensor core's first operand
constexpr int TILE_K = 64;       // input features of a tile: what makes 16 bytes per lane
constexpr int STEP_K = 16;       // input features that the tensor core takes at once
constexpr int TILE_BYTES = 512;  // of a tile and of an outlier step
constexpr int LANES = 32;
constexpr bool TRELLIS = LEVELS == 2;
constexpr int SEGMENT_STRIPS = 16;   // of a chain: SEGMENT of quant/trellis.py
constexpr int ABOVE_BYTES = 4 * 16;  // of a tile: its last two output features

// Everything that stands for one weight.
struct Weight {
    const u8* tiles;           // [strips, tiles_k, 512]
    const u32* scales;         // float16 pairs [strips, groups, 8]
    const u8* zeros;           // nibble pairs [strips, groups, 8]; null where symmetric
    const u8* outlier_tiles;   // [strips, outlier_steps, 512], in the compute format
    const int* outlier_index;  // [outlier_steps * 16], -1 where unused
    u32 levels[4];             // with LEVELS: the magnitude of each code's level, a byte of at most 127
    int out_features;          // N
    int in_features;           // K
    int tiles_k;               // ceil(K / 64)
    int groups;                // per strip, those of padding included
    int group_shift;           // a group is 2**group_shift features, at least 16; 31: one group per row
    int symmetric_zero;        // the zero point where `zeros` is null
    int outlier_steps;
};

// What a lane reads of a tile, and of a trellis what lies above it.
struct Codes {
    u32 own[4], above[4];
};

__device__ __forceinline__ Codes codes_of(uint4 own, uint4 above) {
    return {{own.x, own.y, own.z, own.w}, {above.x, above.y, above.z, above.w}};
}

// From a lane's own bytes of a tile in shared memory. Of a trellis the lane above must have fetched its own, too.
__device__ __forceinline__ Codes read_codes(const u8* own) {
    const uint4* const bytes = reinterpret_cast<const uint4*>(own);
    return codes_of(*bytes, TRELLIS ? *reinterpret_cast<const uint4*>(own - ABOVE_BYTES) : make_uint4(0, 0, 0, 0));
}

// Where the lanes of a tile's first two output features find what is above them: so many bytes from their own.
__device__ __forceinline__ int strip_above(const Weight& weight) {
    return TILE_BYTES - ABOVE_BYTES - weight.tiles_k * TILE_BYTES;
}

__device__ __forceinline__ bool begins_segment(int strip) { return strip % SEGMENT_STRIPS == 0; }

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
//
// The levels of a trellis are a sign and one of 16 magnitudes. Let u be the lowest bit of a code, u1 and u2 those of the
// codes above, and r the magnitude's number, from 0 on. As place = 2 (code ^ u2) + u1, and the table is its own mirror
// image, r's lowest bit is (negative ^ u1), and the one above that (negative ^ u ^ u2): the two together are u ^ u1 ^ u2.
// A nibble of the tiles is such that it, ^ the one above, ^ the one above that, is
//     bit 3: the lowest two bits of r, one ^ the other     bit 2: the lowest one     bits 1, 0: the upper two
// by which the magnitudes are looked up as above. With that its bit 3 is u, and negative is bit 2 of what is looked up,
// ^ bit 3 of the nibble above. A mask of the bytes that are negative is looked up by it, and turns their signs.

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

// scales: the pair of a lane's output features. zeros: their nibbles, nothing above.
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

// A lane's codes of one step to its registers a[0] to a[3].
__device__ __forceinline__ void dequantize(const Codes& codes, int step, const RowPair& pair, const Weight&,
                                           u32 (&a)[4]) {
    const u32 word = codes.own[step];
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

// scales: the pair of a lane's output features. There are no zeros.
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

// Two weights of `row` (i = 0) or `row + 8`, from two of the bytes of 128 + level.
__device__ __forceinline__ u32 two_weights(u32 bytes, int first, int second, const RowPair& pair, int i) {
#if COMPUTE_BF16
    const u32 low = permute_bytes(bytes, 0x47, 0x4505 + 0x10 * first);
    const u32 high = permute_bytes(bytes, 0x47, 0x4505 + 0x10 * second);
    return bfloat2_from_floats(fmaf(__uint_as_float(low), pair.scale[i], pair.rest[i]),
                               fmaf(__uint_as_float(high), pair.scale[i], pair.rest[i]));
#else
    const u32 numbers = permute_bytes(bytes, 0x64, 0x4040 + 0x100 * second + first);
    return multiply_half2(subtract_half2(numbers, 0x64806480), pair.scale[i]);
#endif
}

// A lane's codes of one step to its registers a[0] to a[3].
__device__ __forceinline__ void dequantize(const Codes& codes, int step, const RowPair& pair, const Weight& weight,
                                           u32 (&a)[4]) {
#if LEVELS == 1
    const u32 word = codes.own[step], turned = word ^ 0x88888888;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 below = permute_bytes(weight.levels[0], weight.levels[1], word >> 16 * half);
        const u32 above = permute_bytes(weight.levels[2], weight.levels[3], turned >> 16 * half);
        const u32 bytes = above - below + 0x80808080;
#pragma unroll
        for (int i = 0; i < 2; i++) a[2 * half + i] = two_weights(bytes, i, i + 2, pair, i);
    }
#else
    const int first = step / 2 * 2, shift = step % 2 * 16;
    const u32 rows[4] = {codes.above[first], codes.above[first + 1], codes.own[first], codes.own[first + 1]};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 word = rows[i + 2] ^ rows[i + 1] ^ rows[i], half = word >> shift;
        const u32 below = permute_bytes(weight.levels[0], weight.levels[1], half);
        const u32 above = permute_bytes(weight.levels[2], weight.levels[3], half ^ 0x8888);
        // Bytes 4 to 7 of eight, whatever the upper bit of their nibbles.
        const u32 negative = permute_bytes(0, 0xFFFFFFFF, (word ^ rows[i + 1] >> 1) >> shift);
        const u32 bytes = ((below | above) ^ negative) - negative + 0x80808080;
        a[i] = two_weights(bytes, 0, 1, pair, i);
        a[i + 2] = two_weights(bytes, 2, 3, pair, i);
    }
#endif
}

#endif
