"""KVCache: a stream in a budget, with a policy that says who leaves."""

import numpy as np

from sinkattn import _core
from sinkattn.cache import (
    CoreCache,
    check_described,
    cuda_memory,
    cuda_ordinal,
    describe_rope,
    dtype_name,
    field,
    integer,
)
from sinkattn.ledger import Ledger, head_ledger
from sinkattn.policy import H2O, Custom, ExpectedAttention, Policy, number
from sinkattn.rope import Rope

_STATE_VERSION = 1
_PARTS = ("keys", "values", "token_positions", "token_states", "held", "length", "evicted_at",
          "ledger", "departures", "statistics")


class KVCache(CoreCache):
    """Keys and values of a stream in a budget of tokens, evicted by a policy.

    batch, kv_heads, head_dim, v_head_dim : int. v_head_dim defaults to head_dim.
    policy : an object of `sinkattn.policy`, default H2O(); the tokens with its lowest scores leave.
    budget : int, tokens that each kv head of each row keeps; an int array [kv_heads], one for each
        head, which then has no more slots than that; or a float, the share of the tokens seen that
        is kept (memory then grows with the stream). At least sinks + recent.
    sinks, recent : int >= 0. The first and the last so many tokens never leave.
    every : int >= 1. Tokens leave whenever the number of tokens seen is a multiple of it; in
        between up to every - 1 more than the budget are held, and have their slots.
    chunk : int >= 1. A longer call is cut into parts of so many tokens, and tokens leave between
        them, so that no more than budget + every - 1 + chunk are ever there.
    dtype, device : as of SinkCache. On CUDA a call and its eviction are kernels on the caller's
        stream, with fixed shapes, so that a captured step replays; what tells what is held
        (`length`, `kept()`, `ledger`, `crop`, `state_dict`) waits for the stream. There each kv
        head of a row has the slots of the largest budget and room for `chunk` more, and these are
        refused by name: ExpectedAttention and Custom, a float budget, positions="slot" with a
        rope, and ALiBi.
    rope, positions : as of SinkCache. "original" keeps distances in the text. "slot" counts the
        tokens that are held: it needs raw keys (`applied=False`), which are turned for each call.
    track_mass : bool. The ledger knows the mass of what left; it costs a policy that needs no mass
        the pass that finds it. False: such a policy's ledger says nothing of mass.
    log : int >= 0, evictions that the ledger lists one by one, for each kv head of each row.

    The queries of a call (of each part, if it is longer than `chunk`) see what is held and,
    causally, each other. Then the policy learns from them, and tokens leave. Memory is constant
    from construction, but for a float budget. A failed call leaves the cache as it was: a call of
    several parts on a cache that is not empty keeps a copy of it until it has succeeded. Use one
    cache from one thread at a time.

    >>> import numpy as np
    >>> cache = KVCache(1, 2, 16, budget=8, sinks=2, recent=4)
    >>> x = np.ones((1, 2, 20, 16), np.float32)
    >>> cache.attend(x, x, x).shape, cache.kept()[0][1].tolist()
    ((1, 2, 20, 16), [0, 1, 2, 3, 16, 17, 18, 19])
    """

    _name = "KVCache"

    def __init__(self, batch, kv_heads, head_dim, *, policy=None, budget=1024, sinks=4, recent=64,
                 every=1, chunk=128, v_head_dim=None, dtype="float32", device="cpu", rope=None,
                 positions="original", track_mass=True, log=64):
        policy = H2O() if policy is None else policy
        if not isinstance(policy, Policy):
            raise TypeError(f"KVCache(): policy is {type(policy).__name__}, expected a policy, as "
                            "H2O()")
        ordinal = cuda_ordinal(device, "KVCache")
        if positions not in ("slot", "original"):
            raise ValueError(
                f"KVCache(): positions is {positions!r}, expected 'slot' or 'original'")
        if rope is not None and not isinstance(rope, Rope):
            raise TypeError(f"KVCache(): rope is {type(rope).__name__}, expected a Rope or None")
        if positions == "slot" and rope is not None and rope.applied:
            raise NotImplementedError("KVCache(): positions='slot' with a rope that is applied; it "
                                      "needs raw keys: applied=False")
        if positions == "slot" and rope is not None and isinstance(policy, ExpectedAttention):
            raise NotImplementedError("KVCache(): positions='slot' with a rope and "
                                      "ExpectedAttention; it needs positions='original'")
        if not isinstance(track_mass, (bool, np.bool_)):
            raise TypeError(
                f"KVCache(): track_mass is {type(track_mass).__name__}, expected a bool")
        numbers = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim,
                   "v_head_dim": head_dim if v_head_dim is None else v_head_dim, "sinks": sinks,
                   "recent": recent, "every": every, "chunk": chunk, "log": log}
        self._numbers = {name: integer(name, value, "KVCache") for name, value in numbers.items()}
        self._policy, self._rope, self._positions = policy, rope, positions
        self._dtype, self._track = dtype_name(dtype, "KVCache"), bool(track_mass)
        self._budget, self._share = self._budgets(budget)
        if ordinal is not None:
            self._refuse_on_cuda()
        config = (
            *self._numbers.values(), self._budget.tobytes(), self._share, policy._described(),
            self._track, self._dtype, b"" if rope is None else rope.inv_freq.tobytes(),
            1.0 if rope is None else rope.attention_scaling,
            rope is not None and rope.interleaved, rope is not None and rope.applied,
            positions == "slot")
        self._ordinal = ordinal
        self._core = _core.KVCache(*config) if ordinal is None else _core.CudaKVCache(
            *config, ordinal, lambda size, first: cuda_memory(size, ordinal))

    def _refuse_on_cuda(self):
        """NotImplementedError for what the kernels of CUDA lack."""
        if isinstance(self._policy, (ExpectedAttention, Custom)):
            raise NotImplementedError(f"KVCache(): policy {type(self._policy).__name__} on CUDA; "
                                      "the backends that have it: cpu")
        if self._share:
            raise NotImplementedError("KVCache(): budget is a share on CUDA, where memory does not "
                                      "grow; the backends that have it: cpu")
        if self._positions == "slot" and self._rope is not None:
            raise NotImplementedError("KVCache(): positions='slot' with a rope on CUDA; the "
                                      "backends that have it: cpu")

    def _host(self, vectors=False):
        """The core's cache on the host: of CUDA a snapshot, with keys and values or without."""
        return self._core if self._ordinal is None else self._core.snapshot(vectors)

    def _budgets(self, budget):
        """(int64 [kv_heads], share or 0) of what the caller said."""
        heads = max(min(self._numbers["kv_heads"], 2**20), 0)
        if isinstance(budget, (float, np.floating)):
            if not 0 < budget <= 1:
                raise ValueError(f"KVCache(): budget is {budget}, expected an int, an int array "
                                 "[kv_heads], or a share above 0 and up to 1")
            recent = max(self._numbers["recent"], self._policy.protects)
            least = max(self._numbers["sinks"] + recent, 1)
            return np.full(heads, least, np.int64), float(budget)
        if np.ndim(budget) == 0:
            return np.full(heads, integer("budget", budget, "KVCache"), np.int64), 0.0
        array = np.asarray(budget)
        if array.dtype.kind not in "iu":
            raise TypeError(f"KVCache(): budget has dtype {array.dtype}, expected integers")
        if array.shape != (self._numbers["kv_heads"],):
            raise ValueError(f"KVCache(): budget has shape {list(array.shape)}, expected "
                             f"[{self._numbers['kv_heads']}] (kv_heads)")
        return array.astype(np.int64), 0.0

    def attend(self, q, k, v, *, new_lengths=None, sink_logits=None, sink_bias=None, sink_kv=None,
               scale=None, softcap=None, alibi_slopes=None, out=None, return_lse=False,
               return_mass=False):
        """Attends a chunk to what is held and to itself, teaches the policy, evicts: one call.

        q : [batch, heads_q, tokens, head_dim]; k, v : [batch, kv_heads, tokens, head_dim] and
            [..., v_head_dim], dtype of the cache. Causal inside the chunk; any number of tokens.
        new_lengths : int [batch], the first so many tokens of a row are real; the rest of its
            output is 0.
        The other arguments are those of `sinkattn.attend`.

        Returns out [batch, heads_q, tokens, v_head_dim], of the kind and dtype of q; with
        return_lse also lse; with return_mass also mass [batch, kv_heads, slots] float32: what the
        tokens held after the call received in it, in the order of `kept()`, zero beyond.
        """
        return self._core.attend(q, k, v, new_lengths, sink_logits, sink_bias, sink_kv, scale,
                                 softcap, alibi_slopes, out, return_lse, return_mass,
                                 getattr(self._policy, "fn", None))

    @property
    def policy(self):
        return self._policy

    @property
    def length(self):
        """Tokens seen, int64 [batch]."""
        return np.frombuffer(self._core.lengths, np.int64).copy()

    @property
    def nbytes(self):
        """Bytes of keys, values, positions, what the policy remembers, and the ledger."""
        return self._core.nbytes

    def kept(self):
        """The positions held, ascending: for each row a list of int64 arrays, one a kv head."""
        return self._kept(self._host())

    def _kept(self, core):
        n = self._numbers
        return [[np.frombuffer(core.kept(row, head), np.int64).copy()
                 for head in range(n["kv_heads"])] for row in range(n["batch"])]

    @property
    def ledger(self):
        """What was seen, kept and forgotten, and what it had been worth: a `Ledger` of this moment.

        kept + evicted = seen for every row and kv head. Its memory does not grow with the stream:
        totals, a histogram, and the last `log` evictions one by one.
        """
        tracked = self._track or type(self._policy)._needs_mass
        core = self._host()
        lengths = np.frombuffer(core.lengths, np.int64)
        return Ledger(self.nbytes, [
            [head_ledger(int(seen), positions, self._numbers_of(core, row, head), tracked)
             for head, positions in enumerate(heads)]
            for row, (seen, heads) in enumerate(zip(lengths, self._kept(core)))])

    def _numbers_of(self, core, row, head):
        """What the core keeps for a head; its bytes are those of the device where the slots are."""
        numbers = core.ledger(row, head)
        return numbers if self._ordinal is None else (*numbers[:-1], self._core.head_bytes)

    def crop(self, n):
        """Forgets all but the first n tokens of every row.

        ValueError where something has left since, for what the first n tokens would still hold is
        then gone. The mass that the cropped queries gave to earlier tokens stays counted.
        """
        self._core.crop(n)

    def _described(self):
        """The construction as NumPy scalars: what a state must have in common with a cache."""
        return {
            "version": np.int64(_STATE_VERSION),
            **{name: np.int64(value) for name, value in self._numbers.items()},
            "policy": np.str_(repr(self._policy)),
            "budget": self._budget,
            "share": np.float64(self._share),
            "track_mass": np.bool_(self._track),
            "dtype": np.str_(self._dtype),
            "positions": np.str_(self._positions),
            **describe_rope(self._rope),
        }

    def state_dict(self):
        """NumPy arrays and a version: fit for np.savez, no pickle. The blocks of the core are kept
        as bytes (uint8); `slots` says how many of them each kv head has."""
        state = self._described()
        core = self._host(vectors=True)
        state["slots"] = np.frombuffer(core.slots, np.int64).copy()
        for name, data in zip(_PARTS, core.save()):
            state[name] = np.frombuffer(data, np.uint8).copy()
        return state

    def load_state_dict(self, state):
        """Resumes what `state_dict` saved, in a cache constructed alike. Every field is checked;
        a refused state leaves the cache as it was."""
        check_described(state, self._described())
        slots = field(state, "slots", (self._numbers["kv_heads"],), np.dtype(np.int64))
        parts = [field(state, name, np.shape(state.get(name, ())), np.dtype(np.uint8))
                 for name in _PARTS]
        self._core.load(np.ascontiguousarray(slots).tobytes(),
                        *[np.ascontiguousarray(part).tobytes() for part in parts])

    def __repr__(self):
        n = self._numbers
        budget = self._share or self._budget.tolist()
        if not self._share and len(set(budget)) == 1:
            budget = budget[0]
        return (f"KVCache(batch={n['batch']}, kv_heads={n['kv_heads']}, head_dim={n['head_dim']}, "
                f"policy={self._policy!r}, budget={budget}, sinks={n['sinks']}, "
                f"recent={n['recent']}, every={n['every']}, dtype={self._dtype}, "
                f"positions={self._positions}, "
                f"device={'cpu' if self._ordinal is None else f'cuda:{self._ordinal}'}, "
                f"{self.nbytes} bytes)")


def pyramid(layers, budget, *, beta=20.0, reserved=0):
    """Budgets for the layers of a model that fall from the first to the last: a list of ints.

    They sum to layers * budget. What lies above `reserved` (sinks + recent, which every layer
    needs) falls linearly to 1 / beta of its mean; beta=1 gives every layer the same. Source: Cai
    et al., "PyramidKV", arXiv 2406.02069 (beta 20).
    """
    layers, budget = integer("layers", layers, "pyramid"), integer("budget", budget, "pyramid")
    reserved, beta = integer("reserved", reserved, "pyramid"), number("beta", beta, "pyramid")
    if layers < 1 or reserved < 0 or budget < reserved:
        raise ValueError(f"pyramid(): layers is {layers}, budget {budget} and reserved {reserved}, "
                         "expected at least 1 layer and budget >= reserved >= 0")
    if beta < 1:
        raise ValueError(f"pyramid(): beta is {beta}, expected at least 1")
    mean = budget - reserved
    least = mean / beta
    exact = [2 * mean - least - 2 * (mean - least) * layer / max(layers - 1, 1)
             for layer in range(layers)] if layers > 1 else [float(mean)]
    down = [int(x) for x in exact]
    short = layers * mean - sum(down)
    first = sorted(range(layers), key=lambda layer: (down[layer] - exact[layer], layer))[:short]
    return [reserved + x + (layer in first) for layer, x in enumerate(down)]
