"""What tasks over games share: a board's id, an episode's grade, and what players without skill win on the boards."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ctxjax.data.grading.grade import Grade
from ctxjax.games.boards import measure
from ctxjax.games.game import FORGIVEN, Episode, Game

MOST_MEASURED = 512  # boards of a split


def name_board(game: Game, board: Hashable) -> str:
    """Return a board's id: its symbols in one line, with "/" between the rows."""
    return game.render(board).replace(" ", "").replace("\n", "/")


def grade_end(episode: Episode) -> Grade:
    """Grade an episode that has ended. One that ended with too many invalid responses in a row is not readable."""
    if episode.invalid > FORGIVEN:
        return Grade(None, False, f"{episode.invalid} invalid moves in a row")
    return Grade(" ".join(episode.moves), episode.won)


def measure_boards(game: Game, choose: Callable[[str], list[Hashable]], max_turns: int) -> dict[str, dict]:
    """Return what the boards of dev and test are worth (``games.boards.Facts``), by split, as plain values.

    ``choose``: split -> its boards, in random order, of which at most the first MOST_MEASURED count; a split without
    boards is left out. A task has the result in ``facts["boards"]``; evaluations report it next to their scores.
    """
    found = {}
    for split in ("dev", "test"):
        if own := choose(split):
            facts = measure(game, own[:MOST_MEASURED], max_turns)
            moves = {"none" if count is None else str(count): number for count, number in facts.moves.items()}
            path = None if facts.fixed_path is None else " ".join(facts.fixed_path)
            found[split] = facts._asdict() | {"moves": moves, "fixed_path": path}
    return found
