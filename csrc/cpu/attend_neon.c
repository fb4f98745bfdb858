/* The kernels for NEON, which every aarch64 processor has. */
#include "vec_neon.h"
#include "kernel_backward.h"
#include "kernel_mass.h"
#include "kernel_peak.h"
#include "../core/cpu_features.h"

const sa_cpu_table sa_table_neon = {.name = "neon", .needs = SA_CPU_NEON, .attend = attend, .mass = mass_alone, .attend_backward = attend_backward, .peak = &peak_loops};
