"""A game small enough to learn on two cores: walk over a grid whose symbols and move words only a legend explains.

The context is the legend, a prompt shows the grid and the moves so far, and a response reasons (the cells of the
player, of the goal and of the holes, and the direction) before it says the move::

    system      - EXPERIENCE ITEM: player=c;
                - EXPERIENCE ITEM: up=mi;
                ...                              (eight lines: player, goal, hole, ground, up, down, left, right)
    user        aacabadda|lo
    assistant   @2@4@6@7down ka

The base also learns to write such lines from the trace of an episode (ctxjax/experience): the last boards, each with
the move word that was said, the board after them, and "+" for a win or "-" for a loss. It writes all symbols, reasons
(of each move the cells of the player before and after it, the direction and the word), and writes these words::

    user        aacabadda|kaaaaabcdda|nuaaaacadda+
    assistant   - EXPERIENCE ITEM: player=c;
                ...
                @2@5down ka@5@4left nu
                - EXPERIENCE ITEM: down=ka; ...

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

from ctxjax.data.boards import grade_end, measure_boards, name_board
from ctxjax.data.grading.grade import Grade
from ctxjax.data.records import hash_text, read_context
from ctxjax.data.task import LESSON, PretrainingRow, Row
from ctxjax.data.worlds import word_tokenizer
from ctxjax.games.boards import SPLITS, list_boards, split_of
from ctxjax.games.game import MOVES, Cell, Episode, act, look, replay, solve
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
# Of the rows under a legend, the share in which one or two lines of it are missing: lessons may say less.
PARTIAL_SHARE = 0.2
LESSON_SHARE = 0.25  # of the base's rows: traces with the lessons that they hold
TRACED = 2  # turns that a trace shows, the last ones of its episode: longer prompts would make the base dearer
SKILL = 0.5  # of the moves of a trace, the share that are the best ones; the others are random words
WALKED = 3  # most random moves before a row of the base, so that it knows boards and histories that no good move led to
INVALID_SHARE = 0.1  # of the base's rows whose last response was invalid

_ANY_WORD = "|".join(WORDS)
_LINE = rf"{LESSON} (?:(?:{'|'.join(ROLES)})=[{SYMBOLS}]|(?:{'|'.join(MOVES)})=(?:{_ANY_WORD}));"
TOKEN_PATTERN = "|".join([
    rf"{_LINE}\n", rf"(?:{'|'.join(MOVES)}) ", _ANY_WORD, r"@\d+", rf"[{SYMBOLS}|!+\-\n]",
])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TinyGridConfig:
    """See configs/base.py, ``config.tiny_grid``.

    ``seed`` determines legends and the order of boards. ``context_index`` chooses the legend to internalize;
    ``context_file`` has lessons in its place, if it is not "".
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
    context_file: str = ""


class Legend(NamedTuple):
    """``symbols``: of ROLES, in their order. ``words``: of MOVES, in their order."""

    symbols: str
    words: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return what a context says, a line for each role and each move."""
        return [f"{LESSON} {name}={sign};" for name, sign in [*zip(ROLES, self.symbols), *zip(MOVES, self.words)]]

    def read(self, response: str) -> str | None:
        """Return the direction of the last move word of a response; None if there is none."""
        found = re.findall(_ANY_WORD, response)
        return list(MOVES)[self.words.index(found[-1])] if found else None

    def write(self, moves: Sequence[str]) -> str:
        return "".join(self.words[list(MOVES).index(move)] for move in moves)


DEFAULT = Legend(SYMBOLS, WORDS)


def parse_legend(context: str) -> Legend:
    """Parse a context with all lines of ``Legend.lines``, in any order."""
    signs = dict(re.findall(r"(\w+)=(\w+);", context))
    return Legend("".join(signs[role] for role in ROLES), tuple(signs[move] for move in MOVES))


def _read_lessons(path: str) -> str:
    """Read a context from a file. Raises ValueError if it has a line that the world's models cannot read."""
    text = read_context(path)
    for number, line in enumerate(text.splitlines(), 1):
        if not re.fullmatch(_LINE, line):
            raise ValueError(
                f"tiny_grid.context_file = {path}, line {number} is {line!r}; the models of this world read only lines "
                f"such as {DEFAULT.lines()[0]!r}"
            )
    return text


def _shuffle_lines(lines: list[str], rng: np.random.Generator) -> str:
    return "\n".join(lines[i] for i in rng.permutation(len(lines)))


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
        self.context, name = self._write_context(self._target, rng), f"legend {config.context_index}"
        if config.context_file:
            self.context, name = _read_lessons(config.context_file), config.context_file
        boards = measure_boards(self.game, self._choose_boards, self.max_turns)
        self.facts = {"contexts": {name: hash_text(self.context)}, "boards": boards}

    def _split_boards(self, rng: np.random.Generator) -> dict[str, list[Field]]:
        boards: dict[str, list[Field]] = {split: [] for split in SPLITS}
        every = list_boards(self.game)
        for index in rng.permutation(len(every)):
            boards[split_of(self.game, every[index])].append(every[index])
        return boards

    @staticmethod
    def _write_context(legend: Legend, rng: np.random.Generator) -> str:
        return _shuffle_lines(legend.lines(), rng)

    # --- The task ---

    def rows(self, split: str) -> list[Row]:
        return [self._make_row(board, self._target, self.context) for board in self._choose_boards(split)]

    def _choose_boards(self, split: str) -> list[Field]:
        count = getattr(self.config, f"{split}_questions") or len(self.boards[split])
        if count > len(self.boards[split]):
            raise ValueError(
                f"tiny_grid.{split}_questions = {count}, but the world's {split} split has {len(self.boards[split])}; "
                "ask for fewer (0: all), or make the grid larger"
            )
        return self.boards[split][:count]

    def _make_row(self, board: Field, legend: Legend, context: str) -> Row:
        return Row(name_board(self.game, board), self._show(Episode(board), legend), context, "\n".join(legend.lines()))

    def play(self, row: Row, responses: Sequence[str]) -> Row | Grade:
        *_, episode = self._replay(row, responses)
        if episode.won is None:
            return row._replace(question=self._show(episode, parse_legend(row.reference)))
        return grade_end(episode)

    def _replay(self, row: Row, responses: Sequence[str]) -> list[Episode]:
        """Return the episode before each response and after the last one."""
        legend = parse_legend(row.reference)
        board, actions = self._read_board(row.question, legend), map(legend.read, responses)
        return replay(self.game, board, actions, self.max_turns)

    def trace(self, row: Row, responses: Sequence[str]) -> str:
        legend = parse_legend(row.reference)
        *before, end = self._replay(row, responses)
        said = [(re.findall(_ANY_WORD, response) or [""])[-1] for response in responses]
        turns = [f"{self._show_cells(episode, legend)}|{word}" for episode, word in zip(before, said)]
        return "".join(turns[-TRACED:]) + self._show_cells(end, legend) + ("+" if end.won else "-")

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
        return _shuffle_lines(sorted(row.context.split("\n")), rng)

    def unrelated(self) -> None:
        return None

    def _show(self, episode: Episode, legend: Legend) -> str:
        turn = look(self.game, episode)
        return f"{self._show_cells(episode, legend)}|{legend.write(turn.moves)}{'!' * turn.was_invalid}"

    def _show_cells(self, episode: Episode, legend: Legend) -> str:
        signs = dict(zip(ROLES.values(), legend.symbols))
        return "".join(signs[symbol] for symbol in self.game.render(episode.board).split())

    def _read_board(self, question: str, legend: Legend) -> Field:
        """Return the board that a first turn shows."""
        cells = question.partition("|")[0]
        places = {sign: [divmod(i, self.game.size) for i, cell in enumerate(cells) if cell == sign] for sign in SYMBOLS}
        player, goal, holes, _ = (places[sign] for sign in legend.symbols)
        return Field(frozenset(holes), goal[0], player[0])

    # --- The base's training text ---

    def tokenizer(self):
        return word_tokenizer.build(self._vocabulary(), TOKEN_PATTERN, line_end=";")

    def _vocabulary(self) -> list[str]:
        lines = [f"{LESSON} {role}={symbol};\n" for role in ROLES for symbol in SYMBOLS]
        lines += [f"{LESSON} {move}={word};\n" for move in MOVES for word in WORDS]
        cells = [f"@{index}" for index in range(self.config.size**2)]
        return [*SYMBOLS, *"|!+-\n", *WORDS, *(f"{move} " for move in MOVES), *cells, *lines]

    def pretraining_facts(self) -> dict:
        names = ("seed", "size", "holes", "turns", "empty_share")
        shares = {"partial": PARTIAL_SHARE, "lessons": LESSON_SHARE, "traced": TRACED, "skill": SKILL}
        facts = {"world": {name: getattr(self.config, name) for name in names} | shares}
        return facts | {"vocabulary": self._vocabulary()}

    def longest_pretraining_row(self) -> PretrainingRow:
        cells, lines = SYMBOLS[0] * self.game.size**2, "\n".join(DEFAULT.lines())
        trace = f"{cells}|{WORDS[0]}" * min(TRACED, self.max_turns) + f"{cells}+"
        turn = f"||{cells}|{WORDS[0] * self.max_turns}{lines}\n"  # a context has two tokens around it
        longest = max(trace, turn, key=lambda text: len(re.findall(TOKEN_PATTERN, text)))
        lessons = "\n".join(DEFAULT.lines()[: len(ROLES) + TRACED])
        return PretrainingRow(longest, None, f"{lessons}\n" + f"@0@1right {WORDS[0]}" * TRACED + "\n")

    def pretraining_row(self, rng: np.random.Generator) -> PretrainingRow:
        """Draw a trace with its lessons, or a board with the first move of a shortest way."""
        return self._draw_lessons(rng) if rng.random() < LESSON_SHARE else self._draw_move(rng)

    def _draw_lessons(self, rng: np.random.Generator) -> PretrainingRow:
        """Play an episode on a board of train under a legend of train, with SKILL; return the lessons of its trace: the
        symbols, if a move shows which one is the player, and the words of the moves that it shows."""
        board = self.boards["train"][rng.integers(len(self.boards["train"]))]
        legend = self.legends["train"][rng.integers(len(self.legends["train"]))]
        row, said, episode, made = self._make_row(board, legend, ""), [], Episode(board), []
        while episode.won is None:
            is_best = rng.random() < SKILL
            said.append(legend.write([self._best_move(episode.board)]) if is_best else WORDS[rng.integers(len(WORDS))])
            before, episode = episode, act(self.game, episode, legend.read(said[-1]), self.max_turns)
            made.append(None if episode.invalid else (before.board.player, episode.board.player, episode.moves[-1]))
        seen = [move for move in made[-TRACED:] if move]
        lines, shown = dict(zip([*ROLES, *MOVES], legend.lines())), [name for _, _, name in seen]
        reasoning = [f"{self._name_cells(*cells)}{name} {legend.write([name])}" for *cells, name in seen]
        written = [*(lines[role] for role in ROLES), "".join(reasoning), *(lines[m] for m in MOVES if m in shown)]
        return PretrainingRow(self.trace(row, said), None, "\n".join(written if seen else []))

    def _name_cells(self, *cells: Cell) -> str:
        return "".join(f"@{row * self.game.size + column}" for row, column in cells)

    def _draw_move(self, rng: np.random.Generator) -> PretrainingRow:
        """Draw a board of train, walk at random, and answer with the first move of a shortest way."""
        boards, legends, most = self.boards["train"], self.legends["train"], min(WALKED, self.max_turns - 1)
        episode = self._walk(Episode(boards[rng.integers(len(boards))]), int(rng.integers(most + 1)), rng)
        if rng.random() < INVALID_SHARE:
            episode = episode._replace(invalid=1)
        legend, kind = legends[rng.integers(len(legends))], rng.random()
        if kind < LEGEND_SHARE:
            lines = self._write_context(legend, rng).split("\n")
            missing = int(rng.integers(1, 3)) if rng.random() < PARTIAL_SHARE else 0
            context = "\n".join(lines[missing:])
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
        said = self._name_cells(board.player, board.goal, *sorted(board.holes))
        move = self._best_move(board)
        return f"{said}{move} {legend.write([move])}"

    @functools.cached_property
    def _best_move(self):
        @functools.cache
        def best(board: Hashable) -> str:
            return solve(self.game, board, self.game.size**2)[0]

        return best
