"""A real model: SmolLM2-135M-Instruct learns a document by heart, in half an hour for each arm on two CPU cores.

    python -m ctxjax.main --config=configs/smollm2.py:handbook --workdir=runs/handbook
    python -m ctxjax.main --config=configs/smollm2.py:style,lora --workdir=runs/style

``:handbook`` (the default) internalizes twelve invented facts about a small country (ctxjax/data/tasks/handbook.py),
``:style`` a system prompt that asks for French (ctxjax/data/tasks/style.py). ``lora`` trains an adapter in place of all
weights. The model comes from the Hub; ``--config.model.path=FOLDER`` takes a folder.

What to expect of the base: 2 % without the document, over 95 % with it, three quarters under others; it answers
every yes-or-no question with "no". It obeys the demand for French in three of four replies (docs/real_model.md).
"""

from ml_collections import ConfigDict

from ctxjax.configs import base

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS = 60  # about 15 s each on two cores
# Ways to get facts in, and to keep the document readable meanwhile; run_arms chooses. ``warm``: the first half of the
# steps by the forward KL on the teacher's samples, since a student seldom says what it does not know yet.
WARM = {"off_policy_steps": STEPS // 2, "off_policy_divergence": "forward_kl"}
ARMS = {
    "opcd_warm": WARM | {"beta": 0.0, "mu": 0.0},
    "opcd_warm_anchored": WARM | {"beta": 0.5, "mu": 0.0},
    "opcd_warm_handover": WARM | {"beta": 0.5, "mu": 0.0, "anchor": "handover"},
    "opcd_warm_retained": WARM | {"beta": 0.5, "mu": 1.0, "anchor": "handover"},
    "opcd_warm_retention_alone": WARM | {"beta": 0.0, "mu": 1.0},
    "opcd_mixed": {"on_policy_fraction": 0.5},
    "opcd_forward": {"divergence": "forward_kl"},
}


def _set_handbook(config: ConfigDict) -> None:
    config.task = "handbook"
    config.run_arms = ("opcd_warm", "opcd_warm_anchored", "opcd_warm_retained")
    config.rollout.max_tokens = 24  # an answer is a sentence of some 12 tokens


def _set_style(config: ConfigDict) -> None:
    config.task = "style"
    config.style.demand = "french"
    config.style.dev_questions = 24
    config.rollout.max_tokens = 40


def _set_lora(config: ConfigDict) -> None:
    config.lora.rank = 16
    config.optim.lr = 1e-3  # an adapter learns with a higher rate than all weights


ARGUMENTS = {"handbook": _set_handbook, "style": _set_style, "lora": _set_lora}


def get_config(arguments: str = "") -> ConfigDict:
    """Build the configuration for "handbook" or "style", with "lora" or without. Raises ValueError for others."""
    names = [name.strip().lower() for name in arguments.split(",") if name.strip()]
    for name in names:
        if name not in ARGUMENTS:
            raise ValueError(f"argument {name!r} is not known; choose from {', '.join(ARGUMENTS)}")
    if {"handbook", "style"} <= set(names):
        raise ValueError("arguments 'handbook' and 'style' are two tasks; choose one")
    config = base.get_config()
    config.model.path = HUB_ID
    config.model.remat = "dots"
    config.cpu_devices = 1  # on two cores one device is faster than two, and needs 2 GiB less
    config.mesh.data, config.mesh.fsdp = -1, 1  # every device holds the whole model

    config.optim.lr = 2e-4
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 5
    config.optim.weight_decay = 0.0

    config.train.steps = STEPS
    config.train.batch_size = 16
    config.train.retention_rows = 4  # enough to stay obedient (docs/results.md); more make a step dearer
    config.train.save_every = 30
    config.loss.chunk = 24
    for name, changes in ARMS.items():
        config.arms[name] = ConfigDict(changes)
    config.eval.every = 30
    config.eval.batch_size = 64
    for name in names if {"handbook", "style"} & set(names) else ["handbook", *names]:
        ARGUMENTS[name](config)
    return config
