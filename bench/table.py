"""The table that every introduction to this field shows, measured: model x training samples/s x peak memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import fusedseq
from fusedseq.testing.compare import judge

from . import gpu, memory
from .timing import Timing, interleave
from .transformer_work import without_dropout

LIBRARIES: dict[str, ModuleType] = {"torch": nn, "fusedseq": fusedseq}
WATCHED_SECONDS = 1.0


@dataclass(frozen=True)
class Sizes:
    """The shape of the task: sequences of T steps with I features, and one number to predict from each."""

    B: int = 64
    T: int = 96
    I: int = 8
    H: int = 128
    layers: int = 2
    steps: int = 5  # training steps over which the peak memory is taken
    device: str = "cpu"

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} I{self.I} H{self.H} L{self.layers}"


class Recurrent(nn.Module):
    def __init__(self, backbone: nn.Module, H: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, I] -> [B, 1]
        y: Tensor = self.backbone(x)[0]
        return self.head(y[:, -1])


def _recurrent(name: str) -> Callable[[ModuleType, Sizes], nn.Module]:
    def build(library: ModuleType, sizes: Sizes) -> nn.Module:
        backbone = getattr(library, name)(sizes.I, sizes.H, num_layers=sizes.layers, batch_first=True)
        return Recurrent(backbone, sizes.H)

    return build


HEADS = 4
DROPOUT = 0.1


class Encoder(nn.Module):
    """Positions are learned; the last place speaks for the sequence, as in the recurrent rows."""

    def __init__(self, library: ModuleType, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Linear(sizes.I, sizes.H)
        self.positions = nn.Parameter(0.02 * torch.randn(sizes.T, sizes.H))
        # GELU, as ReLU's kink turns a rounding error into another gradient, and parity could not be judged.
        layer = library.TransformerEncoderLayer(sizes.H, HEADS, 4 * sizes.H, DROPOUT, "gelu", batch_first=True)
        self.backbone = library.TransformerEncoder(layer, sizes.layers)
        self.head = nn.Linear(sizes.H, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, I] -> [B, 1]
        y: Tensor = self.backbone(self.embed(x) + self.positions)
        return self.head(y[:, -1])


# A row of the table: a function of the library, torch.nn or fusedseq, and the sizes that gives a module from [B, T, I]
# to [B, 1]. Both libraries' modules must have the same parameters.
MODELS: dict[str, Callable[[ModuleType, Sizes], nn.Module]] = {
    "RNN": _recurrent("RNN"),
    "GRU": _recurrent("GRU"),
    "LSTM": _recurrent("LSTM"),
    "Transformer": Encoder,
}


@dataclass
class Entry:
    """One library's half of a row."""

    samples_per_second: float
    spread: float
    peak_bytes: int
    gpu: dict[str, float] = field(default_factory=dict)


@dataclass
class Row:
    model: str
    parameters: int
    entries: dict[str, Entry]
    wrong: str | None = None  # both libraries trained, but not to the same numbers

    @property
    def faster(self) -> float:
        return self.entries["fusedseq"].samples_per_second / self.entries["torch"].samples_per_second

    @property
    def memory(self) -> float:
        """Ours over torch.nn's."""
        return self.entries["fusedseq"].peak_bytes / max(1, self.entries["torch"].peak_bytes)

    def as_json(self) -> dict[str, Any]:
        ratios = {"faster": self.faster, "memory": self.memory} if self.entries else {}
        return asdict(self) | ratios


class Training:
    """One model of one library with its data and optimizer; `step` is one training step."""

    def __init__(self, model: str, library: str, sizes: Sizes, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        # Drawn in float32, so that every dtype is given the same values.
        self.x = torch.randn(sizes.B, sizes.T, sizes.I, generator=generator).to(sizes.device, dtype)
        self.target = torch.randn(sizes.B, 1, generator=generator).to(sizes.device, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = MODELS[model](LIBRARIES[library], sizes).to(sizes.device, dtype)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)

    def _loss(self, module: nn.Module) -> Tensor:
        return nn.functional.mse_loss(module(self.x), self.target)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self._loss(self.module).backward()
        self.optimizer.step()

    def outcome(self) -> dict[str, Tensor]:
        """Loss and gradients without dropout, whose random numbers differ between the libraries."""
        module = without_dropout(self.module)
        parameters = dict(module.named_parameters())
        loss = self._loss(module)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        found = {"d" + name: g for name, g in zip(parameters, gradients, strict=True)}
        return {name: t.detach().cpu() for name, t in {"loss": loss, **found}.items()}


def parity(model: str, sizes: Sizes) -> str | None:
    """What of loss and gradients differs by more than rounding; None if nothing does."""
    truth = Training(model, "torch", sizes, torch.float64).outcome()
    yardstick = Training(model, "torch", sizes).outcome()
    outcome = Training(model, "fusedseq", sizes).outcome()
    errors = judge(outcome, truth, yardstick, torch.float32, terms=sizes.B * sizes.T)
    return "; ".join(str(error) for error in errors if not error.ok) or None


def speeds(model: str, sizes: Sizes, budget: float) -> dict[str, Timing]:
    steps = {library: Training(model, library, sizes).step for library in LIBRARIES}
    return interleave(steps, budget, finish=torch.cuda.synchronize if sizes.device == "cuda" else None)


def peak(model: str, library: str, sizes: Sizes) -> int:
    """Bytes by which training grows a fresh process."""
    request = {"model": model, "library": library, "threads": torch.get_num_threads(), **asdict(sizes)}
    return memory.fresh(__name__, "measure", request, f"{model} ({library})")


def measure(request: str) -> None:
    """Runs in a process of its own; prints the growth."""
    values = json.loads(request)
    model, library = values.pop("model"), values.pop("library")
    torch.set_num_threads(values.pop("threads"))
    sizes = Sizes(**values)
    # Code and tables that are loaded at first use are not what the table is about.
    Training(model, library, Sizes(B=2, T=2, I=2, H=8, layers=1, device=sizes.device)).step()
    training = Training(model, library, sizes)

    def work() -> None:
        for _ in range(sizes.steps):
            training.step()

    print(memory.growth(work, sizes.device)[0])


def watch(model: str, sizes: Sizes) -> Iterator[tuple[str, dict[str, float]]]:
    """What a GPU did while each library trained; nothing where it cannot be asked."""
    nvml, _ = gpu.load()
    if sizes.device != "cuda" or nvml is None:
        return
    for library in LIBRARIES:
        training = Training(model, library, sizes)
        training.step()
        with gpu.Watch(nvml, torch.cuda.current_device()) as watched:
            end = time.perf_counter() + WATCHED_SECONDS
            while time.perf_counter() < end:
                training.step()
                torch.cuda.synchronize()
        yield library, watched.summary()


def rows(models: Sequence[str], sizes: Sizes, budget: float, told: Callable[[str], None]) -> Iterator[Row]:
    for model in models:
        told(f"{model}: parity")
        count = sum(p.numel() for p in Training(model, "torch", sizes).module.parameters())
        wrong = parity(model, sizes)
        if wrong is not None:
            yield Row(model, count, {}, wrong)
            continue
        told(f"{model}: speed")
        timings = speeds(model, sizes, budget)
        told(f"{model}: memory")
        watched = dict(watch(model, sizes))
        entries = {
            library: Entry(
                sizes.B / timing.median, timing.spread, peak(model, library, sizes), watched.get(library, {})
            )
            for library, timing in timings.items()
        }
        yield Row(model, count, entries)
