#include "cuda_object.h"

#include <string.h>

bool sa_cuda_enter(sa_cuda_object *object)
{
    if (atomic_flag_test_and_set(&object->busy)) {
        PyErr_Format(PyExc_RuntimeError, "%s is in use by another call; give each thread a cache of its own", object->name);
        return false;
    }
    return true;
}

void sa_cuda_leave(sa_cuda_object *object)
{
    atomic_flag_clear(&object->busy);
}

int sa_session_begin(PyObject *self, const char *function, sa_session *out)
{
    *out = (sa_session){.object = (sa_cuda_object *)self, .function = function};
    if (!sa_cuda_enter(out->object)) {
        return -1;
    }
    const sa_status status = sa_device_enter(function, out->object->device.device_id, &out->scope);
    if (status != SA_OK) {
        sa_cuda_leave(out->object);
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
    sa_cuda_leave(session->object);
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

void *sa_cuda_object_new(PyTypeObject *type, size_t size, const char *name, int device, PyObject *allocate)
{
    sa_cuda_object *self = PyObject_New(sa_cuda_object, type);
    if (self != NULL) {
        memset((char *)self + sizeof(PyObject), 0, size - sizeof(PyObject));
        self->name = name;
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
