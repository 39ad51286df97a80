"""Token sequences from a generator: the engine with its KV cache and graphs, groups and guidance, folders of images."""

from vapi_fast._lazy import offers

__all__, __getattr__ = offers(
    __name__,
    {
        "engine": ["Engine", "Generation", "KVCache"],
        "sequences": ["generate", "guidance_scales", "sample_groups"],
        "config": ["GenerateConfig"],
        "folder": ["draw_samples"],
    },
)
