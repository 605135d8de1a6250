"""Sizes as people read them."""

from __future__ import annotations


def gib(size_bytes: int) -> str:
    """Memory: `18253611008` is "17.00 GiB"."""
    return f"{size_bytes / 2**30:.2f} GiB"


def file_size(size_bytes: int) -> str:
    """A file or a disk, which may be small: "17.00 GiB", "2.1 MiB", "643 bytes"."""
    if size_bytes >= 2**30:
        return gib(size_bytes)
    if size_bytes >= 2**20:
        return f"{size_bytes / 2**20:.1f} MiB"
    return f"{size_bytes:,} bytes"
