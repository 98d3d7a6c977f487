"""Compare random configurations of every family with the models of transformers.

    python -m benchmarks.parity [--family=NAME ...] [--configurations=20] [--seed=0] [--number=N] [--json=FILE]

A configuration is a config.json with random values of all fields that the family's config map reads, in the layout of
transformers 4 or 5, some fields left out. Its model has random weights with peaked outputs. Configuration N of a family
is a function of the seed and N alone. Compared are, in float32 on one device:

- logits of four rows of 300 columns with left padding of different lengths, past most windows. The error is the largest
  difference over the largest logit.
- 64 greedy tokens of four prompts of different lengths, with transformers' ``generate``.
- logits of the exported folder, read again by transformers, with those of the folder that it was loaded from.

After the configurations come settings that ctxjax does not implement (``FOREIGN``): each must be refused, or be right.
Prints a Markdown table and what was refused, and one JSON object as the last line; ``--json`` writes every
configuration with its numbers. Ends with exit code 1 if anything differs, and names seed and number. ``--quick``: one
configuration of each family. Needs torch. Recorded numbers: docs/models.md.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
from pathlib import Path
import random
import sys
import tempfile

import jax
import numpy as np
import torch
import transformers

from ctxjax import rng
from ctxjax.data.prompts import left_pad
from ctxjax.distill.sampling import SamplingConfig, sample
from ctxjax.host import progress
from ctxjax.models import transformer
from ctxjax.models.hf import load as hf_load, save as hf_save
from ctxjax.models.hf.family import DEFAULTS, Family
from ctxjax.sharding import make_mesh, put_batch
from ctxjax.types import Prompts

ROWS = (300, 299, 130, 5)  # tokens of each row; of more than 255 columns a layer with a window reads them in chunks
PROMPTS, NEW = (1, 2, 7, 20, 33, 70), 64  # tokens of a prompt, of a response
TOLERANCE = 5e-5  # of a logit, relative to the largest
LOCAL, GLOBAL = "sliding_attention", "full_attention"
WINDOWS = (2, 3, 8, 24, 64, 150, 1000)
# Scalings of rotary positions, and settings, that ctxjax does not implement.
FOREIGN_ROPE = (
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "mscale": 0.7, "mscale_all_dim": 1.0},
)
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}
FOREIGN = {
    "llama": ({"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}),
    "qwen2": ({"hidden_act": "gelu"}, QWEN_WINDOWS),
    "qwen3": ({"hidden_act": "gelu"}, {"attention_bias": True}, QWEN_WINDOWS),
    "mistral": ({"hidden_act": "gelu"}, {"layer_types": [GLOBAL, LOCAL], "num_hidden_layers": 2}),
    "seed_oss": (
        {"hidden_act": "gelu"}, {"attention_bias": False}, {"attention_out_bias": True}, {"mlp_bias": True},
    ),
    "smollm3": (
        {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True},
        {"no_rope_layer_interval": 2} | QWEN_WINDOWS,
    ),
    "olmo2": ({"hidden_act": "gelu"}, {"attention_bias": True}),
    "gemma3_text": (
        {"hidden_activation": "gelu"}, {"attention_bias": True}, {"attn_logit_softcapping": 2.0},
        {"use_bidirectional_attention": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}},
        {"rope_parameters": {LOCAL: {"type": "linear", "factor": 8.0, "rope_theta": 1e4}}},
        {"rope_parameters": {LOCAL: {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}}},
    ),
}  # fmt: skip


class NoTokenizer:
    """What ``save`` asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def save_pretrained(self, folder):
        pass


def draw_common(family: Family, draw: random.Random) -> dict:
    """Draw the fields that all families have, apart from those of rotary positions."""
    kv_heads = draw.choice((1, 2, 3))
    heads = kv_heads * draw.choice((1, 2, 3, 4))
    fields = {
        "vocab_size": draw.randrange(60, 130),
        "hidden_size": heads * draw.choice([size for size in range(2, 33, 2) if 16 <= heads * size <= 64]),
        "intermediate_size": draw.randrange(8, 64),
        "num_hidden_layers": draw.choice((1, 2, 2, 3, 3, 4, 5, 6, 9)),  # more than 8 are decoded by a scan
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw.choice((4, 8, 10, 16, 24)),
        "rms_norm_eps": draw.choice((1e-6, 1e-5, 1e-2, 0.3)),
        "max_position_embeddings": draw.choice((364, 512, 4096)),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    # What may be absent: sizes that follow from others, and fields with a default.
    if "head_dim" in family.inferred and draw.random() < 0.3:
        del fields["head_dim"]
    if "num_key_value_heads" in family.inferred and kv_heads == heads and draw.random() < 0.5:
        del fields["num_key_value_heads"]
    return {name: value for name, value in fields.items() if name not in DEFAULTS or draw.random() < 0.85}


def draw_scaling(draw: random.Random) -> dict:
    """Draw a scaling of rotary positions, with original positions short of the rows."""
    kind = draw.choice(("default", "linear", "llama3", "yarn"))
    rope = {"rope_type": kind}
    if kind != "default":
        rope["factor"] = draw.choice((1.5, 4.0, 16.0))
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = draw.choice((16, 48, 128))
    if kind == "llama3":
        rope |= {"low_freq_factor": draw.choice((1.0, 2.0)), "high_freq_factor": draw.choice((3.0, 4.0))}
    if kind == "yarn":
        other = {"attention_factor": (0.8, 1.7), "beta_fast": (8.0, 12), "beta_slow": (0.5, 2)}
        rope |= {name: draw.choice(values) for name, values in other.items() if draw.random() < 0.5}
    return rope


def draw_rope(model_type: str, draw: random.Random, scaling: dict) -> dict:
    """Draw the rotary bases, and return the fields of rotary positions in one of the layouts."""
    theta = {} if draw.random() < 0.15 else {"rope_theta": draw.choice((100.0, 1e4, 5e5, 1000000))}
    local = {} if draw.random() < 0.15 else {"rope_theta": draw.choice((50.0, 1e4))}
    is_new, is_gemma = draw.random() < 0.5, model_type == "gemma3_text"
    if is_new and is_gemma:
        return {"rope_parameters": {GLOBAL: scaling | theta, LOCAL: {"rope_type": "default"} | local}}
    if is_new:
        return {"rope_parameters": scaling | theta}
    if scaling == {"rope_type": "default"}:
        scaling = draw.choice((None, scaling))
    elif not is_gemma and draw.random() < 0.5:  # transformers 5 takes no "type" in a config.json of Gemma 3
        scaling = {"type" if name == "rope_type" else name: value for name, value in scaling.items()}
    old = theta | {"rope_scaling": scaling}
    return old | {"rope_local_base_freq": local["rope_theta"]} if is_gemma and local else old


def draw_own(model_type: str, draw: random.Random, layers: int, head_dim: int) -> dict:
    """Draw the fields that only some families have."""
    off = {
        "sliding_window": draw.choice((None, 24)),
        "max_window_layers": draw.randrange(3),
    }  # windows without use
    off |= draw.choice(({}, {"use_sliding_window": False}))
    plain = draw.choice(({}, {"layer_types": [GLOBAL] * layers}))
    if model_type in ("qwen2", "qwen3"):
        return off | plain
    if model_type == "mistral":
        return {"sliding_window": draw.choice((None, *WINDOWS))}
    if model_type == "smollm3":
        rotary = {"no_rope_layers": [draw.randrange(2) for _ in range(layers)]}
        return off | plain | draw.choice(({}, {"no_rope_layer_interval": draw.choice((1, 2, 3))}, rotary, rotary))
    if model_type == "seed_oss":
        return {"attention_bias": True, "residual_dropout": draw.choice((0.0, 0.1))}
    if model_type == "gemma3_text":
        types = {"layer_types": [draw.choice((LOCAL, LOCAL, GLOBAL)) for _ in range(layers)]}
        every = {"sliding_window_pattern": draw.choice((1, 2, 3))}
        return draw.choice(({}, types, types, every)) | {
            "sliding_window": draw.choice(WINDOWS),
            "query_pre_attn_scalar": draw.choice((5, head_dim, 24, 168)),
            "final_logit_softcapping": draw.choice((None, 25.0, 60.0)),
        }
    return {}


def draw_fields(model_type: str, seed: int, number: int, foreign: dict | None = None) -> tuple[dict, dict]:
    """Return (config.json of configuration ``number`` of a family, the part of it that not all families have).

    ``foreign`` replaces drawn fields; its "scaling" the drawn scaling of rotary positions.
    """
    family, draw, foreign = hf_load.FAMILIES[model_type], random.Random(f"{seed} {model_type} {number}"), foreign or {}
    common = draw_common(family, draw)
    rope = draw_rope(model_type, draw, foreign.get("scaling") or draw_scaling(draw))
    layers = foreign.get("num_hidden_layers", common["num_hidden_layers"])
    own = draw_own(model_type, draw, layers, common.get("head_dim", 8))
    if foreign:
        own.pop("layer_types", None)  # they say whether there are windows
    dtype = {draw.choice(("dtype", "torch_dtype")): draw.choice(("float32", "bfloat16"))}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # no token ends a response
    fields = {"model_type": model_type, "architectures": [family.architecture]} | tokens | dtype | common | rope | own
    if "rope_parameters" in foreign:
        fields = {name: value for name, value in fields.items() if name not in rope}
    return fields | {name: value for name, value in foreign.items() if name != "scaling"}, own


def set_peaked_weights(model, seed: int) -> None:
    """Give a model of transformers random weights, large enough for peaked outputs, and norms and biases that do
    something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(0.2 * noise)  # fresh ones multiply by 1
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5))


def write_folder(folder: Path, fields: dict, seed: int):
    """Write a model folder with this config.json; return transformers' model of it, read anew, in float32."""
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))  # it changes the fields
    model = transformers.AutoModelForCausalLM.from_config(config)
    set_peaked_weights(model, seed)
    dtype = getattr(torch, fields.get("dtype") or fields["torch_dtype"])
    model.to(dtype).save_pretrained(folder)
    hf_save.write_json(folder / "config.json", fields)
    return read_theirs(folder)


def read_theirs(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@functools.partial(jax.jit, static_argnums=1)
def our_logits(params, config, prompts: Prompts):
    hidden = transformer.forward(params, config, prompts.tokens_BxP, prompts.mask_BxP)
    raw = transformer.apply_head(hidden, transformer.head_weights(params, config))
    return transformer.finish_logits(raw, config)


@functools.partial(jax.jit, static_argnums=1)
def our_tokens(params, config, prompts: Prompts, rows):
    """Return ``NEW`` greedy tokens of every prompt."""
    sampling = SamplingConfig(NEW, eos_ids=(), pad_id=0, temperature=0.0)
    return sample(params, config, sampling, prompts, rng.row_keys(jax.random.key(0), rows)).tokens_BxT


def their_logits(model, prompts: Prompts) -> np.ndarray:
    """Return the logits of all tokens that are not padding, [tokens, V]."""
    mask = torch.tensor(prompts.mask_BxP, dtype=torch.long)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    tokens = torch.tensor(prompts.tokens_BxP, dtype=torch.long)
    with torch.inference_mode():
        logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits.numpy()[prompts.mask_BxP]


def their_tokens(model, prompts: Prompts) -> np.ndarray:
    """Return ``NEW`` greedy tokens of every prompt."""
    tokens, mask = (torch.tensor(x, dtype=torch.long) for x in (prompts.tokens_BxP, prompts.mask_BxP))
    with torch.inference_mode():
        return model.generate(
            input_ids=tokens, attention_mask=mask, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW,
            eos_token_id=None, pad_token_id=0,
        )[:, -NEW:].numpy()  # fmt: skip


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(folder: Path, fields: dict, seed: int, number: int, mesh) -> dict:
    """Compare one configuration: its errors and equal tokens, or why it was refused. Writes into ``folder``."""
    draw, theirs_at, ours_at = random.Random(f"{seed} {number}"), folder / "theirs", folder / "ours"
    theirs_at.mkdir()
    hf_save.write_json(theirs_at / "config.json", fields)
    try:
        config = hf_load.read_config(theirs_at)
    except ValueError as error:
        return {"refused": str(error).partition("config.json: ")[2] or str(error)}
    theirs = write_folder(theirs_at, fields, number)
    params = hf_load.load(theirs_at, config, mesh)

    def draw_prompts(lengths) -> Prompts:
        texts = [[draw.randrange(config.vocab_size) for _ in range(length)] for length in lengths]
        return left_pad(texts, max(lengths), 0)

    rows, prompts = draw_prompts(ROWS), draw_prompts(draw.sample(PROMPTS, 4))
    expected = their_logits(theirs, rows)
    found = np.asarray(our_logits(params, config, put_batch(rows, mesh)))[rows.mask_BxP]
    tokens = np.asarray(our_tokens(params, config, *put_batch((prompts, np.arange(4)), mesh)))
    same = tokens == their_tokens(theirs, prompts)
    hf_save.save(ours_at, jax.device_get(params), config, NoTokenizer(), (2,), fields["model_type"])
    return {
        "logits": relative_error(found, expected),
        "equal": int(same.sum()),
        "tokens": same.size,
        "export": relative_error(their_logits(read_theirs(ours_at), rows), expected),
    }


def is_right(case: dict) -> bool:
    """Return whether a configuration was refused, or has the numbers of transformers."""
    return "refused" in case or (
        case["logits"] <= TOLERANCE and case["equal"] == case["tokens"] and case["export"] == 0
    )


def compare_family(model_type: str, seed: int, numbers: list[int], configurations: int, mesh) -> list[dict]:
    """Compare the configurations ``numbers``; those from ``configurations`` on have foreign settings."""
    foreign = [{"scaling": rope} for rope in FOREIGN_ROPE] + list(FOREIGN[model_type])
    cases = []
    with progress.Bar(model_type, len(numbers), "configurations") as bar:
        for number in numbers:
            setting = foreign[number - configurations] if number >= configurations else None
            fields, own = draw_fields(model_type, seed, number, setting)
            with tempfile.TemporaryDirectory() as folder:
                found = compare(Path(folder), fields, seed, number, mesh)
            case = {"family": model_type, "seed": seed, "number": number, "foreign": setting} | found
            cases.append(case | {"fields": fields, "own": sorted(own)})
            if not is_right(case):
                print(f"differs: {json.dumps(cases[-1])}", file=sys.stderr, flush=True)
            bar.update()
    jax.clear_caches()
    return cases


def list_varied(cases: list[dict]) -> list[str]:
    """Return the names of the family's own fields that differ between the configurations."""
    names = {name for case in cases for name in case["own"]}
    values = {name: {json.dumps(case["fields"].get(name, "absent")) for case in cases} for name in names}
    return sorted(name for name in names if len(values[name]) > 1)


def summarise(cases: list[dict]) -> dict:
    """Return one row of the table."""
    compared = [case for case in cases if "refused" not in case]
    drawn = [case for case in cases if case["foreign"] is None]
    equal, tokens = (sum(case[name] for case in compared) for name in ("equal", "tokens"))
    return {
        "family": cases[0]["family"],
        "configurations": len(compared),
        "own fields varied": ", ".join(f"`{name}`" for name in list_varied(drawn)) or "-",
        "largest relative error": f"{max((case['logits'] for case in compared), default=0):.1e}",
        "greedy tokens equal": f"{equal} of {tokens}",
        "export error": f"{max((case['export'] for case in compared), default=0):.2g}",
        "refused": len(cases) - len(compared),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", action="append", choices=sorted(hf_load.FAMILIES), help="default: all")
    parser.add_argument("--configurations", type=int, default=20, help="of each family, without foreign settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, help="only this configuration")
    parser.add_argument("--json", type=Path, help="a file for every configuration with its numbers")
    parser.add_argument("--quick", action="store_true", help="one configuration of each family, no foreign settings")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    jax.config.update("jax_disable_most_optimizations", True)  # many programs, each run once
    torch.set_num_threads(1)  # tiny products
    mesh, cases, rows = make_mesh(devices=jax.devices()[:1]), [], []
    with jax.set_mesh(mesh):
        for model_type in options.family or hf_load.FAMILIES:
            count = options.configurations
            numbers = list(range(count + len(FOREIGN_ROPE) + len(FOREIGN[model_type])))
            if options.number is not None:
                if options.number not in numbers:
                    parser.error(f"--number={options.number}: {model_type} has the numbers 0 to {numbers[-1]}")
                numbers = [options.number]
            elif options.quick:
                numbers = [0]
            cases += (found := compare_family(model_type, options.seed, numbers, count, mesh))
            rows.append(summarise(found))
            if len(rows) == 1:
                print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
            print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    refused = collections.Counter((case["family"], case["refused"]) for case in cases if "refused" in case)
    print(*(f"refused by {family}: {message}" for family, message in refused), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(cases, indent=1) + "\n")
    wrong = [case for case in cases if not is_right(case)]
    for case in wrong:
        numbers = f"--seed={case['seed']} --configurations={options.configurations} --number={case['number']}"
        print(f"differs; to repeat: python -m benchmarks.parity --family={case['family']} {numbers}")
    print(json.dumps({"benchmark": "parity", "seed": options.seed, "differ": len(wrong), "rows": rows}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
