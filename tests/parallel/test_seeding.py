"""States of random generators, on the platform that wrote them and on another."""

import torch
from megatron.core import tensor_parallel

from parallel.seeding import get_rng_state, seed_everything, set_rng_state


class OtherDevice:
    """Stands for a GPU, whose generator's state is a seed and an offset."""

    def __init__(self):
        self.is_set = False

    def get_rng_state(self):
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state):
        self.is_set = True


def draw_after_restoring(place):
    from parallel.platform.cpu import CpuPlatform
    from tools.one_rank import open_world

    with open_world("cpu"):
        seed_everything(7, 0, 1)
        of_a_gpu = get_rng_state(OtherDevice())
        torch.rand(3)
        set_rng_state(CpuPlatform(), of_a_gpu)  # the host's own generator goes on, the device's is left alone
        host, trackers = torch.rand(1), tensor_parallel.get_cuda_rng_tracker().get_states()
        seed_everything(7, 0, 1)
        expected = torch.rand(1)
        other = OtherDevice()
        set_rng_state(other, of_a_gpu)
        return torch.equal(host, expected), all(len(state) > 16 for state in trackers.values()), other.is_set


def test_states_of_another_kind_of_device_are_left_out(ranks):
    assert ranks.run(draw_after_restoring)[0] == (True, True, True)
