"""What a cache of ours returns in the place of keys."""

import torch


class Handle(torch.Tensor):
    """The new keys of a layer, to be opened by our attention function alone.

    The ring is attended in place, so there is no tensor of all keys to return. Any other attention
    would silently see the new chunk only: every operation on a Handle raises.

    raw : the keys as they came. layer : the cache layer that will append and attend them.
    """

    _READABLE = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
    _METHODS = ("size", "dim", "numel", "ndimension", "is_floating_point", "__len__")

    def __new__(cls, keys, layer):
        handle = torch.Tensor._make_subclass(cls, keys)
        handle.raw, handle.layer = keys, layer
        return handle

    def open(self):
        """(keys, layer), once: a second reader would append the chunk a second time."""
        keys, layer, self.raw, self.layer = self.raw, self.layer, None, None
        if layer is None:
            raise NotImplementedError("sinkattn.hf: the keys of one cache entry are attended "
                                      "twice, by two layers (KV sharing) or by one: our cache "
                                      "appends and attends at once")
        return keys, layer

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "__get__":
            name = getattr(getattr(function, "__self__", None), "__name__", "")
            allowed = name in cls._READABLE
        else:
            name = getattr(function, "__name__", str(function))
            allowed = name in cls._METHODS
        if not allowed:
            raise NotImplementedError(
                f"sinkattn.hf: '{name}' was called on keys that live in our cache. Either the "
                "model does not use the attention implementation 'sinkattn' "
                "(sinkattn.hf.enable(model)), or it works on cached keys itself (latent "
                "attention), which our cache does not support")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))
