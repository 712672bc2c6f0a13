"""The fuzz of the readers, for a moment: CI runs it for minutes."""

import subprocess
import sys
from pathlib import Path


def test_damaged_files_are_read_or_refused():
    """Would catch a damaged header that ends in a traceback, and a fuzz that no longer fits the readers."""
    script = Path(__file__).with_name("fuzz_readers.py")
    run = subprocess.run([sys.executable, script, "--seconds", "20", "--inputs", "400"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
