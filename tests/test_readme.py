"""The README's Python, run in order as a reader would, and its console commands."""

import re
from pathlib import Path

from tiny_support import write_tiny_gguf

from ksort_gguf.cli.main import build_parser

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    """Catches an example that no longer fits the API, or that needs what an earlier one did not say."""
    write_tiny_gguf(tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) >= 3 and (tmp_path / "folded.gguf").exists() and (tmp_path / "model.kplan.gguf").exists()
    assert names["out"].shape == (100, 8, 64) and names["cache"].n_tokens == 50
    assert "cache_type_k `cache_type_k` bfp13 is not one of" in capsys.readouterr().out


def test_two_commands_come_first():
    """Catches a README whose install and test commands got lost or went below the third."""
    consoles = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    assert consoles[0].strip() == "$ pip install . && ksort-gguf demo"
    assert consoles[1].startswith("$ pip install '.[test]'") and consoles[1].strip().endswith("&& pytest")


def test_command_lines_are_understood():
    """Catches a flag or a command in an example that the command line does not have."""
    lines = re.findall(r"^\$ ksort-gguf (.*)$", README, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        command = re.findall(r'"[^"]*"|\S+', line.partition("#")[0])
        build_parser().parse_args([word.strip('"') for word in command])
