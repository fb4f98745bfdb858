/* Where the mass of a key goes, how that of several queries is joined, and the keys and queries of a CTA of the passes for mass alone. */
#ifndef SA_CUDA_MASS_CUH
#define SA_CUDA_MASS_CUH

#include "problem.cuh"

namespace sa
{

/* Where the mass of key 0 of a run goes, and how many keys at the front are not reported. */
struct mass_place {
    int64_t index, skip;
};

/* Mass of a cache goes to the place that a position has among the positions held after the call. */
__device__ __forceinline__ mass_place place_mass(const sa_cuda_problem &p, const place &at, const run &r)
{
    if (p.cache.keys == nullptr) {
        return {at.key_begin + r.position, 0};
    }
    if (r.kind == run_pinned) {
        return {r.position, 0};
    }
    const int64_t length = at.length + at.query_count, low = most(at.low, length - p.cache.capacity);
    return {least(p.pinned, length) + r.position - low, clamp(low - r.position, 0, r.count)};
}

__device__ __forceinline__ double join_mass(const sa_cuda_problem &p, double total, double weight)
{
    return !p.mass_maximum ? total + weight : weight > total || weight != weight ? weight : total;
}

/* --- a CTA of a pass over the keys ----------------------------------------------------------------------------------------------------- */

struct mass_shared {
    place at;
    run_list list;
    int64_t first, window; /* first key of the run; widest window of the group */
    int64_t first_query, end_query;
    int run, kv_head;
};
static_assert(sizeof(mass_shared) <= SA_ROWS_SHARED, "room for what is known of the rows");

__device__ __forceinline__ float row_number(const sa_cuda_rows &rows, int64_t batch, int64_t head, int64_t token)
{
    const int64_t at = batch * rows.batch + head * rows.head + token * rows.token;
    return rows.type == SA_NUMBER_F32 ? ((const float *)rows.data)[at] : (float)number_of(rows.data, rows.type, at);
}

/* The queries that meet the keys of a run. */
__device__ __forceinline__ sa_cuda_tensor queries_of(const sa_cuda_problem &p, const run &r)
{
    return r.kind == run_pinned && has_second_query(p) ? second_query_tensor(p) : query_tensor(p);
}

/* What the caller gave of a query's row, or the attention in front. token: on the length axis. */
__device__ __forceinline__ float lse_of_row(const sa_cuda_problem &p, const mass_shared &s, int64_t head, int64_t token)
{
    return p.row_lse.data != nullptr ? row_number(p.row_lse, s.at.batch, head, token)
                                     : lse_of(p)[(s.at.batch * p.heads_q + head) * p.query_length + token];
}

__device__ __forceinline__ float weight_of_row(const sa_cuda_problem &p, const mass_shared &s, int64_t head, int64_t token)
{
    return p.row_weights.data != nullptr ? row_number(p.row_weights, s.at.batch, head, token) : 1.0f;
}

/* Mass of key `own` of the CTA's `count`, where it is to be reported. */
__device__ __forceinline__ void write_mass(const sa_cuda_problem &p, const mass_shared &s, const mass_place &to, int own, int count, float mass)
{
    const int64_t key = s.first + own, slot = to.index + key;
    if (own < count && key >= to.skip && slot < p.mass_length) {
        p.mass[(s.at.batch * p.heads_kv + s.kv_head) * p.mass_length + slot] = mass;
    }
}

/* Goes to the run and the keys of part `index` of a row; false where it has fewer. */
__device__ inline bool find_keys(mass_shared &s, int64_t &index, int keys)
{
    for (int i = 0; i < s.list.count; i++) {
        const int64_t tiles = s.list.runs[i].kind == run_learned ? 0 : (s.list.runs[i].count + keys - 1) / keys;
        if (index < tiles) {
            s.run = i;
            s.first = index * keys;
            return true;
        }
        index -= tiles;
    }
    return false;
}

/* Which queries of the row may see the keys. */
__device__ inline void find_queries(const sa_cuda_problem &p, mass_shared &s, int keys)
{
    const run &r = s.list.runs[s.run];
    const int64_t group = p.heads_q / p.heads_kv, last = least(s.first + keys, r.count) - 1;
    s.window = 1;
    for (int64_t h = 0; h < group; h++) {
        s.window = most(s.window, window_of(p, s.kv_head * group + h));
    }
    const int64_t counted = p.mass_queries < 0 ? 0 : most(s.at.query_count - p.mass_queries, 0);
    int64_t first = r.position + s.first - s.at.position, end = s.at.query_count;
    if (!p.causal) {
        first = r.kind == run_plain ? first - s.window + 1 : 0;
    }
    if (r.kind == run_plain) {
        end = least(end, r.position + last + s.window - s.at.position);
    }
    s.first_query = most(first, counted);
    s.end_query = end;
}

/* Place, runs, keys and queries of a CTA. All lanes of a warp. */
__device__ inline bool begin_mass(const sa_cuda_problem &p, mass_shared &s, int keys)
{
    const int lane = threadIdx.x % 32;
    const int head = (int)(blockIdx.x % p.heads_kv);
    int64_t index = blockIdx.x / p.heads_kv, rows = p.sequences, row = 0;
    if (p.sequences == 0) {
        const int64_t each = gridDim.x / (p.heads_kv * p.batch);
        row = index / each;
        index %= each;
        rows = row + 1;
    }
    bool found = false;
    for (; row < rows && !found; row++) {
        const place at = p.sequences > 0 ? packed_row(p, row) : batch_row(p, row, head);
        __syncwarp();
        fill_runs(run_of(p, at, head, lane), s.list);
        __syncwarp();
        if (lane == 0) {
            s.at = at;
            s.kv_head = head;
            found = find_keys(s, index, keys);
            if (found) {
                find_queries(p, s, keys);
            }
        }
        found = __shfl_sync(~0u, found, 0);
        index = __shfl_sync(~0u, index, 0);
    }
    return found;
}

} // namespace sa

#endif
