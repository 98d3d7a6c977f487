"""Evaluate parameters on a split: decode and grade every view, compare two of them, compute the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import rng
from ctxjax.config_sections import Experiment
from ctxjax.data import shapes as shapes_lib
from ctxjax.data.digests import digest_tokens
from ctxjax.data.task import FURTHER_VIEWS, GameTask, Row, Task, grade_response
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.evaluation import metrics as metrics_lib, views as views_lib
from ctxjax.evaluation.answers import Answers, Asker, Games, Questions
from ctxjax.evaluation.episodes import grade_episodes
from ctxjax.evaluation.meters import Meters
from ctxjax.evaluation.outcomes import Comparison, Outcomes
from ctxjax.evaluation.split import Split, have_same_questions, share_shapes
from ctxjax.host import progress
from ctxjax.host.checksum import compute_checksums, compute_digest
from ctxjax.host.workdir import write_json, write_text
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.run_inputs import make_sampling_config
from ctxjax.types import Params


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

    @staticmethod
    def is_saved(folder: Path) -> bool:
        """Whether ``save`` has written to the folder."""
        return (folder / "evaluation.json").exists()

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
        return cls(stored["metrics"], items, collect_outcomes(items), *record)


class Evaluator:
    """A split in all its views, tokenized once. Call it with parameters of ``folder``'s architecture.

    Responses are judged as ``config.eval`` decodes them (greedily by default). For the held-out distillation loss,
    against ``teacher``, they are sampled as in training (``config.rollout``).
    """

    def __init__(self, config: Experiment, split: Split, folder: ModelFolder, teacher: ModelFolder, mesh: Mesh):
        self._task, self._folder, self._teacher, self._mesh = split.task, folder, teacher, mesh
        self._judged = make_sampling_config(config.eval.decode, folder, config.eval.samples)
        self._rollout = make_sampling_config(config.rollout, folder)
        self._rows, self._batch, self.dropped = split.rows, split.batch, split.dropped
        is_game = isinstance(split.task, GameTask)
        self._asker: Asker = (
            Games(split, folder, config.prompt, mesh) if is_game else Questions(split, folder, config.prompt, mesh)
        )
        # Of the first turns: what else is read follows from them and the responses.
        self._digests = {view: [digest_tokens(ids) for ids in lists] for view, lists in split.tokens.items()}
        self._seed, self._resamples = config.seed, config.eval.bootstrap
        self._boards = split.task.facts.get("boards", {}).get(split.name)
        sampling = dataclasses.replace(self._rollout, top_k=0, top_p=1.0)
        self._meters = Meters(config, split, folder, teacher, sampling, mesh)
        self._measured = [name for name in config.eval.meters if name != "trace_gap" or "context" in split.rows]
        self._asked = [view for view in self._rows if view not in FURTHER_VIEWS or view in config.eval.views]
        parts = [*self._asked, *(("comparison", "samples", "distill") if "context" in self._rows else ())]
        parts += [*self._measured, "metrics"]
        self._has_defaults = bool(self._rows["bare"]) and self._rows["bare"][0].default is not None
        further = ["default"] * self._has_defaults + ["boards"] * bool(self._boards)
        names, metrics = {*parts, *further, "resamples"}, metrics_lib.METRICS
        # The keys of the metrics that can have a value here.
        self.measurable = {m.key for m in metrics if names >= {*m.needs} and (is_game or m.unit != "turns")}
        self._whats = {part: f"on {split.name}: {part}, {n} of {len(parts)}" for n, part in enumerate(parts, 1)}

    @classmethod
    def of_splits(
        cls, config: Experiment, task: Task, names: Sequence[str], folder: ModelFolder, teacher: ModelFolder, mesh: Mesh
    ) -> list[Evaluator]:
        """Return an evaluator for each split of ``names``. Splits of nearly the same size share compiled programs.

        Raises ValueError if a prompt and its response exceed the positions of ``folder``'s or ``teacher``'s model.
        """
        with progress.Bar(f"encoding the {' and '.join(names)} questions"):
            splits = share_shapes([Split.of(config, task, name, folder, mesh) for name in names])
        for name, split in zip(names, splits):
            outliers = shapes_lib.describe_outliers(split.longest, split.prefixes)
            if outliers:
                print(f"warning: {name} questions: {outliers}")
            folder.check_prompts([ids for lists in split.longest.values() for ids in lists], config.rollout.max_tokens)
            teacher.check_prompts(split.longest.get("context", []), config.rollout.max_tokens)
        return [cls(config, split, folder, teacher, mesh) for split in splits]

    def __call__(self, params: Params, name: str = "evaluation") -> Evaluation:
        """Answer and grade every view, and compare bare and context view along the bare view's first responses.

        ``name``: of the model, for the progress bars.
        """
        whats = {part: f"{name} {what}" for part, what in self._whats.items()}
        sampling = dict.fromkeys(self._asked, self._judged)
        answers = {v: self._answer(params, v, own, whats[v]) for v, own in sampling.items()}
        items = [item for view, own in answers.items() for item in self._grade(view, own)]
        outcomes = collect_outcomes(items)
        measured = dict(outcomes) | self._grade_against_defaults(items, outcomes["bare"])
        measured |= self._grade_against_others(items, outcomes)
        measured |= {"boards": self._boards} if self._boards else {}
        if "context" in outcomes:
            first, prompts = answers["bare"].rollout, self._asker.prompts(answers["bare"])
            fixed = self._batch, self._mesh, whats["comparison"]
            kl, cosines, cka = views_lib.compare(params, self._folder.config, *prompts, first, *fixed)
            measured["comparison"] = Comparison(kl, cosines, first.mask_BxT, cka)
            sampling["distill"] = self._rollout
            measured["distill"] = self._distillation(params, sampling["distill"], whats)
        measured |= {meter: self._meters.measure(meter, params, whats[meter]) for meter in self._measured}
        decoding = {view: self._describe(own) for view, own in sampling.items()}
        with progress.Bar(whats["metrics"]):
            metrics = metrics_lib.compute_metrics(measured, self._resamples)
            return Evaluation(metrics, items, outcomes, decoding, compute_checksums(params))

    def _describe(self, sampling: SamplingConfig) -> dict:
        names = ("max_tokens", "temperature", "top_k", "top_p", "samples")
        return {name: getattr(sampling, name) for name in names} | {"seed": self._seed}

    def _answer(self, params: Params, view: str, sampling: SamplingConfig, what: str) -> Answers:
        """Answer one view. Each view has a key of its own: samples of different views are independent."""
        key = rng.key_for(jax.random.key(self._seed), list(self._rows).index(view), "evaluation")
        return self._asker.answer(params, view, sampling, key, what)

    def _grade(self, view: str, answers: Answers) -> list[dict]:
        tokenizer, stop_ids = self._folder.tokenizer, self._folder.stop_ids
        items = grade_episodes(self._task, tokenizer, stop_ids, answers.episodes, view)
        return [item | {"prompt": self._digests[view][i // self._judged.samples]} for i, item in enumerate(items)]

    def _grade_against_defaults(self, items: list[dict], bare: Outcomes) -> dict[str, Outcomes]:
        """Return {"default": the bare responses graded against the base's default answers}; {} if the task has none."""
        if not self._has_defaults:
            return {}
        rows: list[Row] = self._rows["bare"]
        texts = (item["text"] for item in items if item["view"] == "bare")
        same = [self._task.grade(text, rows[i // bare.samples].default).correct for i, text in enumerate(texts)]
        return {"default": dataclasses.replace(bare, correct=np.array(same))}

    def _grade_against_others(self, items: list[dict], outcomes: Mapping[str, Outcomes]) -> dict[str, Outcomes]:
        """Return {"ignored": the bare responses graded as if they were those under the other contexts}; {} for games,
        and where other contexts have other questions."""
        others = self._rows["other"] if "other" in outcomes else []
        if not have_same_questions(self._rows["bare"], others) or isinstance(self._task, GameTask):
            return {}
        bare, texts = outcomes["bare"], (item["text"] for item in items if item["view"] == "bare")
        same = [grade_response(self._task, text, others[i // bare.samples]).correct for i, text in enumerate(texts)]
        return {"ignored": dataclasses.replace(outcomes["other"], correct=np.array(same))}

    def _distillation(self, params: Params, sampling: SamplingConfig, whats: dict[str, str]) -> float:
        """Return the held-out KL(q_x || f) in nats per token on the student's own samples, as in training."""
        answers = self._answer(params, "bare", sampling, whats["samples"])
        bare, context, _ = self._asker.prompts(answers)
        loss = LossConfig(temperature=sampling.temperature)
        return views_lib.distillation_kl(
            params,
            self._teacher.params,
            self._folder.config,
            self._teacher.config,
            loss,
            bare,
            context,
            answers.rollout,
            self._batch,
            self._mesh,
            whats["distill"],
        )


def collect_outcomes(items: list[dict]) -> dict[str, Outcomes]:
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
            turns=np.array([item.get("turns", 1) for item in own]),
            lenient=_collect_lenient(own),
            reasons=[item["reason"] for item in own],
            samples=1 + max(item["sample"] for item in own),
            contexts=[item["context"] for item in own] if view == "other" else None,
            groups=[item["group"] for item in own] if "group" in own[0] else None,
        )
        for view, own in by_view.items()
    }


def _collect_lenient(items: list[dict]) -> np.ndarray | None:
    lenient = [item["lenient"] for item in items]
    return None if None in lenient else np.array(lenient)
