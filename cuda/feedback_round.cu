// The inner loop of rounding with error feedback (accullm_cli/quant/rounding.py): a tile of at most 128 columns.
//
// Column k of the tile is rounded from
//
//     wanted_k + fed_k + sum over the tile's columns i < k of error_i U_ik,      error_k = wanted_k - rounded_k
//
// where fed_k is what all earlier tiles feed to it (a matrix product, done before). Rows do not touch each other:
//
//     grid   8 rows per block          lane       0    1    2   ...   31
//     warp   one row                   columns    0    1    2   ...   31
//                                                32   33   34   ...   63
//                                                64   65   66   ...   95
//                                                96   97   98   ...  127
//
// Column after column: its lane rounds it, a shuffle tells the others the error, and every lane adds it to what its
// columns that follow are fed. So each value's terms are added in ascending order of i, each product rounded first.
//
// The limit is not memory but the chain of 128 roundings, which all rows run through at the same time.
#include <philox.cuh>
#include <real.cuh>

constexpr int LANES = 32;
constexpr int COLUMNS_PER_LANE = 4;
constexpr int ROWS = 8;  // of a block

// C columns (in the order of rounding) of N rows; see `Tile` of accullm_cli/quant/loops.py.
struct Tile {
    const real* wanted;   // [N, C]
    real* fed;            // [N, C]; at the end what all columns before it feed to each
    const real* upper;    // U [C, C]; what lies on and below its diagonal is not used
    const real* scale;    // [N, G]
    const real* zero;     // [N, G]
    const i64* group;     // [C], of each column
    const real* levels;   // [largest code + 1], what codes stand for; null where they are steps from the zero point
    const real* share;    // [N, C], of the feedback that stochastic rounding lets through; null for nearest rounding
    const i64* features;  // [C], the input feature that each column is; for stochastic rounding
    u8* codes;            // [N, C]
    real* error;          // [N, C]
    u64 seed;
    u32 stream;
    int rows;
    int columns;
    int groups;
    int largest_code;
};

extern "C" __global__ void __launch_bounds__(ROWS* LANES) feedback_round(Tile tile) {
    const int lane = threadIdx.x % LANES;
    const int row = blockIdx.x * ROWS + threadIdx.x / LANES;
    if (row >= tile.rows) return;  // a whole warp
    const u64 first = static_cast<u64>(row) * tile.columns, first_group = static_cast<u64>(row) * tile.groups;
    const real most = tile.largest_code;
    real fed[COLUMNS_PER_LANE], target[COLUMNS_PER_LANE], scale[COLUMNS_PER_LANE], zero[COLUMNS_PER_LANE];
    // For stochastic rounding: the target in codes, how far feedback may move it, the random number.
    real position[COLUMNS_PER_LANE], limit[COLUMNS_PER_LANE], share[COLUMNS_PER_LANE], noise[COLUMNS_PER_LANE];
    const bool stochastic = tile.share != nullptr;
#pragma unroll
    for (int j = 0; j < COLUMNS_PER_LANE; j++) {
        const int column = lane + LANES * j;
        fed[j] = target[j] = zero[j] = position[j] = limit[j] = share[j] = noise[j] = 0;
        scale[j] = 1;
        if (column >= tile.columns) continue;
        fed[j] = tile.fed[first + column];
        target[j] = tile.wanted[first + column];
        scale[j] = tile.scale[first_group + tile.group[column]];
        zero[j] = tile.zero[first_group + tile.group[column]];
        if (!stochastic) continue;
        position[j] = target[j] / scale[j] + zero[j];
        limit[j] = larger(smaller(position[j], most - position[j]), 0);
        share[j] = tile.share[first + column];
        noise[j] = uniform(tile.seed, tile.stream, static_cast<u32>(tile.features[column]), row);
    }
#pragma unroll
    for (int j = 0; j < COLUMNS_PER_LANE; j++) {
        real own_error = 0;
        u8 own_code = 0;
#pragma unroll 1
        for (int owner = 0; owner < LANES && LANES * j + owner < tile.columns; owner++) {
            const int k = LANES * j + owner;
            // Every lane rounds; what its owner makes of column k counts.
            real code, point;
            if (stochastic) {
                const real received = between(fed[j] / scale[j] * share[j], -limit[j], limit[j]);
                code = between(floor(position[j] + received + noise[j]), 0, most);
                point = code - zero[j];
            } else if (tile.levels != nullptr) {
                const int place = level_code((target[j] + fed[j]) / scale[j], tile.levels, tile.largest_code);
                code = place;
                point = tile.levels[place];
            } else {
                code = between(rint((target[j] + fed[j]) / scale[j] + zero[j]), 0, most);
                point = code - zero[j];
            }
            real error = target[j] - point * scale[j];
            if (lane == owner) own_error = error, own_code = static_cast<u8>(code);
            error = __shfl_sync(0xFFFFFFFF, error, owner);
            const real* const row_of_upper = tile.upper + static_cast<u64>(k) * tile.columns;
#pragma unroll
            for (int later = j; later < COLUMNS_PER_LANE; later++) {
                const int column = lane + LANES * later;
                if (column > k && column < tile.columns) fed[later] += error * row_of_upper[column];
            }
        }
        const int column = lane + LANES * j;
        if (column >= tile.columns) continue;
        tile.codes[first + column] = own_code;
        tile.error[first + column] = own_error;
        tile.fed[first + column] = fed[j];
    }
}
