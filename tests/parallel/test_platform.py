"""The CPU patches: each still has its target, none is applied on CUDA, and they cost nothing in a step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pool import Place, RankPool
from tests.small_runs import build_stage, open_engine, small_config, train_steps

ROOT = Path(__file__).resolve().parents[2]
IN_A_FRESH_PROCESS = """
import sys
from parallel.platform import cpu_patches
from parallel.platform.cpu_patches import CONSTANT_PATCHES, NAME_PATCHES, ConstantPatch, NamePatch
from parallel.platform.cpu_patches import resolve, stale_patches

def targets():
    names = {patch.target: resolve(patch.target)[2] for patch in NAME_PATCHES}
    underlying = cpu_patches._underlying_function
    functions = {patch.target: underlying(resolve(patch.target)[2]) for patch in CONSTANT_PATCHES}
    return names, functions, {name: function.__code__ for name, function in functions.items()}

before = targets()
assert len(before[0]) > 10 and len(before[1]) > 10
from parallel.platform import load_platform
platform = load_platform("cuda")
assert platform.name == "cuda" and platform.backend == "nccl"
import megatron.core.optimizer, megatron.core.pipeline_parallel.schedules
for old, new in zip(before, targets()):
    changed = [name for name in old if old[name] is not new[name]]
    assert not changed, changed
replaced = [patch.target for patch in NAME_PATCHES if resolve(patch.target)[2] is patch.replacement]
assert set(replaced) <= {"torch.cuda:manual_seed"}, replaced

assert not list(stale_patches()), list(stale_patches())

gone = "torch.cuda:no_such_function"
harmless = "megatron.core.utils:divide"
cpu_patches.NAME_PATCHES += (NamePatch(gone, None, ""),)
cpu_patches.CONSTANT_PATCHES += (ConstantPatch(harmless, ""),)
assert list(stale_patches()) == [gone, harmless], list(stale_patches())
print("all is well")
"""


@pytest.mark.slow
def test_each_patch_has_its_target_and_nothing_is_patched_on_cuda():
    command = [sys.executable, "-W", "ignore", "-c", IN_A_FRESH_PROCESS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "all is well"


def test_a_cpu_packs_weights_for_products_of_some_tokens_in_fp32():
    import torch

    from parallel.platform import load_platform

    platform = load_platform("cpu")
    weight, inputs = torch.randn(24, 40), torch.randn(16, 1, 40)
    assert platform.pack_weight(weight, 1) is None and platform.pack_weight(weight.bfloat16(), 16) is None
    multiply = platform.pack_weight(weight, 16)
    assert (multiply is not None) == torch.backends.mkl.is_available()
    if multiply is not None:
        expected = (inputs.double() @ weight.double().t()).float()
        torch.testing.assert_close(multiply(inputs), expected, atol=1e-5, rtol=0)


def profile_steps(place: Place, num_steps: int) -> dict[str, float]:
    """Return the time and calls of the replacements within a few steps, and how many torch modes tax every call."""
    import cProfile
    import pstats

    import torch

    from trainer.engine.state import TrainState

    with open_engine(place, small_config(world=place.world_size, parallel={"tp": 2, "sp": True})) as engine:
        stage = build_stage(engine)
        state, _ = train_steps(stage, TrainState(), 1)
        profile = cProfile.Profile()
        profile.enable()
        train_steps(stage, state, num_steps)
        profile.disable()
    stats = pstats.Stats(profile)
    ours = [
        row for (file, _, _), row in stats.stats.items() if file.endswith(("cpu_patches.py", "gloo_collectives.py"))
    ]
    return {
        "modes": torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack(),
        "calls": sum(row[1] for row in ours),
        "own_seconds": sum(row[2] for row in ours),
        "seconds": stats.total_tt,
    }


def test_patches_cost_nothing_in_a_step(ranks):
    num_steps = 4
    for profile in ranks.run(profile_steps, num_steps, world=2):
        assert profile["modes"] == 0, "a torch mode taxes every call"
        assert 0 < profile["calls"] < 300 * num_steps, profile
        assert profile["own_seconds"] < 0.01 * profile["seconds"], profile


def train_and_look_at_imports(place: Place) -> tuple[list[str], list[str], bool]:
    """Return what a forked rank imports while it trains, what only a compiler needs of that, and a late function."""
    import sys

    from torch.fx.experimental.symbolic_shapes import statically_known_true

    from trainer.engine.state import TrainState

    before = set(sys.modules)
    with open_engine(place, small_config(world=place.world_size)) as engine:
        train_steps(build_stage(engine), TrainState(), 1)
    new = sorted(name for name in set(sys.modules) - before if name.startswith(("torch", "megatron", "trainer")))
    compiler = [name for name in ("sympy", "torch._dynamo", "torch._inductor") if name in sys.modules]
    return new, compiler, statically_known_true(True) and "sympy" in sys.modules


def test_a_forked_rank_imports_no_more_and_never_the_compiler():
    pool = RankPool()  # its workers have done nothing yet
    try:
        new, compiler, is_true_late = pool.run(train_and_look_at_imports)[0]
    finally:
        pool.close()
    assert not compiler and len(new) < 30, new  # Megatron-Core names a few small ones where it needs them
    assert not [name for name in new if name.startswith("trainer")], new
    assert is_true_late, "what stands for the module must import it when it is called"


def name_late_things(place: Place) -> None:
    """Use a stand-in in every way a module is used; the real one takes its place."""
    import sys

    from parallel.platform.late_imports import LateModule, import_late

    name = "xml.dom.pulldom"
    sys.modules.pop(name, None)
    import_late(name)
    import_late(name)
    import xml.dom

    assert isinstance(sys.modules[name], LateModule) and xml.dom.pulldom is sys.modules[name]
    from xml.dom.pulldom import parseString

    assert isinstance(sys.modules[name], LateModule)
    assert not hasattr(sys.modules[name], "__path__")
    assert list(parseString("<a/>"))
    assert not isinstance(sys.modules[name], LateModule) and xml.dom.pulldom is sys.modules[name]
    del sys.modules[name]
    import_late(name)
    from xml.dom.pulldom import PullDOM

    assert isinstance(PullDOM, type) and not isinstance(sys.modules[name], LateModule)
    import_late(name)
    assert not isinstance(sys.modules[name], LateModule), "what is there already stays"


def test_what_stands_for_a_module_gives_way_to_it(ranks):
    ranks.run(name_late_things)
