/* Fibers, launches, and the call that the tests make: a problem in, its plan run. x86-64 alone: the switch between fibers is eight lines.
 */
#include "device.h"

#include <algorithm>
#include <string>

#include "launch.h"
#include "kv_slots.h"

namespace device
{

fiber *current;
cluster *current_cluster;
index block_size, grid_size;

namespace
{

enum { STACK_BYTES = 1 << 16 };

std::function<void()> running;
std::vector<fiber> fibers;
std::vector<size_t> order;
size_t turn, alive, idle;
void *caller;

} // namespace

extern "C" void switch_fiber(void **from, void *to);
asm(R"(
.globl switch_fiber
switch_fiber:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
)");

static void run_next(void **from)
{
    do {
        turn = (turn + 1) % order.size();
    } while (fibers[order[turn]].done);
    current = &fibers[order[turn]];
    if (from != &current->stack_pointer) {
        switch_fiber(from, current->stack_pointer);
    }
}

void yield()
{
    if (++idle > 300000000) {
        fprintf(stderr, "thread %u of block %u waits for ever\n", current->thread.x, current->home->number);
        abort();
    }
    run_next(&current->stack_pointer);
}

static void run_fiber()
{
    void *never;
    running();
    current->done = true;
    idle = 0;
    if (--alive == 0) {
        switch_fiber(&never, caller);
    }
    run_next(&never);
}

static void prepare_blocks(cluster &c, const sa_cuda_launch &launch)
{
    c.blocks.resize(launch.cluster);
    for (unsigned rank = 0; rank < launch.cluster; rank++) {
        block &b = c.blocks[rank];
        b.memory.assign(launch.shared + 2048, (char)0xff);
        b.shared = (char *)(((uintptr_t)b.memory.data() + 1023) / 1024 * 1024);
        b.number = c.number * launch.cluster + rank;
        b.warps.resize(launch.block / 32);
    }
}

static void prepare_fibers(cluster &c)
{
    static std::vector<char *> stacks;
    const size_t count = c.blocks.size() * block_size.x;
    while (stacks.size() < count) {
        stacks.push_back((char *)aligned_alloc(64, STACK_BYTES));
    }
    fibers.assign(count, fiber());
    order.resize(count);
    for (size_t i = 0; i < count; i++) {
        void **top = (void **)(stacks[i] + STACK_BYTES - 64);
        *--top = nullptr; /* run_fiber returns to nobody */
        *--top = (void *)run_fiber;
        top -= 6;
        fibers[i].stack_pointer = top;
        fibers[i].thread = {(unsigned)(i % block_size.x)};
        fibers[i].home = &c.blocks[i / block_size.x];
        order[i] = i;
    }
    for (size_t i = count; i > 1; i--) {
        std::swap(order[i - 1], order[(size_t)rand() % i]);
    }
}

/* On a device, what lies behind a block's shared memory cannot be written. */
static void check_blocks(const cluster &c, const sa_cuda_launch &launch)
{
    for (const block &b : c.blocks) {
        const char *end = b.memory.data() + b.memory.size();
        if (std::count(b.shared + launch.shared, (char *)end, (char)0xff) != end - b.shared - (std::ptrdiff_t)launch.shared) {
            fprintf(stderr, "a block of kernel %d wrote behind its %u bytes of shared memory\n", launch.kernel, launch.shared);
            abort();
        }
    }
}

void launch_kernel(const std::function<void()> &kernel, const sa_cuda_launch &launch)
{
    running = kernel;
    block_size = {launch.block};
    grid_size = {launch.grid};
    for (unsigned number = 0; number < launch.grid / launch.cluster; number++) {
        cluster c = {};
        c.number = number;
        prepare_blocks(c, launch);
        prepare_fibers(c);
        current_cluster = &c;
        alive = fibers.size();
        turn = idle = 0;
        current = &fibers[order[0]];
        switch_fiber(&caller, current->stack_pointer);
        check_blocks(c, launch);
    }
}

} // namespace device

#define SA_KERNELS(_)                                                                                                                      \
    _(decode_f16_64)                                                                                                                       \
    _(decode_f16_128) _(decode_f16_256) _(decode_bf16_64) _(decode_bf16_128) _(decode_bf16_256) _(prefill_f16_64) _(prefill_f16_128)       \
        _(prefill_f16_256) _(prefill_bf16_64) _(prefill_bf16_128) _(prefill_bf16_256) _(prefill_wide_f16_64) _(prefill_wide_f16_128) _(prefill_wide_bf16_64) _(prefill_wide_bf16_128) _(attend_f32_64) _(attend_f32_128) _(attend_f32_256) \
            _(cache_rotate) _(cache_commit) _(mass) _(mass_f16_64) _(mass_f16_128) _(mass_f16_256) _(mass_bf16_64) _(mass_bf16_128) _(mass_bf16_256)                 \
                _(mass_hopper_f16_64) _(mass_hopper_f16_128) _(mass_hopper_bf16_64) _(mass_hopper_bf16_128)               \
                    _(decode_mass_f16_64) _(decode_mass_f16_128) _(decode_mass_f16_256) _(decode_mass_bf16_64)                             \
                        _(decode_mass_bf16_128) _(decode_mass_bf16_256) _(prefill_window_f16_64_136) _(prefill_window_f16_64_144)          \
                            _(prefill_window_f16_128_136) _(prefill_window_f16_128_144) _(prefill_window_bf16_64_136)                      \
                                _(prefill_window_bf16_64_144) _(prefill_window_bf16_128_136) _(prefill_window_bf16_128_144)

#define SA_BACKWARD_KERNELS(_)                                                                                                             \
    _(backward_rows)                                                                                                                       \
    _(backward_numbers) _(backward_keys_f32_64) _(backward_keys_f32_128) _(backward_keys_f32_256) _(backward_queries_f32_64)               \
        _(backward_queries_f32_128) _(backward_queries_f32_256) _(backward_keys_f16_64) _(backward_keys_f16_128) _(backward_keys_f16_256)  \
            _(backward_keys_bf16_64) _(backward_keys_bf16_128) _(backward_keys_bf16_256) _(backward_queries_f16_64)                        \
                _(backward_queries_f16_128) _(backward_queries_f16_256) _(backward_queries_bf16_64) _(backward_queries_bf16_128)           \
                    _(backward_queries_bf16_256) _(backward_hopper_f16_64) _(backward_hopper_f16_128) _(backward_hopper_bf16_64)           \
                        _(backward_hopper_bf16_128) _(backward_finish_f16) _(backward_finish_bf16)

#define SA_EVICT_KERNELS(_)                                                                                                                \
    _(decode_evict_f16_64) _(decode_evict_f16_128) _(decode_evict_f16_256) _(decode_evict_bf16_64) _(decode_evict_bf16_128) _(decode_evict_bf16_256)

#define SA_DECLARE(name) extern "C" void name(sa_cuda_problem);
SA_KERNELS(SA_DECLARE)
#define SA_DECLARE_BACKWARD(name) extern "C" void name(sa_cuda_backward);
SA_BACKWARD_KERNELS(SA_DECLARE_BACKWARD)
#define SA_DECLARE_EVICT(name) extern "C" void name(sa_cuda_eviction);
SA_EVICT_KERNELS(SA_DECLARE_EVICT)

void device::launch_problem(const sa_cuda_launch &launch, const void *pod)
{
    const std::string wanted = sa_cuda_kernels[launch.kernel].name;
#define SA_COMPARE(name)                                                                                                                   \
    if (wanted == #name) {                                                                                                                 \
        launch_kernel([=] { name(*(const sa_cuda_problem *)pod); }, launch);                                                               \
        return;                                                                                                                            \
    }
    SA_KERNELS(SA_COMPARE)
#define SA_COMPARE_BACKWARD(name)                                                                                                          \
    if (wanted == #name) {                                                                                                                 \
        launch_kernel([=] { name(*(const sa_cuda_backward *)pod); }, launch);                                                              \
        return;                                                                                                                            \
    }
    SA_BACKWARD_KERNELS(SA_COMPARE_BACKWARD)
#define SA_COMPARE_EVICT(name)                                                                                                             \
    if (wanted == #name) {                                                                                                                 \
        launch_kernel([=] { name(*(const sa_cuda_eviction *)pod); }, launch);                                                              \
        return;                                                                                                                            \
    }
    SA_EVICT_KERNELS(SA_COMPARE_EVICT)
    abort();
}

/* Plans and runs a problem whose pointers are the host's, or mass alone. Returns 0 when the counters are zero again. */
extern "C" int run_problem(sa_cuda_problem *problem, const sa_cuda_device *facts, sa_cuda_plan *plan)
{
    const bool alone = problem->row_lse.data != nullptr;
    if ((alone ? sa_cuda_choose_mass : sa_cuda_choose)(problem, facts, plan) != 0) {
        return -1;
    }
    std::vector<char> scratch((size_t)plan->scratch_bytes + 256, (char)0xff);
    std::vector<uint32_t> counters((size_t)plan->counter_count + 1);
    problem->scratch = (void *)(((uintptr_t)scratch.data() + 255) / 256 * 256);
    problem->counters = counters.data();
    for (int i = 0; i < plan->launch_count; i++) {
        device::launch_problem(plan->launches[i], problem);
    }
    return std::count(counters.begin(), counters.end(), 0u) == (std::ptrdiff_t)counters.size() ? 0 : 1;
}

extern "C" size_t size_of_problem()
{
    return sizeof(sa_cuda_problem);
}
