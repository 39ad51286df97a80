"""The models that VA-π needs: generator, tokenizer and perceptual distance, in LlamaGen's file formats."""

from vapi_fast.models.llamagen import LLAMAGEN_CONFIGS, LlamaGen, LlamaGenConfig
from vapi_fast.models.lpips import LPIPS
from vapi_fast.models.tokenizer import VQ_CONFIGS, VQTokenizer, VQTokenizerConfig

__all__ = [
    "LLAMAGEN_CONFIGS",
    "LPIPS",
    "VQ_CONFIGS",
    "LlamaGen",
    "LlamaGenConfig",
    "VQTokenizer",
    "VQTokenizerConfig",
]
