"""What a person sees: nothing folded away, nothing on the wrong stream."""

from __future__ import annotations

import pytest

from slimport.errors import BadInput
from slimport.terminal import console


def test_an_error_is_three_lines_whatever_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_error(BadInput("two\nlines", "  why \n not", "do\tthis"))
    assert capsys.readouterr().err == "error: two lines\nwhy: why not\ndo: do this\n"


def test_a_table_in_a_pipe_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.11.self_attn.q_proj.weight" * 2
    console.table("title", ["name", "[bold]"], [[name, "1 [red]"], ["x", "22"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "title"
    assert any(name in line and "1 [red]" in line for line in lines)
    assert any("[bold]" in line for line in lines)


def test_progress_without_a_terminal_is_one_line_per_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.progress(quiet=False) as report:
        for done in range(5):
            report("quantize", done, 5)
        report("packing", 0, 1)
    assert capsys.readouterr() == ("", "quantize\npacking\n")


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(quiet=True) as report:
        report("quantize", 1, 5)
    assert capsys.readouterr() == ("", "")


def test_bars_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with console.progress(quiet=False) as report:
        report("quantize", 3, 5)
        report("packing", 1, 1)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "quantize" in shown.err and "5/5" in shown.err and "packing" in shown.err
