"""Llama 3.1 and 3.2: ``--config=configs/llama3.py:TASK,SIZE``, by default ``:file,8b``.

TASK is one of file, medical, safety, math (configs/recipes.py), SIZE one of 8b, 3b, 1b. ``file`` internalizes a system
prompt file with questions of your own: give qa_jsonl.path and qa_jsonl.context_file.
"""

from ml_collections import ConfigDict

from configs import recipes

MODELS = {
    "8b": "meta-llama/Llama-3.1-8B-Instruct",
    "3b": "meta-llama/Llama-3.2-3B-Instruct",
    "1b": "meta-llama/Llama-3.2-1B-Instruct",
}
# Slice, chips along the tensor axis, micro-batches.
PLACES = {"8b": ("v5e:4x8", 4, 8), "3b": ("v5e:4x4", 4, 8), "1b": ("v5e:2x4", 4, 8)}
# Responses of 16,384 tokens: where configs/qwen3.py trains its models of these sizes.
LONG = {"8b": ("v5p:4x4x4", 4, 4), "3b": ("v5p:2x4x4", 4, 4), "1b": ("v5p:2x2x4", 4, 4)}


def get_config(arguments: str = "") -> ConfigDict:
    return recipes.setting(arguments, MODELS, PLACES, LONG, {"": "8b"})
