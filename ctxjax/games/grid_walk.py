"""Grid walk: Frozen Lake with its player and its goal anywhere: who does not know the symbols cannot read a board."""

from __future__ import annotations

from collections.abc import Iterator
import itertools
import math
from typing import NamedTuple

import numpy as np

from ctxjax.games.game import MOST_LISTED, check_size, draw_solved, is_inside, is_solved_in, render_grid, step


class Field(NamedTuple):
    """All cells are (row, column)."""

    holes: frozenset[tuple[int, int]]
    goal: tuple[int, int]
    player: tuple[int, int]


class GridWalk:
    """``size``: rows and columns. ``holes``: how many. ``solution``: (fewest, most) moves of a solution."""

    def __init__(self, size: int = 3, holes: int = 2, solution: tuple[int, int] = (2, 4)):
        check_size(size)
        self.size, self.holes, self.solution = size, holes, solution
        self._cells = list(itertools.product(range(size), repeat=2))
        listed = self.every_board()  # None: too many to look at each, and ``draw`` refuses
        if listed is not None and next(listed, None) is None:
            raise ValueError(
                f"no grid of {size} x {size} cells with {holes} holes is solved in {solution[0]} to {solution[1]} "
                "moves; change the size, the holes or the moves"
            )

    def draw(self, rng: np.random.Generator) -> Field:
        def draw_any() -> Field:
            chosen = rng.choice(len(self._cells), self.holes + 2, replace=False)
            goal, player, *holes = (self._cells[index] for index in chosen)
            return Field(frozenset(holes), goal, player)

        boards = f"grids of {self.size} x {self.size} cells with {self.holes} holes"
        return draw_solved(self, self.solution, draw_any, boards, "change the size, the holes or the moves")

    def every_board(self) -> Iterator[Field] | None:
        cells = len(self._cells)
        too_many = math.comb(cells, self.holes) * math.perm(max(cells - self.holes, 0), 2) > MOST_LISTED
        return None if too_many else self._list_boards()

    def _list_boards(self) -> Iterator[Field]:
        for holes in itertools.combinations(self._cells, self.holes):
            for goal, player in itertools.permutations([cell for cell in self._cells if cell not in holes], 2):
                board = Field(frozenset(holes), goal, player)
                if is_solved_in(self, board, self.solution):
                    yield board

    def move(self, board: Field, direction: str) -> Field | None:
        there = step(board.player, direction)
        return board._replace(player=there) if is_inside(there, self.size) else None

    def is_won(self, board: Field) -> bool:
        return board.player == board.goal

    def is_lost(self, board: Field) -> bool:
        return board.player in board.holes

    def render(self, board: Field) -> str:
        symbols = dict.fromkeys(board.holes, "H") | {board.goal: "G"} | {board.player: "P"}
        return render_grid(self.size, symbols)
