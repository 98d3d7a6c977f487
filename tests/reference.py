"""A second implementation of the model, the sampler, the losses and the optimiser, to compare whole runs with.

Plain numpy in float64, one row at a time: no padding, no cache, no chunks, no transposed matrices, and nothing of the
package. Matrices are [out, in], as Hugging Face folders have them.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

MATRICES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


# --- The model ---


def write_folder(folder: Path, tokenizer, seed: int, stop_ids: list[int], vocab: int, width: int, heads: int, mlp: int):
    """Write a Llama of two layers with random weights, large enough for peaked outputs."""
    random, head_dim, kv_heads, tensors = np.random.RandomState(seed), 8, heads // 2, {}

    def draw(name, rows, columns):
        tensors[name] = (random.normal(size=(rows, columns)) * 1.3 * columns**-0.5).astype(np.float32)

    tensors["model.embed_tokens.weight"] = random.normal(size=(vocab, width)).astype(np.float32)
    draw("lm_head.weight", vocab, width)
    for layer in range(2):
        inner = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "gate": mlp, "up": mlp}
        for name, theirs in MATRICES.items():
            shape = (inner[name], width) if name in inner else (width, heads * head_dim if name == "o" else mlp)
            draw(f"model.layers.{layer}.{theirs}.weight", *shape)
        for theirs in NORMS.values():
            tensors[f"model.layers.{layer}.{theirs}.weight"] = np.float32(1 + 0.2 * random.normal(size=width))
    tensors["model.norm.weight"] = np.float32(1 + 0.2 * random.normal(size=width))
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
        "intermediate_size": mlp, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 128,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))


def read_folder(folder: Path) -> dict:
    """Read the weights and sizes of a folder."""
    fields, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    layers = [
        {name: tensors[f"model.layers.{layer}.{theirs}.weight"] for name, theirs in (MATRICES | NORMS).items()}
        for layer in range(fields["num_hidden_layers"])
    ]
    return {
        "embedding": tensors["model.embed_tokens.weight"], "head": tensors["lm_head.weight"],
        "norm": tensors["model.norm.weight"], "layers": layers, "heads": fields["num_attention_heads"],
        "kv_heads": fields["num_key_value_heads"], "theta": fields["rope_theta"], "eps": fields["rms_norm_eps"],
    }  # fmt: skip


def with_tree(weights: dict, tree: dict) -> dict:
    """Return the model with the weights of a checkpoint, whose matrices are [in, out] and stacked by layer."""
    layers = []
    for layer in range(len(weights["layers"])):
        own = {name: np.float64(tree["layers"][name][layer]) for name in (*MATRICES, *NORMS)}
        layers.append({name: value.T if name in MATRICES else value for name, value in own.items()})
    top = {"embedding": tree["embedding"], "head": tree["head"].T, "norm": tree["final_norm"], "layers": layers}
    return weights | {name: np.float64(value) if name != "layers" else value for name, value in top.items()}


def with_adapter(weights: dict, tree: dict, scale: float) -> dict:
    """Return the model with ``scale`` times A @ B added to every matrix that has an adapter."""
    layers = []
    for layer, own in enumerate(weights["layers"]):
        parts = {name: [np.float64(tree["layers"][f"{name}_lora_{ab}"][layer]) for ab in "ab"] for name in MATRICES}
        layers.append(own | {name: own[name] + scale * (a @ b).T for name, (a, b) in parts.items()})
    return weights | {"layers": layers}


def norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x, theta):
    """Rotate the pairs (i, i + Dh/2) of x [L, H, Dh] by their positions."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** -(np.arange(half) / half)
    one, two = x[..., :half], x[..., half:]
    return np.concatenate([one * np.cos(angle) - two * np.sin(angle), two * np.cos(angle) + one * np.sin(angle)], -1)


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def run_model(weights: dict, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the residual stream before and after every layer, [N+1, L, D], and the logits [L, V]."""
    x, eps, L = weights["embedding"][tokens], weights["eps"], len(tokens)
    states, hidden = [x], np.triu(np.full((L, L), -np.inf), 1)
    for own in weights["layers"]:
        h = norm(x, own["attention_norm"], eps)
        q = rotate((h @ own["q"].T).reshape(L, weights["heads"], -1), weights["theta"])
        k = rotate((h @ own["k"].T).reshape(L, weights["kv_heads"], -1), weights["theta"])
        v = (h @ own["v"].T).reshape(L, weights["kv_heads"], -1)
        group, read = weights["heads"] // weights["kv_heads"], []
        for head in range(weights["heads"]):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(q.shape[-1]) + hidden
            read.append(softmax(scores) @ v[:, head // group])
        x = x + np.concatenate(read, axis=-1) @ own["o"].T
        h = norm(x, own["mlp_norm"], eps)
        gate = h @ own["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ own["up"].T)) @ own["down"].T
        states.append(x)
    return np.array(states), norm(x, weights["norm"], eps) @ weights["head"].T


def score(weights: dict, prompt: list[int], response: list[int], temperature: float = 1.0) -> np.ndarray:
    """Return the log-probabilities [T, V] of every token of the response given what comes before it."""
    logits = run_model(weights, [*prompt, *response[:-1]])[1][len(prompt) - 1 :] / temperature
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


# --- The sampler ---


def draw(logits: np.ndarray, uniform: float, temperature: float, top_k: int, top_p: float) -> int:
    """Return the token whose share of the cumulative distribution, after top-k and then top-p, has the number."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k:
        logits = np.where(logits < np.sort(logits)[-top_k], -np.inf, logits)
    p = softmax(logits)
    order = np.argsort(-p, kind="stable")
    kept = order[np.cumsum(p[order]) - p[order] < top_p] if top_p < 1 else order
    p = np.where(np.isin(np.arange(len(p)), kept), p, 0.0)
    return int(np.searchsorted(np.cumsum(p), uniform * p.sum(), side="right"))


def respond(
    weights: dict, prompt: list[int], stop_ids: set[int], uniforms: np.ndarray, temperature=0.0, top_k=0, top_p=1.0
) -> list[int]:
    """Return a response of at most as many tokens as there are uniform numbers, end token included."""
    response = []
    for uniform in uniforms:
        logits = run_model(weights, [*prompt, *response])[1][-1]
        response.append(draw(logits, uniform, temperature, top_k, top_p))
        if response[-1] in stop_ids:
            break
    return response


# --- Losses ---


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of log-probabilities [T, V], nats [T]."""
    return (np.exp(p) * (p - q)).sum(-1)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# --- Trees ---


def walk(tree, path: str = "") -> dict[str, np.ndarray]:
    """Return the arrays of nested dicts by path."""
    if not isinstance(tree, dict):
        return {path: np.float64(tree)}
    found = {}
    for name, value in tree.items():
        found |= walk(value, f"{path}/{name}")
    return found


def unwalk(flat: dict[str, np.ndarray]) -> dict:
    """The inverse of ``walk``."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.strip("/").split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return tree


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of states [tokens, D], by the centred Gram matrices of the tokens (Kornblith et al. 2019)."""
    count = len(x)
    centre = np.eye(count) - np.ones((count, count)) / count
    k, l = (centre @ (states @ states.T) @ centre for states in (x, y))
    return float((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))
