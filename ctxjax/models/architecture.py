"""A model's architecture: its sizes, the kinds of its layers, and the parameters that follow from them."""

from __future__ import annotations

import dataclasses
import functools

import jax

from ctxjax.models.params import ParamSpec
from ctxjax.models.rope import RopeScaling, frequencies

# The gated MLP computes down(activation(gate(x)) * up(x)).
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
# What computes attention: plain products, or a kernel (models/kernels.py).
ATTENTION = ("reference", "splash", "cudnn")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer.

    ``window`` w: the query at position p reads keys at positions m with p - w < m <= p; 0: all m <= p.
    ``rotary`` False: no rotary positions. ``rope_theta``: a rotary base of its own, without the model's scaling; 0: the
    model's base and scaling.
    """

    window: int = 0
    rotary: bool = True
    rope_theta: float = 0.0

    def without_window(self) -> LayerKind:
        return dataclasses.replace(self, window=0)


PLAIN = LayerKind()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture, and the arithmetic it runs in. Hashable: a static argument of every jit.

    ``layer_kinds`` has one entry per layer; empty: every layer is ``LayerKind()``.
    ``qk_norm`` norms every head of q and k; with ``joint_qk_norm`` all heads of q, and all of k, by one norm.
    ``pre_norms`` norms the input of attention and of the MLP, ``post_norms`` their output, before it is added to the
    residual stream. Norms multiply by their scale, with ``norm_plus_one`` by 1 + scale.
    ``query_scale`` multiplies the scores of attention, 0: head_dim^-0.5.
    ``activation`` is a key of ACTIVATIONS. ``embedding_scale`` multiplies the embedding's rows.
    ``logit_scale`` multiplies the head's output, and ``logit_softcap`` c then bends it to c tanh(. / c), 0: no bend.
    ``max_positions`` is the longest sequence, in tokens, that the model was made for; nothing computed depends on it.
    ``tokens``: how many of the ``vocab_size`` rows are tokens of the tokenizer, 0: all. The others pad the head and are
    never predicted.
    ``dtype`` is that of activations and matrix products; norms, softmax and logits are always float32. ``remat`` names
    what a layer keeps for its backward pass (models/remat.py), ``attention``, one of ATTENTION, what computes attention
    (models/attention.py).

    Raises ValueError if ``layer_kinds`` does not fit ``layers``, a window is negative, or a name is unknown.
    """

    vocab_size: int
    width: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    layer_kinds: tuple[LayerKind, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    query_scale: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    norm_plus_one: bool = False
    norm_eps: float = 1e-5
    activation: str = "silu"
    embedding_scale: float = 1.0
    tied_embeddings: bool = False
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    max_positions: int = 2048
    tokens: int = 0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "reference"

    def __post_init__(self):
        if self.layer_kinds and len(self.layer_kinds) != self.layers:
            raise ValueError(f"layer_kinds has {len(self.layer_kinds)} entries for {self.layers} layers; give one each")
        if any(kind.window < 0 for kind in self.layer_kinds):
            windows = [kind.window for kind in self.layer_kinds]
            raise ValueError(f"layer_kinds has the windows {windows}; use tokens above 0, or 0 for no window")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation = {self.activation!r} is not known; choose from {', '.join(ACTIVATIONS)}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention = {self.attention!r} is not known; choose from {', '.join(ATTENTION)}")

    @property
    def arithmetic(self) -> str:
        """How it computes, for people."""
        return f"{self.dtype}, {self.attention} attention"

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return self.layer_kinds or (PLAIN,) * self.layers


def rope_frequencies(config: ModelConfig, kind: LayerKind = PLAIN) -> jax.Array | None:
    """Angular frequencies [Dh/2] of a layer's rotary positions in radians per position, after scaling; None: it has
    none."""
    if not kind.rotary:
        return None
    if kind.rope_theta:
        return frequencies(config.head_dim, kind.rope_theta, None)
    return frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def rope_amplitude(config: ModelConfig, kind: LayerKind = PLAIN) -> float:
    """What the cosines and sines of a layer's rotary positions are multiplied by."""
    is_scaled = config.rope_scaling is not None and kind.rotary and not kind.rope_theta
    return config.rope_scaling.amplitude if is_scaled else 1.0


def param_specs(config: ModelConfig) -> dict:
    """Declare every parameter, those of the layers stacked along a leading axis N. Tied models have no head.

    Matrices start with standard deviation 1/sqrt(inputs): the usual 0.02 leaves small models untrained
    (benchmarks/README.md, "Choices in models/"). Norms start by multiplying by 1.
    """
    d, f, n, v = config.width, config.mlp_width, config.layers, config.vocab_size
    q, kv, dh = config.query_heads * config.head_dim, config.kv_heads * config.head_dim, config.head_dim
    one = 0.0 if config.norm_plus_one else None

    def stacked(shape, axes, stddev):
        return ParamSpec((n, *shape), ("layers", *axes), stddev)

    def matrix(inputs, outputs, axes):
        return stacked((inputs, outputs), axes, inputs**-0.5)

    layers = {
        "attention_norm": stacked((d,), (None,), one),
        "q": matrix(d, q, ("embed", "heads")),
        "k": matrix(d, kv, ("embed", "kv_heads")),
        "v": matrix(d, kv, ("embed", "kv_heads")),
        "o": matrix(q, d, ("heads", "embed")),
        "mlp_norm": stacked((d,), (None,), one),
        "gate": matrix(d, f, ("embed", "mlp")),
        "up": matrix(d, f, ("embed", "mlp")),
        "down": matrix(f, d, ("mlp", "embed")),
    }
    if not config.pre_norms:
        del layers["attention_norm"], layers["mlp_norm"]
    if config.post_norms:
        layers["attention_post_norm"] = layers["mlp_post_norm"] = stacked((d,), (None,), one)
    if config.qkv_bias:
        layers["q_bias"] = stacked((q,), ("heads",), 0.0)
        layers["k_bias"] = stacked((kv,), ("kv_heads",), 0.0)
        layers["v_bias"] = stacked((kv,), ("kv_heads",), 0.0)
    if config.qk_norm and config.joint_qk_norm:
        layers["q_norm"] = stacked((q,), ("heads",), one)
        layers["k_norm"] = stacked((kv,), ("kv_heads",), one)
    elif config.qk_norm:
        layers["q_norm"] = stacked((dh,), (None,), one)
        layers["k_norm"] = stacked((dh,), (None,), one)
    specs = {
        "embedding": ParamSpec((v, d), ("vocab", "embed"), d**-0.5),
        "layers": layers,
        "final_norm": ParamSpec((d,), (None,), one),
    }
    if not config.tied_embeddings:
        specs["head"] = ParamSpec((d, v), ("embed", "vocab"), d**-0.5)
    return specs
