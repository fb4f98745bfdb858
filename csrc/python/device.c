#include "device.h"

#include <stdarg.h>
#include <stdio.h>

#include "../cuda/driver.h"

bool sa_is_cuda(DLDevice device)
{
    return device.device_type == DL_CUDA || device.device_type == DL_CUDA_MANAGED;
}

static bool is_host(DLDevice device)
{
    return device.device_type == DL_CPU || device.device_type == DL_CUDA_HOST;
}

typedef struct device_name {
    char text[32];
} device_name;

static device_name name_of(DLDevice device)
{
    device_name name = {"the CPU"};
    if (sa_is_cuda(device)) {
        snprintf(name.text, sizeof name.text, "cuda:%d", (int)device.device_id);
    }
    return name;
}

int sa_admit_device(sa_call *call, const char *name, DLDevice device)
{
    if (!is_host(device) && !sa_is_cuda(device)) {
        PyErr_Format(PyExc_NotImplementedError, "%s(): %s is on DLPack device type %d, expected memory of the CPU or of CUDA: the backends are: cpu, cuda",
                     call->function, name, (int)device.device_type);
        return -1;
    }
    if (!call->device_known && !call->auxiliary) {
        call->device = device;
        call->device_known = true;
    }
    const bool same = is_host(device) ? is_host(call->device) : sa_is_cuda(call->device) && call->device.device_id == device.device_id;
    if (same || (call->auxiliary && (is_host(device) || call->reads_device))) {
        return 0;
    }
    const device_name came = name_of(device), expected = name_of(call->device);
    PyErr_Format(PyExc_ValueError, "%s(): %s is on %s, expected %s (the device of %s)", call->function, name, came.text, expected.text,
                 call->device_of != NULL ? call->device_of : "q");
    return -1;
}

/* --- streams ---------------------------------------------------------------------------------------------------------------------- */

static int order(sa_call *call, void *before, void *after)
{
    sa_device_scope scope;
    sa_status status = sa_device_enter(call->function, call->device.device_id, &scope);
    if (status == SA_OK) {
        status = sa_device_order(call->function, before, after);
        sa_device_leave(&scope);
    }
    sa_raise(status);
    return status == SA_OK ? 0 : -1;
}

static int join(sa_call *call, void *stream)
{
    if (stream == call->stream) {
        return 0;
    }
    if (call->joined_count < SA_MAX_JOINED) {
        call->joined[call->joined_count++] = stream;
    } else {
        call->wait = true;
    }
    return order(call, stream, call->stream);
}

int sa_follow_exchange(sa_call *call, const DLPackExchangeAPI *api, DLDevice device)
{
    void *stream = NULL;
    if (call->stream_known && call->stream_api == api) {
        return 0;
    }
    if (api->current_stream == NULL || api->current_stream(device.device_type, device.device_id, &stream) != 0) {
        PyErr_Clear();
        PyErr_Format(PyExc_RuntimeError, "%s(): the array library does not tell its current stream", call->function);
        return -1;
    }
    if (call->stream_known) {
        return join(call, stream);
    }
    call->stream = stream;
    call->stream_api = api;
    call->stream_known = true;
    return 0;
}

int sa_follow_library(sa_call *call, PyObject *object, DLDevice device)
{
    PyObject *answer = sa_ask_library(call, "stream", "Oi", object, (int)device.device_id);
    if (answer == NULL) {
        return -1;
    }
    void *stream = answer != Py_None ? PyLong_AsVoidPtr(answer) : NULL;
    call->wait = call->wait || answer == Py_None;
    Py_DECREF(answer);
    if (PyErr_Occurred()) {
        return -1;
    }
    if (!call->stream_known) {
        call->stream = stream;
        call->stream_known = true;
    }
    return 0;
}

long long sa_dlpack_stream(const sa_call *call)
{
    return call->stream == NULL ? 1 : (long long)(intptr_t)call->stream; /* 0 is forbidden, 1 is the default stream */
}

sa_status sa_settle_streams(sa_call *call)
{
    for (int i = 0; i < call->joined_count; i++) {
        SA_TRY(sa_device_order(call->function, call->stream, call->joined[i]));
    }
    return call->wait ? sa_device_wait(call->function, call->stream) : SA_OK;
}

/* --- libraries without an exchange table -------------------------------------------------------------------------------------------- */

PyObject *sa_ask_library(sa_call *call, const char *function, const char *format, ...)
{
    if (call->module->libraries == NULL) {
        call->module->libraries = PyImport_ImportModule("sinkattn._libraries");
    }
    PyObject *callable = call->module->libraries != NULL ? PyObject_GetAttrString(call->module->libraries, function) : NULL;
    va_list arguments;
    va_start(arguments, format);
    PyObject *tuple = callable != NULL ? Py_VaBuildValue(format, arguments) : NULL;
    va_end(arguments);
    PyObject *answer = tuple != NULL ? PyObject_CallObject(callable, tuple) : NULL;
    Py_XDECREF(tuple);
    Py_XDECREF(callable);
    return answer;
}

static int read_extents(PyObject *shape, PyObject *strides, sa_raw *out)
{
    out->rank = (int)PyTuple_GET_SIZE(shape);
    for (int axis = 0; axis < out->rank; axis++) {
        out->shape[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, axis));
        out->stride[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, axis));
    }
    return PyErr_Occurred() ? -1 : 0;
}

static int read_interface(sa_call *call, const char *name, PyObject *facts, sa_raw *out)
{
    PyObject *shape, *strides, *stream;
    unsigned long long address;
    int readonly, code, bits, device;
    if (!PyArg_ParseTuple(facts, "KpO!O!iiO", &address, &readonly, &PyTuple_Type, &shape, &PyTuple_Type, &strides, &code, &bits, &stream)) {
        return -1;
    }
    if (PyTuple_GET_SIZE(shape) > 4) {
        PyErr_Format(PyExc_ValueError, "%s(): %s has %zd dimensions, expected at most 4", call->function, name, PyTuple_GET_SIZE(shape));
        return -1;
    }
    const sa_status status = sa_device_of_pointer(call->function, name, (const void *)(uintptr_t)address, &device);
    if (status != SA_OK) {
        sa_raise(status);
        return -1;
    }
    out->data = (char *)(uintptr_t)address;
    out->readonly = readonly;
    out->dtype = (DLDataType){(uint8_t)code, (uint8_t)bits, 1};
    out->device = (DLDevice){DL_CUDA, device};
    return read_extents(shape, strides, out);
}

/* The library's own words, under the argument's name. */
static int refuse_interface(sa_call *call, const char *name)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (PyErr_GivenExceptionMatches(type, PyExc_ValueError)) {
        PyErr_Format(PyExc_ValueError, "%s(): %s cannot be read through __cuda_array_interface__: %S", call->function, name, value);
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
    } else {
        PyErr_Restore(type, value, trace);
    }
    return -1;
}

int sa_raw_of_interface(sa_call *call, const char *name, PyObject *object, sa_raw *out, sa_like *like)
{
    PyObject *facts = sa_ask_library(call, "interface", "(O)", object);
    if (facts == NULL) {
        return refuse_interface(call, name);
    }
    if (sa_hold(call, facts) < 0 || read_interface(call, name, facts, out) < 0 || sa_admit_device(call, name, out->device) < 0 ||
        sa_follow_library(call, object, out->device) < 0) {
        return -1;
    }
    like->device = out->device;
    PyObject *given = PyTuple_GET_ITEM(facts, 6); /* the stream that the data is ready on, None: it is */
    void *stream = given != Py_None ? PyLong_AsVoidPtr(given) : call->stream;
    return PyErr_Occurred() ? -1 : join(call, stream == (void *)1 ? NULL : stream);
}
