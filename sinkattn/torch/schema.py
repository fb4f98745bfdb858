"""The operators as torch sees them: names, arguments, and which of these have gradients.

Every operator takes all its arguments by position: torch's path for keywords costs as much as a
tiny call. Optional pairs are two tensors, and `window` is a number (`window`) or one for each head
(`windows`), since a schema has no word for either.
"""

import torch

library = torch.library.Library("sinkattn", "DEF")

# What a call of attend says beside q, k and v, and its gradient must be told again.
_KEYWORDS = (
    "bool causal=True, SymInt? window=None, Tensor? windows=None, SymInt sinks=0, "
    "Tensor? sink_logits=None, Tensor? sink_bias=None, Tensor? sink_q=None, Tensor? sink_k=None, "
    "Tensor? sink_v=None, float? scale=None, float? softcap=None, Tensor? alibi_slopes=None, "
    "Tensor? starts=None, Tensor? lengths=None, Tensor? q_lengths=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None")

library.define(
    f"attend(Tensor q, Tensor k, Tensor v, {_KEYWORDS}, bool return_mass=False, "
    "str mass_reduce='sum', SymInt? mass_queries=None) -> (Tensor out, Tensor lse, Tensor mass)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))

library.define(
    f"attend_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_KEYWORDS}, bool deterministic=True) -> (Tensor dq, Tensor dk, Tensor dv, "
    "Tensor dsink_logits, Tensor dsink_bias, Tensor dsink_q, Tensor dsink_k, Tensor dsink_v)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))

# The state of the cache is all in `storage`, and it is what changes; see cache.py.
library.define(
    "cache_attend(Tensor(a!) storage, Tensor q, Tensor k, Tensor v, SymInt[] numbers, str dtype, "
    "Tensor? inv_freq, float attention_scaling, bool interleaved, bool applied, bool slot, "
    "Tensor? new_lengths=None, Tensor? sink_logits=None, Tensor? sink_bias=None, "
    "Tensor? sink_k=None, Tensor? sink_v=None, float? scale=None, float? softcap=None, "
    "Tensor? alibi_slopes=None, bool return_mass=False) "
    "-> (Tensor out, Tensor lse, Tensor mass)",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))

attend = torch.ops.sinkattn.attend.default
attend_backward = torch.ops.sinkattn.attend_backward.default
cache_attend = torch.ops.sinkattn.cache_attend.default

KEYWORDS = tuple(word.split()[1].partition("=")[0] for word in _KEYWORDS.split(", "))
DIFFERENTIABLE = ("q", "k", "v", "sink_logits", "sink_bias", "sink_q", "sink_k", "sink_v")


def names_of(operator):
    return tuple(argument.name for argument in operator._schema.arguments)


def bind(operator, arguments):
    """{name: value}, the defaults filled in: the dispatcher leaves out what equals them."""
    values = {argument.name: argument.default_value if argument.has_default_value() else None
              for argument in operator._schema.arguments}
    values.update(zip(values, arguments))
    return values
