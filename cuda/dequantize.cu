// From the tiles of layout.cuh to a 16-bit weight, for products that a dense one computes faster than fused kernels do
// (those of many tokens), or through which a gradient flows. The limit is writing 2 bytes per weight.
#include <layout.cuh>

// out: [N, K] in the compute format. grid: x strips, y parts of K; a warp takes a tile at a time. The outlier features of
// the block's part of K are written after it, in place of what their codes stand for.
extern "C" __global__ void __launch_bounds__(256) dequantize_tiles(Weight weight, u16* out) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int row = lane / 4, t = lane % 4, strip = blockIdx.x;
    const int share = (weight.tiles_k + gridDim.y - 1) / gridDim.y;
    const int begin = min(static_cast<int>(blockIdx.y) * share, weight.tiles_k);
    const int end = min(begin + share, weight.tiles_k);
    const bool vectors = weight.in_features % 8 == 0;  // then every row of `out` starts at a multiple of 16 bytes
    for (int tile = begin + warp; tile < end; tile += warps) {
        const u64 place = static_cast<u64>(strip) * weight.tiles_k + tile;
        const u8* const own = weight.tiles + place * TILE_BYTES + 16 * lane;
        const bool inside = lane >= ABOVE_BYTES / 16;
        const u8* const above = own + (inside ? -ABOVE_BYTES : strip_above(weight));
        const Codes codes = codes_of(load_16(own, true), load_16(above, TRELLIS && (inside || !begins_segment(strip))));
        const int k = tile * TILE_K + 16 * t;
        const u64 entry = (static_cast<u64>(strip) * weight.groups + (k >> weight.group_shift)) * 8 + row;
        const u32 zeros = has_zeros(weight) ? weight.zeros[entry] : weight.symmetric_zero * 0x11;
        const RowPair pair = row_pair(weight.scales[entry], zeros);
        u32 values[2][8];  // of two output features: pairs of neighbouring input features
#pragma unroll
        for (int step = 0; step < 4; step++) {
            u32 a[4];
            dequantize(codes, step, pair, weight, a);
            values[0][2 * step] = a[0], values[0][2 * step + 1] = a[2];
            values[1][2 * step] = a[1], values[1][2 * step + 1] = a[3];
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int feature = strip * STRIP + 2 * row + half;
            if (feature >= weight.out_features) continue;
            u16* const target = out + static_cast<u64>(feature) * weight.in_features + k;
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                if (vectors) {
                    const uint4 four =
                        make_uint4(values[half][i], values[half][i + 1], values[half][i + 2], values[half][i + 3]);
                    if (k + 2 * i < weight.in_features) *reinterpret_cast<uint4*>(target + 2 * i) = four;
                    continue;
                }
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 8; j++)
                    if (k + j < weight.in_features) target[j] = static_cast<u16>(values[half][j / 2] >> 16 * (j % 2));
            }
        }
    }
    __syncthreads();
    // An outlier step holds its slots as a lane's registers: slot 4t + 2 pair + element, output 2 row + half.
    const u16* const outliers =
        reinterpret_cast<const u16*>(weight.outlier_tiles + static_cast<u64>(strip) * weight.outlier_steps * TILE_BYTES);
    for (int i = threadIdx.x; i < weight.outlier_steps * STEP_K * STRIP; i += blockDim.x) {
        const int slot = i / STRIP, r = i % STRIP;
        const int k = weight.outlier_index[slot], feature = strip * STRIP + r;
        if (k < begin * TILE_K || k >= end * TILE_K || feature >= weight.out_features) continue;
        const int owner = r / 2 * 4 + slot % STEP_K / 4, half = r % 2, pair = slot / 2 % 2, element = slot % 2;
        const int place = (slot / STEP_K * LANES + owner) * 8 + 4 * pair + 2 * half + element;
        out[static_cast<u64>(feature) * weight.in_features + k] = outliers[place];
    }
}
