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
__device__ __forceinline__ real between(real value, real low, real high) { return larger(smaller(value, high), low); }
