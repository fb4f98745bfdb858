"""KVCache for `generate`: every layer in a budget, with a policy that says who leaves."""

from functools import partial

import sinkattn
from sinkattn.hf.cache import StreamCache, StreamLayer, layer_types, make_stream, text_config


class _PolicyStream(sinkattn.KVCache):
    """A KVCache that can say beforehand whether it can be cropped."""

    gone = "but something has left the cache since, and what a policy evicts is gone"

    def may_crop(self, n):
        """Has nothing left since the first n tokens? The ledger's last entry of each head says."""
        return all(not head.departures or head.departures[-1][1] <= n
                   for row in self.ledger.heads for head in row)


class KVCache(StreamCache):
    """A budget of tokens in every layer, evicted by a policy, as the cache of `generate`.

    config : of the model, or the model.
    policy : a `sinkattn.policy` object; default H2O().
    budget : as of sinkattn.KVCache (an int, or a float: the share that is kept), or a list of them,
        one for each layer (`sinkattn.pyramid` makes one). Layers that slide in the model keep the
        model's own window instead.
    sinks, recent, every, chunk, track_mass, log : as of sinkattn.KVCache; log is 1 or more. A
        prompt longer than `chunk` enters in parts, and tokens leave between them; with chunk as
        long as the prompt, the policy has seen all of it before anything leaves.

    Made empty; memory is taken at the first tokens, in the dtype and on the device of the model's
    keys (what sinkattn.KVCache lacks on CUDA is refused then). Distances stay those in the text:
    the model turns its keys itself. Rows of a left-padded batch have streams of their own.
    `ledgers()` says what was forgotten.
    The model must use sinkattn's attention (`sinkattn.hf.enable`), else the first token raises.

        cache = KVCache(model.config, policy=sinkattn.policy.SnapKV(), budget=256)
        model.generate(ids, past_key_values=cache)  # cache=cache from transformers 5.24 on

    `crop`, and so assisted decoding, works while nothing has left since the tokens that are taken
    back; then it is a ValueError. NotImplementedError at construction as for SinkCache.
    """

    def __init__(self, config, policy=None, budget=1024, sinks=4, recent=64, every=1, chunk=128,
                 track_mass=True, log=256):
        config = text_config(config, "KVCache")
        kinds = layer_types(config, "KVCache")
        budgets = list(budget) if isinstance(budget, (list, tuple)) else [budget] * len(kinds)
        if len(budgets) != len(kinds):
            raise ValueError(f"KVCache(): budget has {len(budgets)} entries, expected "
                             f"{len(kinds)}: one for each layer")
        options = {"policy": policy, "sinks": sinks, "recent": recent, "every": every,
                   "chunk": chunk, "track_mass": track_mass, "log": log}
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        for own in budgets:
            sinkattn.KVCache(1, heads, 1, budget=own, **options)  # its checks of the arguments
        if log < 1:
            raise ValueError(f"KVCache(): log is {log}, expected 1 or more")
        self.policy, self.budgets = policy or sinkattn.policy.H2O(), budgets
        super().__init__([
            StreamLayer(partial(_make, budget=own, **options)) if kind == "full_attention" else
            StreamLayer(partial(make_stream, sinks=0, window=config.sliding_window),
                        window=config.sliding_window)
            for kind, own in zip(kinds, budgets)])

    def ledgers(self):
        """A `sinkattn.Ledger` for each layer; None for one that slides, or has seen nothing."""
        return [getattr(layer.stream, "ledger", None) for layer in self.layers]

    def __repr__(self):
        budgets = self.budgets if len(set(map(str, self.budgets))) > 1 else self.budgets[0]
        return (f"KVCache({len(self.layers)} layers, policy={self.policy}, budget={budgets}, "
                f"{self.get_seq_length()} tokens seen, {self.nbytes} bytes)")


def _make(batch, kv_heads, head_dim, *, dtype, device, rollback, **options):
    """rollback: spare slots of a ring; here the tokens that are held can be taken back, or not."""
    return _PolicyStream(batch, kv_heads, head_dim, dtype=dtype, device=str(device), **options)
