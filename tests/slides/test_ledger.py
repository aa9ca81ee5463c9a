"""archive.csv comes back as it was written, with the columns that others added."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from histossl.core.errors import StoreError
from histossl.slides.ledger import LedgerRow, merged, read_ledger, write_ledger

ROWS = [
    LedgerRow("b.svs", "unreadable", 'a "quoted", reason\nover two lines', slide="b"),
    LedgerRow("a/é  2.svs", slide="a/é  2", width_l0=10, mpp=0.2519, num_tiles=0, modified_s=1795400780.802),
]


def test_rows_come_back(tmp_path: Path) -> None:
    write_ledger(tmp_path / "archive.csv", ROWS)
    first, second = read_ledger(tmp_path / "archive.csv")
    assert first == ROWS[1]
    assert second.reason == 'a "quoted", reason over two lines'
    with (tmp_path / "archive.csv").open(newline="") as file:
        assert next(csv.reader(file))[:4] == ["file", "status", "reason", "slide"]


def test_columns_of_others_survive(tmp_path: Path) -> None:
    path = tmp_path / "archive.csv"
    path.write_text("file,status,block\na.svs,ok,B7\nb.svs,ok,\n")
    rows = read_ledger(path)
    assert rows[0].extra == {"block": "B7"}
    write_ledger(path, merged(rows, [LedgerRow("a.svs", "warning", "pale"), LedgerRow("c.svs")]))
    again = {row.file: row for row in read_ledger(path)}
    assert again["a.svs"].extra == {"block": "B7"}
    assert again["a.svs"].reason == "pale"
    assert set(again) == {"a.svs", "b.svs", "c.svs"}


def test_no_ledger_yet_is_an_empty_one(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "archive.csv") == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"slide,status\nA,ok\n", "no column 'file'"),
        (b"file,mpp\na.svs,half\n", "line 2: mpp is 'half'"),
        (b"file\n\xff", "cannot be read"),
    ],
)
def test_spoilt_ledger_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "archive.csv").write_bytes(content)
    with pytest.raises(StoreError, match=told):
        read_ledger(tmp_path / "archive.csv")


@pytest.mark.parametrize("first", ["\ufeff", "sep=;\n", "\ufeffsep=;\r\n", ""])
def test_a_ledger_that_a_spreadsheet_has_saved_again_is_read(tmp_path: Path, first: str) -> None:
    (tmp_path / "archive.csv").write_text(f'{first}file;status;mpp\n"a;1.svs";ok;0.5\n', encoding="utf-8")
    assert read_ledger(tmp_path / "archive.csv") == [LedgerRow("a;1.svs", mpp=0.5)]
