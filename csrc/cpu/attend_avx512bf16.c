/* The kernels for AVX-512 with BF16 dot products. */
#include "vec_avx512.h"
#include "kernel_backward.h"
#include "kernel_mass.h"
#include "kernel_peak.h"
#include "../core/cpu_features.h"

const sa_cpu_table sa_table_avx512bf16 = {
    .name = "avx512bf16", .needs = SA_CPU_AVX2 | SA_CPU_AVX512 | SA_CPU_AVX512_BF16, .attend = attend, .mass = mass_alone, .attend_backward = attend_backward, .peak = &peak_loops};
