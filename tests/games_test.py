"""Games: rules against TextArena's (if it is installed), facts by hand and by search, splits, actions."""

import functools
import random

import numpy as np
import pytest

from ctxjax.games import GAMES, __main__ as command
from ctxjax.games.boards import SPLITS, describe_players, draw_boards, measure, split_of
from ctxjax.games.frozen_lake import FrozenLake, Lake
from ctxjax.games.game import MOVES, Episode, act, look, read_action, solve
from ctxjax.games.grid_walk import GridWalk
from ctxjax.games.ice_slide import IceSlide, Rink
from ctxjax.games.sokoban import Room, Sokoban

DIRECTIONS = list(MOVES)


def play(game, board, moves, max_turns=5):
    episode = Episode(board)
    for move in moves:
        episode = act(game, episode, move, max_turns)
    return episode


# --- Rules ---


def test_a_lake_is_won_at_the_goal_and_lost_in_a_hole():
    game, board = FrozenLake(), Lake(frozenset({(0, 1), (2, 0)}), (0, 0))
    assert game.render(board) == "P H _\n_ _ _\nH _ G"
    won = play(game, board, ["down", "right", "right", "down"])
    assert won.won is True and won.moves == ("down", "right", "right", "down")
    assert play(game, board, ["right"]).won is False
    assert play(game, board, ["down", "right"]).won is None
    assert solve(game, board, 4) == ("down", "right", "right", "down") or solve(game, board, 4)[-1] == "right"
    assert solve(game, board, 3) is None


def test_a_box_is_pushed_onto_its_target_and_blocked_by_walls_and_boxes():
    walls = frozenset((r, c) for r in range(5) for c in range(6) if r in (0, 4) or c in (0, 5))
    game = Sokoban(size=6)
    board = Room(walls, frozenset({(2, 4)}), frozenset({(2, 2)}), (2, 1))
    there = game.move(game.move(board, "right"), "right")
    assert game.is_won(there) and there.player == (2, 3)
    assert game.move(there, "right") is None  # the wall stops the box
    two = board._replace(boxes=frozenset({(2, 2), (2, 3)}))
    assert game.move(two, "right") is None and game.move(two, "left") is None
    assert game.move(two, "up").player == (1, 1)
    assert game.render(board).splitlines()[2] == "# P X _ O #" and "√" in game.render(there)


def test_sliding_stops_at_rocks_and_borders_only():
    game, board = IceSlide(), Rink(frozenset({(0, 3)}), (0, 2), (0, 0))
    assert game.move(board, "right").player == (0, 2) and game.is_won(game.move(board, "right"))
    assert game.move(board, "down").player == (4, 0)
    assert game.move(board, "up") is None
    over = board._replace(goal=(2, 0))
    assert not game.is_won(game.move(over, "down"))  # passing over the goal is not enough


def test_one_invalid_response_is_forgiven_and_two_in_a_row_lose():
    game, board = FrozenLake(), Lake(frozenset(), (0, 0))
    once = play(game, board, ["up"])
    assert once.won is None and once.board == board and once.moves == () and look(game, once).was_invalid
    assert play(game, board, ["up", None]).won is False
    again = play(game, board, ["up", "down", None])
    assert (
        again.won is None and again.invalid_total == 2 and not look(game, play(game, board, ["up", "down"])).was_invalid
    )


def test_an_episode_without_a_win_ends_at_the_last_turn():
    game, board = FrozenLake(), Lake(frozenset(), (0, 0))
    path = ["down", "up", "down", "up", "down"]
    assert play(game, board, path[:4]).won is None and play(game, board, path).won is False
    assert play(game, board, ["down", "down", "up", None, "down"]).won is False  # invalid responses count too
    assert play(game, board, ["up", "down", "down", "right", "right"]).won is True


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ("[right]", "right"),
        ("I could go [up], but [ Down ] is safer.", "down"),
        ("[down] [jump]", "down"),
        ("right", None),
        ("", None),
        ("[]", None),
    ],
)
def test_the_action_is_the_last_bracketed_direction(response, action):
    assert read_action(response) == action


# --- Boards ---


def test_there_are_nineteen_lakes_of_three_by_three_cells_with_two_holes():
    game = FrozenLake(3, 2)
    boards = list(game.every_board())
    assert len(boards) == len(set(boards)) == 19
    rng = np.random.default_rng(0)
    assert {game.draw(rng) for _ in range(600)} == set(boards)


def brute(game, board, turns):
    """(probability that random moves win, the sequences that win), by playing every sequence."""
    wins = []
    for number in range(len(DIRECTIONS) ** turns):
        path, episode = [], Episode(board)
        for _ in range(turns):
            number, digit = divmod(number, len(DIRECTIONS))
            path.append(DIRECTIONS[digit])
            if episode.won is None:
                episode = act(game, episode, path[-1], turns)
        if episode.won:
            wins.append(tuple(path))
    return len(wins) / len(DIRECTIONS) ** turns, wins


@pytest.mark.parametrize("name", GAMES)
def test_facts_are_those_of_playing_every_sequence(name):
    game = GAMES[name]()
    boards = draw_boards(game, "train", 5, 0)
    facts = measure(game, boards, 4)
    played = [brute(game, board, 4) for board in boards]
    assert facts.random == pytest.approx(np.mean([rate for rate, _ in played]), abs=1e-12)
    assert facts.ceiling == np.mean([bool(wins) for _, wins in played])
    every = [path for _, wins in played for path in wins]
    most = max(sum(path in wins for _, wins in played) for path in set(every))
    assert facts.fixed == most / len(boards)
    # The path may be shorter than the turns: what follows does not matter.
    won = [any(path[: len(facts.fixed_path)] == facts.fixed_path for path in wins) for _, wins in played]
    assert np.mean(won) == facts.fixed
    lengths = [len(path) if (path := solve(game, board, 4)) else None for board in boards]
    assert facts.moves == {count: lengths.count(count) for count in dict.fromkeys(facts.moves)}
    assert sum(facts.moves.values()) == facts.boards == 5


@pytest.mark.parametrize("name", GAMES)
def test_splits_are_disjoint_whatever_the_seeds(name):
    game = GAMES[name](**({"size": 5} if name == "frozenlake" else {}))
    found = {split: {*draw_boards(game, split, 12, 0), *draw_boards(game, split, 12, 7)} for split in SPLITS}
    rendered = {split: {game.render(board) for board in boards} for split, boards in found.items()}
    assert not rendered["train"] & rendered["test"] and not rendered["train"] & rendered["dev"]
    assert not rendered["dev"] & rendered["test"] and all(len(boards) >= 12 for boards in found.values())
    assert all(split_of(game, board) == split for split, boards in found.items() for board in boards)
    assert draw_boards(game, "dev", 12, 0) == draw_boards(game, "dev", 12, 0) != draw_boards(game, "dev", 12, 7)


@pytest.mark.parametrize("name", GAMES)
def test_a_walk_that_moves_nothing_stays_in_its_split(name):
    game = GAMES[name]()
    for board in draw_boards(game, "test", 4, 0):
        after = [game.move(board, direction) for direction in DIRECTIONS]
        walks = [there for there in after if there is not None and there == board._replace(player=there.player)]
        assert {split_of(game, there) for there in walks} <= {"test"}


def test_lakes_may_be_held_to_a_number_of_moves():
    boards = list(FrozenLake(4, 3).every_board())
    assert len(boards) == 334 == len(list(FrozenLake(4, 3, (6, 7)).every_board()))
    longest = []
    for solution in (None, (1, 8)):
        game, rng = FrozenLake(5, 10, solution), np.random.default_rng(0)
        longest.append(max(len(solve(game, game.draw(rng), 25)) for _ in range(200)))
    assert longest[0] > 8 == longest[1]


def test_the_best_fixed_path_of_too_many_sequences_is_not_known():
    game = FrozenLake(3, 2)
    facts = measure(game, list(game.every_board()), 10)
    assert (facts.fixed, facts.fixed_path, facts.ceiling) == (None, None, 1.0)
    assert describe_players(1.0, 0.016, None) == "random moves win 1.6 %, perfect play 100.0 %"


@pytest.mark.parametrize("name", GAMES)
def test_every_board_that_is_drawn_can_be_won(name):
    game = GAMES[name]()
    rng = np.random.default_rng(1)
    for board in [game.draw(rng) for _ in range(30)]:
        path = solve(game, board, 5)
        assert play(game, board, path).won is True


# --- Bad input ---


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FrozenLake(3, 5), "3 x 3 cells with 5 holes"),
        (lambda: FrozenLake(1, 0), "1 x 1"),
        (lambda: FrozenLake(4, 3, (1, 5)), "is solved in 1 to 5 moves: the shortest way has 6; change the moves"),
        (lambda: Sokoban(3), "3 x 3"),
        (lambda: Sokoban(4, 2).draw(np.random.default_rng(0)), "none of 10000 rooms"),
        (lambda: IceSlide(2, 3), "2 x 2"),
        (lambda: FrozenLake(9, 64).draw(np.random.default_rng(0)), "none of 10000 lakes of 9 x 9 cells with 64 holes"),
        (lambda: GridWalk(9, 60, (14, 16)).draw(np.random.default_rng(0)), "none of 10000 grids of 9 x 9 cells"),
        (lambda: GridWalk(2, 3), "no grid of 2 x 2 cells with 3 holes"),
        (lambda: GridWalk(2, 9), "no grid of 2 x 2 cells with 9 holes"),
        *((functools.partial(game, 21), "21 x 21 cells is too large to show") for game in GAMES.values()),
        (lambda: draw_boards(FrozenLake(3, 2), "dev", 8, 0), "different boards for dev, not 8"),
    ],
)
def test_settings_without_boards_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_boards_that_are_too_many_are_drawn_and_not_listed(monkeypatch, capsys):
    assert all(GAMES[name](size=12, holes=5).every_board() is None for name in ("frozenlake", "grid_walk"))
    monkeypatch.setattr(command, "MOST_SEARCHED", 100)
    assert command.main(["grid_walk", "--boards=2", "--turns=1"]) == 0
    out = capsys.readouterr().out
    assert out.count(" 2 boards: ") == 3 and "all" not in out


def test_the_command_prints_facts_by_split_and_one_line_for_bad_settings(capsys):
    assert command.main(["frozenlake"]) == 0
    out = capsys.readouterr().out
    assert "all   19 boards: solved in 4 100.0 %" in out and "random moves win 1.6 %" in out
    assert command.main(["frozenlake", "--turns=3"]) == 0
    assert capsys.readouterr().out.count(" boards: solved not within the turns 100.0 %") == 4
    assert command.main(["frozenlake", "--size=1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_draws_as_many_boards_as_it_is_told_with_its_seed(capsys):
    """Of a game whose boards are too many to list."""
    game, printed = GAMES["sokoban"](), []
    for seed in (0, 1):
        assert command.main(["sokoban", "--boards=6", "--turns=3", f"--seed={seed}"]) == 0
        printed.append(capsys.readouterr().out)
        facts = [measure(game, draw_boards(game, split, 6, seed), 3) for split in SPLITS]
        assert printed[-1] == "".join(f"{s:5} {command._describe(own)}\n" for s, own in zip(SPLITS, facts))
    assert printed[0] != printed[1]


# --- The library's rules ---


def in_step(theirs, ours, game, board, read, seed):
    """Play the same random responses in both; return how the episode ended."""
    rng, episode = random.Random(seed), Episode(board)
    for _ in range(30):
        response = rng.choice([*(f"[{name}]" for name in DIRECTIONS), "I wait."])
        done, _ = theirs.step(response)
        episode = act(game, episode, read_action(response), 1000)
        assert (episode.won is not None) == done
        assert ours(episode.board) == read(theirs)
        if done:
            return episode.won, theirs.state.rewards[0]
    return None, None


def test_frozen_lake_has_textarenas_rules_on_a_thousand_boards():
    library = pytest.importorskip("textarena.envs.FrozenLake.env", reason="pip install textarena==0.7.4")
    ends, boards = [], set()
    for seed in range(1000):
        random.seed(seed)
        theirs = library.FrozenLakeEnv(size=3, num_holes=2)
        theirs.reset(1, seed)
        grid = theirs.state.game_state["grid"]
        holes = frozenset((r, c) for r in range(3) for c in range(3) if grid[r][c] == "H")
        boards.add(Lake(holes, (0, 0)))
        ends.append(in_step(
            theirs, lambda board: board.player, FrozenLake(), Lake(holes, (0, 0)),
            lambda env: tuple(env.state.game_state["player_pos"]), seed,
        ))  # fmt: skip
    assert all((won is True) == (reward == 1.0) for won, reward in ends if won is not None)
    assert boards == set(FrozenLake().every_board()) and {won for won, _ in ends} >= {True, False}


@pytest.mark.slow
def test_sokoban_has_textarenas_rules_on_a_thousand_boards():
    library = pytest.importorskip("textarena.envs.Sokoban.env", reason="pip install textarena==0.7.4")
    ends = []
    for seed in range(1000):
        theirs = library.SokobanEnv(dim_room=(6, 6), max_turns=1000, num_boxes=1)
        theirs.reset(1, seed)

        def cells(grid, *kinds):
            return frozenset(tuple(cell) for cell in np.argwhere(np.isin(grid, kinds)).tolist())

        board = Room(
            cells(theirs.room_fixed, 0), cells(theirs.room_fixed, 2), cells(theirs.room_state, 3, 4),
            tuple(theirs.player_position.tolist()),
        )  # fmt: skip
        ends.append(in_step(
            theirs, lambda board: (board.player, board.boxes), Sokoban(), board,
            lambda env: (tuple(env.player_position.tolist()), cells(env.room_state, 3, 4)), seed,
        ))  # fmt: skip
    assert all((won is True) == (reward == 1.0) for won, reward in ends if won is not None)
    assert {won for won, _ in ends} >= {True, False}
