"""Every command in README, docs/, notebooks/ and CONTRIBUTING.md does what its page says, in small: all of them run in
one folder, with a random model in place of a real one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
import shlex
import string

from conftest import write_random_model
from docs_test import COMMANDS
import forked
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ctxjax.data.worlds import word_tokenizer

pytestmark = pytest.mark.slow

NOT_RUN = {
    "ctxjax.plan --config=configs/llama3.py:medical --topology=v5e:4x8 --prefix=124 --question=512": "needs libtpu",
    "ctxjax.plan --config=configs/llama3.py:medical,3b --topology=v5e:4x4 --prefix=124 --question=512": "needs libtpu",
    "ctxjax.main --config=configs/debug.py --workdir=/tmp/debug": "is the fixture debug_run of all tests",
}
# Parts of commands that have whole tests of their own: extract, rounds, study and dose, chat_rows.
ELSEWHERE = ("ctxjax.extract", "ctxjax.rounds", "ctxjax.study", "experience.txt", "teacher_thinking", "lora.init")
# Settings of every run: one step of one arm. The others are those of the command.
SMALL = {
    "cpu_devices": 1, "train.steps": 1, "train.batch_size": 4, "optim.warmup_steps": 1, "rollout.max_tokens": 6,
    "run_arms": ("opcd",), "model.remat": "none", "compile_cache": "cache/xla",
    "eval.every": 0, "eval.batch_size": 4, "eval.temperature": 1.0, "eval.views": (), "eval.bootstrap": 20,
    "base.steps": 1, "base.batch_size": 4, "base.warmup_steps": 1, "base.width": 16, "base.layers": 1,
    "base.query_heads": 2, "base.kv_heads": 1, "base.head_dim": 8, "base.mlp_width": 16, "base.cache": "cache",
}  # fmt: skip
SPLITS = ("train_questions", "dev_questions", "test_questions")
TASKS = {
    "configs/tiny.py": dict.fromkeys([f"rules.{split}" for split in SPLITS], 16),
    "configs/tiny_grid.py": {f"tiny_grid.{split}": 8 for split in SPLITS},
    "configs/bake.py": {
        "self_study.questions": 60, "self_study.longest_question": 12, "eval.batch_size": 16,
        "self_study.other_contexts_file": "others.jsonl", "qa_jsonl.other_contexts_file": "others.jsonl",
        "qa_jsonl.dev_questions": 4, "qa_jsonl.test_questions": 4,
    },
    "configs/smollm2.py": {
        "self_study.questions": 60, "self_study.longest_question": 12, "self_study.other_contexts_file": "others.jsonl",
        "model.path": "models/my-llama",
    },
    "configs/smollm2.py:handbook": {f"handbook.{split}": 8 for split in SPLITS} | {"model.path": "models/my-llama"},
    "configs/smollm2.py:style,lora": {f"style.{split}": 8 for split in SPLITS} | {"model.path": "models/my-llama"},
}  # fmt: skip
# Arms that later commands take from the run in a folder.
ARMS = {"runs/mine": ("opcd", "opcd_retained")}


def list_once() -> list:
    """Return a parameter for every command that differs: runs first, then exports, then all others."""
    found = {shlex.join(words): (words, typed) for _, words, typed in COMMANDS}
    order = ["ctxjax.main", "ctxjax.export"]
    ranks = {text: [*order, words[0]].index(words[0]) for text, (words, _) in found.items()}
    run = [text for text in found if text not in NOT_RUN and not any(part in text for part in ELSEWHERE)]
    return [pytest.param(*found[text], id=text) for text in sorted(run, key=ranks.get)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, safety_sets) -> Path:
    """A folder with what the pages take for granted: a model, prompts, questions, data."""
    folder = tmp_path_factory.mktemp("documented")
    write_model(folder / "models" / "my-llama")
    for name in ("system_prompt.txt", "prompt.txt"):
        (folder / name).write_text("Answer with a number. Be kind. The towns have numbers.\n")
    rows = [{"question": f"How many legs have {n} hens?", "answer": f"#### {2 * n}"} for n in range(40)]
    for name in ("questions.jsonl", "gsm8k_train.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "others.jsonl").write_text(
        "".join(json.dumps({"context": f"Count {n} things.", "check": "quoted"}) + "\n" for n in range(8))
    )
    (folder / "data").symlink_to(safety_sets)
    return folder


def write_model(folder: Path) -> None:
    """Write a random model that says finished questions now and then: half of its tokens end a response, a quarter are
    questions. Its greedy response is "7"."""
    ends, questions = [f"\0{n}" for n in range(400)], [f" Where is the town {n}?" for n in range(200)]
    words = [*string.printable[:95], "\n", *questions, *ends]
    tokenizer = word_tokenizer.build(words, r" Where is the town \d+\?|\x00\d+|[\s\S]")
    sizes = {"width": 16, "layers": 1, "query_heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 16}
    write_random_model(folder, tokenizer, max_positions=8192, **sizes)
    fields = json.loads((folder / "generation_config.json").read_text())
    fields["eos_token_id"] += tokenizer.convert_tokens_to_ids(ends)
    (folder / "generation_config.json").write_text(json.dumps(fields))
    weights = load_file(folder / "model.safetensors")
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding *= 50  # so that the last token decides about the next
    for before, after in itertools.pairwise(tokenizer.convert_tokens_to_ids(["<|assistant|>", "7", ends[0]])):
        head[after] += embedding[before] / np.linalg.norm(embedding[before])
    save_file(weights, folder / "model.safetensors")


@pytest.fixture(scope="module")
def runs() -> dict[str, str]:
    """Folder of a run -> its command."""
    return {}


def shrink(words: list[str], runs: dict[str, str]) -> list[str]:
    """Return the command with the small settings of its configuration. A second run of a folder gets another folder."""
    given = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    settings = {}
    if words[0] == "ctxjax.main":
        name = given.get("--workdir", "")
        settings = SMALL | TASKS[given["--config"]] | ({"run_arms": ARMS[name]} if name in ARMS else {})
        while runs.setdefault(name, shlex.join(words)) != shlex.join(words):
            name += "-again"
        words = [f"--workdir={name}" if word.startswith("--workdir=") else word for word in words]
    elif words[0] in ("ctxjax.evaluate", "ctxjax.plan"):
        settings = SMALL | {"safety.test_questions": 4}
    elif words[0] == "ctxjax.chat":
        words = [*words, "--max_tokens=4", "--compile_cache=cache/xla"]
    words = [*words, *(f"--config.{field}={value}" for field, value in settings.items())]
    return [word.replace("=/models/", "=models/") for word in words]


@pytest.mark.parametrize(("words", "typed"), list_once())
def test_a_documented_command_runs(words, typed, place, runs):
    module, *arguments = shrink(words, runs)
    ended = forked.run(module, arguments, seconds=580, folder=place, typed=typed or "What is your name?\n/quit\n")
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_commands_that_are_not_run_are_still_in_the_pages():
    typed = {shlex.join(words) for _, words, _ in COMMANDS}
    assert typed >= NOT_RUN.keys()
    assert not [part for part in ELSEWHERE if not any(part in text for text in typed)]
