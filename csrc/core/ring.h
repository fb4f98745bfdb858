/* Integer arithmetic of pinned tokens + ring: which slot, which position, what is still held.
 *
 * A row has seen `length` tokens. Position j < pinned lives in slot j for ever; position j >= pinned in slot
 * pinned + (j - pinned) % capacity. The ring holds the positions low .. length - 1, at most `capacity` of them. */
#ifndef SA_RING_H
#define SA_RING_H

#include <stdbool.h>
#include <stdint.h>

#include "integers.h"

typedef struct sa_ring {
    int64_t pinned, window, capacity; /* capacity = window + rollback */
} sa_ring;

typedef struct sa_ring_state {
    int64_t length; /* tokens seen */
    int64_t low;    /* oldest position held by the ring; pinned .. max(length, pinned) */
} sa_ring_state;

/* Neighbouring slots with consecutive positions. */
typedef struct sa_slots {
    int64_t slot, position, count;
} sa_slots;

static inline int64_t sa_ring_slot(const sa_ring *ring, int64_t position)
{
    return position < ring->pinned ? position : ring->pinned + (position - ring->pinned) % ring->capacity;
}

static inline int64_t sa_ring_pinned_held(const sa_ring *ring, sa_ring_state state)
{
    return min_i64(ring->pinned, state.length);
}

static inline int64_t sa_ring_held(const sa_ring *ring, sa_ring_state state)
{
    return sa_ring_pinned_held(ring, state) + max_i64(state.length - state.low, 0);
}

/* The state after `count` more tokens. */
static inline sa_ring_state sa_ring_append(const sa_ring *ring, sa_ring_state state, int64_t count)
{
    const int64_t length = state.length + count;
    return (sa_ring_state){length, max_i64(state.low, length - ring->capacity)};
}

/* Splits ring positions first .. last - 1 (all >= pinned, at most capacity many) into runs of neighbouring slots. Returns 0, 1 or 2. */
static inline int sa_ring_runs(const sa_ring *ring, int64_t first, int64_t last, sa_slots runs[2])
{
    if (first >= last) {
        return 0;
    }
    const int64_t slot = sa_ring_slot(ring, first);
    const int64_t to_end = min_i64(last - first, ring->pinned + ring->capacity - slot);
    runs[0] = (sa_slots){slot, first, to_end};
    runs[1] = (sa_slots){ring->pinned, first + to_end, last - first - to_end}; /* wraps at most once */
    return runs[1].count > 0 ? 2 : 1;
}

/* May a row forget all but its first `length` tokens? Only if everything that the next token would see is still held. */
static inline bool sa_ring_may_crop(const sa_ring *ring, sa_ring_state state, int64_t length)
{
    const int64_t needed = max_i64(length - ring->window + 1, ring->pinned);
    return length <= state.length && (needed >= length || state.low <= needed);
}

static inline sa_ring_state sa_ring_crop(const sa_ring *ring, sa_ring_state state, int64_t length)
{
    return (sa_ring_state){length, min_i64(state.low, max_i64(length, ring->pinned))};
}

#endif
