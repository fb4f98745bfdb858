#include "cuda_object.h"

#include "bind_params.h"

#include <string.h>

/* False, with an exception, where another call is at work. */
static bool enter(sa_cuda_object *object)
{
    if (atomic_flag_test_and_set(&object->busy)) {
        PyErr_Format(PyExc_RuntimeError, "%s is in use by another call; give each thread a cache of its own", object->kind->name);
        return false;
    }
    return true;
}

static void leave(sa_cuda_object *object)
{
    atomic_flag_clear(&object->busy);
}

int sa_session_begin(PyObject *self, const char *function, sa_session *out)
{
    *out = (sa_session){.object = (sa_cuda_object *)self, .function = function};
    if (!enter(out->object)) {
        return -1;
    }
    const sa_status status = sa_device_enter(function, out->object->device.device_id, &out->scope);
    if (status != SA_OK) {
        leave(out->object);
        sa_raise(status);
        return -1;
    }
    out->stream = out->object->stream;
    if (out->object->api != NULL) {
        out->object->api->current_stream(DL_CUDA, out->object->device.device_id, &out->stream);
    }
    return 0;
}

PyObject *sa_session_end(const sa_session *session, sa_status status)
{
    sa_device_leave(&session->scope);
    leave(session->object);
    sa_raise(status);
    return status == SA_OK ? Py_NewRef(Py_None) : NULL;
}

int sa_cuda_take_storage(sa_call *call, sa_cuda_object *self, int64_t bytes, bool first, void **memory)
{
    sa_raw view = {0};
    sa_like like;
    self->storage = PyObject_CallFunction(self->allocate, "LO", (long long)bytes, first ? Py_True : Py_False);
    if (self->storage == NULL) {
        return -1;
    }
    if (self->storage == Py_None) {
        Py_SETREF(self->storage, sa_new_device_buffer(call, self->device, bytes, memory));
        call->wait = true; /* no library whose stream orders what follows */
        return self->storage == NULL ? -1 : 0;
    }
    const int found = sa_raw_of_object(call, "storage", self->storage, &view, &like);
    if (found == 0) {
        PyErr_Format(PyExc_TypeError, "%s(): storage is %s, expected a CUDA array", call->function, Py_TYPE(self->storage)->tp_name);
    }
    if (found != 1 || sa_check_storage(call, &view, bytes) < 0) {
        return -1;
    }
    self->api = like.api;
    self->stream = call->stream;
    *memory = view.data;
    return 0;
}

void *sa_cuda_object_new(PyTypeObject *type, size_t size, const sa_cuda_kind *kind, int device, PyObject *allocate)
{
    sa_cuda_object *self = PyObject_New(sa_cuda_object, type);
    if (self != NULL) {
        memset((char *)self + sizeof(PyObject), 0, size - sizeof(PyObject));
        self->kind = kind;
        self->device = (DLDevice){DL_CUDA, device};
        self->allocate = Py_NewRef(allocate);
        atomic_flag_clear(&self->busy);
    }
    return self;
}

void sa_cuda_object_free(sa_cuda_object *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->storage);
    Py_XDECREF(self->allocate);
    PyObject_Free(self);
    Py_DECREF(type);
}

sa_call sa_cuda_call(const sa_cuda_object *self, PyTypeObject *type, const char *function)
{
    sa_call call = {.module = PyType_GetModuleState(type), .function = function, .device_of = "the cache"};
    call.device = self->device;
    call.device_known = true;
    return call;
}

/* --- the methods of every cache ---------------------------------------------------------------------------------------------------- */

static PyObject *attend_locked(sa_call *call, sa_cuda_object *self, PyObject *const *arguments)
{
    const sa_cuda_shape shape = self->kind->shape(self);
    sa_attend_params params = {.function = call->function, .mass_queries = -1, .pinned = shape.pinned};
    sa_results results = {0};
    PyObject *answer = NULL;
    bool return_lse, return_mass;
    if (sa_parse_cache_call(call, arguments, &params, &results.like, &return_lse, &return_mass) < 0) {
        goto end;
    }
    if (self->api != NULL && sa_follow_exchange(call, self->api, self->device) < 0) { /* q of another library than the storage */
        goto end;
    }
    const sa_status status = self->kind->check(self, &params);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    if (sa_make_results(call, &params, arguments[SA_CACHE_OUT], return_lse, return_mass, shape.slots, &results) < 0 ||
        self->kind->run(call, &params, self, &results.like) < 0) {
        goto end;
    }
    self->stream = call->stream;
    answer = sa_take_results(call, &results);
end:
    sa_drop_results(&results);
    return answer;
}

PyObject *sa_cuda_attend(PyObject *self, PyObject *const *arguments)
{
    sa_cuda_object *cache = (sa_cuda_object *)self;
    if (!enter(cache)) {
        return NULL;
    }
    sa_call call = sa_cuda_call(cache, Py_TYPE(self), cache->kind->attend);
    PyObject *answer = attend_locked(&call, cache, arguments);
    leave(cache);
    sa_call_end(&call);
    return answer;
}

PyObject *sa_cuda_copy(PyObject *self, PyObject *unused)
{
    (void)unused;
    sa_cuda_object *cache = (sa_cuda_object *)self, *twin = cache->kind->new_like(cache, "copy");
    sa_session at;
    if (twin == NULL || sa_session_begin(self, "copy", &at) < 0) {
        Py_XDECREF(twin);
        return NULL;
    }
    sa_status status = cache->kind->copy(twin, cache, at.stream);
    if (status == SA_OK && twin->api == NULL) { /* the copy may be used on another stream at once */
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

PyObject *sa_cuda_reset(PyObject *self, PyObject *mask)
{
    sa_cuda_object *cache = (sa_cuda_object *)self;
    sa_session at;
    const bool *rows;
    if (sa_parse_rows(mask, cache->kind->shape(cache).batch, &rows) < 0 || sa_session_begin(self, "reset", &at) < 0) {
        return NULL;
    }
    return sa_session_end(&at, cache->kind->reset(cache, &at.scope, rows, at.stream));
}

static sa_status reorder(sa_cuda_object *before, const sa_session *at, const int64_t *index)
{
    const sa_cuda_kind *kind = before->kind;
    SA_TRY(kind->copy(before, at->object, at->stream));
    SA_TRY(kind->gather(at->object, before, index, at->stream));
    return before->api == NULL ? sa_device_wait("reorder", at->stream) : SA_OK; /* else its memory goes back in the order of the stream */
}

PyObject *sa_cuda_reorder(PyObject *self, PyObject *index)
{
    sa_cuda_object *cache = (sa_cuda_object *)self, *before = NULL;
    sa_call call = sa_cuda_call(cache, Py_TYPE(self), "reorder");
    sa_ints order = {0};
    sa_session at;
    PyObject *done = NULL;
    call.reads_device = true; /* copies of rows are ordered by the host */
    if (sa_parse_order(&call, index, &order) < 0) {
        goto end;
    }
    const sa_status status = cache->kind->check_index(cache, order.data, order.shape[0]);
    if (status != SA_OK) {
        sa_raise(status);
        goto end;
    }
    before = cache->kind->new_like(cache, "reorder");
    if (before != NULL && sa_session_begin(self, "reorder", &at) == 0) {
        done = sa_session_end(&at, reorder(before, &at, order.data));
    }
end:
    Py_XDECREF(before);
    sa_call_end(&call);
    return done;
}

PyObject *sa_cuda_crop(PyObject *self, PyObject *length)
{
    sa_cuda_object *cache = (sa_cuda_object *)self;
    sa_call call = sa_cuda_call(cache, Py_TYPE(self), "crop");
    int64_t tokens;
    sa_session at;
    if (sa_parse_crop(&call, length, &tokens) < 0 || sa_session_begin(self, "crop", &at) < 0) {
        return NULL;
    }
    sa_status status;
    Py_BEGIN_ALLOW_THREADS
        status = cache->kind->crop(cache, &at.scope, tokens, at.stream);
    Py_END_ALLOW_THREADS
    return sa_session_end(&at, status);
}
