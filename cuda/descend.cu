// Coordinate descent over the codes of rows (accullm_cli/quant/descent.py).
//
// Moving the code of column k by d steps of size s changes a row's loss by -2 d s slope_k + d^2 s^2 (H_kk + ridge), so
// it moves to the whole number (or the level of a table) next to slope_k / (s (H_kk + ridge)), and then
//
//     slope_j -= d s H_kj  for all j,      slope_k -= d s ridge.
//
// Where rows feed each other, with G, slopes are those of G P, P = E (H + ridge); a move in row n also changes P_nj by
// -d s H_kj, and all slopes of row m by G_mn times as much. Then all rows are a chain, and one block takes one after the
// other. Those of the rows behind it lie in global memory; each thread has the same columns of all of them.
//
//     grid    a row per block                  its slope lies in shared memory, where K numbers fit there
//     block   256 threads, 256 columns at a time:
//
//             would it move?   . . . x . . x . . .      each thread asks for its own column
//             first that would       ^                  it moves; all threads update the slope, which takes all columns
//             go on from               . . . . . . . .  the one behind it
//
// Columns before the first that moves have seen the slope that they would see one after the other, so this is the same
// as to decide in turn. Only some 3 in 100 move; a step that moves nothing takes three barriers for 256 columns.
//
// The limit is the rows of H that the moves read, each K numbers, from L2 or, where K is large, from memory.
#include <real.cuh>

constexpr int THREADS = 256;
constexpr int BLOCKS = 4;  // of a multiprocessor, for which registers suffice; without that NVRTC spills some for 8
constexpr int NOBODY = 0x7FFFFFFF;

// See `Descent` of accullm_cli/quant/loops.py.
struct Descent {
    u8* codes;              // [N, K], changed in place
    real* error;            // [N, K], likewise
    real* slope;            // [N, K], used up (or only read)
    const real* hessian;    // H [K, K]
    const real* curvature;  // [K], the diagonal of H + ridge; 0 in columns that stay as they are
    const real* scale;      // [N, G]
    const real* levels;     // [largest code + 1], what codes stand for; null where they are steps
    real* product;          // P [N, K], changed in place; null where rows do not feed each other
    const real* fisher;     // G [N, N]; likewise
    double ridge;
    int rows;
    int columns;
    int groups;
    int columns_per_group;
    int largest_code;
    int sweeps;
    int slope_is_shared;
};

// What the threads of a block tell each other; the slope follows in shared memory.
struct Turn {
    int mover;   // the first column that would move
    real moved;  // by how much
};
constexpr int TURN_BYTES = 16;
static_assert(sizeof(Turn) <= TURN_BYTES, "the slope begins behind it");

// slope -= by (row of H + ridge at the mover); each thread has the columns that are its number, modulo THREADS.
__device__ __forceinline__ void take(
    real* const slope, const real by, const real* const row_of_hessian, const int mover, const real ridge,
    const int columns
) {
    for (int j = threadIdx.x; j < columns; j += THREADS) {
        slope[j] -= by * row_of_hessian[j];
        if (j == mover) slope[j] -= by * ridge;
    }
}

// Moves codes of one row, as often as it pays.
__device__ __forceinline__ void descend_row(const Descent& descent, const int row, Turn* const turn, real* const shared_slope) {
    const u64 first = static_cast<u64>(row) * descent.columns;
    const real ridge = static_cast<real>(descent.ridge);
    const bool rows_feed = descent.fisher != nullptr;
    const real own_weight = rows_feed ? descent.fisher[static_cast<u64>(row) * descent.rows + row] : 1;
    real* slope = descent.slope + first;
    if (descent.slope_is_shared) {
        slope = shared_slope;
        for (int j = threadIdx.x; j < descent.columns; j += THREADS) slope[j] = descent.slope[first + j];
    }
    for (int count = 0; count < descent.sweeps; count++) {
        bool moved_any = false;
        for (int start = 0; start < descent.columns;) {
            if (threadIdx.x == 0) turn->mover = NOBODY;
            __syncthreads();  // the slope is up to date for all
            const int k = start + threadIdx.x;
            real code = 0, moved = 0;
            if (k < descent.columns) {
                const real step = descent.scale[row * descent.groups + k / descent.columns_per_group];
                real curvature = descent.curvature[k] * step;
                if (rows_feed) curvature *= own_weight;
                if (curvature > 0 || curvature < 0) {  // as the scale is
                    if (descent.levels != nullptr) {
                        const real before = descent.levels[descent.codes[first + k]];
                        const int place =
                            level_code(before + slope[k] / curvature, descent.levels, descent.largest_code);
                        code = place;
                        moved = (descent.levels[place] - before) * step;
                    } else {
                        const real before = descent.codes[first + k];
                        code = between(before + rint(slope[k] / curvature), 0, descent.largest_code);
                        moved = (code - before) * step;
                    }
                }
            }
            if (moved != 0) atomicMin(&turn->mover, k);
            __syncthreads();
            const int mover = turn->mover;
            if (k == mover) {
                turn->moved = moved;
                descent.codes[first + k] = static_cast<u8>(code);
                descent.error[first + k] -= moved;
            }
            __syncthreads();  // all know the mover, and by how much it moved
            if (mover == NOBODY) {
                start += THREADS;
                continue;
            }
            const real* const row_of_hessian = descent.hessian + static_cast<u64>(mover) * descent.columns;
            const real by = turn->moved;
            take(slope, rows_feed ? own_weight * by : by, row_of_hessian, mover, ridge, descent.columns);
            if (rows_feed) {
                take(descent.product + first, by, row_of_hessian, mover, ridge, descent.columns);
                for (int m = row + 1; m < descent.rows; m++) {
                    const u64 place = static_cast<u64>(m);
                    take(
                        descent.slope + place * descent.columns, descent.fisher[place * descent.rows + row] * by,
                        row_of_hessian, mover, ridge, descent.columns
                    );
                }
            }
            moved_any = true;
            start = mover + 1;
        }
        if (!moved_any) return;  // all threads of the block
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) descend(Descent descent) {
    DYNAMIC_SHARED(shared);
    Turn* const turn = reinterpret_cast<Turn*>(shared);
    real* const slope = reinterpret_cast<real*>(shared + TURN_BYTES);
    if (descent.fisher == nullptr) {
        descend_row(descent, blockIdx.x, turn, slope);
        return;
    }
    for (int row = 0; row < descent.rows; row++) descend_row(descent, row, turn, slope);
}
