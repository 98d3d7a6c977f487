"""Plan a run (also ``python -m ctxjax.plan``)::

    ctxjax plan --config=configs/llama3.py:file,1b --topology=v5e:2x4 --prefix=500 --question=100

Compiles the whole training step for a TPU slice, which need not exist here (libtpu's compiler does it), or with
``--devices=N`` for local devices. Prints the memory of a chip by item, arithmetic, traffic and lower bounds of a step's
time. Weights are not read. The lengths of prompts come from the task's data, which is encoded with the tokenizer of
``model.path`` as in a run, or, without data, from ``--prefix`` and ``--question``.
"""

from __future__ import annotations

import json

from absl import flags
import jax
from ml_collections import config_flags

from ctxjax.host import command, preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration, for example configs/llama3.py.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU slice: v4, v5e, v5p or v6e and its chips, such as v5e:4x4.")
_DEVICES = flags.DEFINE_integer("devices", None, "Plan for this number of local devices instead.")
_PREFIX = flags.DEFINE_integer(
    "prefix",
    None,
    "Without data: tokens that prompts with the context start with; read once for all rows if these share the context.",
)
_QUESTION = flags.DEFINE_integer("question", None, "Without data: tokens of the longest prompt without the context.")
_ARM = flags.DEFINE_string("arm", None, "Arm of the run; default: the one with the most passes.")
_EFFORT = flags.DEFINE_enum(
    "effort",
    "least",
    ["memory", "least", "full"],
    "With --topology, how far to compile. memory: until memory is known (a minute). least: to the end with the least "
    "optimisation (minutes; shows collectives too). full: as a run does (several times as long).",
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(_) -> int:
    if _CONFIG.value is None:
        raise ValueError("--config is missing; for example --config=configs/llama3.py")
    config = _CONFIG.value
    topology = _TOPOLOGY.value or (None if _DEVICES.value else config.get("slice") or None)
    if bool(topology) == bool(_DEVICES.value):
        raise ValueError("give either --topology, such as v5e:4x4, or --devices=N for local devices")
    if _EFFORT.present and not topology:
        raise ValueError(f"--effort={_EFFORT.value} is for TPU slices; local devices compile as a run does")
    if (_PREFIX.value is None) != (_QUESTION.value is None):
        raise ValueError("give --prefix and --question together, or neither of them to read the lengths from the data")
    command.quieten()
    if _DEVICES.value and _DEVICES.value > 0:
        command.keep_programs(config.get("compile_cache"))  # the compiler of slices that are not here has no cache
        jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    from ctxjax.plan import run  # after the number of devices is set

    lengths = None if _PREFIX.value is None else run.Lengths(_PREFIX.value, _QUESTION.value)
    result = run.plan(config, topology, _DEVICES.value, _ARM.value, _EFFORT.value, lengths)
    if _JSON.value:
        print(json.dumps(result))
    else:
        from ctxjax.plan.report import as_text

        print(as_text(result))
    return 0 if result.get("verdict", "fits") == "fits" else 1


if __name__ == "__main__":
    preemption.listen()
    command.run(main, _CONFIG)
