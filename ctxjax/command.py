"""What the commands with a ``--config`` share: reading the command line, and ending in one readable line."""

from __future__ import annotations

from collections.abc import Callable
import sys

from absl import app, flags


def parse(config) -> Callable[[list[str]], list[str]]:
    """A flags parser that reads ``config``, the flag holder of a configuration file; its errors are ValueErrors."""

    def parser(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            # A config file that could not be loaded says so only when something is asked of it.
            getattr(config.value, "seed", None)
        except AttributeError as error:
            inner = error.args[0]
            name = inner.args[0] if isinstance(inner, KeyError) else inner
            raise ValueError(f"the configuration has no field {name}; configs/base.py lists them all") from None
        except OSError as error:
            raise ValueError(f"the config file cannot be loaded: {error.__cause__ or error}") from None
        except (flags.Error, TypeError, ValueError) as error:
            raise ValueError(f"bad command line: {error}") from None
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}; options are written --config.field=value")
        return rest

    return parser


def run(main: Callable, config) -> None:
    """Runs a command; bad input ends with one readable message and exit code 2, without a traceback."""
    try:
        app.run(main, flags_parser=parse(config))
    except (ValueError, FileNotFoundError, FileExistsError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
