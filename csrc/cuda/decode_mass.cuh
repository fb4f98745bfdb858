/* Mass out of the decode kernel: a CTA keeps the scores of its split in shared memory while K and V pass by, and weighs its own keys once
 * the sums of their rows are known to the cluster. Only where the rows of a kv head are one tile and the scores find room (choose.c).
 *
 *   mass_j = sum or max over i of  mean over h of  2^(s_hij - L_hi),   L in log2 units, the sink included
 *
 * Scores lie key after key, the rows of a key together. Nothing of it touches memory but the mass itself: 4 bytes a key. */
#ifndef SA_CUDA_DECODE_MASS_CUH
#define SA_CUDA_DECODE_MASS_CUH

#include "decode_load.cuh"
#include "mass.cuh"

namespace sa
{

/* Keeps the scores of a slice whose first key stands at `kept`. */
template <int slice>
__device__ __forceinline__ void keep_scores(const tile<SA_DECODE_ROWS> &t, int stride, float *kept, const score_tile<slice> &scores)
{
    const int lane = threadIdx.x % 32, row = lane / 4;
    float *own = kept + lane % 4 * 2 * stride + row;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row + 8 * half < t.real) {
#pragma unroll
            for (int n = 0; n < slice / 8; n++) {
                own[n * 8 * stride + 8 * half] = scores.at[n][2 * half];
                own[(n * 8 + 1) * stride + 8 * half] = scores.at[n][2 * half + 1];
            }
        }
    }
}

/* A split's share of the mass of a kv head is cleared before anybody weighs: what no query sees stays so. */
__device__ __forceinline__ void clear_mass(const sa_cuda_problem &p, const tile<SA_DECODE_ROWS> &t, int split)
{
    float *mass = p.mass + (t.at.batch * p.heads_kv + t.kv_head) * p.mass_length;
    const int64_t end = p.mass_length * (split + 1) / p.splits;
    for (int64_t i = p.mass_length * split / p.splits + threadIdx.x; i < end; i += blockDim.x) {
        mass[i] = 0.0f;
    }
}

/* The sum of a row in log2 units as weights are taken from it: a row that sees nothing, or only its sink, gives nothing. */
__device__ __forceinline__ float sum_of_row(float maximum, float sum, float sink)
{
    const float lse = close(maximum, sum, sink).lse;
    return fabsf(lse) == infinity ? infinity : lse * log2e;
}

/* Sums of the rows for a warp, from the states of all splits of the cluster. */
__device__ __forceinline__ void sums_of_cluster(const sa_cuda_problem &p, const tile<SA_DECODE_ROWS> &t, const partial &part, float *sums)
{
    const int lane = threadIdx.x % 32, split = lane % 8;
#pragma unroll 1
    for (int first = 0; first < t.real; first += 4) {
        const int row = first + lane / 8;
        float2 state = {-infinity, 0.0f};
        if (row < t.real && split < p.splits) {
            state = cluster_load_pair(cluster_address(shared_address(part.states + 2 * row), split));
        }
        float maximum = state.x;
        for (int step = 1; step < 8; step *= 2) {
            maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
        }
        state.y *= factor_to(state.x, maximum);
        for (int step = 1; step < 8; step *= 2) {
            state.y += __shfl_xor_sync(~0u, state.y, step);
        }
        if (row < t.real && split == 0) {
            sums[row] = sum_of_row(maximum, state.y, t.sink[row]);
        }
    }
    __syncwarp();
}

/* The same where there is one split. */
__device__ __forceinline__ void sums_alone(const tile<SA_DECODE_ROWS> &t, const partial &part, float *sums)
{
    const int row = threadIdx.x % 32;
    if (row < t.real) {
        sums[row] = sum_of_row(part.states[2 * row], part.states[2 * row + 1], t.sink[row]);
    }
    __syncwarp();
}

__device__ __forceinline__ float weight_of(float score, float sum)
{
    return sum == infinity ? 0.0f : exp2_fast(score - sum);
}

/* Mass of the key whose scores stand at `kept`. */
__device__ __forceinline__ float weigh_key(const sa_cuda_problem &p, const float *kept, const float *sums, int first_row, int rows)
{
    float total = 0.0f;
    if (!p.mass_maximum && (first_row | rows) % 4 == 0) {
#pragma unroll 1
        for (int row = first_row; row < rows; row += 4) {
            const float4 score = *(const float4 *)(kept + row), sum = *(const float4 *)(sums + row);
            total += (weight_of(score.x, sum.x) + weight_of(score.y, sum.y)) + (weight_of(score.z, sum.z) + weight_of(score.w, sum.w));
        }
        return total;
    }
#pragma unroll 1
    for (int row = first_row; row < rows; row += p.group) {
        float mean = 0.0f;
#pragma unroll 1
        for (int head = 0; head < p.group; head++) {
            mean += weight_of(kept[row + head], sums[row + head]);
        }
        total = !p.mass_maximum ? total + mean : mean > total || mean != mean ? mean : total;
    }
    return total;
}

/* The keys of slices begin .. end - 1 of a tile, whose scores are in shared memory. */
__device__ __forceinline__ void weigh_slices(const sa_cuda_problem &p, const tile<SA_DECODE_ROWS> &t, int slice, int begin, int end,
                                             const float *scores, const float *sums)
{
    const int tokens = t.real / p.group, stride = SA_DECODE_SCORE_STRIDE((int)p.query_length * p.group);
    const int first_row = p.mass_queries < 0 ? 0 : p.group * (int)most(tokens - p.mass_queries, 0);
    const float share = 1.0f / (float)p.group;
    float *mass = p.mass + (t.at.batch * p.heads_kv + t.kv_head) * p.mass_length;
#pragma unroll 1
    for (int i = 0; i < t.list.count; i++) {
        const run &r = t.list.runs[i];
        const int first = begin > t.first_slice[i] ? begin : t.first_slice[i],
                  last = end < t.first_slice[i + 1] ? end : t.first_slice[i + 1];
        if (first >= last || r.kind == run_learned) {
            continue;
        }
        const mass_place to = place_mass(p, t.at, r);
        const int64_t low = t.seen[i].low + (int64_t)(first - t.first_slice[i]) * slice;
        const int64_t reported = least(p.mass_length - to.index, t.seen[i].high) - low; /* keys from `low` on that have a place */
        const int skip = (int)clamp(to.skip - low, 0, INT32_MAX), count = (int)least(reported, (int64_t)(last - first) * slice);
        float *own = mass + to.index + low;
#pragma unroll 2
        for (int key = skip + threadIdx.x; key < count; key += blockDim.x) {
            own[key] = share * weigh_key(p, scores + ((first - begin) * slice + key) * stride, sums, first_row, t.real);
        }
    }
}

} // namespace sa

#endif
