/* A problem as a kernel sees it: auxiliary arrays, rows, runs of keys, scores. csrc/core/problem.h has the words.
 *
 * Lengths, windows and the state of a cache are read here, from device memory, and clamped: whatever they hold, no address leaves the
 * caller's arrays. */
#ifndef SA_CUDA_PROBLEM_CUH
#define SA_CUDA_PROBLEM_CUH

#include "params.h"
#include "softmax.cuh"

namespace sa
{

constexpr int64_t no_window = SA_CUDA_NO_WINDOW;

__device__ __forceinline__ int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

__device__ __forceinline__ int64_t most(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

__device__ __forceinline__ int64_t clamp(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* --- elements ---------------------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ float wide_number(int dtype, const void *data, int64_t at)
{
    return dtype == SA_CUDA_F32   ? ((const float *)data)[at]
           : dtype == SA_CUDA_F16 ? f16::wide(((const uint16_t *)data)[at])
                                  : bf16::wide(((const uint16_t *)data)[at]);
}

__device__ __forceinline__ void store_number(int dtype, void *data, int64_t at, float x)
{
    if (dtype == SA_CUDA_F32) {
        f32::store(data, at, x);
    } else if (dtype == SA_CUDA_F16) {
        f16::store(data, at, x);
    } else {
        bf16::store(data, at, x);
    }
}

__device__ __forceinline__ void copy_number(int dtype, const void *from, int64_t source, void *to, int64_t target)
{
    if (dtype == SA_CUDA_F32) {
        ((uint32_t *)to)[target] = ((const uint32_t *)from)[source];
    } else {
        ((uint16_t *)to)[target] = ((const uint16_t *)from)[source];
    }
}

/* --- auxiliary arrays of any type -------------------------------------------------------------------------------------------------- */

/* The log2 of the bytes of SA_NUMBER_*, two bits for each. */
constexpr uint32_t number_widths = 2u << (2 * SA_NUMBER_F32) | 1u << (2 * SA_NUMBER_F16) | 1u << (2 * SA_NUMBER_BF16) |
                                   3u << (2 * SA_NUMBER_F64) | 1u << (2 * SA_NUMBER_I16) | 2u << (2 * SA_NUMBER_I32) |
                                   3u << (2 * SA_NUMBER_I64) | 1u << (2 * SA_NUMBER_U16) | 2u << (2 * SA_NUMBER_U32) |
                                   3u << (2 * SA_NUMBER_U64);

/* Not inlined, like what else runs once a CTA: cold instructions cost more than calls. No switch: where warps differ in registers ptxas makes
 * two of this function, and gives both the jump table of one (CUDA 13.0). */
__device__ __noinline__ double number_of(const void *data, int32_t type, int64_t at)
{
    const int width = (int)(number_widths >> (2 * type) & 3);
    const char *from = (const char *)data + (at << width);
    uint64_t bits;
    if (width > 1) {
        bits = width > 2 ? *(const uint64_t *)from : *(const uint32_t *)from;
    } else {
        bits = width > 0 ? *(const uint16_t *)from : *(const uint8_t *)from;
    }
    if (type >= SA_NUMBER_I8) {
        const int unused = 64 - (8 << width);
        return type >= SA_NUMBER_U8 ? (double)bits : (double)((int64_t)(bits << unused) >> unused);
    }
    if (width > 1) {
        return width > 2 ? __longlong_as_double((int64_t)bits) : (double)__uint_as_float((uint32_t)bits);
    }
    return type > SA_NUMBER_F16 ? bf16::wide((uint16_t)bits) : f16::wide((uint16_t)bits);
}

__device__ __noinline__ int64_t integer_of(const void *data, int32_t type, int64_t at)
{
    return type == SA_NUMBER_I64 ? ((const int64_t *)data)[at] : (int64_t)number_of(data, type, at);
}

__device__ __forceinline__ float number_at(const sa_cuda_numbers &numbers, int64_t first, int64_t second)
{
    return numbers.data == nullptr ? (float)numbers.value
                                   : (float)number_of(numbers.data, numbers.type, first * numbers.stride[0] + second * numbers.stride[1]);
}

__device__ __forceinline__ int64_t integer_at(const sa_cuda_numbers &numbers, int64_t first, int64_t second = 0)
{
    return numbers.data == nullptr ? (int64_t)numbers.value
                                   : integer_of(numbers.data, numbers.type, first * numbers.stride[0] + second * numbers.stride[1]);
}

__device__ __forceinline__ int64_t window_of(const sa_cuda_problem &p, int64_t head)
{
    if (p.common_window > 0) {
        return p.common_window;
    }
    const int64_t width = integer_at(p.window, head);
    return width <= 0 ? no_window : least(width, no_window);
}

/* Is a pinned key removed by a bias of -inf for every head of its group? Nobody sees it then. */
__device__ __noinline__ bool is_removed(const sa_cuda_problem &p, int64_t kv_head, int64_t key)
{
    bool removed = p.sink_bias.given;
    for (int64_t head = kv_head * p.group; removed && head < (kv_head + 1) * p.group; head++) {
        removed = number_at(p.sink_bias, head, key) == -infinity;
    }
    return removed;
}

/* logsumexp of a head's sink logits in log2 units, -inf for none. */
__device__ __forceinline__ float sink_of(const sa_cuda_problem &p, int64_t head)
{
    if (!p.sink_logits.given) {
        return -infinity;
    }
    if (p.logits == 1) {
        return number_at(p.sink_logits, head, 0) * log2e;
    }
    float maximum = -infinity, sum = 0.0f;
#pragma unroll 1
    for (int64_t i = 0; i < p.logits; i++) {
        maximum = fmaxf(maximum, number_at(p.sink_logits, head, i));
    }
    if (fabsf(maximum) == infinity) {
        return maximum;
    }
#pragma unroll 1
    for (int64_t i = 0; i < p.logits; i++) {
        sum += expf(number_at(p.sink_logits, head, i) - maximum);
    }
    return (maximum + logf(sum)) * log2e;
}

/* --- rows ------------------------------------------------------------------------------------------------------------------------- */

/* Where a row's queries and keys lie: batch index, and the ranges on the two length axes. */
struct place {
    int64_t batch, query_begin, query_count, query_total, key_begin, key_count;
    int64_t position;    /* of query 0, in the row's own count; may be negative */
    int64_t length, low; /* of a cache, before the call */
};

/* `head`: of keys and values; lengths may differ between them. */
__device__ inline place batch_row(const sa_cuda_problem &p, int64_t row, int64_t head = 0)
{
    place at = {};
    at.batch = row;
    at.query_total = p.query_length;
    at.query_count = p.query_lengths.given ? clamp(integer_at(p.query_lengths, row), 0, p.query_length) : p.query_length;
    if (p.cache.keys != nullptr) {
        at.length = clamp(p.cache.lengths[row], 0, INT64_MAX / 2);
        at.low = clamp(p.cache.lows[row], most(p.pinned, at.length - p.cache.capacity), most(p.pinned, at.length));
        at.key_count = at.query_count;
        at.position = at.length;
        return at;
    }
    at.key_begin = p.starts.given ? clamp(integer_at(p.starts, row), 0, p.kv_length) : 0;
    at.key_count = p.lengths.given ? clamp(integer_at(p.lengths, row, head), 0, p.kv_length - at.key_begin) : p.kv_length - at.key_begin;
    at.position = p.slots ? at.key_count : at.key_count - at.query_count;
    return at;
}

__device__ inline place packed_row(const sa_cuda_problem &p, int64_t sequence)
{
    place at = {};
    at.query_begin = clamp(integer_at(p.cumulative_query, sequence), 0, p.query_length);
    at.query_count = at.query_total = clamp(integer_at(p.cumulative_query, sequence + 1), at.query_begin, p.query_length) - at.query_begin;
    at.key_begin = clamp(integer_at(p.cumulative_key, sequence), 0, p.kv_length);
    at.key_count = clamp(integer_at(p.cumulative_key, sequence + 1), at.key_begin, p.kv_length) - at.key_begin;
    at.position = at.key_count - at.query_count;
    return at;
}

/* --- runs ------------------------------------------------------------------------------------------------------------------------- */

enum run_kind {
    run_plain,   /* causality and window decide */
    run_pinned,  /* causality alone; the second query and sink_bias apply */
    run_learned, /* seen by every query; neither bias nor ALiBi */
};

struct run {
    const char *key, *value;          /* first key of the run, of the CTA's kv head */
    int64_t key_stride, value_stride; /* bytes */
    int64_t count;
    int64_t position; /* of the first key; pinned runs: also the column of sink_bias */
    int32_t kind;
    int32_t raw; /* the token of a step: the decode kernel has it in shared memory */
};

constexpr int max_runs = 6;

struct run_list {
    run runs[max_runs];
    int count;
};

__device__ __forceinline__ int element_size(const sa_cuda_problem &p)
{
    return p.dtype == SA_CUDA_F32 ? 4 : 2;
}

__device__ __forceinline__ const char *element(const sa_cuda_tensor &tensor, int64_t batch, int64_t head, int64_t token, int size)
{
    return (const char *)tensor.data + (batch * tensor.batch + head * tensor.head + token * tensor.token) * size;
}

__device__ __forceinline__ bool has_second_query(const sa_cuda_problem &p)
{
    return p.cache.keys != nullptr ? p.cache.slot_positions && p.pinned > 0 && p.cache.pairs > 0 : p.sink_query.data != nullptr;
}

/* A part of the chunk that the rotate kernel left in scratch: 0 query, 1 pinned query, 2 key. */
__device__ inline sa_cuda_tensor rotated(const sa_cuda_problem &p, int part)
{
    const int64_t heads = part == 2 ? p.heads_kv : p.heads_q, skipped = part * p.batch * p.heads_q * p.query_length * p.depth;
    char *data = (char *)p.scratch + p.rotated_offset + skipped * element_size(p);
    return {data, heads * p.query_length * p.depth, p.query_length * p.depth, p.depth};
}

__device__ __forceinline__ sa_cuda_tensor query_tensor(const sa_cuda_problem &p)
{
    return p.rotated_offset >= 0 && !p.cache.applied ? rotated(p, 0) : p.query;
}

__device__ __forceinline__ sa_cuda_tensor second_query_tensor(const sa_cuda_problem &p)
{
    return p.rotated_offset >= 0 ? rotated(p, 1) : p.cache.keys != nullptr ? p.query : p.sink_query;
}

__device__ __forceinline__ sa_cuda_tensor key_tensor(const sa_cuda_problem &p)
{
    return p.rotated_offset >= 0 && !p.cache.applied ? rotated(p, 2) : p.key;
}

/* The decode kernel rotates a chunk of one token itself. */
__device__ __forceinline__ bool rotates_inside(const sa_cuda_problem &p)
{
    return p.cache.keys != nullptr && p.cache.pairs > 0 && p.rotated_offset < 0;
}

/* Keys of one tensor, before addresses: where they lie and where they stand. */
struct span {
    int64_t first, count, position; /* first: token of the tensor */
    int32_t kind;
    int32_t source; /* 0 the call's keys, 1 the cache, 2 the learned rows */
};

/* Slot of a position that is not pinned. Streams shorter than 2^32 are spared a long division. */
__device__ __forceinline__ int64_t ring_slot(const sa_cuda_problem &p, int64_t position)
{
    const uint64_t past = (uint64_t)(position - p.pinned), capacity = (uint64_t)p.cache.capacity;
    return p.pinned + (int64_t)((past | capacity) >> 32 == 0 ? (uint32_t)past % (uint32_t)capacity : past % capacity);
}

/* Span `index` of a row with a cache: the same in the same order as csrc/cpu/cache.c. */
__device__ __forceinline__ span cache_span(const sa_cuda_problem &p, const place &at, int index)
{
    const int64_t pinned_new = clamp(p.pinned - at.length, 0, at.query_count);
    const int64_t first = most(at.low, at.length - p.cache.window + 1), held = most(at.length - first, 0);
    const int64_t slot = ring_slot(p, most(first, p.pinned));
    const int64_t to_end = least(held, p.pinned + p.cache.capacity - slot);
    switch (index) {
    case 1: return {0, least(p.pinned, at.length), 0, run_pinned, 1};
    case 2: return {0, pinned_new, at.length, run_pinned, 0};
    case 3: return {slot, to_end, first, run_plain, 1};
    case 4: return {p.pinned, held - to_end, first + to_end, run_plain, 1};
    default: return {pinned_new, at.query_count - pinned_new, at.length + pinned_new, run_plain, 0};
    }
}

__device__ __forceinline__ span plain_span(const sa_cuda_problem &p, const place &at, int index)
{
    /* Without a window, and with nothing that treats them apart, pinned keys are keys like the others. */
    const int64_t pinned = p.apart ? least(p.pinned, at.key_count) : 0;
    return index == 1 ? span{at.key_begin, pinned, 0, run_pinned, 0}
                      : span{at.key_begin + pinned, index == 2 ? at.key_count - pinned : 0, pinned, run_plain, 0};
}

/* Run `index` of a kv head of a row; many have none. Every lane of a warp asks for its own. */
__device__ __forceinline__ run run_of(const sa_cuda_problem &p, const place &at, int64_t head, int index)
{
    const int size = element_size(p);
    const bool cached = p.cache.keys != nullptr;
    const span s = index == 0 ? span{0, p.learned, 0, run_learned, 2} : cached ? cache_span(p, at, index) : plain_span(p, at, index);
    sa_cuda_tensor key = key_tensor(p), value = p.value;
    if (s.source == 1) {
        key = p.held_key;
        value = p.held_value;
    } else if (s.source == 2) {
        key = p.sink_key;
        value = p.sink_value;
    }
    run r;
    r.key = element(key, s.source == 2 ? 0 : at.batch, head, s.first, size);
    r.value = element(value, s.source == 2 ? 0 : at.batch, head, s.first, size);
    r.key_stride = key.token * size;
    r.value_stride = value.token * size;
    r.count = index < max_runs ? s.count : 0;
    r.position = s.position;
    r.kind = s.kind;
    r.raw = p.append && index > 0 && s.source == 0;
    return r;
}

/* The runs that have keys, by the lanes of a warp; each lane keeps its own. Returns its place in the list, -1 for none. */
__device__ __forceinline__ int fill_runs(const run &own, run_list &list)
{
    const int lane = threadIdx.x % 32;
    const unsigned filled = __ballot_sync(~0u, own.count > 0);
    const int place = own.count > 0 ? __popc(filled & ((1u << lane) - 1)) : -1;
    if (place >= 0) {
        list.runs[place] = own;
    }
    if (lane == 0) {
        list.count = __popc(filled);
    }
    return place;
}

struct range {
    int64_t low, high; /* empty where low >= high */
};

/* Keys of a run, by their index in it, that queries at low .. high see: any of them (union) or, with the roles exchanged, all. */
__device__ __forceinline__ range visible(const run &r, bool causal, int64_t window_low, int64_t window_high, int64_t low, int64_t high)
{
    if (r.kind == run_learned || (r.kind == run_pinned && !causal)) {
        return {0, r.count};
    }
    const int64_t end = clamp(high + (causal ? 1 : window_high) - r.position, 0, r.count);
    return {r.kind == run_pinned ? 0 : clamp(low - window_low + 1 - r.position, 0, r.count), end};
}

/* --- what happens to a score ------------------------------------------------------------------------------------------------------- */

/* From a dot product to a score in log2 units, without mask. `column`: key of the run; slope: in log2 units. */
__device__ __forceinline__ float featured_score(const sa_cuda_problem &p, const run &r, int64_t head, int64_t position, float slope,
                                                int64_t column, float dot)
{
    float s = dot * p.scale;
    if (p.softcap > 0.0f) {
        s = p.softcap * tanhf(s / p.softcap);
    }
    s *= log2e;
    if (r.kind == run_pinned && p.sink_bias.given) {
        const float bias = number_at(p.sink_bias, head, r.position + column);
        s = bias == -infinity ? -infinity : s + bias * log2e;
    }
    if (r.kind != run_learned && p.alibi_slopes.given) {
        int64_t from = position;
        if (r.kind == run_pinned && p.cache.keys != nullptr && p.cache.slot_positions) {
            from = least(from, p.pinned + p.cache.window - 1);
        }
        const int64_t distance = from - r.position - column;
        s -= slope * (float)(distance < 0 ? -distance : distance);
    }
    return s;
}

/* Does a run need featured_score, beyond a factor? */
__device__ __forceinline__ bool is_featured(const sa_cuda_problem &p, const run &r)
{
    return p.softcap > 0.0f || (r.kind == run_pinned && p.sink_bias.given) || (r.kind != run_learned && p.alibi_slopes.given);
}

/* --- the state of a cache ---------------------------------------------------------------------------------------------------------- */

/* The last CTA of a row to have read its state advances it. An arrival needs no order of its own: what was read was used before the barrier
 * that it follows. One thread; the two halves are apart so that nobody waits for the answer. */
__device__ __forceinline__ uint32_t report_read(const sa_cuda_problem &p, int64_t counter, uint32_t readers)
{
    return count_up(p.counters + counter, readers);
}

__device__ __forceinline__ void advance(const sa_cuda_problem &p, const place &at, uint32_t before, uint32_t readers)
{
    if (before == readers - 1) {
        p.cache.lengths[at.batch] = at.length + at.query_count;
        p.cache.lows[at.batch] = most(at.low, at.length + at.query_count - p.cache.capacity);
    }
}

/* --- rotary positions -------------------------------------------------------------------------------------------------------------- */

/* cos and sin of position * frequency, times factor; the angle is reduced in fp64 (two-part 2 pi), so that position 10 000 000 is as exact
 * as position 10. */
__device__ __forceinline__ void rotation(double frequency, int64_t position, float factor, float &cosine, float &sine)
{
    const double angle = (double)position * frequency, turns = rint(angle * 0.15915494309189535);
    const double reduced = fma(-turns, 2.4492935982947064e-16, fma(-turns, 6.283185307179586, angle));
    sincosf((float)reduced, &sine, &cosine);
    cosine *= factor;
    sine *= factor;
}

/* By how much the query for the pinned keys is turned, from what arrived. */
__device__ __forceinline__ int64_t pinned_turn(const sa_cuda_problem &p, int64_t position)
{
    const int64_t stand = p.cache.slot_positions ? least(position, p.pinned + p.cache.window - 1) : position;
    return p.cache.applied ? stand - position : stand;
}

} // namespace sa

#endif
