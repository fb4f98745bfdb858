/* Ring arithmetic against a model that keeps a list of what each slot holds; and with lengths at the end of the countable. */
#include "../../csrc/core/ring.h"
#include "fuzz.h"

enum { MOST = 64 };

typedef struct model {
    int64_t slots[MOST]; /* position in each slot, -1 for none */
    int64_t length;
} model;

static void check_state(const sa_ring *ring, sa_ring_state state, const model *m)
{
    FUZZ_REQUIRE(state.length == m->length && state.low >= ring->pinned && state.low <= max_i64(state.length, ring->pinned));
    FUZZ_REQUIRE(state.length - state.low <= ring->capacity);
    for (int64_t j = 0; j < state.length; j++) {
        if (j < ring->pinned || j >= state.low) {
            FUZZ_REQUIRE(m->slots[sa_ring_slot(ring, j)] == j);
        }
    }
    int64_t held = min_i64(ring->pinned, state.length);
    FUZZ_REQUIRE(sa_ring_pinned_held(ring, state) == held);
    held += max_i64(state.length - state.low, 0);
    FUZZ_REQUIRE(sa_ring_held(ring, state) == held);

    sa_slots runs[2];
    const int count = sa_ring_runs(ring, state.low, state.length, runs);
    int64_t next = state.low;
    for (int i = 0; i < count; i++) {
        FUZZ_REQUIRE(runs[i].position == next && runs[i].count > 0);
        for (int64_t k = 0; k < runs[i].count; k++, next++) {
            FUZZ_REQUIRE(sa_ring_slot(ring, next) == runs[i].slot + k);
        }
    }
    FUZZ_REQUIRE(next == max_i64(state.length, state.low));
}

static void append(const sa_ring *ring, model *m, int64_t count)
{
    for (int64_t i = 0; i < count; i++, m->length++) {
        m->slots[sa_ring_slot(ring, m->length)] = m->length;
    }
}

/* What the next token would see, {j < pinned} and {length - window < j < length}, is in its slot? */
static bool may_crop(const sa_ring *ring, const model *m, int64_t low, int64_t length)
{
    if (length > m->length) {
        return false;
    }
    for (int64_t j = 0; j < length; j++) {
        const bool seen = j < ring->pinned || j > length - ring->window;
        if (seen && (m->slots[sa_ring_slot(ring, j)] != j || (j >= ring->pinned && j < low))) {
            return false;
        }
    }
    return true;
}

static void walk(fuzz_input *in, const sa_ring *ring)
{
    model m = {.length = 0};
    memset(m.slots, 0xff, sizeof m.slots);
    sa_ring_state state = {0, ring->pinned};
    while (in->size > 0 && m.length < 400) {
        const uint8_t action = fuzz_byte(in);
        if (action < 190) {
            const int64_t count = action % 23;
            state = sa_ring_append(ring, state, count);
            append(ring, &m, count);
        } else {
            const int64_t length = m.length - action % 13;
            const bool allowed = length >= 0 && sa_ring_may_crop(ring, state, length);
            FUZZ_REQUIRE(allowed == (length >= 0 && may_crop(ring, &m, state.low, length)));
            if (allowed) {
                state = sa_ring_crop(ring, state, length);
                m.length = length;
            }
        }
        check_state(ring, state, &m);
    }
}

/* The largest numbers that the checks let pass. */
static void far_out(fuzz_input *in)
{
    const int64_t most = INT64_MAX / 4;
    const int64_t window = clamp_i64(fuzz_hostile(in), 1, most), rollback = clamp_i64(fuzz_hostile(in), 0, most);
    const sa_ring ring = {clamp_i64(fuzz_hostile(in), 0, most), window, window + rollback};
    const int64_t length = clamp_i64(fuzz_hostile(in), 0, most);
    sa_ring_state state = {length, max_i64(ring.pinned, length - ring.capacity)};
    state = sa_ring_append(&ring, state, clamp_i64(fuzz_hostile(in), 0, most - length));
    sa_slots runs[2];
    const int count = sa_ring_runs(&ring, state.low, state.length, runs);
    for (int i = 0; i < count; i++) {
        FUZZ_REQUIRE(runs[i].slot >= ring.pinned && runs[i].slot + runs[i].count <= ring.pinned + ring.capacity);
    }
    const int64_t crop = clamp_i64(fuzz_hostile(in), 0, INT64_MAX);
    if (sa_ring_may_crop(&ring, state, crop)) {
        state = sa_ring_crop(&ring, state, crop);
        FUZZ_REQUIRE(state.length == crop && state.low >= ring.pinned && state.low <= max_i64(crop, ring.pinned));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    const int64_t window = fuzz_range(&in, 1, 20), rollback = fuzz_range(&in, 0, 9);
    const sa_ring ring = {fuzz_range(&in, 0, 9), window, window + rollback};
    if (fuzz_byte(&in) < 64) {
        far_out(&in);
    } else {
        walk(&in, &ring);
    }
    return 0;
}
