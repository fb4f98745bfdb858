"""Sink-aware attention and streaming KV caches.

attend      attention with pinned tokens, a window, and every kind of sink
SinkCache   a stream in bounded memory: pinned tokens and a ring of recent ones
KVCache     a stream in a budget, evicted by a policy of sinkattn.policy
Rope        rotary positions for a cache
merge       joins attention over disjoint keys
mass        the weight that each key received, beside any attention that returns lse
attend_backward   the gradients of attend

docs/semantics.md defines what is computed; `sinkattn.reference` states it in NumPy.
"""

from pkgutil import extend_path

# In a clone after `pip install .`, `python -m sinkattn` finds this folder before the installed one,
# which has the compiled core: both belong to the package.
__path__ = extend_path(__path__, __name__)

from sinkattn import policy
from sinkattn.cache import SinkCache
from sinkattn.config import __version__, get_num_threads, set_num_threads, show_config
from sinkattn.functional import attend, attend_backward, mass, merge
from sinkattn.kv_cache import KVCache, pyramid
from sinkattn.ledger import Ledger
from sinkattn.rope import Rope

__all__ = [
    "KVCache",
    "Ledger",
    "Rope",
    "SinkCache",
    "__version__",
    "attend",
    "attend_backward",
    "get_num_threads",
    "mass",
    "merge",
    "policy",
    "pyramid",
    "set_num_threads",
    "show_config",
]
