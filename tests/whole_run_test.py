"""Every number of two small runs, computed a second time from the folders and files alone (reference.py).

One run trains all weights under another, wider teacher, is interrupted, and decodes greedily; the other trains an
adapter on its own base and samples its answers. Weights are random, and a grader by checksum decides what is right: so
views, splits, steps and arms all differ, and whatever feeds a stage or lands in a place that is not its own shows.
"""

import collections
import functools
import hashlib
import json
from pathlib import Path
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference
from reference import kl, score, walk
from safetensors.numpy import load_file
from scipy import stats

from ctxjax import config as config_lib, export, rng
from ctxjax.configs import base
from ctxjax.data import pipeline
from ctxjax.data.grading.grade import Grade
from ctxjax.data.worlds import rules, word_tokenizer
from ctxjax.evaluation import statistics
from ctxjax.host import workdir as workdir_lib
from ctxjax.training import arm as arm_lib, run

pytestmark = pytest.mark.slow

WORDS = [*word_tokenizer.SPECIAL, *rules.vocabulary()]
IDS = {word: index for index, word in enumerate(WORDS)}
CONTROL = {index for index, word in enumerate(WORDS[:7]) if word != word_tokenizer.UNKNOWN}
STUDENT_STOPS, TEACHER_STOPS = [3, 8, 10, 16, 20, 27, 33, 38], [3, 12, 41, 48, 52]
VIEWS = ("bare", "context", "empty", "other", "paraphrase")


def judge(response: str, reference: str) -> Grade:
    """Grade by chance, which only the response and the reference decide."""
    chance = zlib.crc32(f"{response}|{reference}".encode())
    reason = ("short", "odd")[chance % 2] if chance % 5 == 0 else None
    return Grade(None if reason else response, not reason and chance % 100 < 55, reason, lenient=chance % 100 < 70)


def shared_settings(folder: Path):
    config = base.get_config()
    config.task, config.seed, config.rules.seed, config.rules.context_index = "rules", 5, 6, 2
    config.rules.train_questions, config.rules.dev_questions, config.rules.test_questions = 20, 12, 14
    config.model.path, config.compile_cache = str(folder / "student"), ""
    config.rollout.max_tokens, config.rollout.temperature, config.rollout.top_k, config.rollout.top_p = 7, 0.7, 20, 0.95
    config.train.batch_size, config.train.save_every, config.train.keep, config.loss.chunk = 8, 1, 9, 3
    config.optim.lr, config.optim.schedule, config.optim.warmup_steps, config.optim.clip = 4e-3, "cosine", 2, 0.5
    config.optim.b1, config.optim.b2, config.optim.weight_decay = 0.8, 0.95, 0.1
    config.eval.batch_size, config.eval.bootstrap, config.eval.every = 8, 300, 2
    return config


def weights_settings(folder: Path):
    """All weights, two arms with all kinds of terms between them."""
    config = shared_settings(folder)
    config.teacher.path = str(folder / "teacher")
    config.teacher.temperature, config.teacher.top_k, config.teacher.top_p = 0.5, 30, 0.9
    config.train.steps, config.train.micro_batches, config.train.retention_rows = 4, 2, 4
    config.arms.omega = {
        "divergence": "forward_kl", "off_policy_steps": 1, "off_policy_divergence": "reverse_kl", "beta": 0.3,
        "gate": "token", "reference": 0.2, "averaging": "sequence_mean", "masked_ids": (9, 30), "drop_truncated": True,
    }  # fmt: skip
    config.arms.alpha = {
        "beta": 0.6, "beta_ramp": 3, "anchor": "ema", "ema_decay": 0.8, "mu": 0.9, "mu_ramp": 2, "clip": 4.0,
        "skip_first": 1,
    }  # fmt: skip
    config.run_arms, config.eval.select = ("omega", "alpha"), "acc_x"
    return config


def adapter_settings(folder: Path):
    """An adapter and its own base as the teacher; sampled answers."""
    config = shared_settings(folder)
    config.lora.rank, config.lora.alpha, config.optim.lr = 2, 3.0, 5e-2
    config.train.steps = 3
    config.eval.samples, config.eval.temperature, config.eval.top_k, config.eval.top_p = 2, 0.9, 25, 0.9
    config.arms.low = {"beta": 0.4}
    config.run_arms, config.eval.select = ("low",), "-distill"
    return config


SETTINGS = {"weights": weights_settings, "adapter": adapter_settings}


class Done:
    """A finished run, and what the reference knows of it."""

    def __init__(self, name: str, root: Path):
        self.config, self.workdir = SETTINGS[name](root), root / name
        self.world = rules.Rules(config_lib.experiment(self.config, 1).task_config)
        self.stops = {*STUDENT_STOPS, *(TEACHER_STOPS if self.config.teacher.path else ())}
        self.base = reference.read_folder(root / "student")
        self.teacher = reference.read_folder(Path(self.config.teacher.path or self.config.model.path))
        self.root = jax.random.key(self.config.seed)
        if name == "weights":
            self._interrupt()
        self.results = self._run()

    def _run(self) -> dict:
        facts = workdir_lib.collect_facts(self.config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "write_report", lambda workdir: None)
            patch.setattr(rules.Rules, "grade", lambda self, response, reference: judge(response, reference))
            return run.run(config_lib.experiment(self.config, jax.device_count()), self.workdir, facts)

    def _interrupt(self) -> None:
        """Let the second arm end after its second step."""
        original = arm_lib.Writer.step

        def stop(writer, step, metrics):
            if step == 3 and writer._bar.desc == "alpha":
                raise KeyboardInterrupt
            original(writer, step, metrics)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arm_lib.Writer, "step", stop)
            with pytest.raises(KeyboardInterrupt):
                self._run()

    def loss(self, arm: str):
        return self.config.loss.to_dict() | self.config.arms[arm].to_dict()

    @functools.cache  # noqa: B019
    def state(self, arm: str, taken: int) -> dict:
        """Read a checkpoint: {"params", "mu", "nu", "ema", "step"}, arrays by path."""
        with ocp.PyTreeCheckpointer() as reader:
            found = reader.restore(self.workdir / arm / "checkpoints" / str(taken) / "state")
        flat = walk(json_like(found))
        parts = {name: cut(flat, f"/{name}/") for name in ("params", "ema")}
        for name in ("mu", "nu"):
            parts[name] = cut({path.partition(f"/{name}/")[2]: v for path, v in flat.items() if f"/{name}/" in path})
        return parts | {"step": int(flat["/step"])}

    def trained(self, arm: str, taken: int) -> dict[str, np.ndarray] | None:
        """The trained weights after ``taken`` steps, by path; at step 0 those of the folder, None for an adapter."""
        if taken:
            return self.state(arm, taken)["params"]
        return None if self.config.lora.rank else flatten(self.base)

    def student(self, trained: dict[str, np.ndarray] | None) -> dict:
        if trained is None:
            return self.base
        tree = reference.unwalk(trained)
        if not self.config.lora.rank:
            return reference.with_tree(self.base, tree)
        return reference.with_adapter(self.base, tree, self.config.lora.alpha / self.config.lora.rank)

    def prompt(self, question: str, context: str | None) -> list[int]:
        turns = [] if context is None else ["<|system|>", *(f"{pair};" for pair in context.split(";")[:-1]), "<|end|>"]
        words = ["<|begin|>", *turns, "<|user|>", question[:3], *question[3:], "<|end|>", "<|assistant|>"]
        return [IDS[word] for word in words]

    def text(self, response: list[int]) -> str:
        return "".join(WORDS[token] for token in response if token not in self.stops | CONTROL)


def json_like(tree):
    """Turn lists and named tuples into dicts."""
    if isinstance(tree, dict):
        return {name: json_like(value) for name, value in tree.items() if value is not None}
    if isinstance(tree, (list, tuple)):
        return {str(place): json_like(value) for place, value in enumerate(tree) if value is not None}
    return np.asarray(tree)


def cut(flat: dict, start: str = "") -> dict:
    """Return the entries whose path begins with ``start``, without it."""
    return {path.removeprefix(start): value for path, value in flat.items() if path.startswith(start)}


def flatten(weights: dict) -> dict[str, np.ndarray]:
    """Return a folder's weights as a checkpoint has them: the inverse of reference.with_tree."""
    stacked = {
        f"layers/{name}": np.array([own[name].T if own[name].ndim == 2 else own[name] for own in weights["layers"]])
        for name in weights["layers"][0]
    }
    top = {"embedding": weights["embedding"], "head": weights["head"].T, "final_norm": weights["norm"]}
    return top | stacked


def uniforms(key, rows, samples: int, count: int) -> np.ndarray:
    """Return the uniform numbers [rows * samples, count] of row numbers under a stage's key."""

    def of(row, sample, place):
        own = jax.random.fold_in(key, row)
        own = jax.random.fold_in(own, sample) if samples > 1 else own
        return jax.random.uniform(jax.random.fold_in(own, place))

    for axes in ((None, None, 0), (None, 0, None), (0, None, None)):
        of = jax.vmap(of, in_axes=axes)
    return np.asarray(of(np.asarray(rows), np.arange(samples), np.arange(count))).reshape(-1, count)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    tokenizer = word_tokenizer.build(rules.vocabulary(), rules.TOKEN_PATTERN)
    for name, *sizes in (("student", 1, STUDENT_STOPS, 24, 2, 40), ("teacher", 2, TEACHER_STOPS, 32, 4, 48)):
        seed, stops, *widths = sizes
        reference.write_folder(root / name, tokenizer, seed, stops, len(WORDS), *widths)
    return root


@pytest.fixture(scope="module")
def one_device(only):
    with pytest.MonkeyPatch.context() as patch:
        only(1, patch)
        yield


@pytest.fixture(scope="module")
def done(folders, one_device):
    """done(name): a run of SETTINGS, made once."""
    return functools.cache(lambda name: Done(name, folders))


# --- Evaluations ---


def expected_rows(done: Done, split: str) -> dict[str, list[tuple[str, str | None, str]]]:
    """(question, context, reference) of every view of a split."""
    world, table = done.world, rules.parse_table(done.world.context)
    questions = world.choose_questions(split)
    others = world.other_contexts(split)
    rows = {view: [] for view in VIEWS}
    for index, question in enumerate(questions):
        right, other = rules.answer(question, table), others[index % len(others)]
        wording = world.paraphrase(world.rows(split)[index], np.random.default_rng(index))
        contexts = dict(zip(VIEWS, (None, world.context, "", other, wording)))
        for view, context in contexts.items():
            own = rules.answer(question, rules.parse_table(other)) if view == "other" else right
            rows[view].append((question, context, own))
    return rows


def answers(done: Done, weights: dict, split: str) -> dict[str, list[list[int]]]:
    """The responses to every view, a row's samples one after the other."""
    decode = done.config.eval
    found = {}
    for place, (view, rows) in enumerate(expected_rows(done, split).items()):
        key = rng.key_for(done.root, place, "evaluation")
        numbers = uniforms(key, range(len(rows)), decode.samples, done.config.rollout.max_tokens)
        prompts = [done.prompt(question, context) for question, context, _ in rows for _ in range(decode.samples)]
        settings = decode.temperature, decode.top_k, decode.top_p
        found[view] = [
            reference.respond(weights, prompt, done.stops, own, *settings) for prompt, own in zip(prompts, numbers)
        ]
    return found


def digest(prompt: list[int]) -> str:
    return hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in prompt)).hexdigest()[:16]


def expected_items(done: Done, responses: dict[str, list[list[int]]], split: str) -> list[dict]:
    items = []
    for view, rows in expected_rows(done, split).items():
        for index, response in enumerate(responses[view]):
            question, context, right = rows[index // done.config.eval.samples]
            grade = judge(done.text(response), right)
            items.append({
                "id": question, "view": view, "sample": index % done.config.eval.samples, "question": question,
                "context": context, "reference": right, "text": done.text(response), "parsed": grade.parsed,
                "correct": grade.correct, "reason": grade.reason, "lenient": grade.lenient, "length": len(response),
                "truncated": response[-1] not in done.stops, "prompt": digest(done.prompt(question, context)),
                "turns": 1,
            })  # fmt: skip
    return items


def of_items(done: Done, items: list[dict]) -> dict[str, float]:
    """The metrics that items alone decide."""
    by_view = {view: [item for item in items if item["view"] == view] for view in VIEWS}
    right = {view: np.array([item["correct"] for item in own]) for view, own in by_view.items()}
    x, xc = right["bare"], right["context"]
    samples, found = done.config.eval.samples, {"n": len(x) // done.config.eval.samples}
    mean = {view: np.mean([item["length"] for item in own]) for view, own in by_view.items()}
    for suffix, view in (("x", "bare"), ("xc", "context")):
        own = by_view[view]
        found |= {
            f"acc_{suffix}": np.mean(right[view]), f"length_{suffix}": mean[view],
            f"acc_{suffix}_lenient": np.mean([item["lenient"] for item in own]),
            f"truncated_{suffix}": np.mean([item["truncated"] for item in own]),
            f"parse_{suffix}": np.mean([item["parsed"] is not None for item in own]),
            f"unparsed_{suffix}": dict(collections.Counter(item["reason"] for item in own if item["reason"])),
        }  # fmt: skip
    flips = {"right_right": x & xc, "right_wrong": x & ~xc, "wrong_right": ~x & xc, "wrong_wrong": ~x & ~xc}
    flips = {name: int(chosen.sum()) for name, chosen in flips.items()}
    copies = {letter: letter for letter in rules.LETTERS}
    defaults = [judge(i["text"], rules.answer(i["question"], copies)).correct for i in by_view["bare"]]
    found |= {
        "gap": xc.mean() - x.mean(), "harm": flips["right_wrong"] / x.sum(), "flips": flips,
        "benefit": flips["wrong_right"] / (~x).sum(), "both_correct": flips["right_right"] / len(x),
        "dlen": mean["context"] / mean["bare"] - 1, "acc_empty": right["empty"].mean(),
        "obedience": right["other"].mean(), "acc_paraphrase": right["paraphrase"].mean(),
        "acc_default": np.mean(defaults),
    }  # fmt: skip
    contexts = collections.defaultdict(list)
    for item in by_view["other"]:
        contexts[item["context"]].append(item["correct"])
    found["obedience_by_context"] = {context: [np.mean(own), len(own)] for context, own in contexts.items()}
    if samples == 1:
        found["mcnemar_p"] = stats.binomtest(flips["right_wrong"], max(flips["right_wrong"] + flips["wrong_right"], 1))
        found["mcnemar_p"] = found["mcnemar_p"].pvalue
        found["harm_ci"] = list(map(float, statistics.binomial_interval(flips["right_wrong"], x.sum())))
        found["acc_xc_ci"] = list(map(float, statistics.binomial_interval(xc.sum(), len(xc))))
    else:
        p = x.reshape(-1, samples).mean(axis=1)
        found["samples"], found["harm_floor"] = samples, np.sum(p * (1 - p)) * samples / (samples - 1) / p.sum()
        found["excess_harm"] = found["harm"] - found["harm_floor"]
    return found


def of_models(done: Done, weights: dict, teacher: dict, responses: dict, split: str) -> dict[str, float]:
    """The metrics that compare distributions and hidden states."""
    rows, T = expected_rows(done, split), done.config.rollout.max_tokens
    by_place, cosines, controls, pairs = [[] for _ in range(T)], [], [], []
    for index, response in enumerate(responses["bare"][:: done.config.eval.samples]):
        read = []
        for view in ("bare", "context", "other"):
            prompt = done.prompt(*rows[view][index][:2])
            states = reference.run_model(weights, [*prompt, *response[:-1]])[0][:, len(prompt) - 1 :]
            read.append((states, score(weights, prompt, response)))
        (x, q_x), (xc, q_c), (other, _) = read
        for place, value in enumerate(kl(q_x, q_c)):
            by_place[place].append(value)
        cosines.append(reference.cosine(x, xc))
        controls.append(reference.cosine(x, other))
        pairs.append((x, xc, other))
    x, xc, other = (np.concatenate(states, axis=1) for states in zip(*pairs))
    centred = reference.cosine(*(states - states.mean(axis=1, keepdims=True) for states in (x, xc)))
    cosines = np.concatenate(cosines, axis=1)
    decode, distill = done.config.rollout, []
    key = rng.key_for(done.root, 0, "evaluation")
    for (question, _, _), own in zip(rows["bare"], uniforms(key, range(len(rows["bare"])), 1, T)):
        prompts = [done.prompt(question, context) for context in (None, done.world.context)]
        settings = decode.temperature, decode.top_k, decode.top_p
        response = reference.respond(weights, prompts[0], done.stops, own, *settings)
        q, f = (score(w, p, response, decode.temperature) for w, p in zip((weights, teacher), prompts))
        distill += kl(q, f).tolist()
    return {
        "view_kl": np.mean(sum(by_place, [])), "distill": np.mean(distill),
        "view_kl_by_position": [np.mean(own) if own else None for own in by_place],
        "cosine_by_layer": cosines.mean(axis=1), "cosine_p5_by_layer": np.percentile(cosines, 5, axis=1),
        "cosine_control_by_layer": np.concatenate(controls, axis=1).mean(axis=1),
        "cosine_centred_by_layer": centred.mean(axis=1),
        "cka_by_layer": [reference.cka(*states) for states in zip(x, xc)],
        "cka_control_by_layer": [reference.cka(*states) for states in zip(x, other)],
    }  # fmt: skip


def close(found, expected, where: str) -> None:
    """Compare nested numbers: of float32 and of float64."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            close(found[name], expected[name], f"{where}/{name}")
    elif expected is None or isinstance(expected, str):
        assert found == expected, where
    elif np.ndim(expected):
        assert len(found) == len(expected), where
        for place, pair in enumerate(zip(found, expected)):
            close(*pair, f"{where}[{place}]")
    else:
        assert found == pytest.approx(expected, rel=2e-4, abs=2e-6), where


def stages(name: str) -> list[tuple[str, str, int, str]]:
    """(folder, model, step, split) of every evaluation that a run of SETTINGS keeps whole."""
    if name == "adapter":
        return [("base", "base", 0, "test"), ("base/dev", "base", 0, "dev"), ("low", "low", 3, "test")]
    return [
        ("base", "base", 0, "test"), ("base/dev", "base", 0, "dev"), ("teacher", "teacher", 0, "test"),
        ("omega", "omega", 4, "test"), ("alpha", "alpha", 4, "test"),
    ]  # fmt: skip


def weights_of(done: Done, model: str, taken: int) -> dict:
    return done.teacher if model == "teacher" else done.student(done.trained(model, taken))


def check_evaluation(done: Done, weights: dict, split: str, items: list[dict] | None, metrics: dict, where: str):
    responses = answers(done, weights, split)
    expected = expected_items(done, responses, split)
    if items is not None:
        assert len(items) == len(expected)
        for ours, theirs in zip(items, expected):
            assert ours == theirs, where
    numbers = of_items(done, expected) | of_models(done, weights, done.teacher, responses, split)
    numbers = {key: value for key, value in numbers.items() if items is not None or isinstance(value, float)}
    for key, value in numbers.items():
        close(metrics[key], value, f"{where}: {key}")
    return numbers


@pytest.mark.parametrize("name", SETTINGS)
def test_every_evaluation_is_that_of_its_own_weights_split_views_and_decoding(name, done):
    made, seen = done(name), {}
    for folder, model, taken, split in stages(name):
        place = made.workdir / folder
        items = [json.loads(line) for line in (place / "items.jsonl").read_text().splitlines()]
        stored = json.loads((place / "evaluation.json").read_text())
        assert stored["of"]["step"] == taken
        weights = weights_of(made, model, taken)
        seen[folder] = check_evaluation(made, weights, split, items, stored["metrics"], f"{name}, {folder}")
    accuracies = [tuple(numbers[key] for key in ("acc_x", "acc_xc", "acc_empty")) for numbers in seen.values()]
    assert len(set(accuracies)) == len(accuracies) and any(len(set(own)) == 3 for own in accuracies)


@pytest.mark.parametrize("name", SETTINGS)
def test_dev_rows_choose_the_checkpoint_that_is_evaluated_again_on_test(name, done):
    made, chosen = done(name), {}
    for arm in made.config.run_arms:
        rows = {row["step"]: row for row in read_metrics(made, arm) if "dev/acc_x" in row}
        assert list(rows) == [taken for taken in range(made.config.train.steps + 1) if taken % 2 == 0]
        of_base = json.loads((made.workdir / "base" / "dev" / "evaluation.json").read_text())["metrics"]
        assert of_dev(rows[0]) == {key: value for key, value in of_base.items() if isinstance(value, float)}
        for fall, metrics in (("parse_fall", ("parse_x", "parse_xc")), ("acc_xc_fall", ("acc_xc",))):
            expected = below_best(list(rows.values()), *(f"dev/{metric}" for metric in metrics))
            assert [row[f"dev/{fall}"] for row in rows.values()] == pytest.approx(expected), f"{name}, {arm}: {fall}"
        for taken in (taken for taken in rows if taken):
            where = f"{name}, {arm}, dev at step {taken}"
            check_evaluation(made, weights_of(made, arm, taken), "dev", None, of_dev(rows[taken]), where)
        key, sign = made.config.eval.select.removeprefix("-"), -1 if made.config.eval.select.startswith("-") else 1
        best = max((taken for taken in rows if taken), key=lambda taken: (sign * rows[taken][f"dev/{key}"], taken))
        chosen[arm], last = best, made.config.train.steps
        assert ("selected" in made.results[arm]) == (best != last)
        if best != last:
            found = made.results[arm]["selected"]
            assert found["step"] == best
            items = (made.workdir / arm / "selected" / "items.jsonl").read_text().splitlines()
            items = [json.loads(line) for line in items]
            check_evaluation(made, weights_of(made, arm, best), "test", items, found, f"{name}, {arm}, selected")
    assert any(best != made.config.train.steps for best in chosen.values())


def of_dev(row: dict) -> dict:
    """A row's metrics of dev, without what alarms keep."""
    return {key: value for key, value in cut(row, "dev/").items() if key not in ("parse_fall", "acc_xc_fall")}


def below_best(rows: list[dict], *names: str) -> list[float]:
    """How far each row's value is below the highest so far; of several metrics, the furthest."""
    falls = [np.maximum.accumulate(own) - own for own in np.array([[row[name] for row in rows] for name in names])]
    return np.max(falls, axis=0).tolist()


def read_metrics(done: Done, arm: str) -> list[dict]:
    return [json.loads(line) for line in (done.workdir / arm / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SETTINGS)
def test_results_have_every_model_under_its_name_and_compare_arms_with_the_first_one(name, done):
    made = done(name)
    written = json.loads((made.workdir / "results.json").read_text())
    assert written == json.loads(json.dumps(made.results))
    assert list(written) == ["base", *(["teacher"] if made.config.teacher.path else []), *made.config.run_arms]
    right = {}
    for folder, model, _, split in stages(name):
        place = made.workdir / folder
        if split == "test":
            metrics = json.loads((place / "evaluation.json").read_text())["metrics"]
            assert {key: written[model][key] for key in metrics} == metrics
            items = [json.loads(line) for line in (place / "items.jsonl").read_text().splitlines()]
            right[model] = {view: np.array([i["correct"] for i in items if i["view"] == view]) for view in VIEWS}
    first, *others = made.config.run_arms
    assert not [key for arm in ("base", first) for key in written[arm] if key.startswith("harm_minus")]
    for arm in others:
        parts = [part for model in (arm, first) for part in harmed(right[model])]
        estimate, *ends = written[arm][f"harm_minus_{first}"]
        assert estimate == pytest.approx(parts[0].sum() / parts[1].sum() - parts[2].sum() / parts[3].sum())
        assert ends == pytest.approx(statistics.difference_interval(*(part.astype(float) for part in parts)))
        assert estimate == pytest.approx(written[arm]["harm"] - written[first]["harm"])
        assert abs(estimate) > 0.05


def harmed(right: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return right["bare"] & ~right["context"], right["bare"]


# --- Training ---


def training_prompts(done: Done, step: int) -> dict[str, list[list[int]]]:
    """The prompts of a step in its three views; every question is of train, every other context of its pool."""
    size, questions = done.config.train.batch_size, done.world.choose_questions("train")
    order = pipeline.shuffle_questions(len(questions), done.config.seed)
    asked = [questions[order[place]] for place in range(step * size, (step + 1) * size)]
    found = {"bare": [done.prompt(question, None) for question in asked], "other": []}
    found["context"] = [done.prompt(question, done.world.context) for question in asked]
    others = done.world.other_contexts("train")
    for row in range(step * size, step * size + (done.config.train.retention_rows or size)):
        draw = np.random.default_rng([done.config.seed, row])
        question, context = questions[draw.integers(len(questions))], others[draw.integers(len(others))]
        found["other"].append(done.prompt(question, context))
    return found


def rollouts(done: Done, arm: str, step: int, prompts, weights: dict) -> tuple[list[list[int]], list[list[int]], bool]:
    """(y, y', whether y is the teacher's) of a step."""
    config, size = done.config, done.config.train.batch_size
    rows = range(step * size, (step + 1) * size)

    def sample(weights, view, stream, decode, rows):
        numbers = uniforms(rng.key_for(done.root, step, stream), rows, 1, config.rollout.max_tokens)
        settings = decode.temperature, decode.top_k, decode.top_p
        return [reference.respond(weights, p, done.stops, u, *settings) for p, u in zip(prompts[view], numbers)]

    is_teachers = step < done.loss(arm)["off_policy_steps"]
    drawn = (done.teacher, "context", "rollout", config.teacher) if is_teachers else None
    y = sample(*(drawn or (weights, "bare", "rollout", config.rollout)), rows)
    others = len(prompts["other"]) if done.loss(arm)["mu"] else 0
    return y, sample(weights, "other", "retention", config.rollout, rows[:others]), is_teachers


class Objective:
    """The loss of a step as a function of the trained weights: what has no gradient is fixed at the step's own."""

    def __init__(self, done: Done, arm: str, step: int, student: dict, ema: dict | None):
        self.loss, self.step, self.temperature = done.loss(arm), step, done.config.rollout.temperature
        prompts = training_prompts(done, step)
        self.y, others, self.is_teachers = rollouts(done, arm, step, prompts, student)
        self.rows = [{view: (prompts[view][row], y) for view in ("bare", "context")} for row, y in enumerate(self.y)]
        self.others = list(zip(prompts["other"], others))
        self.masks = [self._mask(done, y) for y in self.y]
        self.other_masks = [self._mask(done, y) for y in others]
        self.fixed = []
        for row in self.rows:
            kept = {"f": self._score(done.teacher, *row["context"]), "q_x": self._score(student, *row["bare"])}
            if self.loss["reference"]:
                kept["f_x"] = self._score(done.teacher, *row["bare"])
            if ema is not None:
                kept["ema"] = self._score(ema, *row["bare"])
            self.fixed.append(kept)
        self.f_others = [self._score(done.teacher, *other) for other in self.others]
        self.beta, self.mu = (
            self.loss[name] * min((step + 1) / max(self.loss[f"{name}_ramp"], 1), 1.0) for name in ("beta", "mu")
        )

    def _score(self, weights, prompt, response):
        return score(weights, prompt, response, self.temperature)

    def _mask(self, done: Done, y: list[int]) -> np.ndarray:
        mask = np.arange(len(y)) >= self.loss["skip_first"]
        mask &= ~np.isin(y, self.loss["masked_ids"] or [-1])
        return mask & (not self.loss["drop_truncated"] or y[-1] in done.stops)

    def mean(self, values: list[np.ndarray], masks: list[np.ndarray], by_sequence: bool) -> float:
        if not by_sequence:
            return float(np.concatenate(values)[np.concatenate(masks)].mean())
        return float(np.mean([value[mask].mean() for value, mask in zip(values, masks) if mask.any()]))

    def __call__(self, student: dict) -> tuple[float, dict[str, float]]:
        """(the loss of these trained weights, the step's metrics)."""
        tokens, loss = [], self.loss
        for row, fixed, y in zip(self.rows, self.fixed, self.y):
            q_x, f = self._score(student, *row["bare"]), fixed["f"]
            divergence = self.is_teachers and loss["off_policy_divergence"] or loss["divergence"]
            distill = kl(f, q_x) if divergence == "forward_kl" else kl(q_x, f)
            agrees = fixed["q_x"].argmax(-1) == f.argmax(-1)
            own = {
                "distill": np.minimum(distill, loss["clip"] or np.inf), "top1_agreement": agrees,
                "entropy": -(np.exp(q_x) * q_x).sum(-1), "teacher_entropy": -(np.exp(f) * f).sum(-1),
                "clipped": distill > loss["clip"],
            }  # fmt: skip
            if loss["beta"]:
                q_c = self._score(student, *row["context"])
                gate = agrees if loss["gate"] == "token" else np.ones(len(y), bool)
                own |= {"anchor": np.where(gate, kl(fixed["ema" if "ema" in fixed else "q_x"], q_c), 0), "gate": gate}
            if loss["reference"]:
                own["reference"] = kl(q_x, fixed["f_x"])
            tokens.append(own)
        by_sequence = loss["averaging"] == "sequence_mean"
        metrics = {}
        for metric in tokens[0]:
            is_term = metric in ("distill", "anchor", "reference")
            metrics[metric] = self.mean([row[metric] for row in tokens], self.masks, is_term and by_sequence)
        if self.mu:
            retained = [kl(f, self._score(student, *other)) for f, other in zip(self.f_others, self.others)]
            metrics["retain"] = self.mean(retained, self.other_masks, by_sequence)
        weights = {"distill": 1.0, "anchor": self.beta, "reference": loss["reference"], "retain": self.mu}
        return sum(weights[term] * metrics[term] for term in weights if term in metrics), metrics


def steps_of(name: str) -> list[tuple[str, str, int]]:
    arms = {"weights": ("omega", "alpha"), "adapter": ("low",)}[name]
    return [(name, arm, step) for arm in arms for step in range(4 if name == "weights" else 3)]


def rate(config, step: int) -> float:
    """The rate of a step under a cosine: it rises over the warm-up, to its peak in the last step of it, then falls."""
    warmup, steps = config.optim.warmup_steps, config.train.steps
    if step < warmup:
        return config.optim.lr * (step + 1) / warmup
    return config.optim.lr * 0.5 * (1 + np.cos(np.pi * (step - warmup + 1) / (steps - warmup + 1)))


def gradient(done: Done, arm: str, step: int) -> dict[str, np.ndarray]:
    """The clipped gradient that the first moments took in."""
    b1, after = done.config.optim.b1, done.state(arm, step + 1)["mu"]
    before = done.state(arm, step)["mu"] if step else dict.fromkeys(after, 0.0)
    return {path: (after[path] - b1 * before[path]) / (1 - b1) for path in after}


@pytest.mark.parametrize(("name", "arm", "step"), [case for name in SETTINGS for case in steps_of(name)])
def test_every_step_has_the_loss_of_its_rows_and_moves_the_weights_along_its_gradient(name, arm, step, done):
    made = done(name)
    config, row = made.config, next(row for row in read_metrics(made, arm) if row["step"] == step + 1)
    before, after = made.trained(arm, step), made.state(arm, step + 1)
    ema = made.state(arm, step).get("ema") if step else before
    has_ema = made.loss(arm)["anchor"] == "ema"
    objective = Objective(made, arm, step, made.student(before), made.student(ema) if has_ema else None)
    loss, metrics = objective(made.student(before))
    lengths = [len(y) for y in objective.y]
    metrics |= {
        "loss": loss, "lr": rate(config, step), "response_length": np.mean(lengths), "response_tokens": sum(lengths),
        "truncated": np.mean([y[-1] not in made.stops for y in objective.y]), "skipped": 0.0,
        "untrained": np.mean([not mask.any() for mask in objective.masks]),
    }  # fmt: skip
    found = {key: value for key, value in row.items() if key not in NOT_COMPARED and "/" not in key}
    unused = {
        key
        for key, used in (("gate", made.loss(arm)["gate"] != "none"), ("clipped", made.loss(arm)["clip"]))
        if not used
    }
    close(found, {key: metrics[key] for key in metrics.keys() - unused}, f"{arm}, step {step}")
    is_on_policy = step >= made.loss(arm)["off_policy_steps"]
    assert ("logprob_gap" in row) == is_on_policy and row.get("logprob_gap", 0) < 1e-4

    grads, optim = gradient(made, arm, step), config.optim
    size = np.sqrt(sum((value**2).sum() for value in grads.values()))
    assert size == pytest.approx(min(row["grad_norm"], optim.clip), rel=1e-4)
    if before is not None:  # along its own direction a gradient's slope is its norm, along any other it is less
        moved = [{path: before[path] + sign * 1e-5 * grads[path] / size for path in before} for sign in (1, -1)]
        slope = np.subtract(*(objective(made.student(tree))[0] for tree in moved)) / 2e-5
        assert slope == pytest.approx(row["grad_norm"], rel=2e-4)
    old = {moment: made.state(arm, step)[moment] if step else None for moment in ("mu", "nu")}
    for path, own in after["params"].items():
        squares = optim.b2 * (old["nu"][path] if step else 0) + (1 - optim.b2) * grads[path] ** 2
        np.testing.assert_allclose(after["nu"][path], squares, rtol=1e-3, atol=1e-9, err_msg=path)
        if before is None:
            continue
        mean, square = (
            after["mu"][path] / (1 - optim.b1 ** (step + 1)),
            after["nu"][path] / (1 - optim.b2 ** (step + 1)),
        )
        update = mean / (np.sqrt(square) + 1e-8) + optim.weight_decay * before[path]
        np.testing.assert_allclose(own, before[path] - row["lr"] * update, rtol=1e-5, atol=1e-6, err_msg=path)
        if has_ema:
            average = made.loss(arm)["ema_decay"] * ema[path] + (1 - made.loss(arm)["ema_decay"]) * own
            np.testing.assert_allclose(after["ema"][path], average, rtol=1e-5, atol=1e-6, err_msg=path)
    assert after["step"] == step + 1


# Times, what alarms keep, and what is compared in another way; responses are shorter than the sequences of repetition.
NOT_COMPARED = {
    "step", "time", "tokens_per_second", "repetition", "grad_norm", "logprob_gap", "logprob_gap_max", "agreement_fall",
}  # fmt: skip


def test_the_teachers_samples_are_stored_with_their_own_questions_and_log_probabilities(done):
    made = done("weights")
    rows = [json.loads(line) for line in (made.workdir / "teacher_samples.jsonl").read_text().splitlines()]
    prompts = training_prompts(made, 0)
    responses, _, is_teachers = rollouts(made, "omega", 0, prompts, made.base)
    assert is_teachers and [row["step"] for row in rows] == [1] * len(responses)
    for row, bare, context, response in zip(rows, prompts["bare"], prompts["context"], responses, strict=True):
        assert made.prompt(row["question"], None) == bare and row["id"] == row["question"]
        assert row["tokens"] == response and row["text"] == made.text(response)
        logprobs = score(made.teacher, context, response, made.config.teacher.temperature)
        close(row["logprobs"], logprobs[np.arange(len(response)), response], row["id"])


# --- Exports ---


@pytest.mark.parametrize(
    ("name", "arm", "step"),
    [("weights", "omega", 2), ("weights", "alpha", 3), ("weights", "alpha", None), ("adapter", "low", 2)],
)
def test_an_export_is_the_arm_and_step_that_was_asked_for(name, arm, step, done, tmp_path):
    made = done(name)
    taken = step or made.config.train.steps
    assert export.export(made.workdir, tmp_path / "out", arm, step)[:2] == (arm, taken)
    expected, found = (flatten(w) for w in (weights_of(made, arm, taken), reference.read_folder(tmp_path / "out")))
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == made.stops
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{arm}, step {taken}" in card and ("The row of" in card) == (taken != made.config.train.steps)
    rows = {line.split("|")[1].strip(): line.split("|") for line in card.splitlines() if line[:2] == "| "}
    for model in ("base", arm):
        shown = [100 * made.results[model][key] for key in ("acc_x", "acc_xc")]
        assert [cell.strip() for cell in rows[model][2:4]] == [f"{value:.1f}" for value in shown]


def test_an_adapter_is_exported_with_the_scale_of_the_run(done, tmp_path):
    made = done("adapter")
    export.export(made.workdir, tmp_path / "out", "low", 2, adapter=True)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (2, 3.0)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for path, value in made.trained("low", 2).items():
        ours, part = path.removeprefix("layers/").split("_lora_")
        for layer in range(2):
            theirs = f"base_model.model.model.layers.{layer}.{reference.MATRICES[ours]}.lora_{part.upper()}.weight"
            np.testing.assert_array_equal(tensors[theirs], np.float32(value[layer].T), err_msg=theirs)
