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

constexpr int SCALES_AT = BLOCK_STRIPS * TILE_BYTES;
constexpr int ZEROS_AT = SCALES_AT + BLOCK_STRIPS * 4 * LANES;
constexpr int ACTIVATIONS_AT = ZEROS_AT + BLOCK_STRIPS * 4 * LANES;

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
    const bool asymmetric = weight.zeros != nullptr;

    const int all = weight.tiles_k + weight.outlier_steps;
    const int share = (all + gridDim.z - 1) / gridDim.z;
    const int begin = min(static_cast<int>(blockIdx.z) * share, all), end = min(begin + share, all);
    const int first_outlier = max(begin, weight.tiles_k);

    auto fetch = [&](int tile, u8* stage) {
        const bool is_tile = tile < weight.tiles_k;
        if (tile < end) {
#pragma unroll
            for (int i = 0; i < WARP_STRIPS; i++) {
                const int own = warp * WARP_STRIPS + i, strip = first_strip + own;
                const bool there = strip < strips;
                const u64 safe = there ? strip : 0;
                const u8* source = is_tile ? weight.tiles + (safe * weight.tiles_k + tile) * TILE_BYTES
                                           : weight.outlier_tiles + (safe * weight.outlier_steps + tile -
                                                                     weight.tiles_k) * TILE_BYTES;
                copy_async_16(stage + own * TILE_BYTES + 16 * lane, source + 16 * lane, there);
                if (!is_tile) continue;
                const int group = (tile * TILE_K + 16 * t) >> weight.group_shift;
                const u64 entry = (safe * weight.groups + group) * 8;
                copy_async_4(stage + SCALES_AT + (own * LANES + lane) * 4, weight.scales + entry + row, there);
                if (asymmetric)
                    copy_async_4(stage + ZEROS_AT + (own * LANES + lane) * 4, weight.zeros + entry + (row & 4), there);
            }
            if (is_tile) {
                // 8 pieces of 8 activations per token; rows beyond the last token get zeros.
                for (int i = threadIdx.x; i < TOKENS * 8; i += WARPS * LANES) {
                    const int token = i / 8, piece = i % 8;
                    u8* const target = stage + ACTIVATIONS_AT + token * X_ROW + 16 * piece;
                    const int k = token < tokens ? tile * TILE_K + 8 * piece : weight.in_features;
                    fetch_activations(target, product, token < tokens ? first_token + token : 0, k, weight.in_features);
                }
            }
        }
        commit_copies();
    };

    auto gather = [&](int tile) {
        gather_outliers(reinterpret_cast<u16*>(gathered), X_ROW / 2, product, weight, first_token, TOKENS,
                        (tile - weight.tiles_k) * STEP_K, min(GATHERED_STEPS, end - tile) * STEP_K);
    };

    float sums[WARP_STRIPS][TOKEN_TILES][4] = {};
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) fetch(begin + i, shared + i * STAGE_BYTES);
    if (first_outlier < end) gather(first_outlier);  // while the first stages are on their way

    int slot = 0;
    for (int tile = begin; tile < end; tile++, slot = (slot + 1) % STAGES) {
        if (tile > first_outlier && (tile - first_outlier) % GATHERED_STEPS == 0) {
            __syncthreads();  // all are done with the outliers gathered before
            gather(tile);
        }
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        fetch(tile + STAGES - 1, shared + (slot + STAGES - 1) % STAGES * STAGE_BYTES);
        const u8* const stage = shared + slot * STAGE_BYTES;
        const u8* const own_tiles = stage + warp * WARP_STRIPS * TILE_BYTES + 16 * lane;

        if (tile >= weight.tiles_k) {
            const int column = (tile - first_outlier) % GATHERED_STEPS * STEP_K + 4 * t;
            u32 a[WARP_STRIPS][4];
#pragma unroll
            for (int i = 0; i < WARP_STRIPS; i++) {
                const uint4 numbers = *reinterpret_cast<const uint4*>(own_tiles + i * TILE_BYTES);
                a[i][0] = numbers.x, a[i][1] = numbers.y, a[i][2] = numbers.z, a[i][3] = numbers.w;
            }
#pragma unroll
            for (int part = 0; part < TOKEN_TILES; part++) {
                const uint2 x = *reinterpret_cast<const uint2*>(gathered + (8 * part + row) * X_ROW + 2 * column);
#pragma unroll
                for (int i = 0; i < WARP_STRIPS; i++) multiply_accumulate(sums[i][part], a[i], x.x, x.y);
            }
            continue;
        }

        RowPair pairs[WARP_STRIPS];
        u32 words[WARP_STRIPS][4];
#pragma unroll
        for (int i = 0; i < WARP_STRIPS; i++) {
            const int place = ((warp * WARP_STRIPS + i) * LANES + lane) * 4;
            u32 zero_pair = weight.symmetric_zero * 0x11;
            if (asymmetric)
                zero_pair = *reinterpret_cast<const u32*>(stage + ZEROS_AT + place) >> 8 * (row & 3) & 0xFF;
            pairs[i] = row_pair(*reinterpret_cast<const u32*>(stage + SCALES_AT + place), zero_pair);
            const uint4 codes = *reinterpret_cast<const uint4*>(own_tiles + i * TILE_BYTES);
            words[i][0] = codes.x, words[i][1] = codes.y, words[i][2] = codes.z, words[i][3] = codes.w;
        }
        const u8* const x_rows = stage + ACTIVATIONS_AT + row * X_ROW + 32 * t;
#pragma unroll
        for (int half = 0; half < 2; half++) {  // 16 bytes of activations serve two steps
            u32 a[WARP_STRIPS][2][4];
#pragma unroll
            for (int i = 0; i < WARP_STRIPS; i++) {
                dequantize(words[i][2 * half], pairs[i], a[i][0]);
                dequantize(words[i][2 * half + 1], pairs[i], a[i][1]);
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

    // The stages are done with: they become [TOKENS][128 output features] sums, so that whole rows of y are written.
    wait_for_copies<0>();
    __syncthreads();
    float* const block_sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < WARP_STRIPS; i++) {
#pragma unroll
        for (int part = 0; part < TOKEN_TILES; part++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int token = 8 * part + 2 * t + c % 2;
                const int feature = (warp * WARP_STRIPS + i) * STRIP + row + 8 * (c / 2);
                block_sums[token * SUMS_ROW + feature] = sums[i][part][c];
            }
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
