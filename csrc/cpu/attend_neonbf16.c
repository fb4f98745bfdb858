/* The kernels for NEON with BF16 dot products. */
#include "vec_neon.h"
#include "kernel_backward.h"
#include "kernel_mass.h"
#include "kernel_peak.h"
#include "../core/cpu_features.h"

const sa_cpu_table sa_table_neonbf16 = {
    .name = "neonbf16", .needs = SA_CPU_NEON | SA_CPU_NEON_BF16, .attend = attend, .mass = mass_alone, .attend_backward = attend_backward, .peak = &peak_loops};
