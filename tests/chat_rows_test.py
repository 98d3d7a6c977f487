"""Rows of several turns, from the file to the audit."""

import dataclasses
import json

from conftest import write_random_model
import forked
import jax
import numpy as np
import pytest

from ctxjax import export
from ctxjax.audit import audit
from ctxjax.data.worlds import word_tokenizer
from ctxjax.models import lora
from ctxjax.models.hf import adapters, load as hf_load, save as hf_save
from ctxjax.models.lora import LoraConfig
from ctxjax.sharding import make_mesh
from ctxjax.training import stored_arms


@pytest.mark.slow
def test_chats_with_earlier_turns_are_trained_on_evaluated_and_audited(letters_folder, tmp_path):
    rows = []
    for n in range(24):
        said = [f"I say {n}.", "Yes?", "And one more?", f"It is {n + 1}."]
        rows.append([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)])
    path, run = tmp_path / "chats.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    sizes = {
        "model.path": letters_folder, "task": "qa_jsonl", "qa_jsonl.path": path, "qa_jsonl.messages": "messages",
        "qa_jsonl.context": "Count on.", "qa_jsonl.dev_questions": 4, "qa_jsonl.test_questions": 4,
        "qa_jsonl.other_contexts_file": "", "cpu_devices": 1, "train.steps": 2, "train.batch_size": 4,
        "rollout.max_tokens": 6, "loss.off_policy_steps": 1, "eval.batch_size": 4, "eval.every": 0,
        "run_arms": "('opcd',)", "compile_cache": "",
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in sizes.items()]
    done = forked.run("ctxjax.main", ["--config=configs/base.py", f"--workdir={run}", *flags])
    assert done.returncode == 0, done.stderr

    items = [json.loads(line) for line in (run / "opcd" / "items.jsonl").read_text().splitlines()]
    bare = [item for item in items if item["view"] == "bare"]
    assert len(bare) == 4 and {item["question"] for item in bare} == {"And one more?"}
    for item in bare:
        ((said, reply),) = item["earlier"]
        n = int(said.removeprefix("I say ").removesuffix("."))
        assert (reply, item["reference"]) == ("Yes?", f"{n + 1}")  # qa_jsonl.grading: numeric
    samples = [json.loads(line) for line in (run / "teacher_samples.jsonl").read_text().splitlines()]
    assert all(sample["earlier"][0][1] == "Yes?" for sample in samples)
    checks = list(audit.check_folder(run, []))
    assert not [problem for check in checks for problem in check.wrong]
    seen = [fact for check in checks for fact in check.seen]
    assert "the prompts' tokens are those of the views" in seen, [check.unchecked for check in checks]
    changed = bare[0] | {"earlier": [["I say 99.", "Yes?"]]}
    lines = [json.dumps(changed if item == bare[0] else item) + "\n" for item in items]
    (run / "opcd" / "items.jsonl").write_text("".join(lines))
    wrong = [problem for check in audit.check_folder(run, []) for problem in check.wrong]
    assert any("digest of the question" in problem for problem in wrong)
    assert any("digest of the prompt's tokens" in problem for problem in wrong)


THINKS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
    "<|assistant|>{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
)
ADAPTER = LoraConfig(rank=2, alpha=4.0, targets=("q", "v"), rslora=True)


@pytest.fixture
def thinker(tmp_path, letters):
    """A random model with the tags of reasoning, which says </think> often, and an adapter of it in PEFT's format."""
    words = sorted(word for word in letters.get_vocab() if len(word) == 1)  # its order changes by process
    tokenizer = word_tokenizer.build([*words, "<think>", "</think>"], r"</?think>|[\s\S]")
    tokenizer.chat_template = THINKS
    sizes = {"width": 16, "layers": 1, "query_heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 16}
    folder = write_random_model(tmp_path / "thinker", tokenizer, **sizes)
    model, random = hf_load.read_config(folder), np.random.default_rng(0)
    specs = lora.specs(model, ADAPTER)["layers"]
    adapter = {"layers": {name: np.float32(0.1 * random.normal(size=spec.shape)) for name, spec in specs.items()}}
    (tmp_path / "adapter").mkdir()
    hf_save.save_adapter(tmp_path / "adapter", adapter, model, ADAPTER, hf_load.FAMILIES["llama"], str(folder))
    return folder, tmp_path / "adapter"


@pytest.mark.slow
def test_a_thinking_teacher_with_notes_a_bare_student_and_an_adapter_that_goes_on(thinker, tmp_path):
    """The command of docs/data.md with its own file, model and sizes."""
    folder, adapter = thinker
    rows = []
    for n in range(40):
        said = [f"I say {n}.", "Yes?", "And?", "Then more.", "And one more?", f"It is {n + 1}."]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        rows.append({"messages": messages, "notes": {"text": f"note {n}"}})
    path, run = tmp_path / "chats.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "qa_jsonl", "model.path": folder, "qa_jsonl.path": path, "qa_jsonl.messages": "messages",
        "qa_jsonl.context_template": "The user does not see: {notes.text}", "prompt.thinking": False,
        "prompt.teacher_thinking": True, "teacher.reasoning": "cut", "run_arms": "('sft',)", "lora.init": adapter,
        "lora.rank": 2, "lora.alpha": 4, "lora.targets": "('q', 'v')", "lora.rslora": True,
        "eval.meters": "('trace_gap', 'drift')",
    }  # fmt: skip
    sizes = {
        "cpu_devices": 1, "train.steps": 2, "train.batch_size": 8, "rollout.max_tokens": 48, "eval.batch_size": 4,
        "eval.every": 1, "eval.views": "()", "qa_jsonl.dev_questions": 12, "qa_jsonl.test_questions": 12,
        "compile_cache": "", "optim.lr": 1e-2, "optim.warmup_steps": 0, "qa_jsonl.other_contexts_file": "",
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in (settings | sizes).items()]
    shown = forked.run("ctxjax.main", ["--config=configs/bake.py", "--dump_batch", *flags])
    assert shown.returncode == 0, shown.stderr
    text = "".join(shown.stdout.replace("│", "").split())
    shared, row = text.split("Row1", 1)
    bare, rest = row.split("Row2")[0].split("contextview,", 1)
    assert "<|system|>Theuserdoesnotsee:note" in shared and "Theuser" not in bare
    assert "<|assistant|><think></think>response" not in rest and "<|assistant|><think>firstdiff" in rest
    assert bare.endswith("<|assistant|><think></think>")

    done = forked.run("ctxjax.main", ["--config=configs/bake.py", f"--workdir={run}", *flags])
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in (run / "teacher_samples.jsonl").read_text().splitlines()]
    cut = [sample for sample in samples if "reasoning" in sample and sample["tokens"]]
    assert len(samples) == 16 and cut and all("</think>" not in sample["text"] for sample in samples)
    assert all(sample["reasoning"].rstrip().endswith("</think>") for sample in cut)
    assert all(len(sample["earlier"]) == 2 for sample in samples)
    empty = sum(not sample["tokens"] for sample in samples)
    assert f"warning: {empty} of 16 of the teacher's samples have no answer" in done.stdout or not empty
    results = json.loads((run / "results.json").read_text())
    assert results["base"]["drift"] == pytest.approx(0, abs=1e-6) and results["sft"]["drift"] > 1e-6
    assert {"trace_gap"} <= results["base"].keys() & results["sft"].keys()
    problems = [problem for check in audit.check_folder(run, []) for problem in check.wrong]
    assert not problems

    export.export(run, tmp_path / "again", adapter=True)
    mesh = make_mesh(devices=jax.devices()[:1])
    experiment, model = stored_arms.read_experiment(run), hf_load.read_config(folder)
    with jax.set_mesh(mesh):
        trained = stored_arms.read_trained(run, experiment, model, "sft", 2, mesh)
        start, again = (adapters.load(one, str(folder), folder, ADAPTER, mesh) for one in (adapter, tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, again, trained)
    assert dataclasses.asdict(experiment.lora) == dataclasses.asdict(ADAPTER)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, trained)
    assert all(0 < change < 0.05 for change in moved["layers"].values()), moved  # two steps from the given adapter
