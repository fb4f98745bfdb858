"""The suite on CUDA: wrappers that take and give NumPy arrays (or torch tensors of the CPU) and run
`attend`, `attend_backward`, `mass`, `merge` and the caches on torch tensors of the device. The tests stay as they are."""

import numpy as np

import sinkattn
from sinkattn.config import cuda_devices

TENSORS = ("q", "k", "v", "sink_q", "sink_kv", "out", "lse", "dlse")


def has_cuda():
    if cuda_devices()[0] == 0:
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _is_bfloat16(array):
    return array.dtype.name == "bfloat16"


def _spanned(array):
    """The memory that an array without negative strides reaches, as one dense array."""
    if array.size == 0 or array.ndim == 0:
        return array.reshape(-1)
    last = sum((extent - 1) * stride for extent, stride in zip(array.shape, array.strides))
    return np.lib.stride_tricks.as_strided(array[(slice(1),) * array.ndim],
                                           (last // array.itemsize + 1,), (array.itemsize,))


def to_device(array):
    """A torch tensor on the device with the same elements and strides; what torch cannot hold, or
    cannot stride (backwards), stays or becomes dense."""
    import torch
    if isinstance(array, torch.Tensor):
        return array.cuda()
    if not isinstance(array, np.ndarray):
        return array
    bfloat16 = _is_bfloat16(array)
    if not bfloat16 and (array.dtype.kind not in "biufc" or not array.dtype.isnative):
        return array
    view = array.view(np.int16) if bfloat16 else array
    if any(s < 0 or s % array.itemsize for s in view.strides):
        view = np.ascontiguousarray(view)
    try:
        tensor = torch.from_numpy(_spanned(view).copy()).cuda()
    except TypeError:
        return array
    tensor = tensor.view(torch.bfloat16) if bfloat16 else tensor
    return torch.as_strided(tensor, view.shape, [s // view.itemsize for s in view.strides])


def to_host(result, like):
    """What came from the device, of the kind that went in."""
    import torch
    if isinstance(result, dict):
        return {name: to_host(x, like) for name, x in result.items()}
    if isinstance(result, tuple):
        return tuple(to_host(x, like) for x in result)
    if isinstance(like, torch.Tensor):
        return result.cpu()
    if result.dtype == torch.bfloat16:
        import ml_dtypes
        return result.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return result.cpu().numpy()


def _write_back(tensor, array):
    """The whole memory that `array` reaches, so that what a call wrote outside is seen."""
    import torch
    target = _spanned(array)
    whole = torch.as_strided(tensor, target.shape, (1,), 0)
    bits = {2: torch.int16, 4: torch.int32}[array.itemsize]
    target.view(f"i{array.itemsize}")[...] = whole.view(bits).cpu().numpy()


def _move(name, value, numbers):
    if name == "sink_kv" and isinstance(value, (tuple, list)):
        return tuple(to_device(x) for x in value)
    if name in TENSORS:
        return to_device(value)
    if numbers and isinstance(value, (np.ndarray, list)):
        return to_device(np.asarray(value))
    return value


def _run(function, q, k, v, numbers, keywords):
    moved = {name: _move(name, value, numbers) for name, value in keywords.items()}
    result = function(*(to_device(x) for x in (q, k, v)), **moved)
    if (out := keywords.get("out")) is None:
        return to_host(result, q)
    _write_back(moved["out"], out)
    rest = result[1:] if isinstance(result, tuple) else ()
    return (out, *(to_host(x, q) for x in rest)) if rest else out


def wrappers(numbers):
    """attend, attend_backward, mass, merge and the caches for the device; `numbers`: auxiliary arrays go there too."""
    attend_there, merge_there = sinkattn.attend, sinkattn.merge
    backward_there, mass_there = sinkattn.attend_backward, sinkattn.mass

    def attend(q, k, v, **keywords):
        return _run(attend_there, q, k, v, numbers, keywords)

    def attend_backward(dout, q, k, v, out, lse, **keywords):
        moved = {name: _move(name, x, numbers) for name, x in keywords.items()}
        return to_host(backward_there(*(to_device(x) for x in (dout, q, k, v, out, lse)), **moved), q)

    def mass(q, k, lse, **keywords):
        moved = {name: _move(name, x, numbers) for name, x in keywords.items()}
        return to_host(mass_there(to_device(q), to_device(k), to_device(lse) if numbers else lse, **moved), q)

    def merge(outs, lses):
        return to_host(merge_there([to_device(x) for x in outs], [to_device(x) for x in lses]), outs[0])

    def cache_of(there):
        class Cache:
            def __init__(self, *arguments, **keywords):
                self._cache = there(*arguments, **{"device": "cuda", **keywords})

            def attend(self, q, k, v, **keywords):
                return _run(self._cache.attend, q, k, v, numbers, keywords)

            def copy(self):
                twin = object.__new__(Cache)
                twin._cache = self._cache.copy()
                return twin

            def __deepcopy__(self, memo):
                return self.copy()

            def __reduce__(self):
                return self._cache.__reduce__()

            def __getattr__(self, name):
                return getattr(self._cache, name)

        return Cache

    return {"attend": attend, "attend_backward": attend_backward, "mass": mass, "merge": merge,
            "SinkCache": cache_of(sinkattn.SinkCache), "KVCache": cache_of(sinkattn.KVCache)}
