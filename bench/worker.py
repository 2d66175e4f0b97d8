"""Times fusedseq in a process of its own, on request: the other end of `revisions.Worker`.

The benchmarks are this version's whatever the revision of fusedseq, so that both sides of a comparison run the same
code around the kernels. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from .case import Case
from .parity import Gate
from .peers import build
from .timing import SHORT, timed
from .work import Refusal, Runner, make


class Server:
    def __init__(self) -> None:
        self.runner: Runner | None = None
        self.once = 0.0

    def prepare(self, case: dict[str, Any], threads: int) -> dict[str, Any]:
        """Build a case and check it; how long one call takes."""
        self.runner = None
        torch.set_num_threads(threads)
        work = make(Case.of(case))
        mine = build("fusedseq", work)
        if isinstance(mine, Refusal):
            return {"wrong": mine.reason}
        verdict = Gate(mine.judged_by or work).judge(mine.results())
        timed(mine.call, 1, turn=mine.turn)
        self.runner, self.once = mine, timed(mine.call, 1, turn=mine.turn)
        return {"wrong": verdict.wrong, "once": self.once}

    def time(self, calls: int) -> dict[str, Any]:
        """Seconds of one call, in one turn."""
        assert self.runner is not None, "no case has been prepared"
        if self.once < SHORT:
            timed(self.runner.call, 1, turn=self.runner.turn)
        return {"seconds": timed(self.runner.call, calls, turn=self.runner.turn)}


def main() -> None:
    # Answers go through the pipe that was standard output; whatever prints from here on goes to the error stream.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:  # the other end decides what to do about it
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
