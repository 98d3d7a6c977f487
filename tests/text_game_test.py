"""The task text_game: prompts and grades of whole episodes by hand, boards of splits, traces, other contexts."""

import dataclasses
import random
import re

import pytest

from ctxjax.configs import base
from ctxjax.data import prompts, splits
from ctxjax.data.grading.grade import Grade
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import GameTask, Row, make_evaluation_views
from ctxjax.data.tasks.text_game import TextGame, TextGameConfig
from ctxjax.games import GAMES
from ctxjax.games.boards import measure
from ctxjax.games.frozen_lake import Lake
from ctxjax.games.game import MOVES
from ctxjax.games.sokoban import Room

FEW = {"train_questions": 9, "dev_questions": 5, "test_questions": 6}
SMALL = {
    "frozenlake": {"size": 3, "pieces": 2, "turns": 5},
    "sokoban": {"size": 5, "pieces": 1, "turns": 5} | FEW,
    "ice_slide": {"size": 5, "pieces": 4, "turns": 5} | FEW,
    "grid_walk": {"size": 3, "pieces": 2, "turns": 4} | FEW,
}  # fmt: skip
# Words that would tell what a game is about.
TOLD = "hole|goal|ice|lake|frozen|slip|box|crate|target|wall|push|rock|slid|player|win|won|lose|lost|reach|fall|sokoban"


def make(game: str = "frozenlake", **changes) -> TextGame:
    fields = base.get_config().text_game.to_dict() | {"game": game, "context": "Look first."} | SMALL.get(game, {})
    return TextGame(TextGameConfig(**fields | changes))


@pytest.fixture(scope="module")
def lake() -> TextGame:
    return make()


@pytest.fixture
def row(lake) -> Row:
    """Two holes: to the right of the player, and left of the goal."""
    return lake._make_row(Lake(frozenset({(0, 1), (2, 1)}), (0, 0)))


ASKED = (
    "You are playing a game whose rules you are not told. In each turn you see a board and make one move: up, down, "
    "left or right. Think about what the symbols may mean, and then write your move in square brackets: [up], [down], "
    "[left] or [right].\n\n"
)


def test_the_prompts_of_an_episode_by_hand(lake, row):
    assert row.id == "PH_/___/_HG" and row.reference == "down right right down" and row.context == "Look first."
    assert row.question == f"{ASKED}Moves so far: none\n\nBoard:\nP H _\n_ _ _\n_ H G"
    after = lake.play(row, ["[up] or [down]?"])
    assert after == row._replace(question=f"{ASKED}Moves so far: down\n\nBoard:\n_ H _\nP _ _\n_ H G")
    invalid = lake.play(row, ["I go [down].", "I would go right."])
    assert invalid.question == (
        f"{ASKED}Moves so far: down\n\nBoard:\n_ H _\nP _ _\n_ H G\n\n"
        "Your last response had no move that is possible here."
    )
    said = ["[down]", "I would go right.", "<think>[left]</think>[right]"]
    assert lake.play(row, said).question == f"{ASKED}Moves so far: down, right\n\nBoard:\n_ H _\n_ P _\n_ H G"


def test_the_grades_of_episodes_by_hand(lake, row):
    assert lake.play(row, ["[down]", "[right]", "[right]", "[down]"]) == Grade("down right right down", True)
    assert lake.play(row, ["[right]"]) == Grade("right", False)
    assert lake.play(row, ["[down]", "[down]", "[right]"]) == Grade("down down right", False)
    turns = ["[down]", "[up]", "hm", "[down]"]
    assert isinstance(lake.play(row, turns), Row)
    assert lake.play(row, [*turns, "[right]"]) == Grade("down up down right", False)
    assert lake.play(row, ["[down]", "[left]", "hm"]) == Grade(None, False, "2 invalid moves in a row")
    assert lake.play(row, ["[up]", "<think>[down]"]) == Grade(None, False, "2 invalid moves in a row")


def test_a_box_that_is_pushed_onto_its_target_wins():
    task = make("sokoban")
    inside = {(r, c) for r in range(1, 4) for c in range(1, 4)}
    walls = frozenset({(r, c) for r in range(5) for c in range(5)} - inside)
    row = task._make_row(Room(walls, frozenset({(3, 2)}), frozenset({(2, 2)}), (2, 1)))
    assert row.reference == "up right down" and "Board:\n# # # # #\n# _ _ _ #\n# P X _ #\n# _ O _ #\n" in row.question
    assert task.play(row, ["[up]", "[right]", "[down]"]) == Grade("up right down", True)
    assert "# _ P X #" in task.play(row, ["[right]"]).question
    assert task.play(row, ["[right]", "[right]", "[right]"]) == Grade(None, False, "2 invalid moves in a row")


@pytest.mark.parametrize("name", GAMES)
def test_nothing_that_a_player_reads_tells_the_rules(name):
    task, chance = make(name), random.Random(0)
    for row in task.rows("train")[:6]:
        turn, said = row._replace(context=None), []
        while isinstance(turn, Row):
            assert not re.search(rf"(?i)\b(?:{TOLD})", turn.question)
            said.append(chance.choice([*(f"[{move}]" for move in MOVES), "hm"]))
            turn = task.play(row, said)
        assert not re.search(r"(?i)\b(?:hole|goal|ice|box|target|wall|rock)", task.trace(row, said))


@pytest.mark.parametrize("name", GAMES)
def test_boards_are_in_one_split_and_can_be_won(name):
    task = make(name)
    splits.check_splits(task)
    assert isinstance(task, GameTask) and task.skipped == {}
    for split in splits.SPLITS:
        count = getattr(task.config, f"{split}_questions")
        assert len(task.rows(split)) == count if count else task.rows(split)
        for row in task.rows(split):
            assert task.play(row, [f"[{move}]" for move in row.reference.split()]).correct
    again = make(name, seed=3)
    ids = {split: {row.id for own in (task, again) for row in own.rows(split)} for split in splits.SPLITS}
    assert sum(map(len, ids.values())) == len(set.union(*ids.values()))
    assert [row.id for row in make(name).rows("train")] == [row.id for row in task.rows("train")]
    assert [row.id for row in again.rows("train")] != [row.id for row in task.rows("train")]


def test_facts_are_those_of_the_held_out_boards(lake):
    facts = lake.facts["boards"]
    assert facts.keys() == {"dev", "test"} and facts["test"]["moves"] == {"4": 6} == {"4": len(lake.rows("test"))}
    own = measure(lake.game, [lake._boards[row.id] for row in lake.rows("dev")], 5)
    assert (facts["dev"]["random"], facts["dev"]["fixed"]) == (own.random, own.fixed)
    assert facts["dev"]["fixed_path"].split() == list(own.fixed_path) and facts["dev"]["ceiling"] == 1


@pytest.mark.parametrize(
    ("said", "end"),
    [
        (["[down]", "[right]", "[right]", "[down]"], "_ H _\n_ _ _\n_ H P\nYou won after 4 turns."),
        (["[right]"], "_ P _\n_ _ _\n_ H G\nYou lost after 1 turn."),
        (
            ["[down]", "[left]", "hm"],
            "_ H _\nP _ _\n_ H G\nThe game was over after 3 turns, since you made no possible move twice in a row, and "
            "you had not won.",
        ),
        (
            ["[down]", "[up]"] * 2 + ["[down]"],
            "_ H _\nP _ _\n_ H G\nThe game was over after 5 turns, and you had not won.",
        ),
    ],
)
def test_a_trace_says_how_the_episode_ended(said, end, lake, row):
    trace = lake.trace(row, said)
    assert trace.endswith(f"\n\nThe end\nBoard:\n{end}")
    assert trace.count("\nYour response:\n") == len(said)


def test_a_trace_by_hand(lake, row):
    assert lake.trace(row, ["<think>Up?</think>I take [down].", "", "[up]", "[right]"]) == (
        "You played a game whose rules you were not told. In each turn you saw a board and made one move: up, down, "
        "left or right.\n\n"
        "Turn 1\nBoard:\nP H _\n_ _ _\n_ H G\nYour response:\nI take [down].\nYou moved down.\n\n"
        "Turn 2\nBoard:\n_ H _\nP _ _\n_ H G\nYour response:\n(nothing)\n"
        "Your last response had no move that is possible here.\n\n"
        "Turn 3\nBoard:\n_ H _\nP _ _\n_ H G\nYour response:\n[up]\nYou moved up.\n\n"
        "Turn 4\nBoard:\nP H _\n_ _ _\n_ H G\nYour response:\n[right]\nYou moved right.\n\n"
        "The end\nBoard:\n_ P _\n_ _ _\n_ H G\nYou lost after 4 turns."
    )


def test_under_another_context_its_check_judges_every_response(lake, tmp_path):
    views = make_evaluation_views(lake, lake.rows("test"), "test")
    assert list(views) == ["bare", "context", "empty", "other"] and all(row.check for row in views["other"])
    row = lake.rows("test")[0]
    context = next(c for c in lake.other_contexts("train") if "capital letters" in c)
    (other,) = lake.rows_under(row, context)
    moves = [f"[{move}]" for move in row.reference.split()]
    assert other.question == row.question and other.check.name == "upper_case"
    assert lake.play(other, [move.upper() for move in moves]).correct
    assert not lake.play(other, ["I GO [DOWN]", moves[1].upper(), moves[2], moves[3].upper()]).correct
    assert isinstance(lake.play(other, ["I GO [DOWN]"]), Row) == (row.reference.split()[0] == "down")
    wrong = lake.play(other, ["HM", "HM"])
    assert wrong.correct and not lake.play(row, ["HM", "HM"]).correct  # it obeys, and does not win
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(f'"Other {n}."\n' for n in range(4)))
    plain = make(other_contexts_file=str(path))
    (other,) = plain.rows_under(row, plain.other_contexts("test")[0])
    assert plain.play(other, moves).correct and not plain.play(other, ["hm", "hm"]).correct


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("kind", ["letters", "smollm2"])
def test_no_turn_is_longer_than_the_longest_and_all_begin_alike(name, kind, request):
    tokenizer, config = request.getfixturevalue(kind), PromptConfig(placement="user")
    task, chance, turns = make(name), random.Random(1), {}
    rows = task.rows("train")[:9]
    for row in rows * 3:
        turn, said = row, []
        while isinstance(turn, Row):
            turns[turn.question] = (turn, row)
            said.append(chance.choice([*(f"[{move}]" for move in MOVES), "hm"]))
            turn = task.play(row, said)
    read = prompts.encode(tokenizer, [turn for turn, _ in turns.values()], config)
    longest = prompts.encode(tokenizer, [task.longest_turn(row) for _, row in turns.values()], config)
    assert all(len(own) <= len(most) for own, most in zip(read, longest))
    first = prompts.encode(tokenizer, rows, config)
    prefix = prompts.choose_shared_prefix(
        first + prompts.encode(tokenizer, [task.longest_turn(r) for r in rows], config)
    )
    assert len(prefix) >= prompts.SHORTEST_PREFIX and all(ids[: len(prefix)] == prefix for ids in read)


def test_without_a_context_it_can_be_played_to_learn_one():
    task = make(context="", required=False)
    assert {row.context for row in task.rows("train")} == {None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": ""}, "text_game has no context; set text_game.context_file"),
        ({"context": "", "context_file": "none.txt"}, "context file none.txt does not exist"),
        ({"game": "chess"}, "text_game.game = 'chess' is not known; choose from frozenlake, grid_walk, ice_slide, sok"),
        (
            {"size": 4},
            "text_game.size = 4, pieces = 2, turns = 5: no lake of 4 x 4 cells is solved in 1 to 5 moves: the shortest "
            "way has 6; change the moves",
        ),
        ({"pieces": 9}, "a lake of 3 x 3 cells with 9 holes has no path to the goal; give .* 0 to 4 holes"),
        (
            {"dev_questions": 8},
            "text_game.dev_questions = 8, but frozenlake with 3 x 3 cells and 2 pieces has 7 boards for dev; ask for "
            "fewer .0: all., or change text_game.size or text_game.pieces",
        ),
        ({"game": "sokoban", "size": 3}, "Sokoban of 3 x 3 cells with .* has no board"),
        ({"game": "sokoban", "dev_questions": 0}, "text_game.dev_questions = 0 asks for all boards, and .* too many"),
        (
            {"game": "sokoban", "dev_questions": 400},
            "text_game.dev_questions = 400: 1200 draws .* not 400; ask for fewer, or make the board larger",
        ),
        ({"game": "sokoban", "size": 4, "pieces": 2}, "text_game.train_questions = 9: none of 10000 rooms of 4 x 4"),
    ],
)
def test_settings_without_boards_or_lessons_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr("ctxjax.games.boards.DRAWS_PER_BOARD", 3)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(**changes)


def test_an_empty_file_of_lessons_is_refused(tmp_path):
    (tmp_path / "experience.txt").write_text("\n")
    with pytest.raises(ValueError, match="experience.txt is empty; the teacher would see no context"):
        make(context="", context_file=str(tmp_path / "experience.txt"))


def test_every_field_is_one_of_the_configuration():
    fields = {field.name for field in dataclasses.fields(TextGameConfig)}
    assert fields - {"records", "required", "context_column"} == set(base.get_config().text_game)
