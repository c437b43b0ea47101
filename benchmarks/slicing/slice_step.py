"""A training step over several rates, relative to the sum of the steps of the subnets, each a network of its own.

What both do: for each rate a forward and a backward pass over the same batch; then one step of SGD with momentum for the sliced
network, one per network for the subnets, and the gradients are zeroed."""
import argparse
import os
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from torch import nn
from benchmarks.timing import paired, quartiles, table, write_table
from paramfx.export.materialize import materialize
from paramfx.slicing.slice import at_rate, slice_model

TARGET = 1.05
NETS = {'resnet18, 64 px, batch 16': ('resnet18', 64, 16), 'resnet50, 64 px, batch 8': ('resnet50', 64, 8), 'resnet18, 32 px, batch 64': ('resnet18', 32, 64)}
SETS = ((1, .5, .25), (1, .75, .5, .25))


def optimizer(m): return torch.optim.SGD(m.parameters(), lr=1e-4, momentum=.9)
def backward(m, x, y): nn.functional.cross_entropy(m(x), y).backward()


def sliced_step(m, opt, rates, x, y):
    for r in rates:
        with at_rate(m, r): backward(m, x, y)
    opt.step()
    opt.zero_grad()


def subnet_steps(nets, x, y):
    for m, opt in nets:
        backward(m, x, y)
        opt.step()
        opt.zero_grad()


def plain_step(m, opt, x, y): subnet_steps([(m, opt)], x, y)


def measure(name, rates, rounds):
    import torchvision
    model, size, bs = NETS[name]
    torch.manual_seed(0)
    make, sample = partial(getattr(torchvision.models, model), num_classes=10), torch.randn(1, 3, size, size)
    m, plain = make(), make().train()
    slice_model(m, sample, rates=rates)
    nets = [materialize(m, sample, rate=r).train() for r in rates]
    x, y = torch.randn(bs, 3, size, size), torch.randint(10, (bs,))
    t = paired({'slices': partial(sliced_step, m.train(), optimizer(m), rates, x, y), 'subnets': partial(subnet_steps, [(n, optimizer(n)) for n in nets], x, y),
                'plain': partial(plain_step, plain, optimizer(plain), x, y)}, rounds=rounds)
    q, of_plain = (quartiles([a/b for a, b in zip(t['slices'], t[k])]) for k in ('subnets', 'plain'))
    return dict(network=name, rates=' '.join(f'{r:g}' for r in rates), ratio=q['median'], q1=q['q1'], q3=q['q3'], target=TARGET,
                met='yes' if q['median'] <= TARGET else 'no', of_plain_step=of_plain['median'])


NOTE = """One training step over several slice rates, over the steps of the subnets as networks of their own: medians and quartiles of the
ratios within a round, CPU time, one thread. `of_plain_step` is the same step over that of the whole network alone."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--rounds', type=int, default=15)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = [measure(n, s, a.rounds) for n in NETS for s in SETS]
    print(table(rows) if a.dry else write_table('slice_step', rows, NOTE).read_text())
