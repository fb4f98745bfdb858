"""sinkattn::cache_attend: one step of a SinkCache as an operator, and a SinkCache that a compiler
can step through.

A step changes the cache. A handle to a hidden object would hide that from torch, which is then free
to drop a step whose result is not used, to run one twice, or to order two as it likes. So all that
changes (keys, values, lengths, where each ring begins) lies in one tensor that the operator
declares to write, and the rest is configuration: a step is a function of its arguments, a copy of
the tensor is a copy of the cache, and torch's own checks (opcheck) hold without exception. Torch
may run the operator on a copy and copy back; inductor sees that it need not, and steps in place.
"""

import torch

import sinkattn
from sinkattn.cache import core_of

from . import arguments, schema
from .arguments import array, check_tensor, number, truth
from .schema import library


def kernel(storage, q, k, v, numbers, dtype, inv_freq, attention_scaling, interleaved, applied,
           slot, new_lengths=None, sink_logits=None, sink_bias=None, sink_k=None, sink_v=None,
           scale=None, softcap=None, alibi_slopes=None, return_mass=False):
    frequencies = b"" if inv_freq is None else inv_freq.numpy().tobytes()
    core = core_of((*numbers, dtype, frequencies, attention_scaling, interleaved, applied, slot),
                   storage.device.index if storage.is_cuda else None, storage, keep=True)
    pair = None if sink_k is None and sink_v is None else (sink_k, sink_v)
    results = core.attend(q, k, v, new_lengths, sink_logits, sink_bias, pair, scale, softcap,
                          alibi_slopes, None, True, return_mass)
    torch.autograd.graph.increment_version(storage)
    return results if return_mass else (*results, results[1].new_empty(0))


library.impl("cache_attend", kernel, "CPU")
library.impl("cache_attend", kernel, "CUDA")


@torch.library.register_fake("sinkattn::cache_attend", lib=library)
def shapes(storage, q, k, v, numbers, *rest):
    asked = len(rest) == len(schema.names_of(schema.cache_attend)) - 5 and rest[-1]
    sinks, window, rollback = numbers[4:]
    mass = (q.shape[0], k.shape[1], sinks + window + rollback) if asked else (0,)
    return (q.new_empty((*q.shape[:3], v.shape[3])),
            q.new_empty(q.shape[:3], dtype=torch.float32),
            q.new_empty(mass, dtype=torch.float32))


def refuse_gradients(keyset, *given):
    """Above the kernels: what was evicted cannot be differentiated."""
    if torch.is_grad_enabled():
        for name, value in zip(schema.names_of(schema.cache_attend), given):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise NotImplementedError(
                    f"SinkCache.attend(): {name} requires grad, and a cache has no gradients: call "
                    f"under torch.no_grad(), or pass {name}.detach()")
    with torch._C._AutoDispatchBelowAutograd():
        return schema.cache_attend.redispatch(keyset & torch._C._after_autograd_keyset, *given)


library.impl("cache_attend", refuse_gradients, "Autograd", with_keyset=True)


class SinkCache(sinkattn.SinkCache):
    """`sinkattn.SinkCache` in a torch tensor, whose `attend` compiles without a graph break.

    Arguments and methods are those of `sinkattn.SinkCache`. storage : uint8 tensor on `device`,
    made here by default. Under torch.compile a step is torch.ops.sinkattn.cache_attend, which
    declares that it changes the storage; outside it is the same direct call as before, at the same
    cost. `reset`, `reorder`, `crop`, `length`, `kept` and `state_dict` are for outside.

    >>> import torch
    >>> cache = SinkCache(1, 2, 16, sinks=2, window=6)
    >>> step = torch.compile(lambda x: cache.attend(x, x, x), fullgraph=True, backend="aot_eager")
    >>> [step(torch.ones(1, 2, 1, 16)).shape[2] for _ in range(9)], cache.kept()[0].tolist()
    ([1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 3, 4, 5, 6, 7, 8])
    """

    def __init__(self, batch, kv_heads, head_dim, *, v_head_dim=None, sinks=4, window=1020,
                 dtype="float32", device="cpu", rope=None, positions="slot", rollback=0,
                 storage=None):
        described = sinkattn.SinkCache(0, kv_heads, head_dim, v_head_dim=v_head_dim, sinks=sinks,
                                       window=window, dtype=dtype, rope=rope, positions=positions,
                                       rollback=rollback)
        if storage is None:
            storage = torch.zeros(described._storage_bytes(batch), dtype=torch.uint8, device=device)
        super().__init__(batch, kv_heads, head_dim, v_head_dim=v_head_dim, sinks=sinks,
                         window=window, dtype=dtype, device=device, rope=rope, positions=positions,
                         rollback=rollback, storage=storage)
        self.storage = storage
        self._schema_config = (
            list(self._numbers.values()), self._dtype,
            None if rope is None else torch.tensor(rope.inv_freq), *self._config()[-4:])

    def attend(self, q, k, v, *, new_lengths=None, sink_logits=None, sink_bias=None, sink_kv=None,
               scale=None, softcap=None, alibi_slopes=None, out=None, return_lse=False,
               return_mass=False):
        """As `sinkattn.SinkCache.attend`."""
        if not torch.compiler.is_compiling():
            return super().attend(
                q, k, v, new_lengths=new_lengths, sink_logits=sink_logits, sink_bias=sink_bias,
                sink_kv=sink_kv, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, out=out,
                return_lse=return_lse, return_mass=return_mass)
        where = "SinkCache.attend():"
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_tensor(f"{where} {name}", tensor)
        results = schema.cache_attend(
            self.storage, q, k, v, *self._schema_config,
            array(f"{where} new_lengths", new_lengths), array(f"{where} sink_logits", sink_logits),
            array(f"{where} sink_bias", sink_bias), *arguments.pair(f"{where} sink_kv", sink_kv),
            number(f"{where} scale", scale), number(f"{where} softcap", softcap),
            array(f"{where} alibi_slopes", alibi_slopes),
            truth(f"{where} return_mass", return_mass))
        first = results[0] if out is None else arguments.written(f"{where} out", out, results[0], q)
        return arguments.chosen(first, *results[1:], truth(f"{where} return_lse", return_lse),
                                return_mass)

    def copy(self):
        """A cache of its own with the same content, in a tensor of its own."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, storage=self.storage.clone())
        twin._core = core_of(self._config(), self._ordinal, twin.storage, keep=True)
        return twin

    __copy__ = copy
