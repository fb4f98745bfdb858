/* Picks a table once: SINKATTN_CPU=<name> if it is usable, else the widest that the processor has. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../core/cpu_features.h"
#include "table.h"

typedef struct entry {
    const char *name;
    const sa_cpu_table *table; /* NULL: not built */
} entry;

/* From the narrowest to the widest. */
static const entry entries[] = {
    {"reference", &sa_table_reference},
#ifdef SA_HAVE_AVX2
    {"avx2", &sa_table_avx2},
#else
    {"avx2", NULL},
#endif
#ifdef SA_HAVE_AVX512
    {"avx512", &sa_table_avx512},
#else
    {"avx512", NULL},
#endif
#ifdef SA_HAVE_AVX512BF16
    {"avx512bf16", &sa_table_avx512bf16},
#else
    {"avx512bf16", NULL},
#endif
#ifdef SA_HAVE_AMX
    {"amx", &sa_table_amx},
#else
    {"amx", NULL},
#endif
#ifdef SA_HAVE_NEON
    {"neon", &sa_table_neon},
#else
    {"neon", NULL},
#endif
#ifdef SA_HAVE_NEONBF16
    {"neonbf16", &sa_table_neonbf16},
#else
    {"neonbf16", NULL},
#endif
};

enum { ENTRIES = sizeof entries / sizeof entries[0] };

static const sa_cpu_table *_Atomic chosen;
static char reason[240] = "chosen by hand";

int sa_table_count(void)
{
    return ENTRIES;
}

const char *sa_table_name(int index)
{
    return entries[index].name;
}

bool sa_table_built(int index)
{
    return entries[index].table != NULL;
}

bool sa_table_usable(int index)
{
    const sa_cpu_table *table = entries[index].table;
    return table != NULL && (sa_cpu_probe() & table->needs) == table->needs;
}

static const sa_cpu_table *find(const char *name)
{
    for (int i = 0; i < ENTRIES; i++) {
        if (strcmp(entries[i].name, name) == 0 && sa_table_usable(i)) {
            return entries[i].table;
        }
    }
    return NULL;
}

static const sa_cpu_table *choose(void)
{
    const char *wish = getenv("SINKATTN_CPU");
    const sa_cpu_table *table = wish != NULL && wish[0] != '\0' ? find(wish) : NULL;
    if (table != NULL) {
        snprintf(reason, sizeof reason, "SINKATTN_CPU=%.40s asks for it", wish);
        return table;
    }
    bool passed_over = false;
    for (int i = ENTRIES - 1; table == NULL; i--) {
        const sa_cpu_table *candidate = sa_table_usable(i) ? entries[i].table : NULL;
        const unsigned bf16_units = SA_CPU_AVX512_BF16 | SA_CPU_AMX_BF16;
        const bool slow = candidate != NULL && (candidate->needs & bf16_units) == SA_CPU_AVX512_BF16 && (sa_cpu_probe() & SA_CPU_SLOW_BF16_DOT);
        passed_over = passed_over || slow;
        table = slow ? NULL : candidate;
    }
    if (wish != NULL && wish[0] != '\0') {
        snprintf(reason, sizeof reason, "SINKATTN_CPU=%.40s is unknown or not usable here; this is the widest usable one", wish);
    } else {
        snprintf(reason, sizeof reason, "the widest instruction set that is built in and that this processor has%s",
                 passed_over ? "; avx512bf16 is passed over: this maker's bf16 dot products are slower than fp32" : "");
    }
    return table;
}

const sa_cpu_table *sa_table(void)
{
    const sa_cpu_table *table = atomic_load_explicit(&chosen, memory_order_acquire);
    if (table == NULL) {
        table = choose();
        atomic_store_explicit(&chosen, table, memory_order_release);
    }
    return table;
}

static bool has_peak(const sa_peak_loops *loops, sa_peak_kind kind)
{
    if (loops == NULL) {
        return false;
    }
    return kind == SA_PEAK_FMA ? loops->fma != NULL : kind == SA_PEAK_READ ? loops->read != NULL : loops->bf16_dot != NULL;
}

const sa_cpu_table *sa_table_with_peak(sa_peak_kind kind)
{
    if (has_peak(sa_table()->peak, kind)) {
        return sa_table();
    }
    for (int i = ENTRIES - 1; i >= 0; i--) {
        if (sa_table_usable(i) && has_peak(entries[i].table->peak, kind)) {
            return entries[i].table;
        }
    }
    return NULL;
}

const char *sa_table_chosen(void)
{
    return sa_table()->name;
}

const char *sa_table_reason(void)
{
    (void)sa_table();
    return reason;
}

sa_status sa_table_use(const char *name)
{
    const sa_cpu_table *table = find(name);
    if (table == NULL) {
        return sa_fail(SA_VALUE_ERROR, "use_cpu_table(): %.60s is not a table that is usable here", name);
    }
    (void)sa_table();
    snprintf(reason, sizeof reason, "chosen by hand");
    atomic_store(&chosen, table);
    return SA_OK;
}

static _Atomic int64_t path_calls[SA_PATH_COUNT];

void sa_path_count_row(sa_path path)
{
    atomic_fetch_add_explicit(&path_calls[path], 1, memory_order_relaxed);
}

int sa_path_count(void)
{
    return SA_PATH_COUNT;
}

const char *sa_path_name(int index)
{
    static const char *const names[SA_PATH_COUNT] = {"direct", "packed", "mass", "backward", "reference"};
    return names[index];
}

int64_t sa_path_calls(int index)
{
    return atomic_load_explicit(&path_calls[index], memory_order_relaxed);
}
