"""Talk to a model in a terminal, without the context and with it: ``python -m ctxjax.chat --model=FOLDER``.

    python -m ctxjax.chat --model=/models/my-llama --context=prompt.txt
    python -m ctxjax.chat --workdir=runs/tiny            # the run's own context; /arm switches between its arms

Both views answer every question, and each sees its own earlier replies. Questions may also come from a pipe, one a
line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys

from ml_collections import ConfigDict

from ctxjax.chat import speaker as speaker_lib
from ctxjax.chat.conversation import Conversation, Decoding
from ctxjax.chat.screen import make_screen
from ctxjax.chat.speaker import Speaker
from ctxjax.data.prompts import PLACEMENTS
from ctxjax.data.records import read_context
from ctxjax.data.responses import make_printable
from ctxjax.host import command, preemption, redact

PROMPT = "> "
NAMES = "without the context", "with the context"
HELP = """\
/arm NAME       let another arm of the run answer, in a new conversation; without NAME: list the arms
/context FILE   change the context, in a new conversation; several words are the context itself; alone: show it
/reset          begin a new conversation
/help           show these commands
/quit           end; so does Ctrl-D. Ctrl-C stops a reply"""


class Chat:
    """What a line of input does. Bad input is a ValueError or an OSError, and changes nothing."""

    def __init__(self, speaker: Speaker, context: str | None, decoding: Decoding):
        self._speaker, self._conversation = speaker, Conversation(speaker, context, decoding)
        self._commands = {"/arm": self._arm, "/context": self._context, "/reset": self._reset, "/help": self._help}

    def handle(self, line: str) -> None:
        """Answer a question, or obey a command."""
        name, _, argument = line.strip().partition(" ")
        if not name.startswith("/"):
            self._answer(line.strip())
        elif name in self._commands:
            self._commands[name](argument.strip())
        else:
            raise ValueError(f"there is no command {name}; commands: {', '.join(self._commands)}, /quit")

    def describe(self) -> str:
        """Say who answers, and under which context."""
        run, arm, context = self._speaker.run, self._speaker.arm, self._conversation.context
        step = f", step {run.steps[arm]}" if run and arm in run.steps else ""
        shown = "no context; /context adds a view with one" if context is None else f"context: {_shorten(context)}"
        return f"[{f'{arm}{step}; ' if run else ''}{shown}]"

    def _answer(self, question: str) -> None:
        asked, replies = self._conversation.ask(question), []
        screen = make_screen(sys.stdout, shutil.get_terminal_size().columns if sys.stdout.isatty() else 0)
        screen.begin(list(NAMES[: len(self._conversation.views)]))
        try:
            for replies in asked:
                screen.show(replies)
        except KeyboardInterrupt:
            screen.end()
            print("[stopped]")
        else:
            screen.end()
        if replies:
            self._conversation.add(question, replies)

    def _arm(self, name: str) -> None:
        before = self._speaker.arm
        if not name:
            print(f"arms: {', '.join(self._speaker.arms)}; now: {before}")
            return
        try:
            self._speaker.switch(name)
        finally:
            if self._speaker.arm != before:  # also if its weights could not be read, and the base answers
                self._reset()

    def _context(self, text: str) -> None:
        if not text:
            print(make_printable(self._conversation.context or "no context"))
            return
        is_file = len(text.split()) == 1 or os.path.isfile(os.path.expanduser(text))
        self._conversation.start(read_context(text) if is_file else text)
        print(self.describe())

    def _reset(self, _: str = "") -> None:
        self._conversation.start(self._conversation.context)
        print(self.describe())

    def _help(self, _: str) -> None:
        print(HELP)


def talk(chat: Chat) -> None:
    """Read lines and handle them until the input ends or a line is /quit."""
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if not sys.stdin.isatty():
            print(line)  # as if it were typed
        if line.strip() == "/quit":
            return
        if not line.strip():
            continue
        try:
            chat.handle(line)
        except (ValueError, OSError) as error:
            print(f"error: {redact.hide_secrets(str(error))}")
        except KeyboardInterrupt:
            print("[stopped]")


def open_chat(options: argparse.Namespace) -> Chat:
    """Open what the flags name. Raises ValueError or OSError with the remedy."""
    context = None if options.context is None else read_context(options.context)
    print(f"opening {options.model or options.workdir} ...\n", flush=True)
    example = ""
    if options.model is not None:
        speaker = speaker_lib.open_model(options.model, options.placement)
    else:
        speaker = speaker_lib.open_run(command.parse_folder("--workdir", options.workdir), options.placement)
        if context is None:
            context, example = speaker_lib.read_task(speaker.run)
    chat = Chat(speaker, context, Decoding(options.max_tokens, options.temperature, options.seed))
    print(f"{HELP}\n")
    if speaker.run:
        print(f"arms: {', '.join(speaker.arms)}")
    if example:
        print(f"a question of this run: {_shorten(example)}")
    print(f"{chat.describe()}\n")
    return chat


def _shorten(text: str) -> str:
    line = make_printable(" ".join(text.split()))
    return repr(line if len(line) <= 60 else f"{line[:57]}...")


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line. Bad flags end the process with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="ctxjax chat", description=__doc__.partition(":")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: ctxjax chat --workdir=runs/tiny\n\ncommands:\n{HELP}",
    )  # fmt: skip
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder or Hub id")
    who.add_argument("--workdir", metavar="RUN", help="a run's folder; its arms answer")
    parser.add_argument("--context", metavar="FILE", help="text file; default: the run's context, or none")
    parser.add_argument("--placement", choices=PLACEMENTS, help="of the context; default: the run's, or system")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--max_tokens", type=int, default=256, help="most tokens of a reply; default: 256")
    parser.add_argument("--seed", type=int, default=0, help="of the randomness if --temperature is above 0")
    parser.add_argument("--compile_cache", default="~/.cache/ctxjax/xla", help="folder of compiled programs; '': none")
    options = parser.parse_args(arguments)
    if options.max_tokens < 1:
        parser.error(f"--max_tokens={options.max_tokens} must be at least 1")
    if not 0 <= options.temperature <= 100:
        parser.error(f"--temperature={options.temperature} must be from 0 to 100")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Talk until the input ends. Return 0, or 2 after one line on stderr if the model or the run cannot be opened."""
    preemption.listen()
    options = parse_flags(arguments)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, lets input() edit a line and recall earlier ones

    def run() -> None:
        # One device if this is a CPU: two rows are too few to share out.
        command.prepare(ConfigDict({"cpu_devices": 1, "compile_cache": options.compile_cache}))
        chat = open_chat(options)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from now on Ctrl-C stops a reply
        talk(chat)

    return command.end_readably(run, "use the host's memory: JAX_PLATFORMS=cpu python -m ctxjax.chat ...")


if __name__ == "__main__":
    sys.exit(main())
