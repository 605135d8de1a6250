"""What an engine leaves in shared memory and in its temporary folder when it is killed.

vLLM's processes talk through `psm_*` segments and semaphores in /dev/shm and through sockets in
TMPDIR. One that is killed removes neither, and nobody else can know whose they are. So we write
down which segments the engine has mapped while it lives, and give it a TMPDIR of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gemma_serve.planning.process_id import SharedFile

SHARED_MEMORY = Path("/dev/shm")
# A socket's path has at most 107 bytes (sun_path in unix(7)); vLLM's names have 36 and NCCL's,
# torch's and Python's own are no longer than 60.
_LONGEST_FOLDER = 107 - 61
_PREFIX = "gemma-serve-"


def shared_files(folder: Path = SHARED_MEMORY) -> frozenset[SharedFile]:
    """Every file that is in shared memory now."""
    found = set()
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                found.add(SharedFile(entry.path, entry.inode()))
    return frozenset(found)


def mapped_files(pids: Iterable[int], folder: Path = SHARED_MEMORY) -> frozenset[SharedFile]:
    """The files of shared memory that one of `pids` has mapped.

    Told by inode: a semaphore is mapped under the name that it had before it was given its own.
    """
    inodes: set[int] = set()
    for pid in pids:
        inodes |= _mapped_inodes(pid, f"{folder}/")
    return frozenset(file for file in shared_files(folder) if file.inode in inodes)


def _mapped_inodes(pid: int, beginning: str) -> set[int]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    found = set()
    for line in lines.splitlines():
        # address, rights, offset, device, inode, path
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(beginning):
            found.add(int(fields[4]))
    return found


def remove_shared_files(files: Iterable[SharedFile]) -> tuple[str, ...]:
    """Remove those that are still the files that were written down; the paths of the removed."""
    removed = []
    for file in files:
        path = Path(file.path)
        with suppress(OSError):
            if path.lstat().st_ino == file.inode:
                path.unlink()
                removed.append(file.path)
    return tuple(sorted(removed))


def make_temporary_folder() -> Path:
    """A folder for the engine alone, whose path leaves room for the names of sockets.

    Raises:
        OSError: none can be made.
    """
    usual = tempfile.gettempdir()
    name_length = len(_PREFIX) + 9
    fits = len(os.fsencode(usual)) + name_length <= _LONGEST_FOLDER
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=usual if fits else "/tmp"))


def remove_temporary_folder(folder: Path) -> None:
    """Remove what `make_temporary_folder` made, with all that is in it, and nothing else."""
    if folder.name.startswith(_PREFIX) and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
