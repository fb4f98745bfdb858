/* KVCache: tokens out of the slots, any number at a time; csrc/core/policy.c and csrc/cpu/kv_evict.c have the words.
 *
 * kv_evict: a CTA for each stream. It takes in the weights that the queries gave, slot by slot; finds the `leaving` lowest scores (one: by a
 * minimum; more: by bisection of the scores as ordered bits, which is exact, until exactly so many lie below); writes the ledger; and moves
 * who lies behind the tokens that stay into the slots of those that left. Every result is the same each time: what is added up in no order
 * are whole numbers. bytes = slots * (weights + state), read and written once; scores and positions are in shared memory where they fit.
 * kv_mass: what the tokens held received in a call, in order of their positions. A step of one token is kv_step.cu's.
 * H200, 2026-11-25, bf16, 8 kv heads, D 128, by the profiler: a part of 128 tokens at 1024 slots, us: H2O 25, TOVA 150, SnapKV 261,
 * before slots were sorted as words and several weights were on their way at a time, which is not timed apart: a whole step with SnapKV takes
 * 68 us at 1024 slots, 197 at 4096; B 8 82 and 238. */
#include "kv_slots.cuh"

namespace sa
{

constexpr int evict_threads = 32 * SA_KV_EVICT_WARPS;

/* --- what a CTA knows of its stream ------------------------------------------------------------------------------------------------- */

struct judged {
    int64_t stream, row, head, first; /* first slot among all */
    int64_t held, fresh, count, length; /* length: with the new tokens */
    int64_t leaving, stay, pinned, recent_from;
    uint64_t *order;  /* [count] scores as ordered bits, all set where a token must stay */
    int64_t *places;  /* [count] positions */
    double *numbers;  /* [count] work: sums of rows, means of SnapKV, masses that leave */
    int32_t *list;    /* [2 * stride] work */
    uint64_t bound;  /* who leaves: a score below, or this one and a position up to `position` */
    int64_t position;
};

struct evict_shared {
    judged at;
    lowest found[SA_KV_EVICT_WARPS];
    int64_t counts[SA_KV_EVICT_WARPS];
    double sums[SA_KV_EVICT_WARPS];
    double mean[256];             /* KeyDiff: of unit keys */
    double parts[evict_threads];
};
static_assert(sizeof(evict_shared) <= SA_KV_EVICT_SHARED, "room for what a CTA knows");

/* scratch: [4, stride] of 8 bytes. */
__device__ judged judge(const sa_cuda_slots &c, char *scratch)
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
    at.stay = least(at.count, least(last, c.budgets[at.head]) + at.length - last);
    at.leaving = at.count - at.stay;
    at.pinned = c.pinned;
    at.recent_from = last - c.recent;
    at.order = (uint64_t *)scratch;
    at.places = (int64_t *)(at.order + c.stride);
    at.numbers = (double *)(at.places + c.stride);
    at.list = (int32_t *)(at.numbers + c.stride);
    return at;
}

/* Sum over the CTA, in one order; everybody gets it. */
template <typename T> __device__ T sum_all(T value, T *of_warps)
{
    value = sum_of_warp(value);
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

/* sum_j a_ij |v_j| of every query: a warp for each. */
__device__ void sum_rows(const sa_cuda_slots &c, const judged &at, const float *weights, int64_t rows)
{
    const double *lengths = c.own + c.batch * c.heads_kv * c.stride + at.first;
    for (int64_t row = threadIdx.x / 32; row < rows; row += SA_KV_EVICT_WARPS) {
        double sum = 0.0;
        for (int64_t i = threadIdx.x % 32; i < at.count; i += 32) {
            sum += product((double)weights[row * c.stride + i], lengths[i]);
        }
        sum = sum_of_warp(sum);
        if (threadIdx.x % 32 == 0) {
            at.numbers[row] = sum;
        }
    }
    __syncthreads();
}

constexpr int queries_at_a_time = 8;

/* What a query gave to a slot, into the ring of the last `window` of them. */
__device__ __forceinline__ void fill_ring(const sa_cuda_slots &c, const judged &at, int64_t slot, int64_t query, float weight)
{
    const int64_t place = (at.length - at.fresh + query) % c.window;
    if (c.kind == snap_kv) {
        ((float *)(c.rings + slot * c.ring_bytes))[place] = weight;
    } else {
        put_bit(c, slot, place, (double)weight * (double)(at.held + query + 1) >= 1.0);
    }
}

/* Slot i learns. weights: of the first query. Several loads are on their way at a time; a weight of 0 beyond the last adds nothing. */
__device__ void learn(const sa_cuda_slots &c, const judged &at, int64_t i, const float *weights, int64_t rows)
{
    const int64_t slot = at.first + i;
    const bool by_length = c.kind == v_length_h2o, decays = c.kind == h2o_ema, rings = c.kind == scissorhands || c.kind == snap_kv;
    const double length = by_length ? c.own[c.batch * c.heads_kv * c.stride + slot] : 0.0;
    double mass = c.mass[slot], call = c.keep_call ? c.call[slot] : 0.0, own = c.own[slot];
    for (int64_t row = 0; row < rows; row += queries_at_a_time) {
        float some[queries_at_a_time];
#pragma unroll
        for (int e = 0; e < queries_at_a_time; e++) {
            some[e] = row + e < rows ? weights[(row + e) * c.stride + i] : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < queries_at_a_time; e++) {
            mass += (double)some[e];
            call += (double)some[e];
        }
        for (int e = 0; e < queries_at_a_time && row + e < rows && (by_length || decays || rings); e++) {
            if (decays) {
                own = product(c.decay, own) + (double)some[e];
            } else if (by_length) {
                own += at.numbers[row + e] > 0.0 ? product((double)some[e], length) / at.numbers[row + e] : 0.0;
            } else if (row + e >= rows - c.window) {
                fill_ring(c, at, slot, row + e, some[e]);
            }
        }
    }
    c.mass[slot] = mass;
    if (c.keep_call) {
        c.call[slot] = call;
    }
    if (by_length || decays) {
        c.own[slot] = own;
    }
}

__device__ void take_weights(const sa_cuda_slots &c, evict_shared &s)
{
    const judged &at = s.at;
    const bool each = c.kind >= h2o_ema && c.kind <= snap_kv;
    const int64_t rows = c.weights == nullptr ? 0 : each ? at.fresh : least(c.weight_rows, at.fresh);
    const float *weights = c.weights + at.stream * c.weight_rows * c.stride;
    for (int64_t i = threadIdx.x; i < at.held && c.first_part && c.keep_call; i += evict_threads) {
        c.call[at.first + i] = 0.0;
    }
    if (c.kind == v_length_h2o) {
        sum_rows(c, at, weights, rows);
    }
    for (int64_t i = threadIdx.x; i < at.count && rows > 0; i += evict_threads) {
        learn(c, at, i, weights, rows);
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

constexpr int slot_bits = 20;
constexpr uint32_t slot_mask = (1u << slot_bits) - 1;

/* Slots by ascending position, into list, by counting: for streams whose positions leave no room for a slot in a word. */
__device__ void count_slots(const judged &at)
{
    for (int64_t i = threadIdx.x; i < at.count; i += evict_threads) {
        int64_t rank = 0;
        for (int64_t j = 0; j < at.count; j++) {
            rank += at.places[j] < at.places[i];
        }
        at.list[rank] = (int32_t)i;
    }
    __syncthreads();
}

/* The same by sorting words of position and slot: bitonic, with every comparison the same way round, so that what lies behind `count` counts
 * as largest without being there. A warp's pairs that are near lie in 64 words of its own. */
__device__ void sort_slots(const judged &at)
{
    const uint32_t count = (uint32_t)at.count;
    uint32_t whole = 64, before = 64;
    if (at.length >> (63 - slot_bits) != 0 || at.count > slot_mask) {
        count_slots(at);
        return;
    }
    while (whole < count) {
        whole *= 2;
    }
    for (uint32_t i = threadIdx.x; i < count; i += evict_threads) {
        at.order[i] = (uint64_t)at.places[i] << slot_bits | i;
    }
    for (uint32_t block = 2; block <= whole; block *= 2) {
        for (uint32_t reach = block / 2; reach > 0; reach /= 2) {
            if (reach >= 64 || before >= 64) {
                __syncthreads();
            } else {
                __syncwarp();
            }
            before = reach;
            for (uint32_t pair = threadIdx.x; pair < whole / 2; pair += evict_threads) {
                const uint32_t in = pair & (reach - 1), a = (pair - in) * 2 + in, b = reach == block / 2 ? (pair - in) * 2 + block - 1 - in : a + reach;
                if (b < count) {
                    const uint64_t first = at.order[a], second = at.order[b];
                    if (first > second) {
                        at.order[a] = second;
                        at.order[b] = first;
                    }
                }
            }
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += evict_threads) {
        at.list[i] = (int32_t)(at.order[i] & slot_mask);
    }
    __syncthreads();
}

/* SnapKV: mean over the window's queries, pooled over neighbours in order of position. */
__device__ void score_snap(const sa_cuda_slots &c, const judged &at)
{
    const int64_t before = at.length - c.window;
    sort_slots(at);
    for (int64_t rank = threadIdx.x; rank < at.count; rank += evict_threads) {
        const float *ring = (const float *)(c.rings + (at.first + at.list[rank]) * c.ring_bytes);
        double sum[4] = {}; /* the order of the host: four at a time, the rest into the first */
        int64_t q = 0;
        for (; q + 4 <= c.window; q += 4) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sum[e] += (double)ring[q + e];
            }
        }
        for (; q < c.window; q++) {
            sum[0] += (double)ring[q];
        }
        at.numbers[rank] = (sum[0] + sum[1] + (sum[2] + sum[3])) / (double)c.window;
    }
    __syncthreads();
    for (int64_t rank = threadIdx.x; rank < at.count; rank += evict_threads) {
        const int64_t slot = at.list[rank];
        double pooled = at.places[slot] < before ? 0.0 : (double)infinity;
        for (int64_t near = most(rank - c.kernel / 2, 0); near <= least(rank + c.kernel / 2, at.count - 1) && pooled < infinity; near++) {
            const bool judged = at.places[at.list[near]] < before; /* those behind come last and lend nothing */
            const double mean = judged ? at.numbers[near] : 0.0;
            pooled = c.maximum ? (mean > pooled ? mean : pooled) : judged ? pooled + mean / (double)c.kernel : pooled;
        }
        at.order[slot] = ordered(pooled);
    }
    __syncthreads();
}

/* CUR: |k|^2 |v|^2, each as a share of its window: `window` neighbours in order of position. */
__device__ void score_cur(const sa_cuda_slots &c, const judged &at)
{
    const double *keys = c.own + at.first, *values = keys + c.batch * c.heads_kv * c.stride;
    sort_slots(at);
    for (int64_t first = threadIdx.x * c.window; first < at.count; first += evict_threads * c.window) {
        const int64_t last = least(first + c.window, at.count);
        double key = 0.0, value = 0.0;
        for (int64_t rank = first; rank < last; rank++) {
            key += keys[at.list[rank]];
            value += values[at.list[rank]];
        }
        for (int64_t rank = first; rank < last; rank++) {
            const int64_t slot = at.list[rank];
            at.order[slot] = ordered(product(key > 0.0 ? keys[slot] / key : 0.0, value > 0.0 ? values[slot] / value : 0.0));
        }
    }
    __syncthreads();
}

/* The mean of unit keys, a column a thread and slots in turn, then its length. */
__device__ double mean_key(const sa_cuda_slots &c, evict_shared &s)
{
    const int columns = ((int)c.depth + 31) / 32 * 32, column = threadIdx.x % columns, part = threadIdx.x / columns, parts = evict_threads / columns;
    double sum = 0.0;
    for (int64_t i = part; i < s.at.count && part < parts && column < c.depth; i += parts) {
        const double length = c.own[s.at.first + i];
        sum += length > 0.0 ? (double)wide_number(c.dtype, c.keys, (s.at.first + i) * c.depth + column) / (length * (double)s.at.count) : 0.0;
    }
    s.parts[threadIdx.x] = sum;
    __syncthreads();
    double square = 0.0;
    if (threadIdx.x < c.depth) {
        double whole = 0.0;
        for (int i = 0; i < parts; i++) {
            whole += s.parts[i * columns + threadIdx.x];
        }
        s.mean[threadIdx.x] = whole;
        square = product(whole, whole);
    }
    return sqrt(sum_all(square, s.sums));
}

/* KeyDiff: - cos(k, mean of unit keys); a warp for each slot. */
__device__ void score_key_diff(const sa_cuda_slots &c, evict_shared &s)
{
    const double whole = mean_key(c, s);
    for (int64_t i = threadIdx.x / 32; i < s.at.count; i += SA_KV_EVICT_WARPS) {
        double dot = 0.0;
        for (int64_t d = threadIdx.x % 32; d < c.depth; d += 32) {
            dot += product(s.mean[d], (double)wide_number(c.dtype, c.keys, (s.at.first + i) * c.depth + d));
        }
        dot = sum_of_warp(dot);
        if (threadIdx.x % 32 == 0) {
            const double length = c.own[s.at.first + i] * whole;
            s.at.order[i] = ordered(length > 0.0 ? -dot / length : 0.0);
        }
    }
    __syncthreads();
}

/* Policies whose scores come all together leave them in `order`. */
__device__ void score_together(const sa_cuda_slots &c, evict_shared &s)
{
    if (c.kind == snap_kv) {
        score_snap(c, s.at);
    } else if (c.kind == cur) {
        score_cur(c, s.at);
    } else if (c.kind == key_diff) {
        score_key_diff(c, s);
    }
}

__device__ __forceinline__ uint64_t score_bits(const sa_cuda_slots &c, const judged &at, int64_t i)
{
    return c.kind == snap_kv || c.kind == cur || c.kind == key_diff ? at.order[i] : ordered(score_of(c, at, i));
}

__device__ __forceinline__ bool is_free(const judged &at, int64_t i)
{
    return at.places[i] >= at.pinned && at.places[i] < at.recent_from;
}

/* Tokens whose score and position are not above the bounds. */
__device__ int64_t count_below(evict_shared &s, uint64_t bound, int64_t position)
{
    int64_t count = 0;
    for (int64_t i = threadIdx.x; i < s.at.count; i += evict_threads) {
        const uint64_t score = s.at.order[i];
        count += score < bound || (score == bound && s.at.places[i] <= position);
    }
    return sum_all(count, s.counts);
}

/* The slot of the single lowest, by a minimum over the CTA: no score is ever written. */
__device__ int64_t find_lowest(const sa_cuda_slots &c, evict_shared &s)
{
    lowest own = {~(uint64_t)0, INT64_MAX, 0};
    for (int64_t i = threadIdx.x; i < s.at.count; i += evict_threads) {
        if (is_free(s.at, i)) {
            take_lower(own, {score_bits(c, s.at, i), s.at.places[i], i});
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
__device__ void find_bound(evict_shared &s, uint64_t &bound, int64_t &position)
{
    bound = 0;
    position = INT64_MAX;
    for (int bit = 63; bit >= 0; bit--) { /* the largest number that fewer than `leaving` lie below, or one that so many do */
        const uint64_t trial = bound | (uint64_t)1 << bit;
        const int64_t below = count_below(s, trial, -1);
        if (below == s.at.leaving) {
            bound = trial - 1;
            return;
        }
        bound = below < s.at.leaving ? trial : bound;
    }
    if (count_below(s, bound, position) == s.at.leaving) {
        return;
    }
    position = 0;
    for (int bit = 62; bit >= 0; bit--) {
        const int64_t trial = position | (int64_t)1 << bit;
        position = count_below(s, bound, trial - 1) < s.at.leaving ? trial : position;
    }
}

/* --- who leaves, and who moves ------------------------------------------------------------------------------------------------------ */

__device__ __forceinline__ bool leaves(const judged &at, int64_t i)
{
    return at.order[i] < at.bound || (at.order[i] == at.bound && at.places[i] <= at.position);
}

/* Slots from begin to end whose token leaves (or stays), ascending, into a list; returns how many. */
__device__ int64_t list_slots(evict_shared &s, int64_t begin, int64_t end, bool leaving, int32_t *list)
{
    int64_t listed = 0;
    for (int64_t from = begin; from < end; from += evict_threads) {
        const int64_t i = from + threadIdx.x;
        const bool taken = i < end && leaves(s.at, i) == leaving;
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

/* The log keeps the last entries; `entry`: of those that leave, in order of position. */
__device__ __forceinline__ void log_one(const sa_cuda_slots &c, const judged &at, int64_t logged, int64_t entry, int64_t position, double mass)
{
    if (at.leaving - entry <= c.log_size) {
        c.log[at.stream * c.log_size + (logged + entry) % c.log_size] = {position, at.length, mass};
    }
}

/* In order of position: the sums of a ledger do not depend on slots. list: those that leave. */
__device__ void record(const sa_cuda_slots &c, const judged &at, const int32_t *list)
{
    sa_ledger *ledger = c.ledgers + at.stream;
    const int64_t logged = ledger->logged;
    const bool tracked = c.weights != nullptr;
    for (int64_t i = threadIdx.x; i < at.leaving; i += evict_threads) {
        const int64_t position = at.places[list[i]];
        const double mass = tracked ? c.mass[at.first + list[i]] : (double)NAN;
        int64_t rank = 0;
        for (int64_t j = 0; j < at.leaving; j++) {
            rank += at.places[list[j]] < position;
        }
        at.numbers[rank] = mass;
        log_one(c, at, logged, rank, position, mass);
        if (tracked) {
            add_to(&ledger->histogram[ledger_bin(mass)], 1);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = ledger->mass, largest = ledger->largest;
        for (int64_t i = 0; i < at.leaving && tracked; i++) {
            sum += at.numbers[i];
            largest = at.numbers[i] > largest ? at.numbers[i] : largest;
        }
        ledger->evicted += at.leaving;
        ledger->logged = c.log_size > 0 ? logged + at.leaving : logged;
        ledger->mass = sum;
        ledger->largest = largest;
    }
    __syncthreads();
}

/* Whole words where a vector is some of them. */
__device__ void copy_vector(void *data, int64_t from, int64_t to, int64_t bytes)
{
    const bool words = bytes % 4 == 0;
    const int64_t count = words ? bytes / 4 : bytes / 2;
    for (int64_t i = threadIdx.x % 32; i < count; i += 32) {
        if (words) {
            ((uint32_t *)data)[to * count + i] = ((const uint32_t *)data)[from * count + i];
        } else {
            ((uint16_t *)data)[to * count + i] = ((const uint16_t *)data)[from * count + i];
        }
    }
}

/* A token into the slot of one that left; by a warp. Sources lie behind the tokens that stay, targets before: none is both. */
__device__ void move(const sa_cuda_slots &c, const judged &at, int64_t source, int64_t target)
{
    const int64_t from = at.first + source, to = at.first + target, all = c.batch * c.heads_kv * c.stride, size = c.dtype == SA_CUDA_F32 ? 4 : 2;
    copy_vector(c.keys, from, to, c.depth * size);
    copy_vector(c.values, from, to, c.depth_v * size);
    copy_vector(c.rings, from, to, c.ring_bytes);
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
    record(c, s.at, s.at.list);
    return slot < s.at.stay;
}

__device__ int64_t choose_many(const sa_cuda_slots &c, evict_shared &s)
{
    uint64_t bound;
    int64_t position;
    for (int64_t i = threadIdx.x; i < s.at.count; i += evict_threads) {
        s.at.order[i] = is_free(s.at, i) ? score_bits(c, s.at, i) : ~(uint64_t)0;
    }
    __syncthreads();
    find_bound(s, bound, position);
    __syncthreads();
    if (threadIdx.x == 0) {
        s.at.bound = bound;
        s.at.position = position;
    }
    __syncthreads();
    (void)list_slots(s, 0, s.at.count, true, s.at.list);
    __syncthreads();
    record(c, s.at, s.at.list);
    return list_slots(s, s.at.stay, s.at.count, false, s.at.list + c.stride); /* gaps: those that leave, from the first on */
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
        s.at = judge(c, c.scratch != nullptr ? (char *)(c.scratch + (int64_t)blockIdx.x * 4 * c.stride) : memory + SA_KV_EVICT_SHARED);
    }
    __syncthreads();
    const judged &at = s.at;
    for (int64_t i = threadIdx.x; i < at.count; i += evict_threads) {
        at.places[i] = c.positions[at.first + i];
    }
    take_weights(c, s);
    __syncthreads();
    const bool evicts = at.leaving > 0 && at.fresh > 0;
    if (evicts) {
        score_together(c, s);
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
