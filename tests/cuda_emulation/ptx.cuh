// Stands in for cuda/ptx.cuh where the host's compiler builds the kernels: the same functions, on the CPU.
#pragma once
#include "emulation.h"

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

#define DYNAMIC_SHARED(name) u8* const name = emulation::shared_memory

// -- copies into shared memory -------------------------------------------------------------------------------------

static inline void copy_async(void* shared, const void* global, int bytes, bool valid) {
    emulation::check_shared(shared, bytes, "copy");
    // The hardware wants an aligned source also where it does not read it.
    if (reinterpret_cast<uintptr_t>(global) % bytes) emulation::fail("copy: source is not aligned");
    if (valid) emulation::check_global(global, bytes, "copy");
    emulation::begin_copy({shared, global, bytes, valid});
}
static inline void copy_async_16(void* shared, const void* global, bool valid) { copy_async(shared, global, 16, valid); }
static inline void copy_async_4(void* shared, const void* global, bool valid) { copy_async(shared, global, 4, valid); }

static inline void commit_copies() {
    emulation::current->groups.push_back(std::move(emulation::current->open));
    emulation::current->open.clear();
}

template <int pending>
static inline void wait_for_copies() {
    auto& groups = emulation::current->groups;
    while (groups.size() > pending) {
        emulation::land(groups.front());
        groups.erase(groups.begin());
    }
}

// -- loads ---------------------------------------------------------------------------------------------------------

static inline uint4 load_16(const void* pointer, bool valid) {
    if (!valid) return make_uint4(0, 0, 0, 0);
    emulation::check_global(pointer, 16, "load");
    return *static_cast<const uint4*>(pointer);
}

// -- memory shared between blocks ----------------------------------------------------------------------------------

static inline float load_from_l2(const float* pointer) {
    emulation::check_global(pointer, 4, "load");
    return *pointer;
}

template <class Value>
static inline Value kept(Value value) {
    return value;
}

// -- numbers -------------------------------------------------------------------------------------------------------

static inline float __uint_as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline u32 __float_as_uint(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_from_half(u16 bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}
// From double: two float16 sums and products are exact there, or so nearly that rounding them twice needs a tie of 40
// bits.
static inline u16 half_from_double(double value) {
    const auto half = static_cast<_Float16>(value);
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
static inline u16 half_from_float(float value) { return half_from_double(value); }

static inline float float_from_bfloat(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }
static inline u16 bfloat_from_float(float value) {
    const u32 bits = __float_as_uint(value);
    if (value != value) return static_cast<u16>(bits >> 16 | 0x40);
    return static_cast<u16>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
// Rounding to float first would round twice: make that step round to odd, which leaves the second one right.
static inline u16 bfloat_from_double(double value) {
    float nearest = static_cast<float>(value);
    if (static_cast<double>(nearest) != value && nearest == nearest) {
        if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) nearest = std::nextafterf(nearest, 0.0f);
        nearest = __uint_as_float(__float_as_uint(nearest) | 1);
    }
    return bfloat_from_float(nearest);
}
static inline u32 bfloat2_from_floats(float lower, float upper) {
    return bfloat_from_float(lower) | static_cast<u32>(bfloat_from_float(upper)) << 16;
}

static inline float float_from_compute(u16 bits) {
    return COMPUTE_BF16 ? float_from_bfloat(bits) : float_from_half(bits);
}
static inline u16 compute_from_float(float value) {
    return COMPUTE_BF16 ? bfloat_from_float(value) : half_from_float(value);
}

template <u32 mask, u32 magic>
static inline u32 and_or(u32 word) {
    return (word & mask) | magic;
}

static inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
    const u64 bytes = static_cast<u64>(high) << 32 | low;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 which = selector >> 4 * i & 15;
        u32 byte = static_cast<u32>(bytes >> 8 * (which & 7)) & 0xFF;
        if (which & 8) byte = byte & 0x80 ? 0xFF : 0;
        result |= byte << 8 * i;
    }
    return result;
}

template <class Operation>
static inline u32 each_half(Operation operation) {
    return half_from_double(operation(0)) | static_cast<u32>(half_from_double(operation(16))) << 16;
}
static inline double half_at(u32 pair, int shift) { return float_from_half(static_cast<u16>(pair >> shift)); }
static inline u32 subtract_half2(u32 a, u32 b) {
    return each_half([=](int at) { return half_at(a, at) - half_at(b, at); });
}
static inline u32 multiply_half2(u32 a, u32 b) {
    return each_half([=](int at) { return half_at(a, at) * half_at(b, at); });
}
static inline u32 fma_half2(u32 a, u32 b, u32 c) {
    return each_half([=](int at) { return half_at(a, at) * half_at(b, at) + half_at(c, at); });
}
static inline u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    auto one = [=](int at) {
        const double x = float_from_bfloat(a >> at), y = float_from_bfloat(b >> at), z = float_from_bfloat(c >> at);
        return bfloat_from_double(x * y + z);
    };
    return one(0) | static_cast<u32>(one(16)) << 16;
}

// -- tensor cores --------------------------------------------------------------------------------------------------

namespace emulation {
enum Kind { MULTIPLY_ACCUMULATE = 1, SHUFFLE = 2, BARRIER = 3 };

static void multiply_accumulate_warp(Thread* warp) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const int row = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++)
                a[row + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] =
                    float_from_compute(static_cast<u16>(warp[lane].operands[i] >> 16 * half));
            for (int i = 0; i < 2; i++)
                b[2 * t + 8 * i + half][row] =
                    float_from_compute(static_cast<u16>(warp[lane].operands[4 + i] >> 16 * half));
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++) {
            const int m = lane / 4 + 8 * (i / 2), n = lane % 4 * 2 + i % 2;
            double sum = __uint_as_float(warp[lane].results[i]);
            for (int k = 0; k < 16; k++) sum += a[m][k] * b[k][n];
            warp[lane].results[i] = __float_as_uint(static_cast<float>(sum));
        }
    }
}

static void shuffle_warp(Thread* warp) {
    unsigned low[32], high[32];
    for (int lane = 0; lane < 32; lane++) {
        const unsigned source = warp[lane].operands[0] % 32;
        low[lane] = warp[source].operands[1], high[lane] = warp[source].operands[2];
    }
    for (int lane = 0; lane < 32; lane++) warp[lane].results[0] = low[lane], warp[lane].results[1] = high[lane];
}

static const bool installed = [] {
    finish_warp = [](int kind, Thread* warp) {
        if (kind == MULTIPLY_ACCUMULATE) multiply_accumulate_warp(warp);
        if (kind == SHUFFLE) shuffle_warp(warp);
    };
    return true;
}();
}  // namespace emulation

static inline void multiply_accumulate(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulation::Thread& self = *emulation::current;
    for (int i = 0; i < 4; i++) self.operands[i] = a[i], self.results[i] = __float_as_uint(c[i]);
    self.operands[4] = b0, self.operands[5] = b1;
    emulation::meet(emulation::MULTIPLY_ACCUMULATE, true);
    for (int i = 0; i < 4; i++) c[i] = __uint_as_float(self.results[i]);
}

static inline void __syncwarp() { emulation::meet(emulation::BARRIER, true); }

template <class Number>
static inline Number __shfl_sync(u32 mask, Number value, int source) {
    emulation::Thread& self = *emulation::current;
    if (mask != 0xFFFFFFFF) emulation::fail("shuffle: not all of the warp");
    u64 bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    self.operands[0] = source, self.operands[1] = static_cast<u32>(bits), self.operands[2] = bits >> 32;
    emulation::meet(emulation::SHUFFLE, true);
    bits = self.results[0] | static_cast<u64>(self.results[1]) << 32;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
