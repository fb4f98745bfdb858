#include "array.h"

#include <string.h>

#include "../core/half.h"
#include "numpy_api.h"

enum { MAX_RANK = 8 };

/* An array as any door gives it. Strides in elements. */
typedef struct raw {
    char *data;
    int rank;
    int64_t shape[MAX_RANK], stride[MAX_RANK];
    DLDataType dtype;
    DLDevice device;
    bool readonly;
} raw;

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

static int hold(sa_call *call, PyObject *owned)
{
    if (call->held_count == SA_MAX_HELD) {
        Py_DECREF(owned);
        PyErr_Format(PyExc_RuntimeError, "%s(): too many arrays in one call", call->function);
        return -1;
    }
    call->held[call->held_count++] = owned;
    return 0;
}

/* --- NumPy ---------------------------------------------------------------------------------------------------------------------- */

/* ml_dtypes' bfloat16, by the last part of its type's name: NumPy has no number for it. */
static bool is_bfloat16(PyArray_Descr *descr)
{
    const char *full = descr->typeobj->tp_name, *dot = strrchr(full, '.');
    return descr->type_num >= NPY_USERDEF && PyDataType_ELSIZE(descr) == 2 && strcmp(dot != NULL ? dot + 1 : full, "bfloat16") == 0;
}

static DLDataType numpy_dtype(PyArray_Descr *descr)
{
    const uint8_t bits = (uint8_t)(8 * PyDataType_ELSIZE(descr));
    if (is_bfloat16(descr)) {
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

static int raw_of_numpy(sa_call *call, const char *name, PyArrayObject *array, raw *out)
{
    PyArray_Descr *descr = PyArray_DESCR(array);
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
        PyErr_Format(PyExc_TypeError, "%s(): %s has dtype %S in foreign byte order, expected native", call->function, name, (PyObject *)descr);
        return -1;
    }
    if (out->rank > MAX_RANK) {
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
    if (!PyArray_ISALIGNED(array)) {
        PyErr_Format(PyExc_ValueError, "%s(): %s is not aligned to its item size", call->function, name);
        return -1;
    }
    return 0;
}

/* --- DLPack --------------------------------------------------------------------------------------------------------------------- */

static int raw_of_dltensor(sa_call *call, const char *name, const DLTensor *tensor, bool readonly, raw *out)
{
    if (tensor->device.device_type != DL_CPU && tensor->device.device_type != DL_CUDA_HOST) {
        PyErr_Format(PyExc_NotImplementedError,
                     "%s(): %s is on DLPack device type %d, expected memory of the CPU: the backends of this version are: cpu",
                     call->function, name, (int)tensor->device.device_type);
        return -1;
    }
    if (tensor->ndim > MAX_RANK) {
        PyErr_Format(PyExc_ValueError, "%s(): %s has %d dimensions, expected at most 4", call->function, name, (int)tensor->ndim);
        return -1;
    }
    out->dtype = tensor->dtype;
    out->device = tensor->device;
    out->rank = tensor->ndim;
    out->data = (char *)tensor->data + tensor->byte_offset;
    out->readonly = readonly;
    int64_t dense = 1;
    for (int axis = out->rank - 1; axis >= 0; axis--) {
        out->shape[axis] = tensor->shape[axis];
        out->stride[axis] = tensor->strides != NULL ? tensor->strides[axis] : dense;
        dense = (int64_t)((uint64_t)dense * (uint64_t)tensor->shape[axis]);
    }
    return 0;
}

/* The exchange table of a type, NULL (without exception) if it has none that we understand. */
static const DLPackExchangeAPI *exchange_api(sa_call *call, PyObject *object)
{
    PyObject *capsule = PyObject_GetAttr((PyObject *)Py_TYPE(object), call->module->exchange_name);
    if (capsule == NULL) {
        PyErr_Clear();
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

static int refuse_gradient(sa_call *call, const char *name, PyObject *object)
{
    PyObject *flag = PyObject_GetAttr(object, call->module->grad_name);
    if (flag == NULL) {
        PyErr_Clear();
        return 0;
    }
    const int requires = PyObject_IsTrue(flag);
    Py_DECREF(flag);
    if (requires <= 0) {
        return requires;
    }
    PyObject *modules = PyImport_GetModuleDict(), *torch = PyDict_GetItemString(modules, "torch");
    int enabled = 1;
    if (torch != NULL) {
        PyObject *answer = PyObject_CallMethod(torch, "is_grad_enabled", NULL);
        if (answer == NULL) {
            return -1;
        }
        enabled = PyObject_IsTrue(answer);
        Py_DECREF(answer);
    }
    if (enabled) {
        PyErr_Format(PyExc_NotImplementedError,
                     "%s(): %s requires grad, and this version has no gradients: call under torch.no_grad(), or pass %s.detach()",
                     call->function, name, name);
        return -1;
    }
    return 0;
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

static int raw_of_capsule(sa_call *call, const char *name, PyObject *capsule, raw *out)
{
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0 || PyCapsule_SetDestructor(capsule, delete_versioned) < 0) {
            return -1;
        }
        if (managed->version.major != 1) {
            PyErr_Format(PyExc_BufferError, "%s(): %s speaks DLPack %u, expected 1", call->function, name, (unsigned)managed->version.major);
            return -1;
        }
        return raw_of_dltensor(call, name, &managed->dl_tensor, (managed->flags & DL_FLAG_READ_ONLY) != 0, out);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") < 0 || PyCapsule_SetDestructor(capsule, delete_legacy) < 0) {
            return -1;
        }
        return raw_of_dltensor(call, name, &managed->dl_tensor, false, out);
    }
    PyErr_Format(PyExc_TypeError, "%s(): %s.__dlpack__() gave no DLPack capsule", call->function, name);
    return -1;
}

static int check_device(sa_call *call, const char *name, PyObject *object)
{
    PyObject *device = PyObject_CallMethodNoArgs(object, call->module->device_name);
    long type = -1;
    if (device != NULL && PyTuple_Check(device) && PyTuple_GET_SIZE(device) == 2) {
        type = PyLong_AsLong(PyTuple_GET_ITEM(device, 0));
    }
    Py_XDECREF(device);
    PyErr_Clear();
    if (type != DL_CPU && type != DL_CUDA_HOST) {
        PyErr_Format(PyExc_NotImplementedError,
                     "%s(): %s is on DLPack device type %ld, expected memory of the CPU: the backends of this version are: cpu",
                     call->function, name, type);
        return -1;
    }
    return 0;
}

static PyObject *ask_dlpack(sa_call *call, PyObject *object)
{
    PyObject *method = PyObject_GetAttr(object, call->module->dlpack_name);
    PyObject *keywords = Py_BuildValue("{s:(ii)}", "max_version", 1, 3);
    PyObject *none = PyTuple_New(0);
    PyObject *capsule = NULL;
    if (method != NULL && keywords != NULL && none != NULL) {
        capsule = PyObject_Call(method, none, keywords);
        if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) { /* a producer from before versions */
            PyErr_Clear();
            capsule = PyObject_CallNoArgs(method);
        }
    }
    Py_XDECREF(method);
    Py_XDECREF(keywords);
    Py_XDECREF(none);
    return capsule;
}

/* Any array through its door. 1: done, 0: not an array, -1: exception. */
static int raw_of_object(sa_call *call, const char *name, PyObject *object, raw *out, sa_like *like)
{
    *like = (sa_like){.kind = SA_KIND_NUMPY, .object = object, .device = {DL_CPU, 0}};
    if (PyArray_Check(object)) {
        return raw_of_numpy(call, name, (PyArrayObject *)object, out) < 0 ? -1 : 1;
    }
    if (PyLong_Check(object) || PyFloat_Check(object) || PyList_Check(object) || PyTuple_Check(object)) {
        return 0;
    }
    like->api = exchange_api(call, object);
    if (like->api != NULL) {
        DLTensor tensor;
        like->kind = SA_KIND_EXCHANGE;
        if (refuse_gradient(call, name, object) < 0 || like->api->view_from_object(object, &tensor) < 0) {
            return -1;
        }
        like->device = tensor.device;
        return raw_of_dltensor(call, name, &tensor, false, out) < 0 ? -1 : 1;
    }
    if (!PyObject_HasAttr(object, call->module->dlpack_name)) {
        return 0;
    }
    like->kind = SA_KIND_DLPACK;
    if (refuse_gradient(call, name, object) < 0 || check_device(call, name, object) < 0) {
        return -1;
    }
    PyObject *capsule = ask_dlpack(call, object);
    if (capsule == NULL || hold(call, capsule) < 0) {
        return -1;
    }
    return raw_of_capsule(call, name, capsule, out) < 0 ? -1 : 1;
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
    raw view = {0};
    sa_like own;
    const int found = raw_of_object(call, name, object, &view, like != NULL ? like : &own);
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

/* --- auxiliary arrays ----------------------------------------------------------------------------------------------------------- */

static double real_at(const char *at, DLDataType dtype)
{
    switch (dtype.code << 8 | dtype.bits) {
    case DL_FLOAT << 8 | 64: return *(const double *)(const void *)at;
    case DL_FLOAT << 8 | 32: return (double)*(const float *)(const void *)at;
    case DL_FLOAT << 8 | 16: return (double)sa_f16_to_f32(*(const uint16_t *)(const void *)at);
    default: return (double)sa_bf16_to_f32(*(const uint16_t *)(const void *)at);
    }
}

static int64_t integer_at(const char *at, DLDataType dtype)
{
    switch (dtype.code << 8 | dtype.bits) {
    case DL_INT << 8 | 8: return *(const int8_t *)at;
    case DL_INT << 8 | 16: return *(const int16_t *)(const void *)at;
    case DL_INT << 8 | 32: return *(const int32_t *)(const void *)at;
    case DL_UINT << 8 | 8: return *(const uint8_t *)at;
    case DL_UINT << 8 | 16: return *(const uint16_t *)(const void *)at;
    case DL_UINT << 8 | 32: return *(const uint32_t *)(const void *)at;
    default: return *(const int64_t *)(const void *)at; /* uint64 above 2^63 turns negative, which every check refuses */
    }
}

static bool is_integer(DLDataType dtype)
{
    return (dtype.code == DL_INT || dtype.code == DL_UINT) && dtype.lanes == 1 && dtype.bits <= 64;
}

static bool is_real(DLDataType dtype)
{
    const bool known = (dtype.code == DL_FLOAT && (dtype.bits == 16 || dtype.bits == 32 || dtype.bits == 64)) ||
                       (dtype.code == DL_BFLOAT && dtype.bits == 16);
    return known && dtype.lanes == 1;
}

/* The raw view of an auxiliary argument; lists and NumPy scalars become arrays first. */
static int raw_of_auxiliary(sa_call *call, const char *name, PyObject *object, raw *out)
{
    sa_like like;
    int found = PyBool_Check(object) ? 0 : raw_of_object(call, name, object, out, &like);
    if (found == 0 && !PyBool_Check(object)) {
        PyObject *array = PyArray_FROM_O(object);
        if (array == NULL || hold(call, array) < 0) {
            return -1;
        }
        found = raw_of_numpy(call, name, (PyArrayObject *)array, out) < 0 ? -1 : 1;
    }
    if (found < 0) {
        return -1;
    }
    if (found == 0 || out->dtype.code == DL_BOOL || !(is_integer(out->dtype) || is_real(out->dtype)) || out->rank > 4) {
        PyErr_Format(PyExc_TypeError, "%s(): %s is %s%s, expected numbers", call->function, name,
                     found && out->dtype.code == DL_BOOL ? "a bool array: " : "", Py_TYPE(object)->tp_name);
        return -1;
    }
    return 0;
}

static int64_t element_count(const raw *view)
{
    int64_t count = 1;
    for (int axis = 0; axis < view->rank; axis++) {
        if (__builtin_mul_overflow(count, view->shape[axis], &count)) {
            return INT64_MAX / 16;
        }
    }
    return count;
}

static const char *element_at(const raw *view, int64_t index)
{
    int64_t offset = 0;
    for (int axis = view->rank - 1; axis >= 0; axis--) {
        offset += index % view->shape[axis] * view->stride[axis];
        index /= view->shape[axis];
    }
    return view->data + offset * (view->dtype.bits / 8);
}

static void *take_memory(sa_call *call, int64_t count, size_t size)
{
    void *memory = call->memory_count < SA_MAX_HELD ? PyMem_Calloc((size_t)(count > 0 ? count : 1), size) : NULL;
    if (memory == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    call->memory[call->memory_count++] = memory;
    return memory;
}

int sa_cast_floats(sa_call *call, const char *name, PyObject *object, sa_floats *out)
{
    if (object == Py_None) {
        return 0;
    }
    if (PyFloat_CheckExact(object) && call->small_float_count < SA_MAX_HELD) {
        float *place = &call->small_floats[call->small_float_count++];
        *place = (float)PyFloat_AS_DOUBLE(object);
        *out = (sa_floats){.data = place};
        return 0;
    }
    raw view = {0};
    if (raw_of_auxiliary(call, name, object, &view) < 0) {
        return -1;
    }
    const int64_t count = element_count(&view);
    float *data = take_memory(call, count, sizeof *data);
    if (data == NULL) {
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        const char *at = element_at(&view, i);
        data[i] = is_integer(view.dtype) ? (float)integer_at(at, view.dtype) : (float)real_at(at, view.dtype);
    }
    *out = (sa_floats){.data = data, .rank = view.rank};
    memcpy(out->shape, view.shape, sizeof out->shape);
    return 0;
}

int sa_cast_ints(sa_call *call, const char *name, PyObject *object, sa_ints *out)
{
    if (object == Py_None) {
        return 0;
    }
    if (PyLong_CheckExact(object) && call->small_int_count < SA_MAX_HELD) {
        int64_t *place = &call->small_ints[call->small_int_count++];
        bool given;
        *out = (sa_ints){.data = place};
        return sa_parse_int(call, name, object, place, &given);
    }
    raw view = {0};
    if (raw_of_auxiliary(call, name, object, &view) < 0) {
        return -1;
    }
    const int64_t count = element_count(&view);
    if (!is_integer(view.dtype) && count > 0) {
        PyErr_Format(PyExc_TypeError, "%s(): %s holds floating-point numbers, expected integers", call->function, name);
        return -1;
    }
    int64_t *data = take_memory(call, count, sizeof *data);
    if (data == NULL) {
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        data[i] = integer_at(element_at(&view, i), view.dtype);
    }
    *out = (sa_ints){.data = data, .rank = view.rank};
    memcpy(out->shape, view.shape, sizeof out->shape);
    return 0;
}

int sa_parse_int(sa_call *call, const char *name, PyObject *object, int64_t *out, bool *given)
{
    *given = object != Py_None;
    if (!*given) {
        return 0;
    }
    PyObject *index = PyBool_Check(object) || PyArray_IsScalar(object, Bool) ? NULL : PyNumber_Index(object);
    if (index == NULL) {
        PyErr_Format(PyExc_TypeError, "%s(): %s is %s, expected an int", call->function, name, Py_TYPE(object)->tp_name);
        return -1;
    }
    int overflow;
    const long long value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (overflow != 0) {
        PyErr_Format(PyExc_ValueError, "%s(): %s does not fit 64 bits", call->function, name);
        return -1;
    }
    *out = value;
    return 0;
}

int sa_parse_float(sa_call *call, const char *name, PyObject *object, double *out, bool *given)
{
    *given = object != Py_None;
    if (!*given) {
        return 0;
    }
    *out = PyBool_Check(object) || PyArray_IsScalar(object, Bool) ? -1.0 : PyFloat_AsDouble(object);
    if (PyBool_Check(object) || PyArray_IsScalar(object, Bool) || PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError, "%s(): %s is %s, expected a number", call->function, name, Py_TYPE(object)->tp_name);
        return -1;
    }
    return 0;
}
