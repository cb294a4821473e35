"""FP8 matrix multiplications in Megatron-Core's parallel linears, without Transformer Engine.

`quantize` holds the numerics, `history` what delayed scaling remembers, `linear` the forward and backward of a linear
layer on its tp ranks, `multiply` the matrix multiplication itself, emulated or on FP8 units, `attach` puts them into a
model. Transformer Engine's own FP8 does not pass here: it is a set of options of Megatron-Core (`parallel.precision`).
"""
