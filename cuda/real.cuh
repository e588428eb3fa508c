// What the kernels of rounding share: the working format, REAL, which is float or double.
//
// They are compiled without contraction of products and sums (--fmad=false) and do in the same order what the compiled
// loops of the CPU do (accullm_cli/quant/loops.py), so that the same arguments give the same bits.
#pragma once
#include <ptx.cuh>

#ifndef REAL
#define REAL float
#endif
using real = REAL;
using i64 = long long;

__device__ __forceinline__ real smaller(real a, real b) { return a < b ? a : b; }
__device__ __forceinline__ real larger(real a, real b) { return a > b ? a : b; }
// The code of the level nearest to `place`, of two the lower one; 0 where `place` is not a number.
__device__ __forceinline__ int level_code(real place, const real* levels, int largest_code) {
    int low = 0, high = largest_code;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (place + place > levels[middle] + levels[middle + 1])
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

__device__ __forceinline__ real between(real value, real low, real high) { return larger(smaller(value, high), low); }
