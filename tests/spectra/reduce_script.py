"""One rank of the distributed test: python reduce_script.py RANK WORLD RENDEZVOUS OUT"""

from __future__ import annotations

import sys

import torch

from optimum_rmtkd.spectra import SecondMoments


def batches(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6 + rank, 10, 5, generator=generator, dtype=torch.float64) + 100 * rank


def main() -> None:
    rank, world, rendezvous, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    moments = SecondMoments(5, null_moments=True)
    if rank < 2:  # the third process has no data and must not hang or change anything
        moments.update(batches(rank))
    if rank == 0:
        moments.update_gradient(batches(0))
    moments.all_reduce()
    torch.save(moments.state_dict(), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
