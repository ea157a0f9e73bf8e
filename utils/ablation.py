"""What an ablation found: runs as CSV, their means as a Markdown table, and a plot."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _ROW, _LEFT, _TOP = 900, 44, 250, 56  # of the plot, in pixels
_INK, _FAINT, _POINT, _MEAN = "#202020", "#d8d8d8", "#7aa6d8", "#c0392b"


@dataclass(frozen=True)
class Result:
    """One finished run.

    row: its name in the table. top1, loss: of the validation after the last epoch. rates, fresh:
    how often the selected quadrant of each block holds the digit's centre after and before
    training, as of `views.centre_rates`. made_with: settings, device and versions.
    """

    row: str
    seed: int
    top1: float
    loss: float
    params: int
    gmacs: float
    seconds: float
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    fresh: dict[str, dict[str, float]] = field(default_factory=dict)
    made_with: dict[str, object] = field(default_factory=dict)


def rows_of(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each row, rows and seeds in the order of their first appearance."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return rows


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """One line for each run; the rate of each block in a column of its own."""
    blocks = list(dict.fromkeys(name for result in results for name in result.rates))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f"centre in the selected quadrant, {name}" for name in blocks]
        writer.writerow(["row", "seed", "top1", "loss", "params", "gmacs", "seconds", *names])
        for run in results:
            rates = [f"{run.rates[b]['rate']:.4f}" if b in run.rates else "" for b in blocks]
            values = [f"{run.top1:.2f}", f"{run.loss:.4f}", run.params, f"{run.gmacs:.4f}"]
            writer.writerow([run.row, run.seed, *values, f"{run.seconds:.0f}", *rates])


def markdown(title: str, results: Sequence[Result]) -> str:
    """Two tables: accuracy as mean ± standard deviation over seeds, and the rates of the blocks."""
    lines = [f"## {title}", "", "| row | top-1, % | seeds | parameters, M | multiply-adds, G |"]
    lines.append("|---|---|---|---|---|")
    rows = rows_of(results)
    for name, runs in rows.items():
        accuracy = spread([run.top1 for run in runs])
        size = f"{runs[0].params / 1e6:.2f} | {runs[0].gmacs:.3f}"
        lines.append(f"| {name} | {accuracy} | {len(runs)} | {size} |")
    blocks = list(dict.fromkeys(block for run in results for block in run.rates))
    if blocks:
        lines += ["", f"| row | block | {' | '.join(_RATES)} |", f"|---|---{'|---' * len(_RATES)}|"]
    for name, runs in rows.items():
        for block in (block for block in blocks if block in runs[0].rates):
            cells = [
                spread([100 * getattr(run, part)[block][key] for run in runs])
                for part, key in _RATES.values()
            ]
            lines.append(f"| {name} | {block} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_RATES = {  # column of the second table: the part and the key of a run that it shows
    "centre in the selected quadrant, %": ("rates", "rate"),
    "before training, %": ("fresh", "rate"),
    "best fixed quadrant, %": ("rates", "constant"),
}


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; of one value the value alone."""
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def plot(path: Path, title: str, results: Sequence[Result]) -> None:
    """A PNG: one line for each row, a point for each seed, a stroke at their mean."""
    rows = rows_of(results)
    values = [run.top1 for run in results]
    low, high = _frame(min(values), max(values))
    picture = Image.new("RGB", (_WIDTH, _TOP + _ROW * len(rows) + 50), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(16)
    right, bottom = _WIDTH - 40, _TOP + _ROW * len(rows)

    def place(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (right - _LEFT)

    draw.text((20, 16), f"{title}: top-1, %; a point is a seed, the stroke their mean", _INK, font)
    for tick in range(6):
        value = low + (high - low) * tick / 5
        draw.line([(place(value), _TOP), (place(value), bottom)], _FAINT)
        draw.text((place(value), bottom + 8), f"{value:g}", _INK, font, anchor="ma")
    for number, (name, runs) in enumerate(rows.items()):
        y = _TOP + _ROW * (number + 0.5)
        draw.text((_LEFT - 16, y), name, _INK, font, anchor="rm")
        for x in (place(run.top1) for run in runs):
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], _POINT, _INK)
        x = place(statistics.fmean(run.top1 for run in runs))
        draw.line([(x, y - 14), (x, y + 14)], _MEAN, 3)
    picture.save(path)


def _frame(low: float, high: float) -> tuple[float, float]:
    """Ends of the axis: five steps of 0.2, 0.5, 1, 2, 4, 10 or 20 around the values."""
    for step in (0.2, 0.5, 1, 2, 4, 10, 20):
        first = step * (low // step)
        if first + 5 * step >= high:
            break
    return first, first + 5 * step
