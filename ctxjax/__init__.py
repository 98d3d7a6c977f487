"""ctxjax: on-policy context distillation with removable contexts, in JAX, on TPU, GPU and CPU.

The names in ``__all__`` are the API for notebooks and scripts. They are imported at first use. So the numerical core
(types, rng, masks, sharding, models, distill) can be imported without tokenizers and data loaders.
"""

import importlib
import logging

# transformers, which only tokenizes here, asks for PyTorch when it is imported.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())

__all__ = ["generate", "load_model", "logits", "train"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'ctxjax' has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(importlib.import_module("ctxjax.api"), name)
