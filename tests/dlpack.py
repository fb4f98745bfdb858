"""DLPack producers made by hand with ctypes, so that they can say anything."""

import ctypes

import numpy as np

FLOAT, CPU = 2, 1
_keep = []  # what a capsule points to lives as long as the process


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", Device), ("ndim", ctypes.c_int32),
                ("dtype", DataType), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


class Versioned(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", Tensor)]


class Exchange(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p),
                ("allocate", ctypes.c_void_p), ("managed_from_object", ctypes.c_void_p),
                ("managed_to_object", ctypes.c_void_p), ("view_from_object", ctypes.c_void_p),
                ("current_stream", ctypes.c_void_p)]


def new_capsule(structure, name):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    _keep.append((structure, name))
    return new(ctypes.addressof(structure), name, None)


def tensor_of(array, shape=None, strides=None):
    """A DLTensor over a NumPy array; shape and strides may lie."""
    shape = list(array.shape if shape is None else shape)
    item = array.dtype.itemsize
    counts = (ctypes.c_int64 * 16)(*shape)
    steps = None
    if strides is not False:
        steps = (ctypes.c_int64 * 16)(*([s // item for s in array.strides] if strides is None else strides))
    _keep.append((array, counts, steps))
    return Tensor(array.ctypes.data, Device(CPU, 0), len(shape), DataType(FLOAT, 8 * item, 1), counts, steps, 0)


class Producer:
    """An array of a library that has __dlpack__ alone."""

    def __init__(self, array, shape=None, strides=None, major=1, answer=None):
        self.array, self.major, self.answer = array, major, answer
        self.tensor = tensor_of(array, shape, strides)

    def __dlpack__(self, **keywords):
        if self.answer is not None:
            return self.answer
        return new_capsule(Versioned(self.major, 0, None, None, 0, self.tensor), b"dltensor_versioned")

    def __dlpack_device__(self):
        return CPU, 0


def exchange_type(view=True, allocates="yes", major=1):
    """A type with __dlpack_c_exchange_api__. allocates: "yes", "no" (an error without words), or
    "and keeps" (what it has allocated is not taken back)."""

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(Tensor), ctypes.POINTER(ctypes.POINTER(Versioned)),
                       ctypes.c_void_p, ctypes.c_void_p)
    def allocate(prototype, out, context, error):
        if allocates == "no":
            return -1
        like = prototype.contents
        array = np.zeros(tuple(like.shape[:like.ndim]), np.float32 if like.dtype.bits == 32 else np.float16)
        managed = Versioned(1, 0, None, None, 0, tensor_of(array))
        _keep.append((array, managed))
        out[0] = ctypes.pointer(managed)
        return 0

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.POINTER(Versioned)))
    def managed_from_object(value, out):
        managed = Versioned(1, 0, None, None, 0, tensor_of(value.array))
        _keep.append(managed)
        out[0] = ctypes.pointer(managed)
        return 0

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(Versioned), ctypes.POINTER(ctypes.c_void_p))
    def managed_to_object(managed, out):
        if allocates == "and keeps":
            return -1
        array = next(kept[0] for kept in reversed(_keep) if isinstance(kept, tuple) and len(kept) == 2
                     and isinstance(kept[1], Versioned)
                     and kept[0].ctypes.data == managed.contents.tensor.data)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(array))
        out[0] = id(array)
        return 0

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
    def view_from_object(value, out):
        out[0] = tensor_of(value.array)
        return 0

    def pointer(function):
        return ctypes.cast(function, ctypes.c_void_p)

    table = Exchange(major, 0, None, pointer(allocate), pointer(managed_from_object),
                     pointer(managed_to_object), pointer(view_from_object) if view else None, None)
    _keep.append((allocate, managed_from_object, managed_to_object, view_from_object))

    class Exchanged:
        __dlpack_c_exchange_api__ = new_capsule(table, b"dlpack_exchange_api")

        def __init__(self, array):
            self.array = array

    return Exchanged
