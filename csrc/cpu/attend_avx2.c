/* The kernels for AVX2 with FMA and F16C. */
#include "vec_avx2.h"
#include "kernel_backward.h"
#include "kernel_mass.h"
#include "kernel_peak.h"
#include "../core/cpu_features.h"

const sa_cpu_table sa_table_avx2 = {.name = "avx2", .needs = SA_CPU_AVX2, .attend = attend, .mass = mass_alone, .attend_backward = attend_backward, .peak = &peak_loops};
