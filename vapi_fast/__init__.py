"""vapi-fast: align visual autoregressive generators to pixel space with VA-π, fast.

Names are imported when they are first used: `vapi_fast.ops` needs nothing but PyTorch and Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vapi_fast._lazy import offers

if TYPE_CHECKING:
    from vapi_fast import evaluation, models, ops, patch, reference
    from vapi_fast.alignment.config import AlignConfig
    from vapi_fast.alignment.run import align
    from vapi_fast.generation.sequences import generate
    from vapi_fast.patch import patch_llamagen, patch_lpips, patch_tokenizer, unpatch

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

_, __getattr__ = offers(
    __name__,
    {
        "alignment.config": ["AlignConfig"],
        "alignment.run": ["align"],
        "generation.sequences": ["generate"],
        "patch": ["patch_llamagen", "patch_lpips", "patch_tokenizer", "unpatch"],
    },
    modules=("evaluation", "models", "ops", "patch", "reference"),
)
