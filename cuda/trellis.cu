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
// Where rows feed each other, what a row is rounded from hangs on the whole path to a state, of which each of the four
// keeps its own (good_fed_chain of accullm_cli/quant/viterbi.py). Then warps take turns, 32 rows each:
//
//     lane    its row:                     before its turn what each state's path feeds to it, then what that path missed
//     lane    8 ways into 4 states, again and again:  one place each, and of two ways the cheaper one
//             shuffles                     tell all lanes; each takes over, for a state, what its predecessor had
//     warps of the rows behind, at the end of a turn:  add up, row by row, what the paths of those 32 rows missed
//
// So nothing waits for another warp but once in 32 rows, and each sum is added up in the order of the rows. The limit is
// the way from row to row: a division, a place, a sum and three shuffles, one after the other.
#include <real.cuh>

constexpr int SEGMENT = 256;  // rows, and threads of a block
constexpr int BLOCKS = 4;      // of a multiprocessor, see descend.cu
constexpr int FED_BLOCKS = 2;  // likewise, where rows feed each other
constexpr int LANES = 32;
constexpr int KINDS = 4;      // of places, by their remainder; and states
constexpr int MOST_LEVELS = 64;  // that lanes keep the middles of
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

// The same where rows feed each other.
struct FedColumn {
    double cost[KINDS];     // of the path to each state
    double before;          // in descent, the loss as it was
    real wanted[SEGMENT];   // what a row would be rounded from, but for what rows feed to it
    real step[SEGMENT];
    real weight[SEGMENT];
    real moved[SEGMENT];    // what a row passes on; in descent first how far it is from where it would be best
    real term[SEGMENT];     // in descent, its part of the loss as it was
    real missed[2][LANES][KINDS];  // by the paths of the rows whose turn it was, and of those before
    real levels[MOST_LEVELS];
    u8 path[SEGMENT][KINDS];       // places, by the state at the end of the row's turn
    u8 start[SEGMENT / LANES];     // of each turn: for each state at its end, two bits, the state at its beginning
    int moved_any;                 // in descent
};
static_assert(sizeof(FedColumn) == 1080 + 1600 * sizeof(real), "as accullm_cli/kernels/rounding.py has it");

// A warp's turn: the paths through its `count` rows. `value`: by state, what is fed to the lane's row; then what it missed.
__device__ __forceinline__ void walk(
    FedColumn& column, real (&value)[KINDS], const real* const upper, const int rows, const int levels_count
) {
    const int lane = threadIdx.x % LANES, turn = threadIdx.x / LANES, first = turn * LANES;
    const int count = min(LANES, rows - first);
    // The way into a state, u + 2 v, from v or from v + 2; of kind v + 2 (u XOR what u_(n-2) was).
    const int into = lane % KINDS, is_upper = lane / KINDS % 2, from = into / 2 + 2 * is_upper;
    const int kind = into / 2 + 2 * (into % 2 ^ is_upper), middles = levels_count / KINDS - 1;
    real middle[MOST_LEVELS / KINDS - 1];
#pragma unroll
    for (int j = 0; j < MOST_LEVELS / KINDS - 1; j++)
        middle[j] = j < middles ? column.levels[KINDS * j + kind] + column.levels[KINDS * (j + 1) + kind] : 0;
    double cost = column.cost[from];
    int start = 0xE4;  // 3, 2, 1, 0: each state its own
    u32 places[KINDS] = {0, 0, 0, 0};
    double best = NO_PATH;
    for (int i = 0; i < count; i++) {
        const real wanted = column.wanted[first + i], step = column.step[first + i];
        // Nothing is fed to rows before this one, or beyond the last.
        const bool is_fed = lane > i && lane < count;
        const real by = is_fed ? upper[static_cast<u64>(first + i) * rows + first + lane] : 0;
        real position = wanted;
#pragma unroll
        for (int state = 0; state < KINDS; state++) {
            const real fed = __shfl_sync(0xFFFFFFFF, value[state], i);
            if (state == from) position = wanted + fed;
        }
        const real place_wanted = position / step, twice = place_wanted + place_wanted;
        int place = 0;
#pragma unroll
        for (int j = 0; j < MOST_LEVELS / KINDS - 1; j++) place += j < middles && twice > middle[j];
        place = KINDS * place + kind;
        const real point = column.levels[place] * step, lost = position - point;
        const double total = cost == NO_PATH ? NO_PATH : cost + column.weight[first + i] * lost * lost;
        // Of two ways the cheaper one, the lower one where both cost the same.
        const int partner = lane ^ KINDS;
        const double other = __shfl_sync(0xFFFFFFFF, total, partner);
        const real own_missed = wanted - point, other_missed = __shfl_sync(0xFFFFFFFF, own_missed, partner);
        const int other_place = __shfl_sync(0xFFFFFFFF, place, partner);
        const bool takes_upper = is_upper ? total < other : other < total, is_own = takes_upper == (is_upper == 1);
        best = is_own ? total : other;
        const real missed = is_own ? own_missed : other_missed;
        const int way = (is_own ? place : other_place) + 256 * takes_upper;
        real next[KINDS];
        u32 next_places[KINDS];
        int next_start = 0;
#pragma unroll
        for (int state = 0; state < KINDS; state++) {
            const int its_way = __shfl_sync(0xFFFFFFFF, way, state), low = state / 2;
            const real its_missed = __shfl_sync(0xFFFFFFFF, missed, state);
            const bool is_high = its_way >= 256;
            const real before = is_high ? value[low + 2] : value[low];
            next[state] = lane == i ? its_missed : is_fed ? before + by * its_missed : before;
            next_places[state] = lane == i ? its_way % 256 : is_high ? places[low + 2] : places[low];
            next_start |= (start >> 2 * (low + 2 * is_high) & 3) << 2 * state;
        }
#pragma unroll
        for (int state = 0; state < KINDS; state++) value[state] = next[state], places[state] = next_places[state];
        start = next_start;
        cost = __shfl_sync(0xFFFFFFFF, best, from);
    }
#pragma unroll
    for (int state = 0; state < KINDS; state++) {
        column.missed[turn % 2][lane][state] = value[state];
        column.path[threadIdx.x][state] = static_cast<u8>(places[state]);
    }
    if (lane < KINDS) column.cost[lane] = best;
    if (lane == 0) column.start[turn] = static_cast<u8>(start);
}

// A chain of small loss of rows that feed each other: the place of the thread's own row. `least`: the loss, for all.
//
// The column's wanted, step, weight and levels are there for all; its costs are the first state's alone.
__device__ __forceinline__ int good_fed_chain(
    FedColumn& column, const real* const upper, const int rows, const int levels_count, double& least
) {
    const int own = threadIdx.x / LANES, turns = (rows + LANES - 1) / LANES;
    real value[KINDS] = {0, 0, 0, 0};
    for (int turn = 0; turn < turns; turn++) {
        if (own == turn) walk(column, value, upper, rows, levels_count);
        __syncthreads();
        if (own <= turn || threadIdx.x >= rows) continue;
        const int start = column.start[turn];
        real before[KINDS];
#pragma unroll
        for (int state = 0; state < KINDS; state++) before[state] = value[state];
#pragma unroll
        for (int state = 0; state < KINDS; state++) {
            const int from = start >> 2 * state & 3;
            value[state] = from == 0 ? before[0] : from == 1 ? before[1] : from == 2 ? before[2] : before[3];
        }
#pragma unroll 8
        for (int i = 0; i < LANES; i++) {  // a turn before the last one has all its rows
            const real by = upper[static_cast<u64>(turn * LANES + i) * rows + threadIdx.x];
#pragma unroll
            for (int state = 0; state < KINDS; state++) value[state] += by * column.missed[turn % 2][i][state];
        }
    }
    int state = 0;
    least = column.cost[0];
#pragma unroll
    for (int other = 1; other < KINDS; other++)
        if (column.cost[other] < least) least = column.cost[other], state = other;
    for (int turn = turns - 1; turn > own; turn--) state = column.start[turn] >> 2 * state & 3;
    return column.path[threadIdx.x][state];
}

// What a chain begins with; also levels and weights, which all columns have.
__device__ __forceinline__ void begin(FedColumn& column) {
    if (threadIdx.x < KINDS) column.cost[threadIdx.x] = threadIdx.x == 0 ? 0 : NO_PATH;
}
__device__ __forceinline__ void prepare(
    FedColumn& column, const real* const levels, const int levels_count, const real* const weight, const int rows
) {
    if (threadIdx.x < levels_count) column.levels[threadIdx.x] = levels[threadIdx.x];
    if (threadIdx.x < rows) column.weight[threadIdx.x] = weight[threadIdx.x];
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
    // Where rows feed each other, of at most one segment; else null.
    const real* row_fed;     // [N, C], what other rows feed to each
    const real* row_upper;   // V [N, N]; what lies on and below its diagonal is not used
    const real* row_weight;  // [N], the diagonal of R
    int rows;
    int columns;
    int groups;
    int levels_count;
};

// A row's code, and what it passes on.
__device__ __forceinline__ real settle(const Tile& tile, const int place, const real step, const u64 at) {
    const real lost = tile.wanted[at] - tile.levels[place] * step;
    tile.codes[at] = static_cast<u8>(place);
    tile.error[at] = lost;
    return lost;
}

// Feeds to the columns behind k what rows lost there.
__device__ __forceinline__ void pass_on(const Tile& tile, const real (&lost)[SEGMENT], const int start, const int rows, const int k) {
    const real* const row_of_upper = tile.upper + static_cast<u64>(k) * tile.columns;
    for (int n = threadIdx.x / LANES; n < rows; n += SEGMENT / LANES) {
        real* const fed = tile.fed + static_cast<u64>(start + n) * tile.columns;
        for (int j = k + 1 + threadIdx.x % LANES; j < tile.columns; j += LANES) fed[j] += lost[n] * row_of_upper[j];
    }
}

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
        if (has_row) column.moved[threadIdx.x] = settle(tile, column.place[threadIdx.x], step, first + k);
        __syncthreads();
        pass_on(tile, column.moved, start, rows, k);
        __syncthreads();  // what is fed is there for all
    }
}

// A tile per block, whose rows feed each other.
extern "C" __global__ void __launch_bounds__(SEGMENT, FED_BLOCKS) trellis_round_fed(const Tile* tiles) {
    DYNAMIC_SHARED(shared);
    FedColumn& column = *reinterpret_cast<FedColumn*>(shared);
    const Tile tile = tiles[blockIdx.x];
    const bool has_row = threadIdx.x < tile.rows;
    const u64 first = static_cast<u64>(threadIdx.x) * tile.columns;
    prepare(column, tile.levels, tile.levels_count, tile.row_weight, tile.rows);
    for (int k = 0; k < tile.columns; k++) {
        begin(column);
        if (has_row) {
            const u64 at = first + k;
            column.step[threadIdx.x] = tile.scale[static_cast<u64>(threadIdx.x) * tile.groups + tile.group[k]];
            column.wanted[threadIdx.x] = tile.wanted[at] + tile.fed[at] + tile.row_fed[at];
        }
        __syncthreads();
        double least;
        const int place = good_fed_chain(column, tile.row_upper, tile.rows, tile.levels_count, least);
        if (has_row) column.moved[threadIdx.x] = settle(tile, place, column.step[threadIdx.x], first + k);
        __syncthreads();
        pass_on(tile, column.moved, 0, tile.rows, k);
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
    // Where rows feed each other, of one segment; else null.
    const real* row_slope;   // [N, K], what other rows add to P
    const real* row_upper;   // V [N, N]; what lies on and below its diagonal is not used
    const real* row_weight;  // [N], the diagonal of R
    double ridge;
    int rows;
    int columns;
    int groups;
    int columns_per_group;
    int levels_count;
    int sweeps;
};

// A row's code, and by how much it moved.
__device__ __forceinline__ real move(const Descent& descent, const int place, const real step, const u64 at, int& moved_any) {
    const real moved = (descent.levels[place] - descent.levels[descent.codes[at]]) * step;
    descent.codes[at] = static_cast<u8>(place);
    if (moved != 0) descent.error[at] -= moved, moved_any = 1;
    return moved;
}

// What moves of column k change in the products of their rows.
__device__ __forceinline__ void take(const Descent& descent, const real (&moves)[SEGMENT], const int start, const int rows, const int k) {
    const real* const row_of_hessian = descent.hessian + static_cast<u64>(k) * descent.columns;
    const real ridge = static_cast<real>(descent.ridge);
    for (int n = threadIdx.x / LANES; n < rows; n += SEGMENT / LANES) {
        const real moved = moves[n];
        if (moved == 0) continue;
        real* const product = descent.product + static_cast<u64>(start + n) * descent.columns;
        for (int j = threadIdx.x % LANES; j < descent.columns; j += LANES) {
            product[j] -= moved * row_of_hessian[j];
            if (j == k) product[j] -= moved * ridge;
        }
    }
}

extern "C" __global__ void __launch_bounds__(SEGMENT, BLOCKS) trellis_descend(Descent descent) {
    DYNAMIC_SHARED(shared);
    Column& column = *reinterpret_cast<Column*>(shared);
    const int start = blockIdx.x * SEGMENT, rows = min(SEGMENT, descent.rows - start), row = start + threadIdx.x;
    const bool has_row = threadIdx.x < rows;
    const u64 first = static_cast<u64>(row) * descent.columns;
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
            if (has_row)
                column.moved[threadIdx.x] = move(descent, column.place[threadIdx.x], step, first + k, column.moved_any);
            __syncthreads();
            take(descent, column.moved, start, rows, k);
            __syncthreads();  // the products are there for all
        }
        __syncthreads();
        const int moved_any = column.moved_any;
        __syncthreads();
        if (!moved_any) return;  // all threads
    }
}

// One segment, whose rows feed each other, in one block.
extern "C" __global__ void __launch_bounds__(SEGMENT, FED_BLOCKS) trellis_descend_fed(Descent descent) {
    DYNAMIC_SHARED(shared);
    FedColumn& column = *reinterpret_cast<FedColumn*>(shared);
    const int rows = descent.rows, row = threadIdx.x;
    const bool has_row = row < rows;
    const u64 first = static_cast<u64>(row) * descent.columns;
    prepare(column, descent.levels, descent.levels_count, descent.row_weight, rows);
    for (int sweep = 0; sweep < descent.sweeps; sweep++) {
        if (row == 0) column.moved_any = 0;
        for (int k = 0; k < descent.columns; k++) {
            const real curvature = descent.curvature[k];
            if (!(curvature > 0)) continue;  // all threads
            const u64 at = first + k;
            begin(column);
            real away = 0;
            if (has_row) {
                const real step = descent.scale[static_cast<u64>(row) * descent.groups + k / descent.columns_per_group];
                away = descent.product[at] / curvature + descent.row_slope[at] / curvature;
                column.moved[row] = away;
                column.step[row] = step;
                column.wanted[row] = descent.levels[descent.codes[at]] * step + away;
            }
            __syncthreads();
            if (has_row) {
                real fed = 0;
#pragma unroll 8
                for (int n = 0; n < row; n++) fed += descent.row_upper[static_cast<u64>(n) * rows + row] * column.moved[n];
                const real own = away + fed;
                column.term[row] = column.weight[row] * own * own;
            }
            __syncthreads();
            if (row == SEGMENT - 1) {  // of the warp whose turn comes last
                double before = 0;
                for (int n = 0; n < rows; n++) before += column.term[n];
                column.before = before;
            }
            double least;
            const int place = good_fed_chain(column, descent.row_upper, rows, descent.levels_count, least);
            const bool improves = least < column.before;
            __syncthreads();  // all have read what the next column begins with
            if (!improves) continue;  // all threads
            if (has_row) column.moved[row] = move(descent, place, column.step[row], at, column.moved_any);
            __syncthreads();
            take(descent, column.moved, 0, rows, k);
            __syncthreads();  // the products are there for all
        }
        __syncthreads();
        const int moved_any = column.moved_any;
        __syncthreads();
        if (!moved_any) return;  // all threads
    }
}
