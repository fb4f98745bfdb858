/* KVCache: tokens out of the slots, any number at a time; csrc/core/policy.c and csrc/cpu/kv_evict.c have the words.
 *
 * kv_evict: a CTA for each stream. It takes in the weights that the queries gave, finds the `leaving` lowest scores (one: by a minimum; more:
 * by bisection of the scores as ordered bits, which is exact), writes the ledger, and moves who lies behind the tokens that stay into the
 * slots of those that left. No atomics; every result is the same each time. bytes = slots * (weights + state), read and written once.
 * kv_mass: what the tokens held received in a call, in order of their positions. A step of one token is kv_step.cu's.
 * Not timed yet. */
#include "kv_slots.cuh"

namespace sa
{

constexpr int evict_threads = 32 * SA_KV_EVICT_WARPS;

/* --- what a CTA knows of its stream ------------------------------------------------------------------------------------------------- */

struct judged {
    int64_t stream, row, head, first; /* first slot among all */
    int64_t held, fresh, count, length; /* length: with the new tokens */
    int64_t leaving, stay, pinned, recent_from;
    uint64_t *order; /* [count] scores as ordered bits */
    int32_t *list;   /* [2 * stride] work */
    double *means;   /* [count] of SnapKV */
    uint64_t bound;  /* who leaves: a score below, or this one and a position up to `position` */
    int64_t position;
};

struct evict_shared {
    judged at;
    lowest found[SA_KV_EVICT_WARPS];
    int64_t counts[SA_KV_EVICT_WARPS];
    double sums[SA_KV_EVICT_WARPS];
};

__device__ int64_t budget_at(const sa_cuda_slots &c, int64_t head, int64_t length)
{
    return least(length, c.budgets[head]);
}

__device__ judged judge(const sa_cuda_slots &c)
{
    judged at = {};
    at.stream = blockIdx.x;
    at.row = at.stream / c.heads_kv;
    at.head = at.stream % c.heads_kv;
    at.first = at.stream * c.stride;
    at.held = clamp(c.held[at.stream], 0, c.stride);
    at.count = clamp(c.counts[at.stream], at.held, c.stride);
    at.fresh = at.count - at.held;
    at.length = c.lengths[at.stream] + at.fresh;
    const int64_t last = at.length - at.length % c.every;
    at.stay = least(at.count, budget_at(c, at.head, last) + at.length - last);
    at.leaving = at.count - at.stay;
    at.pinned = c.pinned;
    at.recent_from = last - c.recent;
    at.order = c.scratch + at.stream * 3 * c.stride;
    at.list = (int32_t *)(at.order + c.stride);
    at.means = (double *)(at.order + 2 * c.stride);
    return at;
}

/* Sum over the CTA, in one order; everybody gets it. */
template <typename T> __device__ T sum_all(T value, T *of_warps)
{
    for (int step = 16; step > 0; step /= 2) {
        value += __shfl_xor_sync(~0u, value, step);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        of_warps[threadIdx.x / 32] = value;
    }
    __syncthreads();
    T sum = of_warps[0];
    for (int i = 1; i < SA_KV_EVICT_WARPS; i++) {
        sum += of_warps[i];
    }
    return sum;
}

/* --- what the queries gave ---------------------------------------------------------------------------------------------------------- */

/* One query, of its place in the window; visible: tokens that it saw. */
__device__ void observe(const sa_cuda_slots &c, const judged &at, int64_t slot, float weight, int64_t query, int64_t visible)
{
    const int64_t place = c.window > 0 ? query % c.window : 0;
    if (c.kind == h2o_ema) {
        c.own[slot] = product(c.decay, c.own[slot]) + (double)weight;
    } else if (c.kind == snap_kv) {
        ((float *)(c.rings + slot * c.ring_bytes))[place] = weight;
    } else if (c.kind == scissorhands) {
        put_bit(c, slot, place, (double)weight * (double)visible >= 1.0);
    }
}

__device__ void take_weights(const sa_cuda_slots &c, evict_shared &s)
{
    const judged &at = s.at;
    const bool each = c.kind >= h2o_ema && c.kind <= snap_kv;
    const int64_t rows = c.weights == nullptr ? 0 : each ? at.fresh : least(c.weight_rows, at.fresh), all = c.batch * c.heads_kv * c.stride;
    for (int64_t i = threadIdx.x; i < at.held && c.first_part && c.keep_call; i += evict_threads) {
        c.call[at.first + i] = 0.0;
    }
    for (int64_t row = 0; row < rows; row++) {
        const float *weights = c.weights + (at.stream * c.weight_rows + row) * c.stride;
        double sum = 0.0;
        for (int64_t i = threadIdx.x; i < at.count && c.kind == v_length_h2o; i += evict_threads) {
            sum += product((double)weights[i], c.own[all + at.first + i]);
        }
        sum = c.kind == v_length_h2o ? sum_all(sum, s.sums) : 0.0;
        for (int64_t i = threadIdx.x; i < at.count; i += evict_threads) {
            const int64_t slot = at.first + i;
            c.mass[slot] += (double)weights[i];
            if (c.keep_call) {
                c.call[slot] += (double)weights[i];
            }
            if (sum > 0.0) {
                c.own[slot] += product((double)weights[i], c.own[all + slot]) / sum;
            } else if (c.kind != v_length_h2o && each) {
                observe(c, at, slot, weights[i], at.length - at.fresh + row, at.held + row + 1);
            }
        }
    }
}

/* --- scores ------------------------------------------------------------------------------------------------------------------------- */

__device__ double score_of(const sa_cuda_slots &c, const judged &at, int64_t i)
{
    const int64_t slot = at.first + i;
    switch (c.kind) {
    case h2o: return c.mass[slot];
    case h2o_norm: return c.mass[slot] / (double)(at.length - c.positions[slot]);
    case h2o_ema:
    case v_length_h2o: return c.own[slot];
    case k_norm: return -c.own[slot];
    case drawn: return drawn_score(c, at.row, at.head, c.positions[slot]);
    case scissorhands: return bits_set(c, slot);
    case tova: return shared_weight(c, at.row, at.fresh - 1, i);
    default: return 0.0; /* SinkWindow: ties go to the newer */
    }
}

/* SnapKV: mean over the window's queries, pooled over neighbours in order of position. Ranks are counted, slot by slot: exact, and n^2. */
__device__ void score_snap(const sa_cuda_slots &c, const judged &at)
{
    const int64_t before = at.length - c.window;
    int32_t *by_rank = at.list, *ranks = at.list + c.stride;
    for (int64_t i = threadIdx.x; i < at.count; i += evict_threads) {
        const float *ring = (const float *)(c.rings + (at.first + i) * c.ring_bytes);
        const int64_t position = c.positions[at.first + i];
        double sum[4] = {};
        int32_t rank = 0;
        for (int64_t j = 0; j < at.count; j++) {
            rank += c.positions[at.first + j] < position;
        }
        for (int64_t q = 0; q < c.window; q++) { /* the order of the host: four at a time, the rest into the first */
            sum[q < c.window / 4 * 4 ? q % 4 : 0] += (double)ring[q];
        }
        ranks[i] = rank;
        by_rank[rank] = (int32_t)i;
        at.means[i] = (sum[0] + sum[1] + (sum[2] + sum[3])) / (double)c.window;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < at.count; i += evict_threads) {
        double pooled = c.positions[at.first + i] < before ? 0.0 : (double)infinity;
        for (int64_t rank = most(ranks[i] - c.kernel / 2, 0); rank <= least(ranks[i] + c.kernel / 2, at.count - 1) && pooled < infinity; rank++) {
            const int64_t near = by_rank[rank];
            const bool judged = c.positions[at.first + near] < before;
            const double mean = judged ? at.means[near] : 0.0;
            pooled = c.maximum ? (mean > pooled ? mean : pooled) : judged ? pooled + mean / (double)c.kernel : pooled;
        }
        at.order[i] = ordered(pooled);
    }
    __syncthreads();
}

__device__ __forceinline__ uint64_t score_bits(const sa_cuda_slots &c, const judged &at, int64_t i)
{
    return c.kind == snap_kv ? at.order[i] : ordered(score_of(c, at, i));
}

__device__ __forceinline__ bool is_free(const sa_cuda_slots &c, const judged &at, int64_t i)
{
    const int64_t position = c.positions[at.first + i];
    return position >= at.pinned && position < at.recent_from;
}

/* Tokens that may leave and whose score and position are not above the bounds. */
__device__ int64_t count_below(const sa_cuda_slots &c, evict_shared &s, uint64_t bound, int64_t position)
{
    int64_t count = 0;
    for (int64_t i = threadIdx.x; i < s.at.count; i += evict_threads) {
        const uint64_t score = s.at.order[i];
        count += is_free(c, s.at, i) && (score < bound || (score == bound && c.positions[s.at.first + i] <= position));
    }
    return sum_all(count, s.counts);
}

/* The slot of the single lowest, by a minimum over the CTA: no score is ever written. */
__device__ int64_t find_lowest(const sa_cuda_slots &c, evict_shared &s)
{
    lowest own = {~(uint64_t)0, INT64_MAX, 0};
    for (int64_t i = threadIdx.x; i < s.at.count; i += evict_threads) {
        if (is_free(c, s.at, i)) {
            take_lower(own, {score_bits(c, s.at, i), c.positions[s.at.first + i], i});
        }
    }
    take_lowest_of_warp(own);
    if (threadIdx.x % 32 == 0) {
        s.found[threadIdx.x / 32] = own;
    }
    __syncthreads();
    for (int i = 0; i < SA_KV_EVICT_WARPS; i++) {
        take_lower(own, s.found[i]);
    }
    return own.slot;
}

/* The bound that exactly `leaving` do not exceed: bit by bit, first of the score, then among its equals of the position. */
__device__ void find_bound(const sa_cuda_slots &c, evict_shared &s, uint64_t &bound, int64_t &position)
{
    bound = 0;
    for (int bit = 63; bit >= 0; bit--) { /* the largest number that fewer than `leaving` lie below */
        const uint64_t trial = bound | (uint64_t)1 << bit;
        bound = count_below(c, s, trial, -1) < s.at.leaving ? trial : bound;
    }
    position = INT64_MAX;
    if (count_below(c, s, bound, position) == s.at.leaving) {
        return;
    }
    position = 0;
    for (int bit = 62; bit >= 0; bit--) {
        const int64_t trial = position | (int64_t)1 << bit;
        position = count_below(c, s, bound, trial - 1) < s.at.leaving ? trial : position;
    }
}

/* --- who leaves, and who moves ------------------------------------------------------------------------------------------------------ */

__device__ __forceinline__ bool leaves(const sa_cuda_slots &c, const judged &at, int64_t i)
{
    const int64_t position = c.positions[at.first + i];
    return is_free(c, at, i) && (at.order[i] < at.bound || (at.order[i] == at.bound && position <= at.position));
}

/* Slots from begin to end whose token leaves (or stays), ascending, into a list; returns how many. */
__device__ int64_t list_slots(const sa_cuda_slots &c, evict_shared &s, int64_t begin, int64_t end, bool leaving, int32_t *list)
{
    int64_t listed = 0;
    for (int64_t from = begin; from < end; from += evict_threads) {
        const int64_t i = from + threadIdx.x;
        const bool taken = i < end && leaves(c, s.at, i) == leaving;
        const unsigned votes = __ballot_sync(~0u, taken);
        __syncthreads();
        if (threadIdx.x % 32 == 0) {
            s.counts[threadIdx.x / 32] = __popc(votes);
        }
        __syncthreads();
        int64_t place = listed + __popc(votes & ((1u << threadIdx.x % 32) - 1));
        for (int warp = 0; warp < SA_KV_EVICT_WARPS; warp++) {
            place += warp < (int)threadIdx.x / 32 ? s.counts[warp] : 0;
            listed += s.counts[warp];
        }
        if (taken) {
            list[place] = (int32_t)i;
        }
    }
    return listed;
}

/* In order of position: the sums of a ledger do not depend on slots. list: those that leave; sorted: as many. */
__device__ void record(const sa_cuda_slots &c, const judged &at, const int32_t *list, int32_t *sorted)
{
    for (int64_t i = threadIdx.x; i < at.leaving; i += evict_threads) {
        int64_t rank = 0;
        for (int64_t j = 0; j < at.leaving; j++) {
            rank += c.positions[at.first + list[j]] < c.positions[at.first + list[i]];
        }
        sorted[rank] = list[i];
    }
    __syncthreads();
    for (int64_t i = 0; i < at.leaving && threadIdx.x == 0; i++) {
        const int64_t slot = at.first + sorted[i];
        record_one(c, at.stream, c.positions[slot], at.length, c.mass[slot]);
    }
    __syncthreads();
}

__device__ void copy_bytes(char *data, int64_t from, int64_t to, int64_t bytes)
{
    for (int64_t i = threadIdx.x % 32; i < bytes; i += 32) {
        data[to * bytes + i] = data[from * bytes + i];
    }
}

/* A token into the slot of one that left; by a warp. Sources lie behind the tokens that stay, targets before: none is both. */
__device__ void move(const sa_cuda_slots &c, const judged &at, int64_t source, int64_t target)
{
    const int64_t from = at.first + source, to = at.first + target, all = c.batch * c.heads_kv * c.stride, size = c.dtype == SA_CUDA_F32 ? 4 : 2;
    copy_bytes((char *)c.keys, from, to, c.depth * size);
    copy_bytes((char *)c.values, from, to, c.depth_v * size);
    copy_bytes(c.rings, from, to, c.ring_bytes);
    if (threadIdx.x % 32 == 0) {
        c.positions[to] = c.positions[from];
        c.mass[to] = c.mass[from];
        c.call[to] = c.call[from];
        c.own[to] = c.own[from];
        c.own[all + to] = c.own[all + from];
    }
}

/* One token leaves: the last slot moves into its place. Returns how many move. */
__device__ int64_t choose_one(const sa_cuda_slots &c, evict_shared &s)
{
    const int64_t slot = find_lowest(c, s);
    if (threadIdx.x == 0) {
        s.at.list[0] = (int32_t)slot;
        s.at.list[c.stride] = (int32_t)s.at.stay;
    }
    __syncthreads();
    record(c, s.at, s.at.list, s.at.list + c.stride + 1);
    return slot < s.at.stay;
}

__device__ int64_t choose_many(const sa_cuda_slots &c, evict_shared &s)
{
    uint64_t bound;
    int64_t position;
    for (int64_t i = threadIdx.x; i < s.at.count; i += evict_threads) {
        s.at.order[i] = score_bits(c, s.at, i);
    }
    __syncthreads();
    find_bound(c, s, bound, position);
    __syncthreads();
    if (threadIdx.x == 0) {
        s.at.bound = bound;
        s.at.position = position;
    }
    __syncthreads();
    (void)list_slots(c, s, 0, s.at.count, true, s.at.list);
    __syncthreads();
    record(c, s.at, s.at.list, s.at.list + c.stride);
    return list_slots(c, s, s.at.stay, s.at.count, false, s.at.list + c.stride); /* gaps: those that leave, from the first on */
}

/* The lse of a part into its place among those of the call. */
__device__ void place_lse(const sa_cuda_slots &c)
{
    const int64_t heads = c.heads_kv * c.group, rows = c.group * c.tokens;
    for (int64_t i = threadIdx.x; i < rows && c.lse != nullptr; i += evict_threads) {
        const int64_t head = blockIdx.x / c.heads_kv * heads + blockIdx.x % c.heads_kv * c.group + i / c.tokens;
        c.lse_out[head * c.lse_length + c.first + i % c.tokens] = c.lse[head * c.tokens + i % c.tokens];
    }
}

__device__ void evict(const sa_cuda_slots &c)
{
    extern __shared__ __align__(16) char memory[];
    evict_shared &s = *(evict_shared *)memory;
    place_lse(c);
    if (threadIdx.x == 0) {
        s.at = judge(c);
    }
    __syncthreads();
    take_weights(c, s);
    __syncthreads();
    const judged &at = s.at;
    const bool evicts = at.leaving > 0 && at.fresh > 0;
    if (evicts) {
        if (c.kind == snap_kv) {
            score_snap(c, at);
        }
        const int64_t moved = at.leaving == 1 ? choose_one(c, s) : choose_many(c, s);
        __syncthreads();
        for (int64_t i = threadIdx.x / 32; i < moved; i += SA_KV_EVICT_WARPS) {
            move(c, at, at.list[c.stride + i], at.list[i]);
        }
    }
    if (threadIdx.x == 0) {
        c.evicted_at[at.stream] = evicts ? at.length : c.evicted_at[at.stream];
        c.held[at.stream] = at.fresh > 0 ? at.stay : at.held;
        c.lengths[at.stream] = at.length;
    }
}

/* A place for each token held, by counting the positions before it. */
__device__ void take_mass(const sa_cuda_slots &c)
{
    const int64_t first = blockIdx.x * c.stride, held = clamp(c.held[blockIdx.x], 0, c.slots);
    float *out = c.mass_out + blockIdx.x * c.slots;
    for (int64_t i = threadIdx.x; i < c.slots; i += evict_threads) {
        int64_t rank = i;
        if (i < held) {
            rank = 0;
            for (int64_t j = 0; j < held; j++) {
                rank += c.positions[first + j] < c.positions[first + i];
            }
        }
        out[rank] = i < held ? (float)c.call[first + i] : 0.0f;
    }
}

} // namespace sa

extern "C" __global__ void __launch_bounds__(32 * SA_KV_EVICT_WARPS) kv_evict(const __grid_constant__ sa_cuda_slots c)
{
    sa::evict(c);
}

extern "C" __global__ void __launch_bounds__(32 * SA_KV_EVICT_WARPS) kv_mass(const __grid_constant__ sa_cuda_slots c)
{
    sa::take_mass(c);
}
