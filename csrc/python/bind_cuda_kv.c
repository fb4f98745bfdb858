/* _core.CudaKVCache: KVCache on a CUDA device; memory comes from a function of the caller. What only says what is held is asked of a cache
 * of the host with the same content, a snapshot. */
#include "../core/kv_check.h"
#include "bind_params.h"
#include "cuda_object.h"

typedef struct kv_object {
    sa_cuda_object base;
    sa_cuda_kv store;
} kv_object;

static sa_cuda_kv *store_in(sa_cuda_object *object)
{
    return &((kv_object *)object)->store;
}

static const sa_cuda_kv *stored_in(const sa_cuda_object *object)
{
    return &((const kv_object *)object)->store;
}

/* --- making ---------------------------------------------------------------------------------------------------------------------- */

static sa_status place(sa_call *call, kv_object *self, const double *inv_freq)
{
    sa_device_scope scope;
    SA_TRY(sa_device_enter(call->function, self->base.device.device_id, &scope));
    sa_status status = sa_cuda_kv_place(&self->store, inv_freq, &scope, call->stream);
    if (status == SA_OK) {
        status = sa_settle_streams(call);
    }
    sa_device_leave(&scope);
    return status;
}

static const sa_cuda_kind kv_cache;

/* A cache without content, of this configuration. */
static kv_object *new_object(PyTypeObject *type, const sa_kv_config *config, int device, PyObject *allocate, const char *function, bool first,
                             bool filled)
{
    void *memory;
    kv_object *self = sa_cuda_object_new(type, sizeof(kv_object), &kv_cache, device, allocate);
    sa_status status = self == NULL ? SA_INTERRUPTED : sa_cuda_kv_begin(config, &self->store);
    if (status == SA_OK) {
        sa_call call = sa_cuda_call(&self->base, type, function);
        status = sa_cuda_take_storage(&call, &self->base, sa_cuda_kv_bytes(&self->store), first, &memory) < 0 ? SA_INTERRUPTED : SA_OK;
        if (status == SA_OK) {
            sa_cuda_kv_lay_out(&self->store, memory);
            status = filled ? place(&call, self, config->inv_freq) : SA_OK;
        }
        sa_call_end(&call);
    }
    sa_raise(status);
    if (status != SA_OK) {
        Py_XDECREF(self);
        return NULL;
    }
    return self;
}

static PyObject *kv_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    (void)keywords;
    sa_kv_config config = {0};
    Py_buffer frequencies, budgets;
    int device;
    PyObject *allocate;
    if (sa_parse_kv_config(arguments, &config, &frequencies, &budgets, &device, &allocate) < 0) {
        return NULL;
    }
    kv_object *self = new_object(type, &config, device, allocate, "KVCache", true, true);
    PyBuffer_Release(&frequencies);
    PyBuffer_Release(&budgets);
    return (PyObject *)self;
}

static void kv_dealloc(PyObject *object)
{
    sa_cuda_kv_end(&((kv_object *)object)->store);
    sa_cuda_object_free((sa_cuda_object *)object);
}

/* --- what a KVCache does in its own way -------------------------------------------------------------------------------------------- */

static sa_cuda_object *new_like(const sa_cuda_object *self, const char *function)
{
    return (sa_cuda_object *)new_object(Py_TYPE(self), &stored_in(self)->config, self->device.device_id, self->allocate, function, false, false);
}

static sa_cuda_shape shape(const sa_cuda_object *self)
{
    const sa_cuda_kv *store = stored_in(self);
    return (sa_cuda_shape){store->config.batch, store->config.pinned, sa_cuda_kv_slots(store)};
}

static sa_status check(const sa_cuda_object *self, const sa_attend_params *params)
{
    return sa_cuda_kv_check(stored_in(self), params);
}

static int run(sa_call *call, const sa_attend_params *params, sa_cuda_object *self, const sa_like *like)
{
    return sa_run_kv_on_cuda(call, params, store_in(self), like);
}

static sa_status copy(sa_cuda_object *self, const sa_cuda_object *from, void *stream)
{
    return sa_cuda_kv_copy(store_in(self), stored_in(from), stream);
}

static sa_status check_index(const sa_cuda_object *self, const int64_t *index, int64_t count)
{
    return sa_check_kv_index(&stored_in(self)->config, index, count);
}

static sa_status gather(sa_cuda_object *self, const sa_cuda_object *before, const int64_t *index, void *stream)
{
    return sa_cuda_kv_gather(store_in(self), stored_in(before), index, stream);
}

static sa_status reset(sa_cuda_object *self, const sa_device_scope *scope, const bool *rows, void *stream)
{
    (void)scope;
    return sa_cuda_kv_reset(store_in(self), rows, stream);
}

static sa_status crop(sa_cuda_object *self, const sa_device_scope *scope, int64_t length, void *stream)
{
    return sa_cuda_kv_crop(store_in(self), scope, length, stream);
}

static const sa_cuda_kind kv_cache = {"KVCache", "KVCache.attend", shape, check, run, new_like, copy, check_index, gather, reset, crop};

/* --- the other methods ------------------------------------------------------------------------------------------------------------- */

static PyObject *kv_attend(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != SA_CACHE_ARGUMENTS + 1) { /* the last: the function of a Custom policy, None here */
        PyErr_Format(PyExc_TypeError, "CudaKVCache.attend takes %d arguments, got %zd", SA_CACHE_ARGUMENTS + 1, count);
        return NULL;
    }
    return sa_cuda_attend(self, arguments);
}

/* _core.KVCache of this moment; vectors: with keys and values. It waits. */
static PyObject *kv_snapshot(PyObject *self, PyObject *vectors)
{
    sa_session at;
    sa_kv_cache *host = NULL;
    if (sa_session_begin(self, "KVCache", &at) < 0) {
        return NULL;
    }
    sa_status status;
    Py_BEGIN_ALLOW_THREADS
        status = sa_cuda_kv_read(store_in(at.object), vectors == Py_True, at.stream, &host);
    Py_END_ALLOW_THREADS
    PyObject *done = sa_session_end(&at, status);
    Py_XDECREF(done);
    return done == NULL ? NULL : sa_wrap_kv(((sa_module *)PyType_GetModuleState(Py_TYPE(self)))->kv_type, host);
}

/* Checked by a cache of the host, then copied. */
static sa_status restore(const sa_session *at, PyObject *const *arguments, Py_ssize_t count)
{
    sa_kv_config config = store_in(at->object)->config;
    sa_kv_cache *host;
    config.inv_freq_count = 0;
    SA_TRY(sa_kv_new(&config, &host));
    sa_status status = sa_load_kv(arguments, count, host);
    if (status == SA_OK) {
        status = sa_cuda_kv_write(store_in(at->object), host, at->stream);
    }
    sa_kv_free(host);
    return status;
}

static PyObject *kv_load(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    sa_session at;
    return sa_session_begin(self, "load_state_dict", &at) == 0 ? sa_session_end(&at, restore(&at, arguments, count)) : NULL;
}

static PyObject *kv_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((kv_object *)self)->store.content_bytes);
}

/* Keys and values of a kv head of a row, the room for a part's tokens included. */
static PyObject *kv_head_bytes(PyObject *self, void *unused)
{
    (void)unused;
    const sa_cuda_kv *store = &((kv_object *)self)->store;
    return PyLong_FromLongLong(store->view.stride * (store->view.depth + store->view.depth_v) * sa_dtype_size(store->config.dtype));
}

static PyObject *kv_lengths(PyObject *self, void *unused)
{
    (void)unused;
    sa_session at;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(((kv_object *)self)->store.config.batch * (int64_t)sizeof(int64_t)));
    if (bytes == NULL || sa_session_begin(self, "length", &at) < 0) {
        Py_XDECREF(bytes);
        return NULL;
    }
    sa_status status;
    Py_BEGIN_ALLOW_THREADS
        status = sa_cuda_kv_lengths(store_in(at.object), (int64_t *)(void *)PyBytes_AS_STRING(bytes), at.stream);
    Py_END_ALLOW_THREADS
    PyObject *done = sa_session_end(&at, status);
    Py_XDECREF(done);
    if (done == NULL) {
        Py_CLEAR(bytes);
    }
    return bytes;
}

static PyMethodDef kv_methods[] = {
    {"attend", (PyCFunction)(void (*)(void))kv_attend, METH_FASTCALL, "Positional form of KVCache.attend."},
    {"copy", sa_cuda_copy, METH_NOARGS, NULL},
    {"reset", sa_cuda_reset, METH_O, NULL},
    {"reorder", sa_cuda_reorder, METH_O, NULL},
    {"crop", sa_cuda_crop, METH_O, NULL},
    {"snapshot", kv_snapshot, METH_O, "A cache of the host with the same content, with keys and values or without; waits."},
    {"load", (PyCFunction)(void (*)(void))kv_load, METH_FASTCALL, "Takes over slots and the blocks of a state, checked; waits."},
    {0},
};

static PyGetSetDef kv_getters[] = {
    {"nbytes", kv_nbytes, NULL, NULL, NULL},
    {"head_bytes", kv_head_bytes, NULL, NULL, NULL},
    {"lengths", kv_lengths, NULL, "int64 bytes [batch]; waits", NULL},
    {0},
};

static PyType_Slot kv_type_slots[] = {
    {Py_tp_new, kv_new}, {Py_tp_dealloc, kv_dealloc}, {Py_tp_methods, kv_methods}, {Py_tp_getset, kv_getters}, {0},
};

PyType_Spec sa_cuda_kv_spec = {
    .name = "sinkattn._core.CudaKVCache",
    .basicsize = sizeof(kv_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = kv_type_slots,
};
