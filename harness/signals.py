"""Signals: the first one asks a run to save and stop, a second one ends the process at once."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator

# signals that end a process by default and can be caught, except those of crashes (SIGSEGV, SIGABRT, …)
SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
SIGNALS += [signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGXCPU, signal.SIGIO]
SIGNALS += [signal.Signals[name] for name in ("SIGPWR", "SIGSTKFLT") if name in signal.Signals.__members__]  # Linux
ECHO = 2  # seconds in which torchrun may forward a signal that a cluster already sent to its workers


class StopSignals:
    """`number` is the first signal received, `time` its arrival; `armed` is set once there is something to save."""

    def __init__(self):
        self.number, self.time, self.armed = 0, math.inf, False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catches SIGNALS within the block. Ignored signals, such as SIGHUP under nohup, stay ignored."""
        default = (signal.SIG_DFL, signal.default_int_handler)
        self.former = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in default}
        for number in self.former:
            signal.signal(number, self.receive)
        try:
            yield
        finally:
            for number, handler in self.former.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        """The handler: records the first signal; ends the process at a second one, or if there is nothing to save."""
        under_torchrun = "RANK" in os.environ
        if not self.armed or (self.number and not (under_torchrun and time.monotonic() < self.time + ECHO)):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.number:
            self.number, self.time = number, time.monotonic()
            if not under_torchrun:
                for each in self.former:  # the default action ends even a process that hangs
                    signal.signal(each, signal.SIG_DFL)
