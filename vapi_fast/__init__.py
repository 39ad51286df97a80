"""vapi-fast: align visual autoregressive generators to pixel space with VA-π, fast.

Names are imported when they are first used: `vapi_fast.ops` needs nothing but PyTorch and Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vapi_fast import evaluation, models, ops, patch, reference
    from vapi_fast.config import AlignConfig
    from vapi_fast.generation import generate
    from vapi_fast.patch import patch_llamagen, patch_lpips, patch_tokenizer, unpatch
    from vapi_fast.run import align

__all__ = [
    "AlignConfig",
    "align",
    "evaluation",
    "generate",
    "models",
    "ops",
    "patch",
    "patch_llamagen",
    "patch_lpips",
    "patch_tokenizer",
    "reference",
    "unpatch",
]

PATCHES = ("patch_llamagen", "patch_lpips", "patch_tokenizer", "unpatch")
HOME = {"AlignConfig": "vapi_fast.config", "align": "vapi_fast.run", "generate": "vapi_fast.generation"}
HOME |= dict.fromkeys(PATCHES, "vapi_fast.patch")


def __getattr__(name: str) -> Any:
    if name in HOME:
        return getattr(importlib.import_module(HOME[name]), name)
    if name in __all__:
        return importlib.import_module(f"vapi_fast.{name}")
    raise AttributeError(f"module 'vapi_fast' has no attribute {name!r}")
