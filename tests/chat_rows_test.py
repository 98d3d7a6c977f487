"""Rows of several turns, from the file to the audit."""

import json

import forked
import pytest

from ctxjax.audit import audit


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
