"""Fields that carry their flags: parsed as they are typed, refused outside of their ranges, shown in tables."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.options import (
    PRESET,
    add_flags,
    check,
    check_files,
    fill_in,
    option,
    options,
    table,
)

PRESETS = {
    "xxl": {"size": 10_000, "rate": 1e-6},
    "t2i-xl": {"size": 5000, "rate": 1e-6},
    "tiny": {"size": 10_000, "rate": 2e-5},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = option(PRESET, "pixels of `--file`, 100 % of them", at_least=1)
    rate: float = option(PRESET, "a rate", above=0)
    share: float = option(0.5, "a share", at_least=0, at_most=1)
    dropped: float = option(0.0, "less than all", at_least=0, below=1)
    file: Path | None = option(None, "a path", shown="none", file="file")
    kind: str = option("a", "a kind", choices=("a", "b"))
    measure: bool = option(True, "leave it out", flags=("--no-measure",))
    count: int | None = option(None, "at most so many", at_least=2, flags=("--count", "--number"))
    hidden: float = option(1.0, at_least=0)

    def __post_init__(self) -> None:
        fill_in(self, PRESETS["tiny"])
        check(self)
        check_files(self)


def parsed(*arguments: str) -> Config:
    parser = argparse.ArgumentParser()
    add_flags(parser, Config, PRESETS)
    return Config(**vars(parser.parse_args(arguments)))


def test_flags_become_values_of_their_types_and_the_rest_is_filled_in() -> None:
    assert parsed() == Config(size=10_000, rate=2e-5)
    found = parsed("--size", "3", "--rate", "1e-3", "--kind", "b", "--no-measure", "--number", "7", "--file", __file__)
    assert found == Config(size=3, rate=1e-3, kind="b", measure=False, count=7, file=Path(__file__))
    assert isinstance(Config(file=__file__).file, Path)
    assert "hidden" not in {field.name for field in options(Config)}
    with pytest.raises(SystemExit):
        parsed("--hidden", "1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "--size must be at least 1, got 0"),
        ({"size": 2**63}, "--size must be finite and less than 2^63, got 9223372036854775808"),
        ({"count": 1}, "--count must be at least 2, got 1"),
        ({"rate": 0.0}, "--rate must be greater than 0, got 0.0"),
        ({"rate": math.nan}, "--rate must be greater than 0, got nan"),
        ({"rate": math.inf}, "--rate must be greater than 0 and finite, got inf"),
        ({"hidden": math.inf}, "--hidden must be finite and less than 2^63, got inf"),
        ({"hidden": math.nan}, "--hidden must be at least 0, got nan"),
        ({"share": 1.01}, "--share must be between 0 and 1, got 1.01"),
        ({"share": math.nan}, "--share must be between 0 and 1, got nan"),
        ({"dropped": 1.0}, "--dropped must be at least 0 and less than 1, got 1.0"),
        ({"dropped": -0.1}, "--dropped must be at least 0 and less than 1, got -0.1"),
        ({"kind": "c"}, "--kind c: choose one of a, b"),
        ({"file": "missing"}, "--file missing: no such file"),
        ({"file": Path(__file__).parent}, "no such file"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Config(**changes)
    assert message in str(refused.value)


def test_help_and_tables_show_help_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "pixels of --file, 100 % of them (default: 10 000, text: 5000)" in printed
    assert "a rate (default: 1e-6; tiny: 2e-5)" in printed
    assert "--count COUNT, --number COUNT" in printed
    assert table(Config, PRESETS).splitlines()[2:] == [
        "| `--size` | 10 000, text: 5000 | pixels of `--file`, 100 % of them |",
        "| `--rate` | 1e-6 (2e-5) | a rate |",
        "| `--share` | 0.5 | a share |",
        "| `--dropped` | 0 | less than all |",
        "| `--file` | none | a path |",
        "| `--kind` | a | a kind |",
        "| `--no-measure` |  | leave it out |",
        "| `--count` or `--number` |  | at most so many |",
    ]
