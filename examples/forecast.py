"""Forecasts tomorrow's temperature with recurrent and attentive networks: torch's and fusedseq's, side by side.

    python examples/forecast.py                                  # six networks, each twice; about three minutes
    python examples/forecast.py --model lstm --module fusedseq   # one of them
    python examples/forecast.py --model longformer --window 336  # two weeks of hours, where the window pays

Each (model, module) trains in a process of its own, so that the memory of one is not counted for the next. Writes
out/forecast.png and out/forecast.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import weather
from backbones import MODELS, RECURRENT, backbone

MODULES = ("torch", "fusedseq")


class Forecaster(nn.Module):
    """A backbone, its output at the last step, a linear head."""

    def __init__(self, backbone: nn.Module, hidden: int, horizon: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden, horizon)

    def forward(self, x: Tensor) -> Tensor:  # [B, window, features] -> [B, horizon]
        return self.head(self.backbone(x)[:, -1])


def title(model: str) -> str:
    return model.upper() if model in RECURRENT else model.capitalize()


def peak_memory() -> float:
    """The most memory this process has ever held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)


@torch.no_grad()
def predict(forecaster: Forecaster, part: weather.Windows, scale: float) -> np.ndarray:
    forecaster.eval()
    steps = torch.cat([forecaster(x) for x in part.x.split(256)])
    return part.last[:, None] + scale * steps.numpy()


def mae(forecast: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(forecast - truth).mean())


def rmse(forecast: np.ndarray, truth: np.ndarray) -> float:
    return float(np.sqrt(np.square(forecast - truth).mean()))


def train(options: argparse.Namespace, model: str, module: str) -> dict:
    """One row of the table. Keeps the weights of the epoch with the smallest validation error."""
    data = weather.load(options.window, options.horizon)
    torch.manual_seed(options.seed)
    hidden = options.hidden or (128 if model in RECURRENT else 64)
    rate = options.rate or (3e-3 if model in RECURRENT else 1e-3)
    layers = backbone(model, module, data.features, hidden, options.layers, options.dropout)
    forecaster = Forecaster(layers, hidden, options.horizon)
    optimizer = torch.optim.AdamW(forecaster.parameters(), lr=rate, weight_decay=1e-2)
    per_epoch = len(data.train.x) // options.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=options.epochs * per_epoch)

    before = peak_memory()
    losses, seconds, validation = [], [], []
    best: tuple[float, dict[str, Tensor]] = (float("inf"), {})
    bar = tqdm(total=options.epochs * per_epoch, desc=f"{title(model):11} {module:8}", unit="step", mininterval=0.2)
    for _ in range(options.epochs):
        order = torch.randperm(len(data.train.x))
        forecaster.train()
        start = time.perf_counter()
        for step in range(per_epoch):
            rows = order[step * options.batch : (step + 1) * options.batch]
            loss = nn.functional.l1_loss(forecaster(data.train.x[rows]), data.train.y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(forecaster.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"{module} {model}: the loss is {losses[-1]} at step {len(losses)}")
            bar.update()
        seconds.append(time.perf_counter() - start)
        validation.append(mae(predict(forecaster, data.validation, data.scale), data.validation.truth))
        bar.set_postfix_str(f"validation error {validation[-1]:.2f} °C")
        if validation[-1] < best[0]:
            best = validation[-1], {name: value.clone() for name, value in forecaster.state_dict().items()}
    bar.close()
    added = peak_memory() - before

    forecaster.load_state_dict(best[1])
    forecast = predict(forecaster, data.test, data.scale)
    return {
        "model": title(model),
        "module": module,
        "mae": mae(forecast, data.test.truth),
        "rmse": rmse(forecast, data.test.truth),
        "samples_per_s": per_epoch * options.batch / statistics.median(seconds),
        "memory_mb": added,
        "validation": validation,
        "losses": losses,
        "forecast": forecast.round(3).tolist(),
    }


def baselines(test: weather.Windows) -> list[dict]:
    naive = {"as it is now": np.broadcast_to(test.last[:, None], test.truth.shape), "as yesterday": test.yesterday}
    return [
        {"model": name, "module": "naive", "mae": mae(f, test.truth), "rmse": rmse(f, test.truth), "forecast": f}
        for name, f in naive.items()
    ]


def show_table(rows: list[dict]) -> None:
    print(f"\n{'model':<13} {'module':<9} {'MAE °C':>7} {'RMSE °C':>8} {'samples/s':>10} {'memory MB':>10}")
    for row in rows:
        line = f"{row['model']:<13} {row['module']:<9} {row['mae']:>7.2f} {row['rmse']:>8.2f}"
        print(line + (f" {row['samples_per_s']:>10,.0f} {row['memory_mb']:>10.0f}" if "losses" in row else ""))
    print(
        "MAE, RMSE: test part, mean over the 24 hours ahead. samples/s: training windows, median epoch of this one run"
    )
    print("(`make bench` times both side by side). memory: what training adds to the process's peak resident size.")
    if any(row["model"] == "Longformer" and row["module"] == "torch" for row in rows):
        print("torch has no Longformer: that row computes the same through a table of window x window.")


def losses_agree(rows: list[dict], early: int = 50) -> bool:
    """Same seed, same batches: the losses must be the same up to rounding, which training slowly amplifies."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        if "losses" in row:
            pairs.setdefault(row["model"], {})[row["module"]] = np.array(row["losses"])
    pairs = {model: pair for model, pair in pairs.items() if len(pair) == 2}
    if pairs:
        print(f"\nTraining loss, torch beside fusedseq (largest relative difference; first {early} steps, all steps):")
    agree = True
    for model, pair in pairs.items():
        a, b = pair["torch"], pair["fusedseq"]
        gap = np.abs(a - b) / a
        same = bool(gap[:early].max() < 1e-3)
        agree &= same
        ends = f"first {a[0]:.6f} {b[0]:.6f}   last {a[-1]:.6f} {b[-1]:.6f}"
        print(f"{model:<11} {ends}   {gap[:early].max():.1e} {gap.max():.1e}   {'agree' if same else 'DIFFER'}")
    return agree


def draw(rows: list[dict], test: weather.Windows, path: Path, days: int = 10) -> None:
    """Above, forecasts made at each midnight UTC joined to one line; below, how the error grows with lead time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.dates
    import matplotlib.pyplot as plt

    horizon = test.truth.shape[1]
    midnight = np.flatnonzero(test.hours.astype("datetime64[h]").astype(int) % 24 == 0)[-days - 1 : -1]
    hours = (test.hours[midnight][:, None] + np.arange(horizon)).ravel()
    hues = ("tab:green", "tab:blue", "tab:orange", "tab:red", "tab:purple", "tab:brown")
    colours = dict(zip(map(title, MODELS), hues, strict=True))
    made_by = "fusedseq" if any(row["module"] == "fusedseq" for row in rows) else "torch"
    shown = [row for row in rows if row["module"] in ("naive", made_by)]

    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 8.5), layout="constrained", height_ratios=[3, 2])
    above.plot(hours, test.truth[midnight].ravel(), color="black", linewidth=2, label="observed")
    lead = np.arange(1, horizon + 1)
    for row in shown:
        forecast = np.asarray(row["forecast"])
        error = np.abs(forecast - test.truth).mean(0)
        if row["module"] == "naive":
            style = {"color": "0.55", "linestyle": "--" if row["model"] == "as yesterday" else ":", "linewidth": 1.4}
            label = f"naive: {row['model']}"
        else:
            recurrent = row["model"].lower() in RECURRENT
            style = {"color": colours[row["model"]], "linewidth": 1.3, "linestyle": "-" if recurrent else (0, (5, 1))}
            label = row["model"]
        if row["model"] != "as it is now":
            above.plot(hours, forecast[midnight].ravel(), label=label, **style)
        below.plot(lead, error, label=f"{label} ({row['mae']:.2f})", **style)
    for time_made in test.hours[midnight]:
        above.axvline(time_made, color="0.9", linewidth=1, zorder=0)
    above.set_title(f"Temperature at JFK airport: {made_by}'s networks forecast the next 24 hours every midnight (UTC)")
    above.set_ylabel("air temperature in °C")
    above.set_xlabel("2013, UTC; a grey line where a forecast starts")
    above.xaxis.set_major_locator(matplotlib.dates.DayLocator())
    above.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%-d %b"))
    above.margins(x=0.01)
    above.legend(ncols=5, loc="upper center", frameon=False)
    low, high = above.get_ylim()
    above.set_ylim(low, high + 0.12 * (high - low))  # room for the legend
    below.set_title(f"Error on the whole test part ({len(test.truth):,} forecasts; in brackets the mean in °C)")
    below.set_xlabel("hours ahead")
    below.set_ylabel("mean absolute error in °C")
    below.set_xticks(range(0, horizon + 1, 3))
    below.set_ylim(bottom=0)
    below.margins(x=0.01)
    below.grid(color="0.9")
    below.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))  # the lines fill the axes
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--module", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument("--window", type=int, default=72, help="hours the forecaster sees (default: 72)")
    parser.add_argument("--horizon", type=int, default=24, help="hours it forecasts, at most 24 (default: 24)")
    parser.add_argument("--hidden", type=int, help="channels (default: 128, with attention 64)")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0, help="(default: 0); each module draws its own")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, help="largest learning rate (default: 0.003, with attention 0.001)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)  # a child: train one, print JSON
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.row:
        print(json.dumps(train(options, options.model[0], options.module[0])))
        return 0
    test = weather.load(options.window, options.horizon).test
    rows = baselines(test)
    for model in options.model:
        for module in options.module:
            # argparse keeps the last value of an option, so a child is this very call, narrowed to one row
            narrowed = [*sys.argv[1:], "--row", "--model", model, "--module", module]
            child = subprocess.run([sys.executable, __file__, *narrowed], stdout=subprocess.PIPE, check=True)
            rows.append(json.loads(child.stdout.splitlines()[-1]))
    show_table(rows)
    agree = options.dropout > 0 or losses_agree(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(rows, test, options.out / "forecast.png")
    trained = [{key: value for key, value in row.items() if key != "forecast"} for row in rows]
    (options.out / "forecast.json").write_text(json.dumps(trained, indent=1))
    print(f"\nwrote {options.out / 'forecast.png'} and {options.out / 'forecast.json'}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
