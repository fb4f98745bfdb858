/* _core.CudaCache: SinkCache on a CUDA device. The same methods as _core.Cache; memory comes from a function of the caller. */
#include "../core/cache_check.h"
#include "../cuda/cache.h"
#include "bind_params.h"
#include "cuda_object.h"

typedef struct cache_object {
    sa_cuda_object base;
    sa_cuda_store store;
} cache_object;

/* --- making ---------------------------------------------------------------------------------------------------------------------- */

static sa_cuda_store *store_in(sa_cuda_object *object)
{
    return &((cache_object *)object)->store;
}

static const sa_cuda_store *stored_in(const sa_cuda_object *object)
{
    return &((const cache_object *)object)->store;
}

static const sa_cuda_kind sink_cache;

static cache_object *new_object(PyTypeObject *type, int device, PyObject *allocate)
{
    return sa_cuda_object_new(type, sizeof(cache_object), &sink_cache, device, allocate);
}

static sa_status place(sa_call *call, cache_object *self, const sa_cache_config *config, void *memory)
{
    sa_device_scope scope;
    SA_TRY(sa_device_enter(call->function, self->base.device.device_id, &scope));
    sa_status status = sa_cuda_store_place(config, memory, &scope, call->stream, &self->store);
    if (status == SA_OK) {
        status = sa_settle_streams(call);
    }
    sa_device_leave(&scope);
    return status;
}

enum { CONFIG_ARGUMENTS = 15 };

/* After the configuration: True where what the first memory holds counts, which another cache of the same configuration left there. */
static PyObject *cache_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    (void)keywords;
    sa_cache_config config = {0};
    Py_buffer frequencies;
    int device;
    PyObject *allocate;
    void *memory;
    const bool keep = PyTuple_GET_SIZE(arguments) > CONFIG_ARGUMENTS && PyTuple_GET_ITEM(arguments, CONFIG_ARGUMENTS) == Py_True;
    PyObject *numbers = PyTuple_GetSlice(arguments, 0, CONFIG_ARGUMENTS);
    const int parsed = numbers != NULL ? sa_parse_cache_config(numbers, &config, &frequencies, &device, &allocate) : -1;
    Py_XDECREF(numbers); /* what was borrowed from it is in `arguments` too */
    if (parsed < 0) {
        return NULL;
    }
    cache_object *self = new_object(type, device, allocate);
    sa_status status = sa_check_cache_config(&config);
    bool failed = self == NULL || status != SA_OK;
    if (!failed) {
        sa_call call = sa_cuda_call(&self->base, type, "SinkCache");
        failed = sa_cuda_take_storage(&call, &self->base, sa_cuda_store_bytes(&config), true, &memory) < 0;
        if (!failed && keep) {
            sa_cuda_store_lay_out(&config, memory, &self->store);
        } else if (!failed) {
            status = place(&call, self, &config, memory);
        }
        sa_call_end(&call);
    }
    PyBuffer_Release(&frequencies);
    sa_raise(status);
    if (failed || status != SA_OK) {
        Py_XDECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void cache_dealloc(PyObject *object)
{
    sa_cuda_object_free((sa_cuda_object *)object);
}

static sa_cuda_object *new_like(const sa_cuda_object *self, const char *function)
{
    void *memory;
    const sa_cache_config *config = &stored_in(self)->config;
    cache_object *twin = new_object(Py_TYPE(self), self->device.device_id, self->allocate);
    if (twin == NULL) {
        return NULL;
    }
    sa_call call = sa_cuda_call(self, Py_TYPE(self), function);
    const int failed = sa_cuda_take_storage(&call, &twin->base, sa_cuda_store_bytes(config), false, &memory);
    if (failed == 0) {
        sa_cuda_store_lay_out(config, memory, &twin->store);
    }
    sa_call_end(&call);
    if (failed) {
        Py_DECREF(twin);
        return NULL;
    }
    return &twin->base;
}

/* --- what a SinkCache does in its own way ------------------------------------------------------------------------------------------ */

static sa_cuda_shape shape(const sa_cuda_object *self)
{
    const sa_cuda_store *store = stored_in(self);
    return (sa_cuda_shape){store->config.batch, store->config.pinned, sa_cuda_store_slots(store)};
}

static sa_status check(const sa_cuda_object *self, const sa_attend_params *params)
{
    return sa_check_cache_call(&stored_in(self)->config, params);
}

static int run(sa_call *call, const sa_attend_params *params, sa_cuda_object *self, const sa_like *like)
{
    return sa_run_on_cuda(call, params, store_in(self), like);
}

static sa_status copy(sa_cuda_object *self, const sa_cuda_object *from, void *stream)
{
    return sa_cuda_store_copy(store_in(self), stored_in(from), stream);
}

static sa_status check_index(const sa_cuda_object *self, const int64_t *index, int64_t count)
{
    return sa_check_cache_index(&stored_in(self)->config, index, count);
}

static sa_status gather(sa_cuda_object *self, const sa_cuda_object *before, const int64_t *index, void *stream)
{
    return sa_cuda_store_gather(store_in(self), stored_in(before), index, stream);
}

static sa_status reset(sa_cuda_object *self, const sa_device_scope *scope, const bool *rows, void *stream)
{
    return sa_cuda_store_reset(store_in(self), scope, rows, stream);
}

static sa_status crop(sa_cuda_object *self, const sa_device_scope *scope, int64_t length, void *stream)
{
    return sa_cuda_store_crop(store_in(self), scope, length, stream);
}

static const sa_cuda_kind sink_cache = {"SinkCache", "SinkCache.attend", shape, check, run, new_like, copy, check_index, gather, reset, crop};

/* --- the other methods ------------------------------------------------------------------------------------------------------------- */

static PyObject *cache_attend(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != SA_CACHE_ARGUMENTS) {
        PyErr_Format(PyExc_TypeError, "CudaCache.attend takes %d arguments, got %zd", SA_CACHE_ARGUMENTS, count);
        return NULL;
    }
    return sa_cuda_attend(self, arguments);
}

static PyObject *new_bytes(int64_t count)
{
    return PyBytes_FromStringAndSize(NULL, (Py_ssize_t)count);
}

static void *bytes_of(PyObject *bytes)
{
    return bytes != NULL ? PyBytes_AS_STRING(bytes) : NULL;
}

/* Reads what is not NULL, and waits for it. */
static PyObject *read_back(PyObject *self, const char *function, PyObject *keys, PyObject *values, PyObject *lengths, PyObject *lows)
{
    sa_session at;
    if (sa_session_begin(self, function, &at) < 0) {
        return NULL;
    }
    sa_status status;
    Py_BEGIN_ALLOW_THREADS
        status = sa_cuda_store_read(store_in(at.object), bytes_of(keys), bytes_of(values), bytes_of(lengths), bytes_of(lows), at.stream);
    Py_END_ALLOW_THREADS
    return sa_session_end(&at, status);
}

/* (keys, values, lengths, lows) as bytes: a snapshot. */
static PyObject *cache_save(PyObject *self, PyObject *unused)
{
    (void)unused;
    const sa_cuda_store *store = &((cache_object *)self)->store;
    const int64_t counters = store->config.batch * (int64_t)sizeof(int64_t);
    PyObject *parts[4] = {new_bytes(store->key_bytes), new_bytes(store->value_bytes), new_bytes(counters), new_bytes(counters)};
    PyObject *done = NULL;
    if (parts[0] != NULL && parts[1] != NULL && parts[2] != NULL && parts[3] != NULL) {
        done = read_back(self, "state_dict", parts[0], parts[1], parts[2], parts[3]);
    }
    PyObject *state = done != NULL ? PyTuple_Pack(4, parts[0], parts[1], parts[2], parts[3]) : NULL;
    Py_XDECREF(done);
    for (int i = 0; i < 4; i++) {
        Py_XDECREF(parts[i]);
    }
    return state;
}

/* Checked and cleaned by a cache of the host, then copied. */
static sa_status restore(const sa_session *at, const Py_buffer parts[4])
{
    sa_cuda_store *store = store_in(at->object);
    const int64_t counters = store->config.batch * (int64_t)sizeof(int64_t);
    if (parts[0].len != store->key_bytes || parts[1].len != store->value_bytes || parts[2].len != counters || parts[3].len != counters) {
        return sa_fail(SA_VALUE_ERROR, "load_state_dict(): keys, values, length and low do not have the sizes of this cache");
    }
    sa_cache *host;
    SA_TRY(sa_cache_new(&store->config, &host));
    sa_status status = sa_cache_restore(host, parts[0].buf, parts[1].buf, parts[2].buf, parts[3].buf);
    if (status == SA_OK) {
        status = sa_cuda_store_write(store, sa_cache_keys(host), sa_cache_values(host), sa_cache_lengths(host), sa_cache_lows(host), at->stream);
    }
    sa_cache_free(host);
    return status;
}

static PyObject *cache_load(PyObject *self, PyObject *arguments)
{
    Py_buffer parts[4];
    sa_session at;
    if (!PyArg_ParseTuple(arguments, "y*y*y*y*", &parts[0], &parts[1], &parts[2], &parts[3])) {
        return NULL;
    }
    PyObject *done = sa_session_begin(self, "load_state_dict", &at) == 0 ? sa_session_end(&at, restore(&at, parts)) : NULL;
    for (int i = 0; i < 4; i++) {
        PyBuffer_Release(&parts[i]);
    }
    return done;
}

static PyObject *cache_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(sa_cuda_store_nbytes(&((cache_object *)self)->store));
}

static PyObject *counters(PyObject *self, const char *function, bool lows)
{
    PyObject *bytes = new_bytes(((cache_object *)self)->store.config.batch * (int64_t)sizeof(int64_t));
    PyObject *done = bytes != NULL ? read_back(self, function, NULL, NULL, lows ? NULL : bytes, lows ? bytes : NULL) : NULL;
    if (done == NULL) {
        Py_CLEAR(bytes);
    }
    Py_XDECREF(done);
    return bytes;
}

static PyObject *cache_lengths(PyObject *self, void *unused)
{
    (void)unused;
    return counters(self, "length", false);
}

static PyObject *cache_lows(PyObject *self, void *unused)
{
    (void)unused;
    return counters(self, "kept", true);
}

static PyMethodDef cache_methods[] = {
    {"attend", (PyCFunction)(void (*)(void))cache_attend, METH_FASTCALL, "Positional form of SinkCache.attend."},
    {"copy", sa_cuda_copy, METH_NOARGS, NULL},
    {"reset", sa_cuda_reset, METH_O, NULL},
    {"reorder", sa_cuda_reorder, METH_O, NULL},
    {"crop", sa_cuda_crop, METH_O, NULL},
    {"save", cache_save, METH_NOARGS, "(keys, values, lengths, lows) as bytes; waits."},
    {"load", cache_load, METH_VARARGS, "Takes over what save() gave, checked; waits."},
    {0},
};

static PyGetSetDef cache_getters[] = {
    {"nbytes", cache_nbytes, NULL, NULL, NULL},
    {"lengths", cache_lengths, NULL, "int64 bytes [batch]; waits", NULL},
    {"lows", cache_lows, NULL, "int64 bytes [batch]; waits", NULL},
    {0},
};

static PyType_Slot cache_slots[] = {
    {Py_tp_new, cache_new}, {Py_tp_dealloc, cache_dealloc}, {Py_tp_methods, cache_methods}, {Py_tp_getset, cache_getters}, {0},
};

PyType_Spec sa_cuda_cache_spec = {
    .name = "sinkattn._core.CudaCache",
    .basicsize = sizeof(cache_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = cache_slots,
};
