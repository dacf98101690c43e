"""lfq_entropy over two processes: values and gradients of one process with the global batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import magvit_fast as mf

IMPLS = ("native", "reference")
SHARES = (30, 11)  # unequal on purpose: positions count alike, not processes


def _global_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(sum(SHARES), 8, generator=generator) * 0.05
    return z, torch.rand(sum(SHARES), generator=generator) < 0.8


def _loss(z: torch.Tensor, mask: torch.Tensor, impl: str, sync: bool) -> torch.Tensor:
    sample, codebook = mf.lfq_entropy(z, mask=mask, sync=sync, impl=impl)
    return sample - 0.7 * codebook


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SHARES)
    )
    z, mask = (x.split(SHARES)[rank] for x in _global_batch())
    for impl in IMPLS:
        # A parameter, and its gradient averaged over processes, as DistributedDataParallel does.
        weight = torch.ones(8, requires_grad=True)
        loss = _loss(z * weight, mask, impl, sync=True)
        loss.backward()
        assert weight.grad is not None
        dist.all_reduce(weight.grad)
        torch.save((loss.detach(), weight.grad / len(SHARES)), f"{folder}/{impl}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.start_processes(_work, (str(tmp_path),), nprocs=len(SHARES), start_method="fork")
    z, mask = _global_batch()
    for impl in IMPLS:
        weight = torch.ones(8, requires_grad=True)
        expected = _loss(z * weight, mask, impl, sync=False)
        expected.backward()
        for rank in range(len(SHARES)):
            loss, grad = torch.load(tmp_path / f"{impl}{rank}.pt")
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(grad, weight.grad, rtol=1e-5, atol=1e-6)


def test_sync_without_processes_is_local() -> None:
    z, mask = _global_batch()
    assert float(_loss(z, mask, "native", sync=True)) == float(_loss(z, mask, "native", sync=False))
