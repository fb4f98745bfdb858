/* _core.Cache: the storage and the call behind sinkattn.SinkCache. One thread at a time; a second one is refused, not blocked. */
#include <stdatomic.h>
#include <string.h>

#include "bind_params.h"
#include "raw.h"

typedef struct cache_object {
    PyObject_HEAD
    sa_cache *cache;
    PyObject *storage; /* the caller's, in which the cache lives; NULL: memory of its own */
    atomic_flag busy;
} cache_object;

static sa_cache *enter(PyObject *self)
{
    cache_object *object = (cache_object *)self;
    if (atomic_flag_test_and_set(&object->busy)) {
        PyErr_SetString(PyExc_RuntimeError, "SinkCache is in use by another call; give each thread a cache of its own");
        return NULL;
    }
    return object->cache;
}

static void leave(PyObject *self)
{
    atomic_flag_clear(&((cache_object *)self)->busy);
}

static PyObject *wrap(PyTypeObject *type, sa_cache *cache)
{
    cache_object *self = PyObject_New(cache_object, type);
    if (self == NULL) {
        sa_cache_free(cache);
        return NULL;
    }
    self->cache = cache;
    self->storage = NULL;
    atomic_flag_clear(&self->busy);
    return (PyObject *)self;
}

int sa_parse_cache_config(PyObject *arguments, sa_cache_config *config, Py_buffer *buffer, int *device, PyObject **allocate)
{
    const char *dtype;
    long long n[7];
    int interleaved, applied, slot;
    if (!PyArg_ParseTuple(arguments, device != NULL ? "LLLLLLLsy*dpppiO" : "LLLLLLLsy*dppp", &n[0], &n[1], &n[2], &n[3], &n[4], &n[5], &n[6],
                          &dtype, buffer, &config->attention_scaling, &interleaved, &applied, &slot, device, allocate)) {
        return -1;
    }
    config->batch = n[0];
    config->heads_kv = n[1];
    config->depth = n[2];
    config->depth_v = n[3];
    config->pinned = n[4];
    config->window = n[5];
    config->rollback = n[6];
    config->dtype = strcmp(dtype, "float32") == 0 ? SA_F32 : strcmp(dtype, "float16") == 0 ? SA_F16 : SA_BF16;
    config->inv_freq = buffer->len > 0 ? buffer->buf : NULL;
    config->inv_freq_count = buffer->len / (Py_ssize_t)sizeof(double);
    config->interleaved = interleaved;
    config->applied = applied;
    config->slot_positions = slot;
    return 0;
}

/* Into the caller's array; -1 with an exception. */
static int settle(PyTypeObject *type, PyObject *self, PyObject *storage, bool keep)
{
    sa_call call = {.module = PyType_GetModuleState(type), .function = "SinkCache", .device_of = "the cache"};
    call.device = (DLDevice){DL_CPU, 0};
    call.device_known = true;
    cache_object *object = (cache_object *)self;
    sa_raw view = {0};
    sa_like like;
    const int found = sa_raw_of_object(&call, "storage", storage, &view, &like);
    if (found == 0) {
        PyErr_Format(PyExc_TypeError, "SinkCache(): storage is %s, expected an array", Py_TYPE(storage)->tp_name);
    }
    int failed = found != 1 || sa_check_storage(&call, &view, sa_cache_storage_bytes(object->cache)) < 0;
    if (!failed) {
        object->storage = Py_NewRef(storage);
        const sa_status status = sa_cache_settle(object->cache, view.data, keep);
        sa_raise(status);
        failed = status != SA_OK;
    }
    sa_call_end(&call);
    return failed ? -1 : 0;
}

enum { CONFIG_ARGUMENTS = 13 };

/* After the configuration: the storage or None, and whether what it holds counts. */
static PyObject *cache_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    (void)keywords;
    sa_cache_config config = {0};
    Py_buffer frequencies;
    const bool placed = PyTuple_GET_SIZE(arguments) == CONFIG_ARGUMENTS + 2 && PyTuple_GET_ITEM(arguments, CONFIG_ARGUMENTS) != Py_None;
    PyObject *numbers = PyTuple_GetSlice(arguments, 0, CONFIG_ARGUMENTS);
    if (numbers == NULL || sa_parse_cache_config(numbers, &config, &frequencies, NULL, NULL) < 0) {
        Py_XDECREF(numbers);
        return NULL;
    }
    sa_cache *cache = NULL;
    const sa_status status = placed ? sa_cache_over(&config, &cache) : sa_cache_new(&config, &cache);
    PyBuffer_Release(&frequencies);
    Py_DECREF(numbers);
    if (status != SA_OK) {
        sa_raise(status);
        return NULL;
    }
    PyObject *self = wrap(type, cache);
    PyObject *const *rest = PySequence_Fast_ITEMS(arguments) + CONFIG_ARGUMENTS;
    if (self != NULL && placed && settle(type, self, rest[0], rest[1] == Py_True) < 0) {
        Py_CLEAR(self);
    }
    return self;
}

static void cache_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    sa_cache_free(((cache_object *)self)->cache);
    Py_XDECREF(((cache_object *)self)->storage);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *attend_locked(sa_call *call, sa_cache *cache, PyObject *const *arguments)
{
    sa_attend_params params = {.function = call->function, .mass_queries = -1, .pinned = sa_cache_describe(cache)->pinned};
    sa_results results = {0};
    PyObject *answer = NULL;
    bool return_lse, return_mass;
    if (sa_parse_cache_call(call, arguments, &params, &results.like, &return_lse, &return_mass) < 0) {
        goto end;
    }
    sa_status status = sa_cache_attend_check(cache, &params);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    if (sa_make_results(call, &params, arguments[SA_CACHE_OUT], return_lse, return_mass, sa_cache_slots(cache), &results) < 0) {
        goto end;
    }
    sa_released released;
    sa_release(&released);
    status = sa_cache_attend(cache, &params, released.poll);
    sa_reacquire(&released);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    answer = sa_take_results(call, &results);
end:
    sa_drop_results(&results);
    return answer;
}

static PyObject *cache_attend(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    sa_call call = {.module = PyType_GetModuleState(Py_TYPE(self)), .function = "SinkCache.attend", .device_of = "the cache"};
    call.device = (DLDevice){DL_CPU, 0};
    call.device_known = true;
    if (count != SA_CACHE_ARGUMENTS) {
        PyErr_Format(PyExc_TypeError, "Cache.attend takes %d arguments, got %zd", SA_CACHE_ARGUMENTS, count);
        return NULL;
    }
    sa_cache *cache = enter(self);
    if (cache == NULL) {
        return NULL;
    }
    PyObject *answer = attend_locked(&call, cache, arguments);
    leave(self);
    sa_call_end(&call);
    return answer;
}

static PyObject *cache_copy(PyObject *self, PyObject *unused)
{
    (void)unused;
    sa_cache *cache = enter(self), *copy = NULL;
    if (cache == NULL) {
        return NULL;
    }
    const sa_status status = sa_cache_clone(cache, &copy);
    leave(self);
    if (status != SA_OK) {
        sa_raise(status);
        return NULL;
    }
    return wrap(Py_TYPE(self), copy);
}

/* mask: bytes [batch], or None for all. */
static PyObject *cache_reset(PyObject *self, PyObject *mask)
{
    sa_cache *cache = enter(self);
    if (cache == NULL) {
        return NULL;
    }
    const bool *rows;
    const bool valid = sa_parse_rows(mask, sa_cache_describe(cache)->batch, &rows) == 0;
    if (valid) {
        sa_cache_reset(cache, rows);
    }
    leave(self);
    return valid ? Py_NewRef(Py_None) : NULL;
}

static PyObject *cache_reorder(PyObject *self, PyObject *index)
{
    sa_call call = {.module = PyType_GetModuleState(Py_TYPE(self)), .function = "reorder"};
    sa_ints order = {0};
    sa_status status = SA_OK;
    sa_cache *cache = sa_parse_order(&call, index, &order) < 0 ? NULL : enter(self);
    if (cache != NULL) {
        status = sa_cache_reorder(cache, order.data, order.shape[0]);
        leave(self);
        sa_raise(status);
    }
    sa_call_end(&call);
    return cache == NULL || status != SA_OK ? NULL : Py_NewRef(Py_None);
}

static PyObject *cache_crop(PyObject *self, PyObject *length)
{
    sa_call call = {.module = PyType_GetModuleState(Py_TYPE(self)), .function = "crop"};
    int64_t tokens;
    sa_cache *cache = sa_parse_crop(&call, length, &tokens) < 0 ? NULL : enter(self);
    if (cache == NULL) {
        return NULL;
    }
    const sa_status status = sa_cache_crop(cache, tokens);
    leave(self);
    sa_raise(status);
    return status != SA_OK ? NULL : Py_NewRef(Py_None);
}

/* (keys, values, lengths, lows) as bytes: a snapshot. */
static PyObject *cache_save(PyObject *self, PyObject *unused)
{
    (void)unused;
    sa_cache *cache = enter(self);
    if (cache == NULL) {
        return NULL;
    }
    const sa_cache_config *config = sa_cache_describe(cache);
    const int64_t rows = config->batch * config->heads_kv * sa_cache_slots(cache) * sa_dtype_size(config->dtype);
    const Py_ssize_t counters = (Py_ssize_t)(config->batch * (int64_t)sizeof(int64_t));
    PyObject *state = Py_BuildValue("(y#y#y#y#)", (const char *)sa_cache_keys(cache), (Py_ssize_t)(rows * config->depth),
                                    (const char *)sa_cache_values(cache), (Py_ssize_t)(rows * config->depth_v),
                                    (const char *)sa_cache_lengths(cache), counters, (const char *)sa_cache_lows(cache), counters);
    leave(self);
    return state;
}

static PyObject *cache_load(PyObject *self, PyObject *arguments)
{
    Py_buffer parts[4];
    if (!PyArg_ParseTuple(arguments, "y*y*y*y*", &parts[0], &parts[1], &parts[2], &parts[3])) {
        return NULL;
    }
    sa_status status = SA_VALUE_ERROR;
    sa_cache *cache = enter(self);
    if (cache != NULL) {
        const sa_cache_config *config = sa_cache_describe(cache);
        const int64_t rows = config->batch * config->heads_kv * sa_cache_slots(cache) * sa_dtype_size(config->dtype);
        const int64_t counters = config->batch * (int64_t)sizeof(int64_t);
        if (parts[0].len == rows * config->depth && parts[1].len == rows * config->depth_v && parts[2].len == counters &&
            parts[3].len == counters) {
            status = sa_cache_restore(cache, parts[0].buf, parts[1].buf, parts[2].buf, parts[3].buf);
            sa_raise(status);
        } else {
            PyErr_SetString(PyExc_ValueError, "load_state_dict(): keys, values, length and low do not have the sizes of this cache");
        }
        leave(self);
    }
    for (int i = 0; i < 4; i++) {
        PyBuffer_Release(&parts[i]);
    }
    return status != SA_OK ? NULL : Py_NewRef(Py_None);
}

static PyObject *cache_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(sa_cache_nbytes(((cache_object *)self)->cache));
}

static PyObject *counters(PyObject *self, const int64_t *(*read)(const sa_cache *))
{
    const sa_cache *cache = enter(self);
    if (cache == NULL) {
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)read(cache), (Py_ssize_t)(sa_cache_describe(cache)->batch * 8));
    leave(self);
    return bytes;
}

static PyObject *cache_lengths(PyObject *self, void *unused)
{
    (void)unused;
    return counters(self, sa_cache_lengths);
}

static PyObject *cache_lows(PyObject *self, void *unused)
{
    (void)unused;
    return counters(self, sa_cache_lows);
}

static PyMethodDef cache_methods[] = {
    {"attend", (PyCFunction)(void (*)(void))cache_attend, METH_FASTCALL, "Positional form of SinkCache.attend."},
    {"copy", cache_copy, METH_NOARGS, NULL},
    {"reset", cache_reset, METH_O, NULL},
    {"reorder", cache_reorder, METH_O, NULL},
    {"crop", cache_crop, METH_O, NULL},
    {"save", cache_save, METH_NOARGS, "(keys, values, lengths, lows) as bytes."},
    {"load", cache_load, METH_VARARGS, "Takes over what save() gave, checked."},
    {0},
};

static PyGetSetDef cache_getters[] = {
    {"nbytes", cache_nbytes, NULL, NULL, NULL},
    {"lengths", cache_lengths, NULL, "int64 bytes [batch]", NULL},
    {"lows", cache_lows, NULL, "int64 bytes [batch]", NULL},
    {0},
};

static PyType_Slot cache_slots[] = {
    {Py_tp_new, cache_new}, {Py_tp_dealloc, cache_dealloc}, {Py_tp_methods, cache_methods}, {Py_tp_getset, cache_getters}, {0},
};

PyType_Spec sa_cache_spec = {
    .name = "sinkattn._core.Cache",
    .basicsize = sizeof(cache_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = cache_slots,
};
