"""What the commands share: read the command line, prepare jax, end with one readable message."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import errno
import json
import os
from pathlib import Path
import sys

from absl import app, flags, logging
import jax
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from ctxjax.host import memory, processes, redact, workdir

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
CONFIGS = Path(__file__).parents[1] / "configs"


def find_config(name: str) -> str:
    """Return the path of a configuration file with the argument after its colon: ``name`` itself, or, if there is no
    such file, that of the package: "configs/tiny.py", "tiny.py" and "tiny" are the same there.

    Raises ValueError with both places if there is neither.
    """
    path, colon, argument = name.partition(":")
    packaged = CONFIGS / f"{Path(path).name.removesuffix('.py')}.py"
    if Path(path).is_file():
        return name
    known = {file for file in CONFIGS.glob("*.py") if "def get_config(" in file.read_text(encoding="utf-8")}
    if Path(path).parent in (Path(), Path("configs")) and packaged in known:
        return f"{packaged}{colon}{argument}"
    names = ", ".join(sorted(file.stem for file in known))
    raise ValueError(f"{Path(path).absolute()} does not exist, and in {CONFIGS} there are only {names}")


class _ConfigParser(config_flags.ConfigFileFlagParser):
    """Read a configuration file that ``find_config`` finds: a Python file with ``get_config``, or JSON, as the
    config.json of a run."""

    def parse(self, path: str) -> ConfigDict:
        found = find_config(path)
        if not found.endswith(".json"):
            return super().parse(found)
        return ConfigDict(json.loads(Path(found).read_text(encoding="utf-8"), object_hook=_make_tuples))


def _make_tuples(section: dict) -> dict:
    """Return a section of a JSON file with tuples in place of lists, as configuration files have them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}


def load_config(name: str) -> ConfigDict:
    """Return the configuration of a file as ``--config=NAME`` reads it."""
    return _ConfigParser("config").parse(name)


def make_parser(config) -> Callable[[list[str]], list[str]]:
    """Return a flags parser that reads ``config``, the flag of a configuration file; its errors are ValueErrors."""

    def parser(argv: list[str]) -> list[str]:
        flags.FLAGS[config.name].parser = _ConfigParser(config.name)
        try:
            rest = flags.FLAGS(argv)
            # A config file that could not be loaded raises only when a field is read.
            getattr(config.value, "seed", None)
        except AttributeError as error:
            if "get_config" in str(error):
                raise ValueError("the config file has no function get_config(); see configs/tiny.py") from None
            inner = error.args[0]
            name = inner.args[0] if isinstance(inner, KeyError) else inner
            raise ValueError(f"the configuration has no field {name}; configs/base.py lists them all") from None
        except OSError as error:
            raise ValueError(f"the config file cannot be loaded: {error.__cause__ or error}") from None
        except SystemExit:  # absl has printed the help, and ends with 1
            sys.exit(0 if any("help" in argument for argument in argv) else 1)
        except (flags.Error, TypeError, ValueError) as error:
            raise ValueError(f"bad command line: {error}") from None
        except Exception as error:  # the config file is a program
            raise ValueError(f"the config file fails: {type(error).__name__}: {error}") from None
        if not isinstance(config.value, ConfigDict | None):
            raise ValueError(f"get_config() of the config file returns {config.value!r}, not a ConfigDict")
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}; options are written --config.field=value")
        return rest

    return parser


def run(main: Callable, config, suggest_less_memory: Callable[[], str] = lambda: "Take more devices") -> None:
    """Run a command and exit.

    Bad input, a disk that is full or read-only, and memory that does not suffice end with one message and exit code 2,
    without a traceback. The loss of another process of the run ends with processes.EXIT_CODE. ``suggest_less_memory``:
    returns what to try if memory does not suffice.
    """
    memory.tune_memory()
    try:
        app.run(main, flags_parser=make_parser(config))
    except (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if processes.is_lost_process(error):
            print(f"error: {processes.describe_lost_process(error)}", file=sys.stderr)
            processes.exit_process(processes.EXIT_CODE)
        if memory.is_exhausted(error):
            print(f"error: {memory.describe_exhaustion(error)}. {suggest_less_memory()}", file=sys.stderr)
            processes.exit_process(2)
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        no_room = isinstance(error, OSError) and error.errno in NO_ROOM
        remedy = ". Make room or mend the folder; the same command then goes on from the last checkpoint"
        print(f"error: {redact.hide_secrets(str(error))}{remedy if no_room else ''}", file=sys.stderr)
        processes.exit_process(2)


def end_readably(body: Callable[[], None], remedy: str = "take a machine with more") -> int:
    """Call ``body``, which reads its own flags. Return 0, or 2 after one line on stderr, which begins as in ``run``.

    The line is for bad input, and for memory that does not suffice, with ``remedy``. Other errors are raised.
    """
    try:
        body()
    except (OSError, ValueError) as error:
        print(f"error: {redact.hide_secrets(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not memory.is_exhausted(error):
            raise
        print(f"error: {memory.describe_exhaustion(error)}; {remedy}", file=sys.stderr)
        return 2
    return 0


def parse_folder(flag: str, name: str) -> Path:
    """Return the folder that a flag names.

    Raises ValueError for an address such as gs://bucket/run: as a folder name it would be created on this machine, and
    lost with it.
    """
    if "://" in name:
        raise ValueError(
            f"{flag}={name} is an address, and runs are written to folders; mount the bucket (gcsfuse; tpu/setup.sh "
            f"does so if BUCKET is set), and name the folder, for example {flag}=/mnt/bucket/{name.split('/')[-1]}"
        )
    return Path(name).expanduser()


def parse_new(flag: str, name: str) -> Path:
    """Return the file or folder that a flag names, to be written; the folder around it is made.

    Raises ValueError as ``parse_folder`` does, FileExistsError if it exists, and OSError if nothing can be written
    there: before any work, which would be lost.
    """
    path = parse_folder(flag, name)
    if path.exists():
        raise FileExistsError(f"{flag}={path} exists; choose another name, since nothing is overwritten")
    workdir.ensure_writable(path.parent, flag)
    return path


def prepare(config: ConfigDict) -> None:
    """Set up logging, CPU devices and the compile cache. Call it before the first use of jax's backends."""
    quieten()
    _split_cpu(config.get("cpu_devices", 0))
    keep_programs(config.compile_cache)


def keep_programs(folder: str) -> None:
    """Keep compiled programs in a folder, and take those that are there; "": do not."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        # By default programs that compile in less than a second are not cached, and a run has some fifty of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def quieten() -> None:
    """Show warnings only, since the libraries' other logs would bury the progress bar.

    Tracebacks that they log from their threads are dropped, since the errors end the run with one message.
    """
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(lambda record: not record.exc_info)
    sys.unraisablehook = _print_unraisable


def _print_unraisable(event) -> None:
    """Print an exception that cannot be raised, but not those of tensorstore's threads after a failed write."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _split_cpu(count: int) -> None:
    """Split the CPU into ``count`` devices; 0: the largest power of two of cores, at most 8.

    A small model is many small operations, which gain more from one core each than from threads within each. XLA_FLAGS
    have precedence, and so has JAX_NUM_CPU_DEVICES if ``count`` is 0. Other platforms are not affected. Devices that
    are in use already, as in a notebook, stay as they are.
    """
    if count < 0:
        raise ValueError(f"cpu_devices = {count} must be a number of devices, or 0 for one per core")
    is_set = jax.config.jax_num_cpu_devices >= 0 and not count
    if is_set or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count or 1 << (min(memory.count_cores(), 8).bit_length() - 1))
