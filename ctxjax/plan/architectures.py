"""Architectures for planning: from a model's config.json or, if that cannot be read, from the table here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ctxjax.host.hub import HUB_ID, split_revision
from ctxjax.models.architecture import ModelConfig
from ctxjax.models.hf import load as hf_load

_LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
_LLAMA32 = _LLAMA3 | {"tie_word_embeddings": True, "rope_scaling": _LLAMA3["rope_scaling"] | {"factor": 32.0}}
_QWEN25 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e6}
_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1e6,
}  # fmt: skip
_MISTRAL = {
    "model_type": "mistral", "vocab_size": 32768, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None,
}  # fmt: skip
_SMOLLM3 = {
    "model_type": "smollm3", "vocab_size": 128256, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536, "rope_theta": 5e6, "no_rope_layer_interval": 4,
}  # fmt: skip
_OLMO2 = {
    "model_type": "olmo2", "vocab_size": 100352, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
    "rope_theta": 5e5,
}  # fmt: skip
_SEED_OSS = {
    "model_type": "seed_oss", "vocab_size": 155136, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 524288, "rope_theta": 1e7,
}  # fmt: skip
_GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 262144, "head_dim": 256, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 512,
    "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
}  # fmt: skip


def _make_sizes(width: int, layers: int, heads: int, mlp: int) -> dict:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
    }  # fmt: skip


_QWEN3_4B = _QWEN3 | _make_sizes(2560, 36, 32, 9728) | {"tie_word_embeddings": True}
# Hub id -> the architecture fields of its published config.json.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3 | _make_sizes(4096, 32, 32, 14336),
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA32 | _make_sizes(3072, 28, 24, 8192),
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA32 | _make_sizes(2048, 16, 32, 8192) | {"head_dim": 64},
    "Qwen/Qwen2.5-7B-Instruct": _QWEN25
    | _make_sizes(3584, 28, 28, 18944)
    | {"num_key_value_heads": 4, "vocab_size": 152064},
    "Qwen/Qwen2.5-3B-Instruct": _QWEN25
    | _make_sizes(2048, 36, 16, 11008)
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "Qwen/Qwen3-8B": _QWEN3 | _make_sizes(4096, 36, 32, 12288),
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "Qwen/Qwen3-4B-Instruct-2507": _QWEN3_4B | {"max_position_embeddings": 262144, "rope_theta": 5e6},
    "Qwen/Qwen3-1.7B": _QWEN3 | _make_sizes(2048, 28, 16, 6144) | {"tie_word_embeddings": True},
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL | _make_sizes(4096, 32, 32, 14336),
    "HuggingFaceTB/SmolLM3-3B": _SMOLLM3 | _make_sizes(2048, 36, 16, 11008),
    "allenai/OLMo-2-1124-7B-Instruct": _OLMO2 | _make_sizes(4096, 32, 32, 11008),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": _SEED_OSS | _make_sizes(5120, 64, 80, 27648),
    "google/gemma-3-1b-it": _GEMMA3 | _make_sizes(1152, 26, 4, 6912),
}


def find_architecture(path: str, dtype: str, remat) -> tuple[ModelConfig, str]:
    """Return a model's architecture and its source: the folder, the Hub's cache, the Hub, or PUBLISHED.

    Only config.json is read, never weights. Raises FileNotFoundError if there is none.
    """
    if Path(path).expanduser().is_dir():
        return hf_load.read_config(Path(path).expanduser(), dtype, remat), path
    if not HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"model folder {path} does not exist; give a folder, or a Hub id such as org/name")
    name, revision = split_revision(path)
    for offline in (True, False):
        try:
            file = hf_hub_download(name, "config.json", revision=revision, local_files_only=offline, etag_timeout=5)
            return hf_load.read_config(Path(file).parent, dtype, remat), "the Hub's cache" if offline else "the Hub"
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError):
            continue
    if name not in PUBLISHED:
        raise FileNotFoundError(
            f"the Hub cannot be reached for {name}'s config.json, and the table of published architectures has only "
            f"{', '.join(PUBLISHED)}; give the folder of a copy"
        )
    family = hf_load.find_family(PUBLISHED[name], Path(name))
    config = dataclasses.replace(family.config_from_hf(PUBLISHED[name]), dtype=dtype, remat=remat)
    return config, "the table of published architectures, since the Hub could not be reached"
