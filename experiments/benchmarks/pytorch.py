"""PyTorch's layer, timed in a separate process, because its threads keep spinning after a call and would slow JAX down.

Conventions: the two processes exchange lines of JSON. The parent sends a row, {"pass", "activation", "shape", "dtype"},
which the worker answers with {}, or it sends {} for a sample, which the worker answers with {"seconds": of one call}.
The answer to a failure is {"error": reason}.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Self, TextIO

from experiments.evidence import timing

# By default, threads spin while they wait for each other, which is faster. But if another process takes one of their
# cores for a moment, the others wait for tens of milliseconds, and sleeping threads are faster.
WAITING = {"active": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
SETTLE = 0.01  # seconds until the worker's threads stop spinning


class Worker:
    """The process that times PyTorch; use it in a `with` statement.

    Args:
      at_least: shortest duration of a sample, in seconds; see `timing.sampler`.
      together: calls between two waits; see `timing.sampler`.
      device: name of the device in PyTorch.
      waiting: how the threads wait for each other; key of `WAITING`.
      command: starts the worker.
    """

    def __init__(
        self,
        *,
        at_least: float,
        together: int = 1,
        device: str = "cpu",
        waiting: str = "active",
        command: list[str] | None = None,
    ):
        options = json.dumps({"at_least": at_least, "together": together, "device": device})
        command = [sys.executable, "-m", "experiments.benchmarks.pytorch"] if command is None else command
        pipe, environment = subprocess.PIPE, os.environ | WAITING[waiting]
        self._process = subprocess.Popen([*command, options], stdin=pipe, stdout=pipe, text=True, env=environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(BrokenPipeError):  # The worker has ended; closing flushes what it did not read.
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def prepare(self, row: dict) -> Callable[[], float]:
        """Returns a function that takes a sample of this row, until the next row is prepared.

        Raises:
          RuntimeError: PyTorch cannot compute the row.
        """
        self._ask(row)
        return self._sample

    def _sample(self) -> float:
        seconds = self._ask({})["seconds"]
        time.sleep(SETTLE)
        return seconds

    def _ask(self, question: dict) -> dict:
        with contextlib.suppress(BrokenPipeError):  # The worker has ended, and the line below reads no answer.
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "its process has ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def layer_call(row: dict, device: str) -> Callable[[], Any]:
    """Returns a call of one pass of BatchNorm1d or BatchNorm2d, channels last in memory."""
    import torch

    features, dtype = row["shape"][-1], getattr(torch, row["dtype"])
    x, dy = (torch.randn(row["shape"]) for _ in range(2))
    x, dy = ((0.5 + 2 * x).to(device, dtype), dy.to(device, dtype))
    if x.ndim == 4:  # PyTorch wants the channels second. These views keep the memory channels last.
        x, dy = x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)
    # PyTorch's momentum is the weight of the new value, not of the old one.
    norm = (torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm1d)(features, momentum=0.1, device=device)
    norm.train(row["pass"] != "eval")
    activate = torch.nn.functional.relu if row["activation"] == "relu" else lambda y: y

    @torch.no_grad()
    def forward() -> Any:
        return activate(norm(x))

    def forward_and_backward() -> tuple:
        x.grad = norm.weight.grad = norm.bias.grad = None
        y = activate(norm(x))
        y.backward(dy)
        return y, x.grad, norm.weight.grad, norm.bias.grad

    if row["pass"] != "forward+backward":
        return forward
    x.requires_grad_()
    return forward_and_backward


def serve(questions: Iterable[str], answers: TextIO, *, at_least: float, together: int, device: str) -> None:
    """Runs the worker: answers questions until there are no more.

    Args:
      questions: lines; see the module.
      answers: file for the answers.
      at_least: see `timing.sampler`.
      together: see `timing.sampler`.
      device: name of the device in PyTorch.
    """
    sample = None
    for line in questions:
        question, answer = json.loads(line), {}
        try:
            if question:
                call = layer_call(question, device)
                sample = timing.sampler(call, wait=_wait(device), at_least=at_least, together=together)
                sample()  # The first call allocates memory, and may fail.
            else:
                answer = {"seconds": sample()}
        except (ImportError, RuntimeError, TypeError, AttributeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _wait(device: str) -> Callable[[Any], None]:
    """Returns a function that waits for results: GPUs compute asynchronously, CPUs do not."""
    import torch

    return (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # The terminal sends it to all processes; the parent reports it.
        serve(sys.stdin, sys.stdout, **json.loads(sys.argv[1]))
