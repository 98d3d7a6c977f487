"""The README.md of an exported model: what it is, how to open it, what was measured, how it was trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ctxjax.data.prompts import PromptConfig
from ctxjax.report.run_files import read_results
from ctxjax.report.tables import glossary, results_table

_OPEN_MODEL = """\
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = PreTrainedTokenizerFast.from_pretrained("this folder")  # tokenizer.json itself, whatever class is named
"""
_OPEN_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "this folder")
"""


def model_card(
    workdir: Path,
    arm: str,
    step: int,
    base: str,
    config: dict,
    adapter: bool,
    weights: str,
    revision: str | None = None,
) -> str:
    """Return the card as Markdown with the front matter that model hubs read.

    ``workdir`` is the run's folder; without results.json in it, as in an unfinished run, the card has no table. ``arm``
    and ``step`` name the exported checkpoint, ``base`` the folder or Hub id of the model that training started from,
    and ``revision`` that of the Hub id, if it was given.
    ``config`` is the run's config.json; ``adapter`` says whether an adapter was exported and not the whole model.
    ``weights`` is the number type of the weights.
    """
    front = ["library_name: " + ("peft" if adapter else "transformers"), "tags:", "- ctxjax"]
    loss = config["loss"] | config["arms"][arm]
    shown, given = (f"{base}@{revision}", f'"{base}", revision="{revision}"') if revision else (base, f'"{base}"')
    lines = [
        "---",
        *front,
        "---",
        f"# {Path(base).name}, {arm}, step {step}",
        "",
        f"{'A low-rank adapter for ' if adapter else ''}`{shown}`, trained by {_describe_training(loss, step)} "
        f"(ctxjax): without a context in its prompt it is to answer as {_name_teacher(config, loss)} answers with it. "
        f"The loss is L_distill ({_name_divergence(loss, step)}) + {loss['beta']:g} L_anchor + {loss['mu']:g} L_retain"
        f"{_name_reference(loss)}.",
        "",
        "```python",
        (_OPEN_ADAPTER.format(base=given) if adapter else _OPEN_MODEL).rstrip(),
        "```",
        "",
        f"weights: {weights}",
        "",
        *_describe_prompts(config.get("prompt", {})),
        "## Results",
        "",
        _results(workdir, arm, step),
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(config, indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _find_sources(loss: dict, step: int) -> tuple[bool, bool]:
    """Return whether ``step`` steps with this ``config.loss`` have learned from the student's responses, and from the
    teacher's."""
    from_student = loss["on_policy_fraction"] > 0 and loss["off_policy_steps"] < step
    return from_student, loss["on_policy_fraction"] < 1 or loss["off_policy_steps"] > 0


def _describe_training(loss: dict, step: int) -> str:
    """Say whose responses ``step`` steps with this ``config.loss`` have learned from."""
    from_student, from_teacher = _find_sources(loss, step)
    if not from_student:
        return "off-policy context distillation, on its teacher's responses"
    if not from_teacher:
        return "on-policy context distillation"
    return "context distillation, on its own responses and its teacher's"


def _name_divergence(loss: dict, step: int) -> str:
    """Name the divergence of ``step`` steps, and that of the steps on the teacher's responses if it was another one."""
    from_student, from_teacher = _find_sources(loss, step)
    own = of_teacher = loss["divergence"]
    if loss["on_policy_fraction"] > 0:  # as LossConfig.of_off_policy_steps; older runs lack the field
        of_teacher = loss.get("off_policy_divergence") or own
    if own == of_teacher or not from_teacher:
        return own
    return f"{own}; on the teacher's responses {of_teacher}" if from_student else of_teacher


def _name_teacher(config: dict, loss: dict) -> str:
    """Name what L_distill compares with."""
    if loss.get("teacher", "frozen") == "ema":
        return "the moving average of its own weights"
    if config.get("teacher", {}).get("path") or config.get("teacher_base", {}).get("steps"):
        return "its teacher"
    return "its base, with the adapter that training began with," if config.get("lora", {}).get("init") else "its base"


def _name_reference(loss: dict) -> str:
    weight = loss.get("reference", 0.0)
    return f" + {weight:g} KL(student || teacher, both without a context)" if weight else ""


def _describe_prompts(prompt: dict) -> list[str]:
    """Name the fields of ``config.prompt`` that the run has changed: the folder's chat template does not know them."""
    defaults = json.loads(json.dumps(dataclasses.asdict(PromptConfig())))
    changed = [f"prompt.{name} = {json.dumps(value)}" for name, value in prompt.items() if value != defaults.get(name)]
    if not changed:
        return []
    return [f"prompts: {', '.join(changed)}; with other ones the prompts, and so the answers, are not the run's", ""]


def _results(workdir: Path, arm: str, step: int) -> str:
    """Return the table of the base and the arm, and what its columns mean."""
    try:
        results = read_results(workdir)
    except FileNotFoundError:
        return "The run has not been evaluated on its test questions."
    if arm not in results:
        return "This arm has not been evaluated on its test questions."
    evaluated = results[arm].get("step")
    note = "On the run's test questions."
    if evaluated != step:
        note += f" **The row of {arm} is of step {evaluated}, not of the exported step {step}.**"
    table = results_table({name: results[name] for name in ("base", "teacher", arm) if name in results})
    definitions = "\n".join(f"- {header}: {definition}" for header, definition in glossary("results"))
    return f"{note}\n\n{table}\n\n{definitions}"
