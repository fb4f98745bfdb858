/* Counters that kernels find at zero and leave at zero, so that no launch is spent on clearing them.
 *
 * Calls that may overlap must not share any: a stream has its own, and so has each call of a captured graph, for good, since the graph
 * may be replayed beside anything. Memory for them is a few arenas a device that are never given back. */
#ifndef SA_COUNTERS_H
#define SA_COUNTERS_H

#include "driver.h"

/* *counters NULL: there are none left, or more are wanted than a stream has; the caller clears memory of his own. */
sa_status sa_counters_take(const char *function, const sa_device_scope *scope, void *stream, int64_t count, uint32_t **counters);

#endif
