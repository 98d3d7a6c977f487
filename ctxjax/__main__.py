"""All commands under one name: ``ctxjax train --config=tiny --workdir=DIR``, or ``python -m ctxjax train ...``."""

from __future__ import annotations

import runpy
import sys

# Name -> the module that ``python -m`` runs, and what it does. Modules are imported only when they are run.
COMMANDS = {
    "train": ("ctxjax.main", "train and evaluate: the run itself"),
    "extract": ("ctxjax.extract", "let the model write lessons from its own traces, and choose the best"),
    "rounds": ("ctxjax.rounds", "extract and train, again and again"),
    "evaluate": ("ctxjax.evaluate", "evaluate any model folder with a run's questions, views and graders"),
    "study": ("ctxjax.study", "run a grid of runs, on any number of machines, and report over its seeds"),
    "dose": ("ctxjax.study.dose", "evaluate a trained arm with its change scaled"),
    "angles": ("ctxjax.study.angles", "measure the angles between the gradients of an arm's terms"),
    "export": ("ctxjax.export", "write a trained arm as a Hugging Face folder"),
    "plan": ("ctxjax.plan", "say whether a run fits on a TPU slice, and what a step costs"),
    "report": ("ctxjax.report", "rebuild the page of a finished run"),
    "audit": ("ctxjax.audit", "check a run against what it wrote down"),
    "chat": ("ctxjax.chat", "talk to a model or a run's arms, without the context and with it"),
    "games": ("ctxjax.games", "say what a game's boards are worth"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; ``arguments`` are the command line's by default. Return the exit code if the command does not."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h", "help"):
        print("usage: ctxjax COMMAND [flags]\n")
        print("\n".join(f"  {name:10}{line}" for name, (_, line) in COMMANDS.items()))
        print("\nctxjax COMMAND --help shows a command's flags and an example.")
        return 0
    if name not in COMMANDS:
        print(f"error: {name!r} is not a command; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv[1:] = rest
    try:
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # while the command is imported; later it handles Ctrl-C itself
        print("\nCtrl-C", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
