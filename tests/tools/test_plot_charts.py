"""The README's charts against the tables that they are drawn from."""

import json
import re
from html import unescape
from pathlib import Path

import plot_charts
import pytest

TOOLS = Path(plot_charts.__file__).parent
RESULTS = (TOOLS / "RESULTS.md").read_text(encoding="utf-8")


def shown(path: Path):
    """The numbers that a chart says it shows."""
    return json.loads(unescape(re.search(r"<dc:description>(.*?)</dc:description>", path.read_text())[1]))


@pytest.mark.parametrize("theme", plot_charts.THEMES)
@pytest.mark.parametrize("chart", plot_charts.CHARTS)
def test_committed_charts_show_the_tables(chart, theme):
    """Would catch a table that was printed anew while its chart was not drawn anew."""
    points = plot_charts.CHARTS[chart][0](RESULTS)
    assert shown(TOOLS / "charts" / f"{chart}-{theme}.svg") == json.loads(json.dumps(points))


def test_points_come_from_their_columns():
    """Would catch a reader that takes the wrong table, row or one of two columns of the same name."""
    header = "| test | ours K/V | t/s | theirs K/V | t/s |\n|---|---|---:|---|---:|\n"
    table = f"## A\n\n{header}| tg32 | a/b | 1.5 | c/d | 2.5 |\n"
    text = table.replace("1.5", "9") + table.replace("## A", "### A, deeper") + "\n## B\n"
    assert plot_charts.read_table(text, "A, deeper") == [
        {"test": "tg32", "ours K/V": "a/b", "t/s": "1.5", "theirs K/V": "c/d", "t/s_2": "2.5"}
    ]
    speeds = plot_charts.speed_points(RESULTS)
    assert all(len(dict(series)) == len(series) for series in speeds.values())  # one speed at each depth
    assert {depth for series in speeds.values() for depth, _ in series} == {0, 4096, 8064}
    for of in plot_charts.quality_points(RESULTS).values():
        assert {"bfp12", "bfp12@ksort", "bfp12@balanced", "q4_0+hadamard"} <= of.keys()
        assert of["bfp12"][0] == 4.25 and "bfp12/bfp12@balanced" not in of and "q8_0" not in of


def test_charts_are_the_same_every_time(tmp_path, monkeypatch):
    """Would catch dates or random ids, which change a committed chart when nothing changed."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plot_charts, "THEMES", {"dark": plot_charts.THEMES["dark"]})
    drawn = []
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        drawn.append([path.read_bytes() for path in plot_charts.draw_charts(RESULTS, tmp_path / name)])
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2


def test_missing_table_is_named():
    """Would catch a heading that was renamed and a chart that was drawn from another table."""
    with pytest.raises(ValueError, match="no table below the heading 'Nowhere'"):
        plot_charts.read_table(RESULTS, "Nowhere")
