"""CIFAR-10: ResNet-32 with shared bases against plain ResNet-20 and ResNet-32, and the trained ResNet-32 converted.

On half of the training images; all runs together take about an hour of one core. Needs `PARAMFX_DATA`."""
import argparse
import os
import time
from copy import copy, deepcopy
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')

import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
import torch
from fastai.basics import SGD, Callback, CancelValidException, CrossEntropyLossFlat, Learner, set_seed
from fastai.callback.progress import ProgressCallback
from torch.optim.swa_utils import update_bn
from benchmarks.slicing.slice_digits import score
from benchmarks.timing import table, write_table
from paramfx import zoo
from paramfx.bases.callback import OrthoReg
from paramfx.core.samples import sample_batch
from paramfx.data.images import cifar_dls
from paramfx.report.cost import cost

N_TRAIN, N_TEST = 25_000, 10_000
SHARED = {'S16U1': dict(shared_rank=16), 'S8U1': dict(shared_rank=8), 'S32U4 without norm': dict(shared_rank=32, unique_rank=4, basis_norm=False)}


class NoValidation(Callback):
    "The network is scored once, at the end"
    def before_validate(self): raise CancelValidException


def network(name, seed):
    "A network of the zoo"
    set_seed(seed)
    return zoo.build(f'cifar10/{name}').to(memory_format=torch.channels_last)


def learner(net, seed):
    dls = cifar_dls(n_classes=10, bs=64, device='cpu', n=(N_TRAIN, N_TEST))
    set_seed(seed)
    for dl in dls.loaders: dl.rng.seed(seed)
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), wd=5e-4, cbs=NoValidation).remove_cb(ProgressCallback)


def fit(learn, epochs, lr, cbs=None):
    "Minutes of CPU time"
    start = time.process_time()
    with learn.no_logging(): learn.fit_one_cycle(epochs, lr, cbs=cbs)
    return (time.process_time()-start)/60


def row(what, learn, x, epochs, minutes):
    c = cost(learn.model, x, latency=False)
    return dict(network=what, epochs=epochs, error=100-score(learn.model, learn.dls), params=c.params, mmacs=c.macs/1e6, minutes=minutes)


def converted(what, seed, state, x, epochs, lr, make):
    "Rows of the trained network converted: at once, with the statistics of its norms measured anew, and after an epoch more"
    learn = make(network('resnet32', seed), seed)
    learn.model.load_state_dict(state)
    learn.share_bases(init='svd', **dict(basis_norm='calibrated') | SHARED[what])
    name = f'ResNet-32-{what}, converted'
    rows = [row(f'{name} by SVD', learn, x, epochs, 0.)]
    measured = copy(learn)
    measured.model = deepcopy(learn.model)
    update_bn(learn.dls.train, measured.model)
    rows.append(row(f'{name}, norms measured anew', measured, x, epochs, 0.))
    minutes = fit(learn, 1, lr/5, OrthoReg(unique=True))
    return rows + [row(f'{name}, an epoch more', learn, x, epochs+1, minutes)]


def run(seed=0, epochs=8, lr=.05, make=learner, tell=lambda r: None):
    "A row per network; `tell` is given each list of rows as it is done"
    rows, state = [], None
    def done(new):
        rows.extend(new)
        tell(new)
    for name in ('resnet20', 'resnet32'):
        learn = make(network(name, seed), seed)
        x = sample_batch(learn.dls)
        done([row(f'plain ResNet-{name[-2:]}', learn, x, epochs, fit(learn, epochs, lr))])
    state = learn.model.state_dict()
    for what in SHARED: done(converted(what, seed, state, x, epochs, lr, make))
    for what, how in SHARED.items():
        learn = make(network('resnet32', seed), seed)
        learn.share_bases(**how)
        done([row(f'ResNet-32-{what}', learn, x, epochs, fit(learn, epochs, lr, OrthoReg(unique=True)))])
    return rows


NOTE = """Error in percent on the 10,000 test images, parameters, million multiply-adds of one picture, and minutes of CPU time. One seed,
{epochs} epochs of one cycle over {n:,} training images with random crops and mirror images, in batches of 64: far from the published recipe,
which ends at 8.08 % (S8U1) and 7.43 % (S16U1) after 300 epochs on twice the images, so the order of these networks says little of theirs.
SGD with momentum, learning rate {lr}, weight decay 5e-4; `OrthoReg(unique=True)`. `converted`: the plain ResNet-32 above with
`share_bases(init='svd', basis_norm='calibrated')`, or without norm; then the statistics of all norms measured on the training images by
`torch.optim.swa_utils.update_bn`, or one epoch more at a fifth of the rate instead."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--epochs', type=int, default=8)
    ap.add_argument('--lr', type=float, default=.05)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = run(epochs=a.epochs, lr=a.lr, tell=lambda new: print(table(new), flush=True))
    if not a.dry: write_table('bases_cifar', rows, NOTE.format(epochs=a.epochs, lr=a.lr, n=N_TRAIN))
