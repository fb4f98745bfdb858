/* Per-key mass: the softmax weight that each key received, mean over the group, sum or maximum over the queries.
 *
 *   mass_j = sum or max over i of  mean over h of  w_hi 2^(s_hij - lse_hi)
 *
 * A second, key-stationary pass that computes the scores again and weighs them with the known lse: one writer for each key, no atomics.
 * One CTA per 64 keys of one run of one kv head; a thread owns a key and every fourth query of a tile of 16 rows (whole queries where the
 * group fits). flops = 2 * depth * visible pairs * heads_q on plain FMA units: right before fast. */
#include "finish.cuh"
#include "mass.cuh"

namespace sa
{

constexpr int mass_keys = SA_MASS_KEYS, mass_rows = SA_MASS_ROWS, mass_parts = 32 * SA_MASS_WARPS / SA_MASS_KEYS;

__device__ void load_wide_rows(const sa_cuda_problem &p, const char *source, int64_t stride, int rows, float *target)
{
    const int width = (int)p.depth;
    for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
        target[i / width * (width + 1) + i % width] = wide_number(p.dtype, source + i / width * stride, i % width);
    }
}

/* The weight that one query of one head gives to the thread's key, 0 where it does not see it. */
__device__ float mass_weight(const sa_cuda_problem &p, const mass_shared &s, int64_t query, int64_t head, int64_t key, const float *q,
                             const float *k)
{
    const run &r = s.list.runs[s.run];
    const int64_t position = s.at.position + query, window = window_of(p, head);
    const range seen = visible(r, p.causal, window, window, position, position);
    const int64_t token = s.at.query_begin + query;
    const float lse = lse_of_row(p, s, head, token);
    if (key < seen.low || key >= seen.high || fabsf(lse) == infinity) {
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
    const float slope = p.alibi_slopes.given ? number_at(p.alibi_slopes, s.at.batch, head) * log2e : 0.0f;
    const float score = featured_score(p, r, head, position, slope, key, (dot[0] + dot[1]) + (dot[2] + dot[3]));
    if (score == -infinity) {
        return 0.0f;
    }
    return exp2f(score - lse * log2e) * weight_of_row(p, s, head, token);
}

__device__ __forceinline__ void mass(const sa_cuda_problem &p)
{
    extern __shared__ __align__(128) char memory[];
    mass_shared &s = *(mass_shared *)memory;
    const int stride = (int)p.depth + 1, group = (int)(p.heads_q / p.heads_kv);
    float *keys = (float *)(memory + SA_ROWS_SHARED), *queries = keys + mass_keys * stride;
    double *totals = (double *)(memory + SA_ROWS_SHARED + SA_MASS_SHARED_TOTALS(stride)); /* [parts, keys] */
    const int own = threadIdx.x % mass_keys, part = threadIdx.x / mass_keys;
    if (!__syncthreads_or(threadIdx.x < 32 && begin_mass(p, s, mass_keys))) {
        return;
    }
    const run &r = s.list.runs[s.run];
    const int64_t key = s.first + own;
    const int count = (int)least(mass_keys, r.count - s.first);
    load_wide_rows(p, r.key + s.first * r.key_stride, r.key_stride, count, keys);
    const sa_cuda_tensor source = queries_of(p, r);
    const int heads = group < mass_rows ? group : mass_rows, tokens = mass_rows / heads;
    double total = 0.0;
    for (int64_t query = s.first_query; query < s.end_query; query += tokens) {
        const int here = (int)least(tokens, s.end_query - query);
        float mean[mass_rows / mass_parts + 1] = {};
        for (int head = 0; head < group; head += heads) {
            const int taken = group - head < heads ? group - head : heads;
            __syncthreads();
            for (int i = threadIdx.x; i < here * taken * (int)p.depth; i += blockDim.x) {
                const int row = i / (int)p.depth, d = i % (int)p.depth;
                const char *from = element(source, s.at.batch, s.kv_head * group + head + row % taken,
                                           s.at.query_begin + query + row / taken, element_size(p));
                queries[row * stride + d] = wide_number(p.dtype, from, d);
            }
            __syncthreads();
            for (int token = part, i = 0; token < here && own < count; token += mass_parts, i++) {
                for (int h = 0; h < taken; h++) {
                    mean[i] += mass_weight(p, s, query + token, s.kv_head * group + head + h, key, queries + (token * taken + h) * stride,
                                           keys + own * stride);
                }
            }
        }
        for (int token = part, i = 0; token < here; token += mass_parts, i++) {
            total = join_mass(p, total, (double)mean[i] / group);
        }
    }
    totals[part * mass_keys + own] = total;
    __syncthreads();
    if (part == 0) {
        for (int i = 1; i < mass_parts; i++) {
            total = join_mass(p, total, totals[i * mass_keys + own]);
        }
        write_mass(p, s, place_mass(p, s.at, r), own, count, (float)total);
    }
}

} // namespace sa

extern "C" __global__ void __launch_bounds__(32 * SA_MASS_WARPS) mass(const __grid_constant__ sa_cuda_problem p)
{
    sa::mass(p);
}
