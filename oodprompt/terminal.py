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


class Parser(argparse.ArgumentParser):
    """Of every command of ours: its errors are one line, like all others; its description keeps its lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def error(self, message: str) -> NoReturn:
        flag = re.search(r"unrecognized arguments:.*?(--[\w-]+)", message)
        flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        raise UserError(f"{message}: {nearest(flag[1], flags)}" if flag else f"{message}; see {self.prog} --help")


class _Tee:
    """Writes to the terminal and to the log."""

    def __init__(self, stream: IO[str], log: IO[str]) -> None:
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        self.log.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.log.flush()
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()


@contextlib.contextmanager
def logged(directory: str, rank: int) -> Iterator[None]:
    """Everything printed also goes to ``<directory>/log.txt`` (appended); only the first process prints at all."""
    if rank:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
        return
    path = Path(directory) / "log.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --output-dir") from error
    with log, contextlib.redirect_stdout(_Tee(sys.stdout, log)):
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
