"""Frozen Lake: walk from the upper left corner to the lower right one and do not step into a hole.

The rules of TextArena's ``FrozenLake-v0-raw``: a move into the border is not possible; holes are a fixed number, at
places drawn uniformly among those that leave a path.
"""

from __future__ import annotations

from collections.abc import Iterator
import itertools
import math
from typing import NamedTuple

import numpy as np

from ctxjax.games.game import MOST_LISTED, check_size, draw_solved, is_inside, is_solved_in, render_grid, step


class Lake(NamedTuple):
    """``holes`` and ``player`` are (row, column)."""

    holes: frozenset[tuple[int, int]]
    player: tuple[int, int]


class FrozenLake:
    """``size``: rows and columns. ``holes``: how many. ``solution``: (fewest, most) moves of a solution; None: any."""

    def __init__(self, size: int = 3, holes: int = 2, solution: tuple[int, int] | None = None):
        check_size(size)
        self.size, self.holes, self.solution = size, holes, solution or (1, size**2)
        cells = itertools.product(range(size), repeat=2)
        self._free = [cell for cell in cells if cell not in ((0, 0), self.goal)]
        if size < 2 or not 0 <= holes <= len(self._free) - (2 * size - 3):
            raise ValueError(
                f"a lake of {size} x {size} cells with {holes} holes has no path to the goal; give a size of 2 or more "
                f"and 0 to {max(len(self._free) - (2 * size - 3), 0)} holes"
            )
        fewest, most = self.solution
        if not fewest <= 2 * size - 2 <= most:
            raise ValueError(
                f"no lake of {size} x {size} cells is solved in {fewest} to {most} moves: the shortest way has "
                f"{2 * size - 2}; change the moves, or the size"
            )

    @property
    def goal(self) -> tuple[int, int]:
        return (self.size - 1, self.size - 1)

    def draw(self, rng: np.random.Generator) -> Lake:
        def draw_any() -> Lake:
            chosen = rng.choice(len(self._free), self.holes, replace=False)
            return Lake(frozenset(self._free[index] for index in chosen), (0, 0))

        boards = f"lakes of {self.size} x {self.size} cells with {self.holes} holes"
        return draw_solved(self, self.solution, draw_any, boards, "give fewer holes")

    def every_board(self) -> Iterator[Lake] | None:
        if math.comb(len(self._free), self.holes) > MOST_LISTED:
            return None
        boards = (Lake(frozenset(holes), (0, 0)) for holes in itertools.combinations(self._free, self.holes))
        return (board for board in boards if is_solved_in(self, board, self.solution))

    def move(self, board: Lake, direction: str) -> Lake | None:
        there = step(board.player, direction)
        return board._replace(player=there) if is_inside(there, self.size) else None

    def is_won(self, board: Lake) -> bool:
        return board.player == self.goal

    def is_lost(self, board: Lake) -> bool:
        return board.player in board.holes

    def render(self, board: Lake) -> str:
        symbols = dict.fromkeys(board.holes, "H") | {self.goal: "G"} | {board.player: "P"}
        return render_grid(self.size, symbols)
