"""A game small enough to learn on two cores: walk over a grid whose symbols and move words only a legend explains.

The context is the legend, a prompt shows the grid and the moves so far, and a response reasons (the cells of the
player, of the goal and of the holes, and the direction) before it says the move::

    system      player=c;hole=d;up=mi;ground=a;left=nu;goal=b;right=lo;down=ka;
    user        aacabadda|lo
    assistant   @2@4@6@7down ka

An episode is won at the goal and lost in a hole, after too many invalid responses or too many turns (ctxjax/games).
Without a legend the default is the first one, DEFAULT. The legends to internalize differ from it in every symbol and
every word.

Of the 576 legends, TARGETS are reserved to be internalized. Two disjoint pools are reserved to measure obedience on dev
and test. The base and the retention rows see only the rest. A grid's split depends on its
holes and its goal, not on the player, so no state of a dev or test episode is one that the base has seen.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
import dataclasses
import functools
import itertools
import re
from typing import NamedTuple

import numpy as np

from ctxjax.data.grading.grade import Grade
from ctxjax.data.records import hash_text
from ctxjax.data.task import PretrainingRow, Row
from ctxjax.data.worlds import word_tokenizer
from ctxjax.games.boards import SPLITS, split_of
from ctxjax.games.game import FORGIVEN, MOVES, Episode, act, look, solve
from ctxjax.games.grid_walk import Field, GridWalk
from ctxjax.types import bounded

ROLES = {"player": "P", "goal": "G", "hole": "H", "ground": "_"}  # name in a legend -> symbol of GridWalk.render
SYMBOLS = "abcd"
WORDS = ("ka", "lo", "mi", "nu")
TARGETS = 8
HELD_OUT_LEGENDS = {"dev": 60, "test": 60}
# Shares of the base's rows: under a legend; without one, answered by DEFAULT. The others are answered by a random
# legend that is not shown, so that the base is unsure without one.
LEGEND_SHARE, DEFAULT_SHARE = 0.7, 0.15
WALKED = 3  # most random moves before a row of the base, so that it knows boards and histories that no good move led to
INVALID_SHARE = 0.1  # of the base's rows whose last response was invalid

_ANY_WORD = "|".join(WORDS)
TOKEN_PATTERN = "|".join([
    rf"(?:{'|'.join(ROLES)})=[{SYMBOLS}];", rf"(?:{'|'.join(MOVES)})=(?:{_ANY_WORD});", rf"(?:{'|'.join(MOVES)}) ",
    _ANY_WORD, r"@\d+", rf"[{SYMBOLS}|!]",
])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TinyGridConfig:
    """See configs/base.py, ``config.tiny_grid``.

    ``seed`` determines legends and the order of boards. ``context_index`` chooses the legend to internalize.
    ``size``, ``holes``: of the grid. ``turns``: most responses of an episode. ``empty_share``: of the base's rows
    without a legend, the share with an empty context block.
    """

    seed: int = bounded(zero=True)
    context_index: int = bounded(zero=True)
    size: int = bounded(at_most=9)
    holes: int = bounded(zero=True)
    turns: int = bounded(at_most=16)
    train_questions: int = bounded(zero=True)
    dev_questions: int = bounded(zero=True)
    test_questions: int = bounded(zero=True)
    empty_share: float = bounded(zero=True, at_most=1.0)


class Legend(NamedTuple):
    """``symbols``: of ROLES, in their order. ``words``: of MOVES, in their order."""

    symbols: str
    words: tuple[str, ...]

    def pairs(self) -> list[str]:
        return [f"{name}={sign};" for name, sign in [*zip(ROLES, self.symbols), *zip(MOVES, self.words)]]

    def read(self, response: str) -> str | None:
        """Return the direction of the last move word of a response; None if there is none."""
        found = re.findall(_ANY_WORD, response)
        return list(MOVES)[self.words.index(found[-1])] if found else None

    def write(self, moves: Sequence[str]) -> str:
        return "".join(self.words[list(MOVES).index(move)] for move in moves)


DEFAULT = Legend(SYMBOLS, WORDS)


def parse_legend(context: str) -> Legend:
    """Parse a context, whose pairs may be in any order: the inverse of ``Legend.pairs``, joined."""
    signs = dict(pair.split("=") for pair in context.split(";")[:-1])
    return Legend("".join(signs[role] for role in ROLES), tuple(signs[move] for move in MOVES))


def _differs_everywhere(legend: Legend) -> bool:
    pairs = [*zip(legend.symbols, DEFAULT.symbols), *zip(legend.words, DEFAULT.words)]
    return all(sign != usual for sign, usual in pairs)


class TinyGrid:
    """The task of one world with one legend to internalize. A row is an episode: ``question`` is what its first turn
    shows, and ``reference`` the legend that the environment follows, also where the player does not see it."""

    skipped: dict[str, int] = {}  # it reads no files

    def __init__(self, config: TinyGridConfig):
        self.config, self.max_turns = config, config.turns
        self.game = GridWalk(config.size, config.holes)
        rng = np.random.default_rng([config.seed, 19])
        every = itertools.product(itertools.permutations(SYMBOLS), itertools.permutations(WORDS))
        legends = [Legend("".join(symbols), words) for symbols, words in every]
        legends = [legends[i] for i in rng.permutation(len(legends)) if legends[i] != DEFAULT]
        self.targets = [legend for legend in legends if _differs_everywhere(legend)][:TARGETS]
        rest = [legend for legend in legends if legend not in self.targets]
        self.legends, start = {}, 0
        for split, size in HELD_OUT_LEGENDS.items():
            self.legends[split] = rest[start : start + size]
            start += size
        self.legends["train"] = rest[start:]
        self.boards = self._split_boards(rng)
        if not 0 <= config.context_index < TARGETS:
            raise ValueError(
                f"tiny_grid.context_index = {config.context_index}; this world has legends 0 to {TARGETS - 1}"
            )
        self._target = self.targets[config.context_index]
        self.context = self._write_context(self._target, rng)
        self.facts = {"contexts": {f"legend {config.context_index}": hash_text(self.context)}}

    def _split_boards(self, rng: np.random.Generator) -> dict[str, list[Field]]:
        boards: dict[str, list[Field]] = {split: [] for split in SPLITS}
        every = list(self.game.every_board())
        for index in rng.permutation(len(every)):
            boards[split_of(self.game, every[index]._replace(player=None))].append(every[index])
        return boards

    @staticmethod
    def _write_context(legend: Legend, rng: np.random.Generator) -> str:
        pairs = legend.pairs()
        return "".join(pairs[i] for i in rng.permutation(len(pairs)))

    # --- The task ---

    def rows(self, split: str) -> list[Row]:
        count = getattr(self.config, f"{split}_questions") or len(self.boards[split])
        if count > len(self.boards[split]):
            raise ValueError(
                f"tiny_grid.{split}_questions = {count}, but the world's {split} split has {len(self.boards[split])}; "
                "ask for fewer (0: all), or make the grid larger"
            )
        return [self._make_row(board, self._target, self.context) for board in self.boards[split][:count]]

    def _make_row(self, board: Field, legend: Legend, context: str) -> Row:
        return Row(self._name(board), self._show(Episode(board), legend), context, "".join(legend.pairs()))

    def play(self, row: Row, responses: Sequence[str]) -> Row | Grade:
        legend = parse_legend(row.reference)
        episode = Episode(self._read_board(row.question, legend))
        for response in responses:
            episode = act(self.game, episode, legend.read(response), self.max_turns)
        if episode.won is None:
            return row._replace(question=self._show(episode, legend))
        is_invalid = episode.invalid > FORGIVEN
        reason = f"{episode.invalid} invalid moves in a row" if is_invalid else None
        return Grade(None if is_invalid else " ".join(episode.moves), episode.won, reason)

    def longest_turn(self, row: Row) -> Row:
        return row._replace(question=row.question + WORDS[0] * max(self.max_turns - 1, 1))

    def grade(self, response: str, reference: str) -> Grade:
        raise NotImplementedError("an episode is graded by play()")

    def other_contexts(self, split: str) -> list[str]:
        rng = np.random.default_rng([self.config.seed, 23])
        return [self._write_context(legend, rng) for legend in self.legends[split]]

    def rows_under(self, row: Row, context: str) -> list[Row]:
        """The same board under another legend, which also changes how it is shown."""
        board = self._read_board(row.question, parse_legend(row.reference))
        return [self._make_row(board, parse_legend(context), context)]

    def paraphrase(self, row: Row, rng: np.random.Generator) -> str:
        return self._write_context(parse_legend(row.context), rng)

    def unrelated(self) -> None:
        return None

    def _show(self, episode: Episode, legend: Legend) -> str:
        turn = look(self.game, episode)
        signs = dict(zip(ROLES.values(), legend.symbols))
        cells = "".join(signs[symbol] for symbol in turn.board.split())
        return f"{cells}|{legend.write(turn.moves)}{'!' * turn.was_invalid}"

    def _read_board(self, question: str, legend: Legend) -> Field:
        """Return the board that a first turn shows."""
        cells = question.partition("|")[0]
        places = {sign: [divmod(i, self.game.size) for i, cell in enumerate(cells) if cell == sign] for sign in SYMBOLS}
        player, goal, holes, _ = (places[sign] for sign in legend.symbols)
        return Field(frozenset(holes), goal[0], player[0])

    def _name(self, board: Field) -> str:
        return self.game.render(board).replace(" ", "").replace("\n", "/")

    # --- The base's training text ---

    def tokenizer(self):
        return word_tokenizer.build(self._vocabulary(), TOKEN_PATTERN)

    def _vocabulary(self) -> list[str]:
        pairs = [f"{role}={symbol};" for role in ROLES for symbol in SYMBOLS]
        pairs += [f"{move}={word};" for move in MOVES for word in WORDS]
        cells = [f"@{index}" for index in range(self.config.size**2)]
        return [*SYMBOLS, "|", "!", *WORDS, *(f"{move} " for move in MOVES), *cells, *pairs]

    def pretraining_facts(self) -> dict:
        names = ("seed", "size", "holes", "turns", "empty_share")
        return {"world": {name: getattr(self.config, name) for name in names}, "vocabulary": self._vocabulary()}

    def longest_pretraining_row(self) -> PretrainingRow:
        row = self.longest_turn(self._make_row(self.boards["train"][0], self._target, self.context))
        return PretrainingRow(row.question, self.context, self._answer(self.boards["train"][0], self._target))

    def pretraining_row(self, rng: np.random.Generator) -> PretrainingRow:
        """Draw a board of train, walk at random, and answer with the first move of a shortest way."""
        boards, legends, most = self.boards["train"], self.legends["train"], min(WALKED, self.max_turns - 1)
        episode = self._walk(Episode(boards[rng.integers(len(boards))]), int(rng.integers(most + 1)), rng)
        if rng.random() < INVALID_SHARE:
            episode = episode._replace(invalid=1)
        legend, kind = legends[rng.integers(len(legends))], rng.random()
        if kind < LEGEND_SHARE:
            context = self._write_context(legend, rng)
        else:
            context = "" if rng.random() < self.config.empty_share else None
            if kind < LEGEND_SHARE + DEFAULT_SHARE:
                legend = DEFAULT
        return PretrainingRow(self._show(episode, legend), context, self._answer(episode.board, legend))

    def _walk(self, episode: Episode, moves: int, rng: np.random.Generator) -> Episode:
        """Make random moves that neither end the episode nor are impossible; fewer if there are none."""
        for _ in range(moves):
            after = [act(self.game, episode, direction, self.max_turns + moves) for direction in MOVES]
            going = [further for further in after if further.won is None and not further.invalid]
            if not going:
                break
            episode = going[rng.integers(len(going))]
        return episode

    def _answer(self, board: Field, legend: Legend) -> str:
        cells = (board.player, board.goal, *sorted(board.holes))
        said = "".join(f"@{row * self.game.size + column}" for row, column in cells)
        move = self._best_move(board)
        return f"{said}{move} {legend.write([move])}"

    @functools.cached_property
    def _best_move(self):
        @functools.cache
        def best(board: Hashable) -> str:
            return solve(self.game, board, self.game.size**2)[0]

        return best
