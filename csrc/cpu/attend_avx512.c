/* The kernels for AVX-512 (F, BW, VL, DQ). */
#include "vec_avx512.h"
#include "kernel_backward.h"
#include "kernel_mass.h"
#include "kernel_peak.h"
#include "../core/cpu_features.h"

const sa_cpu_table sa_table_avx512 = {.name = "avx512", .needs = SA_CPU_AVX2 | SA_CPU_AVX512, .attend = attend, .mass = mass_alone, .attend_backward = attend_backward, .peak = &peak_loops};
