"""Find models and data sets on this machine, or fetch them once from the Hugging Face Hub."""

from __future__ import annotations

import glob
from pathlib import Path
import re

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(@[\w./-]+)?")
# Weights in safetensors, configurations, tokenizers, chat templates: no pickles, no code, no copies in subfolders.
SMALL = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
WANTED = ["model*.safetensors", *SMALL]
UNWANTED = ["*/*"]


def find_folder(path: str | Path, weights: bool = True) -> Path:
    """Return the folder that ``path`` names: a local one, else a Hub id ``org/name`` or ``org/name@revision``.

    ``weights``: False if a folder without the weights will do. Raises FileNotFoundError, or PermissionError for a model
    whose terms must be accepted first.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"model folder {path} does not exist; give a folder, or a Hub id such as org/name")
    return _fetch(str(path), "model", allow_patterns=WANTED if weights else SMALL, ignore_patterns=UNWANTED)


def parse_name(path: str) -> tuple[str, str | None]:
    """Return what other programs open ``path`` by, as in ``find_folder``: a folder's whole path, or the Hub id and its
    revision, None if it has none."""
    folder = Path(path).expanduser()
    return (str(folder.resolve()), None) if folder.is_dir() else split_revision(path)


def split_revision(path: str) -> tuple[str, str | None]:
    """Return the name and the revision, None if it has none, of a Hub id ``org/name`` or ``org/name@revision``."""
    name, _, revision = path.partition("@")
    return name, revision or None


def find_data_files(path: str, field: str) -> list[Path]:
    """Return the data files that ``path`` names, in alphabetical order.

    ``path``: a local file, a pattern such as ``data/train-*.parquet``, or files of a Hub data set,
    ``org/name:PATTERN`` or ``org/name@revision:PATTERN``. ``field``: its name in the configuration, for messages.
    Raises FileNotFoundError, or PermissionError for a data set whose terms must be accepted first.
    """
    local = Path(path).expanduser()
    if path and local.is_file():
        return [local]
    matching = sorted(Path(name) for name in glob.glob(str(local), recursive=True)) if path else []
    if any(file.is_file() for file in matching):
        return [file for file in matching if file.is_file()]
    name, _, pattern = path.partition(":")
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"data file {path!r} does not exist; set {field} to a file, a pattern of files such as train-*.parquet, or "
            "a Hub data set and the files in it, org/name:PATTERN"
        )
    if not pattern:
        raise FileNotFoundError(
            f"{field} = {path!r} is no file here; of a Hub data set name the files too, such as {path}:data/train-*"
        )
    folder = _fetch(name, "data set", repo_type="dataset", allow_patterns=[pattern])
    files = sorted(file for file in folder.glob(pattern) if file.is_file())
    if not files:
        raise FileNotFoundError(f"{field} = {path!r}: the Hub data set {name} has no file {pattern!r}")
    return files


def _fetch(path: str, what: str, **options) -> Path:
    """Return the local copy of the Hub repository ``path``; ``what`` names its kind in messages.

    The Hub's client itself repeats requests that fail for a moment.
    """
    name, revision = split_revision(path)
    kind = "datasets/" if options.get("repo_type") == "dataset" else ""
    options["revision"] = revision
    try:
        return Path(snapshot_download(name, **options))
    except GatedRepoError:
        raise PermissionError(
            f"the Hub {what} {name} is gated: accept its terms at https://huggingface.co/{kind}{name}, then "
            "`hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"the Hub {what} {name} has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"{what} {path} is neither on this machine nor a public one on the Hub; if it is private, `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise FileNotFoundError(
            f"{what} {path} is neither on this machine nor in the Hub's cache, and the Hub cannot be reached (offline, "
            f"or HF_HUB_OFFLINE is set); connect, or give the path of a copy"
        ) from None
    except (HfHubHTTPError, httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise FileNotFoundError(
            f"the Hub did not deliver {path}: {type(error).__name__}: {error}. What has arrived is kept: try again"
        ) from None
