// Rounding to trellis codes (accullm_cli/quant/trellis.py): a tile of feedback, and descent over whole columns.
//
// A column of a segment, 256 rows, is one chain, whose best codes Viterbi's algorithm finds; chains of a column are one
// after the other, as are columns, and segments do not touch each other:
//
//     grid    a segment per block
//     block   256 threads, a row each:     what is nearest of each of four kinds of level, and at what cost
//             thread 0:                    down the rows, the cheapest way to each of four states, and back up
//             a row each:                  code, error
//             a warp per row, in turns:    what the rows that follow from it are changed by
//
// The limit is thread 0, some 50 cycles a row; every multiprocessor has a segment of its own.
//
// Rows that feed each other go through the CPU (accullm_cli/kernels/rounding.py).
#include <real.cuh>

constexpr int SEGMENT = 256;  // rows, and threads of a block
constexpr int BLOCKS = 4;      // of a multiprocessor, see descend.cu
constexpr int LANES = 32;
constexpr int KINDS = 4;      // of places, by their remainder
constexpr double NO_PATH = 1e300;

// What the threads of a block tell each other.
struct Column {
    double cost[SEGMENT][KINDS];
    real moved[SEGMENT];       // what a row passes on
    real square[SEGMENT];      // of the distance to where a row would be best, in descent
    u8 near[SEGMENT][KINDS];   // places
    u8 back[SEGMENT];          // by state, a bit: which way came there
    u8 place[SEGMENT];         // of the best chain
    int improves;              // in descent
    int moved_any;
};

// The nearest of the levels of one kind, of two the lower one.
__device__ __forceinline__ int nearest(const real position, const real* levels, const int count, const int kind) {
    int low = 0, high = count / KINDS - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (position + position > levels[KINDS * middle + kind] + levels[KINDS * (middle + 1) + kind])
            low = middle + 1;
        else
            high = middle;
    }
    return KINDS * low + kind;
}

// A row's part of a column; `wanted` is what it would be rounded from.
__device__ __forceinline__ void look_around(
    Column& column, const real wanted, const real step, const real* levels, const int count
) {
#pragma unroll
    for (int kind = 0; kind < KINDS; kind++) {
        const int place = nearest(wanted / step, levels, count, kind);
        const real lost = wanted - levels[place] * step;
        column.near[threadIdx.x][kind] = static_cast<u8>(place);
        column.cost[threadIdx.x][kind] = lost * lost;
    }
}

// The best chain of `rows` rows, for one thread; its cost.
__device__ __forceinline__ double best_chain(Column& column, const int rows) {
    // By state u_(n-1) + 2 u_(n-2); into u + 2 v from v and v + 2.
    double cost[KINDS] = {0, NO_PATH, NO_PATH, NO_PATH};
    for (int n = 0; n < rows; n++) {
        const double* const own = column.cost[n];
        const double straight[KINDS] = {cost[0] + own[0], cost[0] + own[2], cost[1] + own[1], cost[1] + own[3]};
        const double other[KINDS] = {cost[2] + own[2], cost[2] + own[0], cost[3] + own[3], cost[3] + own[1]};
        int back = 0;
#pragma unroll
        for (int state = 0; state < KINDS; state++) {
            const bool is_less = other[state] < straight[state];
            back |= is_less << state;
            cost[state] = is_less ? other[state] : straight[state];
        }
        column.back[n] = static_cast<u8>(back);
    }
    int state = 0;
    double least = cost[0];
#pragma unroll
    for (int other = 1; other < KINDS; other++)
        if (cost[other] < least) least = cost[other], state = other;
    for (int n = rows - 1; n >= 0; n--) {
        const int own = state & 1, before = state >> 1, earlier = (column.back[n] >> state) & 1;
        column.place[n] = column.near[n][before + 2 * (own ^ earlier)];
        state = before + 2 * earlier;
    }
    return least;
}

// N rows, from the first of a segment on, by C columns in the order of rounding; see `Tile` of quant/loops.py.
struct Tile {
    const real* wanted;  // [N, C]
    real* fed;           // [N, C]; at the end what all columns before it feed to each
    const real* upper;   // U [C, C]; what lies on and below its diagonal is not used
    const real* scale;   // [N, G]
    const i64* group;    // [C], of each column
    const real* levels;  // [count], ascending
    u8* codes;           // [N, C], places
    real* error;         // [N, C]
    int rows;
    int columns;
    int groups;
    int levels_count;
};

extern "C" __global__ void __launch_bounds__(SEGMENT, BLOCKS) trellis_round(Tile tile) {
    DYNAMIC_SHARED(shared);
    Column& column = *reinterpret_cast<Column*>(shared);
    const int start = blockIdx.x * SEGMENT, rows = min(SEGMENT, tile.rows - start), row = start + threadIdx.x;
    const bool has_row = threadIdx.x < rows;
    const u64 first = static_cast<u64>(row) * tile.columns;
    for (int k = 0; k < tile.columns; k++) {
        real step = 1;
        if (has_row) {
            step = tile.scale[static_cast<u64>(row) * tile.groups + tile.group[k]];
            look_around(column, tile.wanted[first + k] + tile.fed[first + k], step, tile.levels, tile.levels_count);
        }
        __syncthreads();
        if (threadIdx.x == 0) best_chain(column, rows);
        __syncthreads();
        if (has_row) {
            const int place = column.place[threadIdx.x];
            const real lost = tile.wanted[first + k] - tile.levels[place] * step;
            tile.codes[first + k] = static_cast<u8>(place);
            tile.error[first + k] = lost;
            column.moved[threadIdx.x] = lost;
        }
        __syncthreads();
        const real* const row_of_upper = tile.upper + static_cast<u64>(k) * tile.columns;
        for (int n = threadIdx.x / LANES; n < rows; n += SEGMENT / LANES) {
            real* const fed = tile.fed + static_cast<u64>(start + n) * tile.columns;
            for (int j = k + 1 + threadIdx.x % LANES; j < tile.columns; j += LANES)
                fed[j] += column.moved[n] * row_of_upper[j];
        }
        __syncthreads();  // what is fed is there for all
    }
}

// See `Descent` of quant/loops.py.
struct Descent {
    u8* codes;              // [N, K], places, changed in place
    real* error;            // [N, K], likewise
    real* product;          // P = E (H + ridge), [N, K], likewise
    const real* hessian;    // H [K, K]
    const real* curvature;  // [K], the diagonal of H + ridge; 0 in columns that stay as they are
    const real* scale;      // [N, G]
    const real* levels;     // [count], ascending
    double ridge;
    int rows;
    int columns;
    int groups;
    int columns_per_group;
    int levels_count;
    int sweeps;
};

extern "C" __global__ void __launch_bounds__(SEGMENT, BLOCKS) trellis_descend(Descent descent) {
    DYNAMIC_SHARED(shared);
    Column& column = *reinterpret_cast<Column*>(shared);
    const int start = blockIdx.x * SEGMENT, rows = min(SEGMENT, descent.rows - start), row = start + threadIdx.x;
    const bool has_row = threadIdx.x < rows;
    const u64 first = static_cast<u64>(row) * descent.columns;
    const real ridge = static_cast<real>(descent.ridge);
    for (int sweep = 0; sweep < descent.sweeps; sweep++) {
        if (threadIdx.x == 0) column.moved_any = 0;
        for (int k = 0; k < descent.columns; k++) {
            const real curvature = descent.curvature[k];
            if (!(curvature > 0)) continue;  // all threads
            real step = 1;
            if (has_row) {
                step = descent.scale[static_cast<u64>(row) * descent.groups + k / descent.columns_per_group];
                const real away = descent.product[first + k] / curvature;
                column.square[threadIdx.x] = away * away;
                const real now = descent.levels[descent.codes[first + k]] * step;
                look_around(column, now + away, step, descent.levels, descent.levels_count);
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                double before = 0;
                for (int n = 0; n < rows; n++) before += column.square[n];
                column.improves = best_chain(column, rows) < before;
            }
            __syncthreads();
            if (!column.improves) continue;  // all threads
            if (has_row) {
                const int place = column.place[threadIdx.x];
                const real moved = (descent.levels[place] - descent.levels[descent.codes[first + k]]) * step;
                descent.codes[first + k] = static_cast<u8>(place);
                column.moved[threadIdx.x] = moved;
                if (moved != 0) descent.error[first + k] -= moved, column.moved_any = 1;
            }
            __syncthreads();
            const real* const row_of_hessian = descent.hessian + static_cast<u64>(k) * descent.columns;
            for (int n = threadIdx.x / LANES; n < rows; n += SEGMENT / LANES) {
                const real moved = column.moved[n];
                if (moved == 0) continue;
                real* const product = descent.product + static_cast<u64>(start + n) * descent.columns;
                for (int j = threadIdx.x % LANES; j < descent.columns; j += LANES) {
                    product[j] -= moved * row_of_hessian[j];
                    if (j == k) product[j] -= moved * ridge;
                }
            }
            __syncthreads();  // the products are there for all
        }
        __syncthreads();
        const int moved_any = column.moved_any;
        __syncthreads();
        if (!moved_any) return;  // all threads
    }
}
