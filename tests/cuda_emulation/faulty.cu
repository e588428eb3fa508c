// Kernels with one fault each, which the emulation has to find: tests/kernels/test_emulation.py.
// Each writes out[i] = 2 * in[i] for one block of 64 threads, if it were right.
#include <ptx.cuh>

extern "C" __global__ void right(const float* in, float* out) {
    DYNAMIC_SHARED(shared);
    float* const numbers = reinterpret_cast<float*>(shared);
    copy_async_4(numbers + threadIdx.x, in + threadIdx.x, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    const int other = 63 - threadIdx.x;
    out[other] = 2 * numbers[other];
}

extern "C" __global__ void without_barrier(const float* in, float* out) {
    DYNAMIC_SHARED(shared);
    float* const numbers = reinterpret_cast<float*>(shared);
    copy_async_4(numbers + threadIdx.x, in + threadIdx.x, true);
    commit_copies();
    wait_for_copies<0>();
    const int before = threadIdx.x > 0 ? threadIdx.x - 1 : 0;
    out[before] = 2 * numbers[before];
    if (threadIdx.x == 63) out[63] = 2 * numbers[63];
}

extern "C" __global__ void without_wait(const float* in, float* out) {
    DYNAMIC_SHARED(shared);
    float* const numbers = reinterpret_cast<float*>(shared);
    copy_async_4(numbers + threadIdx.x, in + threadIdx.x, true);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    out[threadIdx.x] = 2 * numbers[threadIdx.x];
}

// The second copy goes where the first warp still reads the first one's numbers.
extern "C" __global__ void copied_too_early(const float* in, float* out) {
    DYNAMIC_SHARED(shared);
    float* const numbers = reinterpret_cast<float*>(shared);
    copy_async_4(numbers + threadIdx.x, in + threadIdx.x, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    copy_async_4(numbers + threadIdx.x, in, true);
    commit_copies();
    const int other = 63 - threadIdx.x;
    out[other] = 2 * numbers[other];
}

extern "C" __global__ void beside_the_input(const float* in, float* out) {
    DYNAMIC_SHARED(shared);
    copy_async_4(shared + 4 * threadIdx.x, in + threadIdx.x + 1, true);
}

extern "C" __global__ void beside_the_output(const float* in, float* out) { out[threadIdx.x + 1] = 2 * in[threadIdx.x]; }

extern "C" __global__ void beside_shared_memory(const float* in, float* out) {
    DYNAMIC_SHARED(shared);
    reinterpret_cast<float*>(shared)[threadIdx.x + 1] = in[threadIdx.x];
}

extern "C" __global__ void copies_beside_shared_memory(const float* in, float* out) {
    DYNAMIC_SHARED(shared);
    copy_async_4(shared + 4 * threadIdx.x + 4, in + threadIdx.x, true);
}

extern "C" __global__ void unaligned(const float* in, float* out) {
    DYNAMIC_SHARED(shared);
    copy_async_16(shared, in + 1, true);
}

extern "C" __global__ void unfinished(const float* in, float* out) {
    if (threadIdx.x != 17) out[threadIdx.x] = 2 * in[threadIdx.x];
}

extern "C" __global__ void barrier_for_some(const float* in, float* out) {
    if (threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = 2 * in[threadIdx.x];
}

extern "C" __global__ void two_barriers(const float* in, float* out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 2 * in[threadIdx.x];
}

extern "C" __global__ void shuffle_for_some(const float* in, float* out) {
    float value = in[threadIdx.x];
    if (threadIdx.x % 32 < 31) value = __shfl_sync(0xFFFFFFFF, value, threadIdx.x);
    out[threadIdx.x] = 2 * value;
}
