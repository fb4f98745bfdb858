/* draft */
#include "hopper_copy.cuh"
#include "hopper_multiply.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename F> __device__ __forceinline__ void begin_barriers(hopper_state<F> &s)
{
    if (threadIdx.x == 0) {
        for (int i = 0; i < F::stages; i++) {
            barrier_init(&s.keys_full[i], 1);
            barrier_init(&s.values_full[i], 1);
            barrier_init(&s.keys_free[i], F::warps);
            barrier_init(&s.values_free[i], F::warps);
        }
        for (int i = 0; i < hopper_tiles; i++) {
            barrier_init(&s.tile_full[i], 1);
            barrier_init(&s.tile_free[i], F::warps + 1);
        }
        for (int i = 0; i < F::query_tiles; i++) {
            barrier_init(&s.queries_full[i], 1);
            barrier_init(&s.queries_free[i], F::warps);
        }
        barrier_init(&s.dirty, 1);
        fence_async();
    }
    __syncthreads();
}

template <typename T, typename F> __device__ __forceinline__ void prefill_hopper(const sa_cuda_prefill &call)
{
    extern __shared__ __align__(1024) char memory[];
    hopper_state<F> &s = *(hopper_state<F> *)memory;
    const uint32_t elements = shared_address(memory) + SA_HOPPER_STATE;
    static_assert(sizeof(hopper_state<F>) <= SA_HOPPER_STATE, "room for what is known of the rows");
    begin_barriers<F>(s);
    if (threadIdx.x < 128) {
        leave_registers<F::groups == 2 ? 40 : F::groups == 3 ? 32 : 24>();
        if (threadIdx.x < 32) {
            copier<F> one = {call, s, elements, (int)threadIdx.x, {}, {}, {}};
            one.run_all();
        } else if (threadIdx.x < 64) {
            finder<F> one = {call.problem, s};
            one.run_all();
        }
    } else {
        take_registers<F::groups == 2 ? 232 : F::groups == 3 ? 160 : 120>();
        const int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0) - 1; /* the same for all, which the compiler is to know */
        const int row = group * 64 + (int)threadIdx.x / 32 % 4 * 16 + (int)threadIdx.x % 32 / 4;
        const int heads = call.problem.group;
        consumer<T, F> one = {call.problem, s, elements, group, {}, call.problem.scale * log2e, F::featured ? 1.0f : call.problem.scale * log2e, {}, {}};
        for (int half = 0; half < 2; half++) {
            one.rows[half] = (uint32_t)((row + 8 * half) / heads << 16 | (row + 8 * half) % heads);
        }
        one.run_all();
    }
}

#else

template <typename T, typename F> __device__ __forceinline__ void prefill_hopper(const sa_cuda_prefill &)
{
    __trap(); /* choose.c sends nothing here */
}

#endif

} // namespace sa

#define SA_PREFILL(type, name, depth, width, rows, keys, stages, query_tiles, featured)                                                  \
    extern "C" __global__ void __launch_bounds__(SA_HOPPER_THREADS(rows), 1)                                                               \
        prefill_hopper_##type##_##name(const __grid_constant__ sa_cuda_prefill call)                                                       \
    {                                                                                                                                      \
        sa::prefill_hopper<sa::type, sa::form<rows, depth, width, keys, stages, query_tiles, featured>>(call);                             \
    }
#ifdef SA_LAB
#define SA_PREFILL_(...) SA_PREFILL(__VA_ARGS__)
SA_PREFILL_(bf16, SA_NAME, SA_LAB)
#else
#define SA_BF16(...) SA_PREFILL(bf16, __VA_ARGS__)
#define SA_F16(...) SA_PREFILL(f16, __VA_ARGS__)
SA_HOPPER_FORMS(SA_BF16)
SA_HOPPER_FORMS(SA_F16)
#endif
