"""What a case is to everything that runs, prints, draws or compares one; the kinds of cases say the rest.

A kind is three modules: `<kind>_cases.py` (sizes, operations and bytes, nothing heavy), `<kind>_work.py` (the tensors,
the truth, how a result is judged) and `<kind>_peers.py` (who runs it).
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

# Streaming is inference one step at a time, the state carried from call to call.
MODES = ("inference", "training", "streaming")
DTYPES = ("float32", "float64", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# Beyond either, a call takes seconds on two cores: the operations, and the bytes of weights read again at every step.
# Such a case is meant for a GPU and is not run on a CPU unless asked for.
LARGE_OPERATIONS = 3e11
LARGE_TRAFFIC = 5e10

KINDS: dict[str, type[Case]] = {}


@dataclass(frozen=True)
class Case(ABC):
    """One thing to time."""

    kind: ClassVar[str]
    # What results on a GPU call torch's own implementation.
    native_gpu: ClassVar[str] = "torch"

    family: str
    mode: str
    dtype: str = field(default="float32", kw_only=True)
    device: str = field(default="cpu", kw_only=True)
    threads: int = field(default=0, kw_only=True)  # 0: torch's choice

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind
        KINDS[kind] = cls

    @abstractmethod
    def sizes(self) -> list[str]:
        """The words between mode and dtype that tell the case from others."""

    @abstractmethod
    def operations(self) -> int:
        """Floating-point operations of the matrix products that no implementation can leave out."""

    @abstractmethod
    def compulsory_bytes(self) -> int:
        """What every implementation reads or writes once: input, output, weights; in training their gradients too."""

    def traffic(self) -> float:
        """Bytes that are read again and again."""
        return 0.0

    @abstractmethod
    def tiny(self) -> Case:
        """A case of the same code paths that takes no time or memory."""

    @property
    def large(self) -> bool:
        return self.operations() > LARGE_OPERATIONS or self.traffic() > LARGE_TRAFFIC

    def __str__(self) -> str:
        words = [
            self.family,
            self.mode,
            *self.sizes(),
            "" if self.dtype == "float32" else self.dtype,
            "" if self.device == "cpu" else self.device,
            f"threads{self.threads}" if self.threads else "",
        ]
        return " ".join(word for word in words if word)

    @staticmethod
    def of(values: dict[str, Any]) -> Case:
        """The case of a mapping such as `fields` makes; what else is in the mapping is left alone."""
        kind = values.get("kind", "rnn")  # results from before there were kinds do not name theirs
        importlib.import_module(f".{kind}_cases", __package__)
        cls = KINDS[kind]
        return cls(**{one.name: values[one.name] for one in dataclasses.fields(cls) if one.name in values})

    def fields(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def but(self, **changes: Any) -> Self:
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Goal:
    """How many times faster than the best peer a set is to be, as a geometric mean over its cases.

    With `unit` the goal is in multiples of what that gives for a case, and `unit_name` says so.
    """

    inference: float | None = None
    training: float | None = None
    unit: Callable[[Any], float] = lambda case: 1.0
    unit_name: str = ""

    def of(self, mode: str) -> float | None:
        return {"inference": self.inference, "training": self.training}.get(mode)


@dataclass(frozen=True)
class Set:
    about: str
    make: Callable[[], Iterable[Case]]
    dtype: str | None = None  # of all its cases, whatever dtype is asked for
    goal: Goal | None = None
