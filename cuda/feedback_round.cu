// The inner loop of rounding with error feedback (accullm_cli/quant/rounding.py): one block of at most 128 columns.
//
// Column k of the block is rounded from
//
//     value_k = fed_k + sum over the block's columns i < k of error_i U_ik,      error_k = wanted_k - rounded_k
//
// where `fed` holds the targets and what all earlier blocks feed forward (a matrix product, done before). Rows do not
// touch each other:
//
//     grid   8 rows per block          lane       0    1    2   ...   31
//     warp   one row                   columns    0    1    2   ...   31
//                                                32   33   34   ...   63
//                                                64   65   66   ...   95
//                                                96   97   98   ...  127
//
// Column after column: its lane rounds it, a shuffle tells the others the error, and every lane adds it to those of
// its columns that follow. So each value's terms are added in ascending order of i, one fused multiply-add each.
// The codes are those of the CPU wherever these sums are exact, ties included; elsewhere the order of additions can
// move a value across the middle between two codes.
//
// The limit is not memory but the chain of 128 roundings, which all rows run through at the same time.
//
// Compiled without contraction of products and sums (--fmad=false), as the CPU rounds each; REAL is float or double.
#include <philox.cuh>

#ifndef REAL
#define REAL float
#endif
using real = REAL;

constexpr int LANES = 32;
constexpr int COLUMNS_PER_LANE = 4;
constexpr int ROWS = 8;  // of a block: 32 bytes of every column, one sector of memory

enum SourceFormat { SOURCE_FLOAT = 0, SOURCE_HALF = 1, SOURCE_BFLOAT = 2 };

// C columns (in the order of rounding) of N rows, of K columns in all.
struct Block {
    const real* fed;       // [C, N]
    const real* wanted;    // [C, N]
    const real* feedback;  // U [C, C], rows `feedback_stride` apart; what lies on and below its diagonal is not used
    const real* scale;     // [G, N]
    const real* zero;      // [G, N]
    const int* group;      // [C], of each column
    const int* feature;    // [C], the input feature that each column is
    const real* share;     // [C, N], of the feedback that stochastic rounding lets through; null for nearest rounding
    u8* codes;             // [K, N], at row `feature`
    real* error;           // [C, N]
    real* kept;            // [C - rounded, N], the values of columns that keep the source's format
    u64 feedback_stride;
    u64 seed;
    u32 stream;
    int rows;
    int columns;
    int rounded;  // columns from here on are not rounded to codes but to the source's format
    int largest_code;
    int source_format;
};

__device__ __forceinline__ real smaller(real a, real b) { return a < b ? a : b; }
__device__ __forceinline__ real larger(real a, real b) { return a > b ? a : b; }
__device__ __forceinline__ real between(real value, real low, real high) { return larger(smaller(value, high), low); }

__device__ __forceinline__ real in_source_format(real value, int format) {
    const float single = static_cast<float>(value);
    if (format == SOURCE_HALF) return float_from_half(half_from_float(single));
    if (format == SOURCE_BFLOAT) return float_from_bfloat(bfloat_from_float(single));
    return single;
}

extern "C" __global__ void __launch_bounds__(ROWS* LANES) feedback_round(Block block) {
    const int lane = threadIdx.x % LANES;
    const int row = blockIdx.x * ROWS + threadIdx.x / LANES;
    if (row >= block.rows) return;  // a whole warp
    const real most = block.largest_code;
    real value[COLUMNS_PER_LANE], target[COLUMNS_PER_LANE], scale[COLUMNS_PER_LANE], zero[COLUMNS_PER_LANE];
    // For stochastic rounding: the target in codes, how far feedback may move it, the random number.
    real position[COLUMNS_PER_LANE], limit[COLUMNS_PER_LANE], share[COLUMNS_PER_LANE], noise[COLUMNS_PER_LANE];
    const bool stochastic = block.share != nullptr;
#pragma unroll
    for (int j = 0; j < COLUMNS_PER_LANE; j++) {
        const int column = lane + LANES * j;
        value[j] = target[j] = zero[j] = position[j] = limit[j] = share[j] = noise[j] = 0;
        scale[j] = 1;
        if (column >= block.columns) continue;
        const u64 place = static_cast<u64>(column) * block.rows + row;
        const u64 entry = static_cast<u64>(block.group[column]) * block.rows + row;
        value[j] = block.fed[place];
        target[j] = block.wanted[place];
        scale[j] = block.scale[entry];
        zero[j] = block.zero[entry];
        if (!stochastic || column >= block.rounded) continue;
        position[j] = target[j] / scale[j] + zero[j];
        limit[j] = larger(smaller(position[j], most - position[j]), 0);
        share[j] = block.share[place];
        noise[j] = uniform(block.seed, block.stream, block.feature[column], row);
    }
#pragma unroll
    for (int j = 0; j < COLUMNS_PER_LANE; j++) {
        real own_error = 0;
        u8 own_code = 0;
#pragma unroll 1
        for (int owner = 0; owner < LANES && LANES * j + owner < block.columns; owner++) {
            const int k = LANES * j + owner;
            // Every lane rounds; what its owner makes of column k counts.
            real error;
            u8 code = 0;
            if (k >= block.rounded) {
                error = target[j] - in_source_format(value[j], block.source_format);
            } else {
                real rounded;
                if (stochastic) {
                    const real fed = (value[j] - target[j]) / scale[j] * share[j];
                    rounded = floor(position[j] + between(fed, -limit[j], limit[j]) + noise[j]);
                } else {
                    rounded = rint(value[j] / scale[j] + zero[j]);
                }
                rounded = between(rounded, 0, most);
                error = target[j] - (rounded - zero[j]) * scale[j];
                code = static_cast<u8>(rounded);
            }
            if (lane == owner) own_error = error, own_code = code;
            error = __shfl_sync(0xFFFFFFFF, error, owner);
            const real* const row_of_feedback = block.feedback + k * block.feedback_stride;
#pragma unroll
            for (int later = j; later < COLUMNS_PER_LANE; later++) {
                const int column = lane + LANES * later;
                if (column > k && column < block.columns)
                    value[later] = fma(error, row_of_feedback[column], value[later]);
            }
        }
        const int column = lane + LANES * j;
        if (column >= block.columns) continue;
        block.error[static_cast<u64>(column) * block.rows + row] = own_error;
        if (column < block.rounded) {
            block.codes[static_cast<u64>(block.feature[column]) * block.rows + row] = own_code;
        } else {
            const u64 place = static_cast<u64>(column - block.rounded) * block.rows + row;
            block.kept[place] = in_source_format(value[j], block.source_format);
        }
    }
}
