"""What every command shares: flags whose errors take one line, a log of what is printed, and the exit status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from oodprompt.errors import UserError, nearest
from oodprompt.files import LOCK, only_run_in, sweep
from oodprompt.log import Forgiving
from oodprompt.memory import memory_for


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps a flag and what it does on one line where that fits."""

    def __init__(self, prog: str) -> None:
        width = min(max(shutil.get_terminal_size((110, 24)).columns, 80), 120)
        super().__init__(prog, max_help_position=32, width=width)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        text = super()._format_args(action, default_metavar)
        return f"{text.split()[0]} ..." if action.nargs == "+" else text


class Parser(argparse.ArgumentParser):
    """Of every command of ours: its errors are one line, like all others; its help keeps the description's lines and is short."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help} | options)

    def format_usage(self) -> str:
        return f"usage: {self.usage or self._brief_usage()}\n"  # parse_intermixed_args takes it, too

    def format_help(self) -> str:
        self.usage = self.usage or self._brief_usage().replace("%", "%%")
        return super().format_help()

    def _brief_usage(self) -> str:
        """The flags that must be given, and what stands without a flag."""
        flags = [action for action in self._actions if action.option_strings and action.dest != "help"]
        words = [
            f"{action.option_strings[0]} {action.metavar or action.dest.upper()}" for action in flags if action.required
        ]
        words += ["[flags]"] * (len(words) < len(flags))
        for action in self._actions:
            if not action.option_strings:
                name = str(action.metavar or (f"{{{','.join(action.choices)}}}" if action.choices else action.dest))
                words.append(f"[{name} ...]" if action.nargs == "*" else f"[{name}]" if action.nargs == "?" else name)
        return " ".join([self.prog, *words])

    def error(self, message: str) -> NoReturn:
        flag = re.search(r"unrecognized arguments:.*?(--[\w-]+)", message)
        flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        raise UserError(f"{message}: {nearest(flag[1], flags)}" if flag else f"{message}; see {self.prog} --help")


def program(script: str, verb: str) -> str:
    """What the command is called in its help: the script, or ``oodprompt VERB`` where that was typed."""
    return script if Path(sys.argv[0]).name == Path(script).name else f"oodprompt {verb}"


class _Tee(Forgiving):
    """Writes to the terminal and to the log; where one of them fails, to the other."""

    def __init__(self, stream: IO[str], log: IO[str]) -> None:
        super().__init__(stream.stream if isinstance(stream, Forgiving) else stream)  # to see it fail
        self.log = Forgiving(log)

    def write(self, text: str) -> int:
        had_log = self.log.is_open
        self.log.write(text)
        super().write(text)
        if had_log and not self.log.is_open:
            super().write("\nNote: log.txt cannot be written any more; the run goes on\n")
        return len(text)

    def flush(self) -> None:
        self.log.flush()
        super().flush()

    def _leave(self) -> None:
        super()._leave()
        self.log.write("\nNote: nobody reads the output any more; the run goes on\n")


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
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, made)  # what is empty in the end
        try:
            is_locked = stack.enter_context(only_run_in(folder))
            # A line at a time, so that a kill loses none. Characters that UTF-8 lacks are halves of undecodable file names.
            log = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; free some space or choose another --output-dir"
            ) from error
        stack.callback(_close, log)
        tee = _Tee(sys.stdout, log)
        try:
            with contextlib.redirect_stdout(tee), memory_for():
                if not is_locked:
                    print(f"Note: {folder} is on a file system without locks; see to it that no other run writes to it")
                if size := sweep(folder) + sum(sweep(part) for part in folder.glob("*/")):
                    print(f"Note: deleted what a killed run had half written in {folder} ({size:,} bytes)")
                yield
        except UserError as error:
            tee.log.write(f"error: {error}\n")
            if folder in made and {file.name for file in folder.iterdir()} <= {path.name, LOCK}:
                path.unlink()  # a run that was refused before it did anything leaves nothing
            raise
        except Exception:
            tee.log.write(traceback.format_exc())
            raise


def _close(log: IO[str]) -> None:
    with contextlib.suppress(OSError):
        log.close()


def _remove(folders: Sequence[Path]) -> None:
    """Remove those of the folders that are empty, the innermost first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def exit_status(work: Callable[[], int | None]) -> int:
    """Do ``work``; returns 0 for success or what it returns, 2 for a user's error (one line on stderr), else 1.

    What ``work`` prints ends nothing: characters that the terminal lacks are replaced, and a reader may go away.
    """
    with contextlib.redirect_stdout(Forgiving(sys.stdout)):
        try:
            with memory_for():
                status = work()
            sys.stdout.flush()
            return status or 0
        except UserError as error:
            return _complain(f"error: {error}", 2)
        except KeyboardInterrupt:
            return _complain("interrupted; rerun the same command to resume from the last finished epoch", 1)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                return _complain(traceback.format_exc().rstrip(), 1)
            place = f" for {error.filename}" if error.filename else ""
            return _complain(f"error: the disk is full{place}; free some space and rerun the same command", 2)
        except Exception:
            return _complain(traceback.format_exc().rstrip(), 1)


def _complain(text: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # nobody reads standard error either
        print(text, file=sys.stderr)
    return status
