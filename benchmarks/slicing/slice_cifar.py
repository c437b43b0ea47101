"""CIFAR-10: a small residual network sliced, against networks trained at each width alone.

Three basic blocks of 16, 32 and 64 channels on half-size pictures, so that a run takes minutes; needs `PARAMFX_DATA`."""
import argparse
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback.progress import ProgressCallback
from torch import nn
from benchmarks.slicing.slice_digits import fit, score
from benchmarks.timing import table, write_table
from paramfx.core.samples import sample_batch
from paramfx.data.images import cifar_dls
from paramfx.export.materialize import materialize
from paramfx.report.cost import cost
from paramfx.slicing.tools import recalibrate
from paramfx.slicing.callback import SliceTrain
from paramfx.slicing.slice import at_rate, slice_model

RATES = (1, .75, .5, .25)


def network(seed):
    "A residual network of torchvision's basic blocks, 78,042 parameters"
    from torchvision.models.resnet import BasicBlock
    set_seed(seed)
    def block(n_in, n, stride):
        down = None if stride == 1 and n_in == n else nn.Sequential(nn.Conv2d(n_in, n, 1, stride, bias=False), nn.BatchNorm2d(n))
        return BasicBlock(n_in, n, stride, down)
    return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         block(16, 16, 1), block(16, 32, 2), block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def learner(net, seed, **kw):
    dls = cifar_dls(n_classes=10, bs=64, device='cpu', **kw)
    set_seed(seed)
    for dl in dls.loaders: dl.rng.seed(seed)
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy).remove_cb(ProgressCallback)


def scores(model, dls):
    res = {}
    for r in RATES:
        with at_rate(model, r): res[f'rate {r:g}'] = score(model, dls)
    return res


def run(seed=0, epochs=10, lr=1e-2, make=learner):
    "A row per way to train"
    learn = make(network(seed), seed)
    x = sample_batch(learn.dls)
    seconds = fit(learn, epochs, lr, SliceTrain(rates=RATES))
    rows = [dict(trained='slice-trained') | scores(learn.model, learn.dls) | dict(seconds=seconds)]
    plain = make(network(seed), seed)
    seconds = fit(plain, epochs, lr)
    slice_model(plain.model, x, rates=RATES)
    rows.append(dict(trained='plain, sliced') | scores(plain.model, plain.dls) | dict(seconds=seconds))
    recalibrate(plain)
    rows.append(dict(trained='plain, recalibrated') | scores(plain.model, plain.dls) | dict(seconds=seconds))
    alone, total, macs = {}, 0, {}
    for r in RATES:
        m = network(seed)
        slice_model(m, x, rates=RATES)
        one = make(materialize(m, x, rate=r), seed)
        total += fit(one, epochs, lr)
        alone[f'rate {r:g}'] = score(one.model, one.dls)
        macs[f'rate {r:g}'] = cost(one.model, x, latency=False).macs/1e6
    return rows + [dict(trained='separately trained') | alone | dict(seconds=total), dict(trained='million multiply-adds') | macs]


NOTE = """Accuracy in percent on the test images after {epochs} epochs, one seed, pictures of 16x16 pixels: one network for all rates beside one
for each. `plain` is trained at full width only and sliced afterwards, with statistics as they are and measured again. Seconds of CPU time."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--epochs', type=int, default=10)
    ap.add_argument('--lr', type=float, default=1e-2)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = run(epochs=a.epochs, lr=a.lr)
    print(table(rows) if a.dry else write_table('slice_cifar', rows, NOTE.format(epochs=a.epochs)).read_text())
