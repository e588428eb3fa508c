// What hybrid_gemv.cu and hybrid_gemm.cu share: gathering outliers, and writing sums that may come from several blocks.
#pragma once
#include <layout.cuh>

// One launch's activations and results.
struct Product {
    const u16* x;      // [tokens, x_stride], in the compute format; K columns, then zeros up to a multiple of 8
    const u16* bias;   // [N], in the compute format; null for none
    u16* y;            // [tokens, N], in the compute format
    float* partial;    // [splits, tokens, strips * 16]; used where K is split between blocks
    u32* arrived;      // one counter per group of blocks that split K, 0 before the launch; used where K is split
    u64 x_stride;      // in numbers; a multiple of 8, and x a multiple of 16 bytes, so that eight come in one load
    int tokens;        // M
};

// Fetches the activations of outlier slots `first` to `first + count - 1` of `tokens` rows: [tokens, stride].
// The threads of a block share the work; __syncthreads() makes it visible.
__device__ __forceinline__ void gather_outliers(u16* shared, int stride, const Product& product, const Weight& weight,
                                                int first_token, int tokens, int first, int count) {
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens * count; i += blockDim.x) {
        const int token = i / count, slot = i % count;
        const int feature = weight.outlier_index[first + slot];
        const bool there = feature >= 0 && first_token + token < product.tokens;
        const u64 place = (first_token + token) * product.x_stride + feature;
        shared[token * stride + slot] = there ? product.x[place] : u16(0);
    }
}

// Writes y of one block: `tokens` by `features` sums, which `sum(token, feature)` gives. Where K is split between
// gridDim.z blocks, each leaves its sums in `partial`, and the last to arrive adds them up, in the order of the splits
// and not of arrival: so the result never depends on timing. All threads of the block call this.
//
// flag: four bytes of shared memory that nothing else uses by then.
template <class Sum>
__device__ __forceinline__ void write_sums(const Product& product, const Weight& weight, int first_token, int tokens,
                                           int first_feature, int features, u32* arrived, u32* flag, Sum sum) {
    const int splits = gridDim.z, width = strips_of(weight) * STRIP;
    const int kept = min(features, weight.out_features - first_feature);
    const u64 plane = static_cast<u64>(product.tokens) * width;
    if (splits > 1) {
        for (int i = threadIdx.x; i < tokens * features; i += blockDim.x) {
            const int token = i / features, feature = i % features;
            const u64 place = static_cast<u64>(first_token + token) * width + first_feature + feature;
            if (feature < kept) product.partial[blockIdx.z * plane + place] = sum(token, feature);
        }
        __threadfence();  // the sums are visible before the arrival is
        __syncthreads();
        if (threadIdx.x == 0) *flag = atomicAdd(arrived, 1u);
        __syncthreads();
        if (*flag != static_cast<u32>(splits) - 1) return;
        __threadfence();
    }
    for (int i = threadIdx.x; i < tokens * features; i += blockDim.x) {
        const int token = i / features, feature = i % features;
        if (feature >= kept) continue;
        float value = 0;
        if (splits > 1) {
            const u64 place = static_cast<u64>(first_token + token) * width + first_feature + feature;
            for (int split = 0; split < splits; split++) value += load_from_l2(product.partial + split * plane + place);
        } else {
            value = sum(token, feature);
        }
        if (product.bias != nullptr) value += float_from_compute(product.bias[first_feature + feature]);
        const u64 place = static_cast<u64>(first_token + token) * weight.out_features + first_feature + feature;
        product.y[place] = compute_from_float(value);
    }
}
