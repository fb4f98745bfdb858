"""The demo's language model in NumPy: bytes in, logits out, attention pluggable.

A pre-norm transformer over bytes, no biases. The forward pass hands every layer's unrotated q, k
and v to an attention that the caller chooses (`methods.py`), so that dense attention,
re-computation and the streaming caches each run by their own path.
"""

import dataclasses
import json

import numpy as np

BOS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    vocabulary: int = 257  # 256 bytes and BOS
    layers: int = 6
    width: int = 256
    heads_q: int = 4
    heads_kv: int = 2
    head_depth: int = 64
    hidden: int = 768
    context: int = 512  # trained length
    rope_theta: float = 1e4
    epsilon: float = 1e-6

    def inverse_frequencies(self):
        """Rotary frequencies, float64 [head_depth / 2]; dimension i turns with i + depth / 2."""
        return self.rope_theta ** (-np.arange(0, self.head_depth, 2) / self.head_depth)


def parameter_names(config):
    per_layer = ("norm_attention", "qkv", "output", "norm_mlp", "gate_up", "down")
    names = [f"blocks.{layer}.{name}" for layer in range(config.layers) for name in per_layer]
    return ["embedding", *names, "norm_final", "head"]


def save_weights(path, parameters, config, kind):
    """Writes a plain .npz (no pickle). parameters: {name: float32 array}; kind: "bfloat16"
    (rounded to nearest even, stored as uint16) or "int8" (matrices with one scale per row)."""
    arrays = {"config": np.frombuffer(json.dumps(dataclasses.asdict(config)).encode(), np.uint8)}
    for name in parameter_names(config):
        value = np.ascontiguousarray(parameters[name], dtype=np.float32)
        if value.ndim == 1:
            arrays[name] = value
        elif kind == "bfloat16":
            bits = value.view(np.uint32)
            arrays[name] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        elif kind == "int8":
            scale = np.maximum(np.abs(value).max(axis=1, keepdims=True), 1e-12) / 127
            arrays[name] = np.rint(value / scale).astype(np.int8)
            arrays[f"{name}.scale"] = scale.astype(np.float32)
        else:
            raise ValueError(f'kind: expected "bfloat16" or "int8", got {kind!r}')
    np.savez_compressed(path, **arrays)


def load_weights(path):
    """Reads what `save_weights` wrote: (Config, {name: float32 array})."""
    with np.load(path, allow_pickle=False) as file:
        config = Config(**json.loads(file["config"].tobytes()))
        parameters = {}
        for name in parameter_names(config):
            value = file[name]
            if value.dtype == np.uint16:
                value = (value.astype(np.uint32) << 16).view(np.float32)
            elif value.dtype == np.int8:
                value = value.astype(np.float32) * file[f"{name}.scale"]
            parameters[name] = value
    return config, parameters


class Model:
    """A language model over bytes.

    config : Config
    parameters : {name: float32 array}, named as in `parameter_names`; matrices are [out, in].
    """

    def __init__(self, config, parameters):
        self.config = config
        self.embedding = parameters["embedding"]
        self.blocks = [_Block(config, parameters, layer) for layer in range(config.layers)]
        self.head = _with_gain(parameters["head"], parameters["norm_final"])

    @classmethod
    def load(cls, path):
        return cls(*load_weights(path))

    @property
    def size(self):
        """Number of parameters; the RMSNorm gains are counted though they are folded in."""
        gains = (2 * self.config.layers + 1) * self.config.width
        matrices = [self.embedding, self.head]
        for block in self.blocks:
            matrices += [block.qkv, block.output, block.gate_up, block.down]
        return gains + sum(matrix.size for matrix in matrices)

    def forward(self, tokens, attention, at=None):
        """Logits, float32 [rows, length, vocabulary].

        tokens : int [rows, length]
        attention : called as attention(layer, q, k, v, at) with unrotated q [rows, heads_q, length,
            depth] and k, v [rows, heads_kv, length, depth]; returns [rows, heads_q, length, depth].
        at : int [rows], optional. Compute the logits of this one column of each row alone. The last
            layer then needs one query a row: its q, and what `attention` returns, have length 1.
        """
        x = self.embedding[tokens]
        for layer, block in enumerate(self.blocks):
            only = at if layer == len(self.blocks) - 1 else None
            x = block(x, layer, attention, only)
        return _normalise(x, self.config.epsilon) @ self.head


class _Block:
    def __init__(self, config, parameters, layer):
        def named(name):
            return parameters[f"blocks.{layer}.{name}"]

        self.config = config
        self.qkv = _with_gain(named("qkv"), named("norm_attention"))
        self.output = np.ascontiguousarray(named("output").T)
        self.gate_up = _with_gain(named("gate_up"), named("norm_mlp"))
        self.down = np.ascontiguousarray(named("down").T)

    def __call__(self, x, layer, attention, at):
        config = self.config
        rows, length, width = x.shape
        mixed = _normalise(x, config.epsilon) @ self.qkv
        heads = mixed.reshape(rows, length, -1, config.head_depth).transpose(0, 2, 1, 3)
        q, k, v = np.split(heads, [config.heads_q, config.heads_q + config.heads_kv], axis=1)
        if at is not None:
            every = np.arange(rows)
            x, q = x[every, at][:, None], np.ascontiguousarray(q[every, :, at][:, :, None])
        seen = attention(layer, q, k, v, at)
        seen = seen.transpose(0, 2, 1, 3).reshape(rows, x.shape[1], -1)
        x = x + seen @ self.output
        return x + _gated(_normalise(x, config.epsilon) @ self.gate_up) @ self.down


def _with_gain(matrix, gain):
    """A norm's gain folded into the matrix behind it: [out, in], [in] -> [in, out]."""
    return np.ascontiguousarray((matrix * gain).T)


def _normalise(x, epsilon):
    square = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    return x * (1 / np.sqrt(square + epsilon))


def _gated(gate_up):
    """silu(gate) * up, [..., 2 * hidden] -> [..., hidden]."""
    gate, up = np.split(gate_up, 2, axis=-1)
    scale = np.negative(gate)
    with np.errstate(over="ignore"):  # exp overflows to inf, and gate / inf is the right 0
        np.exp(scale, out=scale)
    scale += 1
    np.divide(gate, scale, out=scale)
    scale *= up
    return scale


def bits(logits, targets):
    """-log2 of the probability of each target: [..., vocabulary], int [...] -> float32 [...]."""
    top = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=-1))
    chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (total + top[..., 0] - chosen) / np.float32(np.log(2))
