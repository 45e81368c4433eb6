"""Makes a folder appear whole or not at all. Owns its hidden siblings `.NAME.lock`, `.partial` and `.replaced`."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expertd_engine.errors import ExpertdError, ModelError, ResourceError

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def publish(destination: Path, *, replace: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a new empty folder that becomes `destination` when the block ends well; otherwise nothing remains.

    Two publishers of one destination take turns; what a killed one left is removed by the next. An existing
    destination is a ModelError unless it is empty or `replace` is set, and then stays until its successor is whole.
    A full disk, known beforehand by `needed_bytes` or met on the way, is a ResourceError.
    """
    destination = Path(os.path.abspath(destination))
    partial = destination.with_name(f".{destination.name}.partial")
    with _as_user_errors(destination), exclusive(destination):
        _tidy(destination, partial)
        _check_free(destination, replace=replace, needed_bytes=needed_bytes)
        partial.mkdir()
        try:
            yield partial
            _sync(partial)
            _swap_in(partial, destination)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock named after `path` (whether that exists or not), waiting for other processes to let go of it.
    Raises ResourceError where its folder cannot be made or written."""
    lock = path.with_name(f".{path.name}.lock")
    with _as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _lock(lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(fd)


def _lock(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX)
        # The last holder removes the file: a waiter may now hold the lock of a name that is gone or made anew.
        if _is_still(path, fd):
            return fd
        os.close(fd)


def _is_still(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _tidy(destination: Path, partial: Path) -> None:
    """Remove what a killed publisher left. Call with the lock held: nobody else is at work on these."""
    replaced = _replaced(destination)
    if replaced.exists() and not destination.exists():
        replaced.rename(destination)
    for leftover in (partial, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)


def _check_free(destination: Path, *, replace: bool, needed_bytes: int) -> None:
    if destination.exists() and not replace and not (destination.is_dir() and not any(destination.iterdir())):
        raise ModelError(f"{destination} exists already: name a new folder, or remove it first")
    free = shutil.disk_usage(destination.parent).free
    if free < needed_bytes:
        raise ResourceError(f"not enough disk space for {destination}: {needed_bytes} bytes needed, {free} free")


def _swap_in(partial: Path, destination: Path) -> None:
    replaced = _replaced(destination)
    if destination.exists():
        destination.rename(replaced)
    partial.rename(destination)
    _sync_path(destination.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _replaced(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.replaced")


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _as_user_errors(destination: Path) -> Iterator[None]:
    try:
        yield
    except ExpertdError:
        raise
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ResourceError(f"disk full while writing {destination}: {error.strerror}; nothing was kept") from error
        raise ResourceError(f"cannot write {destination}: {error}") from error
