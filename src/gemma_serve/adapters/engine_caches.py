"""The folders of compiled parts on disk: where they are, and how one is set aside."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from gemma_serve.errors import UsageError
from gemma_serve.planning.engine_caches import cache_key
from gemma_serve.planning.hardware.gpus import Gpu
from gemma_serve.planning.launch import Engine

CACHE_DIR_VARIABLE = "GEMMA_SERVE_CACHE_DIR"
_SET_ASIDE = ".set-aside"


def engine_caches_dir(cache_dir: Path | None, environ: Mapping[str, str]) -> Path:
    """The one folder for the caches of all engines.

    Args:
        cache_dir: the setting `cache_dir`; None where it isn't set, or for a caller that has no
            configuration.
        environ: the caller's environment.
    """
    if cache_dir is not None:
        return cache_dir
    if chosen := environ.get(CACHE_DIR_VARIABLE):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("gemma-serve")


def engine_caches(caches_dir: Path, engine: Engine, gpus: tuple[Gpu, ...]) -> Path:
    """The folder below `caches_dir` for `engine` on `gpus` of this machine. Makes nothing."""
    return caches_dir / cache_key(engine, gpus, machine=platform.machine())


def set_aside(folders: Iterable[Path], *, caches_dir: Path) -> tuple[Path, ...]:
    """Move compiled graphs out of the next start's way; the place of each one that was moved.

    Each of `folders` (see `compiled_folders`) becomes `<name>.set-aside` beside it, in the place
    of an older one. Those that aren't there, and those that aren't below `caches_dir` and so not
    ours, are left out. An engine that is still running from a folder must not lose it: the caller
    knows which are.

    Raises:
        UsageError: a folder of ours can't be moved.
    """
    ours = [folder for folder in folders if _is_below(folder, caches_dir)]
    moved = (_moved(folder) for folder in ours)
    return tuple(place for place in moved if place is not None)


def _is_below(folder: Path, caches_dir: Path) -> bool:
    # Of the folder itself only the name is changed, so a link in its place is never followed.
    named = folder.name not in ("", "..")
    return named and folder.parent.resolve().is_relative_to(caches_dir.resolve())


def _moved(folder: Path) -> Path | None:
    place = folder.with_name(folder.name + _SET_ASIDE)
    try:
        if not os.path.lexists(folder):
            return None
        _remove(place)
        folder.rename(place)
    except FileNotFoundError:
        return None  # vanished meanwhile: there is nothing to distrust any more
    except OSError as error:
        raise UsageError(
            f"cannot set the compiled graphs in {folder} aside: {error.strerror}",
            code="caches.unwritable",
            hint="remove that folder, or use another one for all caches: --cache-dir DIR",
        ) from None
    return place


def _remove(place: Path) -> None:
    if place.is_symlink() or place.is_file():
        place.unlink(missing_ok=True)
    elif place.exists():
        with suppress(FileNotFoundError):  # somebody else removes it too
            shutil.rmtree(place)
