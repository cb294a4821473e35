"""Training stages: which batches, which forward, which loss. The loop, the step and the checkpoint are shared."""
