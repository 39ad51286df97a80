from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # read as torch is imported, here and in what tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(processes))))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before vapi_fast is imported
    from interpreter import remap_once_a_launch  # imports Triton

    remap_once_a_launch()
for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
    del os.environ[name]  # a pytest that a test starts is no worker

if TYPE_CHECKING:  # imported where they are used: tests of kernels run without the package `datasets`
    from vapi_fast import AlignConfig
    from vapi_fast.alignment.models import Models
    from vapi_fast.data.dataset import ImageBatch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random numbers and precision for a test and the fixtures made for it, whatever ran before."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # a run leaves "high"


@pytest.fixture(autouse=True)
def cublas_workspaces(request: pytest.FixtureRequest) -> None:
    """Allocated by a process's first products, forward and backward: no test of memory is to count them."""
    if request.node.get_closest_marker("gpu"):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(64, 64, dtype=dtype, device="cuda", requires_grad=True)
            (x @ x).sum().backward()  # in a thread of its own, with a handle of its own
        torch.cuda.synchronize()


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., AlignConfig]:
    """The tiny preset, cut down to what a test needs; keyword arguments change it further."""
    from vapi_fast import AlignConfig

    def make(**changes: Any) -> AlignConfig:
        small = {"batch_size": 4, "micro_batch": 4, "group_size": 4, "steps": 2, "output_dir": tmp_path / "run"}
        return AlignConfig(model="tiny", **(small | {"evaluate": False} | changes))

    return make


@pytest.fixture
def tiny_models(tiny_config: Callable[..., AlignConfig]) -> Models:
    from vapi_fast.alignment.models import load_models

    return load_models(tiny_config(prior="kl"), torch.device("cpu"))


@pytest.fixture(scope="session")
def image_sets() -> None:
    """For tests that read image sets: they are skipped where the package `datasets` is not installed."""
    pytest.importorskip("datasets")


@pytest.fixture(scope="session")
def tiny_batch() -> ImageBatch:
    """The first four training images of seed 0; made-up ones where `datasets` is not installed."""
    from vapi_fast import AlignConfig
    from vapi_fast.data.dataset import ImageData
    from vapi_fast.data.synthetic import SyntheticData

    config = AlignConfig(model="tiny")
    real = importlib.util.find_spec("datasets") is not None
    data = ImageData(config.data, config.image_size) if real else SyntheticData(config.image_size, num_classes=9)
    return next(iter(data.batches(4, 1, seed=0)))
