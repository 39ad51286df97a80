"""vapi-fast: align visual autoregressive generators to pixel space with VA-π, fast."""

from vapi_fast.config import AlignConfig
from vapi_fast.generation import generate
from vapi_fast.run import align

__all__ = ["AlignConfig", "align", "generate"]
