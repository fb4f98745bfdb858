/* Small arrays of the host, as parameters: what a captured graph replays is the numbers, not an address that may be gone. */
#include "stage.h"

extern "C" __global__ void stage(const __grid_constant__ sa_stage parameters)
{
    for (int i = threadIdx.x; i < parameters.count; i += blockDim.x) {
        parameters.target[i] = parameters.words[i];
    }
}
