/* KVCache: the weight that each query of a part gave to each key that it saw, mean over its group, query by query.
 *
 *   weight_tj = mean over h of 2^(s_htj - lse_ht)
 *
 * For policies that want every query apart; the sum over a part's queries is mass.cu's. One CTA per 64 keys of a kv head of a row, which
 * meets the rows of the part (a query of a head each) 64 at a time; it computes the scores again, a thread 4 by 4 of them, and weighs them
 * with the known lse. flops = 2 * depth * pairs * heads_q on plain FMA units, for fp32 and half types alike.
 * H200, 2026-11-25, bf16, 32/8 heads, D 128, by the profiler: a part of 128 tokens at 1024 slots 240 us. */
#include "finish.cuh"
#include "kv_slots.h"

namespace sa
{

constexpr int weight_keys = SA_KV_WEIGHT_KEYS, weight_rows = SA_KV_WEIGHT_ROWS, slab = SA_KV_WEIGHT_SLAB, weight_side = 16,
              weight_stride = slab + 4, each_way = weight_keys / weight_side;
static_assert(weight_keys == weight_rows && weight_side * weight_side == SA_KV_WEIGHT_THREADS, "a thread has as many keys as rows");

/* Rows of the part that a CTA has before it: queries first .. first + tokens - 1 of heads skipped .. skipped + heads - 1 of the group. */
struct weight_tile {
    int64_t first;
    int tokens, skipped, heads;
};

/* Columns from, from + 1, .. of a vector, zero beyond depth; nullptr: a vector of zeros. */
__device__ __forceinline__ void load_slab(const sa_cuda_problem &p, const char *vector, int64_t from, int column, float *target)
{
    target[column] = vector != nullptr && from + column < p.depth ? wide_number(p.dtype, vector, from + column) : 0.0f;
}

__device__ __forceinline__ void load_operands(const sa_cuda_problem &p, const place &at, int64_t head, int64_t first_key, int count,
                                              const weight_tile &tile, int64_t from, float *keys, float *rows)
{
    const int size = element_size(p), real = tile.tokens * tile.heads;
    for (int i = threadIdx.x; i < weight_keys * slab; i += SA_KV_WEIGHT_THREADS) {
        const int index = i / slab, column = i % slab, token = index / tile.heads, of_group = tile.skipped + index % tile.heads;
        load_slab(p, index < count ? element(p.key, at.batch, head, first_key + index, size) : nullptr, from, column, keys + index * weight_stride);
        load_slab(p, index < real ? element(p.query, at.batch, head * p.group + of_group, tile.first + token, size) : nullptr, from, column,
                  rows + index * weight_stride);
    }
}

/* Dot products of the thread's keys and rows, a slab further on. */
__device__ __forceinline__ void multiply_slab(const float *keys, const float *rows, float (&dots)[each_way][each_way])
{
    const int own_key = threadIdx.x % weight_side, own_row = threadIdx.x / weight_side;
#pragma unroll 4
    for (int d = 0; d < slab; d += 4) {
        float4 k[each_way];
#pragma unroll
        for (int e = 0; e < each_way; e++) {
            k[e] = *(const float4 *)(keys + (own_key + weight_side * e) * weight_stride + d);
        }
#pragma unroll
        for (int f = 0; f < each_way; f++) {
            const float4 q = *(const float4 *)(rows + (own_row + weight_side * f) * weight_stride + d);
#pragma unroll
            for (int e = 0; e < each_way; e++) {
                dots[f][e] = fmaf(q.x, k[e].x, fmaf(q.y, k[e].y, fmaf(q.z, k[e].z, fmaf(q.w, k[e].w, dots[f][e]))));
            }
        }
    }
}

/* What a query of a head gives to key `index` of its row. */
__device__ __forceinline__ float weight_of(const sa_cuda_problem &p, const place &at, int64_t index, int64_t token, int64_t head, float lse,
                                           float dot)
{
    if (index > at.position + token || fabsf(lse) == infinity) {
        return 0.0f;
    }
    run keys = {};
    keys.kind = index < p.pinned && p.apart ? run_pinned : run_plain;
    const float score = featured_score(p, keys, head, at.position + token, 0.0f, index, dot);
    return score == -infinity ? 0.0f : exp2f(score - lse * log2e);
}

/* The thread's weights, by row, where the others find them. */
__device__ __forceinline__ void keep_weights(const sa_cuda_problem &p, const place &at, int64_t head, int64_t first_key, const weight_tile &tile,
                                             const float (&dots)[each_way][each_way], float *kept)
{
    const int own_key = threadIdx.x % weight_side, own_row = threadIdx.x / weight_side;
    for (int f = 0; f < each_way; f++) {
        const int row = own_row + weight_side * f;
        if (row >= tile.tokens * tile.heads) {
            break;
        }
        const int64_t token = tile.first + row / tile.heads, query_head = head * p.group + tile.skipped + row % tile.heads;
        const float lse = lse_of(p)[(at.batch * p.heads_q + query_head) * p.query_length + token];
        for (int e = 0; e < each_way; e++) {
            const int key = own_key + weight_side * e;
            kept[row * (weight_keys + 1) + key] = weight_of(p, at, first_key + key, token, query_head, lse, dots[f][e]);
        }
    }
}

__device__ __forceinline__ void weigh_tile(const sa_cuda_problem &p, const place &at, int64_t stream, int64_t head, int64_t first_key, int count,
                                           const weight_tile &tile, float *keys, float *rows)
{
    float dots[each_way][each_way] = {};
    for (int64_t from = 0; from < p.depth; from += slab) {
        __syncthreads();
        load_operands(p, at, head, first_key, count, tile, from, keys, rows);
        __syncthreads();
        multiply_slab(keys, rows, dots);
    }
    __syncthreads();
    keep_weights(p, at, head, first_key, tile, dots, keys);
    __syncthreads();
    for (int i = threadIdx.x; i < tile.tokens * weight_keys; i += SA_KV_WEIGHT_THREADS) {
        const int token = i / weight_keys, key = i % weight_keys;
        float sum = 0.0f;
        for (int h = 0; h < tile.heads; h++) {
            sum += keys[(token * tile.heads + h) * (weight_keys + 1) + key];
        }
        if (key < count) {
            float *out = p.mass + (stream * p.query_length + tile.first + token) * p.mass_length + first_key + key;
            *out = sum / (float)p.group + (tile.skipped > 0 ? *out : 0.0f);
        }
    }
}

__device__ __forceinline__ void weigh(const sa_cuda_problem &p)
{
    extern __shared__ __align__(16) char memory[];
    float *keys = (float *)memory, *rows = keys + weight_keys * weight_stride;
    const int64_t tiles = (p.kv_length + weight_keys - 1) / weight_keys, stream = blockIdx.x / tiles, first = blockIdx.x % tiles * weight_keys;
    const int64_t head = stream % p.heads_kv;
    const place at = batch_row(p, stream / p.heads_kv, head);
    const int count = (int)least(weight_keys, at.key_count - first), heads = p.group < weight_rows ? p.group : weight_rows, tokens = weight_rows / heads;
    if (count <= 0) {
        return;
    }
    for (int64_t query = 0; query < at.query_count; query += tokens) {
        for (int skipped = 0; skipped < p.group; skipped += heads) {
            weigh_tile(p, at, stream, head, first, count,
                       {query, (int)least(tokens, at.query_count - query), skipped, p.group - skipped < heads ? p.group - skipped : heads}, keys, rows);
        }
    }
}

} // namespace sa

extern "C" __global__ void __launch_bounds__(SA_KV_WEIGHT_THREADS) kv_weights(const __grid_constant__ sa_cuda_problem p)
{
    sa::weigh(p);
}
