/* KVCache: new tokens into the slots, and tokens out of them; csrc/core/policy.c and csrc/cpu/kv_evict.c have the words.
 *
 * kv_append: a warp for each new token of a stream, behind those that are held.
 * kv_evict: a CTA for each stream. It takes in the weights that the queries gave, finds the `leaving` lowest scores (one: by a minimum; more:
 * by bisection of the scores as ordered bits, which is exact), writes the ledger, and moves who lies behind the tokens that stay into the
 * slots of those that left. No atomics; every result is the same each time. bytes = slots * (weights + state), read and written once.
 * Not timed yet. */
#include "kv_slots.h"
#include "problem.cuh"

namespace sa
{

/* In the order of sa_policy_kind. */
enum policy_kind { sink_window, h2o, h2o_norm, h2o_ema, v_length_h2o, scissorhands, tova, snap_kv, key_diff, k_norm, cur, expected, drawn };

constexpr int evict_threads = 32 * SA_KV_EVICT_WARPS;

__device__ __forceinline__ int64_t new_tokens(const sa_cuda_slots &c, int64_t row)
{
    return c.new_lengths.given ? clamp(integer_at(c.new_lengths, row) - c.first, 0, c.tokens) : c.tokens;
}

__device__ __forceinline__ double wide_number(int dtype, const void *data, int64_t at)
{
    return dtype == SA_CUDA_F32   ? (double)((const float *)data)[at]
           : dtype == SA_CUDA_F16 ? (double)f16::wide(((const uint16_t *)data)[at])
                                  : (double)bf16::wide(((const uint16_t *)data)[at]);
}

/* Copies one vector, by a warp; lane 0 returns the root of its square sum in the order of the elements where it is wanted. */
__device__ double take_vector(const sa_cuda_slots &c, const void *from, int64_t source, void *to, int64_t target, int64_t depth, bool measured)
{
    double sum = 0.0;
    for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
        if (c.dtype == SA_CUDA_F32) {
            ((uint32_t *)to)[target + d] = ((const uint32_t *)from)[source + d];
        } else {
            ((uint16_t *)to)[target + d] = ((const uint16_t *)from)[source + d];
        }
    }
    for (int64_t d = 0; d < depth && measured && threadIdx.x % 32 == 0; d++) {
        const double x = wide_number(c.dtype, from, source + d);
        sum += product(x, x);
    }
    return sqrt(sum);
}

__device__ void append(const sa_cuda_slots &c)
{
    const int64_t parts = gridDim.x / (c.batch * c.heads_kv), stream = blockIdx.x / parts, row = stream / c.heads_kv, head = stream % c.heads_kv;
    const int64_t held = clamp(c.held[stream], 0, c.stride), fresh = least(new_tokens(c, row), c.stride - held);
    const int64_t token = blockIdx.x % parts * SA_KV_APPEND_WARPS + threadIdx.x / 32;
    if (blockIdx.x % parts == 0 && threadIdx.x == 0) {
        c.counts[stream] = held + fresh;
    }
    if (token >= fresh) {
        return;
    }
    const int64_t slot = stream * c.stride + held + token, all = c.batch * c.heads_kv * c.stride;
    const int64_t key = row * c.key.batch + head * c.key.head + (c.first + token) * c.key.token;
    const int64_t value = row * c.value.batch + head * c.value.head + (c.first + token) * c.value.token;
    const double key_length = take_vector(c, c.key.data, key, c.keys, slot * c.depth, c.depth, c.kind == k_norm || c.kind == key_diff);
    const double value_length = take_vector(c, c.value.data, value, c.values, slot * c.depth_v, c.depth_v, c.kind == v_length_h2o);
    for (int64_t i = threadIdx.x % 32; i < c.ring_bytes; i += 32) {
        c.rings[slot * c.ring_bytes + i] = 0;
    }
    if (threadIdx.x % 32 == 0) {
        c.positions[slot] = c.lengths[stream] + token;
        c.mass[slot] = c.call[slot] = 0.0;
        c.own[slot] = key_length;
        c.own[all + slot] = value_length;
    }
}

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

/* A token, by what decides who leaves. */
struct lowest {
    uint64_t score;
    int64_t position, slot;
};

struct evict_shared {
    judged at;
    double sum;
    lowest found[SA_KV_EVICT_WARPS];
    int64_t counts[SA_KV_EVICT_WARPS];
    double sums[SA_KV_EVICT_WARPS];
};

__device__ int64_t budget_at(const sa_cuda_slots &c, int64_t head, int64_t length)
{
    const int64_t part = c.share > 0.0 ? (int64_t)ceil(c.share * (double)length) : 0;
    return least(length, most(c.budgets[head], part));
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
        uint64_t *word = (uint64_t *)(c.rings + slot * c.ring_bytes) + place / 64;
        const uint64_t bit = (uint64_t)1 << place % 64;
        *word = (double)weight * (double)visible >= 1.0 ? *word | bit : *word & ~bit;
    }
}

__device__ void take_weights(const sa_cuda_slots &c, evict_shared &s)
{
    const judged &at = s.at;
    const bool each = c.kind >= h2o_ema && c.kind <= snap_kv;
    const int64_t rows = c.weights == nullptr ? 0 : each ? at.fresh : least(c.weight_rows, at.fresh), all = c.batch * c.heads_kv * c.stride;
    for (int64_t i = threadIdx.x; i < at.held && c.first_part; i += evict_threads) {
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
            c.call[slot] += (double)weights[i];
            if (sum > 0.0) {
                c.own[slot] += product((double)weights[i], c.own[all + slot]) / sum;
            } else if (c.kind != v_length_h2o && each) {
                observe(c, at, slot, weights[i], at.length - at.fresh + row, at.held + row + 1);
            }
        }
    }
}

/* --- scores ------------------------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ uint64_t mixed(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

__device__ double score_of(const sa_cuda_slots &c, const judged &at, int64_t i)
{
    const int64_t slot = at.first + i;
    double sum = 0.0;
    switch (c.kind) {
    case h2o: return c.mass[slot];
    case h2o_norm: return c.mass[slot] / (double)(at.length - c.positions[slot]);
    case h2o_ema:
    case v_length_h2o: return c.own[slot];
    case k_norm: return -c.own[slot];
    case drawn: return (double)(mixed(mixed(mixed(c.seed + (uint64_t)at.row) + (uint64_t)at.head) + (uint64_t)c.positions[slot]) >> 11) * 0x1p-53;
    case scissorhands:
        for (int64_t word = 0; word < c.ring_bytes / 8; word++) {
            const uint64_t bits = ((const uint64_t *)(c.rings + slot * c.ring_bytes))[word];
            sum += (double)(__popc((uint32_t)bits) + __popc((uint32_t)(bits >> 32)));
        }
        return sum;
    case tova: /* every head holds the same tokens in the same slots */
        for (int64_t head = 0; head < c.heads_kv && at.fresh > 0; head++) {
            sum += (double)c.weights[((at.row * c.heads_kv + head) * c.weight_rows + at.fresh - 1) * c.stride + i];
        }
        return sum / (double)c.heads_kv;
    default: return 0.0; /* SinkWindow: ties go to the newer */
    }
}

/* As whole numbers in the same order: NaN lowest, both zeros alike. */
__device__ __forceinline__ uint64_t ordered(double score)
{
    if (score != score) {
        return 0;
    }
    union {
        double number;
        uint64_t bits;
    } as = {score + 0.0};
    return as.bits >> 63 ? ~as.bits : as.bits | (uint64_t)1 << 63;
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

__device__ __forceinline__ void take_lower(lowest &own, const lowest &other)
{
    if (other.score < own.score || (other.score == own.score && other.position < own.position)) {
        own = other;
    }
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
    for (int step = 16; step > 0; step /= 2) {
        take_lower(own, {__shfl_xor_sync(~0u, own.score, step), __shfl_xor_sync(~0u, own.position, step),
                         __shfl_xor_sync(~0u, own.slot, step)});
    }
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

__device__ int ledger_bin(double mass)
{
    if (!(mass > 0.0)) {
        return 0;
    }
    union {
        double number;
        uint64_t bits;
    } as = {mass};
    const int bin = (int)(as.bits >> 52 & 2047) - 1023 + 48; /* denormals lie far below the first bin */
    return bin < 0 ? 0 : bin >= SA_LEDGER_BINS ? SA_LEDGER_BINS - 1 : bin;
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
    sa_ledger *ledger = c.ledgers + at.stream;
    for (int64_t i = 0; i < at.leaving && threadIdx.x == 0; i++) {
        const int64_t slot = at.first + sorted[i];
        double mass = (double)NAN;
        ledger->evicted++;
        if (c.weights != nullptr) {
            mass = c.mass[slot];
            ledger->mass += mass;
            ledger->largest = mass > ledger->largest ? mass : ledger->largest;
            ledger->histogram[ledger_bin(mass)]++;
        }
        if (c.log_size > 0) {
            c.log[at.stream * c.log_size + ledger->logged++ % c.log_size] = {c.positions[slot], at.length, mass};
        }
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

__device__ void evict(const sa_cuda_slots &c)
{
    extern __shared__ __align__(16) char memory[];
    evict_shared &s = *(evict_shared *)memory;
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

} // namespace sa

extern "C" __global__ void __launch_bounds__(32 * SA_KV_APPEND_WARPS) kv_append(const __grid_constant__ sa_cuda_slots c)
{
    sa::append(c);
}

extern "C" __global__ void __launch_bounds__(32 * SA_KV_EVICT_WARPS) kv_evict(const __grid_constant__ sa_cuda_slots c)
{
    sa::evict(c);
}
