"""The models that VA-π needs: generator, tokenizer and perceptual distance, in the formats of the families' files."""

from vapi_fast._lazy import offers

__all__, __getattr__ = offers(
    __name__,
    {
        "sizes": [
            "JANUS_CONFIGS",
            "LLAMAGEN_CONFIGS",
            "VQ_CONFIGS",
            "GeneratorConfig",
            "JanusConfig",
            "LlamaGenConfig",
            "VQTokenizerConfig",
        ],
        "transformer": ["Condition", "Dropout", "Generator"],
        "janus": ["Janus"],
        "llamagen": ["LlamaGen"],
        "lpips": ["LPIPS"],
        "tokenizer": ["VQTokenizer"],
    },
)
