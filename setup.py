"""Metadata and dependencies; build-system, ruff and pytest settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vapi-fast",
    version="0.1.0",
    description="Fast VA-π alignment of visual autoregressive generators to pixel space",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["vapi_fast", "vapi_fast.*"]), "vapi_fast.kernels"],
    package_dir={"vapi_fast": "vapi_fast", "vapi_fast.kernels": "kernels"},
    package_data={
        "vapi_fast.tiny": ["preset/*", "preset/*/*"],
        "vapi_fast.kernels": ["*.json"],
        "vapi_fast.runtime": ["*.json"],
    },
    install_requires=[
        "torch>=2.8,<2.14",
        "triton; platform_system == 'Linux'",
        "numpy",
        "safetensors",
        "datasets>=3",
        "pillow",
        "torchmetrics>=1.4",
        "tqdm",
        "matplotlib",
        "tensorboard",
        "nvidia-ml-py; platform_system == 'Linux'",
    ],
    extras_require={
        "rewards": ["transformers"],
        "text": ["transformers", "ftfy"],
        "test": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "scipy", "transformers", "ftfy"],
        "dev": ["ruff"],
        "geneval": ["transformers", "open-clip-torch>=3", "scipy"],
    },
    entry_points={"console_scripts": ["vapi-fast=vapi_fast.cli:main"]},
)
