"""Episodes of several turns: played in batches, as rows of a training step, and in an evaluation."""

import dataclasses
import hashlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ctxjax.data import prompts
from ctxjax.data.grading.grade import Grade
from ctxjax.data.pipeline import RetentionRows, encode_rows
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import Row, longest_turns
from ctxjax.data.worlds.tiny_grid import TinyGrid, TinyGridConfig, parse_legend
from ctxjax.distill import losses, response_stats
from ctxjax.distill.losses import LossConfig
from ctxjax.distill.sampling import SamplingConfig
from ctxjax.evaluation import player as player_lib
from ctxjax.evaluation.answers import Games, _control_view
from ctxjax.evaluation.episodes import grade_episodes
from ctxjax.evaluation.player import Clock, Player, pad_responses
from ctxjax.evaluation.split import Split
from ctxjax.inputs import decoding
from ctxjax.training.game_episodes import GameEpisodes
from ctxjax.types import Rollout

PROMPT, KEY = PromptConfig(), jax.random.key(3)


@pytest.fixture(scope="module")
def world():
    return TinyGrid(TinyGridConfig(seed=0, context_index=0, size=3, holes=2, turns=5, train_questions=0,
                                   dev_questions=12, test_questions=12, empty_share=0.0))  # fmt: skip


@pytest.fixture(scope="module")
def folder(world, tiny_model):
    """What the player reads of a model folder."""
    tokenizer = world.tokenizer()
    config = dataclasses.replace(tiny_model, vocab_size=len(tokenizer))
    return SimpleNamespace(
        config=config, tokenizer=tokenizer, stop_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id
    )


@pytest.fixture
def sampling(folder):
    return SamplingConfig(max_tokens=8, eos_ids=folder.stop_ids, pad_id=folder.pad_id)


class Chance:
    """A game that ends after 1 to 5 turns, as the responses have it: random responses play it long enough."""

    max_turns = 5

    def play(self, row, responses):
        said = "/".join(responses)
        digest = hashlib.sha256(f"{row.id} {said}".encode()).digest()[0]
        if digest % 3 == 0 or len(responses) == self.max_turns:
            return Grade(said, digest % 2 == 0)
        return row._replace(question=row.question + "ka" * len(responses))


@pytest.fixture
def expert(world, folder, monkeypatch):
    """Decode as a player who knows the legend, instead of with a model; or as one who always ``says`` the same."""
    state = SimpleNamespace(legend=world.targets[0], says=None, calls=[])

    def decode(params, model, sampling, padded, key, size, mesh, numbers, what):
        texts = folder.tokenizer.batch_decode(prompts.unpad(padded))
        state.calls.append((len(texts), size, padded.tokens_BxP.shape[1], numbers.tolist()))
        answers = []
        for text in texts:
            legend = parse_legend(text.split("<|system|>")[1].split("<|end|>")[0]) if "=" in text else state.legend
            question = text.split("<|user|>")[1].split("<|end|>")[0]
            answer = state.says or world._answer(world._read_board(question, legend), legend)
            answers.append(answer + "<|end|>")
        ids = folder.tokenizer(answers, add_special_tokens=False)["input_ids"]
        turns = [player_lib.Turn(None, [], np.array(row), np.full(len(row), -0.5), False) for row in ids]
        return pad_responses(turns, sampling)

    monkeypatch.setattr(player_lib.decoding, "decode", decode)
    return state


# --- Playing ---


@pytest.mark.slow
def test_episodes_played_at_once_are_those_played_one_at_a_time(folder, make_params, sampling, mesh):
    params = make_params(folder.config, 0, mesh)
    rows = [Row(str(i), "abcd|"[i % 3 :], None, "") for i in range(8)]
    at_once = Player(Chance(), folder, PROMPT, 8, mesh)
    programs = decoding._decode._cache_size()
    together = at_once.play(params, sampling, rows, KEY)
    assert decoding._decode._cache_size() - programs == 2  # 8 rows and 2 rows, in one bucket of columns
    turns = [len(episode) for episode in together]
    assert len(set(turns)) > 2 and (at_once.clock.episodes, at_once.clock.turns) == (8, sum(turns))
    alone = Player(Chance(), folder, PROMPT, 2, mesh)
    for i, (row, expected) in enumerate(zip(rows, together)):
        (episode,) = alone.play(params, sampling, [row], KEY, first=i)
        assert [t.tokens.tolist() for t in episode] == [t.tokens.tolist() for t in expected]
        assert [t.prompt for t in episode] == [t.prompt for t in expected]
        for ours, theirs in zip(episode, expected):
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    assert decoding._decode._cache_size() - programs == 3  # the smallest size of ``alone`` is one row


def test_a_player_who_knows_the_legend_wins_and_ended_episodes_leave_the_batch(world, folder, sampling, mesh, expert):
    rows = world.rows("dev")
    player = Player(world, folder, PROMPT, 12, mesh)
    played = player.play(None, sampling, rows, KEY, first=100)
    for row, turns in zip(rows, played):
        texts = folder.tokenizer.batch_decode([turn.tokens[:-1] for turn in turns])
        assert world.play(row, texts).correct
        assert [turn.row.question for turn in turns[:1]] == [row.question]
        for number, turn in enumerate(turns[1:], 1):
            assert turn.row == world.play(row, texts[:number])
    counts = [sum(len(turns) > number for turns in played) for number in range(5)]
    assert [call[0] for call in expert.calls] == [count for count in counts if count]
    assert all(size == (12 if count > 3 else 3) for count, size, _, _ in expert.calls)
    assert {columns for _, _, columns, _ in expert.calls} == {32}
    running = [i for i, turns in enumerate(played) if len(turns) > 2]
    assert expert.calls[2][3] == [(100 + i) * 5 + 2 for i in running]


def test_the_clock_says_what_the_device_waits_for():
    clock = Clock(episodes=10, turns=25, seconds=5.0, sampler=4.0)
    assert (
        str(clock) == "10 episodes of 2.50 turns, 5 turns a second; the device waits for the host in 20 % of the time"
    )


# --- A training step ---


def make_source(world, folder, sampling, mesh, retention=True, notes=None):
    rows = world.rows("train")
    encoded = encode_rows(folder.tokenizer, rows, PROMPT, longest_turns(world, rows))
    others = RetentionRows.build(folder.tokenizer, world, encoded, PROMPT) if retention else None
    return GameEpisodes(
        player=Player(world, folder, PROMPT, 4, mesh), student=lambda state: state, folder=folder, rows=encoded,
        retention=others, prompt=PROMPT, sampling=sampling, boards=4, retained=2, max_turns=world.max_turns, seed=0,
        mesh=mesh, note=lambda number, drawn: None if notes is None else notes.append((number, drawn)),
    )  # fmt: skip


def test_a_step_has_the_turns_of_whole_episodes_and_empty_places_after_them(world, folder, sampling, mesh, expert):
    notes = []
    source = make_source(world, folder, sampling, mesh, notes=notes)
    inputs = jax.device_get(source.next(None, 7))
    shapes = jax.tree.map(np.shape, inputs)
    (example,) = source.examples(7)
    assert jax.tree.map(np.shape, jax.device_get(example)) == shapes and not np.any(example.rollout.mask_BxT)
    batch, rollout, other = inputs
    assert batch.row_number_B.tolist() == list(range(7 * 4 * 5, 8 * 4 * 5))
    bare, context = (
        folder.tokenizer.batch_decode(prompts.unpad(view), skip_special_tokens=False)
        for view in (batch.bare, batch.context)
    )
    taken = rollout.mask_BxT.any(axis=1).reshape(4, 5)
    assert np.all(np.diff(taken.astype(int)) <= 0) and 2 <= taken.sum(axis=1).min() < taken.sum(axis=1).max()
    for place in range(20):
        system = f"<|system|>{world.context}\n<|end|>"
        assert context[place] == bare[place].replace("<|begin|>", f"<|begin|>{system}")
        if not taken.reshape(-1)[place]:
            assert bare[place] == bare[place // 5 * 5] and not rollout.logprobs_BxT[place].any()
    said = rollout.tokens_BxT[1][rollout.mask_BxT[1]]
    assert said[-1] == folder.stop_ids[0] and rollout.logprobs_BxT[1][rollout.mask_BxT[1]].tolist() == [-0.5] * 7
    ((number, drawn),) = notes
    assert number == 8 and prompts.unpad(drawn.batch.bare) == prompts.unpad(batch.bare)[::5] and len(drawn.others) == 2
    assert prompts.unpad(drawn.batch.other) == prompts.unpad(batch.other)[::5]
    # Retention: episodes under other legends, played with them.
    assert other.tokens_BxT.shape == (2 * 5, 8) and other.mask_BxT.any(axis=1).reshape(2, 5)[:, :2].all()
    texts = folder.tokenizer.batch_decode(prompts.unpad(batch.other))
    legends = {parse_legend(text.split("<|system|>")[1].split("<|end|>")[0]) for text in texts}
    assert len(legends) == 2 and legends <= set(world.legends["train"])


@pytest.mark.parametrize("steps", [3, 30])
def test_programs_are_compiled_from_the_prompts_of_one_step(steps, world, folder, sampling, mesh, monkeypatch):
    source, calls, encode = make_source(world, folder, sampling, mesh), [], prompts.encode
    monkeypatch.setattr(prompts, "encode", lambda *own: calls.append(own) or encode(*own))
    examples = [example for step in range(10, 10 + steps) for example in source.examples(step)]
    assert 0 < len(calls) <= 8  # those of one step
    assert len(examples) == steps


def test_a_step_is_a_function_of_its_number(world, folder, sampling, mesh, expert):
    first, second = (make_source(world, folder, sampling, mesh, retention=False) for _ in range(2))
    for step in (0, 1, 2):
        earlier = first.next(None, step)
    later = second.next(None, 2)  # as in a run that resumes there
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(earlier), jax.device_get(later))
    assert later.other_rollout is None and later.batch.other is None


@pytest.mark.slow
def test_places_without_a_response_count_nowhere(make_rollout):
    real = make_rollout(0, 6, 12)
    absent = Rollout(np.zeros((4, 12), np.int32), np.zeros((4, 12), bool), np.zeros((4, 12), np.float32))
    order = np.random.default_rng(0).permutation(10)
    mixed = jax.tree.map(lambda a, b: np.concatenate([a, b])[order], real, absent)
    sampling = SamplingConfig(max_tokens=12, eos_ids=(2, 5), pad_id=0)
    expected, found = (response_stats.response_metrics(rollout, sampling) for rollout in (real, mixed))
    assert jax.device_get(expected) == jax.device_get(found)
    for averaging in ("token_mean", "sequence_mean"):
        config = LossConfig(averaging=averaging, skip_first=1)
        weights = [
            losses.token_weights(losses.trained_tokens(config, rollout, (2, 5)), averaging) for rollout in (real, mixed)
        ]
        np.testing.assert_array_equal(np.concatenate([weights[0], np.zeros((4, 12))])[order], weights[1])


# --- An evaluation ---


def make_split(world, folder, mesh):
    config = SimpleNamespace(prompt=PROMPT, eval=SimpleNamespace(batch_size=12))
    return Split.of(config, world, "test", folder, mesh)


def test_an_evaluation_counts_boards(world, folder, sampling, mesh, expert):
    split = make_split(world, folder, mesh)
    asker = Games(split, folder, PROMPT, mesh)
    greedy = dataclasses.replace(sampling, temperature=0.0)
    answers = {view: asker.answer(None, view, greedy, KEY) for view in ("bare", "context", "other")}
    for view, own in answers.items():
        items = grade_episodes(world, folder.tokenizer, folder.stop_ids, own.episodes, view)
        assert [item["id"] for item in items] == [row.id for row in world.rows("test")]
        assert all(item["correct"] and not item["truncated"] for item in items)
        assert [item["length"] for item in items] == [7 * item["turns"] for item in items]
        assert sum(item["turns"] for item in items) == len(own.turns) == len(own.rollout.tokens_BxT)
    expert.says = "@0@1up "  # no move word
    episodes = asker.answer(None, "bare", greedy, KEY).episodes
    items = grade_episodes(world, folder.tokenizer, folder.stop_ids, episodes, "bare")
    assert {(item["turns"], item["correct"], item["parsed"]) for item in items} == {(2, False, None)}
    assert {item["reason"] for item in items} == {"2 invalid moves in a row"}


def test_the_views_are_compared_along_all_turns_of_the_bare_view(world, folder, sampling, mesh, expert):
    split = make_split(world, folder, mesh)
    asker = Games(split, folder, PROMPT, mesh)
    answers = asker.answer(None, "bare", sampling, KEY)
    read = [folder.tokenizer.batch_decode(prompts.unpad(view)) for view in asker.prompts(answers)]
    assert [len(texts) for texts in read] == [len(answers.turns)] * 3
    for (number, row), bare, context, control in zip(answers.turns, *read):
        unrelated = split.rows["other"][number].context
        for text, system in ((bare, None), (context, world.context), (control, unrelated)):
            assert f"<|user|>{row.question}<|end|>" in text
            assert (f"<|system|>{system}\n<|end|>" in text) == (system is not None)


def test_the_control_is_the_context_that_has_least_to_do_with_the_questions():
    views = dict.fromkeys(("bare", "context", "empty", "other", "paraphrase", "unrelated"), [])
    for left_out, control in (("", "unrelated"), ("unrelated", "other"), ("other", "empty")):
        views.pop(left_out, None)
        assert _control_view(SimpleNamespace(rows=views)) == control


def test_several_samples_of_a_board_are_several_episodes(world, folder, sampling, mesh, expert):
    split = make_split(world, folder, mesh)
    answers = Games(split, folder, PROMPT, mesh).answer(None, "bare", dataclasses.replace(sampling, samples=2), KEY)
    assert [(e.row.id, e.sample) for e in answers.episodes[:3]] == [
        (split.rows["bare"][0].id, 0), (split.rows["bare"][0].id, 1), (split.rows["bare"][1].id, 0),
    ]  # fmt: skip
    assert len(answers.turns) == sum(len(episode.turns) for episode in answers.episodes[::2])
