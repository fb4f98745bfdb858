#include "raw.h"

#include <string.h>

#include "device.h"
#include "numpy_api.h"

void sa_call_end(sa_call *call)
{
    for (int i = 0; i < call->held_count; i++) {
        Py_DECREF(call->held[i]);
    }
    for (int i = 0; i < call->memory_count; i++) {
        PyMem_Free(call->memory[i]);
    }
    call->held_count = call->memory_count = 0;
}

int sa_hold(sa_call *call, PyObject *owned)
{
    if (call->held_count == SA_MAX_HELD) {
        Py_DECREF(owned);
        PyErr_Format(PyExc_RuntimeError, "%s(): too many arrays in one call", call->function);
        return -1;
    }
    call->held[call->held_count++] = owned;
    return 0;
}

int sa_optional_attribute(PyObject *object, PyObject *name, PyObject **value)
{
    *value = PyObject_GetAttr(object, name);
    if (*value != NULL) {
        return 1;
    }
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
        return -1;
    }
    PyErr_Clear();
    return 0;
}

/* --- NumPy ---------------------------------------------------------------------------------------------------------------------- */

bool sa_is_bfloat16(PyArray_Descr *descr)
{
    const char *full = descr->typeobj->tp_name, *dot = strrchr(full, '.');
    return descr->type_num >= NPY_USERDEF && PyDataType_ELSIZE(descr) == 2 && strcmp(dot != NULL ? dot + 1 : full, "bfloat16") == 0;
}

static DLDataType numpy_dtype(PyArray_Descr *descr)
{
    const uint8_t bits = (uint8_t)(8 * PyDataType_ELSIZE(descr));
    if (sa_is_bfloat16(descr)) {
        return (DLDataType){DL_BFLOAT, 16, 1};
    }
    switch (descr->kind) {
    case 'f': return (DLDataType){DL_FLOAT, bits, 1};
    case 'i': return (DLDataType){DL_INT, bits, 1};
    case 'u': return (DLDataType){DL_UINT, bits, 1};
    case 'b': return (DLDataType){DL_BOOL, 8, 1};
    default: return (DLDataType){0, 0, 0}; /* nothing that we read */
    }
}

/* Elements must lie at multiples of their size: kernels load them as what they are. */
static int check_alignment(sa_call *call, const char *name, const sa_raw *view)
{
    const uintptr_t size = view->dtype.bits / 8;
    if (size > 1 && (uintptr_t)view->data % size != 0) {
        PyErr_Format(PyExc_ValueError, "%s(): %s is not aligned to its item size", call->function, name);
        return -1;
    }
    return 0;
}

static int refuse_mask(sa_call *call, const char *name, PyObject *array)
{
    if (!PyArray_CheckExact(array) && PyObject_HasAttrString(array, "mask")) {
        PyErr_Format(PyExc_TypeError, "%s(): %s is a masked array, expected one without a mask: see starts, lengths and q_lengths",
                     call->function, name);
        return -1;
    }
    return 0;
}

int sa_raw_of_numpy(sa_call *call, const char *name, PyArrayObject *array, sa_raw *out)
{
    PyArray_Descr *descr = PyArray_DESCR(array);
    if (refuse_mask(call, name, (PyObject *)array) < 0) {
        return -1;
    }
    out->dtype = numpy_dtype(descr);
    out->device = (DLDevice){DL_CPU, 0};
    out->rank = PyArray_NDIM(array);
    out->data = PyArray_DATA(array);
    out->readonly = !PyArray_ISWRITEABLE(array);
    if (out->dtype.lanes == 0) {
        PyErr_Format(PyExc_TypeError, "%s(): %s has dtype %S, expected real numbers", call->function, name, (PyObject *)descr);
        return -1;
    }
    if (!PyArray_ISNBO(descr->byteorder)) {
        PyErr_Format(PyExc_TypeError, "%s(): %s has dtype %S in foreign byte order, expected native", call->function, name,
                     (PyObject *)descr);
        return -1;
    }
    if (out->rank > SA_MAX_RANK) {
        PyErr_Format(PyExc_ValueError, "%s(): %s has %d dimensions, expected at most 4", call->function, name, out->rank);
        return -1;
    }
    const npy_intp item = PyDataType_ELSIZE(descr);
    for (int axis = 0; axis < out->rank; axis++) {
        out->shape[axis] = PyArray_DIM(array, axis);
        out->stride[axis] = PyArray_STRIDE(array, axis) / item;
        if (PyArray_STRIDE(array, axis) % item != 0 && out->shape[axis] > 1) {
            PyErr_Format(PyExc_ValueError, "%s(): %s has a stride that is no multiple of its item size", call->function, name);
            return -1;
        }
    }
    return check_alignment(call, name, out);
}

/* --- DLPack --------------------------------------------------------------------------------------------------------------------- */

static int raw_of_dltensor(sa_call *call, const char *name, const DLTensor *tensor, bool readonly, sa_raw *out)
{
    if (tensor->ndim > SA_MAX_RANK) {
        PyErr_Format(PyExc_ValueError, "%s(): %s has %d dimensions, expected at most 4", call->function, name, (int)tensor->ndim);
        return -1;
    }
    out->dtype = tensor->dtype;
    out->device = tensor->device;
    out->rank = tensor->ndim;
    out->data = tensor->data != NULL ? (char *)tensor->data + tensor->byte_offset : NULL;
    out->readonly = readonly;
    bool empty = false;
    int64_t dense = 1;
    for (int axis = out->rank - 1; axis >= 0; axis--) {
        out->shape[axis] = tensor->shape[axis];
        out->stride[axis] = tensor->strides != NULL ? tensor->strides[axis] : dense;
        dense = (int64_t)((uint64_t)dense * (uint64_t)tensor->shape[axis]);
        empty = empty || tensor->shape[axis] == 0;
    }
    if (out->data == NULL && !empty) { /* tensors that only pretend: fake, zero, without storage */
        PyErr_Format(PyExc_ValueError, "%s(): %s has no memory behind it, expected a tensor that holds its elements", call->function, name);
        return -1;
    }
    return check_alignment(call, name, out);
}

/* The exchange table of a type; NULL if it has none that we understand, or with an exception. */
static const DLPackExchangeAPI *find_table(sa_call *call, PyTypeObject *type)
{
    PyObject *capsule;
    if (sa_optional_attribute((PyObject *)type, call->module->exchange_name, &capsule) <= 0) {
        return NULL;
    }
    const DLPackExchangeHeader *header =
        PyCapsule_IsValid(capsule, "dlpack_exchange_api") ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
    Py_DECREF(capsule); /* the type keeps it, and the object keeps the type */
    while (header != NULL && header->version.major != 1) {
        header = header->prev_api;
    }
    return (const DLPackExchangeAPI *)(const void *)header;
}

/* The last type is remembered if it had one; a type may get one later. */
static const DLPackExchangeAPI *exchange_api(sa_call *call, PyObject *object)
{
#ifndef Py_GIL_DISABLED
    sa_module *module = call->module;
    if (Py_TYPE(object) == module->table_type) {
        return module->table;
    }
    const DLPackExchangeAPI *table = find_table(call, Py_TYPE(object));
    if (table != NULL) {
        Py_XSETREF(module->table_type, (PyTypeObject *)Py_NewRef(Py_TYPE(object)));
        module->table = table;
    }
    return table;
#else
    return find_table(call, Py_TYPE(object));
#endif
}

/* Takes a capsule's tensor; the renamed capsule is held until the end of the call, whose deleter then runs. */
static void delete_versioned(PyObject *capsule)
{
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "used_dltensor_versioned");
    if (managed != NULL && managed->deleter != NULL) {
        managed->deleter(managed);
    }
}

static void delete_legacy(PyObject *capsule)
{
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "used_dltensor");
    if (managed != NULL && managed->deleter != NULL) {
        managed->deleter(managed);
    }
}

/* A capsule from before versions cannot say that its memory is read-only; torch's never was, of others we assume the worst. */
static int raw_of_capsule(sa_call *call, const char *name, PyObject *capsule, bool torch_like, sa_raw *out)
{
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0 || PyCapsule_SetDestructor(capsule, delete_versioned) < 0) {
            return -1;
        }
        if (managed->version.major != 1) {
            PyErr_Format(PyExc_BufferError, "%s(): %s speaks DLPack %u, expected 1", call->function, name,
                         (unsigned)managed->version.major);
            return -1;
        }
        return raw_of_dltensor(call, name, &managed->dl_tensor, (managed->flags & DL_FLAG_READ_ONLY) != 0, out);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") < 0 || PyCapsule_SetDestructor(capsule, delete_legacy) < 0) {
            return -1;
        }
        return raw_of_dltensor(call, name, &managed->dl_tensor, !torch_like, out);
    }
    PyErr_Format(PyExc_TypeError, "%s(): %s.__dlpack__() gave no DLPack capsule", call->function, name);
    return -1;
}

/* Which device, before the door is opened: a CUDA array is asked for with the stream that it must be ready on. */
static int follow_device(sa_call *call, const char *name, PyObject *object, sa_like *like)
{
    PyObject *device = PyObject_CallMethodNoArgs(object, call->module->device_name);
    if (device != NULL && PyTuple_Check(device) && PyTuple_GET_SIZE(device) == 2) {
        like->device.device_type = (int32_t)PyLong_AsLong(PyTuple_GET_ITEM(device, 0));
        like->device.device_id = (int32_t)PyLong_AsLong(PyTuple_GET_ITEM(device, 1));
    } else {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s(): %s does not tell its device: __dlpack_device__() gave no pair", call->function, name);
    }
    Py_XDECREF(device);
    if (PyErr_Occurred() || sa_admit_device(call, name, like->device) < 0) {
        return -1;
    }
    return sa_is_cuda(like->device) ? sa_follow_library(call, object, like->device) : 0;
}

static PyObject *ask_dlpack(sa_call *call, PyObject *object, bool cuda)
{
    PyObject *method = PyObject_GetAttr(object, call->module->dlpack_name);
    PyObject *keywords = cuda ? Py_BuildValue("{s:(ii),s:L}", "max_version", 1, 3, "stream", sa_dlpack_stream(call))
                              : Py_BuildValue("{s:(ii)}", "max_version", 1, 3);
    PyObject *none = PyTuple_New(0);
    PyObject *capsule = NULL;
    if (method != NULL && keywords != NULL && none != NULL) {
        capsule = PyObject_Call(method, none, keywords);
        if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) { /* a producer from before versions */
            PyErr_Clear();
            PyDict_DelItemString(keywords, "max_version");
            capsule = PyObject_Call(method, none, keywords);
        }
    }
    Py_XDECREF(method);
    Py_XDECREF(keywords);
    Py_XDECREF(none);
    return capsule;
}

/* The door's own words may run to pages; the first line names the trouble. */
static int refuse_unreadable(sa_call *call, const char *name)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *text = value != NULL ? PyObject_Str(value) : NULL;
    PyObject *lines = text != NULL ? PyUnicode_Splitlines(text, 0) : NULL;
    PyErr_Clear();
    if (lines != NULL && PyList_GET_SIZE(lines) > 0 && PyErr_GivenExceptionMatches(type, PyExc_Exception)) {
        PyErr_Format(PyExc_ValueError, "%s(): %s cannot be read: %S", call->function, name, PyList_GET_ITEM(lines, 0));
    } else {
        PyErr_Restore(type, value, trace);
        type = value = trace = NULL;
    }
    Py_XDECREF(lines);
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return -1;
}

static int follow_table(sa_call *call, const char *name, sa_like *like, DLDevice device)
{
    like->device = device;
    if (sa_admit_device(call, name, device) < 0) {
        return -1;
    }
    return sa_is_cuda(device) ? sa_follow_exchange(call, like->api, device) : 0;
}

/* Through the exchange table. The view is borrowed from the object; a library without views lends a managed tensor, held to the end. */
static int raw_of_exchange(sa_call *call, const char *name, PyObject *object, sa_like *like, sa_raw *out)
{
    DLTensor tensor;
    if (like->api->view_from_object != NULL) {
        if (like->api->view_from_object(object, &tensor) < 0) {
            return refuse_unreadable(call, name);
        }
        if (follow_table(call, name, like, tensor.device) < 0) {
            return -1;
        }
        return raw_of_dltensor(call, name, &tensor, false, out);
    }
    DLManagedTensorVersioned *managed = NULL;
    if (like->api->managed_from_object(object, &managed) < 0) {
        return refuse_unreadable(call, name);
    }
    PyObject *capsule = PyCapsule_New(managed, "used_dltensor_versioned", delete_versioned);
    if (capsule == NULL || sa_hold(call, capsule) < 0) {
        return -1;
    }
    if (follow_table(call, name, like, managed->dl_tensor.device) < 0) {
        return -1;
    }
    return raw_of_dltensor(call, name, &managed->dl_tensor, (managed->flags & DL_FLAG_READ_ONLY) != 0, out);
}

/* PyObject_HasAttr hides every exception; this one hides only that there is no such attribute. */
static int has_attribute(PyObject *object, PyObject *name)
{
    PyObject *value = NULL;
    const int found = sa_optional_attribute(object, name, &value);
    Py_XDECREF(value);
    return found;
}

/* What jax.jit, grad and vmap pass to a function in place of arrays. */
static bool is_tracer(PyObject *object)
{
    return strstr(Py_TYPE(object)->tp_name, "Tracer") != NULL && PyObject_HasAttrString(object, "aval");
}

int sa_raw_of_object(sa_call *call, const char *name, PyObject *object, sa_raw *out, sa_like *like)
{
    *like = (sa_like){.kind = SA_KIND_NUMPY, .object = object, .device = {DL_CPU, 0}};
    if (PyArray_Check(object)) {
        if (sa_admit_device(call, name, like->device) < 0) {
            return -1;
        }
        return sa_raw_of_numpy(call, name, (PyArrayObject *)object, out) < 0 ? -1 : 1;
    }
    if (PyLong_Check(object) || PyFloat_Check(object) || PyList_Check(object) || PyTuple_Check(object)) {
        return 0;
    }
    like->api = exchange_api(call, object);
    if (like->api != NULL) {
        like->kind = SA_KIND_EXCHANGE;
        const int fit = sa_refuse_lost_state(call, name, object);
        if (fit < 0) {
            return -1;
        }
        const int read = raw_of_exchange(call, name, object, like, out);
        call->to_operator = read < 0 && fit == 1 && call->has_operator; /* fake, batched, of torch.func: torch knows what to do */
        return read < 0 ? -1 : 1;
    }
    if (PyErr_Occurred()) {
        return -1;
    }
    if (is_tracer(object)) {
        PyErr_Format(PyExc_NotImplementedError, "%s(): %s is a JAX tracer, which has no memory: call outside jax.jit, or through jax.pure_callback",
                     call->function, name);
        return -1;
    }
    like->kind = SA_KIND_DLPACK;
    const int has_dlpack = has_attribute(object, call->module->dlpack_name);
    if (has_dlpack < 0) {
        return -1;
    }
    if (has_dlpack == 0) {
        const int has_interface = has_attribute(object, call->module->interface_name);
        return has_interface <= 0 ? has_interface : sa_raw_of_interface(call, name, object, out, like) < 0 ? -1 : 1;
    }
    const int torch_like = sa_refuse_lost_state(call, name, object);
    if (torch_like < 0 || follow_device(call, name, object, like) < 0) {
        return -1;
    }
    PyObject *capsule = ask_dlpack(call, object, sa_is_cuda(like->device));
    if (capsule == NULL || sa_hold(call, capsule) < 0) {
        return -1;
    }
    return raw_of_capsule(call, name, capsule, torch_like, out) < 0 ? -1 : 1;
}

int sa_check_storage(sa_call *call, const sa_raw *view, int64_t bytes)
{
    int64_t dense = view->dtype.bits / 8;
    for (int axis = view->rank - 1; axis >= 0; axis--) {
        if (view->shape[axis] > 1 && view->stride[axis] * (view->dtype.bits / 8) != dense) {
            PyErr_Format(PyExc_ValueError, "%s(): storage is not contiguous, expected dense memory", call->function);
            return -1;
        }
        dense *= view->shape[axis];
    }
    if (dense < bytes || (uintptr_t)view->data % 16 != 0 || view->readonly) {
        PyErr_Format(PyExc_ValueError, "%s(): storage has %lld bytes%s%s, expected at least %lld, 16-byte aligned and writeable",
                     call->function, (long long)dense, (uintptr_t)view->data % 16 != 0 ? ", not aligned" : "",
                     view->readonly ? ", read-only" : "", (long long)bytes);
        return -1;
    }
    return 0;
}

/* --- tensors -------------------------------------------------------------------------------------------------------------------- */

static const char *const code_names[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};

static int dtype_of(sa_call *call, const char *name, DLDataType came, sa_dtype *out)
{
    if (came.code == DL_FLOAT && came.bits == 32 && came.lanes == 1) {
        *out = SA_F32;
    } else if (came.code == DL_FLOAT && came.bits == 16 && came.lanes == 1) {
        *out = SA_F16;
    } else if (came.code == DL_BFLOAT && came.bits == 16 && came.lanes == 1) {
        *out = SA_BF16;
    } else {
        PyErr_Format(PyExc_TypeError, "%s(): %s has dtype %s%d, expected float32, float16 or bfloat16", call->function, name,
                     came.code < 7 ? code_names[came.code] : "code ", (int)came.bits);
        return -1;
    }
    return 0;
}

int sa_view(sa_call *call, const char *name, PyObject *object, sa_tensor *tensor, sa_like *like)
{
    sa_raw view = {0};
    sa_like own;
    const int found = sa_raw_of_object(call, name, object, &view, like != NULL ? like : &own);
    if (found < 0) {
        return -1;
    }
    if (found == 0) {
        PyErr_Format(PyExc_TypeError, "%s(): %s is %s, expected an array (NumPy, torch, or anything with __dlpack__)", call->function, name,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    if (view.rank > 4) {
        PyErr_Format(PyExc_ValueError, "%s(): %s has %d dimensions, expected at most 4", call->function, name, view.rank);
        return -1;
    }
    *tensor = (sa_tensor){.data = view.data, .rank = view.rank, .readonly = view.readonly};
    memcpy(tensor->shape, view.shape, sizeof tensor->shape);
    memcpy(tensor->stride, view.stride, sizeof tensor->stride);
    return dtype_of(call, name, view.dtype, &tensor->dtype);
}
