"""Draws the README's charts, charts/*.svg, from the tables of RESULTS.md, so that no number is typed twice.

    quality-{light,dark}.svg   mean KLD of every 4-bit key cache that the tables know, a panel for each model
    speed-{light,dark}.svg     tokens a second of generation, by tokens of context

The same tables give the same bytes under one version of matplotlib. Every chart's metadata hold the numbers that it
shows, as JSON, so that a test can tell a chart that is older than its table.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
MODELS = {"SmolLM2-135M": "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B": "Qwen2.5-Coder-0.5B-Instruct"}
THEMES = {
    "light": {"text": "#24292f", "grid": "#d0d7de", "ours": "#0a62c9", "theirs": "#8a5a00"},
    "dark": {"text": "#e6edf3", "grid": "#3d444d", "ours": "#6cb2ff", "theirs": "#e3a33b"},
}

LABEL_SHIFTS = {"ksort-gguf bfp12/f16": -12, "llama.cpp q4_0/f16": 11}  # points, off the lines that go on

Points = dict[str, list[tuple[float, float]]]


def read_table(text: str, heading: str) -> list[dict[str, str]]:
    """The rows of the first table below the heading (any level) that is `heading`: cells by their column's name.

    Where columns share a name, the later ones are name_2, and so on. Raises ValueError without such a table.
    """
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^\|(.*)\|$", section[1], re.MULTILINE) if section else []
    if len(lines) < 3:
        raise ValueError(f"no table below the heading {heading!r}")
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    earlier = [header[:place].count(name) for place, name in enumerate(header)]
    names = [f"{name}_{n + 1}" if n else name for name, n in zip(header, earlier, strict=True)]
    return [dict(zip(names, row, strict=True)) for row in rows]


def quality_points(text: str) -> dict[str, dict[str, tuple[float, float]]]:
    """By model and cache: bits per value of K, and mean KLD, for caches of 4 to 5 bits for K and 16 for V."""
    points = {}
    for model, name in MODELS.items():
        rows = read_table(text, f"Beside other caches: {name}")
        bits = {row["cache"]: [float(part) for part in row["bits K, V"].split(",")] for row in rows}
        points[model] = {
            row["cache"]: (bits[row["cache"]][0], float(row["mean KLD"]))
            for row in rows
            if 4 <= bits[row["cache"]][0] < 5 and bits[row["cache"]][1] == 16
        }
    return points


def speed_points(text: str) -> Points:
    """By engine and cache types: (tokens of context, tokens a second) of generation."""
    points: Points = {}
    for heading in ("CPU, beside llama.cpp", "CPU, beside llama.cpp, deeper"):
        for row in read_table(text, heading):
            test = re.fullmatch(r"tg\d+(?: @ d(\d+))?", row["test"])
            if test is None:
                continue
            for engine, speed in (("ksort-gguf", "t/s"), ("llama.cpp", "t/s_2")):
                point = (int(test[1] or 0), float(row[speed]))
                series = points.setdefault(f"{engine} {row[f'{engine} K/V']}", [])
                if point not in series:
                    series.append(point)
    return {name: sorted(series) for name, series in points.items()}


def draw_quality(figure: "Figure", points: dict[str, dict[str, tuple[float, float]]], theme: dict[str, str]) -> None:
    """A row for each cache, the largest KLD at the top, and its mean KLD as a dot in each model's panel."""
    first = next(iter(points.values()))
    caches = sorted(first, key=lambda cache: first[cache][1])
    labels = []
    for cache in caches:
        bits = dict.fromkeys(f"{of[cache][0]:.2f}" for of in points.values() if cache in of)
        labels.append(f"{cache}  ({' / '.join(bits)})")
    panels = figure.subplots(1, len(points), sharey=True)
    for axes, (model, of) in zip(panels, points.items(), strict=True):
        for place, cache in enumerate(caches):
            if cache in of:
                colour = theme["ours" if cache.startswith("bfp") else "theirs"]
                axes.plot(of[cache][1], place, "o", color=colour, markersize=7)
                axes.annotate(
                    f"{of[cache][1]:.3f}", (of[cache][1], place), (8, 0), textcoords="offset points", va="center",
                    color=colour, fontsize=9,
                )  # fmt: skip
        klds = [kld for _, kld in of.values()]
        axes.set(xscale="log", xlim=(min(klds) / 1.5, max(klds) * 3.2))
        axes.set_title(model, color=theme["text"], fontsize=11)
        axes.set_xlabel("mean KLD to the f16 cache, nats", color=theme["text"])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color=theme["grid"], linewidth=0.8)
    panels[0].set_ylabel("key cache (bits per value)", color=theme["text"])
    panels[0].set_yticks(range(len(caches)), labels=labels)
    for label, cache in zip(panels[0].get_yticklabels(), caches, strict=True):
        label.set_color(theme["ours" if cache.startswith("bfp") else "theirs"])


def draw_speed(figure: "Figure", points: Points, theme: dict[str, str]) -> None:
    """A line for each engine and cache types, named at its end."""
    axes = figure.subplots()
    for name, series in points.items():
        colour = theme["ours" if name.startswith("ksort-gguf") else "theirs"]
        bits_4 = "f16" not in name  # keys and values both
        axes.plot(*zip(*series, strict=True), marker="o", color=colour, linestyle="-" if bits_4 else "--", markersize=6)
        axes.annotate(
            name, series[-1], (8, LABEL_SHIFTS.get(name, 0)), textcoords="offset points", va="center", color=colour,
            fontsize=9,
        )  # fmt: skip
    depths = sorted({depth for series in points.values() for depth, _ in series})
    axes.set_xticks(depths, labels=[f"{depth:,}" for depth in depths])
    axes.set(xlim=(-200, depths[-1] * 1.35), ylim=(0, None))
    axes.set_xlabel("tokens of context", color=theme["text"])
    axes.set_ylabel("tokens a second", color=theme["text"])
    axes.grid(color=theme["grid"], linewidth=0.8)


CHARTS: dict[str, tuple[Callable[[str], Any], Callable[..., None], tuple[float, float]]] = {
    "quality": (quality_points, draw_quality, (8.5, 4.4)),
    "speed": (speed_points, draw_speed, (8.5, 3.8)),
}


def draw_charts(text: str, folder: Path) -> list[Path]:
    """Draw every chart in every theme into `folder`; the files written. `text` is that of RESULTS.md."""
    import matplotlib
    from matplotlib.figure import Figure

    paths = []
    for chart, (find_points, draw, size) in CHARTS.items():
        points = find_points(text)
        for name, theme in THEMES.items():
            style: dict[Any, Any] = {
                "svg.hashsalt": chart,
                "svg.fonttype": "none",
                "xtick.color": theme["text"],
                "ytick.color": theme["text"],
            }
            with matplotlib.rc_context(style):
                figure = Figure(figsize=size, layout="constrained")
                draw(figure, points, theme)
                for axes in figure.axes:
                    axes.set_facecolor("none")
                    axes.spines[["top", "right"]].set_visible(False)
                    axes.spines[["bottom", "left"]].set_color(theme["grid"])
                paths.append(folder / f"{chart}-{name}.svg")
                metadata = {"Date": None, "Creator": None, "Title": chart, "Description": json.dumps(points)}
                figure.savefig(paths[-1], transparent=True, metadata=metadata)
    return paths


def main() -> None:
    """Draw into the folder given."""
    parser = argparse.ArgumentParser(description="Draw the README's charts from the tables of RESULTS.md.")
    parser.add_argument("--output", type=Path, default=FOLDER / "charts", metavar="FOLDER")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for path in draw_charts((FOLDER / "RESULTS.md").read_text(encoding="utf-8"), folder):
        print(path)


if __name__ == "__main__":
    main()
