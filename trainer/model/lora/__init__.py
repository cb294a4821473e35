"""LoRA (arXiv:2106.09685) beside Megatron-Core's parallel linears: its arithmetic, and where it is attached."""
