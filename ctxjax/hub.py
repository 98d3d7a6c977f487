"""Where a model's folder is: on this machine, or on the Hugging Face Hub, from where it is fetched once."""

from __future__ import annotations

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

from ctxjax.retry import retry

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(@[\w./-]+)?")
# Weights in safetensors, configurations, tokenizers, chat templates: no pickles, no code, no copies in subfolders.
WANTED = ["model*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
UNWANTED = ["*/*"]


def local_folder(path: str | Path) -> Path:
    """The folder that ``path`` names: a local one, or else a Hub id ``org/name`` or ``org/name@revision``.

    Raises FileNotFoundError, or PermissionError for a model whose terms must be accepted first.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"model folder {path} does not exist; give a folder, or a Hub id such as org/name")
    name, _, revision = str(path).partition("@")
    options = {"revision": revision or None, "allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    try:
        return Path(retry(lambda: snapshot_download(name, **options), f"the Hub model {name}", _is_transient))
    except GatedRepoError:
        raise PermissionError(
            f"the Hub model {name} is gated: accept its terms at https://huggingface.co/{name}, then `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"the Hub model {name} has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"model {path} is neither a folder here nor a public model on the Hub; if it is private, `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise FileNotFoundError(
            f"model {path} is neither a folder here nor in the Hub's cache, and the Hub cannot be reached (offline, or "
            f"HF_HUB_OFFLINE is set); connect, or give the folder of a copy"
        ) from None
    except (HfHubHTTPError, httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise FileNotFoundError(
            f"the Hub did not deliver {path}: {type(error).__name__}: {error}. What has arrived is kept: try again"
        ) from None


def _is_transient(error: Exception) -> bool:
    """Whether the Hub may answer if it is asked again: 408, 429, 5xx, and connections that break. Those that cannot be
    made in the first place (LocalEntryNotFoundError) snapshot_download has tried several times itself."""
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return status in (408, 429) or (status is not None and status >= 500)
    return isinstance(error, (httpx2.TransportError, ConnectionError, TimeoutError)) and not isinstance(
        error, (OfflineModeIsEnabled, httpx2.ProxyError, httpx2.UnsupportedProtocol)
    )
