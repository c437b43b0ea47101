"""One rank of `test_ddp.py`: train a method with other initial weights on each rank, and leave what came of it in a folder."""
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.distributed import DistributedDL
from fastcore.basics import patch

torch.set_num_threads(1)
from contracts import METHODS, Probe, build, snapshot, tiny_dls
import paramfx.core.runs # brings `learn.save_plain`  # noqa: F401


@patch
def _broadcast(self:DistributedDL, t, rank):
    "fastai's own moves the numbers to a GPU"
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()


def train(m, out):
    rank = int(os.environ['RANK'])
    # fastai broadcasts nothing itself: DDP takes the weights of rank 0, and the masks have to follow
    more = dict(across_layers=False) if m.compressed else {}  # DDP wants gradients of one size
    learn = build(out, [m.make(**more, period=2, stop=1., init_mask='magnitude'), Probe(m)], seed=rank, dls=tiny_dls(n=128, bs=16), model=m.net)
    with learn.distrib_ctx(sync_bn=False): learn.fit_one_cycle(2, 1e-2)
    learn.save(f'{m.name}_ddp')
    plain = learn.save_plain(f'{m.name}_plain')
    torch.save(dict(facts=m.facts(learn), checksum=m.on(learn).store.checksum() if m.masked else 0,
        model=snapshot(learn.model), plain=str(plain)), out/f'{m.name}_{rank}.pt')
    with learn.distrib_ctx(sync_bn=False): learn.fit(1)  # a second context wraps the model anew
    torch.save(m.facts(learn), out/f'{m.name}_{rank}_again.pt')


if __name__ == '__main__':
    out = Path(sys.argv[1])
    dist.init_process_group('gloo')
    for m in METHODS.values():
        train(m, out)
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()
