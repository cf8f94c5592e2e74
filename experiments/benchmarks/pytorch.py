"""PyTorch's layer, timed in a process of its own: its threads spin for a while, which would slow down JAX's.

Convention: the two processes talk in lines of JSON. The worker is given a row, {"pass", "activation", "shape",
"dtype"}, and answers {}; it is given {} and answers {"seconds": of one call}. {"error": why} answers what fails.
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

# Threads that spin while they wait, as by default, are faster; but where another process takes one of their cores for a
# moment, the others wait for it tens of milliseconds, and threads that sleep are faster.
WAITING = {"active": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
SETTLE = 0.01  # seconds after which the worker's threads do not spin any more


class Worker:
    """The process that times PyTorch; use it in a with statement.

    Args:
      at_least: seconds that the calls of a sample last together.
      together: calls between two waits; see `timing.sampler`.
      device: PyTorch's name for it.
      waiting: how its threads wait for each other; one of `WAITING`.
      command: what starts the worker.
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
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself, and what it was not told is still here
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def prepare(self, row: dict) -> Callable[[], float]:
        """Returns a sample of a row, good until the next row is prepared.

        Raises:
          RuntimeError: says why PyTorch cannot compute it.
        """
        self._ask(row)
        return self._sample

    def _sample(self):
        seconds = self._ask({})["seconds"]
        time.sleep(SETTLE)
        return seconds

    def _ask(self, question):
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer either
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "its process has ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def layer_call(row: dict, device: str) -> Callable[[], Any]:
    """Returns a call of a pass of BatchNorm1d or BatchNorm2d, channels last in memory."""
    import torch

    features, dtype = row["shape"][-1], getattr(torch, row["dtype"])
    x, dy = (torch.randn(row["shape"]) for _ in range(2))
    x, dy = ((0.5 + 2 * x).to(device, dtype), dy.to(device, dtype))
    if x.ndim == 4:  # a view with the channels second, whose memory stays in the order channels last
        x, dy = x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)
    # PyTorch's momentum is the weight of the new value.
    norm = (torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm1d)(features, momentum=0.1, device=device)
    norm.train(row["pass"] != "eval")
    activate = torch.nn.functional.relu if row["activation"] == "relu" else lambda y: y

    @torch.no_grad()
    def forward():
        return activate(norm(x))

    def forward_and_backward():
        x.grad = norm.weight.grad = norm.bias.grad = None
        y = activate(norm(x))
        y.backward(dy)
        return y, x.grad, norm.weight.grad, norm.bias.grad

    if row["pass"] != "forward+backward":
        return forward
    x.requires_grad_()
    return forward_and_backward


def serve(questions: Iterable[str], answers: TextIO, *, at_least: float, together: int, device: str) -> None:
    """Answers until there are no more questions.

    Args:
      questions: lines; see the module.
      answers: where the lines go that answer them.
      at_least: see `timing.sampler`.
      together: see `timing.sampler`.
      device: PyTorch's name for it.
    """
    sample = None
    for line in questions:
        question, answer = json.loads(line), {}
        try:
            if question:
                call = layer_call(question, device)
                sample = timing.sampler(call, wait=_wait(device), at_least=at_least, together=together)
                sample()  # the first call allocates, and may fail
            else:
                answer = {"seconds": sample()}
        except (ImportError, RuntimeError, TypeError, AttributeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _wait(device):
    import torch

    return (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # the terminal sends it to all processes; the first one says so
        serve(sys.stdin, sys.stdout, **json.loads(sys.argv[1]))
