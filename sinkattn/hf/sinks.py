"""Sink logits that a model did not come with."""

import inspect
import math

import torch

_PLACE, _HOOKED, CHANGES = "_sinkattn_logits", "_sinkattn_hooked", "_sinkattn_changes"


def attention_modules(model):
    """The text model's attention modules, by layer. NotImplementedError where they are not one for
    each layer."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    found = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "is_causal"):
            found.setdefault(index, []).append(module)
    if sorted(found) != list(range(layers)) or any(len(some) != 1 for some in found.values()):
        raise NotImplementedError(
            f"set_sink_logits(): {type(model).__name__} has attention modules "
            f"{ {index: len(some) for index, some in sorted(found.items())} } (layer: how many), "
            f"expected one for each of {layers} layers")
    return [found[index][0] for index in range(layers)]


def sink_logits_of(module, query, own):
    """The logits of a call: the model's own [heads_q], those that were set, both side by side."""
    place = module.__dict__.get(_PLACE)
    if place is None:
        return own
    logits = place[0] if place[1] is None else place[0][place[1]]
    if logits.device != query.device:
        logits = logits.to(query.device)
    if logits.ndim == 0:
        logits = logits.expand(query.shape[1])
    if own is None:
        return logits
    return torch.stack([own.to(logits.dtype), logits], dim=-1)


def set_sink_logits(model, x):
    """Adds a logit to the denominator of every softmax: weights then sum to less than 1.

    model : a transformers model; it is switched to sinkattn (`enable`).
    x : a float for all layers and heads; [heads_q] for all layers; [layers, heads_q]; a list of one
        of the first two for each layer; None takes them away. In natural-log units, beside the
        sinks that the model has of its own (gpt-oss). An nn.Parameter is registered with the model
        as "sink_logits", so that it trains and is saved.
    Raises NotImplementedError where `enable` does, ValueError for other shapes.

    Method: sink logits as in the gpt-oss model card; 0 is Miller's softmax-off-by-one.
    """
    from sinkattn.hf.attention import enable

    enable(model)
    modules = attention_modules(model)
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    if hasattr(model, "sink_logits"):
        del model.sink_logits
    device = next(model.parameters()).device
    places = [None] * len(modules) if x is None else places_of(model, x, len(modules), heads,
                                                               device)
    model.__dict__[CHANGES] = model.__dict__.get(CHANGES, 0) + 1  # a captured step is out of date
    for module, place in zip(modules, places):
        module.__dict__.pop(_PLACE, None)
        if place is not None:
            module.__dict__[_PLACE] = place
    if _HOOKED not in modules[0].__dict__:
        modules[0].register_forward_pre_hook(refuse_another_attention)
        modules[0].__dict__[_HOOKED] = True


def refuse_another_attention(module, _):
    """Eager and the like would drop what was set here."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sinkattn")
    if _PLACE in module.__dict__ and implementation != "sinkattn":
        raise NotImplementedError(
            f"set_sink_logits(): the model now uses the attention '{implementation}', which would "
            "drop the sink logits that were set; set_sink_logits(model, None) takes them away")


def places_of(model, x, layers, heads, device):
    """[(tensor, its row or None)] by layer, parameters registered with the model."""
    if isinstance(x, (list, tuple, torch.nn.ParameterList)):
        if len(x) != layers:
            raise ValueError(f"set_sink_logits(): x has {len(x)} entries, expected {layers} (one a "
                             "layer)")
        tensors = [tensor_of(item, device) for item in x]
        for tensor in tensors:
            check_shape(tensor, [(), (heads,)])
        if any(isinstance(tensor, torch.nn.Parameter) for tensor in tensors):
            model.sink_logits = torch.nn.ParameterList(tensors)
            tensors = list(model.sink_logits)
        return [(tensor, None) for tensor in tensors]
    tensor = tensor_of(x, device)
    check_shape(tensor, [(), (heads,), (layers, heads)])
    if isinstance(tensor, torch.nn.Parameter):
        model.sink_logits = tensor
    return [(tensor, layer if tensor.ndim == 2 else None) for layer in range(layers)]


def tensor_of(x, device):
    if isinstance(x, torch.nn.Parameter):
        return x
    if isinstance(x, bool):
        raise TypeError("set_sink_logits(): x is bool, expected a number")
    return torch.as_tensor(x, dtype=torch.float32, device=device)


def check_shape(tensor, shapes):
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"set_sink_logits(): x has shape {list(tensor.shape)}, expected "
                         f"{expected}")


def null_sinks(model, n=4):
    """The null tokens: n zero embeddings before every text, without cache slots.

    In a model whose keys and values of a zero embedding are zero, such tokens only enter the
    softmax's denominator, with score 0: that is `set_sink_logits(model, log(n))`. On sliding layers
    they stay visible, as pinned tokens would.

    n : int >= 0; 0 takes them away.
    Raises NotImplementedError where zero does not stay zero: biases in the key or value projection
    or in a norm, learned positions, or any layer whose keys or values of a zero embedding are not
    zero when it is tried.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"null_sinks(): n is {type(n).__name__}, expected an int")
    if n < 0:
        raise ValueError(f"null_sinks(): n is {n}, expected 0 or more")
    refuse_biases(model)
    refuse_nonzero_states(model)
    set_sink_logits(model, math.log(n) if n else None)


def refuse_biases(model):
    """By structure: a bias that is zero today may be trained tomorrow."""
    embeddings = model.get_input_embeddings()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        biased = getattr(module, "bias", None) is not None
        if biased and (last in ("k_proj", "v_proj") or "qkv" in last or "query_key_value" in last):
            raise NotImplementedError(f"null_sinks(): {name} has a bias: the keys and values of a "
                                      "zero embedding are not zero")
        if biased and "norm" in last.lower():
            raise NotImplementedError(f"null_sinks(): {name} has a bias: a norm of zero is not "
                                      "zero")
        if isinstance(module, torch.nn.Embedding) and module is not embeddings:
            raise NotImplementedError(f"null_sinks(): {name} is a second embedding (learned "
                                      "positions?): zero embeddings do not stay zero")


def refuse_nonzero_states(model):
    """By trial: zero embeddings through the model as it is."""
    from transformers import DynamicCache

    width = model.get_input_embeddings().weight.shape[1]
    parameter = next(model.parameters())
    zeros = torch.zeros(1, 4, width, dtype=parameter.dtype, device=parameter.device)
    cache = DynamicCache()
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(inputs_embeds=zeros, use_cache=True, **{cache_keyword(model): cache})
    finally:
        model.train(training)
    for index, layer in enumerate(cache.layers):
        for what, states in (("keys", layer.keys), ("values", layer.values)):
            if bool((states != 0).any()):
                raise NotImplementedError(f"null_sinks(): layer {index} makes {what} that are not "
                                          "zero of zero embeddings")


def cache_keyword(model):
    """The name under which a model and its generate take a cache: "past_key_values", or "cache"
    since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
