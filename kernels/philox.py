"""Random words and uniforms for kernels: the counters, keys and bits of `vapi_fast.reference.philox`.

Integer work alone: 10 rounds of two 32×32-bit products, about 100 instructions for four words.
"""

import triton
import triton.language as tl

# Fourth counter word: the operation that draws.
GROUP_SAMPLE = tl.constexpr(1)
NOISY_PREFIX = tl.constexpr(2)
GUMBEL = tl.constexpr(3)
DROPOUT = tl.constexpr(6)


@triton.jit
def random_words(seed, position, index, sample_id, OPERATION: tl.constexpr):
    """Four uint32 words from Philox4x32-10 of (position, index, sample id, operation) under a 64-bit seed.

    The counters are integers of any width, whose low 32 bits count, broadcast against each other.
    """
    return tl.philox(
        seed,
        tl.cast(position, tl.uint32),
        tl.cast(index, tl.uint32),
        tl.cast(sample_id, tl.uint32),
        tl.cast(OPERATION, tl.uint32),
    )


@triton.jit
def uniform24(word):
    """Uniform in [0, 1) from the upper 24 bits of a word: exact in fp32."""
    return (word >> 8).to(tl.float32) * 2.0**-24


@triton.jit
def open_uniform23(word):
    """Uniform in (0, 1), ends excluded, from the upper 23 bits of a word: (x + ½)·2⁻²³, exact in fp32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 2.0**-23
