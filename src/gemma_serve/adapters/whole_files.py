"""Files that are written whole: a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write `text` beside `path` and move it there; `mode` is what the umask then cuts down.

    Raises:
        OSError: it can't be written; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
