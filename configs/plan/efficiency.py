"""What programs reach of a device's published figures: a few constants for all devices, models and layouts.

None is set for one run; configs/README.md says which came in after a comparison. The figures of single kernels are
quoted from memory of the sources named: look them up before one is changed.
"""

from __future__ import annotations

MATMUL_BF16 = 0.70
"""Of the bf16 peak, in large multiplications within a training step. The best that cuBLAS does on H100 alone is 0.80
(Bekman, Machine Learning Engineering, 794 of 989 TFLOP/s); at 700 W the clocks of a training step are lower."""
MATMUL_FP8 = 0.62
"""Of the FP8 peak: as far below what cuBLAS does alone (0.70, the same tables) as above."""
FUSED_ATTENTION = 0.50
"""Of the bf16 peak, Transformer Engine's attention on Hopper with heads of 128, forward and backward together: 600 and
550 TFLOP/s at 16k tokens in FlashAttention-3's figures (arXiv:2407.08608, figures 5 and 6), which have cuDNN beside it;
somewhat less at 8k."""
FLASH_ATTENTION = 0.33
"""Of the bf16 peak, torch's own flash attention (FlashAttention-2): 350 and 300 TFLOP/s in the same figures."""
SMALL_HEADS = 0.77
"""Of the two above, with heads smaller than 128: 497 of 648 TFLOP/s at 64 in the same figures."""
MEMORY = 0.85
"""Of the memory bandwidth, in kernels that read and write once."""
LINKS = 0.80
"""Of the links inside a node: NCCL's bus bandwidth of large messages, about 360 of 450 GB/s on 8 H100s."""
NETWORK = 0.85
"""Of the network cards, large messages without congestion."""
LATENCY_SECONDS = 20e-6
"""Of one collective, beside the time of its bytes."""
HOST_SECONDS_PER_LAYER = 5e-3
"""The host's time to launch one layer's forward and backward pass. The one constant that is fitted: to our own Llama
3.2 1B at 4096 tokens, where an H200 waited for its host (0.654 s for 8 microbatches of 16 layers, root README)."""
