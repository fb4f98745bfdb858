/* The kernels for AMX tiles of bf16; fp32 and fp16 as with AVX-512. */
#include "vec_amx.h"
#include "kernel_backward.h"
#include "kernel_mass.h"
#include "kernel_peak.h"
#include "../core/cpu_features.h"

const sa_cpu_table sa_table_amx = {
    .name = "amx", .needs = SA_CPU_AVX2 | SA_CPU_AVX512 | SA_CPU_AVX512_BF16 | SA_CPU_AMX_BF16, .attend = attend, .mass = mass_alone, .attend_backward = attend_backward, .peak = &peak_loops};
