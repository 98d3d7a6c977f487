"""Evaluate parameters on a split: decode and grade every view, compare two of them, compute the metrics."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import rng
from ctxjax.config import Experiment
from ctxjax.data import prompts as prompts_lib, shapes as shapes_lib
from ctxjax.data.digests import digest_rows
from ctxjax.data.pipeline import encode_rows
from ctxjax.data.task import Row, Task, make_evaluation_views
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.evaluation import metrics as metrics_lib, views as views_lib
from ctxjax.evaluation.episodes import grade_episodes, single_turn_episodes
from ctxjax.evaluation.outcomes import Comparison, Outcomes
from ctxjax.host.checksum import compute_checksums, compute_digest
from ctxjax.host.workdir import write_json, write_text
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.run_inputs import make_sampling_config
from ctxjax.types import Params, Rollout

# Two splits are padded to the same shapes if that costs the smaller at most 25 %: one compiled program serves both,
# and compiling takes longer than reading a few more columns or rows.
SLACK = 1.25


class Evaluation(NamedTuple):
    """One model on one split: ``metrics`` as in results.json, ``items`` with a dict for each response, and the outcomes
    by view.

    ``decoding``: how the responses of each view, and those of ``distill``, were decoded. ``weights``: the checksum of
    each array of the parameters. Both are {} if an older version made the evaluation.
    """

    metrics: dict
    items: list[dict]
    outcomes: dict[str, Outcomes]
    decoding: dict[str, dict]
    weights: dict[str, int]

    def save(self, folder: Path, identity: dict) -> None:
        """Write items.jsonl and evaluation.json. ``identity``: what was evaluated, and by what code."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(item) + "\n" for item in self.items)
        write_text(folder / "items.jsonl", lines)
        record = {"decoding": self.decoding, "weights": self.weights, "items": compute_digest(lines)}
        write_json(folder / "evaluation.json", {"of": identity, "metrics": self.metrics} | record)

    @classmethod
    def load(cls, folder: Path, identity: dict) -> Evaluation | None:
        """Read what ``save`` wrote; None if a file is missing or cut off, or of another ``identity``."""
        try:
            stored = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
            with (folder / "items.jsonl").open(encoding="utf-8") as lines:
                items = [json.loads(line) for line in lines]
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if stored["of"] != identity:
            return None
        record = (stored.get(name, {}) for name in ("decoding", "weights"))
        return cls(stored["metrics"], items, _collect_outcomes(items), *record)


class Split(NamedTuple):
    """A split's questions in all views.

    By view: its ``rows``; its prompts' ``tokens``; ``prefixes``, the tokens that all of its prompts start with;
    ``columns``, the columns P that hold the rest of its prompts; ``opened``, whether its prompts end inside <think>.
    ``batch``: rows in a batch. ``dropped``: over-long rows that were left out.
    """

    task: Task
    rows: dict[str, list[Row]]
    tokens: dict[str, list[list[int]]]
    prefixes: dict[str, list[int]]
    columns: dict[str, int]
    opened: dict[str, list[bool]]
    batch: int
    dropped: int

    @classmethod
    def of(cls, config: Experiment, task: Task, name: str, folder: ModelFolder, mesh: Mesh) -> Split:
        """Tokenize the questions of the split called ``name``."""
        encoded = encode_rows(folder.tokenizer, task.rows(name), config.prompt)
        rows = make_evaluation_views(task, encoded.rows, name)
        tokens = {v: prompts_lib.encode(folder.tokenizer, own, config.prompt) for v, own in rows.items()}
        opened = {
            v: [prompts_lib.opens_reasoning(folder.tokenizer, row, config.prompt) for row in own]
            for v, own in rows.items()
        }
        prefixes = {v: prompts_lib.choose_shared_prefix(lists) for v, lists in tokens.items()}
        columns = {view: shape.columns for view, shape in shapes_lib.find_shapes(tokens, prefixes).items()}
        # Views with a context block and no shared prefix get one length: one compiled program decodes them all.
        blocks = [view for view in tokens if view != "bare" and not prefixes[view]]
        columns |= dict.fromkeys(blocks, max((columns[view] for view in blocks), default=0))
        batch = views_lib.batch_size(len(encoded.rows), config.eval.batch_size, mesh)
        return cls(task, rows, tokens, prefixes, columns, opened, batch, encoded.dropped)


def share_shapes(splits: list[Split]) -> list[Split]:
    """Raise the columns of each view and the rows of a batch to the largest split's if they are near it (``SLACK``)."""
    most_rows = max(split.batch for split in splits)
    most = {view: max(split.columns[view] for split in splits if view in split.columns) for view in splits[0].columns}
    return [
        split._replace(
            batch=_raise_if_near(split.batch, most_rows),
            columns={view: _raise_if_near(size, most.get(view, size)) for view, size in split.columns.items()},
        )
        for split in splits
    ]


def _raise_if_near(size: int, largest: int) -> int:
    return largest if largest <= SLACK * size else size


class Evaluator:
    """A split in all its views, tokenized once. Call it with parameters of ``folder``'s architecture.

    Responses are judged as ``config.eval`` decodes them (greedily by default). For the held-out distillation loss,
    against ``teacher``, they are sampled as in training (``config.rollout``).
    """

    def __init__(self, config: Experiment, split: Split, folder: ModelFolder, teacher: ModelFolder, mesh: Mesh):
        self._task, self._folder, self._teacher, self._mesh = split.task, folder, teacher, mesh
        self._judged = make_sampling_config(config.eval.decode, folder, config.eval.samples)
        self._rollout = make_sampling_config(config.rollout, folder)
        self._rows, self._opened, self._batch, self.dropped = split.rows, split.opened, split.batch, split.dropped
        self._prompts = {
            v: prompts_lib.left_pad(lists, split.columns[v], folder.pad_id, split.prefixes[v])
            for v, lists in split.tokens.items()
        }
        self._digests = {view: digest_rows(prompts) for view, prompts in self._prompts.items()}
        self._seed, self._resamples = config.seed, config.eval.bootstrap

    @classmethod
    def of_splits(
        cls, config: Experiment, task: Task, names: Sequence[str], folder: ModelFolder, teacher: ModelFolder, mesh: Mesh
    ) -> list[Evaluator]:
        """Return an evaluator for each split of ``names``. Splits of nearly the same size share compiled programs.

        Raises ValueError if a prompt and its response exceed the positions of ``folder``'s or ``teacher``'s model.
        """
        splits = share_shapes([Split.of(config, task, name, folder, mesh) for name in names])
        for name, split in zip(names, splits):
            outliers = shapes_lib.describe_outliers(split.tokens, split.prefixes)
            if outliers:
                print(f"warning: {name} questions: {outliers}")
            folder.check_prompts([ids for lists in split.tokens.values() for ids in lists], config.rollout.max_tokens)
            teacher.check_prompts(split.tokens.get("context", []), config.rollout.max_tokens)
        return [cls(config, split, folder, teacher, mesh) for split in splits]

    def __call__(self, params: Params) -> Evaluation:
        """Decode and grade every view, and compare bare and context view along the bare view's first responses."""
        model = self._folder.config
        sampling = dict.fromkeys(self._prompts, self._judged)
        rollouts = {v: self._decode(params, v, own) for v, own in sampling.items()}
        items = [item for view, rollout in rollouts.items() for item in self._grade(view, rollout)]
        outcomes = _collect_outcomes(items)
        measured = dict(outcomes) | self._grade_against_defaults(items, outcomes["bare"])
        if "context" in outcomes:
            bare, context = self._prompts["bare"], self._prompts["context"]
            view = next(view for view in ("unrelated", "other", "empty") if view in self._prompts)
            control = self._prompts[view]
            first = jax.tree.map(lambda array: array[:: self._judged.samples], rollouts["bare"])
            compared = views_lib.compare(params, model, bare, context, control, first, self._batch, self._mesh)
            measured["comparison"] = Comparison(*compared, first.mask_BxT)
            sampling["distill"] = self._rollout
            measured["distill"] = self._distillation(params, sampling["distill"])
        decoding = {view: self._describe(own) for view, own in sampling.items()}
        metrics = metrics_lib.compute_metrics(measured, self._resamples)
        return Evaluation(metrics, items, outcomes, decoding, compute_checksums(params))

    def _describe(self, sampling: SamplingConfig) -> dict:
        names = ("max_tokens", "temperature", "top_k", "top_p", "samples")
        return {name: getattr(sampling, name) for name in names} | {"seed": self._seed}

    def _decode(self, params: Params, view: str, sampling: SamplingConfig) -> Rollout:
        """Decode one view. Each view has a key of its own: samples of different views are independent."""
        root, index = jax.random.key(self._seed), list(self._prompts).index(view)
        model, key = self._folder.config, rng.key_for(root, index, "evaluation")
        return views_lib.decode(params, model, sampling, self._prompts[view], key, self._batch, self._mesh)

    def _grade(self, view: str, rollout: Rollout) -> list[dict]:
        episodes = single_turn_episodes(self._rows[view], rollout, self._judged.samples, self._opened[view])
        items = grade_episodes(self._task, self._folder.tokenizer, self._folder.stop_ids, episodes, view)
        return [item | {"prompt": self._digests[view][i // self._judged.samples]} for i, item in enumerate(items)]

    def _grade_against_defaults(self, items: list[dict], bare: Outcomes) -> dict[str, Outcomes]:
        """Return {"default": the bare responses graded against the base's default answers}; {} if the task has none."""
        rows: list[Row] = self._rows["bare"]
        if not rows or rows[0].default is None:
            return {}
        texts = (item["text"] for item in items if item["view"] == "bare")
        same = [self._task.grade(text, rows[i // bare.samples].default).correct for i, text in enumerate(texts)]
        return {"default": dataclasses.replace(bare, correct=np.array(same))}

    def _distillation(self, params: Params, sampling: SamplingConfig) -> float:
        """Return the held-out KL(q_x || f) in nats per token on the student's own samples, as in training."""
        model, bare = self._folder.config, self._prompts["bare"]
        rollout = self._decode(params, "bare", sampling)
        loss = LossConfig(temperature=sampling.temperature)
        return views_lib.distillation_kl(
            params,
            self._teacher.params,
            model,
            self._teacher.config,
            loss,
            bare,
            self._prompts["context"],
            rollout,
            self._batch,
            self._mesh,
        )


def _collect_outcomes(items: list[dict]) -> dict[str, Outcomes]:
    """Return the outcomes by view, in the order of ``items``."""
    by_view: dict[str, list[dict]] = {}
    for item in items:
        by_view.setdefault(item["view"], []).append(item)
    return {
        view: Outcomes(
            correct=np.array([item["correct"] for item in own]),
            parsed=np.array([item["parsed"] is not None for item in own]),
            truncated=np.array([item["truncated"] for item in own]),
            length=np.array([item["length"] for item in own]),
            lenient=_collect_lenient(own),
            reasons=[item["reason"] for item in own],
            samples=1 + max(item["sample"] for item in own),
            contexts=[item["context"] for item in own] if view == "other" else None,
        )
        for view, own in by_view.items()
    }


def _collect_lenient(items: list[dict]) -> np.ndarray | None:
    lenient = [item["lenient"] for item in items]
    return None if None in lenient else np.array(lenient)
