/* The choice of kernels, without a GPU: what holds for every shape, and the layouts that were measured to be best. Exits 1 at the first failure. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/cuda/choose.h"

static const sa_cuda_device h200 = {.capability = 90, .multiprocessors = 132, .shared_limit = 232448, .cluster_limit = 8};
static const sa_cuda_device a100 = {.capability = 80, .multiprocessors = 108, .shared_limit = 166912};
static const sa_cuda_device rtx = {.capability = 89, .multiprocessors = 142, .shared_limit = 101376};

#define CHECK(condition)                                                      \
    do {                                                                      \
        if (!(condition)) {                                                   \
            printf("line %d: %s does not hold\n", __LINE__, #condition);      \
            exit(1);                                                          \
        }                                                                     \
    } while (0)

static sa_cuda_problem problem_of(int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t depth, int64_t queries, int64_t keys, int dtype)
{
    sa_cuda_problem p = {.batch = batch, .heads_q = heads_q, .heads_kv = heads_kv, .query_length = queries, .kv_length = keys};
    p.depth = p.depth_v = depth;
    p.dtype = dtype;
    p.causal = 1;
    p.mass_queries = -1;
    return p;
}

static void make_cache(sa_cuda_problem *p, int64_t pinned, int64_t window)
{
    p->cache.keys = p->cache.values = (void *)(uintptr_t)256;
    p->cache.window = p->cache.capacity = window;
    p->pinned = pinned;
    p->kv_length = p->query_length;
    p->mass_length = pinned + window;
}

static const char *kernel_of(const sa_cuda_plan *plan, int launch)
{
    return sa_cuda_kernels[plan->launches[launch].kernel].name;
}

/* What must hold for any plan. */
static void check_plan(const sa_cuda_problem *p, const sa_cuda_device *device, const sa_cuda_plan *plan)
{
    CHECK(plan->launch_count <= SA_CUDA_MAX_LAUNCHES);
    for (int i = 0; i < plan->launch_count; i++) {
        const sa_cuda_launch *l = &plan->launches[i];
        CHECK(l->kernel >= 0 && l->kernel < sa_cuda_kernel_count);
        CHECK(l->grid > 0 && l->block >= 32 && l->block <= 1024 && l->block % 32 == 0);
        CHECK((int64_t)l->shared <= device->shared_limit);
        CHECK(l->cluster >= 1 && l->grid % l->cluster == 0);
        CHECK(l->cluster == 1 || (device->capability == 90 && (int64_t)l->cluster <= device->cluster_limit && p->splits == (int32_t)l->cluster));
    }
    CHECK(p->splits >= 1 && p->splits <= 128);
    CHECK(p->clustered || p->splits == 1 || plan->counter_count > 0);
    CHECK(p->clustered || p->splits == 1 || (p->state_offset > p->partial_offset && p->state_offset < plan->scratch_bytes));
    CHECK(p->partial_offset % 256 == 0 && p->state_offset % 256 == 0);
}

static sa_cuda_plan plan_of(sa_cuda_problem *p, const sa_cuda_device *device)
{
    sa_cuda_plan plan;
    CHECK(sa_cuda_choose(p, device, &plan) == 0);
    check_plan(p, device, &plan);
    return plan;
}

static void sweep(void)
{
    const sa_cuda_device *devices[] = {&h200, &a100, &rtx};
    const int64_t lengths[] = {1, 7, 100, 4096, 100000, 10000000}, depths[] = {1, 64, 80, 128, 192, 256}, groups[] = {1, 3, 8, 64};
    for (size_t d = 0; d < 3; d++) {
        for (int64_t i = 0; i < 6 * 6 * 4 * 3 * 4 * 2; i++) {
            const int64_t group = groups[i / 36 % 4], batch = (int64_t[]){1, 8, 300}[i / 144 % 3], queries = (int64_t[]){1, 2, 16, 3000}[i / 432 % 4];
            sa_cuda_problem p = problem_of(batch, 2 * group, 2, depths[i / 6 % 6], queries, lengths[i % 6], (int)(i % 3));
            if (i / 1728 % 2) {
                make_cache(&p, 4, lengths[i % 6]);
            }
            plan_of(&p, devices[d]);
        }
    }
}

/* Every shape of the backward pass on every device: it must fit, and every row and key must find its tile. */
static void backward_sweep(void)
{
    const sa_cuda_device *devices[] = {&h200, &a100, &rtx};
    const int64_t depths[] = {1, 64, 80, 128, 192, 256};
    for (int64_t i = 0; i < 6 * 3 * 3 * 2; i++) {
        sa_cuda_backward b = {.forward = problem_of(3, 8, 2, depths[i % 6], 1000, 1500, (int)(i / 6 % 3))};
        sa_cuda_plan plan;
        b.forward.learned = i / 18 % 3;
        b.forward.sequences = i / 54 % 2 ? 5 : 0;
        b.logit_count = 8;
        CHECK(sa_cuda_choose_backward(&b, &plan) == 0 && plan.launch_count == 4);
        for (size_t d = 0; d < 3; d++) {
            check_plan(&b.forward, devices[d], &plan);
        }
        const int64_t rows = b.forward.sequences > 0 ? 1 : 3;
        CHECK(!strcmp(kernel_of(&plan, 0), "backward_rows") && !strcmp(kernel_of(&plan, 3), "backward_numbers"));
        CHECK(plan.launches[0].grid * SA_BACKWARD_ROW_WARPS >= 3 * 8 * 1000);
        CHECK(b.query_tiles * 128 >= 1000 && b.key_tiles * 128 >= 1500 && (b.learned_tiles > 0) == (b.forward.learned > 0));
        CHECK(plan.launches[2].grid == b.query_tiles * 8 * rows && plan.launches[1].grid % ((b.learned_tiles + b.key_tiles * rows) * 2) == 0);
        CHECK(b.rows_offset + 3 * 8 * 1000 * (int64_t)sizeof(sa_cuda_row) <= plan.scratch_bytes && plan.counter_count == 0);
    }
    sa_cuda_backward nothing = {.forward = problem_of(3, 8, 2, 64, 0, 10, SA_CUDA_BF16)};
    sa_cuda_plan plan;
    CHECK(sa_cuda_choose_backward(&nothing, &plan) == 0 && plan.launch_count == 0 && plan.scratch_bytes == 0);
}

/* One pass where the sums may come in any order, and a score is nothing but scaled and hidden. */
static void one_pass(void)
{
    for (int kind = 0; kind < 9; kind++) {
        const int64_t depth = kind == 1 ? 64 : kind == 2 ? 192 : 128;
        sa_cuda_backward b = {.forward = problem_of(2, 8, 2, depth, 1000, 1500, kind == 3 ? SA_CUDA_F32 : SA_CUDA_BF16)};
        sa_cuda_plan plan;
        b.one_pass = kind != 4;
        b.forward.softcap = kind == 5 ? 30.0f : 0.0f;
        b.forward.sink_bias.given = kind == 6;
        b.forward.alibi_slopes.given = kind == 7;
        b.forward.query = (sa_cuda_tensor){.data = (void *)(uintptr_t)256, .token = kind == 8 ? 127 : 128};
        CHECK(sa_cuda_choose_backward(&b, &plan) == 0 && plan.launch_count == 3);
        check_plan(&b.forward, &h200, &plan);
        CHECK((strncmp(plan.path, "backward_hopper_bf16", 20) == 0) == (kind < 2) && (b.sums_bytes > 0) == (kind < 2));
        if (kind < 2) {
            CHECK(b.key_tiles == 12 && plan.launches[1].grid == 12 * 2 * 2 && plan.launches[1].block == 256);
            CHECK(b.sums_bytes == 2 * 8 * 1000 * b.sums_width * 4 && b.sums_offset + b.sums_bytes <= plan.scratch_bytes);
            CHECK(plan.launches[2].grid * 256 >= 2 * 8 * 1000 * b.forward.depth / 8 && b.sums_width == b.forward.depth);
        }
    }
}

static void expect_decode(sa_cuda_problem p, int32_t splits, uint32_t cluster, uint32_t block)
{
    const sa_cuda_plan plan = plan_of(&p, &h200);
    CHECK(plan.launch_count == 1 && strncmp(plan.path, "decode", 6) == 0);
    CHECK(p.splits == splits && plan.launches[0].cluster == cluster && plan.launches[0].block == block);
}

static void measured_layouts(void)
{
    expect_decode(problem_of(1, 32, 8, 128, 1, 4096, SA_CUDA_BF16), 8, 8, 256);
    expect_decode(problem_of(1, 32, 8, 128, 1, 32768, SA_CUDA_BF16), 8, 8, 256);
    expect_decode(problem_of(1, 32, 8, 128, 1, 131072, SA_CUDA_BF16), 16, 1, 256);
    expect_decode(problem_of(64, 32, 8, 128, 1, 4096, SA_CUDA_BF16), 1, 1, 128);
    expect_decode(problem_of(64, 64, 8, 64, 1, 16384, SA_CUDA_BF16), 1, 1, 128);
    sa_cuda_problem step = problem_of(8, 32, 8, 128, 1, 1, SA_CUDA_BF16);
    make_cache(&step, 4, 4092);
    expect_decode(step, 2, 2, 256);
}

/* A decode kernel that weighs keeps its scores beside fewer rings, in a cluster; where they find no room, a pass of its own follows. */
static void weighing_layouts(void)
{
    const struct {
        int64_t batch, keys;
        uint32_t cluster, block;
    } known[] = {{1, 4096, 8, 256}, {1, 32768, 8, 192}, {64, 4096, 1, 192}};
    for (int i = 0; i < 3; i++) {
        sa_cuda_problem p = problem_of(known[i].batch, 32, 8, 128, 1, known[i].keys, SA_CUDA_BF16);
        p.mass = (float *)(uintptr_t)256;
        const sa_cuda_plan plan = plan_of(&p, &h200);
        CHECK(plan.launch_count == 1 && strncmp(plan.path, "decode_mass", 11) == 0 && p.weighs == SA_WEIGHS_ALL);
        CHECK(plan.launches[0].cluster == known[i].cluster && plan.launches[0].block == known[i].block && p.lse_offset < 0);
    }
    sa_cuda_problem p = problem_of(1, 32, 8, 128, 1, 131072, SA_CUDA_BF16);
    p.mass = (float *)(uintptr_t)256;
    const sa_cuda_plan plan = plan_of(&p, &h200);
    CHECK(plan.launch_count == 2 && p.splits == 16 && p.weighs == SA_WEIGHS_NONE && p.lse_offset >= 0);
    CHECK(!strcmp(kernel_of(&plan, 1), "mass_bf16_128"));
}

/* A step of one token is one launch, whatever is rotated; fp32 and longer chunks take more, in this order. */
static void cache_launches(void)
{
    sa_cuda_problem p = problem_of(2, 8, 2, 64, 1, 1, SA_CUDA_BF16);
    make_cache(&p, 4, 100);
    p.cache.pairs = 32;
    p.cache.slot_positions = 1;
    sa_cuda_plan plan = plan_of(&p, &h200);
    CHECK(plan.launch_count == 1 && p.append && p.lean && p.rotated_offset < 0);
    p.mass = (float *)(uintptr_t)256;
    plan = plan_of(&p, &h200);
    CHECK(plan.launch_count == 1 && p.append && p.rotated_offset < 0 && p.weighs == SA_WEIGHS_SOME);
    p.query_length = p.kv_length = 5; /* more rows than a tile has */
    plan = plan_of(&p, &h200);
    CHECK(plan.launch_count == 4 && !p.append && p.rotated_offset >= 0 && p.lse_offset >= 0);
    CHECK(!strcmp(kernel_of(&plan, 0), "cache_rotate") && !strncmp(kernel_of(&plan, 1), "decode", 6));
    CHECK(!strcmp(kernel_of(&plan, 2), "mass_bf16_64") && !strcmp(kernel_of(&plan, 3), "cache_commit"));
    p.mass = NULL;
    p.query_length = p.kv_length = 500;
    plan = plan_of(&p, &h200);
    CHECK(plan.launch_count == 3 && !strncmp(kernel_of(&plan, 1), "prefill", 7));
    p.cache.applied = 1;
    p.cache.slot_positions = 0;
    plan = plan_of(&p, &h200); /* nothing to turn */
    CHECK(plan.launch_count == 2 && p.rotated_offset < 0);
}

static void nothing_to_do(void)
{
    sa_cuda_problem p = problem_of(0, 8, 2, 64, 1, 10, SA_CUDA_F16);
    CHECK(plan_of(&p, &h200).launch_count == 0);
    p = problem_of(1, 8, 2, 64, 0, 10, SA_CUDA_F16);
    CHECK(plan_of(&p, &h200).launch_count == 0);
    p = problem_of(1, 8, 2, 64, 1, 0, SA_CUDA_F16); /* no key: output 0 has to be written */
    CHECK(plan_of(&p, &h200).launch_count == 1);
}

static void pieces_and_windows(void)
{
    sa_cuda_problem p = problem_of(1, 8, 2, 64, 1, 100, SA_CUDA_BF16);
    p.key = p.value = (sa_cuda_tensor){(void *)(uintptr_t)512, 12800, 6400, 64};
    plan_of(&p, &h200);
    CHECK(p.aligned && p.common_window == SA_CUDA_NO_WINDOW && p.group == 4);
    p.value.token = 65;
    p.window = (sa_cuda_numbers){.value = 17.0, .given = 1};
    plan_of(&p, &h200);
    CHECK(!p.aligned && p.common_window == 17 && p.lean && p.apart);
    p.window.data = &p; /* on the device, a head each */
    plan_of(&p, &h200);
    CHECK(p.common_window == 0 && !p.lean);
}

static bool takes_hopper(sa_cuda_problem p, const sa_cuda_device *device)
{
    const sa_cuda_plan plan = plan_of(&p, device);
    const bool hopper = strncmp(plan.path, "prefill_hopper", 14) == 0;
    CHECK(hopper == (plan.form >= 0));
    if (hopper) {
        const sa_cuda_form *form = &sa_cuda_forms[plan.form];
        CHECK(p.depth <= form->depth && p.depth_v <= form->width && form->shared <= device->shared_limit);
        CHECK(p.row_tiles * (form->rows / p.group) >= p.query_length);
    }
    return hopper;
}

static bool is_featured(sa_cuda_problem p, const sa_cuda_device *device)
{
    const sa_cuda_plan plan = plan_of(&p, device);
    return strncmp(plan.path, "prefill_hopper_bf16_featured", 28) == 0 && sa_cuda_forms[plan.form].featured;
}

static sa_cuda_tensor dense(int64_t heads, int64_t tokens, int64_t depth)
{
    return (sa_cuda_tensor){(void *)(uintptr_t)256, heads * tokens * depth, tokens * depth, depth};
}

/* What the kernel for Hopper takes, and each thing that it leaves to the other. */
static void hopper_prefill(void)
{
    sa_cuda_device hopper = h200;
    hopper.wgmma = 1;
    sa_cuda_problem plain = problem_of(2, 8, 2, 128, 3000, 3000, SA_CUDA_BF16);
    plain.scale = 0.1f;
    plain.query = dense(8, 3000, 128);
    plain.key = plain.value = dense(2, 3000, 128);
    CHECK(takes_hopper(plain, &hopper) && !takes_hopper(plain, &h200));
    sa_cuda_problem p = plain;
    p.depth = p.depth_v = 64;
    CHECK(takes_hopper(p, &hopper));
    p.depth = p.depth_v = 512;
    CHECK(!takes_hopper(p, &hopper));
    p = plain;
    p.scale = -0.1f; /* dot products cannot be compared before they are scaled */
    CHECK(takes_hopper(p, &hopper) && is_featured(p, &hopper) && !is_featured(plain, &hopper));
    p = plain;
    p.window = (sa_cuda_numbers){.value = 1024.0, .given = 1};
    CHECK(takes_hopper(p, &hopper));
    p.window.value = 128.0;
    CHECK(!takes_hopper(p, &hopper));
    p.window.data = &p; /* on the device, a head each */
    CHECK(takes_hopper(p, &hopper));
    p = plain;
    p.softcap = 3.0f;
    CHECK(is_featured(p, &hopper));
    p.softcap = 0.0f;
    p.sink_bias = (sa_cuda_numbers){.value = 1.0, .given = 1};
    p.pinned = 16;
    CHECK(is_featured(p, &hopper));
    p.pinned = 17; /* one by one */
    CHECK(!takes_hopper(p, &hopper));
    p = plain;
    p.sink_query = dense(8, 3000, 128);
    CHECK(is_featured(p, &hopper));
    p.sink_query.token = 0;
    CHECK(!takes_hopper(p, &hopper));
    p = plain;
    p.query.data = (void *)(uintptr_t)8;
    CHECK(!takes_hopper(p, &hopper));
    p = plain;
    p.key.head = 0; /* one for all: the copy engine wants a step */
    CHECK(!takes_hopper(p, &hopper));
    p.heads_q = p.heads_kv = 1;
    CHECK(takes_hopper(p, &hopper));
    p.value.token = -128;
    CHECK(!takes_hopper(p, &hopper));
    p = plain;
    p.heads_q = 2 * 7; /* tiles of 126 rows */
    CHECK(takes_hopper(p, &hopper));
    p.heads_q = 2 * 200;
    CHECK(!takes_hopper(p, &hopper));
    p = plain;
    p.batch = 1;
    p.sequences = 5;
    CHECK(takes_hopper(p, &hopper));
    p = plain;
    make_cache(&p, 4, 1000);
    CHECK(!takes_hopper(p, &hopper));
}

static bool takes_window(sa_cuda_problem p, const sa_cuda_device *device)
{
    const sa_cuda_plan plan = plan_of(&p, device);
    return strncmp(plan.path, "prefill_window", 14) == 0;
}

/* What the kernel of narrow windows takes: all that a tile sees has to fit, which depends on how many positions a tile spans. */
static void window_prefill(void)
{
    sa_cuda_device hopper = h200;
    hopper.wgmma = 1;
    sa_cuda_problem narrow = problem_of(2, 8, 2, 128, 3000, 3000, SA_CUDA_BF16);
    narrow.scale = 0.1f;
    narrow.causal = 1;
    narrow.pinned = 4;
    narrow.window = (sa_cuda_numbers){.value = 129.0, .given = 1};
    CHECK(takes_window(narrow, &hopper) && !takes_window(narrow, &h200));
    sa_cuda_problem p = narrow;
    const sa_cuda_plan plan = plan_of(&p, &hopper);
    CHECK(p.row_tiles == (3000 * 4 + 63) / 64 && plan.launches[0].grid == 132 && plan.launches[0].block == SA_WINDOW_THREADS);
    CHECK(plan.launches[0].shared <= (uint32_t)h200.shared_limit && SA_WINDOW_SHARED(64) <= h200.shared_limit);
    p = narrow;
    p.window.value = 130.0;
    CHECK(!takes_window(p, &hopper));
    p.heads_q = 16; /* eight positions a tile */
    CHECK(takes_window(p, &hopper));
    p.heads_q = 6; /* up to 29 from one multiple of eight on */
    p.window.value = 117.0;
    CHECK(!takes_window(p, &hopper));
    p.window.value = 116.0;
    CHECK(takes_window(p, &hopper));
    p = narrow;
    p.pinned = SA_WINDOW_PINNED + 1;
    CHECK(!takes_window(p, &hopper));
    p = narrow;
    p.causal = 0;
    CHECK(!takes_window(p, &hopper));
    p = narrow;
    p.window.data = &p;
    CHECK(!takes_window(p, &hopper));
    p = narrow;
    p.output.data = (void *)(uintptr_t)8;
    CHECK(!takes_window(p, &hopper));
    p = narrow;
    p.lengths.given = p.starts.given = p.query_lengths.given = 1;
    CHECK(takes_window(p, &hopper));
}

static void refuses_endless_grids(void)
{
    sa_cuda_problem p = problem_of(1LL << 31, 8, 8, 64, 1, 10, SA_CUDA_BF16);
    sa_cuda_plan plan;
    CHECK(sa_cuda_choose(&p, &h200, &plan) == -1);
}

int main(void)
{
    sweep();
    backward_sweep();
    one_pass();
    measured_layouts();
    weighing_layouts();
    cache_launches();
    nothing_to_do();
    pieces_and_windows();
    hopper_prefill();
    window_prefill();
    refuses_endless_grids();
    printf("ok\n");
    return 0;
}
