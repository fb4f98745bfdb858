#include "choose_parts.h"

#include <math.h>

const sa_cuda_kernel sa_cuda_kernels[] = {
    {"decode_f16_64", "decode"},
    {"decode_f16_128", "decode"},
    {"decode_f16_256", "decode"},
    {"decode_bf16_64", "decode"},
    {"decode_bf16_128", "decode"},
    {"decode_bf16_256", "decode"},
    {"prefill_f16_64", "prefill_sm80"},
    {"prefill_f16_128", "prefill_sm80"},
    {"prefill_f16_256", "prefill_sm80"},
    {"prefill_bf16_64", "prefill_sm80"},
    {"prefill_bf16_128", "prefill_sm80"},
    {"prefill_bf16_256", "prefill_sm80"},
    {"prefill_wide_f16_64", "prefill_sm80"},
    {"prefill_wide_f16_128", "prefill_sm80"},
    {"prefill_wide_bf16_64", "prefill_sm80"},
    {"prefill_wide_bf16_128", "prefill_sm80"},
#define KERNEL(name, ...) {"prefill_hopper_f16_" #name, "prefill_sm90"},
    SA_HOPPER_FORMS(KERNEL)
#undef KERNEL
#define KERNEL(name, ...) {"prefill_hopper_bf16_" #name, "prefill_sm90"},
    SA_HOPPER_FORMS(KERNEL)
#undef KERNEL
    {"prefill_window_f16_64_136", "window_sm90"},
    {"prefill_window_f16_64_144", "window_sm90"},
    {"prefill_window_f16_128_136", "window_sm90"},
    {"prefill_window_f16_128_144", "window_sm90"},
    {"prefill_window_bf16_64_136", "window_sm90"},
    {"prefill_window_bf16_64_144", "window_sm90"},
    {"prefill_window_bf16_128_136", "window_sm90"},
    {"prefill_window_bf16_128_144", "window_sm90"},
    {"attend_f32_64", "attend_f32"},
    {"attend_f32_128", "attend_f32"},
    {"attend_f32_256", "attend_f32"},
    {"cache_rotate", "cache"},
    {"cache_commit", "cache"},
    {"mass", "mass"},
    {"mass_f16_64", "mass_sm80"},
    {"mass_f16_128", "mass_sm80"},
    {"mass_f16_256", "mass_sm80"},
    {"mass_bf16_64", "mass_sm80"},
    {"mass_bf16_128", "mass_sm80"},
    {"mass_bf16_256", "mass_sm80"},
    {"mass_hopper_f16_64", "mass_sm90"},
    {"mass_hopper_f16_128", "mass_sm90"},
    {"mass_hopper_bf16_64", "mass_sm90"},
    {"mass_hopper_bf16_128", "mass_sm90"},
    {"decode_mass_f16_64", "decode"},
    {"decode_mass_f16_128", "decode"},
    {"decode_mass_f16_256", "decode"},
    {"decode_mass_bf16_64", "decode"},
    {"decode_mass_bf16_128", "decode"},
    {"decode_mass_bf16_256", "decode"},
    {"backward_rows", "backward_rows"},
    {"backward_numbers", "backward_rows"},
    {"backward_keys_f32_64", "backward_f32"},
    {"backward_keys_f32_128", "backward_f32"},
    {"backward_keys_f32_256", "backward_f32"},
    {"backward_keys_f16_64", "backward_sm80"},
    {"backward_keys_f16_128", "backward_sm80"},
    {"backward_keys_f16_256", "backward_sm80"},
    {"backward_keys_bf16_64", "backward_sm80"},
    {"backward_keys_bf16_128", "backward_sm80"},
    {"backward_keys_bf16_256", "backward_sm80"},
    {"backward_queries_f32_64", "backward_f32"},
    {"backward_queries_f32_128", "backward_f32"},
    {"backward_queries_f32_256", "backward_f32"},
    {"backward_queries_f16_64", "backward_sm80"},
    {"backward_queries_f16_128", "backward_sm80"},
    {"backward_queries_f16_256", "backward_sm80"},
    {"backward_queries_bf16_64", "backward_sm80"},
    {"backward_queries_bf16_128", "backward_sm80"},
    {"backward_queries_bf16_256", "backward_sm80"},
    {"backward_hopper_f16_64", "backward_sm90"},
    {"backward_hopper_f16_128", "backward_sm90"},
    {"backward_hopper_bf16_64", "backward_sm90"},
    {"backward_hopper_bf16_128", "backward_sm90"},
    {"backward_finish_f16", "backward_sm90"},
    {"backward_finish_bf16", "backward_sm90"},
    {"decode_evict_f16_64", "decode_evict"},
    {"decode_evict_f16_128", "decode_evict"},
    {"decode_evict_f16_256", "decode_evict"},
    {"decode_evict_bf16_64", "decode_evict"},
    {"decode_evict_bf16_128", "decode_evict"},
    {"decode_evict_bf16_256", "decode_evict"},
};
#define FORM(name, depth, width, rows, keys, stages, query_tiles, featured) \
    {depth, width, rows, keys, featured, SA_HOPPER_SHARED(depth, width, rows, keys, stages, query_tiles, featured)},
const sa_cuda_form sa_cuda_forms[] = {SA_HOPPER_FORMS(FORM)};

const int sa_cuda_kernel_count = sizeof sa_cuda_kernels / sizeof sa_cuda_kernels[0];

outline sa_cuda_outline_of(const sa_cuda_problem *p)
{
    outline o = {.group = p->heads_q / p->heads_kv, .rows = p->sequences > 0 ? p->sequences : p->batch};
    const int64_t depth = max_i64(p->depth, p->depth_v);
    o.bucket = depth <= 64 ? 0 : depth <= 128 ? 1 : 2;
    o.depth = 64 << o.bucket;
    o.key_bytes = (p->depth + p->depth_v) * (p->dtype == SA_CUDA_F32 ? 4 : 2);
    o.keys = p->learned;
    if (p->cache.keys != NULL) {
        o.keys += p->pinned + min_i64(p->cache.window, INT64_MAX / 4) + p->query_length;
    } else if (p->window.given && p->window.data == NULL && p->window.value >= 1.0 && p->window.value < (double)p->kv_length) {
        const int64_t seen = (int64_t)p->window.value * (p->causal ? 1 : 2) + p->query_length + p->pinned;
        o.keys += min_i64(seen, p->kv_length);
    } else {
        o.keys += p->kv_length;
    }
    return o;
}

/* One way to run a kernel: CTAs at a time, and what splits cost. */
typedef struct layout {
    int64_t slots;   /* CTAs that run at a time */
    int64_t an_sm;   /* of them on one multiprocessor */
    int64_t cluster; /* up to so many splits meet in a cluster */
    int64_t most;    /* splits */
} layout;

/* May the splits of a tile be a cluster? Powers of two, and all clusters at once: a group of multiprocessors that a cluster does not fill
 * stays idle, so that of 132 about 120 serve. */
static bool is_cluster(const layout *l, int64_t units, int64_t splits)
{
    const bool power = splits > 1 && splits <= l->cluster && (splits & (splits - 1)) == 0;
    return power && (units * splits <= l->slots * 9 / 10 || (splits == 2 && units * splits <= l->slots));
}

/* Nanoseconds that a layout needs, from what was measured on an H200: a multiprocessor draws 66 bytes/ns and all of them together 4600; a
 * CTA's beginning and end take 3 us, meeting in a cluster 1 us, in scratch 4 us and with small CTAs 9. Only the order of the results
 * matters. */
static double cost_of(const layout *l, int64_t units, int64_t keys, int64_t key_bytes, int64_t splits)
{
    const int64_t ctas = units * splits, running = min_i64(ctas, l->slots);
    const double waves = (double)ceil_div(ctas, l->slots), bytes = (double)ceil_div(keys, splits) * (double)key_bytes;
    const double alone = bytes / 66.0 * (double)ceil_div(running * l->an_sm, l->slots), together = bytes * (double)(running + 2) / 4600.0;
    const double meeting = splits == 1                    ? 0.0
                           : is_cluster(l, units, splits) ? 1000.0
                                                          : (l->an_sm == 1 ? 4000.0 : 9000.0) + 10.0 * (double)splits;
    return waves * ((alone > together ? alone : together) + 3000.0) + meeting;
}

static int64_t splits_of(const layout *l, int64_t units, int64_t keys, int64_t key_bytes, double *cost)
{
    int64_t best = 1;
    *cost = HUGE_VAL;
    for (int64_t splits = 1; splits <= l->most; splits++) {
        const double own = cost_of(l, units, keys, key_bytes, splits);
        if (own < *cost) {
            best = splits;
            *cost = own;
        }
    }
    return best;
}

static void reserve_partials(sa_cuda_problem *p, sa_cuda_plan *plan, int64_t units, int64_t tile)
{
    if (p->splits > 1 && !p->clustered) {
        p->partial_offset = reserve(plan, units * p->splits * tile * p->depth_v * 4);
        p->state_offset = reserve(plan, units * p->splits * tile * 2 * 4);
        plan->counter_count += units;
    }
}

/* A step of one token is one launch, unless the mass pass has to see the cache as it was. */
static bool is_step(const sa_cuda_problem *p)
{
    const bool cached = p->cache.keys != NULL || p->slots;
    return cached && p->query_length == 1 && p->dtype != SA_CUDA_F32 && (p->mass == NULL || p->weighs != SA_WEIGHS_NONE);
}

/* Splits of the decode kernel, how many warps share each, and whether they meet in a cluster. */
typedef struct decode_form {
    int64_t splits, warps, shared;
    bool clustered;
} decode_form;

/* Bytes of a warp's ring, and of what a CTA has beside the rings. */
static int64_t ring_bytes(const outline *o)
{
    return SA_DECODE_STAGES * SA_DECODE_SLICE(o->depth) * o->depth * 2 * 2;
}

static layout large_layout(const sa_cuda_device *device, int64_t most)
{
    const int64_t cluster = device->capability == 90 ? min_i64(device->cluster_limit, SA_DECODE_CLUSTER) : 0;
    return (layout){device->multiprocessors, 1, cluster, most};
}

static decode_form find_decode_form(int64_t units, const sa_cuda_device *device, const outline *o)
{
    const int64_t slice = SA_DECODE_SLICE(o->depth), a_warp = ring_bytes(o), fixed = SA_DECODE_SHARED(o->depth);
    const int64_t warps_fit = clamp_i64((device->shared_limit - fixed) / a_warp, 1, SA_DECODE_WARPS);
    const int64_t half = min_i64(warps_fit, SA_DECODE_WARPS / 2), most = clamp_i64(o->keys / (8 * slice), 1, 128);
    const bool two = half < warps_fit && 2 * (half * a_warp + fixed + 1024) <= device->shared_limit + 1024;
    const layout large = large_layout(device, most), small = {2 * device->multiprocessors, 2, 0, most};
    double cost, other_cost = HUGE_VAL;
    decode_form form = {.splits = splits_of(&large, units, o->keys, o->key_bytes, &cost), .warps = warps_fit};
    form.clustered = is_cluster(&large, units, form.splits);
    const int64_t other = two ? splits_of(&small, units, o->keys, o->key_bytes, &other_cost) : 1;
    if (other_cost < cost) {
        form = (decode_form){.splits = other, .warps = half};
    }
    form.shared = fixed + form.warps * a_warp;
    return form;
}

/* What was found for the last few outlines: looking at 256 forms takes a microsecond, and a stream asks for the same one at every token. */
typedef struct known_form {
    int64_t units, keys, key_bytes, depth;
    sa_cuda_device device;
    decode_form form;
} known_form;

enum { KNOWN_FORMS = 4 };

static bool is_known(const known_form *k, int64_t units, const sa_cuda_device *device, const outline *o)
{
    return k->units == units && k->keys == o->keys && k->key_bytes == o->key_bytes && k->depth == o->depth &&
           k->device.capability == device->capability && k->device.multiprocessors == device->multiprocessors &&
           k->device.shared_limit == device->shared_limit && k->device.cluster_limit == device->cluster_limit;
}

static decode_form decode_form_of(const sa_cuda_problem *p, const sa_cuda_device *device, const outline *of)
{
    static _Thread_local known_form known[KNOWN_FORMS]; /* units 0: none yet */
    static _Thread_local unsigned next;
    const int64_t units = units_of(p, of, SA_DECODE_ROWS);
    outline o = *of;
    o.keys = o.keys < 1024 ? o.keys : round_up(o.keys, 128); /* a sequence that grows keeps its form for a while */
    for (int i = 0; i < KNOWN_FORMS; i++) {
        if (is_known(&known[i], units, device, &o)) {
            return known[i].form;
        }
    }
    known_form *own = &known[next++ % KNOWN_FORMS];
    *own = (known_form){units, o.keys, o.key_bytes, o.depth, *device, find_decode_form(units, device, &o)};
    return own->form;
}

/* The same where the kernel weighs the keys as well: the scores of a split lie beside the rings, and its CTAs have to learn the sums of
 * their rows, so splits are a cluster or one. False where no such form has room. */
static bool weighing_form_of(const sa_cuda_problem *p, const sa_cuda_device *device, const outline *o, decode_form *best)
{
    const int64_t units = units_of(p, o, SA_DECODE_ROWS), slice = SA_DECODE_SLICE(o->depth), rows = p->query_length * o->group;
    if (p->mass == NULL || p->dtype == SA_CUDA_F32 || p->sequences > 0 || rows > SA_DECODE_ROWS) {
        return false;
    }
    const int64_t a_warp = ring_bytes(o), fixed = SA_DECODE_SHARED(o->depth), slices = ceil_div(o->keys, slice) + SA_DECODE_RUNS;
    const layout large = large_layout(device, SA_DECODE_CLUSTER);
    double least = HUGE_VAL;
    for (int64_t splits = 1; splits <= SA_DECODE_CLUSTER; splits *= 2) {
        const int64_t scores = ceil_div(slices, splits) * slice * SA_DECODE_SCORE_STRIDE(rows) * 4;
        const int64_t warps = min_i64((device->shared_limit - fixed - scores) / a_warp, SA_DECODE_WARPS);
        const double cost = cost_of(&large, units, o->keys, o->key_bytes, splits);
        if ((splits == 1 || is_cluster(&large, units, splits)) && warps >= SA_DECODE_WEIGHING_WARPS(o->depth) && cost < least) {
            *best = (decode_form){splits, warps, fixed + warps * a_warp + scores, splits > 1};
            least = cost;
        }
    }
    return least < HUGE_VAL;
}

static int32_t weighs_of(const sa_cuda_problem *p)
{
    const bool all = p->lean && p->cache.keys == NULL && !p->window.given && !p->starts.given && !p->lengths.given && !p->query_lengths.given;
    return all ? SA_WEIGHS_ALL : SA_WEIGHS_SOME;
}

/* Bytes of keys that a CTA asks for before it knows what it has to read, where they lie in one piece. Short calls, whose splits are a large
 * cluster, gain nothing; more than this makes CTAs wait for what others asked for. */
static int32_t prefetch_of(const sa_cuda_problem *p)
{
    const bool whole = p->cache.keys != NULL || (!p->window.given && !p->starts.given);
    const bool dense = p->held_key.token == p->depth && p->held_value.token == p->depth_v && p->aligned;
    const int64_t tokens = p->cache.keys != NULL ? p->pinned + p->cache.capacity : p->kv_length;
    const bool gains = p->splits < SA_DECODE_CLUSTER || !p->clustered;
    return p->lean && p->row_tiles == 1 && whole && dense && gains && tokens < INT32_MAX ? (p->splits > SA_DECODE_CLUSTER ? 65536 : 32768) : 0;
}

static bool plan_decode(sa_cuda_problem *p, const outline *o, const decode_form *form, sa_cuda_plan *plan)
{
    const int64_t units = units_of(p, o, SA_DECODE_ROWS);
    p->splits = (int32_t)form->splits;
    p->clustered = form->clustered;
    p->row_tiles = tiles_of(p, o, SA_DECODE_ROWS);
    reserve_partials(p, plan, units, SA_DECODE_ROWS);
    p->append = is_step(p);
    p->prefetch = prefetch_of(p);
    if (p->append && !p->slots) {
        plan->counter_count += p->batch;
    }
    const int first = p->evicts ? DECODE_EVICT : p->weighs != SA_WEIGHS_NONE ? DECODE_MASS : DECODE;
    const int kernel = first + (p->dtype == SA_CUDA_BF16 ? 3 : 0) + o->bucket;
    return push(plan, kernel, units * p->splits, 32 * form->warps, p->clustered ? p->splits : 1, form->shared);
}

static bool plan_f32(sa_cuda_problem *p, const sa_cuda_device *device, const outline *o, sa_cuda_plan *plan)
{
    const int64_t units = units_of(p, o, SA_F32_ROWS);
    const layout each = {2 * device->multiprocessors, 2, 0, clamp_i64(o->keys / 128, 1, 128)};
    double cost;
    p->splits = (int32_t)splits_of(&each, units, o->keys, o->key_bytes, &cost);
    p->row_tiles = tiles_of(p, o, SA_F32_ROWS);
    reserve_partials(p, plan, units, SA_F32_ROWS);
    return push(plan, ATTEND_F32 + o->bucket, units * p->splits, 32 * SA_F32_WARPS, 1, SA_F32_SHARED(o->depth));
}

/* A chunk is turned beforehand unless the decode kernel turns it on its way in. */
static bool plan_rotate(sa_cuda_problem *p, sa_cuda_plan *plan)
{
    const bool turns = p->cache.pairs > 0 && (!p->cache.applied || (p->cache.slot_positions && p->pinned > 0));
    if (p->cache.keys == NULL || !turns || is_step(p)) {
        return true;
    }
    const int64_t tokens = p->batch * p->query_length, size = p->dtype == SA_CUDA_F32 ? 4 : 2;
    p->rotated_offset = reserve(plan, tokens * (2 * p->heads_q + p->heads_kv) * p->depth * size);
    return push(plan, ROTATE, tokens, 32 * SA_CACHE_WARPS, 1, SA_ROTATE_SHARED);
}

/* Does the Hopper kernel give the mass? It reads 16 bytes at a time and does to a score nothing but scale and hide it. */
static bool suits_mass_hopper(const sa_cuda_problem *p, const sa_cuda_device *device)
{
    return device->wgmma && p->depth <= 128 && scales_alone(p) && p->aligned && tensor_in_pieces(&p->query, p->depth, 2) &&
           tensor_in_pieces(&p->sink_query, p->depth, 2) && p->query_length >= SA_MASS_HOPPER_ROWS / 2;
}

static bool plan_mass(const sa_cuda_problem *p, const sa_cuda_device *device, sa_cuda_plan *plan)
{
    if (p->mass == NULL || p->weighs != SA_WEIGHS_NONE) {
        return true;
    }
    const int64_t runs = p->cache.keys != NULL ? 5 : 2, keys = p->cache.keys != NULL ? p->mass_length + p->query_length : p->kv_length;
    const bool half = p->dtype != SA_CUDA_F32 && !p->mass_maximum; /* a maximum wants the heads of a query together */
    const bool hopper = half && suits_mass_hopper(p, device), bf16 = p->dtype == SA_CUDA_BF16;
    const int bucket = p->depth <= 64 ? 0 : p->depth <= 128 ? 1 : 2;
    const int64_t depth = 64 << bucket, each = hopper ? SA_MASS_HOPPER_KEYS : half ? SA_MASS_HALF_KEYS(depth) : SA_MASS_KEYS;
    const int64_t tiles = p->sequences > 0 ? ceil_div(keys, each) + 2 * p->sequences : ceil_div(keys, each) + runs;
    const int64_t grid = tiles * p->heads_kv * (p->sequences > 0 ? 1 : p->batch);
    if (hopper) {
        return push(plan, MASS_HOPPER + (bf16 ? 2 : 0) + bucket, grid, SA_MASS_HOPPER_THREADS, 1, SA_MASS_HOPPER_SHARED(depth));
    }
    if (half) {
        return push(plan, MASS_HALF + (bf16 ? 3 : 0) + bucket, grid, 32 * SA_MASS_HALF_WARPS, 1, SA_MASS_HALF_SHARED(depth));
    }
    return push(plan, MASS, grid, 32 * SA_MASS_WARPS, 1, SA_MASS_SHARED(p->depth));
}

static bool prefers_decode(const sa_cuda_problem *p, const outline *o)
{
    if (p->sequences > 0) {
        return p->query_length <= 2 * p->sequences;
    }
    return p->query_length <= 16 || p->query_length * o->group <= 64;
}

bool sa_cuda_reads_pieces(const sa_cuda_problem *p)
{
    const int64_t size = p->dtype == SA_CUDA_F32 ? 4 : 2;
    return tensor_in_pieces(p->slots ? &p->held_key : &p->key, p->depth, size) &&
           tensor_in_pieces(p->slots ? &p->held_value : &p->value, p->depth_v, size) &&
           tensor_in_pieces(&p->sink_key, p->depth, size) && tensor_in_pieces(&p->sink_value, p->depth_v, size);
}

/* What saves the kernels a look at several places. */
static void summarise(sa_cuda_problem *p)
{
    const int64_t slots = p->pinned + p->cache.capacity;
    const bool cached = p->cache.keys != NULL;
    p->aligned = sa_cuda_reads_pieces(p);
    p->group = (int32_t)(p->heads_q / p->heads_kv);
    p->apart = cached || p->window.given || p->sink_query.data != NULL || p->sink_bias.given;
    p->common_window = cached ? min_i64(p->cache.window, SA_CUDA_NO_WINDOW) : SA_CUDA_NO_WINDOW;
    if (!cached && p->window.given) {
        const double width = p->window.value;
        p->common_window = p->window.data != NULL                              ? 0
                           : width >= 1.0 && width < (double)SA_CUDA_NO_WINDOW ? (int64_t)width
                                                                               : SA_CUDA_NO_WINDOW;
    }
    if (!p->slots) {
        p->held_key = cached ? (sa_cuda_tensor){p->cache.keys, p->heads_kv * slots * p->depth, slots * p->depth, p->depth} : p->key;
        p->held_value = cached ? (sa_cuda_tensor){p->cache.values, p->heads_kv * slots * p->depth_v, slots * p->depth_v, p->depth_v} : p->value;
    }
    p->lean = p->query_length == 1 && p->sequences == 0 && p->common_window > 0 && p->dtype != SA_CUDA_F32;
}

void sa_cuda_begin_plan(sa_cuda_problem *problem, sa_cuda_plan *plan)
{
    *plan = (sa_cuda_plan){.path = "none", .form = -1};
    problem->splits = 1;
    problem->clustered = problem->append = problem->weighs = problem->prefetch = 0;
    problem->partial_offset = problem->state_offset = problem->row_tiles = 0;
    problem->lse_offset = problem->rotated_offset = -1;
    summarise(problem);
}

int sa_cuda_choose(sa_cuda_problem *problem, const sa_cuda_device *device, sa_cuda_plan *plan)
{
    sa_cuda_begin_plan(problem, plan);
    if (problem->batch == 0 || problem->query_length == 0) {
        return 0;
    }
    const outline o = sa_cuda_outline_of(problem);
    decode_form form;
    const bool decodes = problem->dtype != SA_CUDA_F32 && prefers_decode(problem, &o);
    if (decodes && weighing_form_of(problem, device, &o, &form)) {
        problem->weighs = weighs_of(problem);
    } else if (decodes) {
        form = decode_form_of(problem, device, &o);
    }
    problem->evicts = problem->evicts && problem->weighs != SA_WEIGHS_NONE && problem->lean;
    if (problem->mass != NULL && problem->lse == NULL && problem->weighs == SA_WEIGHS_NONE) {
        problem->lse_offset = reserve(plan, problem->batch * problem->heads_q * problem->query_length * 4);
    }
    bool fits = plan_rotate(problem, plan);
    const int attend = plan->launch_count;
    if (problem->dtype == SA_CUDA_F32) {
        fits = fits && plan_f32(problem, device, &o, plan);
    } else if (decodes) {
        fits = fits && plan_decode(problem, &o, &form, plan);
    } else {
        fits = fits && sa_cuda_plan_prefill(problem, device, &o, plan);
    }
    fits = fits && plan_mass(problem, device, plan);
    if (problem->cache.keys != NULL && !problem->append) {
        plan->counter_count += problem->batch;
        const int64_t written = min_i64(problem->query_length, 2 * SA_COMMIT_TOKENS + problem->pinned + problem->cache.capacity);
        const int64_t parts = ceil_div(written, SA_COMMIT_TOKENS);
        fits = fits && push(plan, COMMIT, problem->batch * problem->heads_kv * parts, 32 * SA_CACHE_WARPS, 1, 0);
    }
    if (!fits) {
        return -1;
    }
    plan->path = sa_cuda_kernels[plan->launches[attend].kernel].name;
    return 0;
}

int sa_cuda_choose_mass(sa_cuda_problem *problem, const sa_cuda_device *device, sa_cuda_plan *plan)
{
    sa_cuda_begin_plan(problem, plan);
    if (problem->batch == 0 || problem->query_length == 0) {
        return 0;
    }
    if (!plan_mass(problem, device, plan)) {
        return -1;
    }
    plan->path = plan->launch_count > 0 ? sa_cuda_kernels[plan->launches[0].kernel].name : "none";
    return 0;
}
