/* What a step by policy does once the sums of its rows are known: keys are weighed, the policy learns, and one token leaves.
 *
 * A CTA weighs the slots of its own split, as decode_mass.cuh does, but hands the weights to nobody: mass and the policy's number go forward
 * at once, and the lowest score of a warp goes to the first CTA of the cluster, on whose barrier all wait anyway. That CTA writes the new
 * token, which it has in shared memory, where the lowest of all was, and the ledger. Only for policies whose scores need nothing but the
 * weights of their own head. Scores, sums and ties are those of kv_step.cu. */
#ifndef SA_CUDA_DECODE_EVICT_CUH
#define SA_CUDA_DECODE_EVICT_CUH

#include "decode_mass.cuh"
#include "kv_slots.cuh"

namespace sa
{

/* The lowest of a warp as it travels: 32 bytes. */
struct alignas(16) departing {
    uint64_t score;
    int64_t position, slot;
    double mass;
};

/* Index of a stream's first slot among all. */
__device__ __forceinline__ int64_t first_slot(const sa_cuda_eviction &e, const decode_shared &s)
{
    return (s.t.at.batch * e.problem.heads_kv + s.t.kv_head) * e.stride;
}

/* What is needed at the end, while the first keys are on their way: state into the L2, numbers of the stream into shared memory. One
 * thread. */
__device__ __forceinline__ void ask_for_state(const sa_cuda_eviction &e, int split, int first, int count, decode_shared &s)
{
    const int64_t stream = s.t.at.batch * e.problem.heads_kv + s.t.kv_head, slot = stream * e.stride + first;
    const uint32_t bytes = (uint32_t)(count + 2) / 2 * 16; /* from a multiple of 16 on */
    if (count > 0) {
        prefetch_bulk((const void *)((uintptr_t)(e.mass + slot) & ~(uintptr_t)15), bytes);
        prefetch_bulk((const void *)((uintptr_t)(e.positions + slot) & ~(uintptr_t)15), bytes);
    }
    s.step.now = e.lengths[stream] + 1;
    s.step.budget = e.budgets[s.t.kv_head];
    if (split == 0) {
        const sa_ledger &ledger = e.ledgers[stream];
        s.step.mass = ledger.mass;
        s.step.largest = ledger.largest;
        s.step.evicted = ledger.evicted;
        s.step.logged = ledger.logged;
    }
}

__device__ __forceinline__ double departing_score(const sa_cuda_eviction &e, int64_t age, double mass, double own)
{
    return e.kind == h2o ? mass : e.kind == h2o_norm ? mass / (double)age : e.kind == h2o_ema ? own : 0.0; /* SinkWindow: ties go to the newer */
}

/* What is known of a slot. */
struct slot_state {
    double mass, own;
    int64_t position;
};

/* The slots of slices begin .. end - 1 go forward; returns the lowest score that the thread has met. Little code, as it runs cold: a key at
 * a time, the next one's state on its way. */
__device__ __forceinline__ departing settle_slots(const sa_cuda_eviction &e, decode_shared &s, int slice, int begin, int end, const float *scores,
                                                   const float *sums)
{
    const sa_cuda_problem &p = e.problem;
    const tile<SA_DECODE_ROWS> &t = s.t;
    const int stride = SA_DECODE_SCORE_STRIDE(p.group);
    const float share = 1.0f / (float)p.group;
    const int64_t first_of_stream = first_slot(e, s), now = s.step.now, recent_from = now - e.recent;
    const bool evicts = t.at.key_count + 1 > s.step.budget, decays = e.kind == h2o_ema;
    double *masses = e.mass + first_of_stream, *owns = e.own + first_of_stream;
    const int64_t *positions = e.positions + first_of_stream;
    departing lowest_yet = {~(uint64_t)0, INT64_MAX, 0, 0.0};
#pragma unroll 1
    for (int i = 0; i < t.list.count; i++) {
        const run &r = t.list.runs[i];
        const int first = begin > t.first_slice[i] ? begin : t.first_slice[i], last = end < t.first_slice[i + 1] ? end : t.first_slice[i + 1];
        if (first >= last || r.kind == run_learned) {
            continue;
        }
        const int64_t low = t.seen[i].low + (int64_t)(first - t.first_slice[i]) * slice;
        const int count = (int)least(t.seen[i].high - low, (int64_t)(last - first) * slice), base = (int)(r.position + low);
        const float *kept = scores + (first - begin) * slice * stride;
        const bool fresh = r.raw;
        slot_state next = {0.0, 0.0, now - 1};
        if ((int)threadIdx.x < count && !fresh) {
            next = {masses[base + threadIdx.x], decays ? owns[base + threadIdx.x] : 0.0, positions[base + threadIdx.x]};
        }
#pragma unroll 1
        for (int key = threadIdx.x; key < count; key += blockDim.x) {
            slot_state own = next;
            const int slot = base + key, ahead = slot + (int)blockDim.x;
            if (key + (int)blockDim.x < count) {
                next = {masses[ahead], decays ? owns[ahead] : 0.0, positions[ahead]};
            }
            const double weight = (double)(share * weigh_key(p, kept + key * stride, sums, 0, t.real));
            own.mass += weight;
            if (decays) {
                own.own = product(e.decay, own.own) + weight;
            }
            if (fresh) {
                s.step.token_mass = own.mass;
                s.step.token_own = own.own;
            } else {
                masses[slot] = own.mass;
                if (decays) {
                    owns[slot] = own.own;
                }
            }
            const uint64_t score = ordered(departing_score(e, now - own.position, own.mass, own.own));
            const bool free = evicts && own.position >= p.pinned && own.position < recent_from;
            if (free && (score < lowest_yet.score || (score == lowest_yet.score && own.position < lowest_yet.position))) {
                lowest_yet = {score, own.position, slot, own.mass};
            }
        }
    }
    return lowest_yet;
}

/* The lane that has the lowest of a warp. */
__device__ __forceinline__ int lowest_lane(uint64_t score, int64_t position)
{
    const uint32_t high = least_of_warp((uint32_t)(score >> 32)), low = least_of_warp((uint32_t)(score >> 32) == high ? (uint32_t)score : ~0u);
    const bool mine = score == ((uint64_t)high << 32 | low);
    const uint32_t above = mine ? (uint32_t)(position >> 32) : ~0u, upper = least_of_warp(above);
    const uint32_t lower = least_of_warp(above == upper ? (uint32_t)position : ~0u);
    return __ffs((int)__ballot_sync(~0u, mine && (uint64_t)position == ((uint64_t)upper << 32 | lower))) - 1;
}

/* What the warps of a cluster have found lies at `found` of its first CTA. */
__device__ __forceinline__ void send_lowest(const sa_cuda_problem &p, int split, const departing &own, departing *found)
{
    if (lowest_lane(own.score, own.position) == (int)(threadIdx.x % 32)) {
        departing *place = found + split * (blockDim.x / 32) + threadIdx.x / 32;
        if (p.clustered) {
            const uint32_t there = cluster_address(shared_address(place), 0);
            cluster_store_pair(there, own.score, (uint64_t)own.position);
            cluster_store_pair(there + 16, (uint64_t)own.slot, (uint64_t)__double_as_longlong(own.mass));
        } else {
            *place = own;
        }
    }
}

/* The lowest of them; every lane gets it. */
__device__ __forceinline__ const departing &take_lowest(const sa_cuda_problem &p, const departing *found)
{
    const int lane = threadIdx.x % 32, count = p.splits * (int)(blockDim.x / 32);
    int best = lane < count ? lane : 0;
    if (lane + 32 < count) {
        const departing &own = found[best], &other = found[lane + 32];
        best = other.score < own.score || (other.score == own.score && other.position < own.position) ? lane + 32 : best;
    }
    static_assert(SA_DECODE_CLUSTER * SA_DECODE_WARPS <= 64, "two a lane");
    return found[__shfl_sync(~0u, best, lowest_lane(found[best].score, found[best].position))];
}

/* The token has left; by one thread. */
__device__ __forceinline__ void record_departure(const sa_cuda_eviction &e, const decode_shared &s, int64_t stream, const departing &gone)
{
    sa_ledger &ledger = e.ledgers[stream];
    ledger.evicted = s.step.evicted + 1;
    if (e.log_size > 0) {
        ledger.logged = s.step.logged + 1;
        e.log[stream * e.log_size + s.step.logged % e.log_size] = {gone.position, s.step.now, gone.mass};
    }
    ledger.mass = s.step.mass + gone.mass;
    ledger.largest = gone.mass > s.step.largest ? gone.mass : s.step.largest;
    add_to(&ledger.histogram[ledger_bin(gone.mass)], 1);
}

/* What is known of the new token, into its slot, and the stream's numbers; by one thread. */
__device__ __forceinline__ void settle_token(const sa_cuda_eviction &e, const decode_shared &s, int64_t stream, int64_t slot, bool evicts)
{
    const int64_t at = stream * e.stride + slot;
    e.positions[at] = s.step.now - 1;
    e.mass[at] = s.step.token_mass;
    e.own[at] = s.step.token_own;
    e.own[e.problem.batch * e.problem.heads_kv * e.stride + at] = 0.0;
    e.lengths[stream] = s.step.now;
    if (evicts) {
        e.evicted_at[stream] = s.step.now;
    } else {
        e.held[stream] = slot + 1;
    }
}

/* By the first CTA of a stream, once all have settled. */
__device__ __forceinline__ void evict_lowest(const sa_cuda_eviction &e, const decode_shared &s, const departing *found)
{
    const int64_t last = s.t.at.key_count, stream = s.t.at.batch * e.problem.heads_kv + s.t.kv_head;
    const bool evicts = last + 1 > s.step.budget;
    int64_t slot = last;
    if (evicts) {
        const departing &gone = take_lowest(e.problem, found);
        slot = gone.slot;
        if (threadIdx.x == 32) {
            record_departure(e, s, stream, gone);
        }
    }
    store_token(e.problem, s, slot);
    if (threadIdx.x == 0) {
        settle_token(e, s, stream, slot, evicts);
    }
}

} // namespace sa

#endif
