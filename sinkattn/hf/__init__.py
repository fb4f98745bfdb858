"""Hugging Face models through sinkattn's kernels, as they are.

enable           the attention implementation "sinkattn" for a model, or an error that says why not
register         makes the name known; model.set_attn_implementation("sinkattn") then works
SinkCache        a stream in bounded memory, as the cache of `generate`
KVCache          a budget of tokens, evicted by a policy, as the cache of `generate`
set_sink_logits  extra logits in the softmax's denominator, trainable if they are parameters
null_sinks       the null tokens, without spending cache slots
capture          decode steps as a CUDA graph, replayed
cache_keyword    under which name generate takes a cache: it changed in transformers 5.24

Needs torch and transformers, 5.17 up to (not including) 6. `import sinkattn` imports neither.
"""

from sinkattn.hf.versions import require

require()

from sinkattn.hf.attention import NAME, enable, register
from sinkattn.hf.cache import SinkCache
from sinkattn.hf.graphs import capture
from sinkattn.hf.policy_cache import KVCache
from sinkattn.hf.sinks import cache_keyword, null_sinks, set_sink_logits

__all__ = ["KVCache", "NAME", "SinkCache", "cache_keyword", "capture",
           "enable", "null_sinks", "register", "set_sink_logits"]
