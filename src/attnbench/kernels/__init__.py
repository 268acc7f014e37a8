"""attnbench's own fused attention: forward and backward with memory linear in the sequence. Knows nothing of benchmarking."""

from attnbench.kernels.attention import attention

__all__ = ["attention"]
