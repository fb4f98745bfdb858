/* The backward pass around its two large kernels: what every query row brings along, and the gradients of small arrays.
 *
 *   delta_i = <do_i, o_i> - dlse_i     dsigma_l = -sum_i e^(sigma_l - lse_i) delta_i     dbias = sum over rows of what backward_keys left
 *
 * backward_rows: a warp for each row, bytes = 2 * rows * depth_v * size. backward_numbers: a CTA for each sink logit, in fp64 and in a fixed
 * order; a thread for each bias. Not timed yet. */
#include "backward.cuh"

namespace sa
{

__device__ __forceinline__ float wide_of(int dtype, const char *row, int64_t d)
{
    return dtype == SA_CUDA_F32   ? ((const float *)row)[d]
           : dtype == SA_CUDA_F16 ? f16::wide(((const uint16_t *)row)[d])
                                  : bf16::wide(((const uint16_t *)row)[d]);
}

__device__ __forceinline__ float float_at(const sa_cuda_tensor &tensor, int64_t batch, int64_t head, int64_t token)
{
    return *(const float *)element(tensor, batch, head, token, 4);
}

__device__ __forceinline__ void backward_rows(const sa_cuda_backward &b)
{
    const sa_cuda_problem &p = b.forward;
    const int lane = threadIdx.x % 32, size = element_size(p);
    const int64_t row = (int64_t)blockIdx.x * SA_BACKWARD_ROW_WARPS + threadIdx.x / 32;
    if (row >= p.batch * p.heads_q * p.query_length) {
        return;
    }
    const int64_t token = row % p.query_length, head = row / p.query_length % p.heads_q, batch = row / p.query_length / p.heads_q;
    const float lse = float_at(b.lse, batch, head, token);
    const bool gives = fabsf(lse) != infinity && (p.sequences > 0 || token < batch_row(p, batch).query_count);
    sa_cuda_row facts = {infinity, 0.0f};
    if (gives) { /* what other rows hold may be anything */
        const char *gradient = element(b.output_gradient, batch, head, token, size), *output = element(p.output, batch, head, token, size);
        float sum = 0.0f;
        for (int64_t d = lane; d < p.depth_v; d += 32) {
            sum = fmaf(wide_of(p.dtype, gradient, d), wide_of(p.dtype, output, d), sum);
        }
        for (int step = 16; step > 0; step /= 2) {
            sum += __shfl_xor_sync(~0u, sum, step);
        }
        facts.lse = lse * log2e;
        facts.delta = sum - (b.lse_gradient.data != nullptr ? float_at(b.lse_gradient, batch, head, token) : 0.0f);
    }
    if (lane == 0) {
        ((sa_cuda_row *)((char *)p.scratch + b.rows_offset))[row] = facts;
    }
}

/* The part of a thread in the gradient of logit `index` of a head. */
__device__ __forceinline__ double logit_part(const sa_cuda_backward &b, int64_t head, int64_t index)
{
    const sa_cuda_problem &p = b.forward;
    const float sigma = number_at(p.sink_logits, head, index) * log2e;
    double sum = 0.0;
    for (int64_t batch = 0; batch < p.batch; batch++) {
        const sa_cuda_row *rows = rows_of(b, batch, head, 0);
        for (int64_t token = threadIdx.x; token < p.query_length; token += blockDim.x) {
            if (rows[token].lse != infinity) {
                sum -= (double)(exp2f(sigma - rows[token].lse) * rows[token].delta);
            }
        }
    }
    return sum;
}

__device__ __forceinline__ void logit_gradient(const sa_cuda_backward &b, int64_t number)
{
    extern __shared__ __align__(16) char memory[];
    double *sums = (double *)memory;
    double sum = 0.0;
    if (b.logits_apart) {
        sum = logit_part(b, number / b.forward.logits, number % b.forward.logits);
    } else {
        for (int64_t head = 0; head < b.forward.heads_q; head++) {
            sum += logit_part(b, head, 0);
        }
    }
    sums[threadIdx.x] = sum;
    for (int step = SA_BACKWARD_NUMBER_THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) {
            sums[threadIdx.x] += sums[threadIdx.x + step];
        }
    }
    if (threadIdx.x == 0) {
        b.sink_logits_gradient[number] = (float)sums[0];
    }
}

__device__ __forceinline__ void bias_gradient(const sa_cuda_backward &b, int64_t number)
{
    const sa_cuda_problem &p = b.forward;
    const int64_t numbers = p.heads_q * p.pinned, rows = p.sequences > 0 ? p.sequences : p.batch;
    const float *parts = (const float *)((const char *)p.scratch + b.bias_offset);
    double sum = 0.0;
    if (number < numbers) {
        for (int64_t row = 0; row < rows; row++) {
            sum += (double)parts[row * numbers + number];
        }
        b.sink_bias_gradient[number] = (float)sum;
    }
}

__device__ __forceinline__ void backward_numbers(const sa_cuda_backward &b)
{
    if (blockIdx.x < b.logit_count) {
        logit_gradient(b, blockIdx.x);
    } else {
        bias_gradient(b, (blockIdx.x - b.logit_count) * blockDim.x + threadIdx.x);
    }
}

} // namespace sa

extern "C" __global__ void __launch_bounds__(32 * SA_BACKWARD_ROW_WARPS) backward_rows(const __grid_constant__ sa_cuda_backward b)
{
    sa::backward_rows(b);
}

extern "C" __global__ void __launch_bounds__(SA_BACKWARD_NUMBER_THREADS) backward_numbers(const __grid_constant__ sa_cuda_backward b)
{
    sa::backward_numbers(b);
}
