"""The table of all metrics: METRICS has one entry for each.

results.json, the console table, the report's columns and glossary, the table of docs/report.md and ``eval.select``
read METRICS: one more entry is one more metric everywhere. Its order is that of results.json and of the columns. What
the entries compute is in outcomes.py.

Harm alone would reward a model that ignores every prompt; read it together with obedience.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from ctxjax.evaluation import outcomes
from ctxjax.evaluation.outcomes import Outcomes
from ctxjax.evaluation.statistics import Rate


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric: what it is called, what it means, how it is computed and printed.

    key         its name in results.json, in metrics.jsonl (``dev/KEY``) and in ``eval.select``
    header      its name for readers, in tables and in the glossary; metrics with the same header share a column
    unit        how its value is printed, a key of UNITS in report/formatting.py; None: it is in results.json only
    definition  what it means, for the glossary and docs/report.md
    needs       what ``compute`` takes, by name (see ``compute_metrics``); without one of them the metric is left out
    compute     returns a Rate (KEY and KEY_ci in results.json), another value, or None if the metric is not defined
    better      "higher", "lower" or None
    responses   ONE or SEVERAL: the responses to a question (``eval.samples``) that it needs; None: any number
    table       which table has its column: "results" (console, model card, page) or "checks" (page)
    compare     for a metric of two arms, instead of ``compute``: takes the outcomes by view of an arm and of the first
                arm; returns [difference, low, high] or None. Its key in results.json is KEY_ARM, and "{arm}" in its
                header becomes ARM, the first arm's name.
    """

    key: str
    header: str
    unit: str | None
    definition: str
    needs: tuple[str, ...] = ()
    compute: Callable[..., Any] | None = None
    better: str | None = None
    responses: str | None = None
    table: str = "results"
    compare: Callable[..., list[float] | None] | None = None

    @property
    def is_selectable(self) -> bool:
        """Whether ``eval.select`` can name it: its value is one number of one model."""
        one_number = self.unit in ("share", "points", "change", "nats", "tokens", "turns", "p-value")
        return self.compute is not None and one_number and not {"learning", "ignored"} & {*self.needs}


def _metrics_of_view(suffix: str, view: str, condition: str) -> tuple[Metric, ...]:
    """Return the metrics that each of the two views has."""
    return (
        Metric(
            f"acc_{suffix}", f"Acc_{suffix}", "share", f"Accuracy {condition} the context.",
            (view,), outcomes.accuracy, better="higher",
        ),
        Metric(
            f"acc_{suffix}_lenient", "lenient x / xc", "share",
            "Accuracy without and with the context if the required form of the answer is not demanded.",
            (view,), outcomes.lenient_accuracy, better="higher", table="checks",
        ),
        Metric(
            f"length_{suffix}", "length x / xc", "tokens",
            "Mean response length in tokens without and with the context, end token included.",
            (view,), outcomes.mean_length, table="checks",
        ),
        Metric(
            f"turns_{suffix}", "turns x / xc", "turns",
            "Mean turns of an episode without and with the context, if a task's episodes have several.",
            (view,), outcomes.mean_turns, table="checks",
        ),
        Metric(
            f"truncated_{suffix}", "truncated x / xc", "share",
            "Share of responses cut at the length limit, without and with the context.",
            (view,), outcomes.truncated_share, better="lower", table="checks",
        ),
        Metric(
            f"parse_{suffix}", "readable x / xc", "share",
            "Share of responses with an answer in the required form, without and with the context. Accuracy falls with "
            "it, whatever the model knows.",
            (view,), outcomes.readable_share, better="higher", table="checks",
        ),
        Metric(
            f"unparsed_{suffix}", "unreadable", None, f"Unreadable responses {condition} the context, by reason.",
            (view,), outcomes.count_reasons,
        ),
    )  # fmt: skip


BOTH = ("bare", "context")
ONE, SEVERAL = "one response", "several responses"

METRICS = (
    Metric("n", "questions", None, "Number of questions.", ("bare",), outcomes.count_questions),
    *_metrics_of_view("x", "bare", "without"),
    *_metrics_of_view("xc", "context", "with"),
    Metric(
        "gap", "Gap", "points", "Acc_xc minus Acc_x. Below zero the context disturbs; above zero it is still needed.",
        BOTH, outcomes.gap,
    ),
    Metric(
        "harm", "Harm", "share",
        "Of the questions answered right without the context, the share answered wrong with it.",
        BOTH, outcomes.harm, better="lower",
    ),
    Metric(
        "benefit", "Benefit", "share",
        "Of the questions answered wrong without the context, the share answered right with it. A model that ignores "
        "its prompt has neither harm nor benefit.",
        BOTH, outcomes.benefit, better="higher",
    ),
    Metric(
        "both_correct", "BothCorrect", "share", "Share of the questions answered right in both views.",
        BOTH, outcomes.both_correct, better="higher",
    ),
    Metric(
        "dlen", "dLen", "change",
        "Relative change of the mean response length when the context is added. Read it with the truncated share.",
        BOTH, outcomes.length_change,
    ),
    Metric(
        "flips", "flips", None, "Questions by whether they are answered right without and with the context.",
        BOTH, outcomes.flips,
    ),
    Metric(
        "samples", "samples", None, "Responses to each question, if there are several.", BOTH, outcomes.count_samples,
    ),
    Metric(
        "harm_floor", "harm floor", "share",
        "The harm between two samples of the same view: E[p (1 - p)] / E[p], with p the probability of a right answer "
        "without the context. Measured if eval.samples > 1.",
        (*BOTH, "resamples"), outcomes.harm_floor, responses=SEVERAL, table="checks",
    ),
    Metric(
        "excess_harm", "excess harm", "points", "Harm minus the harm floor.",
        (*BOTH, "resamples"), outcomes.excess_harm, better="lower", responses=SEVERAL, table="checks",
    ),
    Metric(
        "mcnemar_p", "McNemar p, x against xc", "p-value",
        "Exact test on the questions that only one of the two views gets right.",
        BOTH, outcomes.mcnemar_p, responses=ONE, table="checks",
    ),
    Metric(
        "regime", "regime", "word",
        "Perturbation: the context significantly lowers accuracy. Scaffold: it raises it, so internalization is "
        "unfinished. Agreement: neither.",
        (*BOTH, "resamples"), outcomes.regime, table="checks",
    ),
    Metric(
        "acc_empty", "empty context", "share",
        "Accuracy with a context block without content: it may matter whether the block exists at all.",
        ("empty",), outcomes.accuracy, better="higher",
    ),
    Metric(
        "obedience", "obedience", "share",
        "Accuracy under other contexts than the internalized one, judged by what they ask for; no arm was trained on "
        "them. A student should keep the base's. Read it above its floor.",
        ("other",), outcomes.accuracy, better="higher",
    ),
    Metric(
        "obedience_floor", "obedience floor", "share",
        "What the answers without a context would score under the other contexts: the obedience of a model that "
        "ignores them.",
        ("ignored",), outcomes.accuracy, table="checks",
    ),
    Metric(
        "obedience_by_context", "obedience by context", None,
        "Accuracy and number of responses under each other context.",
        ("other",), outcomes.accuracy_by_context,
    ),
    Metric(
        "acc_paraphrase", "paraphrased context", "share", "Accuracy when the context comes back in other words.",
        ("paraphrase",), outcomes.accuracy, better="higher", table="checks",
    ),
    Metric(
        "acc_unrelated", "unrelated context", "share",
        "Accuracy under a context that bears on no question: what is internalized should stay.",
        ("unrelated",), outcomes.accuracy, better="higher", table="checks",
    ),
    Metric(
        "acc_default", "default answers", "share",
        "Share of the answers without the context that are what the base answers by default.",
        ("default",), outcomes.accuracy, better="lower", table="checks",
    ),
    Metric(
        "view_kl", "view KL", "nats",
        "KL(q_x || q_c), from the next-token distribution without the context to that with it, in nats per token along "
        "the same responses. Zero: the context changes nothing.",
        ("comparison",), outcomes.view_kl, better="lower",
    ),
    Metric(
        "view_kl_by_position", "view KL by position", None, "The view KL at each position of the response.",
        ("comparison",), outcomes.view_kl_by_position,
    ),
    Metric(
        "cosine_by_layer", "cosine", "cosine",
        "Cosine of the hidden states of the same response tokens without and with the context, mean over the layers' "
        "outputs. Centred: after subtracting each view's mean state. Control: with an unrelated context if the task "
        "has one, else with other contexts, which a student may obey, else with an empty one.",
        ("comparison",), outcomes.mean_cosine, better="higher",
    ),
    Metric(
        "cosine_p5_by_layer", "cosine, 5th percentile", None, "5th percentile over the response tokens, by layer.",
        ("comparison",), outcomes.fifth_percentile_of_cosine,
    ),
    Metric(
        "cosine_control_by_layer", "cosine, control", None, "Mean cosine with the context of the control, by layer.",
        ("comparison",), outcomes.mean_control_cosine,
    ),
    Metric(
        "cosine_centred_by_layer", "cosine, centred", None, "Mean cosine of the centred states, by layer.",
        ("comparison",), outcomes.mean_centred_cosine,
    ),
    Metric(
        "cka_by_layer", "CKA", None,
        "Linear CKA, by layer, of the hidden states of all response tokens without and with the context: 1 if they lie "
        "to each other as before, turned or scaled.",
        ("comparison",), outcomes.context_cka,
    ),
    Metric(
        "cka_control_by_layer", "CKA, control", None, "Linear CKA with the context of the control, by layer.",
        ("comparison",), outcomes.control_cka,
    ),
    Metric(
        "distill", "distill", "nats",
        "Held-out KL(q_x || f), from the student without the context to the teacher with it, in nats per token on the "
        "student's own samples.",
        ("distill",), float, better="lower", table="checks",
    ),
    Metric(
        "trace_gap", "trace gap", "nats",
        "Mean negative log-likelihood of the teacher's responses under the student without the context, less the "
        "teacher's own with it, in nats per token: how much of the context is not in the weights yet, without any "
        "grading. Measured if eval.meters has it.",
        ("trace_gap",), float, better="lower", table="checks",
    ),
    Metric(
        "drift", "drift", "nats",
        "KL(base || student), both without a context, in nats per token along the base's own responses to everyday "
        "questions: what the training changed besides. Measured if eval.meters has it.",
        ("drift",), float, better="lower", table="checks",
    ),
    Metric(
        "lowest_acc_xc", "lowest Acc_xc", "share",
        "The lowest accuracy with the context on dev during training. An arm may end well and yet have lost the use of "
        "the context before it was in the weights. It is a minimum of noisy values.",
        ("learning",), outcomes.lowest_accuracy, better="higher", table="checks",
    ),
    Metric(
        "context_loss", "context use lost", "points",
        "How far the lowest Acc_xc on dev lies below the base's.",
        ("learning",), outcomes.context_loss, better="lower", table="checks",
    ),
    Metric(
        "random_moves", "random moves", "share", "In a game, the share of the boards that uniformly random moves win.",
        ("boards",), lambda boards: boards["random"], table="checks",
    ),
    Metric(
        "fixed_path", "best fixed path", "share",
        "In a game, the share of the boards that one and the same sequence of moves wins, the best one for them.",
        ("boards",), lambda boards: boards["fixed"], table="checks",
    ),
    Metric(
        "perfect_play", "perfect play", "share", "In a game, the share of the boards that can be won within the turns.",
        ("boards",), lambda boards: boards["ceiling"], table="checks",
    ),
    Metric(
        "harm_minus", "harm minus {arm}", "points",
        "Harm minus the harm of the first arm, over the same questions.",
        better="lower", table="checks", compare=outcomes.harm_difference,
    ),
)  # fmt: skip


def compute_metrics(measured: Mapping[str, Any], resamples: int) -> dict[str, Any]:
    """Return the metrics of one model on one split, as in results.json.

    ``measured`` holds what was measured, by name; any of it may be missing. "bare", "context", "empty", "other",
    "paraphrase" and "unrelated" are the Outcomes of the views; "default" those of the bare responses, graded against
    the default answers, and "ignored" graded as if they were under the other contexts; "comparison" is the Comparison
    of the bare and the context view; "distill" the held-out distillation loss in nats per token; "trace_gap" and
    "drift" the meters of these names; "learning" an arm's Learning; "boards" what the boards of a game are worth
    (data.boards.measure_boards). ``resamples``: of bootstrap intervals.
    """
    result, measured = {}, {**measured, "resamples": resamples}
    for metric in METRICS:
        if metric.compute is None or not measured.keys() >= set(metric.needs):
            continue
        value = metric.compute(*(measured[name] for name in metric.needs))
        if isinstance(value, Rate):
            result |= {metric.key: value.value, f"{metric.key}_ci": value.interval}
        elif value is not None:
            result[metric.key] = value
    return result


def compare_arms(
    arm: Mapping[str, Outcomes], first: Mapping[str, Outcomes], name: str
) -> dict[str, list[float] | None]:
    """Return the metrics of an arm against the first arm, which is called ``name``; both are outcomes by view."""
    return {f"{m.key}_{name}": m.compare(arm, first) for m in METRICS if m.compare is not None}
