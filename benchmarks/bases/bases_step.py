"""Training steps of ResNet-32 with shared bases, relative to those of the plain network and to the published form; penalty; folded inference.

The published form runs each layer as it is drawn: two convolutions, their outputs side by side, a batch norm, a 1x1 convolution."""
import argparse
import os
import warnings
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
import torch.nn.functional as F
from torch import nn
from benchmarks.timing import paired, quartiles, table, write_table
from paramfx import zoo
from paramfx.bases.layers import BasisConv2d
from paramfx.bases.share import share_bases
from paramfx.core.optimizers import swap_module
from paramfx.bases.ortho import ortho_penalty
from paramfx.bases.callback import basis_groups
from paramfx.export.materialize import materialize

NETWORK, LAYOUTS = 'cifar10/resnet32', {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
TARGETS = {(16, 'norm'): 1.9, (8, 'norm'): 1.3, (16, 'no norm'): 1.06, (8, 'no norm'): 1.06, (16, 'frozen norm'): 1.06, (8, 'frozen norm'): 1.06,
           (16, 'frozen statistics'): 1.06, (8, 'frozen statistics'): 1.06}
STEPS = 3  # in a row, as in training: a single one between those of other networks would find all its weights out of the cache
PUBLISHED, PENALTY, FOLDED = .95, .03, 1.05


class Published(nn.Module):
    "A layer in the published form, with the tensors of ours"
    def __init__(self, m):
        super().__init__()
        self.norm, self.unique, self.shared, self.coeff, self.how = m.norm, m.unique, m.basis, m.coeff, (m.stride, m.padding, m.dilation)
    def forward(self, x):
        z = torch.cat([F.conv2d(x, w, None, *self.how) for w in (self.unique, self.shared)], 1)
        return F.conv2d(self.norm(z), self.coeff)


def shared(rank, how='norm', seed=0):
    "The network with shared bases; how: 'norm', 'no norm', 'frozen norm', 'frozen statistics' or 'published form'"
    torch.manual_seed(seed)
    net = zoo.build(NETWORK)
    share_bases(net, torch.randn(1, 3, 32, 32), shared_rank=rank, basis_norm=how != 'no norm')
    net.train()
    for n, m in [o for o in net.named_modules() if isinstance(o[1], BasisConv2d)]:
        if how.startswith('frozen'): m.norm.eval().requires_grad_(how == 'frozen statistics')
        if how == 'published form': swap_module(net, n, Published(m))
    return net


def biased(seed=0):
    "The plain network, with a bias in the convolutions that would share: what a frozen norm is folded to"
    torch.manual_seed(seed)
    net = zoo.build(NETWORK).train()
    for n, m in shared(16).named_modules():
        if isinstance(m, BasisConv2d): net.get_submodule(n).bias = nn.Parameter(torch.zeros(m.out_channels))
    return net


def stepper(net, x, y, layout):
    "Steps of SGD with momentum"
    net.to(memory_format=layout)
    opt, x = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=.9), x.to(memory_format=layout)
    def steps():
        for _ in range(STEPS):
            F.cross_entropy(net(x), y).backward()
            opt.step()
            opt.zero_grad()
    return steps


def agree(rank, x):
    "Largest difference of the outputs of our form and the published one, in training mode"
    a, b = (shared(rank, how)(x) for how in ('norm', 'published form'))
    return float((a-b).abs().max()/a.abs().max())


def penalty_step(net):
    "The penalty and its gradient, as often"
    (groups,) = basis_groups(net)
    def steps():
        for _ in range(STEPS):
            (10*ortho_penalty(groups, unique=True)).backward()
            for p in net.parameters(): p.grad = None
    return steps


def rows_of(times, base, rank, layout, targets):
    for name, target in targets.items():
        q = quartiles([t/b for t, b in zip(times[name], times[base])])
        yield dict(what=f'S{rank}U1, {name} / {base}', layout=layout, ratio=q['median'], q1=q['q1'],
            q3=q['q3'], target=target, met='yes' if q['median'] <= target else 'no')


def measure(rank, layout, rounds, bs=64):
    "Rows of one rank in one memory layout"
    torch.manual_seed(1)
    x, y = torch.randn(bs, 3, 32, 32), torch.randint(10, (bs,))
    assert agree(rank, x) < 1e-3, 'the published form does not compute the same'
    hows, fmt = ('norm', 'no norm', 'frozen norm', 'frozen statistics'), LAYOUTS[layout]
    fns = {h: stepper(shared(rank, h), x, y, fmt) for h in (*hows, 'published form')}
    fns |= {'plain': stepper(zoo.build(NETWORK).train(), x, y, fmt), 'plain with biases': stepper(biased(), x, y, fmt), 'penalty': penalty_step(shared(rank))}
    times = paired(fns, rounds, warmup=1)
    rows = [*rows_of(times, 'plain', rank, layout, {h: TARGETS[rank, h] for h in hows})]
    rows += rows_of(times, 'plain with biases', rank, layout, {h: TARGETS[rank, h] for h in hows[2:]})
    rows += rows_of(times, 'published form', rank, layout, {'norm': PUBLISHED})
    return rows + [*rows_of(times, 'norm', rank, layout, {'penalty': PENALTY})]


def inference(rank, layout, rounds, bs=64):
    "A row: folded network against the plain one"
    torch.manual_seed(1)
    x, fmt = torch.randn(bs, 3, 32, 32).to(memory_format=LAYOUTS[layout]), LAYOUTS[layout]
    nets = {'folded': materialize(shared(rank).eval(), x[:1]), 'plain': zoo.build(NETWORK)}
    for net in nets.values(): net.eval().to(memory_format=fmt)
    with torch.inference_mode(): times = paired({n: partial(net, x) for n, net in nets.items()}, rounds, warmup=1)
    return [*rows_of(times, 'plain', rank, layout, {'folded': FOLDED})]


def run(rounds=8, ranks=(16, 8), bs=64):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return [r for rank in ranks for k in LAYOUTS for f in (measure, inference) for r in f(rank, k, rounds, bs)]


NOTE = """ResNet-32 (widths 16, 32, 64) on random pictures of 32x32, batch 64: forward, backward and a step of SGD with
momentum, {steps} steps in a row as in training, one thread, CPU time, medians and quartiles of the ratios within {rounds}
interleaved rounds. `norm`: the published batch norm between filters and coefficients; in the others the kernel is formed each
step and run as a plain convolution. `frozen norm`: nothing of it is trained, as under fastai's `BnFreeze`; `frozen statistics`:
its scale and shift are. What such a norm adds becomes a bias, whose gradient reads all maps once more: `plain with biases` is
the plain network with a bias in the same convolutions. `penalty`: value and gradient with unique filters."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--rounds', type=int, default=8)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    rows = run(a.rounds)
    print(table(rows) if a.dry else write_table('bases_step', rows, NOTE.format(rounds=a.rounds, steps=STEPS)).read_text())
