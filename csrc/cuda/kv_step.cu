/* KVCache: a step of one token. The policy learns from the query's weights, and one token leaves to make room for the new one.
 *
 * A CTA for each stream, and one pass: mass, position and the policy's number of every slot are asked for before anything is known, and
 * before the attention that gives the weights has ended, where the kernel may begin early. Then what the policy remembers goes forward, and
 * the lowest score is found by a minimum over the CTA; no score is written. The new token's key and value, which lie in the last slot, are
 * in registers by then and go where the token was that leaves. Every result is the same each time.
 * bytes = slots * (4 + 24 to 40), read once, mass and the policy's number written once.
 * H200, 2026-11-25, bf16, 32/8 heads, D 128, graph replay of 12 caches in turn: a step with H2O beside one of SinkCache, us
 *   B 1, 1024 slots 17.0 / 8.6   B 1, 4096 slots 23.8 / 12.7   B 8, 1024 slots 27.2 / 16.3   B 8, 4096 slots 56.4 / 40.3 */
#include "kv_slots.cuh"

namespace sa
{

constexpr int step_warps = SA_KV_STEP_THREADS / 32, at_a_time = SA_KV_SLOTS_A_THREAD;

/* What the ledger says before the token leaves, and where its entry goes. */
struct step_ledger {
    double mass, largest;
    int64_t evicted, logged, place;
};

struct step_shared {
    lowest found[step_warps];
    double sums[step_warps];
    double last[3]; /* of the new token: mass, and the policy's two numbers */
    double length;  /* of the new key or value, where the policy wants it */
    step_ledger ledger;
};
static_assert(sizeof(step_shared) <= SA_KV_EVICT_SHARED, "room for what warps have found");

/* What every thread knows of its stream. */
struct step {
    uint32_t stream, row, head;
    int64_t first;         /* first slot among all */
    int64_t last, now;     /* slot of the new token; tokens seen with it */
    int64_t recent_from;
    bool evicts;
    bool appended;         /* of the new token only key and value are there */
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

/* |v| of a slot. */
__device__ __forceinline__ double value_length(const sa_cuda_slots &c, const step &at, const step_shared &s, int64_t i)
{
    return at.appended && i == at.last ? s.length : c.own[(c.batch * c.heads_kv + at.stream) * c.stride + i];
}

/* sum_j a_j |v_j|, where the policy divides by it. */
__device__ __forceinline__ double value_weights(const sa_cuda_slots &c, const step &at, step_shared &s)
{
    double sum = 0.0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i <= at.last; i += SA_KV_STEP_THREADS) {
        sum += product((double)at.weights[i], value_length(c, at, s, i));
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

/* What a slot remembers of its token. */
struct slot_state {
    double mass, own;
    int64_t position;
};

struct some_slots {
    slot_state states[at_a_time];
};

/* Slots from, from + SA_KV_STEP_THREADS, .. */
__device__ __forceinline__ void load_slots(const sa_cuda_slots &c, const step &at, int64_t from, some_slots &some)
{
    const bool has_own = c.kind == h2o_ema || c.kind == v_length_h2o || c.kind == k_norm;
#pragma unroll
    for (int e = 0; e < at_a_time; e++) {
        const int64_t i = from + e * SA_KV_STEP_THREADS;
        if (i <= at.last) {
            const bool empty = at.appended && i == at.last;
            some.states[e].mass = at.weights != nullptr && !empty ? c.mass[at.first + i] : 0.0;
            some.states[e].own = has_own && !empty ? c.own[at.first + i] : 0.0;
            some.states[e].position = empty ? at.now - 1 : c.positions[at.first + i];
        }
    }
}

/* The new token's memory, where nobody has begun it. */
__device__ __forceinline__ void begin_token(const sa_cuda_slots &c, const step &at, const step_shared &s, slot_state &state)
{
    const int64_t slot = at.first + at.last, all = c.batch * c.heads_kv * c.stride;
#pragma unroll 1
    for (int64_t i = 0; i < c.ring_bytes / 4; i++) {
        ((uint32_t *)(c.rings + slot * c.ring_bytes))[i] = 0;
    }
    state.own = c.kind == k_norm ? s.length : 0.0;
    c.positions[slot] = state.position;
    c.mass[slot] = c.call[slot] = 0.0;
    c.own[slot] = state.own;
    c.own[all + slot] = c.kind == v_length_h2o ? s.length : 0.0;
}

__device__ __forceinline__ void learn(const sa_cuda_slots &c, const step &at, int64_t i, double weight, double sum, const step_shared &s,
                                      slot_state &state)
{
    const int64_t slot = at.first + i;
    if (at.weights != nullptr) {
        state.mass += weight;
        c.mass[slot] = state.mass;
    }
    if (c.kind == h2o_ema) {
        state.own = product(c.decay, state.own) + weight;
        c.own[slot] = state.own;
    } else if (c.kind == v_length_h2o && sum > 0.0) {
        state.own += product(weight, value_length(c, at, s, i)) / sum;
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

/* All slots of the stream, the first of which are loaded: the thread's lowest, and its mass. */
__device__ __forceinline__ lowest pass_slots(const sa_cuda_slots &c, const step &at, double sum, some_slots &some, step_shared &s, double &mass)
{
    lowest own = {~(uint64_t)0, INT64_MAX, 0};
#pragma unroll 1
    for (int64_t from = threadIdx.x; from <= at.last;) {
        float weights[at_a_time];
#pragma unroll
        for (int e = 0; e < at_a_time; e++) {
            const int64_t i = from + e * SA_KV_STEP_THREADS;
            weights[e] = at.weights != nullptr && i <= at.last ? at.weights[i] : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < at_a_time; e++) {
            const int64_t i = from + e * SA_KV_STEP_THREADS;
            slot_state &state = some.states[e];
            if (i <= at.last) {
                if (i == at.last && at.appended) {
                    begin_token(c, at, s, state);
                }
                learn(c, at, i, (double)weights[e], sum, s, state);
                judge_slot(c, at, i, state, own, mass);
                if (i == at.last) {
                    s.last[0] = state.mass;
                    s.last[1] = state.own;
                    s.last[2] = c.kind == v_length_h2o ? value_length(c, at, s, i) : 0.0;
                }
            }
        }
        from += at_a_time * SA_KV_STEP_THREADS;
        if (from <= at.last) {
            load_slots(c, at, from, some);
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
    at.appended = c.appended;
    at.weights = c.weights != nullptr ? c.weights + at.stream * c.stride : nullptr;
    return at;
}

/* By one thread, before anything is known. */
__device__ __forceinline__ void load_ledger(const sa_cuda_slots &c, const step &at, step_ledger &known)
{
    const sa_ledger &ledger = c.ledgers[at.stream];
    known.mass = ledger.mass;
    known.largest = ledger.largest;
    known.evicted = ledger.evicted;
    known.logged = ledger.logged;
    known.place = c.log_size > 0 ? at.stream * c.log_size + known.logged % c.log_size : 0;
}

/* The token has left; by one thread. */
__device__ __forceinline__ void record_step(const sa_cuda_slots &c, const step &at, const step_ledger &known, int64_t position, double mass)
{
    sa_ledger &ledger = c.ledgers[at.stream];
    ledger.evicted = known.evicted + 1;
    if (c.log_size > 0) {
        ledger.logged = known.logged + 1;
        c.log[known.place] = {position, at.now, at.weights != nullptr ? mass : (double)NAN};
    }
    if (at.weights != nullptr) {
        ledger.mass = known.mass + mass;
        ledger.largest = mass > known.largest ? mass : known.largest;
        add_to(&ledger.histogram[ledger_bin(mass)], 1); /* nobody waits for what was there */
    }
}

/* Length of the new key or value, by a warp, where the policy wants it. */
__device__ __forceinline__ void measure_token(const sa_cuda_slots &c, const step &at, step_shared &s)
{
    const bool of_key = c.kind == k_norm;
    const int64_t depth = of_key ? c.depth : c.depth_v;
    const double length = sqrt(square_of(c, of_key ? c.keys : c.values, (at.first + at.last) * depth, depth));
    if (threadIdx.x % 32 == 0) {
        s.length = length;
    }
}

/* A number of the new key or value for each thread, to be moved. */
struct moved_number {
    void *vectors;
    int64_t width, element;
    uint32_t number;
    bool is;
};

__device__ __forceinline__ moved_number load_moved(const sa_cuda_slots &c, const step &at)
{
    const int depth = (int)c.depth, d = threadIdx.x;
    const bool of_key = d < depth;
    moved_number m = {of_key ? c.keys : c.values, of_key ? c.depth : c.depth_v, of_key ? d : d - depth, 0, at.evicts && d < depth + (int)c.depth_v};
    if (m.is) {
        const int64_t from = (at.first + at.last) * m.width + m.element;
        m.number = c.dtype == SA_CUDA_F32 ? ((const uint32_t *)m.vectors)[from] : ((const uint16_t *)m.vectors)[from];
    }
    return m;
}

__device__ __forceinline__ void store_moved(const sa_cuda_slots &c, const step &at, const moved_number &m, int64_t target)
{
    const int64_t to = (at.first + target) * m.width + m.element;
    if (m.is && c.dtype == SA_CUDA_F32) {
        ((uint32_t *)m.vectors)[to] = m.number;
    } else if (m.is) {
        ((uint16_t *)m.vectors)[to] = (uint16_t)m.number;
    }
}

__device__ __forceinline__ void run_step(const sa_cuda_slots &c)
{
    extern __shared__ __align__(16) char memory[];
    step_shared &s = *(step_shared *)memory;
    const step at = begin_step(c);
    some_slots some;
    load_slots(c, at, threadIdx.x, some);
    if (threadIdx.x == 64) {
        load_ledger(c, at, s.ledger);
    }
    if (c.waits) {
        wait_for_last();
    }
    if (new_tokens(c, at.row) == 0) {
        return;
    }
    const moved_number moved = load_moved(c, at);
    if (at.appended && (c.kind == k_norm || c.kind == v_length_h2o)) {
        if (threadIdx.x < 32) {
            measure_token(c, at, s);
        }
        __syncthreads();
    }
    double mass = 0.0;
    const double sum = c.kind == v_length_h2o ? value_weights(c, at, s) : 0.0;
    const lowest own = pass_slots(c, at, sum, some, s, mass);
    if (at.evicts) {
        const lowest gone = lowest_of_step(own, s);
        if (own.slot == gone.slot && own.position == gone.position) { /* the thread that found it knows its mass */
            record_step(c, at, s.ledger, gone.position, mass);
        }
        if (gone.slot != at.last) {
            store_moved(c, at, moved, gone.slot);
            move_last(c, at, s, gone.slot);
        }
    } else {
        __syncthreads(); /* everybody has read how much was held */
    }
    if (threadIdx.x == 32) {
        c.held[at.stream] = at.evicts ? at.last : at.last + 1;
        c.lengths[at.stream] = at.now;
        if (at.evicts) {
            c.evicted_at[at.stream] = at.now;
        }
    }
}

} // namespace sa

extern "C" __global__ void __launch_bounds__(SA_KV_STEP_THREADS) kv_step(const __grid_constant__ sa_cuda_slots c)
{
    sa::run_step(c);
}
