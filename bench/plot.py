"""Pictures of a result: speed-ups, a roofline, growth over a size, memory; each as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from .case import MODES
from .cases import FAMILIES
from .memory import Peak
from .results import OURS, CaseResult, Run

# Okabe and Ito's colours, told apart by every kind of eye; shapes differ as well.
STYLES = {
    "fusedseq": ("#0072B2", "o"),
    "torch": ("#000000", "s"),
    "cudnn": ("#000000", "s"),
    "onnxruntime": ("#E69F00", "D"),
    "stepwise": ("#009E73", "^"),
    "eager": ("#E69F00", "^"),
    "flex": ("#009E73", "D"),
    "compile": ("#CC79A7", "v"),
    "padded": ("#56B4E9", "P"),
    "frozen": ("#F0E442", "X"),
}
NAMES = {
    "padded": "fusedseq, padded",
    "frozen": "fusedseq, frozen",
    "compile": "torch.compile",
    "flex": "FlexAttention",
    "eager": "eager matmul, softmax, matmul",
    "cudnn": "torch (cuDNN)",
}
SLOWER = "#D55E00"
SETTINGS: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
# The most cases of one figure before its text becomes unreadable when the figure is shrunk to a page.
PER_FIGURE = 45


SIZES = {"T": "time steps T", "B": "batch B", "H": "hidden size H", "L": "queries and keys L"}


def plot(run: Run, folder: Path) -> list[Path]:
    """Draw what the result has data for; the files written."""
    return _save(figures(run), folder)


def plot_memory(run: Run, peaks: Sequence[Peak], folder: Path) -> list[Path]:
    """Draw peak memory over the length of the sequence; the files written."""
    return _save((("memory", memory(run, peaks)) for _ in range(1)), folder)


def _save(drawn: Iterable[tuple[str, Figure]], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with plt.rc_context(SETTINGS):
        for name, figure in drawn:
            for kind in ("png", "svg"):
                path = folder / f"{name}.{kind}"
                # Without the date a picture of the same data is the same file.
                figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
                written.append(path)
            plt.close(figure)
    return written


def figures(run: Run) -> Iterator[tuple[str, Figure]]:
    order = [(family, mode) for family in FAMILIES for mode in MODES]
    compared = [result for result in run.results if result.ratio(result.torch())]
    compared.sort(key=lambda result: order.index((result.case.family, result.case.mode)))
    pages = math.ceil(len(compared) / PER_FIGURE)
    per_page = math.ceil(len(compared) / pages) if pages else 0
    for page in range(pages):
        part = compared[page * per_page : (page + 1) * per_page]
        yield "speedup" + (f"-{page + 1}" if pages > 1 else ""), speedup(run, part)
    timed = [result for result in run.results if result.median(OURS) and result.peak]
    if timed:
        yield "roofline", roofline(run, timed)
    for variable in SIZES:
        grown = [result for result in timed if f"scaling-{variable}" in result.sets]
        if grown:
            yield f"scaling-{variable}", scaling(run, grown, variable)


def heading(figure: Figure, title: str, run: Run) -> None:
    """Title at the left edge, and the machine below it."""
    height = figure.get_size_inches()[1]
    figure.text(0.012, 1 - 0.1 / height, title, ha="left", va="top", fontsize=12, fontweight="bold")
    figure.text(0.012, 1 - 0.36 / height, run.title(), ha="left", va="top", fontsize=8, color="#555555")


def speedup(run: Run, results: Sequence[CaseResult]) -> Figure:
    """A bar per case from 1 to our speed-up over torch; marks where the other peers stand on the same scale."""
    height = 1.25 + 0.21 * len(results)
    figure, ax = plt.subplots(figsize=(9, height))
    peers = []
    values = [1.0]
    for row, result in enumerate(results):
        torch = result.torch()
        ours = result.ratio(torch) or 1.0
        values.append(ours)
        colour = STYLES[OURS][0] if ours >= 1 else SLOWER
        ax.barh(row, ours - 1, left=1, height=0.68, color=colour, zorder=2)
        for name, (mark, shape) in STYLES.items():
            ratio = result.ratio(name)
            if name in (OURS, torch) or ratio is None:
                continue
            # A peer that takes half of torch's time stands at 2.
            values.append(ours / ratio)
            peers.append(name)
            ax.plot(ours / ratio, row, shape, ms=4.5, mfc=mark, mec="white", mew=0.5, zorder=3)
        reached = result.of_peak()
        for x, text in ((1.06, f"{ours:.2f}"), (1.15, f"{100 * reached:.0f}%" if reached else "")):
            ax.text(x, row, text, transform=ax.get_yaxis_transform(), va="center", ha="right", fontsize=7.5)
    for x, text in ((1.06, "times"), (1.15, "of peak")):
        ax.text(x, -0.9, text, transform=ax.get_yaxis_transform(), va="center", ha="right", fontsize=7, color="#555555")
    ax.axvline(1, color="black", lw=1, zorder=4)
    ax.set_yticks(range(len(results)), [str(result.case) for result in results], fontsize=7.5)
    ax.set_ylim(len(results) - 0.4, -0.6)
    _log(ax, values)
    ax.grid(axis="x", color="#dddddd", lw=0.6, zorder=0)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("speed-up over torch eager (log scale; right is faster)")
    handles = [Line2D([], [], color=STYLES[OURS][0], lw=6, solid_capstyle="butt", label="fusedseq")]
    if min(result.ratio(result.torch()) or 1 for result in results) < 1:
        handles.append(Line2D([], [], color=SLOWER, lw=6, solid_capstyle="butt", label="fusedseq, slower than torch"))
    handles += [_mark(name) for name in STYLES if name in peers]
    figure.subplots_adjust(left=0.36, right=0.87, top=1 - 0.85 / height, bottom=0.5 / height)
    _legend(figure, handles, height)
    heading(figure, "Speed-up over torch", run)
    return figure


def roofline(run: Run, results: Sequence[CaseResult]) -> Figure:
    """Operations per second over operations per compulsory byte, below what the machine was measured to reach."""
    figure, ax = plt.subplots(figsize=(8.5, 6))
    # The figure is about one number of threads, the one with most cases.
    counts = [result.threads for result in results]
    threads = max(set(counts), key=lambda number: (counts.count(number), number))
    results = [result for result in results if result.threads == threads]
    ceiling = run.ceilings[str(threads)]
    shapes = {"inference": "o", "training": "s", "streaming": "^"}
    colours = {
        "LSTM": "#0072B2",
        "GRU": "#E69F00",
        "RNN": "#009E73",
        "attention": "#CC79A7",
        "TransformerEncoderLayer": "#D55E00",
        "MultiheadAttention": "#56B4E9",
    }
    xs, ys = [], []
    for result in results:
        x, y = result.operations / result.bytes, result.operations / (result.median(OURS) or math.inf)
        xs.append(x)
        ys.append(y)
        case = result.case
        face = colours[case.family.removesuffix("Cell")]
        hollow = case.family.endswith("Cell")
        ax.plot(
            x, y / 1e9, shapes[case.mode], ms=6, mfc="white" if hollow else face, mec=face, mew=1.2, zorder=3, alpha=0.9
        )
    left, right = min(xs) / 2, max(max(xs), 4 * ceiling["fma"] / ceiling["copy"]) * 2
    if ceiling["fma"]:
        _roof(ax, left, right, ceiling["fma"], ceiling["copy"], "-", "memory (copy)")
        _roof(ax, left, right, ceiling["fma"], ceiling["read"], "--", "L2 (read)")
        label = f"multiply-add peak {ceiling['fma'] / 1e9:.0f} GFLOP/s"
        ax.text(right, 1.06 * ceiling["fma"] / 1e9, label, ha="right", va="bottom", fontsize=8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(left, right)
    ax.set_ylim(min(ys) / 2e9, max(ceiling["fma"], max(ys)) / 1e9 * 2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.grid(color="#e5e5e5", lw=0.6, zorder=0)
    ax.set_xlabel("operations of the matrix products per compulsory byte [FLOP/byte]")
    ax.set_ylabel("reached by fusedseq [GFLOP/s]")
    present = {result.case.family.removesuffix("Cell") for result in results}
    handles = [
        Line2D([], [], marker="o", ls="", color=colours[name], label=name) for name in colours if name in present
    ]
    modes = {result.case.mode for result in results}
    handles += [
        Line2D([], [], marker=shapes[mode], ls="", mfc="#777777", mec="#777777", label=mode)
        for mode in shapes
        if mode in modes
    ]
    if any(result.case.family.endswith("Cell") for result in results):
        handles.append(Line2D([], [], marker="o", ls="", mfc="white", mec="#777777", label="a cell"))
    figure.subplots_adjust(left=0.1, right=0.97, top=1 - 0.85 / 6, bottom=0.1)
    _legend(figure, handles, 6)
    heading(figure, f"Roofline, {threads} thread{'' if threads == 1 else 's'}", run)
    return figure


def _roof(ax: Axes, left: float, right: float, peak: float, bandwidth: float, style: str, name: str) -> None:
    ridge = peak / bandwidth
    ax.plot(
        [left, ridge, right], [left * bandwidth / 1e9, peak / 1e9, peak / 1e9], style, color="black", lw=1.2, zorder=2
    )
    above, x = 1.2, left * 1.25
    # The text runs along the roof if, where axes were linear, it pointed away from the origin.
    angle = math.degrees(math.atan(above * bandwidth / 1e9))
    ax.text(
        x, above * x * bandwidth / 1e9, f"{name} {bandwidth / 1e9:.0f} GB/s", fontsize=8,
        rotation=angle, rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip


def scaling(run: Run, results: Sequence[CaseResult], variable: str) -> Figure:
    """Time over one size: a column per family, a row per mode, a line per peer."""

    def size(result: CaseResult) -> int:
        found: int = getattr(result.case, variable)
        return found

    families = list(dict.fromkeys(result.case.family for result in results))
    modes = list(dict.fromkeys(result.case.mode for result in results))
    height = 1.2 + 2.4 * len(modes)
    figure, grid = plt.subplots(
        len(modes), len(families), figsize=(1 + 2.9 * len(families), height), sharex=True, sharey="row", squeeze=False
    )
    drawn = []
    for row, mode in enumerate(modes):
        for column, family in enumerate(families):
            ax = grid[row][column]
            here = sorted((r for r in results if (r.case.mode, r.case.family) == (mode, family)), key=size)
            for name, (colour, shape) in STYLES.items():
                points = [(size(r), 1e3 * seconds) for r in here if (seconds := r.median(name))]
                if points:
                    drawn.append(name)
                    xs, ys = zip(*points, strict=True)
                    ax.plot(xs, ys, shape + "-", color=colour, ms=4, lw=1.5 if name == OURS else 1, label=name)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ticks = sorted({size(r) for r in results})
            ax.set_xticks(ticks, [f"{tick}" for tick in ticks], fontsize=7.5)
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.grid(color="#e5e5e5", lw=0.6)
            ax.set_title(f"{family} {mode}", fontsize=9, loc="left")
            if column == 0:
                ax.set_ylabel("ms per call")
            if row == len(modes) - 1:
                ax.set_xlabel(SIZES[variable])
    handles = [_mark(name, line="-") for name in STYLES if name in drawn]
    figure.subplots_adjust(left=0.085, right=0.985, top=1 - 1.0 / height, bottom=0.5 / height, hspace=0.28, wspace=0.08)
    _legend(figure, handles, height)
    fixed = {
        "T": "B{0.B} I{0.I} H{0.H}",
        "B": "T{0.T} I{0.I} H{0.H}",
        "H": "B{0.B} T{0.T}, I = H",
        "L": "B{0.B} H{0.H} E{0.E}",
    }[variable]
    heading(figure, f"Growth over {variable} ({fixed.format(results[0].case)})", run)
    return figure


def memory(run: Run, peaks: Sequence[Peak]) -> Figure:
    """Peak memory over L: a column for each dropout, a line per peer, beside lines of growth with L and with L^2."""
    measured = [one for one in peaks if one.bytes]
    found: list[tuple[float, int, str, float]] = []
    for one in measured:
        sizes = one.case.fields()
        found.append((sizes["dropout"], sizes["L"], one.peer, (one.bytes or 0) / 1e6))
    dropouts = sorted({dropout for dropout, *_ in found})
    height = 4.6
    width = 1.2 + 3.9 * len(dropouts)
    figure, grid = plt.subplots(1, len(dropouts), figsize=(width, height), sharey=True, squeeze=False)
    drawn = []
    for ax, dropout in zip(grid[0], dropouts, strict=True):
        here = [(L, peer, megabytes) for one, L, peer, megabytes in found if one == dropout]
        lengths = sorted({L for L, _, _ in here})
        for name, (colour, shape) in STYLES.items():
            points = sorted((L, megabytes) for L, peer, megabytes in here if peer == name)
            if not points:
                continue
            drawn.append(name)
            xs, ys = zip(*points, strict=True)
            ax.plot(xs, ys, shape + "-", color=colour, ms=4, lw=1.5 if name == OURS else 1, zorder=3)
        longest = [megabytes for L, _, megabytes in here if lengths[-1] == L]
        for power, anchor in ((1, min(longest)), (2, max(longest))):
            ends = [anchor * (L / lengths[-1]) ** power for L in (lengths[0], lengths[-1])]
            ax.plot([lengths[0], lengths[-1]], ends, ":", color="#888888", lw=1, zorder=1)
            label = "~ L" if power == 1 else "~ L\u00b2"
            ax.annotate(
                label, (lengths[0], ends[0]), xytext=(14, -6), textcoords="offset points", fontsize=8, color="#555555"
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(lengths, [f"{L}" for L in lengths], fontsize=7.5)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.grid(color="#e5e5e5", lw=0.6)
        ax.set_title(f"dropout {dropout:g}" if dropout else "no dropout", fontsize=9, loc="left")
        ax.set_xlabel(SIZES["L"])
    grid[0][0].set_ylabel("MB")
    figure.subplots_adjust(left=0.75 / width, right=0.985, top=1 - 1.0 / height, bottom=0.5 / height, wspace=0.08)
    _legend(figure, [_mark(name, line="-") for name in STYLES if name in drawn], height)
    case = measured[0].case
    given = " ".join(f"{name}{case.fields()[name]}" for name in ("B", "H", "E", "d") if name in case.fields())
    heading(figure, f"Peak memory beyond the inputs: {case.family} {case.mode} ({given})", run)
    return figure


def _mark(name: str, line: str = "") -> Line2D:
    colour, shape = STYLES[name]
    return Line2D([], [], color=colour, marker=shape, ls=line, ms=5, label=NAMES.get(name, name))


def _legend(figure: Figure, handles: list[Line2D], height: float) -> None:
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.012, 1 - 0.5 / height), ncols=len(handles), frameon=False,
        fontsize=8, handletextpad=0.6, columnspacing=1.4, handlelength=1.2, borderaxespad=0,
    )  # fmt: skip


def _log(ax: Axes, values: Sequence[float]) -> None:
    """A log axis over the values, with ticks at 1, 2, 5 and their tenfolds as plain numbers."""
    ax.set_xscale("log")
    low, high = min(values) / 1.12, max(values) * 1.12
    ax.set_xlim(low, high)
    ticks = [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
