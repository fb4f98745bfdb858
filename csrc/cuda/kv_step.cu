/* KVCache: a step of one token. The policy learns from the query's weights, and one token leaves to make room for the new one.
 *
 * A CTA for each stream, and one pass: mass, position and the policy's number of every slot are asked for before anything is known, and
 * before the attention that gives the weights has ended, where the kernel may begin early. Then what the policy remembers goes forward, and
 * the lowest score is found by a minimum over the CTA; no score is written. The new token, whose key and value lie in the last slot, goes
 * where the token was that leaves; what is known of it is written there alone. Every result is the same each time.
 * A kernel for each policy: code that runs once and cold is what such a kernel waits for.
 * bytes = slots * (4 + 24 to 40), read once, mass and the policy's number written once.
 * H200, 2026-11-25, bf16, 32/8 heads, D 128, graph replay of 12 caches in turn, us, a step with attention and append, beside one of SinkCache:
 *                     B 1, 1024 slots   B 1, 4096     B 8, 1024     B 8, 4096
 *   one kernel for all        17.0 / 8.6   23.8 / 12.7   27.2 / 16.3   56.4 / 40.3   H2O
 *   one for each policy       14.2 / 8.3   19.7 / 12.5   23.7 / 16.3   51.2 / 39.9   H2O
 *                             20.6         26.2          32.7          58.4          TOVA
 *                             11.4 / 8.4   15.8 / 12.8   20.2 / 16.3   44.5 / 39.5   SinkWindow without mass
 *   in the attention (decode_evict.cuh), where that serves: see there
 * Tried and lost: TOVA's mean over heads with the loads of eight slots at a time (27.3, 33.6, 38.2, 65.9): it spills. */
#include "kv_slots.cuh"

namespace sa
{

constexpr int at_a_time = SA_KV_SLOTS_A_THREAD, most_warps = SA_KV_STEP_THREADS / 32;

/* What the ledger says before the token leaves, and where its entry goes. */
struct step_ledger {
    double mass, largest;
    int64_t evicted, logged, place;
};

struct step_shared {
    lowest found[most_warps];
    double sums[most_warps];
    double length; /* of the new key or value, where the policy wants it */
    step_ledger ledger;
    uint32_t touched[most_warps];
};
static_assert(sizeof(step_shared) <= SA_KV_STEP_SHARED, "room for what warps have found");

/* What every thread knows of its stream; arrays begin at its first slot. */
struct step {
    uint32_t stream, row, head;
    int last;              /* slot of the new token */
    int64_t now;           /* tokens seen with it */
    int64_t recent_from;
    bool evicts;
    const float *weights;  /* NULL: not tracked */
    double *mass, *own, *lengths;
    int64_t *positions;
};

/* A token, and what it has received. */
struct judged_slot {
    lowest by;
    double mass;
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
    for (int i = 0; i < (int)blockDim.x / 32; i++) {
        sum += of_warps[i];
    }
    return sum;
}

/* --- one slot ----------------------------------------------------------------------------------------------------------------------- */

/* Did a token get more than its share of the query? */
__device__ __forceinline__ bool above_share(const step &at, double weight)
{
    return weight * (double)(at.last + 1) >= 1.0;
}

template <int kind> __device__ __forceinline__ constexpr bool keeps_number()
{
    return kind == h2o_ema || kind == v_length_h2o;
}

template <int kind>
__device__ __forceinline__ double score_of(const sa_cuda_slots &c, const step &at, int i, double mass, double own, int64_t position)
{
    if constexpr (kind == h2o) {
        return mass;
    } else if constexpr (kind == h2o_norm) {
        return mass / (double)(at.now - position);
    } else if constexpr (keeps_number<kind>()) {
        return own;
    } else if constexpr (kind == k_norm) {
        return -own;
    } else if constexpr (kind == scissorhands) {
        return bits_set(c, (int64_t)at.stream * c.stride + i);
    } else if constexpr (kind == tova) {
        return shared_weight(c, at.row, 0, i);
    } else if constexpr (kind == drawn) {
        return drawn_score(c, at.row, at.head, position);
    }
    return 0.0; /* SinkWindow: ties go to the newer */
}

/* The policy's number after the query. length: of the value, where it counts. */
template <int kind> __device__ __forceinline__ double learn(const sa_cuda_slots &c, double own, double weight, double length, double sum)
{
    if constexpr (kind == h2o_ema) {
        return product(c.decay, own) + weight;
    } else if constexpr (kind == v_length_h2o) {
        return sum > 0.0 ? own + product(weight, length) / sum : own;
    }
    return own;
}

__device__ __forceinline__ bool may_leave(const sa_cuda_slots &c, const step &at, int64_t position)
{
    return at.evicts && position >= c.pinned && position < at.recent_from;
}

__device__ __forceinline__ void judge(int i, double score, double mass, int64_t position, judged_slot &lowest_yet)
{
    const lowest other = {ordered(score), position, i};
    if (other.score < lowest_yet.by.score || (other.score == lowest_yet.by.score && position < lowest_yet.by.position)) {
        lowest_yet = {other, mass};
    }
}

/* --- the slots that were held ---------------------------------------------------------------------------------------------------------- */

struct some_slots {
    double mass[at_a_time], own[at_a_time];
    int64_t position[at_a_time];
};

/* Slots from, from + the CTA's threads, .. */
template <int kind> __device__ __forceinline__ void load_slots(const step &at, int from, some_slots &some)
{
#pragma unroll
    for (int e = 0; e < at_a_time; e++) {
        const int i = from + e * (int)blockDim.x;
        some.mass[e] = some.own[e] = 0.0;
        if (i < at.last) {
            some.position[e] = at.positions[i];
            if (at.weights != nullptr) {
                some.mass[e] = at.mass[i];
            }
            if constexpr (keeps_number<kind>() || kind == k_norm) {
                some.own[e] = at.own[i];
            }
        }
    }
}

template <int kind>
__device__ __forceinline__ void pass_slots(const sa_cuda_slots &c, const step &at, double sum, some_slots &some, judged_slot &lowest_yet)
{
#pragma unroll 1
    for (int from = threadIdx.x; from < at.last;) {
        float weights[at_a_time];
#pragma unroll
        for (int e = 0; e < at_a_time; e++) {
            const int i = from + e * (int)blockDim.x;
            weights[e] = at.weights != nullptr && i < at.last ? at.weights[i] : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < at_a_time; e++) {
            const int i = from + e * (int)blockDim.x;
            if (i < at.last) {
                const double weight = (double)weights[e], mass = some.mass[e] + weight;
                const double own = learn<kind>(c, some.own[e], weight, kind == v_length_h2o ? at.lengths[i] : 0.0, sum);
                if (at.weights != nullptr) {
                    at.mass[i] = mass;
                }
                if constexpr (keeps_number<kind>()) {
                    at.own[i] = own;
                }
                if constexpr (kind == scissorhands) {
                    put_bit(c, (int64_t)at.stream * c.stride + i, (at.now - 1) % c.window, above_share(at, weight));
                }
                if (may_leave(c, at, some.position[e])) {
                    judge(i, score_of<kind>(c, at, i, mass, own, some.position[e]), mass, some.position[e], lowest_yet);
                }
            }
        }
        from += at_a_time * (int)blockDim.x;
        load_slots<kind>(at, from, some);
    }
}

/* sum_j a_j |v_j|, the new token's included. */
__device__ __forceinline__ double value_weights(const step &at, step_shared &s)
{
    double sum = 0.0;
#pragma unroll 1
    for (int i = threadIdx.x; i <= at.last; i += blockDim.x) {
        sum += product((double)at.weights[i], i == at.last ? s.length : at.lengths[i]);
    }
    return sum_of_step(sum, s.sums);
}

/* --- the new token -------------------------------------------------------------------------------------------------------------------- */

struct new_token {
    double mass, own;
};

/* By every thread: what its query gave it. */
template <int kind> __device__ __forceinline__ new_token meet_token(const sa_cuda_slots &c, const step &at, double sum, const step_shared &s)
{
    const double weight = at.weights != nullptr ? (double)at.weights[at.last] : 0.0;
    return {weight, kind == k_norm ? s.length : learn<kind>(c, 0.0, weight, kind == v_length_h2o ? s.length : 0.0, sum)};
}

/* What is known of it, into its slot; by one thread. */
template <int kind>
__device__ __forceinline__ void settle_token(const sa_cuda_slots &c, const step &at, const new_token &token, int target, const step_shared &s)
{
    at.positions[target] = at.now - 1;
    at.mass[target] = token.mass;
    at.own[target] = token.own;
    at.lengths[target] = kind == v_length_h2o ? s.length : 0.0;
    if constexpr (kind == scissorhands) {
        const int64_t slot = (int64_t)at.stream * c.stride + target;
        for (int64_t word = 0; word < c.ring_bytes / 8; word++) {
            ((uint64_t *)(c.rings + slot * c.ring_bytes))[word] = 0;
        }
        put_bit(c, slot, (at.now - 1) % c.window, above_share(at, token.mass));
    }
}

/* Key and value in words, or in halves of them where a vector is no whole number of words. */
struct moved_vectors {
    char *keys, *values; /* of the stream */
    int unit, of_key, units;

    __device__ __forceinline__ char *place(int slot, int i) const
    {
        return i < of_key ? keys + ((int64_t)slot * of_key + i) * unit : values + ((int64_t)slot * (units - of_key) + i - of_key) * unit;
    }
    __device__ __forceinline__ uint32_t load(int slot, int i) const
    {
        return unit == 4 ? *(const uint32_t *)place(slot, i) : *(const uint16_t *)place(slot, i);
    }
    __device__ __forceinline__ void store(int slot, int i, uint32_t bits) const
    {
        if (unit == 4) {
            *(uint32_t *)place(slot, i) = bits;
        } else {
            *(uint16_t *)place(slot, i) = (uint16_t)bits;
        }
    }
};

__device__ __forceinline__ moved_vectors vectors_of(const sa_cuda_slots &c, uint32_t stream)
{
    const int size = c.dtype == SA_CUDA_F32 ? 4 : 2, key = (int)c.depth * size, value = (int)c.depth_v * size;
    const int unit = ((key | value) & 3) == 0 ? 4 : 2;
    return {(char *)c.keys + (int64_t)stream * c.stride * key, (char *)c.values + (int64_t)stream * c.stride * value, unit, key / unit,
            (key + value) / unit};
}

/* Length of the new key or value, by a warp. */
__device__ __forceinline__ void measure_token(const sa_cuda_slots &c, const step &at, bool of_key, step_shared &s)
{
    const int64_t depth = of_key ? c.depth : c.depth_v, slot = (int64_t)at.stream * c.stride + at.last;
    const double length = sqrt(square_of(c, of_key ? c.keys : c.values, slot * depth, depth));
    if (threadIdx.x % 32 == 0) {
        s.length = length;
    }
}

/* --- the end ---------------------------------------------------------------------------------------------------------------------------- */

/* The lowest of the CTA; everybody gets it. */
__device__ __forceinline__ lowest lowest_of_step(lowest own, step_shared &s)
{
    take_lowest_of_warp(own);
    if (threadIdx.x % 32 == 0) {
        s.found[threadIdx.x / 32] = own;
    }
    __syncthreads();
    const uint32_t lane = threadIdx.x % 32;
    own = lane < blockDim.x / 32 ? s.found[lane] : lowest{~(uint64_t)0, INT64_MAX, 0};
    take_lowest_of_warp(own);
    return own;
}

/* By one thread, before anything is known. */
__device__ __noinline__ void load_ledger(const sa_cuda_slots &c, uint32_t stream, step_ledger &known)
{
    const sa_ledger &ledger = c.ledgers[stream];
    known.mass = ledger.mass;
    known.largest = ledger.largest;
    known.evicted = ledger.evicted;
    known.logged = ledger.logged;
    known.place = c.log_size > 0 ? stream * c.log_size + known.logged % c.log_size : 0;
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

/* --- the kernel ------------------------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ step begin_step(const sa_cuda_slots &c)
{
    step at;
    at.stream = blockIdx.x;
    at.row = at.stream / (uint32_t)c.heads_kv;
    at.head = at.stream - at.row * (uint32_t)c.heads_kv;
    const int64_t first = at.stream * c.stride;
    at.positions = c.positions + first;
    at.mass = c.mass + first;
    at.own = c.own + first;
    at.lengths = at.own + c.batch * c.heads_kv * c.stride;
    at.weights = c.weights != nullptr ? c.weights + first : nullptr;
    at.last = (int)clamp(c.held[at.stream], 0, c.stride - 1);
    at.now = c.lengths[at.stream] + 1;
    at.recent_from = at.now - c.recent;
    at.evicts = at.last + 1 > c.budgets[at.head];
    return at;
}

/* Parameters are cold: they are asked for before they are needed. */
__device__ __forceinline__ void touch_all(const sa_cuda_slots &c, step_shared &s)
{
    if (threadIdx.x % 32 == 0) {
        uint32_t words = 0;
#pragma unroll 1
        for (int line = threadIdx.x / 32; line < (int)sizeof c / 64; line += blockDim.x / 32) {
            words += touch_parameters(&c, line);
        }
        s.touched[threadIdx.x / 32] = words; /* nobody reads it */
    }
}

template <int kind> __device__ __forceinline__ void run_step(const sa_cuda_slots &c)
{
    extern __shared__ __align__(16) char memory[];
    step_shared &s = *(step_shared *)memory;
    touch_all(c, s);
    const step at = begin_step(c);
    some_slots some;
    load_slots<kind>(at, threadIdx.x, some);
    if (threadIdx.x == 32) {
        load_ledger(c, at.stream, s.ledger);
    }
    const moved_vectors vectors = vectors_of(c, at.stream);
    if (c.waits) {
        wait_for_last();
    }
    if (c.new_lengths.given && new_tokens(c, at.row) == 0) {
        return;
    }
    const int i = threadIdx.x;
    const uint32_t moved = i < vectors.units && at.evicts ? vectors.load(at.last, i) : 0;
    if constexpr (kind == k_norm || kind == v_length_h2o) {
        if (threadIdx.x < 32) {
            measure_token(c, at, kind == k_norm, s);
        }
        __syncthreads();
    }
    double sum = 0.0;
    if constexpr (kind == v_length_h2o) {
        sum = value_weights(at, s);
    }
    judged_slot own = {{~(uint64_t)0, INT64_MAX, 0}, 0.0};
    const new_token token = meet_token<kind>(c, at, sum, s);
    pass_slots<kind>(c, at, sum, some, own);
    if (threadIdx.x == 0 && may_leave(c, at, at.now - 1)) {
        const double score = kind == scissorhands ? (double)above_share(at, token.mass)
                                                  : score_of<kind>(c, at, at.last, token.mass, token.own, at.now - 1);
        judge(at.last, score, token.mass, at.now - 1, own);
    }
    int target = at.last;
    if (at.evicts) {
        const lowest gone = lowest_of_step(own.by, s);
        target = (int)gone.slot;
        if (own.by.slot == gone.slot && own.by.position == gone.position) { /* the thread that found it knows its mass */
            record_step(c, at, s.ledger, gone.position, own.mass);
        }
        if (target != at.last && i < vectors.units) {
            vectors.store(target, i, moved);
#pragma unroll 1
            for (int more = i + (int)blockDim.x; more < vectors.units; more += blockDim.x) {
                vectors.store(target, more, vectors.load(at.last, more));
            }
        }
    } else {
        __syncthreads(); /* everybody has read how much was held */
    }
    if (threadIdx.x == 0) {
        if (target != at.last || !at.evicts) {
            settle_token<kind>(c, at, token, target, s);
        }
        c.held[at.stream] = at.evicts ? at.last : at.last + 1;
        c.lengths[at.stream] = at.now;
        if (at.evicts) {
            c.evicted_at[at.stream] = at.now;
        }
    }
}

} // namespace sa

#define SA_KV_STEP(name)                                                                                            \
    extern "C" __global__ void __launch_bounds__(SA_KV_STEP_THREADS) kv_step_##name(const __grid_constant__ sa_cuda_slots c) \
    {                                                                                                               \
        sa::run_step<sa::name>(c);                                                                                  \
    }

SA_KV_STEP(sink_window)
SA_KV_STEP(h2o)
SA_KV_STEP(h2o_norm)
SA_KV_STEP(h2o_ema)
SA_KV_STEP(v_length_h2o)
SA_KV_STEP(scissorhands)
SA_KV_STEP(tova)
SA_KV_STEP(k_norm)
SA_KV_STEP(drawn)
