/* Tiles of 16 rows on the tensor cores: scores of a slice of keys, what happens to them, and the product with the values.
 *
 * A warp holds 16 rows. In a score or value tile of 8 columns lane i holds columns 2 * (i % 4) and the next of rows i / 4 and i / 4 + 8. */
#ifndef SA_CUDA_MULTIPLY_CUH
#define SA_CUDA_MULTIPLY_CUH

#include "finish.cuh"

namespace sa
{

/* Where piece (16 bytes) of a row lies: rows are swizzled so that ldmatrix meets no bank twice. */
template <int depth> __device__ __forceinline__ uint32_t piece_at(int row, int piece)
{
    return row * (depth * 2) + ((piece ^ (row & 7)) * 16);
}

template <int depth> struct warp_state {
    float maximum[2], sum[2], values[depth / 8][4];
};

template <int depth> __device__ __forceinline__ void clear_state(warp_state<depth> &state)
{
    state = {{-infinity, -infinity}, {0.0f, 0.0f}, {}};
}

/* Scores of 16 rows and a slice, passed by value where a function is not inlined: an address that escapes would keep them in memory. */
template <int slice> struct score_tile {
    float at[slice / 8][4];
};

/* Products of a warp's rows, blocks of 16, with those of a slice. */
template <typename T, int depth, int slice, int blocks>
__device__ __forceinline__ void multiply_rows(uint32_t rows, uint32_t others, score_tile<slice> (&products)[blocks])
{
    const int lane = threadIdx.x % 32, row = lane % 16, other = lane % 8 + lane / 16 * 8, side = lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < depth / 16; step++) {
        uint32_t a[blocks][4], b[4];
#pragma unroll
        for (int i = 0; i < blocks; i++) {
            load_matrices(a[i], rows + piece_at<depth>(16 * i + row, 2 * step + lane / 16));
        }
#pragma unroll
        for (int pair = 0; pair < slice / 16; pair++) {
            load_matrices(b, others + piece_at<depth>(pair * 16 + other, 2 * step + side));
#pragma unroll
            for (int i = 0; i < blocks; i++) {
                T::multiply(products[i].at[2 * pair], a[i], b[0], b[1]);
                T::multiply(products[i].at[2 * pair + 1], a[i], b[2], b[3]);
            }
        }
    }
}

template <typename T, int depth, int slice>
__device__ __forceinline__ void multiply_keys(uint32_t queries, uint32_t keys, score_tile<slice> &scores)
{
    const int lane = threadIdx.x % 32, row = lane % 16, key = lane % 8 + lane / 16 * 8, side = lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < depth / 16; step++) {
        uint32_t a[4], b[4];
        load_matrices(a, queries + piece_at<depth>(row, 2 * step + lane / 16));
#pragma unroll
        for (int pair = 0; pair < slice / 16; pair++) {
            load_matrices(b, keys + piece_at<depth>(pair * 16 + key, 2 * step + side));
            T::multiply(scores.at[2 * pair], a, b[0], b[1]);
            T::multiply(scores.at[2 * pair + 1], a, b[2], b[3]);
        }
    }
}

template <typename T, int depth, int slice>
__device__ __forceinline__ void multiply_values(uint32_t values, const score_tile<slice> &weights, float (&acc)[depth / 8][4])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < slice / 16; step++) {
        const float (&low)[4] = weights.at[2 * step], (&high)[4] = weights.at[2 * step + 1];
        const uint32_t a[4] = {T::pack(low[0], low[1]), T::pack(low[2], low[3]), T::pack(high[0], high[1]), T::pack(high[2], high[3])};
#pragma unroll
        for (int pair = 0; pair < depth / 16; pair++) {
            uint32_t b[4];
            load_matrices_transposed(b, values + piece_at<depth>(step * 16 + lane % 16, 2 * pair + lane / 16));
            T::multiply(acc[2 * pair], a, b[0], b[1]);
            T::multiply(acc[2 * pair + 1], a, b[2], b[3]);
        }
    }
}

/* Hides what a row does not see. `warp_row`: row of the tile that the warp's first row is; first: key of the run that column 0 is. */
template <int slice, int row_limit>
__device__ __forceinline__ void mask_scores(const sa_cuda_problem &p, const tile<row_limit> &t, const run &r, int warp_row, int64_t first,
                                            score_tile<slice> &scores)
{
    const int lane = threadIdx.x % 32;
    int low[2], high[2];
    row_range(p, t, r, warp_row + lane / 4, first, low[0], high[0]);
    row_range(p, t, r, warp_row + lane / 4 + 8, first, low[1], high[1]);
#pragma unroll
    for (int n = 0; n < slice / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int column = n * 8 + lane % 4 * 2 + e % 2;
            scores.at[n][e] = column >= low[e / 2] && column < high[e / 2] ? scores.at[n][e] : -infinity;
        }
    }
}

/* Softcap, bias and ALiBi. */
template <int slice, int row_limit>
__device__ __noinline__ score_tile<slice> feature_scores(const sa_cuda_problem &p, const tile<row_limit> &t, const run &r, int warp_row,
                                                         int64_t first, score_tile<slice> scores)
{
    const int lane = threadIdx.x % 32;
    for (int half = 0; half < 2; half++) {
        const int row = warp_row + lane / 4 + 8 * half;
        if (row >= t.real) {
            continue;
        }
#pragma unroll
        for (int n = 0; n < slice / 8; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int64_t column = least(first + n * 8 + lane % 4 * 2 + e, r.count - 1);
                float &s = half ? scores.at[n][e + 2] : scores.at[n][e];
                s = featured_score(p, r, t.head[row], t.position[row], t.slope[row], column, s);
            }
        }
    }
    return scores;
}

/* From dot products to scores in log2 units. */
template <int slice, int row_limit>
__device__ __forceinline__ void scale_scores(const sa_cuda_problem &p, const tile<row_limit> &t, const run &r, int warp_row, int64_t first,
                                             score_tile<slice> &scores)
{
    if (is_featured(p, r)) {
        scores = feature_scores<slice>(p, t, r, warp_row, first, scores);
        return;
    }
    const float scale = p.scale * log2e;
#pragma unroll
    for (int n = 0; n < slice / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            scores.at[n][e] *= scale;
        }
    }
}

/* Joins a slice's scores to the running state and turns them into weights. */
template <int depth, int slice> __device__ __forceinline__ void join_scores(score_tile<slice> &scores, warp_state<depth> &state)
{
    constexpr int tiles = slice / 8;
    float larger[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float maximum = state.maximum[half];
#pragma unroll
        for (int n = 0; n < tiles; n++) {
            maximum = fmaxf(maximum, fmaxf(scores.at[n][2 * half], scores.at[n][2 * half + 1]));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
        larger[half] = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
    }
    if (__any_sync(~0u, larger[0] > state.maximum[0] || larger[1] > state.maximum[1])) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float factor = factor_to(state.maximum[half], larger[half]);
            state.sum[half] *= factor;
            state.maximum[half] = larger[half];
#pragma unroll
            for (int n = 0; n < depth / 8; n++) {
                state.values[n][2 * half] *= factor;
                state.values[n][2 * half + 1] *= factor;
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float anchor = anchor_of(state.maximum[half]);
#pragma unroll
        for (int n = 0; n < tiles; n++) {
            scores.at[n][2 * half] = exp2_fast(scores.at[n][2 * half] - anchor);
            scores.at[n][2 * half + 1] = exp2_fast(scores.at[n][2 * half + 1] - anchor);
            state.sum[half] += scores.at[n][2 * half] + scores.at[n][2 * half + 1];
        }
    }
}

} // namespace sa

#endif
