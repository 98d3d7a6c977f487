"""The boards of a game: disjoint splits, and what players without any skill and with perfect skill reach on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
import functools
import hashlib
from typing import NamedTuple

import numpy as np

from ctxjax.games.game import MOST_LISTED, MOVES, Episode, Game, act, solve

SPLITS = ("train", "dev", "test")
# A board's split is a function of the board alone, so that no seed can put one board into two splits: its digest as a
# number in [0, 1) is below these limits.
LIMITS = (0.6, 0.8, 1.0)
DRAWS_PER_BOARD = 200  # draws for each board that is asked for, before a game is said to have too few


def split_of(game: Game, board: Hashable) -> str:
    """Return the split of a board."""
    digest = hashlib.sha256(f"{type(game).__name__}\n{game.render(board)}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, limit in zip(SPLITS, LIMITS) if place < limit)


def draw_boards(game: Game, split: str, count: int, seed: int) -> list[Hashable]:
    """Return ``count`` different boards of a split; with another seed, other boards or the same in another order.

    Raises ValueError if the game has too few.
    """
    rng, found, draws = np.random.default_rng([seed, SPLITS.index(split)]), {}, DRAWS_PER_BOARD * count
    for _ in range(draws):
        if len(found) == count:
            break
        board = game.draw(rng)
        if split_of(game, board) == split:
            found[board] = None
    if len(found) < count:
        raise ValueError(
            f"{draws} draws of {type(game).__name__} gave {len(found)} different boards for {split}, not {count}; ask "
            "for fewer, or make the board larger"
        )
    return list(found)


def list_boards(game: Game) -> list[Hashable]:
    """Return all boards of a game. Raises ValueError if they are too many to list."""
    listed = game.every_board()
    if listed is None:
        raise ValueError(
            f"{type(game).__name__} with {game.size} x {game.size} cells has more than {MOST_LISTED:,} boards, too "
            "many to list; give a smaller size or fewer pieces"
        )
    return list(listed)


class Facts(NamedTuple):
    """What boards are worth. ``moves``: fewest moves of a solution -> number of boards; None: not within the turns.

    ``ceiling``: share that can be won. ``random``: probability that uniformly random moves win, exact. ``fixed``: the
    share that the best single sequence of moves wins, the same one on every board; ``fixed_path`` is that sequence.
    """

    boards: int
    moves: dict[int | None, int]
    ceiling: float
    random: float
    fixed: float
    fixed_path: tuple[str, ...]


def measure(game: Game, boards: list[Hashable], max_turns: int) -> Facts:
    """Search exhaustively, over all sequences of ``max_turns`` moves. A score means little without these numbers."""
    solutions = [solve(game, board, max_turns) for board in boards]
    moves = Counter(None if path is None else len(path) for path in solutions)
    best, path = _best_fixed_path(game, [Episode(board) for board in boards], max_turns)
    return Facts(
        boards=len(boards),
        moves={count: moves[count] for count in sorted(moves, key=lambda count: (count is None, count))},
        ceiling=1 - moves[None] / len(boards),
        random=sum(_random_wins(game, board, max_turns) for board in boards) / len(boards),
        fixed=best / len(boards),
        fixed_path=path,
    )


def _random_wins(game: Game, board: Hashable, max_turns: int) -> float:
    @functools.cache
    def wins(episode: Episode) -> float:
        if episode.won is not None:
            return float(episode.won)
        after = (act(game, episode, direction, max_turns) for direction in MOVES)
        # What was said before does not matter for what follows; without it more episodes are the same.
        return sum(wins(e._replace(moves=(), invalid_total=0)) for e in after) / len(MOVES)

    return wins(Episode(board))


def _best_fixed_path(game: Game, episodes: list[Episode], turns: int) -> tuple[int, tuple[str, ...]]:
    """Return (boards won, moves) of the best sequence from here."""
    won = sum(episode.won is True for episode in episodes)
    going = [episode for episode in episodes if episode.won is None]
    if not going:
        return won, ()
    found = []
    for direction in MOVES:
        after = [act(game, episode, direction, episode.responses + turns) for episode in going]
        best, path = _best_fixed_path(game, after, turns - 1)
        found.append((won + best, (direction, *path)))
    return max(found, key=lambda pair: (pair[0], -len(pair[1])))
