"""Divergences from a teacher and their gradients, the vocabulary on one rank or two, against float64 by definition."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool import Place

SEQ, ROWS, VOCAB, REAL = 5, 3, 24, 21
# beta, temperature, and how many ids of the teacher are known
CASES = [(beta, temperature, k) for beta in (0.0, 0.3, 1.0) for temperature in (1.0, 0.5, 2.5) for k in (None, 4, REAL)]


def make_case(dtype: str) -> tuple[Any, Any, Any]:
    """Return logits of student and teacher `[seq, rows, vocab]`, the last ids none, and weights `[rows, seq]`."""
    import torch

    torch.manual_seed(4)
    student, teacher = ((torch.randn(SEQ, ROWS, VOCAB) * 3).to(getattr(torch, dtype)) for _ in range(2))
    for logits in (student, teacher):
        logits[..., REAL:] = torch.finfo(logits.dtype).min
    teacher[0, 0, 7] = 30.0  # one id has all but 1e-12
    student[1, 0, 2], teacher[1, 0, 2] = 9.0, -9.0  # what the student is sure of the teacher rules out
    teacher[2, 0, :REAL] = student[2, 0, :REAL]
    return student, teacher, torch.randn(ROWS, SEQ)


def define(student: Any, teacher: Any, beta: float, temperature: float, k: int | None) -> Any:
    """Return the divergences `[rows, seq]` as GKD's equations 1 to 3 and TRL's ends have them, of the ids there are."""
    import torch

    p, q = ((one[..., :REAL].transpose(0, 1) / temperature).log_softmax(-1) for one in (teacher, student))
    if k is not None:
        order = p.argsort(-1, descending=True)
        p, q = (one.gather(-1, order) for one in (p, q))
        p, q = (torch.cat([one[..., :k], one[..., k:].logsumexp(-1, keepdim=True)], -1) for one in (p, q))
        if k == REAL:
            p, q = p[..., :-1], q[..., :-1]

    def kl(a: Any, b: Any) -> Any:
        return torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def diverge_on_ranks(place: Place, dtype: str, cases: list[tuple[float, float, int | None]]) -> list[Any]:
    """Return for each case the divergences and this rank's part of the gradient of their weighed sum."""
    from functools import partial

    import torch.distributed as dist

    from trainer.losses.distillation import diverge
    from trainer.model.divergence import diverge_from_logits, diverge_from_top_k, find_top_k

    dist.init_process_group("gloo", init_method=place.init_method, rank=place.rank, world_size=place.world_size)
    *both, weights = make_case(dtype)
    student, teacher = (one.chunk(place.world_size, dim=-1)[place.rank].clone() for one in both)
    group, found = dist.group.WORLD, []
    for beta, temperature, k in cases:
        logits = student.clone().requires_grad_()
        judge = partial(diverge, beta=beta)
        if k is None:
            divergence = diverge_from_logits(logits * 1, teacher, temperature, judge, group)
        else:
            top = find_top_k(teacher, k, temperature, group)
            assert top.ids.shape == (ROWS, SEQ, k) and top.rest.shape == (ROWS, SEQ)
            divergence = diverge_from_top_k(logits * 1, top, temperature, judge, group)
        (divergence * weights).sum().backward()
        found.append((divergence.detach(), logits.grad))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_divergences_are_their_definition(ranks, world):
    import torch

    parts = ranks.run(diverge_on_ranks, "float32", CASES, world=world)
    student, teacher, weights = make_case("float32")
    for number, case in enumerate(CASES):
        exact = student.double().requires_grad_()
        expected = define(exact, teacher.double(), *case)
        (expected * weights).sum().backward()
        gradient = torch.cat([part[number][1] for part in parts], dim=-1)
        for part in parts:
            torch.testing.assert_close(part[number][0].double(), expected.detach(), rtol=1e-5, atol=1e-6)
        assert not gradient[..., REAL:].any(), "ids that are none have a gradient"
        torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_half_precision_is_judged_in_single(ranks):
    import torch

    student, teacher, _ = make_case("bfloat16")
    for part in ranks.run(diverge_on_ranks, "bfloat16", CASES, world=2):
        for (divergence, gradient), case in zip(part, CASES, strict=True):
            expected = define(student.double(), teacher.double(), *case)
            assert gradient.dtype == torch.bfloat16
            torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-6)
