// Everything that is not plain C++: inline PTX, and what depends on the architecture.
//
// The kernels include this as <ptx.cuh> and are otherwise free of assembly, so that a header of the same name can stand
// in for it where the host's compiler builds them (the tests do that).
//
// Registers that hold two 16-bit numbers are `u32`, the lower half first. Which 16-bit format the numbers have is
// decided for a whole compilation: COMPUTE_BF16 is 0 (IEEE half) or 1 (bfloat16). What codes stand for is, too: LEVELS is
// 0 (steps from a zero point), 1 (places in a table) or 2 (a trellis), see layout.cuh.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#ifndef COMPUTE_BF16
#define COMPUTE_BF16 0
#endif

#ifndef LEVELS
#define LEVELS 0
#endif

#if COMPUTE_BF16 && __CUDA_ARCH__ < 800
#error "bfloat16 needs compute capability 8.0: tensor cores before it know float16 alone"
#endif

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

// -- copies into shared memory -------------------------------------------------------------------------------------
// From compute capability 8.0 on they run behind the thread's back; before it they are loads and stores, and waiting
// for them is a no-op.

#if __CUDA_ARCH__ >= 800

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, past L1 (each is used by one block alone); zeros where not `valid`: `global` is not read then.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

// Ends a group of copies of this thread; a group may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's latest groups are under way.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
    *static_cast<uint4*>(shared) = valid ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool valid) {
    *static_cast<u32*>(shared) = valid ? __ldg(static_cast<const u32*>(global)) : 0;
}

__device__ __forceinline__ void commit_copies() {}

template <int pending>
__device__ __forceinline__ void wait_for_copies() {}

#endif

// -- loads ---------------------------------------------------------------------------------------------------------

// 16 bytes that no launch writes; zeros where not `valid`: nothing is read then.
__device__ __forceinline__ uint4 load_16(const void* pointer, bool valid) {
    uint4 value = make_uint4(0, 0, 0, 0);
    if (valid) value = __ldg(static_cast<const uint4*>(pointer));
    return value;
}

// -- memory shared between blocks ----------------------------------------------------------------------------------

// Past L1, which other multiprocessors' stores do not reach.
__device__ __forceinline__ float load_from_l2(const float* pointer) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(pointer) : "memory");
    return value;
}

// -- what the compiler should not work out anew --------------------------------------------------------------------

// A value as it is, but of unknown origin: without it NVRTC computes addresses again in every iteration, from the thread's
// index on, although registers are free.
__device__ __forceinline__ int kept(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

template <class Element>
__device__ __forceinline__ const Element* kept(const Element* pointer) {
    asm volatile("" : "+l"(pointer));
    return pointer;
}

// -- bits ----------------------------------------------------------------------------------------------------------

// (word & mask) | magic in one instruction; the compiler by itself sometimes makes two of it.
template <u32 mask, u32 magic>
__device__ __forceinline__ u32 and_or(u32 word) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "n"(mask), "n"(magic));  // 0xEA: (a & b) | c
    return result;
}

// Four bytes of eight, those of `low` first; each nibble of the lower half of `selector` names one, lowest first. Where the
// nibble's upper bit is set, all bits of the byte are the upper one of what its other three name.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-prmt
__device__ __forceinline__ u32 permute_bytes(u32 low, u32 high, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

// -- two 16-bit numbers at once, each rounded once, to nearest even ------------------------------------------------

__device__ __forceinline__ u32 subtract_half2(u32 a, u32 b) {
    u32 result;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

__device__ __forceinline__ u32 multiply_half2(u32 a, u32 b) {
    u32 result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

__device__ __forceinline__ u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

#if COMPUTE_BF16
// The one arithmetic instruction on bfloat16 that compute capability 8.0 has.
__device__ __forceinline__ u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
#endif

// -- conversions ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ float float_from_half(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 half_from_float(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float float_from_bfloat(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }

__device__ __forceinline__ u16 bfloat_from_float(float value) {
#if __CUDA_ARCH__ >= 800
    u16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
#endif
    const u32 bits = __float_as_uint(value);
    return static_cast<u16>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#if COMPUTE_BF16
__device__ __forceinline__ u32 bfloat2_from_floats(float lower, float upper) {
    u32 rounded;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(rounded) : "f"(upper), "f"(lower));
    return rounded;
}
#endif

// To and from the 16-bit format of this compilation.
__device__ __forceinline__ float float_from_compute(u16 bits) {
    return COMPUTE_BF16 ? float_from_bfloat(bits) : float_from_half(bits);
}

__device__ __forceinline__ u16 compute_from_float(float value) {
    return COMPUTE_BF16 ? bfloat_from_float(value) : half_from_float(value);
}

// -- tensor cores --------------------------------------------------------------------------------------------------

// c += a b for a [16, 16], b [16, 8], c [16, 8] float32, spread over a warp. With row = lane / 4 and t = lane % 4:
//   a[0]: (row, 2t and 2t+1)   a[1]: (row+8, the same)   a[2]: (row, 2t+8 and 2t+9)   a[3]: (row+8, the same)
//   b0: (2t and 2t+1, row)     b1: (2t+8 and 2t+9, row)
//   c[0]: (row, 2t)   c[1]: (row, 2t+1)   c[2]: (row+8, 2t)   c[3]: (row+8, 2t+1)
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float
__device__ __forceinline__ void multiply_accumulate(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if COMPUTE_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    // Compute capability 7.5 takes 8 columns of k at a time.
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
