"""TRL's self-distillation trainer in benchmarks/race.py; ``pip install trl==1.16.0 datasets accelerate``."""

from __future__ import annotations

import json
from pathlib import Path
import resource
import statistics
import sys
import tempfile
import time

STARTED = time.perf_counter()

from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl.experimental.sdft import SDFTConfig, SDFTTrainer  # noqa: E402


class Clock(TrainerCallback):
    """The time at the start and at the end of every step."""

    def __init__(self):
        self.starts, self.ends = [], []

    def on_step_begin(self, *_, **__):
        self.starts.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())


def race(task: dict) -> dict:
    rows, clock = json.loads(Path(task["rows"]).read_text()), Clock()
    questions = [question for step in rows["questions"] for question in step]
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": question}], "privileged_context": rows["document"]}
            for question in questions
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        config = SDFTConfig(
            output_dir=folder, per_device_train_batch_size=task["batch"], num_generations=1,
            max_steps=task["steps"] + 1, max_prompt_length=None, max_completion_length=task["new"], temperature=1.0,
            shuffle_dataset=False,
            distillation_mode="full_logits", distillation_topk=None, distillation_alpha=1.0, distillation_is_clip=None,
            teacher_model_kind="base", teacher_prompt_template="{privileged_context}\n\n{prompt}",
            learning_rate=rows["lr"], lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, use_cpu=True,
            gradient_checkpointing=False, bf16=False, report_to=[], save_strategy="no", logging_steps=1,
            disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        trainer = SDFTTrainer(model=task["model"], args=config, train_dataset=data, callbacks=[clock])
        trainer.train()
    lengths = [row.get("completions/mean_length") for row in trainer.state.log_history]
    lengths = [length for length in lengths if length is not None][1:]
    return {
        "document_tokens": rows["document_tokens"],
        "step": statistics.median(end - start for start, end in list(zip(clock.starts, clock.ends))[1:]),
        "first": clock.ends[0] - STARTED,
        "tokens": task["batch"] * statistics.mean(lengths) if lengths else None,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    print(json.dumps(race(json.loads(sys.argv[1]))))
