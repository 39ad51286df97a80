"""The models that VA-π needs: generator, tokenizer and perceptual distance, in LlamaGen's file formats."""

from vapi_fast._lazy import offers

__all__, __getattr__ = offers(
    __name__,
    {
        "sizes": ["LLAMAGEN_CONFIGS", "VQ_CONFIGS", "GeneratorConfig", "LlamaGenConfig", "VQTokenizerConfig"],
        "transformer": ["Condition", "Dropout", "Generator"],
        "llamagen": ["LlamaGen"],
        "lpips": ["LPIPS"],
        "tokenizer": ["VQTokenizer"],
    },
)
