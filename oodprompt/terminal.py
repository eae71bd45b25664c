"""What every command shares: flags whose errors take one line, a log of what is printed, and the exit status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from oodprompt.errors import UserError, nearest
from oodprompt.files import only_run_in, sweep


class Parser(argparse.ArgumentParser):
    """Of every command of ours: its errors are one line, like all others; its description keeps its lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def error(self, message: str) -> NoReturn:
        flag = re.search(r"unrecognized arguments:.*?(--[\w-]+)", message)
        flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        raise UserError(f"{message}: {nearest(flag[1], flags)}" if flag else f"{message}; see {self.prog} --help")


class _Log:
    """The end of a log file. Where it cannot be written, say on a full disk, a note is printed once and all goes on."""

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self.path, self._say, self._has_failed = path, say, False
        self._file = path.open("ab", buffering=0)

    def write(self, text: str) -> None:
        try:
            self._file.write(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                self._say(f"Note: {self.path} lacks some of what is printed: {error.strerror or error}\n")

    def close(self) -> None:
        self._file.close()


class _Tee:
    """Writes to the terminal and to the log."""

    def __init__(self, stream: IO[str], log: _Log) -> None:
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        self.log.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()


@contextlib.contextmanager
def logged(directory: str, rank: int) -> Iterator[None]:
    """Everything printed also goes to ``<directory>/log.txt`` (appended); only the first process prints at all.

    The folder is this run's alone meanwhile: ``UserError`` where another run writes to it. What a killed run left half
    written in it is deleted.
    """
    if rank:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
        return
    folder = Path(directory)
    path = folder / "log.txt"
    with contextlib.ExitStack() as stack:
        try:
            is_locked = stack.enter_context(only_run_in(folder))
            log = stack.enter_context(contextlib.closing(_Log(path, sys.stdout.write)))
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; free some space or choose another --output-dir"
            ) from error
        stack.enter_context(contextlib.redirect_stdout(_Tee(sys.stdout, log)))
        if not is_locked:
            print(f"Note: {folder} is on a file system without locks; see to it that no other run writes to it")
        if size := sweep(folder) + sum(sweep(part) for part in folder.glob("*/")):
            print(f"Note: deleted what a killed run had half written in {folder} ({size:,} bytes)")
        try:
            yield
        except UserError as error:
            log.write(f"error: {error}\n")
            raise
        except Exception:
            log.write(traceback.format_exc())
            raise


def exit_status(work: Callable[[], None]) -> int:
    """Do ``work``; returns 0 for success, 2 for a user's error (one line on stderr), 1 for anything else."""
    try:
        work()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume from the last finished epoch", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            traceback.print_exc()
            return 1
        place = f" for {error.filename}" if error.filename else ""
        print(f"error: the disk is full{place}; free some space and rerun the same command", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0
