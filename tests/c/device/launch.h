/* Launches on the host. */
#ifndef SA_TEST_LAUNCH_H
#define SA_TEST_LAUNCH_H

#include <functional>

#include "choose.h"

namespace device
{

/* Runs every block of a grid, cluster after cluster, to its end. */
void launch_kernel(const std::function<void()> &kernel, const sa_cuda_launch &launch);

/* By its index among sa_cuda_kernels. */
void launch_problem(const sa_cuda_launch &launch, const void *pod);

} // namespace device

#endif
