/* _core.KVCache: the storage and the call behind sinkattn.KVCache. One thread at a time; a second one is refused, not blocked. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "array.h"
#include "bind_params.h"
#include "numpy_api.h"

#include "../core/half.h"
#include "../core/ledger.h"
#include "../core/policy.h"
#include "../core/problem.h"

typedef struct kv_object {
    PyObject_HEAD
    sa_kv_cache *cache;
    atomic_flag busy;
} kv_object;

static sa_kv_cache *enter(PyObject *self)
{
    kv_object *object = (kv_object *)self;
    if (atomic_flag_test_and_set(&object->busy)) {
        PyErr_SetString(PyExc_RuntimeError, "KVCache is in use by another call; give each thread a cache of its own");
        return NULL;
    }
    return object->cache;
}

static void leave(PyObject *self)
{
    atomic_flag_clear(&((kv_object *)self)->busy);
}

PyObject *sa_wrap_kv(PyTypeObject *type, sa_kv_cache *cache)
{
    kv_object *self = PyObject_New(kv_object, type);
    if (self == NULL) {
        sa_kv_free(cache);
        return NULL;
    }
    self->cache = cache;
    atomic_flag_clear(&self->busy);
    return (PyObject *)self;
}

int sa_parse_kv_config(PyObject *arguments, sa_kv_config *config, Py_buffer *frequencies, Py_buffer *budgets, int *device, PyObject **allocate)
{
    const char *dtype, *policy, *form = "LLLLLLLLLy*d(sLLpdK)psy*dppp", *more = "LLLLLLLLLy*d(sLLpdK)psy*dpppiO";
    long long n[9], window, kernel;
    unsigned long long seed;
    int maximum, track, interleaved, applied, slot;
    if (!PyArg_ParseTuple(arguments, device != NULL ? more : form, &n[0], &n[1], &n[2], &n[3], &n[4], &n[5], &n[6], &n[7], &n[8], budgets,
                          &config->share, &policy, &window, &kernel, &maximum, &config->policy.decay, &seed, &track, &dtype, frequencies,
                          &config->attention_scaling, &interleaved, &applied, &slot, device, allocate)) {
        return -1;
    }
    int64_t *const numbers[9] = {&config->batch,  &config->heads_kv, &config->depth, &config->depth_v, &config->pinned,
                                 &config->recent, &config->every,    &config->part,  &config->log};
    for (int i = 0; i < 9; i++) {
        *numbers[i] = n[i];
    }
    config->policy.kind = sa_policy_named(policy);
    config->policy.window = window;
    config->policy.kernel = kernel;
    config->policy.maximum = maximum;
    config->policy.seed = seed;
    config->track_mass = track;
    config->dtype = strcmp(dtype, "float32") == 0 ? SA_F32 : strcmp(dtype, "float16") == 0 ? SA_F16 : SA_BF16;
    config->budgets = budgets->buf;
    config->inv_freq = frequencies->len > 0 ? frequencies->buf : NULL;
    config->inv_freq_count = frequencies->len / (Py_ssize_t)sizeof(double);
    config->interleaved = interleaved;
    config->applied = applied;
    config->slot_positions = slot;
    if (config->heads_kv < 1 || budgets->len / 8 == config->heads_kv) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "KVCache(): budget has %zd entries, expected %lld (kv_heads)", budgets->len / 8, (long long)config->heads_kv);
    PyBuffer_Release(frequencies);
    PyBuffer_Release(budgets);
    return -1;
}

static PyObject *kv_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    (void)keywords;
    sa_kv_config config = {0};
    Py_buffer frequencies, budgets;
    if (sa_parse_kv_config(arguments, &config, &frequencies, &budgets, NULL, NULL) < 0) {
        return NULL;
    }
    sa_kv_cache *cache = NULL;
    const sa_status status = sa_kv_new(&config, &cache);
    sa_raise(status);
    PyBuffer_Release(&frequencies);
    PyBuffer_Release(&budgets);
    return status == SA_OK ? sa_wrap_kv(type, cache) : NULL;
}

static void kv_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    sa_kv_free(((kv_object *)self)->cache);
    PyObject_Free(self);
    Py_DECREF(type);
}

/* --- a Custom policy's scores ------------------------------------------------------------------------------------------------------ */

typedef struct custom_call {
    PyObject *function;
    sa_released *released;
} custom_call;

static PyObject *new_array(int type, npy_intp rows, npy_intp columns, void **data)
{
    npy_intp shape[2] = {rows, columns};
    PyObject *array = columns < 0 ? PyArray_SimpleNew(1, shape, type) : PyArray_SimpleNew(2, shape, type);
    *data = array != NULL ? PyArray_DATA((PyArrayObject *)array) : NULL;
    return array;
}

static float as_float(sa_dtype dtype, const void *data, int64_t i)
{
    return dtype == SA_F32   ? ((const float *)data)[i]
           : dtype == SA_F16 ? sa_f16_to_f32(((const uint16_t *)data)[i])
                             : sa_bf16_to_f32(((const uint16_t *)data)[i]);
}

/* Keys or values of all candidates in order of position, as float32. */
static PyObject *vectors(const sa_candidates *all, const void *held, const void *fresh, int64_t fresh_stride, int64_t depth)
{
    const int64_t count = all->held + all->fresh;
    void *data;
    PyObject *array = new_array(NPY_FLOAT32, (npy_intp)count, (npy_intp)depth, &data);
    for (int64_t rank = 0; rank < count && array != NULL; rank++) {
        const int64_t i = all->order[rank];
        const void *vector = i < all->held ? sa_at(held, all->dtype, i * depth) : sa_at(fresh, all->dtype, (i - all->held) * fresh_stride);
        for (int64_t d = 0; d < depth; d++) {
            ((float *)data)[rank * depth + d] = as_float(all->dtype, vector, d);
        }
    }
    return array;
}

static PyObject *arrays_of(const sa_candidates *all)
{
    const int64_t count = all->held + all->fresh;
    void *places, *weights;
    PyObject *positions = new_array(NPY_INT64, (npy_intp)count, -1, &places);
    PyObject *mass = new_array(NPY_FLOAT32, (npy_intp)all->mass_rows, (npy_intp)count, &weights);
    for (int64_t rank = 0; rank < count && positions != NULL && mass != NULL; rank++) {
        ((int64_t *)places)[rank] = all->positions[all->order[rank]];
        for (int64_t row = 0; row < all->mass_rows; row++) {
            ((float *)weights)[row * count + rank] = all->mass[row * all->mass_stride + all->order[rank]];
        }
    }
    PyObject *keys = vectors(all, all->held_keys, all->fresh_keys, all->fresh_key_stride, all->depth);
    PyObject *values = vectors(all, all->held_values, all->fresh_values, all->fresh_value_stride, all->depth_v);
    if (positions == NULL || mass == NULL || keys == NULL || values == NULL) {
        Py_XDECREF(positions);
        Py_XDECREF(mass);
        Py_XDECREF(keys);
        Py_XDECREF(values);
        return NULL;
    }
    return Py_BuildValue("(LLNNNN)", (long long)all->row, (long long)all->head, positions, mass, keys, values);
}

static int take_scores(const sa_candidates *all, PyObject *answer, double *scores)
{
    const int64_t count = all->held + all->fresh;
    PyObject *array = answer != NULL ? PyArray_FROM_OTF(answer, NPY_DOUBLE, NPY_ARRAY_IN_ARRAY) : NULL;
    if (array == NULL) {
        return -1;
    }
    if (PyArray_NDIM((PyArrayObject *)array) != 1 || PyArray_DIM((PyArrayObject *)array, 0) != count) {
        PyErr_Format(PyExc_ValueError, "Custom(): the scores have another shape, expected [%lld] (one for each position)", (long long)count);
        Py_DECREF(array);
        return -1;
    }
    const double *given = PyArray_DATA((PyArrayObject *)array);
    for (int64_t rank = 0; rank < count; rank++) {
        if (isnan(given[rank])) {
            PyErr_Format(PyExc_ValueError, "Custom(): the score of position %lld is NaN", (long long)all->positions[all->order[rank]]);
            Py_DECREF(array);
            return -1;
        }
        scores[all->order[rank]] = given[rank];
    }
    Py_DECREF(array);
    return 0;
}

static sa_status ask_function(void *context, const sa_candidates *all, double *scores)
{
    custom_call *custom = context;
    sa_reacquire(custom->released);
    PyObject *arrays = arrays_of(all), *answer = arrays != NULL ? PyObject_CallObject(custom->function, arrays) : NULL;
    const int failed = take_scores(all, answer, scores);
    Py_XDECREF(arrays);
    Py_XDECREF(answer);
    custom->released->state = PyEval_SaveThread();
    return failed ? SA_INTERRUPTED : SA_OK; /* with the exception set */
}

/* --- the call ------------------------------------------------------------------------------------------------------------------------ */

/* The mass has its final place only after the call: its array is made before, so that nothing fails later. */
static PyObject *run(sa_call *call, sa_kv_cache *cache, const sa_attend_params *params, PyObject *function, float *mass, sa_results *results)
{
    sa_released released;
    custom_call custom = {function, &released};
    const sa_kv_scorer scorer = {ask_function, &custom};
    sa_release(&released);
    const sa_status status = sa_kv_attend(cache, params, &scorer, mass != NULL, released.poll);
    if (status == SA_OK && mass != NULL) {
        sa_kv_take_mass(cache, mass);
    }
    sa_reacquire(&released);
    if (status != SA_OK) {
        sa_raise(status);
        return NULL;
    }
    return sa_take_results(call, results);
}

static PyObject *attend_locked(sa_call *call, sa_kv_cache *cache, PyObject *const *arguments)
{
    sa_attend_params params = {.function = call->function, .mass_queries = -1, .pinned = sa_kv_describe(cache)->pinned};
    sa_results results = {0};
    PyObject *answer = NULL;
    bool return_lse, return_mass;
    sa_status status = SA_OK;
    if (sa_parse_cache_call(call, arguments, &params, &results.like, &return_lse, &return_mass) < 0) {
        goto end;
    }
    status = sa_kv_attend_check(cache, &params);
    status = status != SA_OK ? status : sa_kv_reserve(cache, &params);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    if (sa_make_results(call, &params, arguments[SA_CACHE_OUT], return_lse, return_mass, sa_kv_most_slots(cache), &results) < 0) {
        goto end;
    }
    float *mass = params.mass;
    params.mass = NULL;
    answer = run(call, cache, &params, arguments[SA_CACHE_ARGUMENTS], mass, &results);
end:
    sa_drop_results(&results);
    return answer;
}

static PyObject *kv_attend(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    sa_call call = {.module = PyType_GetModuleState(Py_TYPE(self)), .function = "KVCache.attend", .device_of = "the cache"};
    call.device = (DLDevice){DL_CPU, 0};
    call.device_known = true;
    if (count != SA_CACHE_ARGUMENTS + 1) {
        PyErr_Format(PyExc_TypeError, "KVCache.attend takes %d arguments, got %zd", SA_CACHE_ARGUMENTS + 1, count);
        return NULL;
    }
    sa_kv_cache *cache = enter(self);
    if (cache == NULL) {
        return NULL;
    }
    PyObject *answer = attend_locked(&call, cache, arguments);
    leave(self);
    sa_call_end(&call);
    return answer;
}

/* --- beside the call ------------------------------------------------------------------------------------------------------------------- */

static PyObject *kv_copy(PyObject *self, PyObject *unused)
{
    (void)unused;
    sa_kv_cache *cache = enter(self), *copy = NULL;
    if (cache == NULL) {
        return NULL;
    }
    const sa_status status = sa_kv_clone(cache, &copy);
    leave(self);
    sa_raise(status);
    return status != SA_OK ? NULL : sa_wrap_kv(Py_TYPE(self), copy);
}

/* mask: bytes [batch], or None for all. */
static PyObject *kv_reset(PyObject *self, PyObject *mask)
{
    sa_kv_cache *cache = enter(self);
    if (cache == NULL) {
        return NULL;
    }
    const bool *rows;
    const bool valid = sa_parse_rows(mask, sa_kv_describe(cache)->batch, &rows) == 0;
    if (valid) {
        sa_kv_reset(cache, rows);
    }
    leave(self);
    return valid ? Py_NewRef(Py_None) : NULL;
}

static PyObject *kv_reorder(PyObject *self, PyObject *index)
{
    sa_call call = {.module = PyType_GetModuleState(Py_TYPE(self)), .function = "reorder"};
    sa_ints order = {0};
    sa_status status = SA_OK;
    sa_kv_cache *cache = sa_parse_order(&call, index, &order) < 0 ? NULL : enter(self);
    if (cache != NULL) {
        status = sa_kv_reorder(cache, order.data, order.shape[0]);
        leave(self);
        sa_raise(status);
    }
    sa_call_end(&call);
    return cache == NULL || status != SA_OK ? NULL : Py_NewRef(Py_None);
}

static PyObject *kv_crop(PyObject *self, PyObject *length)
{
    sa_call call = {.module = PyType_GetModuleState(Py_TYPE(self)), .function = "crop"};
    int64_t tokens;
    sa_kv_cache *cache = sa_parse_crop(&call, length, &tokens) < 0 ? NULL : enter(self);
    if (cache == NULL) {
        return NULL;
    }
    const sa_status status = sa_kv_crop(cache, tokens);
    leave(self);
    sa_raise(status);
    return status != SA_OK ? NULL : Py_NewRef(Py_None);
}

static PyObject *kv_save(PyObject *self, PyObject *unused)
{
    (void)unused;
    sa_kv_cache *cache = enter(self);
    PyObject *state = cache != NULL ? PyTuple_New(SA_KV_BLOCKS) : NULL;
    if (state != NULL) {
        sa_kv_block blocks[SA_KV_BLOCKS];
        sa_kv_blocks(cache, blocks);
        for (int i = 0; i < SA_KV_BLOCKS && state != NULL; i++) {
            PyObject *bytes = PyBytes_FromStringAndSize(blocks[i].data, (Py_ssize_t)blocks[i].bytes);
            if (bytes == NULL) {
                Py_CLEAR(state);
            } else {
                PyTuple_SET_ITEM(state, i, bytes);
            }
        }
    }
    if (cache != NULL) {
        leave(self);
    }
    return state;
}

sa_status sa_load_kv(PyObject *const *arguments, Py_ssize_t count, sa_kv_cache *cache)
{
    Py_buffer parts[SA_KV_BLOCKS + 1];
    int open = 0;
    while (open < count && open <= SA_KV_BLOCKS && PyObject_GetBuffer(arguments[open], &parts[open], PyBUF_SIMPLE) == 0) {
        open++;
    }
    sa_status status = SA_INTERRUPTED; /* an exception is set */
    if (open == SA_KV_BLOCKS + 1 && parts[0].len == sa_kv_describe(cache)->heads_kv * (Py_ssize_t)sizeof(int64_t)) {
        sa_kv_block blocks[SA_KV_BLOCKS];
        for (int i = 0; i < SA_KV_BLOCKS; i++) {
            blocks[i] = (sa_kv_block){parts[i + 1].buf, parts[i + 1].len};
        }
        status = sa_kv_restore(cache, parts[0].buf, blocks);
    } else if (!PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "load_state_dict(): the blocks of a state do not have the sizes of this cache");
    }
    for (int i = 0; i < open; i++) {
        PyBuffer_Release(&parts[i]);
    }
    return status;
}

/* (slots, the blocks of save()) as buffers. */
static PyObject *kv_load(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    sa_kv_cache *cache = enter(self);
    if (cache == NULL) {
        return NULL;
    }
    const sa_status status = sa_load_kv(arguments, count, cache);
    leave(self);
    sa_raise(status);
    return status != SA_OK ? NULL : Py_NewRef(Py_None);
}

/* A row and a kv head of the cache, given as two ints. */
static sa_kv_cache *enter_stream(PyObject *self, PyObject *arguments, long long *row, long long *head)
{
    sa_kv_cache *cache = PyArg_ParseTuple(arguments, "LL", row, head) ? enter(self) : NULL;
    if (cache == NULL) {
        return NULL;
    }
    const sa_kv_config *config = sa_kv_describe(cache);
    if (*row < 0 || *row >= config->batch || *head < 0 || *head >= config->heads_kv) {
        PyErr_SetString(PyExc_IndexError, "row or head is out of range");
        leave(self);
        return NULL;
    }
    return cache;
}

static PyObject *kv_kept(PyObject *self, PyObject *arguments)
{
    long long row, head;
    sa_kv_cache *cache = enter_stream(self, arguments, &row, &head);
    if (cache == NULL) {
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(sa_kv_most_slots(cache) * (int64_t)sizeof(int64_t)));
    if (bytes != NULL) {
        const int64_t count = sa_kv_kept(cache, row, head, (int64_t *)(void *)PyBytes_AS_STRING(bytes));
        (void)_PyBytes_Resize(&bytes, (Py_ssize_t)(count * (int64_t)sizeof(int64_t)));
    }
    leave(self);
    return bytes;
}

/* (evicted, logged, mass, largest, histogram int64 bytes, log bytes of (int64 position, int64 length, float64 mass), bytes of the head). */
static PyObject *kv_ledger(PyObject *self, PyObject *arguments)
{
    long long row, head;
    sa_kv_cache *cache = enter_stream(self, arguments, &row, &head);
    if (cache == NULL) {
        return NULL;
    }
    const sa_ledger *ledger = sa_kv_ledger(cache, row, head);
    PyObject *answer =
        Py_BuildValue("(LLddy#y#L)", (long long)ledger->evicted, (long long)ledger->logged, ledger->mass, ledger->largest,
                      (const char *)ledger->histogram, (Py_ssize_t)sizeof ledger->histogram, (const char *)sa_kv_log(cache, row, head),
                      (Py_ssize_t)(sa_kv_describe(cache)->log * (int64_t)sizeof(sa_departure)), (long long)sa_kv_head_bytes(cache, head));
    leave(self);
    return answer;
}

static PyObject *kv_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(sa_kv_nbytes(((kv_object *)self)->cache));
}

static PyObject *kv_lengths(PyObject *self, void *unused)
{
    (void)unused;
    const sa_kv_cache *cache = enter(self);
    if (cache == NULL) {
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)sa_kv_lengths(cache), (Py_ssize_t)(sa_kv_describe(cache)->batch * 8));
    leave(self);
    return bytes;
}

static PyObject *kv_slots(PyObject *self, void *unused)
{
    (void)unused;
    const sa_kv_cache *cache = enter(self);
    if (cache == NULL) {
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)sa_kv_slots(cache), (Py_ssize_t)(sa_kv_describe(cache)->heads_kv * 8));
    leave(self);
    return bytes;
}

static PyMethodDef kv_methods[] = {
    {"attend", (PyCFunction)(void (*)(void))kv_attend, METH_FASTCALL, "Positional form of KVCache.attend, and a Custom policy's function."},
    {"copy", kv_copy, METH_NOARGS, NULL},
    {"reset", kv_reset, METH_O, NULL},
    {"reorder", kv_reorder, METH_O, NULL},
    {"crop", kv_crop, METH_O, NULL},
    {"save", kv_save, METH_NOARGS, "The blocks of a state as bytes."},
    {"load", (PyCFunction)(void (*)(void))kv_load, METH_FASTCALL, "Takes over slots and the blocks that save() gave, checked."},
    {"kept", kv_kept, METH_VARARGS, "int64 bytes: positions of a row and a kv head."},
    {"ledger", kv_ledger, METH_VARARGS, NULL},
    {0},
};

static PyGetSetDef kv_getters[] = {
    {"nbytes", kv_nbytes, NULL, NULL, NULL},
    {"lengths", kv_lengths, NULL, "int64 bytes [batch]", NULL},
    {"slots", kv_slots, NULL, "int64 bytes [kv_heads]", NULL},
    {0},
};

static PyType_Slot kv_type_slots[] = {
    {Py_tp_new, kv_new}, {Py_tp_dealloc, kv_dealloc}, {Py_tp_methods, kv_methods}, {Py_tp_getset, kv_getters}, {0},
};

PyType_Spec sa_kv_spec = {
    .name = "sinkattn._core.KVCache",
    .basicsize = sizeof(kv_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = kv_type_slots,
};
