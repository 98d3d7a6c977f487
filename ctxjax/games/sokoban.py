"""Sokoban: push every box onto a target.

The rules of TextArena's ``Sokoban-v0``: a box is pushed by walking into it; two boxes, or a box and a wall, block.
Boards are our own: a room carved by a random walk, then boxes, targets and the player at random places, kept if the
fewest moves that solve it lie in ``solution``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ctxjax.games.game import MOVES, check_size, draw_solved, render_grid, step


class Room(NamedTuple):
    """``walls``, ``targets``, ``boxes`` and ``player`` are (row, column); the first three sets."""

    walls: frozenset[tuple[int, int]]
    targets: frozenset[tuple[int, int]]
    boxes: frozenset[tuple[int, int]]
    player: tuple[int, int]


class Sokoban:
    """``size``: rows and columns, the border of walls included. ``solution``: (fewest, most) moves of a solution."""

    def __init__(self, size: int = 6, boxes: int = 1, solution: tuple[int, int] = (1, 5)):
        check_size(size)
        if size < 4 or boxes < 1:
            raise ValueError(
                f"Sokoban of {size} x {size} cells with {boxes} boxes has no board; give at least 4 x 4 cells, whose "
                "border is walls, and at least one box"
            )
        self.size, self.boxes, self.solution = size, boxes, solution

    def draw(self, rng: np.random.Generator) -> Room:
        boards = f"rooms of {self.size} x {self.size} cells with {self.boxes} boxes"
        remedy = "allow more moves, or give a larger room or fewer boxes"
        return draw_solved(self, self.solution, lambda: self._draw_any(rng), boards, remedy)

    def every_board(self) -> None:
        return None

    def move(self, board: Room, direction: str) -> Room | None:
        there = step(board.player, direction)
        if there in board.walls:
            return None
        if there not in board.boxes:
            return board._replace(player=there)
        behind = step(there, direction)
        if behind in board.walls or behind in board.boxes:
            return None
        return board._replace(player=there, boxes=board.boxes - {there} | {behind})

    def is_won(self, board: Room) -> bool:
        return board.boxes == board.targets

    def is_lost(self, board: Room) -> bool:
        return False  # a player may not notice that a box is stuck

    def render(self, board: Room) -> str:
        symbols = dict.fromkeys(board.walls, "#") | dict.fromkeys(board.targets, "O") | dict.fromkeys(board.boxes, "X")
        symbols |= dict.fromkeys(board.boxes & board.targets, "√") | {board.player: "P"}
        return render_grid(self.size, symbols)

    def _draw_any(self, rng: np.random.Generator) -> Room | None:
        """Draw a board, which may have no solution; None if the room is too small for boxes, targets and player."""
        inside = range(1, self.size - 1)
        at = tuple(rng.integers(1, self.size - 1, 2).tolist())
        floor = {at}
        for number in rng.integers(0, 4, 3 * self.size).tolist():
            there = step(at, list(MOVES)[number])
            if there[0] in inside and there[1] in inside:
                at = there
                floor.add(at)
        needed = 2 * self.boxes + 1
        if len(floor) < needed:
            return None
        cells = sorted(floor)
        chosen = [cells[index] for index in rng.choice(len(cells), needed, replace=False)]
        walls = {(row, column) for row in range(self.size) for column in range(self.size)} - floor
        boxes, targets = chosen[: self.boxes], chosen[self.boxes : -1]
        return Room(frozenset(walls), frozenset(targets), frozenset(boxes), chosen[-1])
