/* KVCache: a step of one token. The policy learns from the query's weights, and one token leaves to make room for the new one.
 *
 * A CTA for each stream, and one pass: every slot's weight, mass and position are asked for before anything is known, what the policy
 * remembers goes forward, and the lowest score is found by a minimum over the CTA; no score is written. The new token's key and value,
 * which lie in the last slot, are in registers by then and go where the token was that leaves. No atomics; every result is the same each
 * time. bytes = slots * (4 + 24 to 40), read once, mass and the policy's number written once.
 * Not timed yet. */
#include "kv_slots.cuh"

namespace sa
{

constexpr int step_warps = SA_KV_STEP_THREADS / 32, at_a_time = SA_KV_SLOTS_A_THREAD;

struct step_shared {
    lowest found[step_warps];
    double sums[step_warps];
    double last[3]; /* of the new token: mass, and the policy's two numbers */
};
static_assert(sizeof(step_shared) <= SA_KV_EVICT_SHARED, "room for what warps have found");

/* What every thread knows of its stream. */
struct step {
    uint32_t stream, row, head;
    int64_t first;         /* first slot among all */
    int64_t last, now;     /* slot of the new token; tokens seen with it */
    int64_t recent_from;
    bool evicts;
    const float *weights;  /* by slot; NULL: not tracked */
};

/* Sum over the CTA, in one order; everybody gets it. */
__device__ __forceinline__ double sum_of_step(double value, double *of_warps)
{
#pragma unroll 1
    for (int step = 16; step > 0; step /= 2) {
        value += __shfl_xor_sync(~0u, value, step);
    }
    if (threadIdx.x % 32 == 0) {
        of_warps[threadIdx.x / 32] = value;
    }
    __syncthreads();
    double sum = 0.0;
#pragma unroll 1
    for (int i = 0; i < step_warps; i++) {
        sum += of_warps[i];
    }
    return sum;
}

/* sum_j a_j |v_j|, where the policy divides by it. */
__device__ __forceinline__ double value_weights(const sa_cuda_slots &c, const step &at, step_shared &s)
{
    const int64_t all = c.batch * c.heads_kv * c.stride;
    double sum = 0.0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i <= at.last; i += SA_KV_STEP_THREADS) {
        sum += product((double)at.weights[i], c.own[all + at.first + i]);
    }
    return sum_of_step(sum, s.sums);
}

/* Scores that are not a number that the policy keeps. Not inlined: cold instructions cost more than calls. */
__device__ __noinline__ double derived_score(const sa_cuda_slots &c, const step &at, int64_t i, double mass, double own, int64_t position)
{
    switch (c.kind) {
    case h2o_norm: return mass / (double)(at.now - position);
    case k_norm: return -own;
    case scissorhands: return bits_set(c, at.first + i);
    case tova: return shared_weight(c, at.row, 0, i);
    case drawn: return drawn_score(c, at.row, at.head, position);
    default: return 0.0; /* SinkWindow: ties go to the newer */
    }
}

/* A slot: what is loaded of it, and then what becomes of it. */
struct slot_state {
    double mass, own;
    int64_t position;
    float weight;
};

__device__ __forceinline__ slot_state load_slot_state(const sa_cuda_slots &c, const step &at, int64_t i, bool has_own)
{
    slot_state state;
    state.weight = at.weights != nullptr ? at.weights[i] : 0.0f;
    state.mass = at.weights != nullptr ? c.mass[at.first + i] : 0.0;
    state.own = has_own ? c.own[at.first + i] : 0.0;
    state.position = c.positions[at.first + i];
    return state;
}

__device__ __forceinline__ void learn(const sa_cuda_slots &c, const step &at, int64_t i, double sum, slot_state &state)
{
    const int64_t slot = at.first + i;
    const double weight = (double)state.weight;
    if (at.weights != nullptr) {
        state.mass += weight;
        c.mass[slot] = state.mass;
    }
    if (c.kind == h2o_ema) {
        state.own = product(c.decay, state.own) + weight;
        c.own[slot] = state.own;
    } else if (c.kind == v_length_h2o && sum > 0.0) {
        state.own += product(weight, c.own[c.batch * c.heads_kv * c.stride + slot]) / sum;
        c.own[slot] = state.own;
    } else if (c.kind == scissorhands) {
        put_bit(c, slot, (at.now - 1) % c.window, weight * (double)(at.last + 1) >= 1.0);
    }
}

__device__ __forceinline__ void judge_slot(const sa_cuda_slots &c, const step &at, int64_t i, const slot_state &state, lowest &own, double &mass)
{
    const bool kept = c.kind >= h2o_ema && c.kind <= v_length_h2o;
    if (state.position < c.pinned || state.position >= at.recent_from || !at.evicts) {
        return;
    }
    const double score = c.kind == h2o ? state.mass : kept ? state.own : derived_score(c, at, i, state.mass, state.own, state.position);
    const lowest other = {ordered(score), state.position, i};
    if (other.score < own.score || (other.score == own.score && other.position < own.position)) {
        own = other;
        mass = state.mass;
    }
}

/* All slots of the stream: the thread's lowest, and its mass. */
__device__ __forceinline__ lowest pass_slots(const sa_cuda_slots &c, const step &at, double sum, step_shared &s, double &mass)
{
    const bool has_own = c.kind == h2o_ema || c.kind == v_length_h2o || c.kind == k_norm;
    lowest own = {~(uint64_t)0, INT64_MAX, 0};
#pragma unroll 1
    for (int64_t from = threadIdx.x; from <= at.last; from += at_a_time * SA_KV_STEP_THREADS) {
        slot_state states[at_a_time];
#pragma unroll
        for (int e = 0; e < at_a_time; e++) {
            const int64_t i = from + e * SA_KV_STEP_THREADS;
            if (i <= at.last) {
                states[e] = load_slot_state(c, at, i, has_own);
            }
        }
#pragma unroll
        for (int e = 0; e < at_a_time; e++) {
            const int64_t i = from + e * SA_KV_STEP_THREADS;
            if (i <= at.last) {
                learn(c, at, i, sum, states[e]);
                judge_slot(c, at, i, states[e], own, mass);
                if (i == at.last) {
                    s.last[0] = states[e].mass;
                    s.last[1] = states[e].own;
                    s.last[2] = c.kind == v_length_h2o ? c.own[c.batch * c.heads_kv * c.stride + at.first + i] : 0.0;
                }
            }
        }
    }
    return own;
}

/* The lowest of the CTA; everybody gets it. */
__device__ __forceinline__ lowest lowest_of_step(lowest own, step_shared &s)
{
    take_lowest_of_warp(own);
    if (threadIdx.x % 32 == 0) {
        s.found[threadIdx.x / 32] = own;
    }
    __syncthreads();
    own = s.found[threadIdx.x % 32];
    take_lowest_of_warp(own);
    return own;
}

/* The new token, which lies in the last slot, into the slot of the one that leaves. */
__device__ __forceinline__ void move_last(const sa_cuda_slots &c, const step &at, const step_shared &s, int64_t target)
{
    const int64_t to = at.first + target, from = at.first + at.last;
    for (int64_t i = threadIdx.x; i < c.ring_bytes / 4; i += SA_KV_STEP_THREADS) {
        ((uint32_t *)(c.rings + to * c.ring_bytes))[i] = ((const uint32_t *)(c.rings + from * c.ring_bytes))[i];
    }
    if (threadIdx.x == 0) {
        const int64_t all = c.batch * c.heads_kv * c.stride;
        c.positions[to] = at.now - 1;
        c.mass[to] = s.last[0];
        c.own[to] = s.last[1];
        c.own[all + to] = s.last[2];
    }
}

__device__ __forceinline__ step begin_step(const sa_cuda_slots &c)
{
    step at;
    at.stream = blockIdx.x;
    at.row = at.stream / (uint32_t)c.heads_kv;
    at.head = at.stream - at.row * (uint32_t)c.heads_kv;
    at.first = at.stream * c.stride;
    at.last = clamp(c.held[at.stream], 0, c.stride - 1);
    at.now = c.lengths[at.stream] + 1;
    at.recent_from = at.now - c.recent;
    at.evicts = at.last + 1 > c.budgets[at.head];
    at.weights = c.weights != nullptr ? c.weights + at.stream * c.stride : nullptr;
    return at;
}

__device__ __forceinline__ void run_step(const sa_cuda_slots &c)
{
    extern __shared__ __align__(16) char memory[];
    step_shared &s = *(step_shared *)memory;
    const step at = begin_step(c);
    if (new_tokens(c, at.row) == 0) {
        return;
    }
    /* A number of the new key or value each, for the move. */
    const int depth = (int)c.depth, d = threadIdx.x;
    const bool moves = at.evicts && d < depth + (int)c.depth_v, of_key = d < depth;
    void *vectors = of_key ? c.keys : c.values;
    const int64_t width = of_key ? c.depth : c.depth_v, element = of_key ? d : d - depth;
    uint32_t number = 0;
    if (moves) {
        const int64_t from = (at.first + at.last) * width + element;
        number = c.dtype == SA_CUDA_F32 ? ((const uint32_t *)vectors)[from] : ((const uint16_t *)vectors)[from];
    }
    double mass = 0.0;
    const double sum = c.kind == v_length_h2o ? value_weights(c, at, s) : 0.0;
    const lowest own = pass_slots(c, at, sum, s, mass);
    if (at.evicts) {
        const lowest gone = lowest_of_step(own, s);
        if (gone.slot != at.last) {
            const int64_t to = (at.first + gone.slot) * width + element;
            if (moves && c.dtype == SA_CUDA_F32) {
                ((uint32_t *)vectors)[to] = number;
            } else if (moves) {
                ((uint16_t *)vectors)[to] = (uint16_t)number;
            }
            move_last(c, at, s, gone.slot);
        }
        if (own.slot == gone.slot && own.position == gone.position) { /* the thread that found it knows its mass */
            record_one(c, at.stream, gone.position, at.now, mass);
        }
    } else {
        __syncthreads(); /* everybody has read how much was held */
    }
    if (threadIdx.x == 32) {
        c.held[at.stream] = at.evicts ? at.last : at.last + 1;
        c.lengths[at.stream] = at.now;
        c.evicted_at[at.stream] = at.evicts ? at.now : c.evicted_at[at.stream];
    }
}

} // namespace sa

extern "C" __global__ void __launch_bounds__(SA_KV_STEP_THREADS) kv_step(const __grid_constant__ sa_cuda_slots c)
{
    sa::run_step(c);
}
