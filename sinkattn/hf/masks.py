"""The mask function: no mask is made. A small object says what it would have shown.

transformers hands a mask function the pattern (nested functions of its own), the sizes, and the
2-D padding mask; what it returns reaches the attention function untouched, one object for each kind
of layer and forward pass.
"""

from dataclasses import dataclass

import torch
from transformers import masking_utils


@dataclass
class Pattern:
    """What a mask function of transformers shows."""
    causal: bool = False
    window: int | None = None           # as in attend: the query counts
    sequences: torch.Tensor | None = None  # [batch, tokens], packed sequences by number


class Mask:
    """What the queries of one forward pass see, in coordinates of the keys that the cache returns.

    causal, window : as in attend.
    offset : column of the first query, an int; a tensor under a static cache of another device.
    queries, keys : lengths. Keys behind the last query's column are slots not yet written.
    columns : bool [batch, keys] or None, those that hold a token; None where all are known to.
    starts, ends : int64 [batch] or None, the same by row.
    sequences : int64 [batch, keys] or None, packed sequences by number.
    """

    ndim, shape = 0, ()  # what generate() and transformers' mask code ask of a mask made before

    def __init__(self, pattern, batch, queries, keys, offset, columns=None):
        self.causal, self.window, self.sequences = (pattern.causal, pattern.window,
                                                    pattern.sequences)
        self.batch, self.queries, self.keys, self.offset = batch, queries, keys, offset
        self.columns = None
        if columns is not None:
            self.columns = padded_columns(columns, None if isinstance(offset, torch.Tensor)
                                          else offset + queries if self.causal else keys)
        self._bounds = self._keywords = self._rows = None  # made when asked for

    def __getattr__(self, name):
        raise AttributeError(f"sinkattn: '{name}' of a mask: the model works on masks itself, and "
                             "ours are no tensors; use another attention implementation")

    def __getitem__(self, index):
        raise NotImplementedError("sinkattn: an index into a mask: the model works on masks "
                                  "itself, and ours are no tensors; use another attention "
                                  "implementation")

    def contiguous(self):
        return self

    def clone(self, *_, **__):
        return self

    def to(self, *_, **__):
        return self

    @property
    def key_count(self):
        """Keys that any query sees, where the host knows it; else None."""
        if not self.causal:
            return self.keys
        return None if isinstance(self.offset, torch.Tensor) else self.offset + self.queries

    @property
    def starts(self):
        return self.bounds()[0]

    @property
    def ends(self):
        return self.bounds()[1]

    def bounds(self):
        if self._bounds is None:
            self._bounds = (None, None) if self.columns is None else ends_of(self.columns)
        return self._bounds

    @property
    def keywords(self):
        """Of attend."""
        if self._keywords is None:
            self._keywords = self._make_keywords()
        return self._keywords

    def _make_keywords(self):
        given = {"causal": self.causal, "window": self.window}
        if self.sequences is not None:
            boundaries = boundaries_of(self.sequences)
            return {**given, "cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries}
        starts, ends = self.starts, self.ends
        if isinstance(self.offset, torch.Tensor):
            written = (self.offset + self.queries).reshape(-1).expand(self.batch)
            starts = torch.zeros_like(written) if starts is None else starts
            ends = written if ends is None else torch.minimum(ends, written)
        if starts is None:
            return given
        given.update(starts=starts, lengths=ends - starts)
        if self.causal or self.window is not None:  # else the place of a query does not matter
            given["q_lengths"] = (ends - self.offset).clamp(0, self.queries)
        return given

    def chunk_rows(self):
        """For a cache that keeps rows of tokens: (columns to move each row to the left by, or None;
        tokens of each row, or None: all)."""
        if self._rows is None:
            if self.queries == 1:  # a row has the token or not
                shift, lengths = None, self.columns[:, -1].to(torch.int64)
            else:
                shift = (self.starts - self.offset).clamp(0, self.queries)
                lengths = (self.ends - self.offset - shift).clamp(0, self.queries)
            if lengths.device.type == "cpu":
                lengths = lengths.numpy() if bool((lengths != self.queries).any()) else None
            self._rows = None if lengths is None else shift, lengths
        return self._rows


def boundaries_of(sequences):
    """int64 [n + 1]: where each packed sequence begins, rows end to end."""
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    begins = begins.flatten().nonzero().flatten()
    return torch.cat([begins, begins.new_full((1,), sequences.numel())])


def padded_columns(columns, width):
    """A padding mask bool [batch, keys] up to its `width`; None where all is valid and the host
    knows."""
    columns = columns if width is None else columns[:, :width]
    if columns.device.type == "cpu" and not is_compiling() and bool(columns.all()):
        return None
    begins = (columns[:, 1:] > columns[:, :-1]).sum(-1) + columns[:, 0]
    refuse_holes(begins <= 1)
    return columns


def ends_of(columns):
    """starts, ends of the valid columns of each row.

    A row without a valid column gets starts = ends = its width: argmax alone would say 0.
    """
    size = columns.shape[1]
    numbers = columns.to(torch.int8)
    starts, ends = numbers.argmax(-1), size - numbers.flip(-1).argmax(-1)
    empty = ~columns.any(-1)
    return torch.where(empty, size, starts), torch.where(empty, size, ends)


def refuse_holes(whole):
    """Without a wait on the device, where the error comes with the next wait."""
    message = ("sinkattn: attention_mask has a hole: zeros between ones in a row. Padding is at "
               "one side; a right-padded prompt that generates gets one, so pad on the left")
    if is_compiling():
        return
    if whole.device.type == "cpu":
        if not bool(whole.all()):
            raise NotImplementedError(message)
    else:
        torch._assert_async(whole.all(), message)


def is_compiling():
    return torch.compiler.is_compiling()


# --- reading the pattern --------------------------------------------------------------------------

def _code(name, *example):
    """The code of the closure that a maker of transformers returns; None where there is none."""
    maker = getattr(masking_utils, name, None)
    return maker and maker(*example).__code__


_AND = _code("and_masks", masking_utils.causal_mask_function)
_OR = _code("or_masks", masking_utils.causal_mask_function)
_WINDOW = _code("sliding_window_overlay", 1)
_WINDOW_BOTH = _code("sliding_window_bidirectional_overlay", 1)
_PACKED = _code("packed_sequence_mask_function", None)
_REMAPPED = _code("remap_positions_for_packed_sequence", masking_utils.causal_mask_function, None)
_BLOCKS = _code("blockwise_overlay", None)
_CHUNKS = _code("chunked_overlay", 1, None)


def _enclosed(function, name):
    index = function.__code__.co_freevars.index(name)
    return function.__closure__[index].cell_contents


def pattern_of(function, attention_mask, local_size, config, given):
    """The two that are common without a look inside, which a compiler could not follow; the rest
    by `read_pattern`."""
    if function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if is_compiling() and attention_mask is not None and local_size is not None:
        plain = given.get("allow_is_causal_skip") and not given.get("use_vmap")
        window = getattr(config, "sliding_window", None)
        if plain and local_size == window and not getattr(config, "attention_chunk_size", None):
            return Pattern(causal=True, window=window)
    return read_closures(function)


@torch.compiler.disable
def read_closures(function):
    return read_pattern(function)


def read_pattern(function, pattern=None):
    """Pattern of a mask function made of transformers' own; NotImplementedError by name."""
    pattern = Pattern() if pattern is None else pattern
    code = getattr(function, "__code__", None)
    if function is masking_utils.causal_mask_function:
        pattern.causal = True
    elif function is masking_utils.bidirectional_mask_function:
        pass
    elif code is _AND:
        for part in _enclosed(function, "mask_functions"):
            read_pattern(part, pattern)
    elif code is _OR:
        for part in _enclosed(function, "mask_functions"):
            if not is_empty_overlay(part):
                read_pattern(part, pattern)
    elif code is _WINDOW:
        pattern.window = int(_enclosed(function, "sliding_window"))
    elif code is _WINDOW_BOTH:  # |distance| <= n, where ours is < n
        pattern.window = int(_enclosed(function, "sliding_window")) + 1
    elif code is _PACKED:
        pattern.sequences = _enclosed(function, "packed_sequence_mask")
    elif _REMAPPED is not None and code is _REMAPPED:  # one more per token within a sequence
        read_pattern(_enclosed(function, "mask_function"), pattern)
    else:
        names = {_CHUNKS: "chunked attention (attention_chunk_size)",
                 _BLOCKS: "blocks that see themselves both ways (block_sequence_ids)"}
        name = names.get(code, getattr(function, "__qualname__", repr(function)))
        raise NotImplementedError(f"sinkattn: the model asks for a mask that is not causal, "
                                  f"bidirectional, sliding or packed: {name}")
    return pattern


def is_empty_overlay(function):
    """Blocks of which there are none: a text through a model that could also see pictures."""
    if function.__code__ is not _BLOCKS:
        if function is masking_utils.causal_mask_function or function.__code__ is _AND:
            return False
        raise NotImplementedError("sinkattn: the model adds a mask of its own (or_mask_function): "
                                  f"{function.__qualname__}")
    return bool((_enclosed(function, "block_sequence_ids") == -1).all())


def mask_function(batch_size, q_length, kv_length, q_offset=0, kv_offset=0,
                  mask_function=masking_utils.causal_mask_function, attention_mask=None,
                  local_size=None, config=None, **given):
    """A Mask. Registered under the name "sinkattn"; called by transformers with keywords alone.

    attention_mask : bool [batch, columns] or None, over all columns seen; or the Mask that
        generate() had made before the forward pass.
    Raises NotImplementedError for holes in attention_mask and for patterns of other kinds.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    if isinstance(q_offset, torch.Tensor) and q_offset.device.type == "cpu" and not is_compiling():
        q_offset = int(q_offset)
    columns = attention_mask
    if columns is not None:
        columns = columns[:, kv_offset:kv_offset + kv_length]
        missing = kv_length - columns.shape[1]
        if missing > 0:  # slots of a static cache that are not yet written
            columns = torch.nn.functional.pad(columns, (0, missing))
    pattern = pattern_of(mask_function, attention_mask, local_size, config, given)
    return Mask(pattern, batch_size, q_length, kv_length, q_offset - kv_offset, columns)
