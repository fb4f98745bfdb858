#include "select.h"

#include <assert.h>
#include <math.h>
#include <string.h>

int64_t sa_budget_at(const sa_budget *budget, int64_t length)
{
    const int64_t part = budget->share > 0.0 ? (int64_t)ceil(budget->share * (double)length) : 0;
    return min_i64(length, max_i64(budget->slots, part));
}

int64_t sa_held_at(const sa_budget *budget, int64_t length)
{
    const int64_t last = sa_last_eviction(budget, length);
    return sa_budget_at(budget, last) + length - last;
}

int64_t sa_slots_until(const sa_budget *budget, int64_t length)
{
    return min_i64(length, max_i64(budget->slots, sa_budget_at(budget, length)) + budget->every - 1);
}

/* Does rank a leave before rank b? Ranks number the candidates by ascending position. */
static bool leaves_before(const double *scores, const int32_t *order, int32_t a, int32_t b)
{
    const double x = scores[order[a]], y = scores[order[b]];
    const double low_x = isnan(x) ? -INFINITY : x, low_y = isnan(y) ? -INFINITY : y;
    return low_x < low_y || (low_x == low_y && a < b);
}

/* Sinks entry `at` of a heap whose top leaves last. */
static void sift(const double *scores, const int32_t *order, int32_t *heap, int64_t size, int64_t at)
{
    const int32_t moving = heap[at];
    for (int64_t child = 2 * at + 1; child < size; child = 2 * at + 1) {
        if (child + 1 < size && leaves_before(scores, order, heap[child], heap[child + 1])) {
            child++;
        }
        if (!leaves_before(scores, order, moving, heap[child])) {
            break;
        }
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moving;
}

void sa_select(const double *scores, const int64_t *positions, const int32_t *order, int64_t count, sa_guard guard, int64_t leaving,
               int32_t *work, bool *gone)
{
    int64_t size = 0;
    memset(gone, 0, (size_t)count * sizeof *gone);
    for (int64_t rank = 0; rank < count && leaving > 0; rank++) {
        const int64_t position = positions[order[rank]];
        if (position < guard.pinned || position >= guard.recent_from) {
            continue;
        }
        if (size < leaving) {
            work[size++] = (int32_t)rank;
            for (int64_t i = size / 2 - 1; size == leaving && i >= 0; i--) {
                sift(scores, order, work, size, i);
            }
        } else if (leaves_before(scores, order, (int32_t)rank, work[0])) {
            work[0] = (int32_t)rank;
            sift(scores, order, work, size, 0);
        }
    }
    assert(size == leaving);
    for (int64_t i = 0; i < size; i++) {
        gone[order[work[i]]] = true;
    }
}
