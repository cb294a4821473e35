"""What a call of the generator took, by replica: tokens, passes, seconds, bytes of the cache. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaReport:
    """One replica's part of a call, as its first rank saw it."""

    replica: int
    """Its number: the rank in `Mesh.dp_cp_group`."""
    num_prompt_tokens: int
    """Tokens of prompts that went through the model; a prompt counts once for all its answers."""
    num_tokens: int
    """Tokens drawn, those that stopped an answer included."""
    num_passes: int
    """Passes through the model, of prompts and of new tokens; where experts are shared, for other replicas' too."""
    num_slots: int
    """Rows that the cache had places for."""
    cache_bytes: int
    """What keys and values took on its first rank."""
    seconds: float
    """From the start to the end of its last answer; what it then waits for the others, or computes for them, is not
    among them."""


@dataclass(frozen=True)
class GenerationReport:
    """A call as a whole; every rank has the same."""

    replicas: tuple[ReplicaReport, ...]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts, of all replicas."""
        return sum(one.num_prompt_tokens for one in self.replicas)

    @property
    def num_tokens(self) -> int:
        """Tokens drawn, of all replicas."""
        return sum(one.num_tokens for one in self.replicas)

    @property
    def seconds(self) -> float:
        """Of the replica that took longest."""
        return max(one.seconds for one in self.replicas)

    @property
    def idle_shares(self) -> tuple[float, ...]:
        """Return for each replica the share of `seconds`, 0 to 1, in which its own answers were done already."""
        whole = self.seconds
        return tuple(1 - one.seconds / whole if whole > 0 else 0.0 for one in self.replicas)
