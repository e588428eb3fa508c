// y = x W^T for few tokens: M = 1 to 16, as in decoding.
//
//     y [M, N] = x [M, K] . dequantize(W4)^T + x[:, outliers] . W16^T + bias,   float32 sums, one rounding at the end
//
// The limit is reading W once (about 4.3 bits per weight), so everything serves to keep loads under way:
//
//     grid   x: strips of 16 output features; z: parts of K, where strips alone do not fill the GPU
//     block  4, 8 or 16 warps, which take the strip's tiles in turn:
//
//         strip   | tile 0 | tile 1 | tile 2 | ... | tile T-1 | outlier step 0 | outlier step 1 | ...
//         warp        0        1        2      ...   and over again, outlier steps included
//
//     warp   a ring of STAGES tiles in shared memory, filled ahead. A lane fetches what itself will read (its 16 bytes
//            of codes, its groups' scales and zero points), so no barrier of the block is needed in the loop.
//            Activations, which all blocks read and L2 holds, come one tile ahead, straight into registers.
//
// Tensor cores serve M = 1 as well: there the multiplications cost nothing beside what the dequantization costs, and
// scalar products in float32 would take more instructions than the memory's speed leaves time for. W is the first
// operand (16 rows), so that tokens are padded to 8 and not to 16.
//
// At the end the warps' sums are added in the order of the warps, then the parts of K in order.
#include <layout.cuh>
#include <pieces.cuh>

// Tiles under way per warp: with 32 warps 48 KB per multiprocessor, where a latency of 700 ns at 4.3 TB/s over 132
// multiprocessors asks for 23 KB.
constexpr int STAGES = 4;
constexpr int CODES_AT = TRELLIS ? ABOVE_BYTES : 0;  // a stage: what is above, codes,
constexpr int SCALES_AT = CODES_AT + TILE_BYTES;     // 4 bytes of scales per lane,
constexpr int ZEROS_AT = SCALES_AT + 4 * LANES;      // and 4 bytes of zero points per lane, which a trellis has not
constexpr int STAGE_BYTES = TILE_BYTES + 8 * LANES;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;

__device__ __forceinline__ int next_stage(int at) { return at == RING_BYTES - STAGE_BYTES ? 0 : at + STAGE_BYTES; }

// TOKEN_TILES: how many times 8 tokens.
template <int TOKEN_TILES>
__device__ __forceinline__ void gemv(const Weight& weight, const Product& product) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int row = lane / 4, t = lane % 4;
    const int strip = blockIdx.x, tokens = product.tokens;
    const int slots = weight.outlier_steps * STEP_K;
    u8* const ring = shared + warp * RING_BYTES;
    u16* const gathered = reinterpret_cast<u16*>(shared + warps * RING_BYTES);

    // This block's part of the strip's tiles and outlier steps.
    const int all = weight.tiles_k + weight.outlier_steps;
    const int share = (all + gridDim.z - 1) / gridDim.z;
    const int begin = min(static_cast<int>(blockIdx.z) * share, all), end = min(begin + share, all);
    const int end_of_tiles = min(end, weight.tiles_k);

    const u8* const outlier_tiles =
        weight.outlier_tiles + static_cast<u64>(strip) * weight.outlier_steps * TILE_BYTES + 16 * lane;
    const u64 first_entry = static_cast<u64>(strip) * weight.groups * 8;
    const u32* const scales = kept(weight.scales + first_entry + row);
    const bool asymmetric = has_zeros(weight);
    const u8* const zeros = kept(weight.zeros + first_entry + (row & 4));
    const int codes_at = kept(CODES_AT + 16 * lane), scales_at = kept(SCALES_AT + 4 * lane);
    const int zeros_at = ZEROS_AT - SCALES_AT, zero_at = kept(ZEROS_AT + 4 * lane + (row & 3));

    // The tile that is fetched next, with its codes and the first of this lane's input features.
    int coming = begin + warp;
    int coming_k = kept(coming * TILE_K + 16 * t);
    const u8* codes_source =
        kept(weight.tiles + (static_cast<u64>(strip) * weight.tiles_k + coming) * TILE_BYTES + 16 * lane);
    const int above = !TRELLIS || begins_segment(strip) ? 0 : kept(strip_above(weight));
    auto fetch = [&](u8* stage) {
        if (coming < end_of_tiles) {
            const u32 group = static_cast<u32>(coming_k) >> weight.group_shift;
            copy_async_16(stage + codes_at, codes_source, true);
            if (TRELLIS && codes_at < CODES_AT + ABOVE_BYTES)
                copy_async_16(stage + codes_at - ABOVE_BYTES, codes_source + above, above != 0);
            copy_async_4(stage + scales_at, scales + 8 * group, true);
            if (asymmetric) copy_async_4(stage + scales_at + zeros_at, zeros + 8 * group, true);
        } else if (coming < end) {
            const int step = coming - weight.tiles_k;
            copy_async_16(stage + codes_at, outlier_tiles + static_cast<u64>(step) * TILE_BYTES, true);
        }
        commit_copies();
        coming += warps;
        coming_k += warps * TILE_K;
        codes_source += warps * TILE_BYTES;
    };

    // A lane's activations of a tile: 16 of each of its tokens, in the order of the steps, and zeros from that tile on
    // in which the first or last 8 lie beyond K or another block's.
    u32 x[TOKEN_TILES][8];
    int first_end[TOKEN_TILES], second_end[TOKEN_TILES];
#pragma unroll
    for (int part = 0; part < TOKEN_TILES; part++) {
        const bool there = 8 * part + row < tokens;
        const int left = weight.in_features - 16 * t + TILE_K - 1;
        first_end[part] = kept(there ? min(end_of_tiles, left / TILE_K) : 0);
        second_end[part] = kept(there ? min(end_of_tiles, (left - 8) / TILE_K) : 0);
    }
    const u16* x_source = kept(product.x + row * product.x_stride + (begin + warp) * TILE_K + 16 * t);
    auto load_activations = [&](int tile) {
#pragma unroll
        for (int part = 0; part < TOKEN_TILES; part++) {
            const u16* const source = x_source + 8 * part * product.x_stride;
            const uint4 first = load_16(source, tile < first_end[part]);
            const uint4 second = load_16(source + 8, tile < second_end[part]);
            x[part][0] = first.x, x[part][1] = first.y, x[part][2] = first.z, x[part][3] = first.w;
            x[part][4] = second.x, x[part][5] = second.y, x[part][6] = second.z, x[part][7] = second.w;
        }
        x_source += warps * TILE_K;
    };

    // Two accumulators, as each multiplication waits for the one before it that adds to the same.
    float sums[TOKEN_TILES][2][4] = {};
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) fetch(ring + i * STAGE_BYTES);
    int tile = begin + warp;
    load_activations(tile);
    if (end > weight.tiles_k) {  // the same for the whole block
        gather_outliers(gathered, slots, product, weight, 0, tokens, 0, slots);
        __syncthreads();
    }

    int at = 0, before = RING_BYTES - STAGE_BYTES;  // of this iteration's stage and of the one that is free
    for (; tile < end_of_tiles; tile += warps) {
        wait_for_copies<STAGES - 2>();
        if (TRELLIS) __syncwarp();  // lanes read what others fetched
        const u8* const stage = ring + at;
        const Codes codes = read_codes(stage + codes_at);
        const u32 scale_pair = *reinterpret_cast<const u32*>(stage + scales_at);
        u32 zero_pair = weight.symmetric_zero * 0x11;
        if (asymmetric) zero_pair = stage[zero_at];
        fetch(ring + before);

        const RowPair pair = row_pair(scale_pair, zero_pair);
#pragma unroll
        for (int step = 0; step < 4; step++) {
            u32 a[4];
            dequantize(codes, step, pair, weight, a);
#pragma unroll
            for (int part = 0; part < TOKEN_TILES; part++)
                multiply_accumulate(sums[part][step % 2], a, x[part][2 * step], x[part][2 * step + 1]);
        }
        load_activations(tile + warps);
        before = at;
        at = next_stage(at);
    }
    for (; tile < end; tile += warps) {
        wait_for_copies<STAGES - 2>();
        const uint4 numbers = *reinterpret_cast<const uint4*>(ring + at + codes_at);
        fetch(ring + before);
        const u32 a[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
        const int first = (tile - weight.tiles_k) * STEP_K + 4 * t;
#pragma unroll
        for (int part = 0; part < TOKEN_TILES; part++) {
            const int token = 8 * part + row;
            uint2 pair = make_uint2(0, 0);
            if (token < tokens) pair = *reinterpret_cast<const uint2*>(gathered + token * slots + first);
            multiply_accumulate(sums[part][0], a, pair.x, pair.y);
        }
        before = at;
        at = next_stage(at);
    }

    // The ring is done with: it becomes [warps][tokens padded to 8][16 output features] sums and one flag.
    wait_for_copies<0>();
    __syncthreads();
    constexpr int WARP_SUMS = TOKEN_TILES * 8 * STRIP;
    float* const warp_sums = reinterpret_cast<float*>(shared);
    float* const own = warp_sums + warp * WARP_SUMS;
#pragma unroll
    for (int part = 0; part < TOKEN_TILES; part++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = 8 * part + 2 * t + i % 2, feature = 2 * row + i / 2;
            own[token * STRIP + feature] = sums[part][0][i] + sums[part][1][i];
        }
    }
    __syncthreads();
    u32* const flag = reinterpret_cast<u32*>(warp_sums + warps * WARP_SUMS);
    write_sums(product, weight, 0, tokens, strip * STRIP, STRIP, product.arrived + strip, flag,
               [&](int token, int feature) {
                   float sum = 0;
                   for (int w = 0; w < warps; w++) sum += warp_sums[w * WARP_SUMS + token * STRIP + feature];
                   return sum;
               });
}

// At most 64 registers, so that 32 warps fit a multiprocessor.
extern "C" __global__ void __launch_bounds__(512, 2) hybrid_gemv_8(Weight weight, Product product) {
    gemv<1>(weight, product);
}

extern "C" __global__ void __launch_bounds__(512, 1) hybrid_gemv_16(Weight weight, Product product) {
    gemv<2>(weight, product);
}
