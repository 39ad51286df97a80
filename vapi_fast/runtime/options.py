"""Fields of a command's configuration that carry their help and range, once: flags, checks and tables are made of them.

A configuration is a frozen dataclass whose fields are made by `option`; `fill_in` and `check` are its `__post_init__`.
Nothing here imports torch, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import numbers
import stat
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field
from functools import cache
from pathlib import Path
from typing import Any

from vapi_fast.runtime.errors import ConfigError
from vapi_fast.runtime.hub import on_hub, parse

PRESET: Any = ...  # default of a field whose value `--model` decides
LIMIT = 2**63  # what a number has to stay below
MOST = 10**7  # images or sequences: so many have a size in bytes, and a list
LARGEST_SIDE = 2**14  # pixels
CHECKPOINT = "checkpoint"  # a path to weights: a file, a folder, or `hub:owner/name[@revision][/file]`
KINDS = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str, Path: Path}  # what a field's values may be
NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    shown: str | None = None,
    flags: tuple[str, ...] | None = None,
    kind: type | None = None,
    file: str = "",
) -> Any:
    """A field with its flag.

    Args:
        default: PRESET where the model's catalog entry has it; none: the flag is required.
        help: of the flag, in Markdown; empty: the field has no flag.
        at_least, above, at_most, below: range of a number, or of one that is not None. NaN is outside of any, and what
            has no upper bound must be finite and below 2^63.
        choices: what a string can be, or one that is not None.
        shown: the default in tables and --help, where the value itself would say less.
        flags: names of the flag, if not the field's own.
        kind: what the flag's text is made into, if not the field's type.
        file: a path that must exist: "file", "file or folder", or one that can be fetched as well: "file, folder or
            hub" of data, "checkpoint" of weights.
    """
    return dataclasses.field(default=default, metadata={k: v for k, v in locals().items() if k != "default"})


def flag(field: str) -> str:
    """The command line's name of a config field."""
    return "--" + field.replace("_", "-")


def flags_of(field: Field[Any]) -> tuple[str, ...]:
    return field.metadata["flags"] or (flag(field.name),)


def options(config: type) -> Iterator[Field[Any]]:
    """The fields that have a flag."""
    return (field for field in dataclasses.fields(config) if field.metadata.get("help"))


def add_flags(parser: argparse.ArgumentParser, config: type, presets: Mapping[str, Mapping[str, Any]]) -> None:
    """A flag for each field that has one; `presets`: the defaults that a model decides, by model."""
    for field in options(config):
        kind, text = kind_of(config, field), field.metadata["help"]
        arguments: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if kind is bool:
            arguments["action"] = "store_false" if field.default is True else "store_true"
        else:
            arguments |= {"choices": field.metadata["choices"]} if field.metadata["choices"] else {"type": kind}
            arguments["required"] = field.default is MISSING
            paper, _, tiny = shown_default(field, presets).rstrip(")").partition(" (")
            shown = [paper if paper == "required" else f"default: {paper}"] if paper else []
            text += f" ({'; '.join([*shown, *([f'tiny: {tiny}'] if tiny else [])])})" if shown else ""
        parser.add_argument(*flags_of(field), help=text.replace("`", "").replace("%", "%%"), **arguments)


@cache
def type_hints(config: type) -> dict[str, Any]:
    """Resolved once: each time costs as much as a field has hints beside it."""
    return typing.get_type_hints(config)


def kind_of(config: type, field: Field[Any]) -> type:
    """What a flag's text is made into: the field's type, None aside."""
    if field.metadata["kind"]:
        return field.metadata["kind"]
    hint = type_hints(config)[field.name]
    if isinstance(hint, types.UnionType):
        (hint,) = (each for each in hint.__args__ if each is not type(None))
    return hint


def admits_none(config: type, field: Field[Any]) -> bool:
    return isinstance(type_hints(config)[field.name], types.UnionType)


def shown_default(field: Field[Any], presets: Mapping[str, Mapping[str, Any]]) -> str:
    """`384, text: 256 (32)`: the default, where they have their own the text model's, and the tiny preset's."""
    if field.metadata["shown"] is not None:
        return field.metadata["shown"]
    if field.default is MISSING:
        return "required"
    if field.default is PRESET:
        paper, text, tiny = (as_text(presets[model][field.name]) for model in ("xxl", "t2i-xl", "tiny"))
        return paper + f", text: {text}" * (text != paper) + f" ({tiny})" * (tiny != paper)
    return as_text(field.default)


def as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}".replace(",", " ")
    return "" if value is None or isinstance(value, bool) else str(value)


def table(config: type, presets: Mapping[str, Mapping[str, Any]]) -> str:
    """The flags as a Markdown table."""
    lines = ["| flag | default, text: t2i-xl's (tiny) | what it does |", "|---|---|---|"]
    for field in options(config):
        names = " or ".join(f"`{name}`" for name in flags_of(field))
        lines.append(f"| {names} | {shown_default(field, presets)} | {field.metadata['help']} |")
    return "\n".join(lines)


def fill_in(config: Any, preset: Mapping[str, Any]) -> None:
    """Put the preset's values where the fields are left to it, and paths where text names them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is PRESET:
            value = preset[field.name]
        if isinstance(value, str) and kind_of(type(config), field) is Path:
            value = Path(value)
        object.__setattr__(config, field.name, value)


def check(config: Any) -> None:
    """Raise ConfigError for the first field that is of another type than its own, out of range or no choice of its."""
    for field in dataclasses.fields(config):
        value, limits, kind = getattr(config, field.name), field.metadata, kind_of(type(config), field)
        if value is None:
            if admits_none(type(config), field):
                continue
            raise ConfigError(f"{flag(field.name)} must be given, got None")
        if (not limits["kind"] and not isinstance(value, KINDS[kind])) or isinstance(value, bool) is not (kind is bool):
            raise ConfigError(f"{flag(field.name)} must be {NAMES[kind]}, got {value!r}")
        if limits["choices"] and value not in limits["choices"]:
            raise ConfigError(f"{flag(field.name)} {value}: choose one of {', '.join(limits['choices'])}")
        if wrong := out_of_range(value, limits):
            raise ConfigError(f"{flag(field.name)} must be {wrong}, got {value}")
        if kind in (int, float):  # NumPy's numbers are none to JSON
            object.__setattr__(config, field.name, kind(value))


def check_files(config: Any) -> None:
    """Raise ConfigError for the first field that must name a file and names none."""
    for field in dataclasses.fields(config):
        path, expected = getattr(config, field.name), field.metadata["file"]
        if path is None or not expected:
            continue
        if on_hub(path) and ("hub" in expected or expected == CHECKPOINT):
            parse(path)
            continue
        try:
            there = path.stat()
        except FileNotFoundError:
            there = None
        except (OSError, ValueError) as error:  # too long a name, one that may not be looked at, one with a null byte
            raise ConfigError(f"{flag(field.name)} {path}: {getattr(error, 'strerror', None) or error}") from error
        if expected == "file" and (there is None or not stat.S_ISREG(there.st_mode)):
            raise ConfigError(f"{flag(field.name)} {path}: no such file")
        if there is None:
            raise ConfigError(f"{flag(field.name)} {path}: no such file or folder")
        if not (stat.S_ISREG(there.st_mode) or stat.S_ISDIR(there.st_mode)):
            raise ConfigError(f"{flag(field.name)} {path}: neither a file nor a folder")


def hub_checkpoints(config: Any) -> dict[str, Path]:
    """The fields that name a checkpoint of Hugging Face's hub."""
    named = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.metadata.get("file") == CHECKPOINT
    }
    return {name: path for name, path in named.items() if path is not None and on_hub(path)}


def check_output(name: str, path: Path) -> None:
    """Raise ConfigError for a path of results that cannot be one: too long, with a null byte, not to be looked at."""
    try:
        path.exists()
        path.resolve()
        if "\0" in str(path):
            raise ValueError("holds a null byte")
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{flag(name)} {path}: {getattr(error, 'strerror', None) or error}") from error


def out_of_range(value: Any, limits: Mapping[str, Any]) -> str:
    """What a number must be, if it is not; else nothing."""
    at_least, above, at_most, below = (limits[name] for name in ("at_least", "above", "at_most", "below"))
    if (at_least is None and above is None) or isinstance(value, bool):
        return ""
    expected = low = f"at least {at_least}" if above is None else f"greater than {above}"
    if at_most is not None:
        expected = f"between {at_least} and {at_most}" if above is None else f"{low} and at most {at_most}"
    elif below is not None:
        expected = f"{low} and less than {below}"
    if not (value >= at_least if above is None else value > above):
        return expected
    if at_most is not None or below is not None:
        return "" if (value <= at_most if below is None else value < below) else expected
    if value >= LIMIT:
        return f"{low} and finite" if above is not None and math.isinf(value) else "finite and less than 2^63"
    return ""
