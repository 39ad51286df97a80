"""Our operations in a live model of the public LlamaGen repository, or of a fork of it, by one line.

`patch_llamagen(model)`, `patch_tokenizer(vq_model)` and `patch_lpips(lpips)` replace methods of the modules that they
recognise and touch nothing else: parameters, state-dict keys, hooks, optimizers and wrappers stay what they are. A
module is recognised by its attributes, and by giving the same results and gradients as ours on random numbers; import
paths and class names play no part. What is not recognised stays as it is, and the report names it.

`as_llamagen`, `as_tokenizer` and `as_lpips` go further: they give our own models, on the very same parameters.
"""

from .generation import generate
from .llamagen import patch_llamagen
from .lpips import patch_lpips
from .patching import Patch, unpatch
from .tokenizer import patch_tokenizer
from .views import as_llamagen, as_lpips, as_tokenizer

__all__ = [
    "Patch",
    "as_llamagen",
    "as_lpips",
    "as_tokenizer",
    "generate",
    "patch_llamagen",
    "patch_lpips",
    "patch_tokenizer",
    "unpatch",
]
