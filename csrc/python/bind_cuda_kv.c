/* _core.CudaKVCache: KVCache on a CUDA device; memory comes from a function of the caller. What only says what is held is asked of a cache
 * of the host with the same content, a snapshot. */
#include "../core/kv_check.h"
#include "bind_params.h"
#include "cuda_object.h"

typedef struct kv_object {
    sa_cuda_object base;
    sa_cuda_kv store;
} kv_object;

static sa_cuda_kv *store_of(const sa_session *at)
{
    return &((kv_object *)at->object)->store;
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

/* A cache without content, of this configuration. */
static kv_object *new_object(PyTypeObject *type, const sa_kv_config *config, int device, PyObject *allocate, const char *function, bool first,
                             bool filled)
{
    void *memory;
    kv_object *self = sa_cuda_object_new(type, sizeof(kv_object), "KVCache", device, allocate);
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

/* Another cache of the same configuration, laid out and not filled. */
static kv_object *new_like(PyObject *self, const char *function)
{
    const kv_object *mine = (kv_object *)self;
    return new_object(Py_TYPE(self), &mine->store.config, mine->base.device.device_id, mine->base.allocate, function, false, false);
}

/* --- attending -------------------------------------------------------------------------------------------------------------------- */

static PyObject *attend_locked(sa_call *call, kv_object *self, PyObject *const *arguments)
{
    sa_cuda_kv *store = &self->store;
    sa_attend_params params = {.function = call->function, .mass_queries = -1, .pinned = store->config.pinned};
    sa_results results = {0};
    PyObject *answer = NULL;
    bool return_lse, return_mass;
    if (sa_parse_bool(call, "return_lse", arguments[SA_CACHE_RETURN_LSE], &return_lse) < 0 ||
        sa_parse_bool(call, "return_mass", arguments[SA_CACHE_RETURN_MASS], &return_mass) < 0 ||
        sa_parse_cache_call(call, arguments, &params, &results.like) < 0) {
        goto end;
    }
    if (self->base.api != NULL && sa_follow_exchange(call, self->base.api, self->base.device) < 0) { /* q of another library than the storage */
        goto end;
    }
    const sa_status status = sa_cuda_kv_check(store, &params);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    if (sa_make_results(call, &params, arguments[SA_CACHE_OUT], return_lse, return_mass, sa_cuda_kv_slots(store), &results) < 0 ||
        sa_run_kv_on_cuda(call, &params, store, &results.like) < 0) {
        goto end;
    }
    self->base.stream = call->stream;
    answer = sa_take_results(call, &results);
end:
    sa_drop_results(&results);
    return answer;
}

static PyObject *kv_attend(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    kv_object *cache = (kv_object *)self;
    if (count != SA_CACHE_ARGUMENTS + 1) { /* the last: the function of a Custom policy, None here */
        PyErr_Format(PyExc_TypeError, "CudaKVCache.attend takes %d arguments, got %zd", SA_CACHE_ARGUMENTS + 1, count);
        return NULL;
    }
    if (!sa_cuda_enter(&cache->base)) {
        return NULL;
    }
    sa_call call = sa_cuda_call(&cache->base, Py_TYPE(self), "KVCache.attend");
    PyObject *answer = attend_locked(&call, cache, arguments);
    sa_cuda_leave(&cache->base);
    sa_call_end(&call);
    return answer;
}

/* --- beside the call -------------------------------------------------------------------------------------------------------------- */

static PyObject *kv_copy(PyObject *self, PyObject *unused)
{
    (void)unused;
    sa_session at;
    kv_object *twin = new_like(self, "copy");
    if (twin == NULL || sa_session_begin(self, "copy", &at) < 0) {
        Py_XDECREF(twin);
        return NULL;
    }
    sa_status status = sa_cuda_kv_copy(&twin->store, store_of(&at), at.stream);
    if (status == SA_OK && twin->base.api == NULL) { /* the copy may be used on another stream at once */
        status = sa_device_wait("copy", at.stream);
    }
    PyObject *done = sa_session_end(&at, status);
    if (done == NULL) {
        Py_DECREF(twin);
        return NULL;
    }
    Py_DECREF(done);
    return (PyObject *)twin;
}

/* mask: bytes [batch], or None for all. */
static PyObject *kv_reset(PyObject *self, PyObject *mask)
{
    sa_session at;
    const bool *rows;
    if (sa_parse_rows(mask, ((kv_object *)self)->store.config.batch, &rows) < 0 || sa_session_begin(self, "reset", &at) < 0) {
        return NULL;
    }
    return sa_session_end(&at, sa_cuda_kv_reset(store_of(&at), rows, at.stream));
}

static sa_status reorder(kv_object *before, const sa_session *at, const int64_t *index)
{
    SA_TRY(sa_cuda_kv_copy(&before->store, store_of(at), at->stream));
    SA_TRY(sa_cuda_kv_gather(store_of(at), &before->store, index, at->stream));
    return before->base.api == NULL ? sa_device_wait("reorder", at->stream) : SA_OK; /* else its memory goes back in the order of the stream */
}

static PyObject *kv_reorder(PyObject *self, PyObject *index)
{
    sa_call call = sa_cuda_call((sa_cuda_object *)self, Py_TYPE(self), "reorder");
    sa_ints order = {0};
    sa_session at;
    PyObject *done = NULL;
    kv_object *before = NULL;
    call.reads_device = true; /* copies of rows are ordered by the host */
    if (sa_parse_order(&call, index, &order) < 0) {
        goto end;
    }
    const sa_status status = sa_check_kv_index(&((kv_object *)self)->store.config, order.data, order.shape[0]);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    before = new_like(self, "reorder");
    if (before != NULL && sa_session_begin(self, "reorder", &at) == 0) {
        done = sa_session_end(&at, reorder(before, &at, order.data));
    }
end:
    Py_XDECREF(before);
    sa_call_end(&call);
    return done;
}

static PyObject *kv_crop(PyObject *self, PyObject *length)
{
    sa_call call = sa_cuda_call((sa_cuda_object *)self, Py_TYPE(self), "crop");
    int64_t tokens;
    sa_session at;
    if (sa_parse_crop(&call, length, &tokens) < 0 || sa_session_begin(self, "crop", &at) < 0) {
        return NULL;
    }
    sa_status status;
    Py_BEGIN_ALLOW_THREADS
        status = sa_cuda_kv_crop(store_of(&at), &at.scope, tokens, at.stream);
    Py_END_ALLOW_THREADS
    return sa_session_end(&at, status);
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
        status = sa_cuda_kv_read(store_of(&at), vectors == Py_True, at.stream, &host);
    Py_END_ALLOW_THREADS
    PyObject *done = sa_session_end(&at, status);
    Py_XDECREF(done);
    return done == NULL ? NULL : sa_wrap_kv(((sa_module *)PyType_GetModuleState(Py_TYPE(self)))->kv_type, host);
}

/* Checked by a cache of the host, then copied. */
static sa_status restore(const sa_session *at, PyObject *const *arguments, Py_ssize_t count)
{
    sa_kv_config config = store_of(at)->config;
    sa_kv_cache *host;
    config.inv_freq_count = 0;
    SA_TRY(sa_kv_new(&config, &host));
    sa_status status = sa_load_kv(arguments, count, host);
    if (status == SA_OK) {
        status = sa_cuda_kv_write(store_of(at), host, at->stream);
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
        status = sa_cuda_kv_lengths(store_of(&at), (int64_t *)(void *)PyBytes_AS_STRING(bytes), at.stream);
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
    {"copy", kv_copy, METH_NOARGS, NULL},
    {"reset", kv_reset, METH_O, NULL},
    {"reorder", kv_reorder, METH_O, NULL},
    {"crop", kv_crop, METH_O, NULL},
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
