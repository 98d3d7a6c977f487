"""Print what a game's boards are worth: ``python -m ctxjax.games frozenlake [--size=3] [--boards=100] [--turns=5]``."""

from __future__ import annotations

import argparse
import itertools
import sys

from ctxjax.games import GAMES
from ctxjax.games.boards import SPLITS, Facts, describe_players, draw_boards, measure, split_of
from ctxjax.host import command, preemption

MOST_SEARCHED = 10_000  # boards; of more, a sample is searched


def main(arguments: list[str] | None = None) -> int:
    """Print facts by split; ``arguments`` are the command line's by default.

    Returns 0, or 2 after one line on stderr if the game has no such boards.
    """
    parser = argparse.ArgumentParser(
        prog="ctxjax games",
        description="What a game's boards are worth.",
        epilog="example: ctxjax games frozenlake --size=3",
    )
    parser.add_argument("game", choices=sorted(GAMES))
    parser.add_argument("--size", type=int, help="rows and columns; default: the game's own")
    parser.add_argument("--boards", type=int, default=100, help="boards of each split, if they are too many to list")
    parser.add_argument("--turns", type=int, default=5, choices=range(1, 9), help="most responses in an episode")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    def run() -> None:
        game = GAMES[options.game](**({} if options.size is None else {"size": options.size}))
        listed = game.every_board()
        boards = None if listed is None else list(itertools.islice(listed, MOST_SEARCHED + 1))
        boards = None if boards is None or len(boards) > MOST_SEARCHED else boards
        for split in SPLITS:
            if boards is None:
                chosen = draw_boards(game, split, options.boards, options.seed)
            else:
                chosen = [board for board in boards if split_of(game, board) == split]
            print(f"{split:5} {_describe(measure(game, chosen, options.turns)) if chosen else 'no board'}")
        if boards is not None:
            print(f"all   {_describe(measure(game, boards, options.turns))}")

    return command.end_readably(run)


def _describe(facts: Facts) -> str:
    def name(moves: int | None) -> str:
        return "not within the turns" if moves is None else f"in {moves}"

    solved = ", ".join(f"{name(moves)} {100 * count / facts.boards:.1f} %" for moves, count in facts.moves.items())
    players = describe_players(facts.ceiling, facts.random, facts.fixed, facts.fixed_path)
    return f"{facts.boards} boards: solved {solved}; {players}"


if __name__ == "__main__":
    preemption.listen()
    sys.exit(main())
