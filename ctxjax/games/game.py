"""The interface of a game, and the rules that all games share: turns, invalid moves, how an action is read.

Nothing here has a random number of its own or a clock: an episode is a function of its board and of what was said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
import re
from typing import NamedTuple, Protocol

import numpy as np

Cell = tuple[int, int]  # (row, column)
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # (rows, columns)
LARGEST = 20  # rows and columns: a larger board is too long to show
MOST_LISTED = 200_000  # boards that are listed one by one; of more, a sample is drawn
DRAWS = 10_000  # boards that are tried before the settings are called impossible
FORGIVEN = 1  # invalid responses in a row that do not end the episode; as TextArena counts them
_BRACKETS = re.compile(r"\[\s*(\w+)\s*\]")


class Game(Protocol):
    """A single-player game on a grid. A board is a named tuple of immutable fields, one of which is ``player``, where
    the player is. A game is made from its size, the number of its pieces, and (fewest, most) moves of a solution.

    ``size``: rows and columns.
    """

    size: int

    def draw(self, rng: np.random.Generator) -> Hashable:
        """Draw a board that can be won. Raises ValueError if the settings allow none."""

    def every_board(self) -> Iterator[Hashable] | None:
        """Yield every first board that ``draw`` may return, or return None if they are too many to list."""

    def move(self, board: Hashable, direction: str) -> Hashable | None:
        """Return the board after a move, a key of MOVES; None if the move is not possible."""

    def is_won(self, board: Hashable) -> bool: ...

    def is_lost(self, board: Hashable) -> bool: ...

    def render(self, board: Hashable) -> str:
        """Return the board as a player sees it, one line for each row, without the meaning of its symbols."""


class Turn(NamedTuple):
    """What a player sees: the board as text, the valid moves made so far, and whether the last response was invalid."""

    board: str
    moves: tuple[str, ...]
    was_invalid: bool


class Episode(NamedTuple):
    """One board being played. ``responses`` counts all turns, ``invalid`` the invalid responses in a row.

    ``won``: None while the episode goes on.
    """

    board: Hashable
    moves: tuple[str, ...] = ()
    responses: int = 0
    invalid: int = 0
    invalid_total: int = 0
    won: bool | None = None


def check_size(size: int) -> None:
    """Raise ValueError for a board with more than LARGEST rows and columns."""
    if size > LARGEST:
        raise ValueError(f"a board of {size} x {size} cells is too large to show; give a size of at most {LARGEST}")


def step(cell: Cell, direction: str) -> Cell:
    """Return the neighbour of a cell in a direction, a key of MOVES; it may be outside of the grid."""
    return cell[0] + MOVES[direction][0], cell[1] + MOVES[direction][1]


def is_inside(cell: Cell, size: int) -> bool:
    """Whether a cell is one of a grid of ``size`` rows and columns."""
    return 0 <= cell[0] < size and 0 <= cell[1] < size


def render_grid(size: int, symbols: Mapping[Cell, str]) -> str:
    """Write a grid of ``size`` rows and columns: the symbol of each cell, "_" for those without."""
    return "\n".join(" ".join(symbols.get((row, column), "_") for column in range(size)) for row in range(size))


def read_action(response: str) -> str | None:
    """Return the last bracketed direction of a response, "[right]" for example; None if there is none."""
    found = [word.lower() for word in _BRACKETS.findall(response)]
    return next((word for word in reversed(found) if word in MOVES), None)


def look(game: Game, episode: Episode) -> Turn:
    """Return what the player sees before the next response."""
    return Turn(game.render(episode.board), episode.moves, episode.invalid > 0)


def act(game: Game, episode: Episode, action: str | None, max_turns: int) -> Episode:
    """Return the episode after a response whose action is ``action`` (``read_action``).

    A response without an action, or with a move that is not possible, is invalid: the board stays. The episode is lost
    after more than FORGIVEN invalid responses in a row, or after ``max_turns`` responses without a win.
    """
    assert episode.won is None, "the episode has ended"
    after = None if action is None else game.move(episode.board, action)
    responses = episode.responses + 1
    if after is None:
        invalid = episode.invalid + 1
        won = False if invalid > FORGIVEN or responses >= max_turns else None
        return episode._replace(responses=responses, invalid=invalid, invalid_total=episode.invalid_total + 1, won=won)
    won = True if game.is_won(after) else False if game.is_lost(after) or responses >= max_turns else None
    return Episode(after, (*episode.moves, action), responses, 0, episode.invalid_total, won)


def replay(game: Game, board: Hashable, actions: Iterable[str | None], max_turns: int) -> list[Episode]:
    """Return the episode before each response, whose actions are given, and after the last one."""
    episodes = [Episode(board)]
    for action in actions:
        episodes.append(act(game, episodes[-1], action, max_turns))
    return episodes


def solve(game: Game, board: Hashable, most: int) -> tuple[str, ...] | None:
    """Return a shortest winning sequence of at most ``most`` moves; None if there is none."""
    queue, seen = deque([(board, ())]), {board}
    while queue:
        here, path = queue.popleft()
        if game.is_won(here):
            return path
        if len(path) == most or game.is_lost(here):
            continue
        for direction in MOVES:
            there = game.move(here, direction)
            if there is not None and there not in seen:
                seen.add(there)
                queue.append((there, (*path, direction)))
    return None


def draw_solved(
    game: Game, solution: tuple[int, int], draw_any: Callable[[], Hashable | None], boards: str, remedy: str
) -> Hashable:
    """Return the first board of ``draw_any`` (None: none this time) that ``is_solved_in`` the moves of ``solution``.

    Raises ValueError if DRAWS of them are not; ``boards`` and ``remedy`` are parts of its message.
    """
    for _ in range(DRAWS):
        board = draw_any()
        if board is not None and is_solved_in(game, board, solution):
            return board
    raise ValueError(f"none of {DRAWS} {boards} is solved in {solution[0]} to {solution[1]} moves; {remedy}")


def is_solved_in(game: Game, board: Hashable, solution: tuple[int, int]) -> bool:
    """Whether the shortest solution of a board has the first to the second of these numbers of moves."""
    moves = solve(game, board, solution[1])
    return moves is not None and len(moves) >= solution[0]
