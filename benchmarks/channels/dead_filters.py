"""What dead filters cost, before and after they are cut out: a forward pass of the dense network, of the same with half of its
filters masked, and of the ordinary network that `materialize` makes of that.

Norms are set as after training: a dead filter has mean 0, and a shift of its own. In the residual network the filters inside of
the blocks are masked: a channel of the residual sum is dead only where all layers that add to it agree."""
import argparse
import os
import time
import warnings
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from torch import nn
from benchmarks.zoo.networks import small_cnn
from benchmarks.timing import paired, ratios, write_table
from paramfx import zoo
from paramfx.core.layers import CONVS
from paramfx.core.forward import check_same
from paramfx.export.materialize import materialize
from paramfx.sparse.sparsify import sparsify

CASES = {  # name -> (builder, shape of a picture, layers that are masked)
    'demo': (partial(zoo.build, 'digits/convnet'), (1, 8, 8), CONVS),
    'small CNN': (small_cnn, (3, 32, 32), CONVS),
    'resnet18, 64 pixels': (partial(zoo.build, 'imagenet/resnet18'), (3, 64, 64), 'layer*.conv1'),
}
BATCHES = (1, 32)


def prepare(name, sparsity=.5, cases=CASES):
    "Dense, masked and materialized network, and the share of parameters left"
    build, shape, include = cases[name]
    torch.manual_seed(0)
    dense, x = build(), torch.randn(16, *shape)
    masked = build()
    sparsify(masked, sparsity, granularity='filter', include=include)
    for model in (dense, masked):
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for m in norms:
            m.momentum = 1.
            nn.init.normal_(m.bias, 0, .2)
        with torch.no_grad(): model.train()(x)
        model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        small = materialize(masked, x[:2])
    count = lambda m: sum(p.numel() for p in m.parameters())
    return dict(dense=dense, masked=masked, materialized=small), count(small)/count(dense), check_same(small, masked, x)


def _repeats(model, x, seconds=.03):
    "Forwards that take about `seconds`, far above the grain of the clock"
    with torch.no_grad():
        model(x)
        start = time.perf_counter()
        for _ in range(10): model(x)
    return max(1, int(10*seconds/(time.perf_counter()-start)))


def measure(name, rounds, batches=BATCHES, cases=CASES):
    "Rows of one network"
    models, left, error = prepare(name, cases=cases)
    rows = []
    for bs in batches:
        x = torch.randn(bs, *cases[name][1])
        repeat = _repeats(models['dense'], x)

        def forwards(m):
            with torch.no_grad():
                for _ in range(repeat): m(x)
        times = paired({k: (lambda m=m: forwards(m)) for k, m in models.items()}, rounds=rounds)
        for k, r in ratios(times, 'dense').items():
            rows.append(dict(network=name, batch=bs, forward=k, ratio=r['median'], q1=r['q1'], q3=r['q3'],
                             parameters=1. if k == 'masked' else left, difference=error if k == 'materialized' else ''))
    return rows


NOTE = """CPU time of a forward pass in evaluation mode on one thread, relative to the dense network in the same round.
`parameters`: share of the dense network's; `difference`: of the outputs, relative to the largest."""


def run(names=tuple(CASES), rounds=40):
    "All rows"
    return [r for name in names for r in measure(name, rounds)]


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--rounds', type=int, default=40)
    print(write_table('dead_filters', run(rounds=ap.parse_args().rounds), NOTE).read_text())
