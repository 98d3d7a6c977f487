"""Llama 3.1 and 3.2: ``--config=configs/llama3.py:TASK,SIZE``, by default ``:file,8b``.

TASK is file, medical, safety or math (configs/recipes.py); SIZE is 8b, 3b or 1b. ``file`` internalizes a system prompt
with your own questions: set qa_jsonl.context_file and qa_jsonl.path.
"""

from ml_collections import ConfigDict

from ctxjax.configs import recipes

MODELS = {
    "8b": "meta-llama/Llama-3.1-8B-Instruct",
    "3b": "meta-llama/Llama-3.2-3B-Instruct",
    "1b": "meta-llama/Llama-3.2-1B-Instruct",
}
# Size -> slice, chips along the tensor axis, micro-batches.
PLACES = {"8b": ("v5e:4x8", 4, 8), "3b": ("v5e:4x4", 4, 8), "1b": ("v5e:2x4", 4, 8)}
# The same for responses of 16,384 tokens, taken from the models of these sizes in configs/qwen3.py.
LONG = {"8b": ("v5p:4x4x4", 4, 4), "3b": ("v5p:2x4x4", 4, 4), "1b": ("v5p:2x2x4", 4, 4)}


def get_config(arguments: str = "") -> ConfigDict:
    return recipes.make_config(arguments, MODELS, PLACES, LONG, {"": "8b"})
