"""A complete experiment in minutes on two CPU cores: a base trained from scratch, and three arms.

The base learns to apply a substitution table from the system prompt, and to copy if there is none
(ctxjax/data/worlds/rules.py). One table that it has never seen is then internalized.
"""

from ml_collections import ConfigDict

from ctxjax.configs import base


def get_config(architecture: str = "llama") -> ConfigDict:
    """``architecture``: that of the base, a value of ``base.family``."""
    config = base.get_config()
    config.task = "rules"
    config.base.family = architecture
    config.base.steps = 600

    config.model.dtype = "float32"  # on accelerators too, for the same numbers
    # Storing only products needs less memory, and most of a step's time went into requesting memory from the system
    # (benchmarks/README.md, anchor_cost.py).
    config.model.remat = "dots"
    config.mesh.data = -1  # the model is small, so it is replicated on every device
    config.mesh.fsdp = 1

    config.rollout.max_tokens = 19  # three steps, each a step token and five letters; and the end token
    config.loss.chunk = 32

    # A constant rate gives loss spikes at this size. The paper's rate of 5e-6 is for models ten thousand times larger.
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 10
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.0

    # The student changes to the new answer after 30 to 120 steps. With 150 steps, one anchored run of nine had not
    # changed completely (benchmarks/README.md, tiny_worlds.py).
    config.train.steps = 200
    config.train.batch_size = 32
    config.train.save_every = 200
    config.eval.every = 40
    config.eval.batch_size = 128  # the number of dev questions, so that one compiled program serves dev and test
    return config
