"""The folder of a run: created for a new run, or checked to belong to the same run, before anything is computed. And
folders and files that appear under their names only when they are complete."""

from __future__ import annotations

from collections.abc import Collection, Iterator
import contextlib
import datetime
import errno
import fcntl
import importlib.metadata
import json
import os
from pathlib import Path
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid

import jax
from ml_collections import ConfigDict

from ctxjax.host import changes, preemption, processes, redact
from ctxjax.host.checksum import compute_digest

PACKAGES = ("ctxjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what flock says on file systems that have none
RESUME = ("auto", "never", "must")  # see check_workdir
# All that a run can have left that was killed before config.json was complete.
FIRST_FILES = re.compile(r"lock|config\.json\.partial.*")


def check_workdir(workdir: Path, config: dict, resume: str = "auto", movable: Collection[str] = ()) -> None:
    """Raise ValueError if the folder holds another run, with the fields that differ, or anything that is not a run.

    ``resume``: a run with the same configuration is resumed ("auto"), refused ("never") or required ("must"). What may
    differ all the same: changes.describe_changes. ``movable``: fields that name files or folders, if ``claim`` gets
    digests of their contents.
    """
    if resume not in RESUME:
        raise ValueError(f"resume = {resume!r} is not known; choose from {', '.join(RESUME)}")
    stored = workdir / "config.json"
    if not stored.exists():
        if workdir.exists() and not (workdir.is_dir() and all(map(_is_first_file, workdir.iterdir()))):
            raise ValueError(f"{workdir} exists and is not a run's folder; choose another --workdir")
        if resume == "must":
            raise ValueError(f"{workdir} holds no run to go on with; leave out --resume=must, or correct --workdir")
        return
    if resume == "never":
        raise ValueError(f"{workdir} holds a run already; choose another --workdir, or go on with it: --resume=auto")
    try:
        before = json.loads(stored.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{stored} is not valid JSON ({error}); choose another --workdir") from None
    try:
        different = changes.describe_changes(before, config, movable)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{stored} is no configuration ({error}); choose another --workdir") from None
    if different:
        raise ValueError(
            f"{workdir} holds a run with another configuration; choose another --workdir. Stored, and now:\n  "
            + "\n  ".join(different)
        )


def _is_first_file(path: Path) -> bool:
    return FIRST_FILES.fullmatch(path.name) is not None


def read_config(workdir: Path) -> dict:
    """Read the configuration of the run in a folder. Raises ValueError if the folder holds no run."""
    stored = workdir / "config.json"
    try:
        return json.loads(stored.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{workdir} is not a run's folder: it has no config.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{stored} is not valid JSON ({error})") from None


def read_stop_ids(workdir: Path) -> list[int]:
    """Read the ids that end the responses of the run in a folder. Raises ValueError if run.json does not name them."""
    return _read_input(workdir, "stop_ids", "end tokens")


def read_model_digest(workdir: Path) -> str:
    """Read the digest of the model that the run in a folder began with. Raises ValueError if run.json has none."""
    return _read_input(workdir, "model", "model")


def _read_input(workdir: Path, name: str, what: str):
    try:
        return json.loads((workdir / "run.json").read_text(encoding="utf-8"))["inputs"][name]
    except (FileNotFoundError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"{workdir}/run.json does not name the run's {what} ({error!r}); use the version of ctxjax that trained it"
        ) from None


def has_ended(manifest: dict) -> bool:
    """Whether a run with this content of run.json came to its end: only then are its times in it. A run that was made
    longer has results of its earlier end until then."""
    return "seconds" in manifest


def find_first_start(manifest: dict) -> str:
    """Return when a run with this content of run.json was started for the first time."""
    return [*manifest["earlier_starts"], manifest][0]["started"]


def claim(workdir: Path, facts: dict, inputs: dict) -> dict:
    """Create the workdir and write config.json and run.json. Return the manifest, the content of run.json.

    Call it when all input has been read, so that a run that cannot start leaves nothing behind. ``inputs``: digests of
    what was read, by name; those that an older version of the code did not compute are left out. Raises ValueError if
    the run in this folder began with other inputs.
    """
    manifest = facts | {"inputs": inputs, "earlier_starts": []}
    if (workdir / "config.json").exists() and (workdir / "run.json").exists():
        before = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
        known = before.get("inputs") or {}
        manifest["inputs"] = {name: value for name, value in inputs.items() if name in known}
        different = changes.list_differences(known, manifest["inputs"], "inputs")
        if different:
            raise ValueError(
                f"the run in {workdir} began with other inputs; bring them back, or choose another --workdir. Digests "
                "then, and now:\n  " + "\n  ".join(map(str, different))
            )
        if before.get("commit") != facts["commit"]:
            codes = f"commit {before.get('commit')} then, {facts['commit']} now"
            print(f"warning: the run in {workdir} goes on with other code: {codes}", flush=True)
        kept = ("started", "command", "device", "commit", "versions", "resumed", "record")
        start = {name: before.get(name) for name in kept}
        start |= {name: before["config"].get(name) for name in ("run_arms", "alarms")}
        manifest["earlier_starts"] = [*before.get("earlier_starts", []), start]
    workdir.mkdir(parents=True, exist_ok=True)
    processes.wait("workdir read")
    write_json(workdir / "config.json", facts["config"])
    write_json(workdir / "run.json", manifest)
    processes.wait("workdir claimed")
    if not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is not the same folder for all processes of this run; name one that they share")
    return manifest


class Lock:
    """Keep other processes out of a run's folder, from ``take`` until the block or the process ends."""

    def __init__(self, workdir: Path):
        self._path, self._file = workdir / "lock", None

    def take(self) -> None:
        """Create the folder if needed and lock it. Of several processes only the first takes the lock.

        Warn if the file system has no locks. Raises ValueError if another run holds the lock, and says which.
        """
        if self._file is not None or not processes.is_first():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "an unknown process"
            file.close()
            raise ValueError(
                f"{self._path.parent} is in use by another run ({holder}); wait for it, end it, or choose another "
                "--workdir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            print(
                f"warning: the file system of {self._path.parent} has no locks ({error.strerror}), so nothing keeps a "
                "second run out of this folder; start no other one in it",
                file=sys.stderr,
                flush=True,
            )
        file.truncate(0)
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        self._file = file

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into. It gets its name when the block ends, and is removed if the block fails.

    Raises FileExistsError if ``folder`` exists: nothing is overwritten.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; nothing was written. Choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _name_partial(folder)
    partial.mkdir()
    try:
        with preemption.discarding(partial):
            yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def ensure_writable(folder: Path, setting: str) -> None:
    """Make a folder that ``setting`` has chosen. Raises OSError, with the setting, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            f"{folder}, of {setting}, cannot be written: {error.strerror}; choose another folder"
        ) from None


def write_json(path: Path, value) -> None:
    """Write a JSON file that appears under its name only when it is complete."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears under its name only when it is complete. Only the first process writes."""
    if processes.is_first():
        _write_whole(path, text)


def write_text_on_every_host(path: Path, text: str) -> None:
    """Write a text file as ``write_text`` does: first by the first process, then by those that do not share its disk.

    All processes must call it.
    """
    for is_writer in (processes.is_first(), not processes.is_first()):
        if is_writer and not (path.exists() and path.read_bytes() == text.encode()):
            _write_whole(path, text)
        processes.wait("text written")


def _write_whole(path: Path, text: str) -> None:
    partial = _name_partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _name_partial(path: Path) -> Path:
    """Return a new name for an incomplete file or folder: two processes may write the same one, in a shared cache."""
    return path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")


def collect_facts(config: ConfigDict) -> dict:
    """Return what is known of a run before it begins: configuration, seed, versions, device; secrets are hidden."""
    device = jax.devices()[0]
    facts = {
        "config": json.loads(config.to_json()),
        "seed": config.seed,
        "command": shlex.join(["python", "-m", "ctxjax.main", *sys.argv[1:]]),
        "versions": {"python": sys.version.split()[0]} | {name: _find_version(name) for name in PACKAGES},
        "commit": _find_commit(Path(__file__).parent),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "host": socket.gethostname(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return redact.hide_secrets(facts)


def select_code_facts(facts: dict) -> dict:
    """Return the facts, other than configuration and inputs, that can change a run's numbers."""
    return {name: facts[name] for name in ("versions", "commit", "device")}


def _find_commit(package: Path) -> str | None:
    """Return the package's commit and a digest of its uncommitted changes; None if it is not in a git checkout."""

    def git(*arguments: str) -> str:
        line = ["git", "-C", str(package), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        commit, changes = git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} with changes {compute_digest(changes)}" if changes else commit


def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
