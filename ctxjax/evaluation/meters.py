"""Two cheap meters of a run that no grader is needed for.

Both read responses that are sampled once, by models that do not change: the teacher's to the questions of the split,
and the base's own to everyday questions. An evaluation is then one pass over them.
"""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh
import numpy as np

from ctxjax import rng, sharding
from ctxjax.config_sections import Experiment
from ctxjax.data import prompts as prompts_lib
from ctxjax.data.task import Row
from ctxjax.data.tasks import style
from ctxjax.distill.losses import CROSS_ENTROPY, LossConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.evaluation import views as views_lib
from ctxjax.evaluation.split import Split
from ctxjax.inputs import decoding
from ctxjax.inputs.model_folder import ModelFolder
from ctxjax.inputs.teacher_samples import find_starts
from ctxjax.types import Params, Prompts, Rollout

EVERY = 6  # of the everyday questions, every sixth is asked: 64


class Meters:
    """``folder``: the student, and with its parameters the base. ``sampling``: as responses are sampled in training;
    all tokens may be drawn, so that log-probabilities are those of the whole distribution.

    Raises ValueError if ``config`` asks for a meter that the model cannot be asked."""

    def __init__(
        self,
        config: Experiment,
        split: Split,
        folder: ModelFolder,
        teacher: ModelFolder,
        sampling: SamplingConfig,
        mesh: Mesh,
    ):
        self._config, self._split, self._folder, self._teacher = config, split, folder, teacher
        self._sampling, self._mesh = sampling, mesh
        self._key = rng.key_for(jax.random.key(config.seed), len(split.rows), "evaluation")
        self._everyday = self._encode_everyday() if "drift" in config.eval.meters else []

    def measure(self, name: str, params: Params, what: str) -> float:
        """Return the meter ``name`` (data.task.METERS) in nats per token. ``what``: of the progress bar."""
        return {"trace_gap": self._measure_trace_gap, "drift": self._measure_drift}[name](params, what)

    def _measure_trace_gap(self, params: Params, what: str) -> float:
        """Return the mean negative log-likelihood of the teacher's responses under ``params`` without the context, less
        the teacher's own with it: an estimate of KL(teacher with the context || student without it)."""
        prompts, traces = self._traces
        own = -float(np.sum(traces.logprobs_BxT, where=traces.mask_BxT) / traces.mask_BxT.sum())
        loss = LossConfig(divergence=CROSS_ENTROPY, temperature=self._sampling.temperature)
        return self._score(params, loss, prompts, traces, self._split.batch, what) - own

    def _measure_drift(self, params: Params, what: str) -> float:
        """Return KL(base || student) along the base's own responses, both without a context."""
        prompts, answers = self._answers
        loss = LossConfig(divergence="forward_kl", temperature=self._sampling.temperature)
        return self._score(params, loss, prompts, answers, self._batch(prompts), what)

    def _score(self, params, loss: LossConfig, prompts: Prompts, rollout: Rollout, batch: int, what: str) -> float:
        model, base = self._folder.config, self._folder.params
        fixed = loss, prompts, prompts, rollout, batch, self._mesh, what
        return views_lib.distillation_kl(params, base, model, model, *fixed)

    @functools.cached_property
    def _traces(self) -> tuple[Prompts, Rollout]:
        """The split's prompts without the context, and the teacher's responses to those with it."""
        split, teacher = self._split, self._teacher
        bare, context = (
            prompts_lib.left_pad(split.tokens[view], split.columns[view], teacher.pad_id, split.prefixes[view])
            for view in ("bare", "context")
        )
        rollout = self._decode(teacher, context, split.batch, "the teacher's responses")
        said = [tokens[mask].tolist() for tokens, mask in zip(rollout.tokens_BxT, rollout.mask_BxT)]
        starts = find_starts(self._config, teacher, split.rows["context"], said)
        kept = _drop_first(rollout, np.array(starts))
        if not kept.mask_BxT.any():
            raise ValueError(
                "eval.meters: none of the teacher's responses has an answer after its reasoning within "
                f"rollout.max_tokens = {self._sampling.max_tokens}; raise it, or leave trace_gap out"
            )
        return bare, kept

    @functools.cached_property
    def _answers(self) -> tuple[Prompts, Rollout]:
        """The everyday questions as prompts, and the base's responses."""
        prompts = decoding.pad_prompts(self._everyday, self._folder.pad_id)
        return prompts, self._decode(self._folder, prompts, self._batch(prompts), "the base's responses")

    def _encode_everyday(self) -> list[list[int]]:
        """Return the prompts of the everyday questions. Raises ValueError if the model cannot read them."""
        texts, tokenizer = [text for _, text in style.list_questions()[::EVERY]], self._folder.tokenizer
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        read = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        if [text.strip() for text in read] != texts:
            raise ValueError(
                "eval.meters: drift asks everyday questions, which the tokens of this model cannot write; leave it out"
            )
        tokens = prompts_lib.encode(tokenizer, [Row("", text, None, "") for text in texts], self._config.prompt)
        self._folder.check_prompts(tokens, self._sampling.max_tokens)
        return tokens

    def _decode(self, folder: ModelFolder, prompts: Prompts, batch: int, what: str) -> Rollout:
        params = sharding.bring_to_device(folder.params)
        return decoding.decode(params, folder.config, self._sampling, prompts, self._key, batch, self._mesh, what=what)

    def _batch(self, prompts: Prompts) -> int:
        return decoding.batch_size(len(prompts.tokens_BxP), self._config.eval.batch_size, self._mesh)


def _drop_first(rollout: Rollout, counts: np.ndarray) -> Rollout:
    """Return the responses without the first ``counts`` [n] tokens of each."""
    columns = np.arange(rollout.tokens_BxT.shape[1])[None] + counts[:, None]
    inside = columns < rollout.tokens_BxT.shape[1]
    columns = np.minimum(columns, rollout.tokens_BxT.shape[1] - 1)
    tokens, mask, logprobs = (
        np.take_along_axis(array, columns, axis=1)
        for array in (rollout.tokens_BxT, rollout.mask_BxT, rollout.logprobs_BxT)
    )
    return Rollout(tokens, mask & inside, logprobs)
