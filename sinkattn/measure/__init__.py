"""What a cache keeps, what it forgets, and what that costs: measured.

weights, kept_mask          full attention's weights, and a cache's kept positions, as arrays
attention_loss, least_loss, top_keys, sink_mass, output_error    what eviction takes from them
Probe                       wraps a cache and takes these while a stream runs through it
plant, recall, two_questions, bits        what a language model still knows, and how well it reads
FullCache                   the cache that keeps everything: the yardstick
shipped, huggingface        two models: the one in this package, and those of transformers
compare                     `python -m sinkattn measure`: policies at equal bytes

A *model* here is anything that is called with a number of rows and returns a reader: see `Reader`.
Results are plain dataclasses: `to_json()`, `from_json()`, `plot()` (which needs matplotlib).
"""

from .arrays import (
    attention_loss,
    kept_mask,
    least_loss,
    output_error,
    sink_mass,
    top_keys,
    weights,
)
from .compare import compare
from .full import FullCache
from .models import Reader, huggingface, shipped
from .plants import Plants, plant
from .probe import Probe
from .recall import recall, two_questions
from .records import Attention, Comparison, Estimate, Recall, RecallPoint, Stream, TwoQuestions
from .stream import bits

__all__ = [
    "Attention",
    "Comparison",
    "Estimate",
    "FullCache",
    "Plants",
    "Probe",
    "Reader",
    "Recall",
    "RecallPoint",
    "Stream",
    "TwoQuestions",
    "attention_loss",
    "bits",
    "compare",
    "huggingface",
    "kept_mask",
    "least_loss",
    "output_error",
    "plant",
    "recall",
    "shipped",
    "sink_mass",
    "top_keys",
    "two_questions",
    "weights",
]
