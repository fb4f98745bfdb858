/* Attention of many query rows on Hopper: tensor boxes by the copy engine, asynchronous matrix products (wgmma), one CTA a multiprocessor.
 *
 *   out = sum_j 2^(s_j - m) v_j / (sum_j 2^(s_j - m) + 2^(sigma - m)),   flops = 4 * depth * visible pairs * heads_q * batch
 *
 * The rows of a tile are the queries of all heads of a group, so that a key is read once for the group. A CTA takes tile after tile, the
 * longest first and to and fro, so that all end together. One warp finds tiles, one copies (hopper_copy.cuh), two or three warpgroups of 64
 * rows multiply (hopper_multiply.cuh). Scores of the next slice are computed while the weights of this one meet the values, across the
 * ends of tiles too. Slices are cut from the last key that the tile sees backwards; pinned keys (up to 16) and up to 32 keys that whole
 * slices leave of a window share one small slice. Slices that every row sees whole carry no mask.
 *
 * A form that is `featured` serves softcap, ALiBi, bias of pinned keys, a second query, and scales that are not positive.
 * Not for: caches, learned keys, windows below 512, groups of more than SA_HOPPER_HEADS heads, what the copy engine cannot walk (choose.c).
 *
FIGURES
 * A trap: ptxas moves wgmma's wait to the top of its basic block, above the softmax that should hide it; a branch before it keeps it where
 * it is (finish_values). Half of what v2 won over v1 is that.
 * Tried and lost: part of the exponentials by polynomial (issue slots are as scarce as the special function unit); queries in registers;
 * turns of the warpgroups; scaling at every new maximum (2 to 4 %); heads in sections that fit the L2; tiles by the warp that copies. */
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
        leave_registers<F::groups == 2 ? 40 : 32>();
        if (threadIdx.x < 32) {
            copier<F> one = {call, s, elements, (int)threadIdx.x, {}, {}, {}};
            one.run_all();
        } else if (threadIdx.x < 64) {
            finder<F> one = {call.problem, s};
            one.run_all();
        }
    } else {
        take_registers<F::groups == 2 ? 232 : 160>();
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
