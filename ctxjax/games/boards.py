"""The boards of a game: disjoint splits, and what players without any skill and with perfect skill reach on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
import functools
import hashlib
from typing import NamedTuple

import numpy as np

from ctxjax.games.game import MOST_LISTED, MOVES, Episode, Game, act, solve

SPLITS = ("train", "dev", "test")
# A board's split is a function of the board alone, so that no seed can put one board into two splits: its digest as a
# number in [0, 1) is below these limits. Where the player is does not count: a walk on a training board comes to no
# board of another split before it moves anything.
LIMITS = (0.6, 0.8, 1.0)
# Sequences of moves, of all boards together, among which the best fixed path is searched; of more, it is unknown.
MOST_PATHS = 2**24
DRAWS_PER_BOARD = 200  # draws for each board that is asked for, before a game is said to have too few


def split_of(game: Game, board: Hashable) -> str:
    """Return the split of a board."""
    shown = game.render(board._replace(player=None))
    digest = hashlib.sha256(f"{type(game).__name__}\n{shown}".encode()).digest()
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
    Both are None if there are more than MOST_PATHS sequences.
    """

    boards: int
    moves: dict[int | None, int]
    ceiling: float
    random: float
    fixed: float | None
    fixed_path: tuple[str, ...] | None


def measure(game: Game, boards: list[Hashable], max_turns: int) -> Facts:
    """Search exhaustively, over all sequences of ``max_turns`` moves. A score means little without these numbers."""
    solutions = [solve(game, board, max_turns) for board in boards]
    moves = Counter(None if path is None else len(path) for path in solutions)
    best = path = None
    if len(boards) * len(MOVES) ** max_turns <= MOST_PATHS:
        episodes = [Episode(board) for board in boards]
        tried = [_count_wins(game, episodes, one, max_turns) for one in {*filter(None, solutions)}]
        best, path = _find_best_path(game, episodes, max_turns, max(tried, default=0))
    return Facts(
        boards=len(boards),
        moves={count: moves[count] for count in sorted(moves, key=lambda count: (count is None, count))},
        ceiling=1 - moves[None] / len(boards),
        random=sum(_random_wins(game, board, max_turns) for board in boards) / len(boards),
        fixed=None if best is None else best / len(boards),
        fixed_path=path,
    )


def describe_players(ceiling: float, random: float, fixed: float | None, path: Sequence[str] | None = None) -> str:
    """Return in words what players without skill and perfect play reach; ``path``: the best fixed one, if known."""
    named = f" ({' '.join(path)})" if path else ""
    best = "" if fixed is None else f"the best fixed path{named} {100 * fixed:.1f} %, "
    return f"random moves win {100 * random:.1f} %, {best}perfect play {100 * ceiling:.1f} %"


def _random_wins(game: Game, board: Hashable, max_turns: int) -> float:
    @functools.cache
    def wins(episode: Episode) -> float:
        if episode.won is not None:
            return float(episode.won)
        after = (act(game, episode, direction, max_turns) for direction in MOVES)
        # What was said before does not matter for what follows; without it more episodes are the same.
        return sum(wins(e._replace(moves=(), invalid_total=0)) for e in after) / len(MOVES)

    return wins(Episode(board))


def _count_wins(game: Game, episodes: list[Episode], path: Sequence[str], max_turns: int) -> int:
    for direction in path:
        episodes = [one if one.won is not None else act(game, one, direction, max_turns) for one in episodes]
    return sum(episode.won is True for episode in episodes)


def _find_best_path(game: Game, episodes: list[Episode], turns: int, least: int) -> tuple[int, tuple[str, ...]]:
    """Return (boards won, moves) of the best sequence from here; of those as good, the first of the shortest.

    If no sequence wins ``least`` boards, the result is one that does not either.
    """
    won = sum(episode.won is True for episode in episodes)
    going = [episode for episode in episodes if episode.won is None]
    if not going or won + len(going) < least:
        return won, ()
    most, path = -1, ()
    for direction in MOVES:
        after = [act(game, episode, direction, episode.responses + turns) for episode in going]
        found, rest = _find_best_path(game, after, turns - 1, max(least - won, most))
        if found > most or found == most and len(rest) + 1 < len(path):
            most, path = found, (direction, *rest)
    return won + most, path
