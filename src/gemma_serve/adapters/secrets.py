"""What must never be shown: the Hub's token and the API key, wherever they turn up."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gemma_serve.adapters.settings import API_KEY_VARIABLE

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

_SHOWN = "[secret]"
# A shorter one would blot out ordinary words.
_SHORTEST = 6


def hub_token_file(environ: Mapping[str, str]) -> Path:
    """Where `hf auth login` keeps the token, without importing the Hub's client to learn it."""
    if environ.get("HF_TOKEN_PATH"):
        return Path(environ["HF_TOKEN_PATH"]).expanduser()
    cache = Path(environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = Path(environ.get("HF_HOME", cache / "huggingface"))
    return Path(os.path.expandvars(home)).expanduser() / "token"


def without_secrets(text: str, environ: Mapping[str, str] | None = None) -> str:
    """`text` with every secret of this process blotted out.

    Libraries quote headers that they refuse, and addresses may hold passwords, so what has the
    form of a secret goes as well.
    """
    for secret in _known(os.environ if environ is None else environ):
        text = text.replace(secret, _SHOWN)
    text = re.sub(r"//[^/@\s'\"]+@", "//", text)
    return re.sub(r"(?<=Bearer )[^\s'\"\\]+|\bhf_[A-Za-z0-9]{10,}", _SHOWN, text)


def _known(environ: Mapping[str, str]) -> list[str]:
    """The secrets, the longest first, since one may begin with another."""
    found = [environ.get(name, "") for name in (*TOKEN_VARIABLES, API_KEY_VARIABLE)]
    with suppress(OSError, ValueError):
        found.append(hub_token_file(environ).read_text(encoding="utf-8"))
    stripped = {part.strip() for text in found for part in text.splitlines()}
    return sorted((s for s in stripped if len(s) >= _SHORTEST), key=len, reverse=True)
