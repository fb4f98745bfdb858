"""Sink-aware attention and streaming KV caches.

attend      attention with pinned tokens, a window, and every kind of sink
SinkCache   a stream in bounded memory: pinned tokens and a ring of recent ones
Rope        rotary positions for a cache
merge       joins attention over disjoint keys

docs/semantics.md defines what is computed; `sinkattn.reference` states it in NumPy.
"""

from pkgutil import extend_path

# In a clone after `pip install .`, `python -m sinkattn` finds this folder before the installed one,
# which has the compiled core: both belong to the package.
__path__ = extend_path(__path__, __name__)

from sinkattn.cache import SinkCache
from sinkattn.config import __version__, get_num_threads, set_num_threads, show_config
from sinkattn.functional import attend, merge
from sinkattn.kv_cache import KVCache
from sinkattn.ledger import Ledger
from sinkattn.policy import (
    CUR,
    H2O,
    H2OEMA,
    TOVA,
    Custom,
    H2ONorm,
    KeyDiff,
    KNorm,
    Random,
    Scissorhands,
    SinkWindow,
    SnapKV,
    VLengthH2O,
    pyramid,
)
from sinkattn.rope import Rope

__all__ = [
    "CUR",
    "H2O",
    "H2OEMA",
    "TOVA",
    "Custom",
    "H2ONorm",
    "KNorm",
    "KVCache",
    "KeyDiff",
    "Ledger",
    "Random",
    "Rope",
    "Scissorhands",
    "SinkCache",
    "SinkWindow",
    "SnapKV",
    "VLengthH2O",
    "__version__",
    "attend",
    "get_num_threads",
    "merge",
    "pyramid",
    "set_num_threads",
    "show_config",
]
