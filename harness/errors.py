"""Errors that users can fix: library code raises UserError, and a command prints it and exits without a traceback."""

import contextlib
import os
import re
import sys
import time

NO_MEMORY = re.compile("out of memory|(can't|cannot) allocate memory", re.IGNORECASE)
LOST_PEER = re.compile("(closed|reset) by peer|remote process|Broken pipe|Socket closed")


class UserError(Exception):
    """A mistake that the user can fix, in one sentence: what was given, what is expected, what to do."""

    exit_code = 2


class Stopped(UserError):
    """A signal stopped the run; the exit code is the one that shells report for this signal."""

    def __init__(self, sentence: str, signal: int):
        super().__init__(sentence)
        self.exit_code = 128 + signal


def usage_error(message: str) -> None:
    """Raises UserError; replaces ArgumentParser.error, which prints the usage and exits."""
    raise UserError(f"{message}; --help lists the options")


def warn(sentence: str) -> None:
    """Prints a warning to stderr, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """An exception's message in one line of at most 400 characters."""
    message = " ".join(str(error).split())
    if not re.search("[a-z]", message):  # empty, or only a number
        message = type(error).__name__
    return message if len(message) <= 400 else message[:400] + " …"


@contextlib.contextmanager
def exit_on_user_error(command: str, less_memory: str = "close other programs"):
    """Prints expected errors as `command: sentence` on stderr, and exits. A bug keeps its traceback.

    Args:
        command: the name of the command.
        less_memory: the advice if memory runs out.

    Exit codes: 2 for UserError, OSError and lack of memory; 128 + signal for Stopped; 130 for Ctrl-C; 1 if another
    process of the group has died.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for terminals that cannot show θ
    try:
        yield
    except (UserError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
        sentence, code, first = str(error), getattr(error, "exit_code", 2), os.environ.get("RANK", "0") == "0"
        if isinstance(error, Stopped) and not first:
            sys.exit(code)  # all processes stop, rank 0 reports it
        if isinstance(error, KeyboardInterrupt):
            sentence, code = "interrupted", 130
        elif isinstance(error, MemoryError) or NO_MEMORY.search(sentence):
            sentence = f"not enough memory; {less_memory}"
        elif isinstance(error, RuntimeError):
            if not LOST_PEER.search(sentence):
                raise
            sentence, code, first = "another process has died; see its error", 1, False
        if not first:
            time.sleep(3)  # so that rank 0, or the process that failed, prints its error before torchrun stops it
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"{command}: {sentence}", file=sys.stderr, flush=True)
        sys.exit(code)
