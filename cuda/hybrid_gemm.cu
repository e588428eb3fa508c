// y = x W^T for many tokens: M from 17 on, as in prefill and evaluation.
//
//     y [M, N] = x [M, K] . dequantize(W4)^T + x[:, outliers] . W16^T + bias,   float32 sums, one rounding at the end
//
// A block computes TOKENS tokens by 128 output features (8 strips); with TOKENS = 32 reading W is the limit, with 128
// the tensor cores are.
//
//     grid   x: 128 output features; y: TOKENS tokens; z: parts of K, where the rest does not fill the GPU
//     block  4 warps, each for two strips and all tokens: every weight is dequantized once per block
//
//                      strips 0,1   2,3    4,5    6,7      (16 output features each)
//         tokens 0..    warp 0     warp 1 warp 2 warp 3
//
//     stage  one tile of each of the 8 strips (a lane fetches the codes, scales and zero points it will itself read)
//            and 64 activations of each token, which all warps read; a row of them takes 144 bytes, not 128, so that
//            8 lanes' 16-byte reads fall into different banks
//
// In iteration i a block waits for stage i, meets at a barrier (which also says that all are done with stage i-1),
// fetches into the room of stage i-1, and computes. Outlier steps are stages too; their activations are gathered
// beforehand, up to 64 outliers at a time.
#include <layout.cuh>
#include <pieces.cuh>

constexpr int WARPS = 4;
constexpr int WARP_STRIPS = 2;
constexpr int BLOCK_STRIPS = WARPS * WARP_STRIPS;
constexpr int BLOCK_FEATURES = BLOCK_STRIPS * STRIP;
constexpr int X_ROW = 2 * TILE_K + 16;  // bytes, see above
constexpr int GATHERED_STEPS = 4;       // outlier steps whose activations fill rows of X_ROW bytes
constexpr int SUMS_ROW = BLOCK_FEATURES + 4;  // floats; the 4 spread the rows over the banks

// Of a trellis a stage begins with what is above its first strip, in place of zero points, which it has not. Above each
// other strip is the end of the one before it.
constexpr int CODES_AT = TRELLIS ? ABOVE_BYTES : 0;
constexpr int SCALES_AT = CODES_AT + BLOCK_STRIPS * TILE_BYTES;
constexpr int ZEROS_AT = SCALES_AT + BLOCK_STRIPS * 4 * LANES;
constexpr int ACTIVATIONS_AT = BLOCK_STRIPS * (TILE_BYTES + 8 * LANES);

// Where a strip's scales begin. Where registers are few, as a table or bfloat16 takes some, it is their number: half as
// long.
#if LEVELS || COMPUTE_BF16
using Scales = int;
__device__ __forceinline__ Scales scales_from(const Weight&, u64 first) { return static_cast<int>(first); }
__device__ __forceinline__ const u32* scale_of(const Weight& weight, Scales scales, u32 group) {
    return weight.scales + (scales + 8 * group);
}
#else
using Scales = const u32*;
__device__ __forceinline__ Scales scales_from(const Weight& weight, u64 first) { return weight.scales + first; }
__device__ __forceinline__ const u32* scale_of(const Weight&, Scales scales, u32 group) { return scales + 8 * group; }
#endif

// Three stages keep 128 tokens below the 99 KB per block of compute capability 8.6, and 64 tokens below the 64 KB of 7.5.
template <int TOKENS>
__device__ __forceinline__ void gemm(const Weight& weight, const Product& product) {
    constexpr int STAGES = TOKENS == 32 ? 4 : 3;
    constexpr int STAGE_BYTES = ACTIVATIONS_AT + TOKENS * X_ROW;
    constexpr int TOKEN_TILES = TOKENS / 8;
    DYNAMIC_SHARED(shared);
    u8* const gathered = shared + STAGES * STAGE_BYTES;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int row = lane / 4, t = lane % 4;
    const int first_token = blockIdx.y * TOKENS, tokens = min(TOKENS, product.tokens - first_token);
    const int first_strip = blockIdx.x * BLOCK_STRIPS, strips = strips_of(weight);
    const bool asymmetric = has_zeros(weight);

    const int all = weight.tiles_k + weight.outlier_steps;
    const int share = (all + gridDim.z - 1) / gridDim.z;
    const int begin = min(static_cast<int>(blockIdx.z) * share, all), end = min(begin + share, all);
    const int end_of_tiles = min(end, weight.tiles_k), first_outlier = max(begin, weight.tiles_k);

    // The tile that is fetched next, with what this lane fetches of it.
    int coming = begin, coming_k = kept(begin * TILE_K + 16 * t);
    const u8* codes[WARP_STRIPS];
    Scales scales[WARP_STRIPS];
    const u8* zeros[WARP_STRIPS];
    bool strip_there[WARP_STRIPS];
#pragma unroll
    for (int i = 0; i < WARP_STRIPS; i++) {
        const int strip = first_strip + warp * WARP_STRIPS + i;
        strip_there[i] = strip < strips;
        const u64 safe = strip_there[i] ? strip : 0;
        codes[i] = kept(weight.tiles + (safe * weight.tiles_k + begin) * TILE_BYTES + 16 * lane);
        scales[i] = kept(scales_from(weight, safe * weight.groups * 8 + row));
        zeros[i] = kept(weight.zeros + safe * weight.groups * 8 + (row & 4));
    }
    // Activations come in pieces of 8: a thread fetches the same piece of every 16th token.
    constexpr int X_COPIES = TOKENS * 8 / (WARPS * LANES), X_TOKENS = WARPS * LANES / 8;
    const int x_token = threadIdx.x / 8, x_k = 8 * (threadIdx.x % 8);
    const u16* x_source = kept(product.x + (first_token + x_token) * product.x_stride + begin * TILE_K + x_k);
    const u64 x_step = X_TOKENS * product.x_stride;
    const int own_at = kept((warp * WARP_STRIPS * LANES + lane) * 4);
    const int x_at = kept(ACTIVATIONS_AT + x_token * X_ROW + 2 * x_k);

    const int above = begins_segment(first_strip) ? 0 : strip_above(weight);
    auto fetch = [&](u8* stage) {
        if (coming < end_of_tiles) {
            const u32 group = static_cast<u32>(coming_k) >> weight.group_shift;
            if (TRELLIS && threadIdx.x < ABOVE_BYTES / 16)
                copy_async_16(stage + CODES_AT - ABOVE_BYTES + 16 * lane, codes[0] + above, above != 0);
#pragma unroll
            for (int i = 0; i < WARP_STRIPS; i++) {
                u8* const own = stage + own_at + i * LANES * 4;
                copy_async_16(stage + CODES_AT + 4 * own_at + i * TILE_BYTES, codes[i], strip_there[i]);
                copy_async_4(own + SCALES_AT, scale_of(weight, scales[i], group), strip_there[i]);
                if (asymmetric) copy_async_4(own + ZEROS_AT, zeros[i] + 8 * group, strip_there[i]);
                codes[i] += TILE_BYTES;
            }
            const bool k_there = coming * TILE_K + x_k < weight.in_features;
            const u16* source = x_source;
#pragma unroll
            for (int i = 0; i < X_COPIES; i++, source += x_step) {
                const bool there = k_there && x_token + i * X_TOKENS < tokens;
                copy_async_16(stage + x_at + i * X_TOKENS * X_ROW, there ? source : product.x, there);
            }
            x_source += TILE_K;
        } else if (coming < end) {
#pragma unroll
            for (int i = 0; i < WARP_STRIPS; i++) {
                const u64 safe = strip_there[i] ? first_strip + warp * WARP_STRIPS + i : 0;
                const u64 place = safe * weight.outlier_steps + coming - weight.tiles_k;
                copy_async_16(stage + CODES_AT + 4 * own_at + i * TILE_BYTES,
                              weight.outlier_tiles + place * TILE_BYTES + 16 * lane, strip_there[i]);
            }
        }
        commit_copies();
        coming++;
        coming_k += TILE_K;
    };

    auto gather = [&](int tile) {
        gather_outliers(reinterpret_cast<u16*>(gathered), X_ROW / 2, product, weight, first_token, TOKENS,
                        (tile - weight.tiles_k) * STEP_K, min(GATHERED_STEPS, end - tile) * STEP_K);
    };

    float sums[WARP_STRIPS][TOKEN_TILES][4] = {};
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) fetch(shared + i * STAGE_BYTES);
    if (first_outlier < end) gather(first_outlier);  // while the first stages are on their way

    int at = 0, before = (STAGES - 1) * STAGE_BYTES;  // of this iteration's stage and of the one that becomes free
    auto turn = [&] {
        before = at;
        at = at == (STAGES - 1) * STAGE_BYTES ? 0 : at + STAGE_BYTES;
    };
    int tile = begin;
#pragma unroll 1
    for (; tile < end_of_tiles; tile++, turn()) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        fetch(shared + before);
        const u8* const stage = shared + at;

        RowPair pairs[WARP_STRIPS];
        Codes codes[WARP_STRIPS];
#pragma unroll
        for (int i = 0; i < WARP_STRIPS; i++) {
            const int place = own_at + i * LANES * 4;
            u32 zero_pair = weight.symmetric_zero * 0x11;
            if (asymmetric)
                zero_pair = *reinterpret_cast<const u32*>(stage + ZEROS_AT + place) >> 8 * (row & 3) & 0xFF;
            pairs[i] = row_pair(*reinterpret_cast<const u32*>(stage + SCALES_AT + place), zero_pair);
            codes[i] = read_codes(stage + CODES_AT + 4 * own_at + i * TILE_BYTES);
        }
        const u8* const x_rows = stage + ACTIVATIONS_AT + row * X_ROW + 32 * t;
#pragma unroll
        for (int half = 0; half < 2; half++) {  // 16 bytes of activations serve two steps
            u32 a[WARP_STRIPS][2][4];
#pragma unroll
            for (int i = 0; i < WARP_STRIPS; i++) {
                dequantize(codes[i], 2 * half, pairs[i], weight, a[i][0]);
                dequantize(codes[i], 2 * half + 1, pairs[i], weight, a[i][1]);
            }
#pragma unroll
            for (int part = 0; part < TOKEN_TILES; part++) {
                const uint4 x = *reinterpret_cast<const uint4*>(x_rows + 8 * part * X_ROW + 16 * half);
#pragma unroll
                for (int i = 0; i < WARP_STRIPS; i++) multiply_accumulate(sums[i][part], a[i][0], x.x, x.y);
#pragma unroll
                for (int i = 0; i < WARP_STRIPS; i++) multiply_accumulate(sums[i][part], a[i][1], x.z, x.w);
            }
        }
    }
#pragma unroll 1
    for (; tile < end; tile++, turn()) {
        if (tile > first_outlier && (tile - first_outlier) % GATHERED_STEPS == 0) {
            __syncthreads();  // all are done with the outliers gathered before
            gather(tile);
        }
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        fetch(shared + before);
        const int column = (tile - first_outlier) % GATHERED_STEPS * STEP_K + 4 * t;
        u32 a[WARP_STRIPS][4];
#pragma unroll
        for (int i = 0; i < WARP_STRIPS; i++) {
            const uint4 numbers = *reinterpret_cast<const uint4*>(shared + at + CODES_AT + 4 * own_at + i * TILE_BYTES);
            a[i][0] = numbers.x, a[i][1] = numbers.y, a[i][2] = numbers.z, a[i][3] = numbers.w;
        }
#pragma unroll
        for (int part = 0; part < TOKEN_TILES; part++) {
            const uint2 x = *reinterpret_cast<const uint2*>(gathered + (8 * part + row) * X_ROW + 2 * column);
#pragma unroll
            for (int i = 0; i < WARP_STRIPS; i++) multiply_accumulate(sums[i][part], a[i], x.x, x.y);
        }
    }

    // The stages are done with: they become [TOKENS][128 output features] sums, so that whole rows of y are written.
    wait_for_copies<0>();
    __syncthreads();
    float* const block_sums = reinterpret_cast<float*>(shared);
    float* const own_sums = block_sums + 2 * t * SUMS_ROW + warp * WARP_STRIPS * STRIP + 2 * row;
#pragma unroll
    for (int i = 0; i < WARP_STRIPS; i++) {
#pragma unroll
        for (int part = 0; part < TOKEN_TILES; part++) {
#pragma unroll
            for (int c = 0; c < 2; c++)
                *reinterpret_cast<uint2*>(own_sums + (8 * part + c) * SUMS_ROW + i * STRIP) =
                    make_uint2(__float_as_uint(sums[i][part][c]), __float_as_uint(sums[i][part][c + 2]));
        }
    }
    __syncthreads();
    static_assert(STAGES * STAGE_BYTES >= TOKENS * SUMS_ROW * 4, "the sums fit into the stages' room");
    u32* const flag = reinterpret_cast<u32*>(gathered);
    write_sums(product, weight, first_token, tokens, first_strip * STRIP, BLOCK_FEATURES,
               product.arrived + blockIdx.y * gridDim.x + blockIdx.x, flag,
               [&](int token, int feature) { return block_sums[token * SUMS_ROW + feature]; });
}

extern "C" __global__ void __launch_bounds__(WARPS * LANES) hybrid_gemm_32(Weight weight, Product product) {
    gemm<32>(weight, product);
}

extern "C" __global__ void __launch_bounds__(WARPS * LANES) hybrid_gemm_64(Weight weight, Product product) {
    gemm<64>(weight, product);
}

extern "C" __global__ void __launch_bounds__(WARPS * LANES) hybrid_gemm_128(Weight weight, Product product) {
    gemm<128>(weight, product);
}
