"""A game of ctxjax/games for any instruct model. Its rules and the meaning of its symbols are hidden: the model has to
learn them from experience, which is the context.

A row is an episode; each of its turns is a prompt with the moves so far and the board. The move is the last one in
brackets in the response. A board's id says where everything is; it belongs to one split (games.boards.split_of).

Other contexts are those of other tasks on text. Under one that has a check, each response of the episode must obey it;
under one that has none, the game must be won.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
import dataclasses

import numpy as np

from ctxjax.data.boards import grade_end, measure_boards, name_board
from ctxjax.data.contexts import ContextConfig, Contexts
from ctxjax.data.grading.grade import Grade
from ctxjax.data.grading.reasoning import strip_reasoning
from ctxjax.data.grading.response_checks import Check, grade_check
from ctxjax.data.records import Reader, RecordsConfig
from ctxjax.data.splits import SPLITS
from ctxjax.data.task import Row
from ctxjax.data.tasks.file_task import FileTask
from ctxjax.games import GAMES
from ctxjax.games.boards import draw_boards, split_of
from ctxjax.games.game import FORGIVEN, LARGEST, MOVES, Episode, look, read_action, replay, solve
from ctxjax.types import bounded

ASKED = (
    "You are playing a game whose rules you are not told. In each turn you see a board and make one move: up, down, "
    "left or right. Think about what the symbols may mean, and then write your move in square brackets: [up], [down], "
    "[left] or [right]."
)
INVALID = "Your last response had no move that is possible here."
TRACED = (
    "You played a game whose rules you were not told. In each turn you saw a board and made one move: up, down, left "
    "or right."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextGameConfig(ContextConfig):
    """See configs/base.py, ``config.text_game``, and, for ``records``, ``config.records``.

    ``pieces``: what the game has of holes, boxes or rocks. ``turns``: most responses of an episode. ``seed`` determines
    which boards are taken, and their order. ``*_questions``: boards; 0: all, if they are few enough to be listed.
    """

    game: str
    size: int = bounded(at_most=LARGEST)
    pieces: int = bounded(zero=True, at_most=LARGEST**2)
    turns: int = bounded(at_most=16)
    seed: int = bounded(zero=True)
    train_questions: int = bounded(zero=True)
    dev_questions: int = bounded(zero=True)
    test_questions: int = bounded(zero=True)
    records: RecordsConfig = RecordsConfig()


class TextGame(FileTask):
    """The task of one game. All boards can be won within the turns. A row's reference is a shortest solution."""

    def __init__(self, config: TextGameConfig):
        if config.game not in GAMES:
            raise ValueError(f"text_game.game = {config.game!r} is not known; choose from {', '.join(sorted(GAMES))}")
        self.max_turns = config.turns
        try:
            self.game = GAMES[config.game](config.size, config.pieces, (1, config.turns))
        except ValueError as error:
            fields = ", ".join(f"{name} = {getattr(config, name)}" for name in ("size", "pieces", "turns"))
            raise ValueError(f"text_game.{fields}: {error}") from None
        self._boards: dict[str, Hashable] = {}  # by id
        super().__init__(config, "text_game", Contexts(config, "text_game"))
        self.facts["boards"] = measure_boards(self.game, self._list_chosen, self.max_turns)

    def read_splits(self, reader: Reader) -> tuple[dict[str, list[Row]], Counter[str]]:
        listed = self.game.every_board()
        every = None if listed is None else list(listed)
        return {split: [self._make_row(board) for board in self._choose(split, every)] for split in SPLITS}, Counter()

    def _choose(self, split: str, every: list[Hashable] | None) -> list[Hashable]:
        """Return the boards of a split; ``every``: those of all splits, or None if they are too many to list."""
        config, count = self.config, getattr(self.config, f"{split}_questions")
        asked = f"text_game.{split}_questions = {count}"
        boards = f"{config.game} with {config.size} x {config.size} cells and {config.pieces} pieces"
        if every is None:
            if not count:
                raise ValueError(f"{asked} asks for all boards, and {boards} has too many to list; give a number")
            try:
                return draw_boards(self.game, split, count, config.seed)
            except ValueError as error:
                raise ValueError(f"{asked}: {error}") from None
        own = [board for board in every if split_of(self.game, board) == split]
        if not own or count > len(own):
            raise ValueError(
                f"{asked}, but {boards} has {len(own)} boards for {split}; ask for fewer (0: all), or change "
                "text_game.size or text_game.pieces"
            )
        order = np.random.default_rng([config.seed, SPLITS.index(split)]).permutation(len(own))
        return [own[index] for index in order[: count or None]]

    def _make_row(self, board: Hashable) -> Row:
        name = name_board(self.game, board)
        self._boards[name] = board
        solution = " ".join(solve(self.game, board, self.max_turns))
        return Row(name, self._show(Episode(board)), self.contexts.choose(name), solution)

    def _list_chosen(self, split: str) -> list[Hashable]:
        return [self._boards[row.id] for row in self.rows(split)]

    # --- Episodes ---

    def play(self, row: Row, responses: Sequence[str]) -> Row | Grade:
        *_, episode = self._replay(row, responses)
        if episode.won is None:
            return row._replace(question=self._show(episode))
        return grade_end(episode) if row.check is None else _grade_all(row.check, responses)

    def longest_turn(self, row: Row) -> Row:
        """All moves have the longest name. A symbol that has moved may need more tokens than the one in its place; two
        more moves for each row of the board are as many or more."""
        moves = (max(MOVES, key=len),) * (self.max_turns - 1 + 2 * self.game.size)
        return row._replace(question=self._show(Episode(self._boards[row.id], moves, invalid=1)))

    def trace(self, row: Row, responses: Sequence[str]) -> str:
        episodes, parts = self._replay(row, responses), [TRACED]
        for number, (response, before, after) in enumerate(zip(responses, episodes, episodes[1:]), 1):
            said = strip_reasoning(response)[0].strip() or "(nothing)"
            read = INVALID if after.invalid else f"You moved {after.moves[-1]}."
            parts.append(f"Turn {number}\nBoard:\n{self.game.render(before.board)}\nYour response:\n{said}\n{read}")
        end = episodes[-1]
        return "\n\n".join([*parts, f"The end\nBoard:\n{self.game.render(end.board)}\n{self._describe_end(end)}"])

    def _describe_end(self, end: Episode) -> str:
        turns = f"after {end.responses} turn{'s' * (end.responses > 1)}"
        if end.won:
            return f"You won {turns}."
        if self.game.is_lost(end.board):
            return f"You lost {turns}."
        reason = "since you made no possible move twice in a row, " if end.invalid > FORGIVEN else ""
        return f"The game was over {turns}, {reason}and you had not won."

    def _replay(self, row: Row, responses: Sequence[str]) -> list[Episode]:
        """Return the episode before each response and after the last one."""
        actions = (read_action(strip_reasoning(response)[0]) for response in responses)
        return replay(self.game, self._boards[row.id], actions, self.max_turns)

    def _show(self, episode: Episode) -> str:
        """Return what the player reads. The moves come first, since they differ from the second turn on: prompts that
        share their beginning share it in all turns."""
        turn = look(self.game, episode)
        parts = [ASKED, f"Moves so far: {', '.join(turn.moves) or 'none'}", f"Board:\n{turn.board}"]
        return "\n\n".join([*parts, INVALID] if turn.was_invalid else parts)


def _grade_all(check: Check, responses: Sequence[str]) -> Grade:
    """Grade an episode whose responses must all obey the check; the first one that does not decides."""
    grades = [grade_check(check, response) for response in responses]
    return next((grade for grade in grades if not grade.correct), grades[-1])
