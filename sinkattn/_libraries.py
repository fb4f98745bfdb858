"""What the C core asks of array libraries that have no DLPack exchange table (CuPy, Numba, JAX, old
torch). Never on the way of a torch call: torch has the table since 2.10."""

import contextlib
import sys

_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # typestr kind -> DLPack type code


def _library(array):
    return type(array).__module__.partition(".")[0]


def stream(array, device):
    """The stream that the library works on now, as an int; None if it does not tell: a call then
    runs on the default stream and waits for the end, since nobody else could."""
    library = _library(array)
    if library == "torch":
        return sys.modules["torch"].cuda.current_stream(device).cuda_stream
    if library == "cupy":
        return sys.modules["cupy"].cuda.get_current_stream(device).ptr
    if library == "numba":
        return array.__cuda_array_interface__.get("stream") or 0
    return None


def empty(array, shape, dtype):
    """A new array like `array` on its device, from its library's own allocator; None if there is
    no way to ask. dtype None: that of `array`."""
    library = _library(array)
    if library == "torch":
        torch = sys.modules["torch"]
        return array.new_empty(shape, dtype=dtype and getattr(torch, dtype))
    if library == "cupy":
        with getattr(array, "device", contextlib.nullcontext()):
            return sys.modules["cupy"].empty(shape, dtype=dtype or array.dtype)
    return None


def take(array, result):
    """A finished result of the core (DLPack, __cuda_array_interface__) as an array of the library
    of `array`; as it is where the library has no door."""
    library = _library(array)
    if library == "numba":
        return sys.modules["numba"].cuda.as_cuda_array(result)
    if library in ("jax", "jaxlib"):
        return sys.modules["jax"].dlpack.from_dlpack(result)
    space = getattr(array, "__array_namespace__", None)
    space = space() if space is not None else sys.modules.get(library)
    convert = getattr(space, "from_dlpack", None)
    return result if convert is None else convert(result)


def interface(array):
    """__cuda_array_interface__ as (address, read-only, shape, strides in elements, type code,
    bits, stream or None). ValueError with the reason where it cannot be read."""
    facts = array.__cuda_array_interface__
    if facts.get("mask") is not None:
        raise ValueError("it has a mask")
    order, kind, size = facts["typestr"][0], facts["typestr"][1], int(facts["typestr"][2:])
    if kind not in _CODES or (order == ">" and size > 1):
        raise ValueError(f"its typestr is {facts['typestr']}")
    shape, strides = tuple(facts["shape"]), facts.get("strides")
    if strides is None:
        strides, dense = [], size
        for extent in reversed(shape):
            strides.insert(0, dense)
            dense *= extent
    if any(stride % size for stride in strides):
        raise ValueError("it has a stride that is no multiple of its item size")
    address, readonly = facts["data"]
    return (address or 0, bool(readonly), shape, tuple(stride // size for stride in strides),
            _CODES[kind], 8 * size, facts.get("stream"))
