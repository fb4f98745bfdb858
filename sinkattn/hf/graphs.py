"""A decode step of a model as a CUDA graph, replayed for a whole generation.

With a cache of bounded memory every step does the same to the same memory: lengths, and where each
ring begins, are numbers on the device. What is left of a step of a small model is a few hundred
launches from Python; a graph is one.
"""

import copy
import functools
import inspect

import torch

from sinkattn.hf.cache import SinkCache, text_config
from sinkattn.hf.sinks import CHANGES

_DEVICES = ("cuda",)
_ASKED = {"use_cache": True, "return_dict": True, "output_attentions": False,
          "output_hidden_states": False, "output_router_logits": False}


def capture(model, cache):
    """Makes `generate` replay its decode steps as one CUDA graph, where they are all alike.

    model : on a GPU, with sinkattn's attention (`enable`). cache : the SinkCache that it is to
        generate with; memory and rows stay, so one capture serves every turn of a conversation.

    Returns a context manager with `close()`; until then model.forward is replaced. The first token
    after a prompt runs as always, the second is captured, the others are replays: calls of one
    token a row with this cache, under torch.no_grad() or inference_mode(), that ask for logits
    alone. Everything else (prompts, other caches, more tokens at a time) runs as always, and after
    what gives the cache other memory (another batch) or the model other sink logits the step is
    captured again. Logits are overwritten by the next step; of attention_mask a replay reads the
    last column. The weights may change in place, but may not move; close() before model.to().

        cache = SinkCache(model, sinks=4, window=1020)
        with sinkattn.hf.capture(model, cache):
            model.generate(ids, past_key_values=cache)

    Raises TypeError for what is no model or no SinkCache, ValueError for a model that has a capture
    already; NotImplementedError for a model that is not on a GPU or whose forward takes no
    position_ids, and at the second token for one that waits for the device in a step (mixtures of
    experts that ask how many tokens each gets).
    """
    return Captured(model, cache)


class Captured:
    """What `capture` returns. replays: steps that ran as a graph so far."""

    def __init__(self, model, cache):
        if not isinstance(cache, SinkCache):
            raise TypeError(f"capture(): cache is {type(cache).__name__}, expected a SinkCache of "
                            "sinkattn.hf")
        forward = getattr(model, "forward", None)
        if not hasattr(model, "generate") or not isinstance(model, torch.nn.Module):
            raise TypeError(f"capture(): model is {type(model).__name__}, expected a model of "
                            "transformers that generates")
        if model.device.type not in _DEVICES:
            raise NotImplementedError(f"capture(): the model is on {model.device}, and there are "
                                      "CUDA graphs alone")
        if "forward" in model.__dict__:
            raise ValueError("capture(): forward of this model is replaced already; close() the "
                             "capture before")
        if "position_ids" not in inspect.signature(forward).parameters:
            raise NotImplementedError(f"capture(): {type(model).__name__} takes no position_ids, "
                                      "which a captured step has to be told")
        self.model, self.cache, self.forward = model, cache, forward
        self.replays, self.key, self.replay, self.streams = 0, None, None, None

        @functools.wraps(forward)
        def call(*arguments, **given):
            return self._call(arguments, given)
        model.forward = call

    def close(self):
        """The model is as before; the graph's memory is given back."""
        self.model.__dict__.pop("forward", None)
        self.replay = self.key = self.streams = self.outputs = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _call(self, arguments, given):
        if len(arguments) == 1 and "input_ids" not in given:
            arguments, given = (), {"input_ids": arguments[0], **given}
        key = None if arguments else self._key_of(given)
        if key is None:
            return self.forward(*arguments, **given)
        streams = [layer.stream for layer in self.cache.layers]
        if key != self.key or any(a is not b for a, b in zip(streams, self.streams)):
            self.key, self.streams, self.replay = key, streams, None
            return self.forward(**given)  # also what a capture must find warm
        self._tell(given)
        if self.replay is None:
            self._record(given)
        else:
            self._move_to(self.cache.get_seq_length() + 1)
        self.replay()
        self.replays += 1
        return copy.copy(self.outputs)

    def _key_of(self, given):
        """What makes two steps alike; None for calls that are no such step."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        places = given.get("position_ids")
        columns = {layer.columns for layer in self.cache.layers}
        if (given.get("past_key_values", given.get("cache")) is not self.cache
                or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1
                or ids.device.type not in _DEVICES or torch.is_grad_enabled()
                or torch.is_autocast_enabled(ids.device.type) or len(columns) != 1
                or any(layer.stream is None for layer in self.cache.layers)):
            return None
        if mask is not None and (not isinstance(mask, torch.Tensor)
                                 or mask.shape != (ids.shape[0], columns.pop() + 1)):
            return None
        if places is not None and (places.dim() != 2 or places.shape[1] != 1):
            return None
        others = {name: value for name, value in given.items() if name not in (
            "input_ids", "attention_mask", "position_ids", "past_key_values", "cache")
            and value is not None and not (name in _ASKED and value is _ASKED[name])}
        kept = others.pop("logits_to_keep", None)
        if others or isinstance(kept, torch.Tensor):
            return None
        model = self.model
        return (tuple(ids.shape), kept, model.training, model.__dict__.get(CHANGES),
                text_config(model)._attn_implementation)

    def _tell(self, given):
        """The graph's own inputs: it reads these addresses."""
        ids, mask, places = (given.get(name) for name in
                             ("input_ids", "attention_mask", "position_ids"))
        if self.replay is None:
            self.ids, self.places = torch.empty_like(ids), torch.empty_like(ids)
            self.real = torch.empty_like(ids[:, 0])
        self.ids.copy_(ids)
        if places is None:
            self.places.fill_(self.cache.get_seq_length())
        else:
            self.places.copy_(places)  # also one for all rows
        if mask is None:
            self.real.fill_(1)
        else:
            self.real.copy_(mask[:, -1])

    def _record(self, given):
        """The Python of a step runs here for the last time; the device does nothing yet."""
        name = "cache" if "cache" in given else "past_key_values"
        asked = {key: given[key] for key in ("use_cache", "return_dict", "logits_to_keep")
                 if key in given}
        before = self.cache.get_seq_length()

        def step():
            for layer in self.cache.layers:
                layer.step = self.real
            try:
                return self.forward(input_ids=self.ids, position_ids=self.places,
                                    **{name: self.cache}, **asked)
            finally:
                for layer in self.cache.layers:
                    layer.step = None
        try:
            self.outputs, self.replay = record(step, self.ids.device)
        except Exception as error:
            self._move_to(before)
            self.key = None
            raise NotImplementedError(
                f"capture(): a step of {type(self.model).__name__} cannot be captured; does it "
                f"wait for the device? {error}") from error

    def _move_to(self, columns):
        for layer in self.cache.layers:
            layer.columns = columns


def record(step, device):
    """(what step() returned, a function that does it again) as a graph; nothing is done yet."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # torch's own: of any device
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        results = step()
    return results, graph.replay
