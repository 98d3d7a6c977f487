"""Hide secrets that a configuration, a command line or a message may contain: none is printed or written."""

from __future__ import annotations

import os
import re

HIDDEN = "[hidden]"
_ENVIRONMENT = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY)$", re.IGNORECASE)  # names of variables
_PATTERNS = (
    re.compile(r"(?<=://)[^/@\s'\"]+(?=@)"),  # user:password of an address
    re.compile(r"\b(hf_|github_pat_|gh[pousr]_|sk-)[A-Za-z0-9_-]{16,}"),
    re.compile(r"(?<=[?&])((access_|auth_)?token|(api_?)?key|password|signature|sig)=[^&\s'\"]+", re.IGNORECASE),
)
SHORTEST = 8  # letters; shorter values of environment variables may be ordinary words and are not hidden


def hide_secrets(value):
    """Return the value, a text or lists and dicts of them, with everything that looks like a secret replaced.

    The values of environment variables such as HF_TOKEN are replaced too.
    """
    if isinstance(value, dict):
        return {name: hide_secrets(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(hide_secrets(inner) for inner in value)
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if _ENVIRONMENT.search(name) and len(secret) >= SHORTEST:
            value = value.replace(secret, HIDDEN)
    for pattern in _PATTERNS:
        value = pattern.sub(HIDDEN, value)
    return value
