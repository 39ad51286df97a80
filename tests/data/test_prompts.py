"""Files of prompts: a line each, or lines of JSON; what is none is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from vapi_fast.data.prompts import read_prompts, text_of
from vapi_fast.runtime.errors import DataError


def test_lines_of_text_and_of_json(tmp_path: Path) -> None:
    lines = ["\ufeffa cup\r", "", "  two dogs ", '{"tag": "x", "prompt": "caf\\u00e9 {1}"}', "a line\u2028apart"]
    (tmp_path / "a.txt").write_bytes("\n".join(lines).encode())
    assert read_prompts(tmp_path / "a.txt", text_of) == ("a cup", "two dogs", "café {1}", "a line\u2028apart")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "has no prompts, expected one a line"),
        (b'a cup\n\n{"text": "a cup"}\n', r"line 3: neither lines of text nor of JSON with `prompt` \(no 'prompt'\)"),
        (b'{"prompt": 3}', r"line 1: neither .* \(its prompt is 3\)"),
        (b'{"prompt"', "line 1: neither"),
        (b"a cup\n\x89PNG\xff", "line 2: neither"),
        (b'{"a":' * 50_000, "line 1: neither"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt.* {message}") as told:
        read_prompts(tmp_path / "a.txt", text_of)
    assert len(str(told.value)) < 500
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path, text_of)
