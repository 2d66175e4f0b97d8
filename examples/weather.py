"""The series that the forecasters learn: hourly weather at JFK airport, 2013 (source and licence: data/README.md).

The task: from the last `window` hours, the temperature of each of the next `horizon` hours.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CSV = Path(__file__).parent / "data" / "jfk_weather_2013.csv"
SPLIT = (0.70, 0.15)  # of the year, in order of time: training, validation; the rest is the test


@dataclass
class Windows:
    """One part of the year: inputs, targets, and when each forecast was made."""

    x: Tensor  # [N, window, features], normalised
    y: Tensor  # [N, horizon]: temperature less that at the time of the forecast, in training standard deviations
    last: np.ndarray  # [N]: temperature at the time of the forecast, °C
    truth: np.ndarray  # [N, horizon]: °C
    yesterday: np.ndarray  # [N, horizon]: the temperature 24 hours before each target hour, °C
    hours: np.ndarray  # [N]: time of the first target hour, UTC


@dataclass
class Weather:
    train: Windows
    validation: Windows
    test: Windows
    scale: float  # °C for one unit of y
    features: int


def read() -> tuple[np.ndarray, np.ndarray]:
    """Every hour of the year and its columns (temp, dewpoint, pressure, wind east, wind north), gaps filled."""
    table = np.genfromtxt(CSV, delimiter=",", names=True, dtype=None, encoding="utf-8")
    seen = table["time"].astype("datetime64[h]")
    hours = np.arange(seen[0], seen[-1] + 1)
    angle = np.deg2rad(table["direction"])
    calm = table["wind"] == 0
    columns = [
        table["temp"],
        table["dewpoint"],
        table["pressure"],
        np.where(calm, 0.0, table["wind"] * np.sin(angle)),
        np.where(calm, 0.0, table["wind"] * np.cos(angle)),
    ]
    known = [np.isfinite(column) for column in columns]
    at = hours.astype(float)
    filled = [np.interp(at, seen[k].astype(float), column[k]) for column, k in zip(columns, known, strict=True)]
    return hours, np.stack(filled, axis=1)


def load(window: int = 72, horizon: int = 24) -> Weather:
    """Splits the year by time; no window and no target of one part reaches into another."""
    if horizon > 24 or window < 24:
        raise ValueError(f"window must be at least 24 and horizon at most 24 hours, got {window} and {horizon}")
    hours, columns = read()
    temperature = columns[:, 0]
    day, year = (hours.astype(int) / period * 2 * np.pi for period in (24, 24 * 365.25))
    clock = np.stack([np.sin(day), np.cos(day), np.sin(year), np.cos(year)], axis=1)
    features = np.concatenate([columns, clock], axis=1)

    first, second = int(len(hours) * SPLIT[0]), int(len(hours) * (SPLIT[0] + SPLIT[1]))
    mean, std = features[:first].mean(0), features[:first].std(0)  # of the training part only
    normal = ((features - mean) / std).astype(np.float32)

    def part(start: int, stop: int) -> Windows:
        made = np.arange(start + window, stop - horizon + 1)  # index of the first target hour
        ahead = made[:, None] + np.arange(horizon)
        last, truth = temperature[made - 1], temperature[ahead]
        return Windows(
            x=torch.from_numpy(normal[made[:, None] + np.arange(-window, 0)]),
            y=torch.from_numpy(((truth - last[:, None]) / std[0]).astype(np.float32)),
            last=last,
            truth=truth,
            yesterday=temperature[ahead - 24],
            hours=hours[made],
        )

    parts = part(0, first), part(first, second), part(second, len(hours))
    return Weather(*parts, scale=float(std[0]), features=features.shape[1])
