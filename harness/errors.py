"""A user's mistake is a sentence: library code raises UserError, and the commands alone end with it."""

import contextlib
import os
import re
import sys
import time

NO_MEMORY = re.compile("out of memory|(can't|cannot) allocate memory", re.IGNORECASE)
LOST_PEER = re.compile("(closed|reset) by peer|remote process|Broken pipe|Socket closed")


class UserError(Exception):
    """What a user can mend: one sentence that says what is wrong, where, and what to do."""

    exit_code = 2


class Stopped(UserError):
    """A run that ends because a signal asked for it; its exit code is the one that shells give to that signal."""

    def __init__(self, sentence: str, signal: int):
        super().__init__(sentence)
        self.exit_code = 128 + signal


def usage_error(message: str) -> None:
    """Raises UserError; an ArgumentParser's `error`, so that its sentence comes without the usage in front of it."""
    raise UserError(f"{message}; --help lists the options")


def warn(sentence: str) -> None:
    """Tells the user, on stderr and once for all processes, what a run does otherwise than it was told."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """An exception's message in one line of at most 400 characters: libraries write paragraphs."""
    message = " ".join(str(error).split())
    if not re.search("[a-z]", message):  # nothing, or a number
        message = type(error).__name__
    return message if len(message) <= 400 else message[:400] + " …"


@contextlib.contextmanager
def exit_on_user_error(command: str, less_memory: str = "close other programs"):
    """Ends `command` on a user's mistake, or on what the machine refuses (OSError), with its sentence on stderr.

    Exit code 2; 128 and its number for a signal; 1 where another process has died. A bug keeps its traceback.
    `less_memory` says what to do where there is not enough memory.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show θ ends no run
    try:
        yield
    except (UserError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
        main, sentence, code = os.environ.get("RANK", "0") == "0", str(error), getattr(error, "exit_code", 2)
        if isinstance(error, Stopped) and not main:
            sys.exit(code)  # all processes stop, and the main one says it
        if isinstance(error, KeyboardInterrupt):
            sentence, code = "interrupted", 130
        elif isinstance(error, MemoryError) or NO_MEMORY.search(sentence):
            sentence = f"not enough memory; {less_memory}"
        elif isinstance(error, RuntimeError):
            if not LOST_PEER.search(sentence):
                raise
            main, sentence, code = False, "another process has died; the error to read is its own", 1
        if not main:
            time.sleep(3)  # under torchrun the main process, or the one that failed, is the first to say it
        print(f"{command}: {sentence}", file=sys.stderr, flush=True)
        sys.exit(code)
