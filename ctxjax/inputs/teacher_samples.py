"""The frozen teacher's responses, with the context, that off-policy steps learn from.

They are sampled once, before the first arm, so all arms learn from the same tokens at the same step. A file of the run
stores their ids and text. A resumed run reads it; its step numbers start at 1::

    {"step": 1, "id": "q17", "question": "...", "tokens": [17, 4, 2], "logprobs": [-0.1, -2.3, -0.0], "text": "..."}

With ``teacher.reasoning = cut`` the tokens are those of the answer, "reasoning" is the text of what was cut, and a
response whose reasoning does not end has no tokens: nothing of it is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
import json
from pathlib import Path

import jax
import numpy as np

from ctxjax import sharding
from ctxjax.config_sections import Experiment
from ctxjax.data import prompts as prompts_lib, responses
from ctxjax.data.pipeline import shuffle_questions, training_batches
from ctxjax.data.task import Row, describe_earlier
from ctxjax.distill.train_step import off_policy_steps, teacher_rollout
from ctxjax.host import processes, progress, workdir as workdir_lib
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.run_inputs import Inputs, make_sampling_config
from ctxjax.types import Rollout

FILE = "teacher_samples.jsonl"
STEPS_A_WRITE, GROWTH = 8, 1.25  # a run that is killed loses at most these steps, or a fifth of what it has drawn


def steps_with_samples(config: Experiment, arm: str) -> list[int]:
    """Return the off-policy steps of an arm; the first step is 0."""
    given = off_policy_steps(config.arms[arm], jax.random.key(config.seed), config.train.steps)
    return np.flatnonzero(given).tolist()


def open_teacher_samples(config: Experiment, inputs: Inputs, workdir: Path, mesh) -> dict[int, Rollout]:
    """Return host rollouts by step, for every step that is off-policy in any arm.

    Read the run's file, and sample what it lacks: all, or the steps by which the run was made longer. Raises ValueError
    if the file does not fit the configuration.
    """
    wanted = sorted({step for arm in config.arms for step in steps_with_samples(config, arm)})
    path = workdir / FILE
    stored = _read(path)
    missing = [step for step in wanted if step not in stored]
    processes.check_same_facts({f"steps that are missing in {path}": missing})
    if missing:
        lines = progress.track(_draw(config, inputs, missing, mesh), "teacher's samples", len(missing), compiles=True)
        text = path.read_text(encoding="utf-8") if stored else ""
        kept = len(text)
        for number, rows in enumerate(lines, 1):
            text += "".join(json.dumps(row) + "\n" for row in rows)
            if number == len(missing) or (number % STEPS_A_WRITE == 0 and len(text) >= GROWTH * kept):
                workdir_lib.write_text(path, text)
                kept = len(text)
        processes.wait("teacher's samples")
        stored = _read(path)
    _check_answers([ids for step in wanted for ids, _ in stored[step]], config)
    return {step: _make_rollout(stored[step], step, path, config, inputs.student.pad_id) for step in wanted}


def _check_answers(responses: list[list[int]], config: Experiment) -> None:
    """Warn of responses that nothing is left of. Raises ValueError if nothing is left of all of them."""
    empty = sum(not tokens for tokens in responses)
    if empty:
        found = (
            f"{empty} of {len(responses)} of the teacher's samples have no answer after their reasoning within "
            f"rollout.max_tokens = {config.rollout.max_tokens} (teacher.reasoning = cut)"
        )
        if empty == len(responses):
            raise ValueError(f"{found}; raise it, or set prompt.teacher_thinking=False")
        print(f"warning: {found}; nothing of them is trained on", flush=True)


def _draw(config: Experiment, inputs: Inputs, wanted: list[int], mesh) -> Iterable[list[dict]]:
    """Sample the teacher's responses; yield the rows of the file step by step."""
    teacher, train = inputs.teacher, config.train
    key, sampling = jax.random.key(config.seed), make_sampling_config(config.teacher.decode, inputs.student)
    batches = training_batches(
        inputs.rows, None, seed=config.seed, batch_size=train.batch_size, retention_rows=0, pad_id=teacher.pad_id
    )
    order = shuffle_questions(len(inputs.rows.rows), config.seed)
    for step, batch in zip(range(wanted[-1] + 1), batches):
        if step not in wanted:
            continue
        batch = sharding.put_batch(batch, mesh)
        rollout = teacher_rollout(teacher.params, batch, key, step, teacher.config, sampling)
        rollout = sharding.to_host(rollout)
        first = step * train.batch_size
        questions = [inputs.rows.rows[order[first + row]] for row in range(train.batch_size)]
        said = [tokens[mask].tolist() for tokens, mask in zip(rollout.tokens_BxT, rollout.mask_BxT)]
        logprobs = [values[mask].tolist() for values, mask in zip(rollout.logprobs_BxT, rollout.mask_BxT)]
        starts = find_starts(config, teacher, questions, said)
        cut = [ids[:start] for ids, start in zip(said, starts)]
        kept = [ids[start:] for ids, start in zip(said, starts)]
        texts, reasoning = (responses.decode(teacher.tokenizer, part, sampling.eos_ids) for part in (kept, cut))
        yield [
            {"step": step + 1, "id": row.id, "question": row.question, **describe_earlier(row), "tokens": ids}
            | {"logprobs": values[start:], "text": text}
            | ({"reasoning": before} if start else {})
            for row, ids, start, values, text, before in zip(questions, kept, starts, logprobs, texts, reasoning)
        ]


def find_starts(config: Experiment, teacher: ModelFolder, rows: list[Row], said: list[list[int]]) -> list[int]:
    """Return the place of the first token that is learned from in each of the teacher's responses to ``rows``."""
    if config.teacher.reasoning == "keep":
        return [0] * len(said)
    opened = (prompts_lib.opens_reasoning(teacher.tokenizer, row, config.prompt) for row in rows)
    return [responses.find_answer(teacher.tokenizer, ids, teacher.stop_ids, o) for ids, o in zip(said, opened)]


def cut_reasoning(config: Experiment, teacher: ModelFolder, rows: list[Row], said: Rollout) -> Rollout:
    """Return the teacher's responses to ``rows`` without what is not learned from (``find_starts``), on the host."""
    texts = [tokens[mask].tolist() for tokens, mask in zip(said.tokens_BxT, said.mask_BxT)]
    logprobs = [values[mask] for values, mask in zip(said.logprobs_BxT, said.mask_BxT)]
    starts = find_starts(config, teacher, rows, texts)
    kept = [(ids[start:], values[start:]) for ids, values, start in zip(texts, logprobs, starts)]
    return _pad(kept, said.tokens_BxT.shape, teacher.pad_id)


def _read(path: Path) -> dict[int, list[tuple[list[int], list[float]]]]:
    """Return the tokens and log-probabilities of the file's responses by step; {} if there is no file."""
    by_step: dict[int, list] = {}
    if not path.exists():
        return by_step
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                by_step.setdefault(row["step"] - 1, []).append((row["tokens"], row["logprobs"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error!r}; delete the file, so that it is sampled again"
                ) from None
    return by_step


def _make_rollout(rows: list, step: int, path: Path, config: Experiment, pad_id: int) -> Rollout:
    """Pad the responses of one step to a batch, after checking their number and lengths."""
    shape = (config.train.batch_size, config.rollout.max_tokens)
    least = 0 if config.teacher.reasoning == "cut" else 1
    if len(rows) != shape[0] or any(not least <= len(ids) == len(values) <= shape[1] for ids, values in rows):
        raise ValueError(
            f"{path} does not hold {shape[0]} responses of at most {shape[1]} tokens for step {step + 1}; delete the "
            "file, so that it is sampled again"
        )
    return _pad(rows, shape, pad_id)


def _pad(rows: list, shape: tuple[int, int], pad_id: int) -> Rollout:
    """Return a host rollout of (tokens, their log-probabilities) of each response."""
    tokens, mask = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    logprobs = np.zeros(shape, np.float32)
    for row, (ids, values) in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)], logprobs[row, : len(ids)] = ids, True, values
    return Rollout(tokens, mask, logprobs)
