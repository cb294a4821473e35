"""Reinforcement learning: rollouts, their rewards and advantages, and the batches that a policy is updated on."""
