from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from operations import SMALL, XXL, Sizes
from summary import table

from vapi_fast import ceilings

ROWS = pytest.StashKey[list[dict[str, Any]]]()


@dataclass
class Bench:
    """What the operations are measured on: XXL in bf16 on a GPU, small shapes in fp32 on a CPU."""

    device: torch.device
    sizes: Sizes
    dtype: torch.dtype
    ceilings: ceilings.Ceilings
    cache_bytes: int
    compile_seconds: float  # left for torch.compile
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compile-seconds", type=float, default=600, help="time for torch.compile, after which rows go without it"
    )


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    torch.manual_seed(0)
    config = request.config
    rows = config.stash.setdefault(ROWS, [])
    if not torch.cuda.is_available():
        cpu = torch.device("cpu")
        return Bench(cpu, SMALL, torch.float32, ceilings.measure(cpu), 0, 0, rows)
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    limit = config.getoption("compile_seconds")
    return Bench(device, XXL, torch.bfloat16, ceilings.measure(device), cache, limit, rows)


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own, longer table
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(ROWS, []):
        terminalreporter.section("operations")
        terminalreporter.write_line(table(config.stash[ROWS]))
