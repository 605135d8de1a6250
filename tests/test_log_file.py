"""The engine's log file: its size bounded, its gaps told, and never an exception."""

import errno
import json
import stat
import subprocess
import sys

import pytest

from gemma_serve.engine.log import LogReader, tail_lines
from gemma_serve.engine.log_file import RotatingLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "engine.log"


def files(path):
    """The contents of the log's files, by name."""
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


def test_a_log_is_appended_to_for_its_owner_only(path):
    log = RotatingLog(path)
    assert [log.write(b"one\n"), log.write(b""), log.write(b"tw")] == [None] * 3
    log.close()
    log.close()
    assert log.write(b"o\n") is None
    log.close()
    assert files(path) == {"engine.log": b"one\ntwo\n"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_old_files_move_on_and_the_oldest_goes(path):
    log = RotatingLog(path, max_bytes=8, keep=2)
    for number in range(5):
        assert log.write(f"{number}234567\n".encode()) is None
    log.close()
    assert files(path) == {
        "engine.log": b"4234567\n", "engine.log.1": b"3234567\n", "engine.log.2": b"2234567\n",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("writes", "found"),
    [
        # One write over several files, each cut at a line end.
        ([b"one\ntwo\nthree\nfour\n"], [b"one\ntwo\n", b"three\n", b"four\n"]),
        # A line that began in a file ends in it.
        ([b"one\ntwo thr", b"ee\nfour\n"], [b"one\n", b"two three\n", b"four\n"]),
        ([b"one\ntwo", b" three", b" four\nfive\n"], [b"one\ntwo three four\n", b"five\n"]),
        # A progress bar's line ends with a carriage return.
        ([b"one\r 10%\r", b" 20%\r"], [b"one\r 10%\r", b" 20%\r"]),
        # Without any line end a file is twice as long as it should be, and no longer.
        ([b"x" * 50], [b"x" * 20, b"x" * 20, b"x" * 10]),
        ([b"x" * 7] * 4, [b"x" * 20, b"x" * 8]),
    ],
)
def test_files_change_at_line_ends(path, writes, found):
    log = RotatingLog(path, max_bytes=10, keep=9)
    assert [log.write(data) for data in writes] == [None] * len(writes)
    log.close()
    in_order = [data for _, data in sorted(files(path).items(), reverse=True)]
    assert in_order == found


def test_a_reader_follows_every_rotation(path):
    log, reader = RotatingLog(path, max_bytes=50), LogReader(path)
    lines = [f"line {number}" for number in range(40)]
    found = []
    for line in lines:
        log.write(f"{line}\n".encode())
        found += reader.new_lines()
    log.close()
    reader.close()
    assert found == lines
    assert tail_lines(path, 12, older=True) == lines[-12:]


def test_a_log_that_was_removed_or_replaced_is_made_again(path):
    log = RotatingLog(path)
    log.write(b"one\n")
    path.unlink()
    assert log.write(b"two\n") is None
    assert files(path) == {"engine.log": b"two\n"}
    path.rename(path.with_name("moved"))
    path.write_bytes(b"another\n")
    assert log.write(b"three\n") is None
    log.close()
    assert files(path) == {"engine.log": b"another\nthree\n", "moved": b"two\n"}


def test_what_a_full_disk_swallowed_is_told_once_there_is_room(path):
    path.symlink_to("/dev/full")
    log = RotatingLog(path)
    error = log.write(b"one\n")
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert [log.write(b"two two\n"), log.write(b"three\n")] == [None, None]
    path.unlink()
    assert log.write(b"four\n") is None
    path.unlink()
    path.symlink_to("/dev/full")
    again = log.write(b"five\n")
    log.close()
    assert again is not None
    path.unlink()
    log.write(b"six\n")
    log.close()
    assert path.read_text() == (
        "[gemma-serve: 5 bytes of the log were lost: No space left on device]\nsix\n"
    )


LIMITED = """
import json, os, resource, sys
from pathlib import Path
from gemma_serve.engine.log_file import RotatingLog

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

log = RotatingLog(Path(sys.argv[1]))
errors = []
write = lambda data: errors.append(log.write(data))
limit(10)
write(b"one\\n")
write(b"two two two\\n")  # 6 bytes fit
write(b"three\\n")
limit(30)
write(b"four\\n")         # the line on what was lost doesn't fit, and leaves no trace
limit(resource.RLIM_INFINITY)
write(b"five\\n")
limit(10)
write(b"six\\n")
print(json.dumps([error and error.errno for error in errors]))
"""


def test_writes_that_fit_in_part_are_completed_or_counted(path):
    child = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True
    )
    assert json.loads(child.stdout) == [None, errno.EFBIG, None, None, None, errno.EFBIG]
    assert path.read_text() == (
        "one\ntwo tw\n[gemma-serve: 17 bytes of the log were lost: File too large]\nfive\n"
    )


def test_a_gap_at_the_end_is_told_at_the_close(path):
    path.symlink_to("/dev/full")
    log = RotatingLog(path)
    log.write(b"one\n")
    path.unlink()
    log.close()
    assert files(path) == {
        "engine.log": b"[gemma-serve: 4 bytes of the log were lost: No space left on device]\n"
    }


def test_a_file_that_cannot_be_moved_grows_on(path):
    in_the_way = path.with_name("engine.log.1")
    in_the_way.mkdir()
    (in_the_way / "file").write_bytes(b"")
    log = RotatingLog(path, max_bytes=8, keep=1)
    results = [log.write(b"a line\n") for _ in range(4)]
    assert [error and error.errno for error in results] == [None, errno.EISDIR, None, None]
    assert path.read_bytes() == b"a line\n" * 4
    (in_the_way / "file").unlink()
    in_the_way.rmdir()
    assert log.write(b"last\n") is None
    log.close()
    assert files(path) == {"engine.log": b"last\n", "engine.log.1": b"a line\n" * 4}


def test_a_folder_that_is_gone_is_no_exception(path):
    log = RotatingLog(path.parent / "gone" / "engine.log")
    error = log.write(b"one\n")
    assert error is not None
    assert error.errno == errno.ENOENT
    (path.parent / "gone").mkdir()
    assert log.write(b"two\n") is None
    log.close()
    assert (path.parent / "gone" / "engine.log").read_text() == (
        "[gemma-serve: 4 bytes of the log were lost: No such file or directory]\ntwo\n"
    )
