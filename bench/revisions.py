"""Two revisions of fusedseq, built apart and timed in turns, A B A B, so that drift of the machine strikes both."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fusedseq

from .case import Case
from .results import OURS, CaseResult, PeerResult
from .timing import PAUSE, plan, summary

HERE = Path(__file__).resolve().parent
# The installed package, as it is.
CURRENT = "."
# Loads this folder as a package of another name, beside whatever benchmarks the revision has.
BOOT = """
import importlib.util, sys
name, folder = "fusedseq_bench", sys.argv[1]
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
importlib.import_module(name + ".worker").main()
"""


class RevisionError(Exception):
    """A revision that cannot be found, built or run."""


def _command(arguments: Sequence[str], cwd: Path, what: str, **environment: str) -> str:
    try:
        done = subprocess.run(
            arguments, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise RevisionError(f"{what}: {arguments[0]} is not installed") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RevisionError(f"{what}: {last}")
    return done.stdout.strip()


def repository() -> Path:
    """The checkout that holds these benchmarks, or else the one that the command is called in."""
    for folder in (HERE, Path.cwd()):
        with contextlib.suppress(RevisionError):
            return Path(_command(["git", "rev-parse", "--show-toplevel"], folder, "git"))
    raise RevisionError("comparing revisions needs a git checkout of fusedseq; there is none here")


def resolve(name: str) -> str:
    """The commit of a revision; `.` stays what it is."""
    if name == CURRENT:
        return name
    root = repository()
    try:
        return _command(["git", "rev-parse", "--verify", "--quiet", name + "^{commit}"], root, "git")
    except RevisionError:
        raise RevisionError(f"A and B: expected a result or a git revision, got {name!r}") from None


@contextlib.contextmanager
def built(commits: Sequence[str], told: Callable[[str], None]) -> Iterator[dict[str, Path]]:
    """A folder to import fusedseq from for each commit; gone again at the end."""
    places = {CURRENT: Path(fusedseq.__file__).resolve().parent.parent}
    root = repository() if set(commits) != {CURRENT} else HERE
    trees: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="fusedseq-compare-") as scratch:
        try:
            for commit in dict.fromkeys(commits):
                if commit == CURRENT:
                    continue
                told(f"building {commit[:10]}")
                tree, site = Path(scratch, f"tree-{commit}"), Path(scratch, f"site-{commit}")
                _command(["git", "worktree", "add", "--detach", str(tree), commit], root, f"checking out {commit[:10]}")
                trees.append(tree)
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
                pip += ["--no-build-isolation", "--target", str(site), str(tree)]
                # The core is what is compared: an install without it must not pass for one.
                _command(pip, Path(scratch), f"building {commit[:10]}", FUSEDSEQ_REQUIRE_CORE="1")
                places[commit] = site
            yield {commit: places[commit] for commit in commits}
        finally:
            for tree in trees:
                with contextlib.suppress(RevisionError):
                    _command(["git", "worktree", "remove", "--force", str(tree)], root, "git")


class Worker:
    """One revision in a process of its own."""

    def __init__(self, name: str, site: Path) -> None:
        self.name = name
        # Python looks for modules in the folder that it starts in, so that is one of its own.
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name, "log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(HERE)], env={**os.environ, "PYTHONPATH": str(site)}, text=True,
                cwd=self._folder.name, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            lines = self._log.read_text().strip().splitlines() or [f"exit status {self._process.returncode}"]
            raise RevisionError(f"the benchmarks do not run on {self.name}: {lines[-1]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()


def measure(
    sites: Sequence[tuple[str, Path]], cases: Mapping[Case, Sequence[str]], budget: float, told: Callable[[str], None]
) -> Iterator[tuple[CaseResult, CaseResult]]:
    """For every case the results of the two revisions, whose names and places `sites` holds."""
    workers = [Worker(name, site) for name, site in sites]
    try:
        for case, sets in cases.items():
            told(str(case))
            threads = case.threads or torch.get_num_threads()
            ready = {i: worker.ask("prepare", case=case.fields(), threads=threads) for i, worker in enumerate(workers)}
            peers = _in_turns(workers, ready, budget)
            first, second = (
                CaseResult(case, list(sets), threads, {OURS: peer}, "", case.operations(), case.compulsory_bytes())
                for peer in peers
            )
            yield first, second
    finally:
        for worker in workers:
            worker.close()


def _in_turns(workers: Sequence[Worker], ready: Mapping[int, dict[str, Any]], budget: float) -> list[PeerResult]:
    reasons = {i: answer.get("failed") or answer.get("wrong") for i, answer in ready.items()}
    if any(reasons.values()):
        # A time without one to set it against says nothing.
        return [
            PeerResult("wrong" if why else "refused", reason=why or "the other is wrong") for why in reasons.values()
        ]
    rounds, calls = plan({str(i): answer["once"] for i, answer in ready.items()}, budget)
    samples: list[list[float]] = [[] for _ in workers]
    for _ in range(rounds):
        for i, worker in enumerate(workers):
            # The threads of the other process still spin for a moment.
            time.sleep(PAUSE)
            answer = worker.ask("time", calls=calls[str(i)])
            if "failed" in answer:
                raise RevisionError(f"{worker.name}: {answer['failed']}")
            samples[i].append(answer["seconds"])
    return [PeerResult.of(summary(taken), 0.0) for taken in samples]
