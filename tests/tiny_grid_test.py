"""The grid game as a world: legends, boards, episodes, and the base's training text."""

import dataclasses
import re

import numpy as np
import pytest

from ctxjax.data import prompts
from ctxjax.data.grading.grade import Grade
from ctxjax.data.prompts import PromptConfig
from ctxjax.data.task import GameTask, World, make_evaluation_views
from ctxjax.data.worlds import tiny_grid
from ctxjax.data.worlds.tiny_grid import DEFAULT, Legend, TinyGrid, TinyGridConfig, parse_legend
from ctxjax.games.boards import measure
from ctxjax.games.game import MOVES
from ctxjax.games.grid_walk import Field, GridWalk

LEGEND = Legend("cbda", ("mi", "ka", "nu", "lo"))  # player, goal, hole, ground; up, down, left, right
TEXT = "\n".join(LEGEND.lines())
# The player is above the goal, one row of ground between them; a hole is to the right of the player.
BOARD = Field(frozenset({(0, 1), (2, 2)}), (2, 0), (0, 0))


@pytest.fixture(scope="module")
def world():
    config = TinyGridConfig(seed=0, context_index=0, size=3, holes=2, turns=5, train_questions=0, dev_questions=40,
                            test_questions=60, empty_share=0.25)  # fmt: skip
    return TinyGrid(config)


@pytest.fixture
def row(world):
    return world._make_row(BOARD, LEGEND, TEXT)


def test_the_class_is_a_world_and_a_game(world):
    assert isinstance(world, World) and isinstance(world, GameTask)


def test_the_games_boards_and_what_players_without_skill_win(world):
    game = GridWalk(3, 2)
    boards = list(game.every_board())
    assert len(boards) == 912 == sum(map(len, world.boards.values()))
    facts = measure(game, world.boards["test"], world.max_turns)
    assert facts.ceiling == 1 and set(facts.moves) == {2, 3, 4}
    assert facts.random < 0.15 and facts.fixed < 0.3
    drawn = game.draw(np.random.default_rng(0))
    assert drawn in boards
    with pytest.raises(ValueError, match="no grid of 2 x 2 cells with 3 holes is solved in 2 to 4 moves"):
        GridWalk(2, 3)


def test_a_run_records_what_its_held_out_boards_are_worth(world):
    facts, own = world.facts["boards"]["test"], measure(world.game, world.boards["test"][:60], world.max_turns)
    assert facts["boards"] == len(world.rows("test")) == 60 and world.facts["boards"]["dev"]["boards"] == 40
    assert (facts["random"], facts["fixed"], facts["ceiling"]) == (own.random, own.fixed, 1.0)


def test_a_legend_is_read_whatever_the_order_of_its_pairs(world):
    assert parse_legend(TEXT) == LEGEND
    again = world.paraphrase(world.rows("dev")[0], np.random.default_rng(1))
    assert parse_legend(again) == parse_legend(world.context) == world.targets[0] and again != world.context
    assert LEGEND.read("@0@6down ka") == "down" and LEGEND.read("kalo") == "right" and LEGEND.read("down") is None
    assert LEGEND.write(("up", "right")) == "milo"


def test_an_episode_by_hand(world, row):
    assert (row.id, row.question, row.reference) == ("PH_/___/G_H", "cdaaaabad|", TEXT)
    after = world.play(row, ["@0@6down ka"])
    assert after == row._replace(question="adacaabad|ka")
    assert world.play(row, ["ka", "ka"]) == Grade("down down", True)
    assert world.play(row, ["lo"]) == Grade("right", False)
    assert world.play(row, ["nu"]).question == "cdaaaabad|!"
    assert world.play(row, ["nu", "ka"]).question == "adacaabad|ka"
    assert world.play(row, ["nu", ""]) == Grade(None, False, "2 invalid moves in a row")
    back_and_forth = ["ka", "mi", "ka", "mi"]
    assert world.play(row, back_and_forth).question == "cdaaaabad|kamikami"
    assert world.play(row, [*back_and_forth, "ka"]) == Grade("down up down up down", False)


def test_the_answer_to_the_docstrings_example(world):
    legend = parse_legend("player=c;hole=d;up=mi;ground=a;left=nu;goal=b;right=lo;down=ka;")
    assert world._answer(world._read_board("aacabadda|lo", legend), legend) == "@2@4@6@7down ka"


def test_the_environment_follows_the_legend_also_where_the_player_does_not_see_it(world, row):
    for shown in (None, "", "\n".join(DEFAULT.lines())):
        assert world.play(row._replace(context=shown), ["ka", "ka"]).correct


def test_under_another_legend_the_same_board_looks_different(world, row):
    (other,) = world.rows_under(row, "\n".join(DEFAULT.lines()))
    assert (other.id, other.question) == (row.id, "acddddbdc|")
    assert world.play(other, ["lo", "lo"]).correct and not world.play(other, ["ka", "ka"]).correct


def test_pools_of_legends_and_grids_of_splits_are_disjoint(world):
    pools = [set(world.targets), {DEFAULT}, *(set(legends) for legends in world.legends.values())]
    assert sum(map(len, pools)) == len(set.union(*pools)) == 576
    for legend in world.targets:
        assert all(a != b for a, b in zip((*legend.symbols, *legend.words), (*DEFAULT.symbols, *DEFAULT.words)))
    grids = [{(board.holes, board.goal) for board in boards} for boards in world.boards.values()]
    assert sum(map(len, grids)) == len(set.union(*grids)) == 248
    views = make_evaluation_views(world, world.rows("test"), "test")
    assert list(views) == ["bare", "context", "empty", "other", "paraphrase"]
    assert {parse_legend(row.context) for row in views["other"]} <= set(world.legends["test"])


def test_the_base_sees_no_board_or_legend_that_is_held_out(world):
    rng = np.random.default_rng(0)
    drawn = [world.pretraining_row(rng) for _ in range(3000)]
    traces = [row for row in drawn if row.question[-1] in "+-"]
    assert abs(len(traces) / len(drawn) - tiny_grid.LESSON_SHARE) < 0.03
    moves = [row for row in drawn if row not in traces]
    assert abs(np.mean([bool(row.context) for row in moves]) - 0.7) < 0.03
    grids = {(board.holes, board.goal) for board in world.boards["train"]}
    lines = [row.context.count("\n") + 1 for row in moves if row.context]
    assert set(lines) == {6, 7, 8} and abs(np.mean(np.array(lines) < 8) - tiny_grid.PARTIAL_SHARE) < 0.03
    legends = [legend for legend in world.legends["train"] if legend != DEFAULT]
    for row in moves:
        if row.context and row.context.count("\n") == 7:
            legend = parse_legend(row.context)
            board = world._read_board(row.question, legend)
            assert legend in legends and (board.holes, board.goal) in grids
            assert row.response == world._answer(board, legend)
    nothing = [row.context for row in moves if not row.context]
    assert abs(np.mean([context == "" for context in nothing]) - 0.25) < 0.05
    assert {row.context for row in traces} == {None}


def test_a_trace_by_hand(world, row):
    assert world.trace(row, ["ka", "@1ka"]) == "cdaaaabad|kaadacaabad|kaadaaaacad+"
    assert world.trace(row, ["lo"]) == "cdaaaabad|loacaaaabad-"
    # The last two turns; an invalid move changes nothing, and neither does silence.
    assert world.trace(row, ["ka", "mi", "nu", "what?"]) == "cdaaaabad|nucdaaaabad|cdaaaabad-"


def test_lessons_are_what_a_trace_shows(world):
    """A second reader of traces: whoever moved is the player; two cells are holes; words are where the player goes."""
    rng, shown = np.random.default_rng(1), []
    for row in (world._draw_lessons(rng) for _ in range(300)):
        boards = re.split(r"\|(?:ka|lo|mi|nu)?", row.question[:-1])
        words = re.findall(r"\|(ka|lo|mi|nu)", row.question)
        lessons = dict(re.findall(r"(\w+)=(\w+);", row.response))
        moved = [(a, b, word) for a, b, word in zip(boards, boards[1:], words) if a != b]
        assert bool(lessons) == bool(moved)
        shown.append(len(lessons))
        reasons = re.findall(r"@(\d)@(\d)(\w+) (\w+)", row.response)
        assert len(reasons) == len(moved)
        for (before, after, word), reason in zip(moved, reasons):
            there, here = (text.index(lessons["player"]) for text in (after, before))
            assert reason[:2] == (str(here), str(there)) and lessons[reason[2]] == reason[3] == word
            steps = {"up": -3, "down": 3, "left": -1, "right": 1}
            assert {steps[name] for name in steps if lessons.get(name) == word} == {there - here}
            assert before.count(lessons["hole"]) + (after.count(lessons["hole"]) < 2) >= 2
        assert set(lessons) - {"player", "goal", "hole", "ground"} <= set(MOVES)
    assert set(shown) == {0, 5, 6}


def test_lessons_in_a_file_take_the_legends_place(world, tmp_path):
    config, path = world.config, tmp_path / "experience.txt"
    path.write_text("\n".join(LEGEND.lines()[:5]) + "\n")
    other = TinyGrid(dataclasses.replace(config, context_file=str(path)))
    assert other.context == "\n".join(LEGEND.lines()[:5]) and other.facts["contexts"].keys() == {str(path)}
    ours, theirs = world.rows("dev")[0], other.rows("dev")[0]
    assert ours._replace(context=other.context) == theirs  # the environment keeps its legend
    assert sorted(other.paraphrase(theirs, np.random.default_rng(0)).split("\n")) == sorted(LEGEND.lines()[:5])
    assert other.pretraining_facts() == world.pretraining_facts()
    for text, message in (("", "is empty"), ("Go left.", "line 1 is 'Go left.'; the models of this world read only")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            TinyGrid(dataclasses.replace(config, context_file=str(path)))
    with pytest.raises(FileNotFoundError, match="no.txt does not exist"):
        TinyGrid(dataclasses.replace(config, context_file=str(tmp_path / "no.txt")))


def test_the_bases_answers_win(world):
    for row in world.rows("dev"):
        legend, responses, turn = world.targets[0], [], row
        while not isinstance(turn, Grade):
            board = world._read_board(turn.question, legend)
            responses.append(world._answer(board, legend))
            turn = world.play(row, responses)
        assert turn.correct


def test_no_row_is_longer_than_the_longest(world):
    tokenizer, rng = world.tokenizer(), np.random.default_rng(0)

    def count(texts):
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    rows = [world.longest_pretraining_row(), *(world.pretraining_row(rng) for _ in range(1000))]
    for texts in ([(row.context or "") + row.question for row in rows], [row.response for row in rows]):
        lengths = count(texts)
        assert lengths[0] == max(lengths[1:])
    row = world.rows("test")[0]
    longest, first = prompts.encode(tokenizer, [world.longest_turn(row), row], PromptConfig())
    assert len(longest) == len(first) + world.max_turns - 1 and tokenizer.unk_token_id not in longest
    assert count(["@4@5@1@8right nu"]) == [6]


def test_too_many_boards_and_unknown_legends_are_refused(world):
    config = world.config
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    with pytest.raises(ValueError, match="GridWalk with 9 x 9 cells has more than 200,000 boards"):
        TinyGrid(TinyGridConfig(**fields | {"size": 9}))
    with pytest.raises(ValueError, match="tiny_grid.context_index = 8; this world has legends 0 to 7"):
        TinyGrid(TinyGridConfig(**fields | {"context_index": 8}))
    with pytest.raises(ValueError, match="tiny_grid.test_questions = 2000, but the world's test split has 160"):
        TinyGrid(TinyGridConfig(**fields | {"test_questions": 2000})).rows("test")
