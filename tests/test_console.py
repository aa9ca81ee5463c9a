"""What a log file and a narrow terminal show can be read."""

from __future__ import annotations

import pytest
from rich.console import Console

from histossl import console


def test_off_a_terminal_progress_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now_s[0])
    with console.progress("tiling", 100, "slides") as bar:
        bar.advance(20)  # of an earlier run
        for _ in range(5):
            now_s[0] += 12
            bar.advance(2, note="9 tiles/s")
    assert capsys.readouterr().err.splitlines()[-1] == "tiling: 30/100 slides, 60 s, about 7 min left  9 tiles/s"


@pytest.mark.parametrize("file", ["case1/TCGA-CR-7395-01A-01-TS1.0123456789.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_a_narrow_terminal_breaks_no_word_of_a_table(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    narrow = Console(width=80, record=True, stderr=True)
    monkeypatch.setattr(console, "console", narrow)
    columns = ("file", "status", "format", "size (px)", "mpp", "stain", "tiles")
    row = (file, "unreadable", "Hamamatsu NDPI/VMS", "139264x98304", "0.2527", "unknown", 54321)
    console.table("3 files", columns, [row] * 3)
    shown = narrow.export_text()
    for word in (file, "unreadable", "139264x98304", "0.2527", "unknown", "54321"):
        assert shown.count(word) == 3, shown
    assert max(map(len, shown.splitlines())) <= 80
