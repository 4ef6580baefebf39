"""The one line that is told of an exception."""

from __future__ import annotations

import pytest

from packed_attn.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("wrong\nand a page of detail"), "wrong"),
        (RuntimeError("\n  CUDA error\nadvice"), "CUDA error"),
        (NotImplementedError(), "NotImplementedError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
