"""Images and their labels: read, made up, written."""

from vapi_fast._lazy import offers

__all__, __getattr__ = offers(
    __name__,
    {"dataset": ["ImageBatch", "ImageData", "ahead"], "synthetic": ["SyntheticData"], "pixels": ["center_crop"]},
)
