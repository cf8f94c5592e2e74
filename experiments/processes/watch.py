"""Bounded waiting: a process that takes part in a run with others ends when one of them is lost, and says why.

A collective waits for ever for a process that was stopped, and mostly for one that was killed, too. So every process
says each second that it is alive, in the key-value store of JAX's coordinator, reads there who else is, and ends itself
when one is not. It leaves by `os._exit`: the main thread is inside the collective, and JAX's and Orbax's own clean-up
would wait for the lost process once more.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 20.0  # a process not heard of for so long is lost
STALL_SECONDS = float(os.environ.get("JAXBN_STALL_SECONDS", 300))  # training that does not move for so long is stuck
LOST = 75  # exit status of a process that ends because of another one; EX_TEMPFAIL of sysexits.h: try again
CONTINUES = "The same command continues from the last checkpoint."
ALIVE, ENDED = "jaxbn/alive/", "jaxbn/ended/"

_kept = []  # what C holds a pointer to


class Watch:
    """Watches over the other processes, and over the progress of this one, from two threads.

    Two, because a question to a coordinator that was stopped is answered no more than a collective is.
    """

    def __init__(self, client: Any, number: int, count: int):
        self._client, self._number, self._count = client, number, count
        self._stopped = threading.Event()
        now = time.monotonic()
        self._heard = {other: (None, now) for other in range(count) if other != number}
        self._answered = now  # when the coordinator last answered
        self._moved = None  # when training last moved; None outside of training
        for work in (self._beat, self._guard):
            threading.Thread(target=work, daemon=True).start()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Inside, `moved` must be called every `STALL_SECONDS`; outside, compiling may take as long as it needs."""
        self.moved()
        try:
            yield
        finally:
            self._moved = None

    def moved(self) -> None:
        """Notes that training has moved: a step, an evaluation or a checkpoint has ended."""
        self._moved = time.monotonic()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def announce(self, reason: str) -> None:
        """Tells the others why this process ends; the coordinator waits until they have ended too."""
        self.stop()  # or, with another one that ends, this process would do so before it has said why
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{ENDED}{self._number}", reason, allow_overwrite=True)
            deadline = time.monotonic() + 5 * BEAT_SECONDS
            while self._number == 0 and time.monotonic() < deadline and len(self._numbered(ENDED)) < self._count:
                time.sleep(BEAT_SECONDS / 5)

    def wait_for_the_cause(self) -> None:
        """Waits until the watch has found the lost process, and ended this one; returns where none is lost."""
        time.sleep(SILENCE_SECONDS + 3 * BEAT_SECONDS)

    def _beat(self):
        """Says that this process is alive, and hears from the others."""
        beats = 0
        while not self._stopped.is_set():
            beats += 1
            with contextlib.suppress(Exception):  # what it means that a question fails, the guard decides
                self._client.key_value_set(f"{ALIVE}{self._number}", str(beats), allow_overwrite=True)
                alive = self._numbered(ALIVE)
                ended = self._numbered(ENDED)
                self._answered = now = time.monotonic()
                for other, (value, _) in self._heard.items():
                    if ended.get(other):
                        # Without a reason, since it is no cause; the one that ended waits for this.
                        self._client.key_value_set(f"{ENDED}{self._number}", "", allow_overwrite=True)
                        if self._number == 0:  # without the coordinator, JAX would abort the other one on its way out
                            time.sleep(BEAT_SECONDS)
                        self._end(f"process {other} has ended. {ended[other]}")
                    if alive.get(other, value) != value:
                        self._heard[other] = (alive[other], now)
            self._stopped.wait(BEAT_SECONDS)

    def _guard(self):
        """Ends this process when another one is silent, or training does not move."""
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            silent = [other for other, (_, heard) in self._heard.items() if now - heard > SILENCE_SECONDS]
            if silent and now - self._answered > SILENCE_SECONDS / 2:
                silent = [0]  # nothing is heard of anyone, because the coordinator does not answer
            if silent:
                self._end(
                    f"nothing was heard of process {', '.join(map(str, silent))} for {SILENCE_SECONDS:g} s: killed, "
                    f"stopped, or cut off from the network. {CONTINUES}"
                )
            if self._moved is not None and now - self._moved > STALL_SECONDS:
                self._end(
                    f"no step, evaluation or checkpoint has ended for {STALL_SECONDS:g} s (JAXBN_STALL_SECONDS), "
                    f"though every process is alive: they wait for one another. {CONTINUES}"
                )

    def _numbered(self, prefix):
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(prefix)}

    def _end(self, reason) -> NoReturn:
        if not self._stopped.is_set():
            leave(LOST, f"Process {self._number} ends: {reason}")


def leave(status: int, message: str) -> NoReturn:
    """Prints the message and ends the process at once, whatever its other threads wait for."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    show_cursor = "\r\x1b[?25h" if os.isatty(2) else ""  # which progress bars hide
    os.write(2, f"{show_cursor}{message}\n".encode())
    os._exit(status)


def say_last_words(message: str, status: int = LOST) -> None:
    """Sets what is printed when JAX's runtime aborts the process, which it does as soon as the coordinator is gone.

    JAX prints a stack trace and calls abort(). A handler in Python would wait for the main thread, which is in a
    collective; so this is one in C, and the thread that aborts runs it.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_):
        leave(status, message)

    _kept[:] = [handler]
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype = ctypes.c_void_p
    set_handler(int(signal.SIGABRT), handler)
