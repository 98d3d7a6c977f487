"""The extraction of lessons: a scripted model solves, plays, and writes; the journal, the choice, and bad input."""

import copy
import dataclasses
import itertools
import json
from types import SimpleNamespace
import zlib

import numpy as np
import pytest

from ctxjax import config as config_lib, extract as command
from ctxjax.configs import base, tiny_grid
from ctxjax.data import prompts
from ctxjax.data.task import LESSON, Row
from ctxjax.data.tasks import TASKS
from ctxjax.data.worlds.tiny_grid import Legend, parse_legend
from ctxjax.evaluation import player as player_lib
from ctxjax.evaluation.player import pad_responses
from ctxjax.experience import extraction
from ctxjax.experience.journal import Journal
from ctxjax.experience.selection import EMPTY
from ctxjax.games.frozen_lake import FrozenLake, Lake
from ctxjax.games.game import solve
from ctxjax.inputs import run_inputs


class Model:
    """Decode with a function from the text of a prompt to the text of a response; ``calls``: of the device."""

    def __init__(self, tokenizer, answer, monkeypatch):
        self.calls, self.prompts = 0, []
        stop = tokenizer.eos_token_id

        def decode(params, model, sampling, padded, key, size, mesh, numbers, what):
            self.calls += 1
            texts = tokenizer.batch_decode(prompts.unpad(padded))
            self.prompts += texts
            said = [tokenizer(answer(text), add_special_tokens=False)["input_ids"] for text in texts]
            ids = [[*row, stop][: sampling.max_tokens] for row in said]
            turns = [player_lib.Turn(None, [], np.array(row), np.full(len(row), -0.5), False) for row in ids]
            return pad_responses(turns, sampling)

        monkeypatch.setattr(player_lib.decoding, "decode", decode)
        config = SimpleNamespace(vocab_size=len(tokenizer), max_positions=100_000)
        self.folder = SimpleNamespace(
            config=config, tokenizer=tokenizer, stop_ids=(stop,), pad_id=tokenizer.pad_token_id, params=None,
            check_prompts=lambda *arguments: None,
        )  # fmt: skip


def split_prompt(text: str) -> tuple[str, str]:
    """Return (context, question) of a prompt in the worlds' template."""
    context = text.split("<|system|>")[1].split("<|end|>")[0] if "<|system|>" in text else ""
    return context, text.split("<|user|>")[1].split("<|end|>")[0]


def run(config, model, mesh, path):
    experiment = config_lib.experiment(config, 1, trains=False)
    extraction.check_task(experiment)
    task_config = experiment.task_config
    if hasattr(task_config, "required"):
        task_config = dataclasses.replace(task_config, required=False)
    task = TASKS[experiment.task][1](task_config)
    return extraction.Extractor(experiment, task, model.folder, mesh, Journal(path))()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- A game ---


@pytest.fixture
def grid():
    config = tiny_grid.get_config()
    config.extract.candidates, config.extract.traces, config.extract.budget = 3, 4, 100
    config.tiny_grid.dev_questions, config.eval.batch_size = 40, 8
    return config


@pytest.fixture
def world(grid):
    return TASKS["tiny_grid"][1](config_lib.experiment(grid, 1).task_config)


def make_player(world, lessons=lambda number, trace: None):
    """A player who walks up and right without a context and obeys one that has all lines of a legend.

    ``lessons``: number of the trace, and its text -> what it writes; None: the true legend.
    """
    legend, count = world.targets[0], itertools.count()

    def answer(text: str) -> str:
        context, question = split_prompt(text)
        if question[-1] in "+-":
            written = lessons(next(count), question)
            return "\n".join(legend.lines()) if written is None else written
        known = parse_legend(context) if context.count("=") == 8 else None
        if known is None or known.symbols != legend.symbols:
            return legend.words[0 if question.count(legend.words[0]) < 2 else 3]
        return world._answer(world._read_board(question, known), known)

    return answer


def test_a_game_is_learnt_from_its_traces(grid, world, mesh, tmp_path, monkeypatch):
    model = Model(world.tokenizer(), make_player(world), monkeypatch)
    done = run(grid, model, mesh, tmp_path / "c.jsonl")
    assert sorted(done.chosen.split("\n")) == sorted(world.targets[0].lines())
    # All candidates say the same, so one is left.
    assert done.counts == {"responses": 12, "without a lesson": 0, "empty": 0, "near-duplicates": 2}
    assert [candidate.number for candidate in done.candidates] == [1] and done.candidates[0].tokens == 8
    assert done.selection.p < 0.05 and done.selection.spent <= 100 and done.selection.tested == 10
    steps = [line["step"] for line in read(tmp_path / "c.jsonl")]
    assert steps[:5] == ["traces 0", "traces 8", "lessons 0", "lessons 8", "candidates"] and steps[-1] == "decision"
    # Traces are of training boards and without a context; what is asked to choose are dev boards.
    ids = [trace["id"] for line in read(tmp_path / "c.jsonl")[:2] for trace in line["traces"]]
    assert len(set(ids)) == 12 and set(ids) <= {row.id for row in world.rows("train")}
    assert not any("<|system|>" in text for text in model.prompts[: model.prompts.index(model.prompts[0]) + 12])


@pytest.mark.parametrize("cut", [0.1, 0.35, 0.5, 0.7, 0.9, 0.999])
def test_a_killed_extraction_goes_on_and_ends_the_same(grid, world, mesh, tmp_path, monkeypatch, cut):
    def lessons(number, trace):
        return world.targets[0].lines()[zlib.crc32(trace.encode()) % 8]

    path = tmp_path / "c.jsonl"
    model = Model(world.tokenizer(), make_player(world, lessons), monkeypatch)
    whole = run(grid, model, mesh, path)
    text, lines = path.read_bytes(), path.read_bytes().count(b"\n")
    assert len(whole.candidates) == 3
    path.write_bytes(text[: int(cut * len(text))])
    kept = path.read_bytes().count(b"\n")
    again = Model(world.tokenizer(), make_player(world, lessons), monkeypatch)
    assert run(grid, again, mesh, path) == whole and path.read_bytes() == text
    assert again.calls < model.calls or kept == 0
    last = Model(world.tokenizer(), make_player(world, lessons), monkeypatch)
    assert run(grid, last, mesh, path) == whole and last.calls == 0 and path.read_bytes().count(b"\n") == lines


def test_the_empty_context_can_win(grid, world, mesh, tmp_path, monkeypatch):
    wrong = Legend(world.targets[0].symbols[::-1], world.targets[0].words)
    player = make_player(world, lambda number, trace: "\n".join(wrong.lines()))
    done = run(grid, Model(world.tokenizer(), player, monkeypatch), mesh, tmp_path / "c.jsonl")
    assert done.chosen is None and done.selection.winner == EMPTY and done.selection.p is None
    assert read(tmp_path / "c.jsonl")[-1]["winner"] == EMPTY
    assert command.describe(done).endswith("the best, 1, is no better than the empty context")


def test_responses_without_a_lesson_are_counted(grid, world, mesh, tmp_path, monkeypatch):
    player = make_player(world, lambda number, trace: None if number >= 8 else "ka")
    done = run(grid, Model(world.tokenizer(), player, monkeypatch), mesh, tmp_path / "c.jsonl")
    assert done.counts == {"responses": 12, "without a lesson": 8, "empty": 2, "near-duplicates": 0}
    assert [candidate.number for candidate in done.candidates] == [3]
    text = command.describe(done)
    assert "12 responses, 8 without a lesson; 1 candidates (2 empty and 0 near-duplicates left out)" in text
    silent = Model(world.tokenizer(), make_player(world, lambda number, trace: ""), monkeypatch)
    with pytest.raises(ValueError, match="none of 12 responses has a line with a lesson, one that begins with '- EXP"):
        run(grid, silent, mesh, tmp_path / "silent.jsonl")


def test_a_text_game_is_learnt_from_traces_that_show_how_they_ended(letters, mesh, tmp_path, monkeypatch):
    """A player that walks into the border until a lesson says where to go, and then takes a shortest way."""
    config = base.get_config()
    config.task, config.model.path, config.text_game.dev_questions = "text_game", "/model", 40
    config.extract.candidates, config.extract.traces, config.extract.budget, config.eval.batch_size = 3, 4, 100, 8
    game = FrozenLake(config.text_game.size, config.text_game.pieces)

    def answer(text: str) -> str:
        context, question = split_prompt(text)
        if "This is what happened." in question:
            assert "You lost after 1 turn." in question or "since you made no possible move twice in a row" in question
            return f"{LESSON} Walk to G, and never onto H."
        if "Walk to G" not in context:
            return "[down]" if "none" in question else "[left]"
        rows = [line.split() for line in question.split("Board:\n")[1].split("\n\n")[0].splitlines()]
        places = {s: [(r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == s] for s in "HP"}
        board = Lake(frozenset(places["H"]), *places["P"])
        return f"I go [{solve(game, board, 9)[0]}]."

    done = run(config, Model(letters, answer, monkeypatch), mesh, tmp_path / "c.jsonl")
    assert done.chosen == f"{LESSON} Walk to G, and never onto H." and done.selection.p < 0.05
    assert done.counts["without a lesson"] == 0


# --- Questions of a file ---


@pytest.fixture
def sums(tmp_path):
    config = base.get_config()
    rows = [{"question": f"{n} plus {n % 7}?", "answer": str(n + n % 7)} for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.task, config.model.path, config.math.path = "math", "/model", str(tmp_path / "rows.jsonl")
    config.extract.candidates, config.extract.traces, config.extract.budget = 4, 2, 200
    config.eval.batch_size, config.math.dev_questions = 16, 24
    return config


def make_solver(text: str) -> str:
    """A model that adds wrongly unless a lesson says to carry, and writes this lesson in some traces only."""
    context, question = split_prompt(text)
    if "This is what happened." in question:
        is_useful = "Problem:\n1" in question or "Problem:\n2" in question
        return f"Let me see.\n{LESSON} {'Always carry the one.' if is_useful else 'Be polite to all users.'}"
    a, b = question.split("?")[0].split(" plus ")
    return f"\\boxed{{{int(a) + int(b) + ('carry' not in context)}}}"


def test_questions_of_a_file_are_solved_and_lessons_see_no_label(sums, letters, mesh, tmp_path, monkeypatch):
    model = Model(letters, make_solver, monkeypatch)
    done = run(sums, model, mesh, tmp_path / "c.jsonl")
    assert "Always carry the one." in done.chosen and done.chosen.startswith(LESSON)
    asked = [split_prompt(text)[1] for text in model.prompts if "This is what happened." in text]
    for question in asked:
        a, b = question.removeprefix("Problem:\n").split("?")[0].split(" plus ")
        wrong = f"\\boxed{{{int(a) + int(b) + 1}}}"
        assert f"\n\nYour solution:\n{wrong}\n\nThis is" in question and f"{int(a) + int(b)}}}" not in question
    assert len(asked) == 8 and LESSON in asked[0]


def test_a_trace_has_the_whole_chat(sums, letters, mesh, tmp_path, monkeypatch):
    turns = [("user", "1 plus 1?"), ("assistant", "2"), ("user", "{n} plus {m}?"), ("assistant", "{sum}")]
    rows = []
    for n in range(100):
        said = {"n": n, "m": n % 7, "sum": n + n % 7}
        rows.append({"messages": [{"role": role, "content": text.format(**said)} for role, text in turns]})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums.task, sums.qa_jsonl.path, sums.qa_jsonl.messages = "qa_jsonl", str(tmp_path / "chats.jsonl"), "messages"
    sums.qa_jsonl.grading, sums.qa_jsonl.dev_questions, sums.qa_jsonl.test_questions = "numeric", 24, 24

    def answer(text):
        if "This is what happened." in text:
            return f"{LESSON} Always carry the one."
        a, b = text.split("<|user|>")[-1].split("?")[0].split(" plus ")
        return str(int(a) + int(b) + ("carry" not in text))

    model = Model(letters, answer, monkeypatch)
    run(sums, model, mesh, tmp_path / "c.jsonl")
    asked = [split_prompt(text)[1] for text in model.prompts if "This is what happened." in text]
    assert len(asked) == 8 and all("Problem:\n1 plus 1?\n2\n" in question for question in asked)


def test_a_trace_that_is_too_long_has_no_lesson(sums, letters, mesh, tmp_path, monkeypatch, capsys):
    def wordy(text):
        is_long = "This is what happened." not in text and split_prompt(text)[1].startswith("1")
        return "na " * 1000 if is_long else make_solver(text)

    model = Model(letters, wordy, monkeypatch)
    model.folder.config.max_positions, sums.extract.limit, sums.rollout.max_tokens = 2300, 300, 2000
    done = run(sums, model, mesh, tmp_path / "c.jsonl")
    long = capsys.readouterr().out
    count = int(long.split("warning: ")[1].split(" of 8 traces are left without a lesson")[0])
    assert 0 < count == done.counts["without a lesson"] < 8 and "lower extract.max_tokens or rollout" in long
    assert done.counts["responses"] == 8


def test_prompts_that_lessons_would_make_too_long_are_found_first(sums, letters, mesh, tmp_path, monkeypatch):
    model = Model(letters, make_solver, monkeypatch)

    def check(tokens, room):
        longest = max(map(len, tokens))
        if longest + room > 4000:
            raise ValueError(f"a prompt of {longest} tokens")

    model.folder.check_prompts, sums.extract.limit = check, 3600
    with pytest.raises(ValueError, match="a prompt of 3.* tokens; extract.limit = 3600 tokens of lessons are part of"):
        run(sums, model, mesh, tmp_path / "c.jsonl")
    sums.extract.limit, sums.prompt.max_context_tokens = 100, 120
    with pytest.raises(ValueError, match="more than prompt.max_context_tokens = 120; .*; extract.limit = 100 "):
        run(sums, model, mesh, tmp_path / "c.jsonl")
    assert model.calls == 0
    short = make_prompt(letters, "99 plus 1?")
    sums.prompt.max_context_tokens, sums.prompt.max_bare_tokens, sums.prompt.overlong = 0, len(short), "drop"
    sums.math.dev_questions, sums.math.ask_format = 0, False
    sums.extract.level = 0.9  # about ten questions have two digits
    model.folder.check_prompts = lambda *given: None
    run(sums, model, mesh, tmp_path / "c.jsonl")
    asked = [split_prompt(text)[1] for text in model.prompts if "This is what happened." not in text]
    assert len(asked) > 8 and all(int(question.split(" plus ")[0]) < 100 for question in asked)


def make_prompt(tokenizer, question):
    config = prompts.PromptConfig(**base.get_config().prompt)
    return prompts.encode(tokenizer, [Row("0", question, None, "")], config)[0]


def test_a_template_that_takes_no_context_is_found_first(sums, letters, mesh, tmp_path, monkeypatch):
    strict = copy.deepcopy(letters)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict.chat_template = refusal + letters.chat_template
    model = Model(strict, make_solver, monkeypatch)
    with pytest.raises(ValueError, match="no system"):
        run(sums, model, mesh, tmp_path / "c.jsonl")
    assert model.calls == 0


def test_prompts_with_lessons_think_no_more_than_those_without(sums, letters, mesh, tmp_path, monkeypatch):
    thinking = copy.deepcopy(letters)
    thinking.chat_template = letters.chat_template + "{% if enable_thinking %}!{% endif %}"
    sums.prompt.thinking, sums.prompt.teacher_thinking = False, True
    model = Model(thinking, make_solver, monkeypatch)
    run(sums, model, mesh, tmp_path / "c.jsonl")
    assert any(LESSON in split_prompt(text)[0] for text in model.prompts)
    assert not any(text.endswith("!") for text in model.prompts)


def test_texts_with_braces_are_not_filled_in():
    filled = extraction._fill("{question} / {response} / {x}", question="{response} {trace}", response="b")
    assert filled == "{response} {trace} / b / {x}"


# --- The command ---


@pytest.fixture
def started(sums, letters_folder, two_devices, monkeypatch):
    """started(workdir, solver=make_solver): run the command with a scripted model, and return its exit code."""
    sums.model.path = str(letters_folder)
    monkeypatch.setattr(player_lib.ModelFolder, "check_prompts", lambda *arguments: None)

    def start(workdir, solver=make_solver, **changes):
        sums.update_from_flattened_dict(changes)
        Model(player_tokenizer(letters_folder), solver, monkeypatch)
        return command.main(sums, str(workdir), "auto")

    return start


def player_tokenizer(folder):
    from ctxjax.inputs.model_folder import load_tokenizer

    return load_tokenizer(folder)


def test_the_command_writes_the_context_of_the_next_run(started, tmp_path, capsys):
    assert started(tmp_path / "run") == 0
    text = (tmp_path / "run" / "experience.txt").read_text()
    assert "Always carry the one." in text and text in capsys.readouterr().out
    again = base.get_config()
    again.math.path, again.math.context_file = str(tmp_path / "rows.jsonl"), str(tmp_path / "run" / "experience.txt")
    again.task, again.model.path = "math", "/model"
    task = TASKS["math"][1](config_lib.experiment(again, 1).task_config)
    assert {row.context for row in task.rows("train")} == {text.strip()}
    with pytest.raises(ValueError, match="holds a run with another configuration"):
        started(tmp_path / "run", **{"extract.traces": 3})


def test_the_command_writes_no_file_if_the_empty_context_wins(started, tmp_path, capsys):
    def spoiled(text):
        return make_solver(text) if "happened" in text else "\\boxed{0}"

    assert started(tmp_path / "run", spoiled) == command.EMPTY_WINS == 5
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "candidates.jsonl", "config.json", "lock", "run.json",
    ]  # fmt: skip
    assert "the empty context wins: no experience.txt is written" in capsys.readouterr().out


# --- The real sampler ---


@pytest.mark.slow
@pytest.mark.usefixtures("two_devices")
def test_an_extraction_with_the_real_sampler_goes_on_bit_for_bit(grid, tmp_path, monkeypatch):
    """The model is untrained, and half of what it says are lines of lessons: such are the tokens of its world."""
    grid.base.cache, grid.base.steps, grid.base.warmup_steps = str(tmp_path / "cache"), 2, 1
    grid.base.width, grid.base.layers, grid.base.head_dim, grid.base.mlp_width = 32, 1, 8, 48
    grid.base.batch_size, grid.compile_cache = 16, ""
    whole = command.extract(grid, tmp_path / "whole")
    store, steps = Journal.do, itertools.count()

    def die(self, step, compute):
        if next(steps) == 7:
            raise KeyboardInterrupt
        return store(self, step, compute)

    monkeypatch.setattr(Journal, "do", die)
    with pytest.raises(KeyboardInterrupt):
        command.extract(grid, tmp_path / "killed")
    monkeypatch.setattr(Journal, "do", store)
    assert command.extract(grid, tmp_path / "killed") == whole
    journals = [(tmp_path / name / "candidates.jsonl").read_bytes() for name in ("whole", "killed")]
    assert journals[0] == journals[1] and len(whole.candidates) == 3


# --- Bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extract.budget": 19}, "a budget of 19 answers is too small for 4 candidates and 24 questions"),
        ({"math.dev_questions": 2}, "2 questions are too few to choose among 4 candidates"),
        (
            {"math.dev_questions": 20},
            "of 20 dev questions 5 are for the test .* give at least 22 dev questions",
        ),
    ],
)
def test_sizes_that_do_not_suffice_are_refused_before_a_model_is_opened(sums, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(run_inputs, "prepare_student_path", None)
    sums.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        command.extract(sums, tmp_path / "extract")
    assert not (tmp_path / "extract" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "rules", "base.steps": 1, "model.path": ""}, "task = 'rules' has no extraction"),
        ({"task": "self_study"}, "task = 'self_study' has no extraction"),
        ({"math.context": "x"}, "math.context is set, and an extraction makes the context itself; leave it out"),
        ({"task": "qa_jsonl", "qa_jsonl.context_template": "{note}"}, "qa_jsonl.context_template is set, and an extr"),
        ({"extract.request": "Write!"}, "extract.request = 'Write!' must be a text with {trace}"),
        ({"extract.solution": "{question}"}, "extract.solution = .* must be a text with {question} and {response}"),
        ({"extract.level": 1.5}, "extract.level = 1.5 must be at most 1"),
    ],
)
def test_bad_input_ends_before_anything_is_asked(sums, letters, mesh, tmp_path, monkeypatch, changes, message):
    sums.update_from_flattened_dict(changes)
    model = Model(letters, make_solver, monkeypatch)
    with pytest.raises(ValueError, match=message):
        run(sums, model, mesh, tmp_path / "c.jsonl")
    assert model.calls == 0
