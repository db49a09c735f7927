"""Files that appear whole or not at all."""

import ctypes
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_hybrid.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
# What is asked for ahead of a reader of large files.
_AHEAD_BYTES = 16 << 20


def read_ahead(descriptor: int, place: int) -> None:
    """Have what follows a place in a file read from the disk while the caller does other things.

    The kernel does so by itself for one reader who goes straight on, not for threads that take
    turns.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, place, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


@contextmanager
def file_errors(target: Path) -> Iterator[None]:
    """What the file system refuses while `target` is made is the user's to mend.

    Raises:
        UserError: naming the file and the system's reason.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not _is_part(error.filename, target):
            raise UserError(refusal(error) or str(error)) from error
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        raise UserError(f"{target} could not be written: {where}{reason}") from error


def _is_part(name: str | bytes | int, target: Path) -> bool:
    """Whether a file is written for the sake of `target`: below it, beside it for a while, or a
    folder that it is in."""
    if isinstance(name, int):
        return True
    path, target = Path(os.fsdecode(name)).absolute(), target.absolute()
    if path in target.parents:
        return True
    beside = path.parts[len(target.parent.parts) :]
    begins = (f"{target.name}.", f".{target.name}.")
    return path.is_relative_to(target.parent) and f"{beside[0]}.".startswith(begins)


def refusal(error: BaseException) -> str | None:
    """What the file system refused, with the file's name, in a line; None: it is something else."""
    if not isinstance(error, OSError) or error.filename is None or error.errno == errno.EPIPE:
        return None
    names = [error.filename, *([error.filename2] if error.filename2 is not None else [])]
    where = " to ".join(os.fsdecode(each) if isinstance(each, bytes) else str(each)
                        for each in names)  # fmt: skip
    return f"{where}: {error.strerror or type(error).__name__}"


@contextmanager
def refusals_told() -> Iterator[None]:
    """What the file system refuses is the user's to mend, in whichever file.

    Raises:
        UserError: as `refusal`.
    """
    try:
        yield
    except OSError as error:
        if text := refusal(error):
            raise UserError(text) from error
        raise


def why_not_writable(folder: Path) -> str | None:
    """Why a folder cannot be made, or files in it: its nearest existing parent decides."""
    there = folder.absolute()
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            return f"{there} is not a folder"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{there} is not writable"
        if os.statvfs(there).f_blocks == 0:
            # Not on a disk (/proc, /sys): permissions say nothing there, only a trial does.
            with tempfile.TemporaryDirectory(dir=there):
                pass
    except OSError as error:
        return f"nothing can be made in {there}: {error.strerror}"
    return None


def matches(pattern: str, *, recursive: bool = False) -> list[str]:
    """The paths that a glob stands for, sorted.

    Raises:
        OSError: a folder that it leads through may not be looked into. `glob` passes over it.
    """
    folder, last = os.path.split(pattern)
    folders = [folder or os.curdir]
    if glob.has_magic(folder):
        folders = matches(folder, recursive=recursive)
    for each in folders:
        with suppress(FileNotFoundError, NotADirectoryError):
            if glob.has_magic(last):
                os.scandir(each).close()
            else:
                Path(each, last).lstat()
    return sorted(glob.glob(pattern, recursive=recursive))  # noqa: PTH207  # `..` and all


def sync_folder(folder: Path) -> None:
    """Make the renames and removals done in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write `data` to `path`: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the file could not be written; what was at `path` before is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder; of a link to one, the link alone.

    Raises:
        OSError: it cannot be removed, or not whole (NFS keeps files that somebody has open).
    """
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def replace_folder(new: Path, folder: Path) -> None:
    """Put a whole folder in the place of another, if there is one, which is removed.

    One rename decides: killed at any moment, `folder` is the old one or the new one. Where the file
    system cannot exchange two names (NFS, Lustre), there are two renames, and killed between them
    the old one is beside it, until `restore_folder` puts it back.

    Raises:
        OSError: `folder` is as it was.
    """
    if not folder.exists():
        new.rename(folder)
    elif _exchange(new, folder):
        sync_folder(folder.parent)
        remove_tree(new)
    else:
        old = replaced_folder(folder)
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
        sync_folder(folder.parent)
        remove_tree(old)
    sync_folder(folder.parent)


def restore_folder(folder: Path) -> None:
    """Put a folder back that a kill in `replace_folder` has left beside its place, if it did."""
    old = replaced_folder(folder)
    if old.is_dir():
        if folder.exists():
            remove_tree(old)
        else:
            old.rename(folder)
            sync_folder(folder.parent)


def replaced_folder(folder: Path) -> Path:
    """Where the older one of a folder is for a moment while it is replaced in two renames."""
    return folder.with_name(f".{folder.name}.old.part")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    names = [os.fsencode(one), os.fsencode(other)]
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))
