/* KVCache: the weight that each query of a part gave to each key that it saw, mean over its group, query by query.
 *
 *   weight_tj = mean over h of 2^(s_htj - lse_ht)
 *
 * For policies that want every query apart; the sum over a part's queries is mass.cu's. One CTA per 64 keys of a kv head of a row; it
 * computes the scores again and weighs them with the known lse. A thread owns a key and every fourth query of as many as fill 16 rows.
 * flops = 2 * depth * visible pairs * heads_q on plain FMA units. Not timed yet. */
#include "finish.cuh"
#include "kv_slots.h"

namespace sa
{

constexpr int weight_keys = SA_KV_WEIGHT_KEYS, weight_rows = SA_KV_WEIGHT_ROWS, weight_parts = SA_KV_WEIGHT_THREADS / SA_KV_WEIGHT_KEYS;

__device__ __forceinline__ float load_wide(const sa_cuda_problem &p, const char *row, int64_t d)
{
    return p.dtype == SA_CUDA_F32   ? ((const float *)row)[d]
           : p.dtype == SA_CUDA_F16 ? f16::wide(((const uint16_t *)row)[d])
                                    : bf16::wide(((const uint16_t *)row)[d]);
}

/* What a query of a head gives to key `index` of its row. */
__device__ __forceinline__ float weight_of(const sa_cuda_problem &p, const place &at, int64_t index, int64_t token, int64_t head, const float *q,
                                           const float *k)
{
    const float lse = lse_of(p)[(at.batch * p.heads_q + head) * p.query_length + token];
    if (index > at.position + token || fabsf(lse) == infinity) {
        return 0.0f;
    }
    float dot[4] = {};
    int d = 0;
    for (; d + 4 <= p.depth; d += 4) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            dot[e] = fmaf(q[d + e], k[d + e], dot[e]);
        }
    }
    for (; d < p.depth; d++) {
        dot[0] = fmaf(q[d], k[d], dot[0]);
    }
    run keys = {};
    keys.kind = index < p.pinned && p.apart ? run_pinned : run_plain;
    const float score = featured_score(p, keys, head, at.position + token, 0.0f, index, (dot[0] + dot[1]) + (dot[2] + dot[3]));
    return score == -infinity ? 0.0f : exp2f(score - lse * log2e);
}

__device__ __forceinline__ void weigh(const sa_cuda_problem &p)
{
    extern __shared__ __align__(16) char memory[];
    const int width = (int)p.depth, stride = width + 1, group = p.group;
    float *keys = (float *)memory, *queries = keys + weight_keys * stride;
    const int64_t tiles = (p.kv_length + weight_keys - 1) / weight_keys, stream = blockIdx.x / tiles, first = blockIdx.x % tiles * weight_keys;
    const int64_t head = stream % p.heads_kv;
    const place at = batch_row(p, stream / p.heads_kv, head);
    const int count = (int)least(weight_keys, at.key_count - first), own = threadIdx.x % weight_keys, part = threadIdx.x / weight_keys;
    if (count <= 0) {
        return;
    }
    for (int i = threadIdx.x; i < count * width; i += SA_KV_WEIGHT_THREADS) {
        keys[i / width * stride + i % width] = load_wide(p, element(p.key, at.batch, head, first + i / width, element_size(p)), i % width);
    }
    const int heads = group < weight_rows ? group : weight_rows, tokens = weight_rows / heads;
    for (int64_t query = 0; query < at.query_count; query += tokens) {
        const int here = (int)least(tokens, at.query_count - query);
        float sum[weight_rows / weight_parts] = {};
        for (int skipped = 0; skipped < group; skipped += heads) {
            const int taken = group - skipped < heads ? group - skipped : heads;
            __syncthreads();
            for (int i = threadIdx.x; i < here * taken * width; i += SA_KV_WEIGHT_THREADS) {
                const int row = i / width, of_group = skipped + row % taken;
                const char *from = element(p.query, at.batch, head * group + of_group, query + row / taken, element_size(p));
                queries[row * stride + i % width] = load_wide(p, from, i % width);
            }
            __syncthreads();
            for (int token = part, i = 0; token < here && own < count; token += weight_parts, i++) {
                for (int h = 0; h < taken; h++) {
                    sum[i] += weight_of(p, at, first + own, query + token, head * group + skipped + h, queries + (token * taken + h) * stride,
                                        keys + own * stride);
                }
            }
        }
        for (int token = part, i = 0; token < here && own < count; token += weight_parts, i++) {
            p.mass[(stream * p.query_length + query + token) * p.mass_length + first + own] = sum[i] / (float)group;
        }
    }
}

} // namespace sa

extern "C" __global__ void __launch_bounds__(SA_KV_WEIGHT_THREADS) kv_weights(const __grid_constant__ sa_cuda_problem p)
{
    sa::weigh(p);
}
