"""Ice slide: every move slides until a rock or the border stops it; stop on the goal to win.

An own game in one file, to show what a game costs. It is hard for a player who believes that a move is one cell.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ctxjax.games.game import check_size, draw_solved, is_inside, render_grid, step


class Rink(NamedTuple):
    rocks: frozenset[tuple[int, int]]
    goal: tuple[int, int]
    player: tuple[int, int]


class IceSlide:
    """``size``: rows and columns. ``rocks``: how many. ``solution``: (fewest, most) moves of a solution."""

    def __init__(self, size: int = 5, rocks: int = 4, solution: tuple[int, int] = (2, 5)):
        check_size(size)
        if size < 2 or not 0 <= rocks <= size * size - 2:
            raise ValueError(f"an ice rink of {size} x {size} cells has no room for {rocks} rocks, a player and a goal")
        self.size, self.rocks, self.solution = size, rocks, solution

    def draw(self, rng: np.random.Generator) -> Rink:
        def draw_any() -> Rink:
            chosen = rng.choice(self.size**2, self.rocks + 2, replace=False).tolist()
            goal, player, *rocks = (divmod(cell, self.size) for cell in chosen)
            return Rink(frozenset(rocks), goal, player)

        boards = f"rinks of {self.size} x {self.size} cells with {self.rocks} rocks"
        return draw_solved(self, self.solution, draw_any, boards, "change the size, the rocks or the moves")

    def every_board(self) -> None:
        return None

    def move(self, board: Rink, direction: str) -> Rink | None:
        at = board.player
        while is_inside(step(at, direction), self.size) and step(at, direction) not in board.rocks:
            at = step(at, direction)
        return board._replace(player=at) if at != board.player else None

    def is_won(self, board: Rink) -> bool:
        return board.player == board.goal

    def is_lost(self, board: Rink) -> bool:
        return False

    def render(self, board: Rink) -> str:
        symbols = dict.fromkeys(board.rocks, "R") | {board.goal: "G"} | {board.player: "P"}
        return render_grid(self.size, symbols)
