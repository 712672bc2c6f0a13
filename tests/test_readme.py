"""The README's Python, run."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_packed_cache_example_runs():
    """Would catch an example that no longer fits the API, or attention that returns another shape than it says."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    example = next(block for block in blocks if "native.Cache" in block)
    names: dict = {}
    exec(example, names)
    assert names["out"].shape == (100, 8, 64)
    assert abs(names["k"].unpack(0, 100) - names["keys"]).max() < 0.6  # half a step of blocks below 8
