"""How a model turned its keys: found from its config, and proved on its own functions."""

import ast
import importlib
import inspect

import numpy as np
import torch

from sinkattn.rope import Rope

_CHANGING = ("dynamic", "longrope")  # frequencies that depend on the length so far
_ADVICE = "; SinkCache(config, positions='original') needs no rotation"


def refuse(reason):
    raise NotImplementedError(f"SinkCache(): positions='slot': {reason}{_ADVICE}")


def rope_of(config, layer_type):
    """Rope(applied=True) of a text model's layers of a type.

    The frequencies come from the model's own rotary module. That they, the layout of the pairs and
    the part of a head that is turned are understood is tried out on the model's own
    apply_rotary_pos_emb; that every layer applies it, as the last thing that happens to queries and
    keys, is read in its source. NotImplementedError where any of it fails.
    """
    name = type(config).__module__.replace("configuration_", "modeling_")
    try:
        family = importlib.import_module(name)
    except ImportError:
        refuse(f"there is no {name} that goes with {type(config).__name__}")
    refuse_changing(config, layer_type)
    refuse_unusual_order(family)
    rotary = rotary_module(family, config)
    frequencies = getattr(rotary, f"{layer_type}_inv_freq", None)
    named = frequencies is not None
    if not named:
        frequencies = getattr(rotary, "inv_freq", None)
    if not isinstance(frequencies, torch.Tensor) or frequencies.ndim != 1:
        refuse(f"{type(rotary).__name__} has no inv_freq for {layer_type}")
    scaling = getattr(rotary, f"{layer_type}_attention_scaling" if named else "attention_scaling",
                      1.0)
    frequencies = frequencies.detach().cpu().double().numpy()
    turned = {place: turned_by_model(family, rotary, config, place, layer_type if named else None)
              for place in (0, 3)}
    for interleaved in (False, True):
        if all(np.allclose(got, turned_identity(len(got), frequencies, place, interleaved, scaling),
                           atol=1e-5) for place, got in turned.items()):
            return Rope(frequencies, interleaved=interleaved, applied=True)
    return refuse(f"{family.__name__}.apply_rotary_pos_emb turns neither halves nor pairs by "
                  f"{type(rotary).__name__}.inv_freq")


def refuse_changing(config, layer_type):
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(layer_type) or parameters
    kind = parameters.get("rope_type", "default")
    if kind in _CHANGING:
        refuse(f"rope_type is '{kind}', whose frequencies change with the length: keys were turned "
               "by others than the query")
    if "mrope_section" in parameters:
        refuse("mrope_section: positions of three axes")


def rotary_module(family, config):
    classes = [thing for name, thing in vars(family).items()
               if name.endswith("RotaryEmbedding") and "Vision" not in name
               and inspect.isclass(thing) and thing.__module__ == family.__name__
               and "config" in inspect.signature(thing.__init__).parameters]
    if len(classes) != 1:
        refuse(f"{family.__name__} has {len(classes)} rotary modules, expected 1")
    return classes[0](config)


def turned_by_model(family, rotary, config, place, layer_type):
    """[depth, depth]: what the model makes of each unit vector at a position. Where it takes the
    turned part of a head alone (phi), of that part's."""
    whole = (getattr(config, "head_dim", None)
             or config.hidden_size // config.num_attention_heads)
    kind = [] if layer_type is None else [layer_type]
    try:
        part = rotary(torch.eye(2), torch.full((1, 1), place), *kind)[0].shape[-1]
        for depth in (whole, part):
            unit = torch.eye(depth)[None, None]
            angles = rotary(unit, torch.full((1, depth), place), *kind)
            try:
                return family.apply_rotary_pos_emb(unit, unit, *angles)[0][0, 0].numpy()
            except RuntimeError:  # shapes do not fit
                if depth == part:
                    raise
    except Exception as error:
        return refuse(f"{family.__name__}.apply_rotary_pos_emb could not be tried out "
                      f"({type(error).__name__}: {error})")


def turned_identity(depth, frequencies, place, interleaved, scaling):
    """The same, by definition: a pair (a, b) becomes (a cos - b sin, b cos + a sin)."""
    count = len(frequencies)
    angle = place * frequencies
    first = np.arange(count) * 2 if interleaved else np.arange(count)
    second = first + 1 if interleaved else first + count
    turned = np.eye(depth)
    if second[-1] >= depth:
        return np.full((depth, depth), np.nan)
    turned[first, first] = turned[second, second] = np.cos(angle) * scaling
    turned[first, second] = np.sin(angle) * scaling
    turned[second, first] = -np.sin(angle) * scaling
    return turned


def refuse_unusual_order(family):
    """Layers that are not turned, or queries changed after they were, would be scored wrongly."""
    try:
        tree = ast.parse(inspect.getsource(family))
    except (OSError, TypeError):
        refuse(f"the source of {family.__name__} cannot be read")
    found = 0
    for group in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for forward in (node for node in group.body if isinstance(node, ast.FunctionDef)
                        and calls(node, "apply_rotary_pos_emb")):
            found += 1
            refuse_order_in(f"{family.__name__}.{group.name}", forward)
    if not found:
        refuse(f"{family.__name__} has no attention that calls apply_rotary_pos_emb")


def refuse_order_in(name, forward):
    turned = None  # names of the turned query and key, once they are
    for statement in forward.body:
        if turned is None:
            if calls(statement, "apply_rotary_pos_emb"):
                if not isinstance(statement, ast.Assign):
                    refuse(f"{name} turns queries and keys only under a condition")
                turned = assigned(statement)
        elif joined(statement, turned):
            turned = turned | assigned(statement)
        elif reads(statement, turned) and not is_harmless(statement):
            refuse(f"{name} changes queries or keys after it has turned them")


def joined(statement, turned):
    """x = torch.cat((turned, rest), dim=-1): the turned part of a head comes first."""
    if not isinstance(statement, ast.Assign) or not calls(statement.value, "cat"):
        return False
    parts = statement.value.args[0]
    first = parts.elts[0] if isinstance(parts, (ast.Tuple, ast.List)) else None
    return isinstance(first, ast.Name) and first.id in turned


def is_harmless(statement):
    """The cache, the attention itself, another dtype or layout."""
    if any(calls(statement, name) for name in ("update", "attention_interface")):
        return True
    value = getattr(statement, "value", None)
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and (
        value.func.attr in ("contiguous", "to", "transpose"))


def reads(node, names):
    return any(isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and part.id in names
               for part in ast.walk(node))


def calls(node, name):
    return any(isinstance(part, ast.Call)
               and getattr(part.func, "id", getattr(part.func, "attr", None)) == name
               for part in ast.walk(node))


def assigned(node):
    return {part.id for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
