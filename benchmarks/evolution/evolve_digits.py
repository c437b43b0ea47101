"""Generations on a hundred digits: what the whole network and its slim part are worth, beside one run of as many epochs.

scikit-learn's digits, 100 of them for training and the others to measure on; a residual network of four convolutions and width
32. Further rows: other policies, and a teacher from the generation before (born-again networks)."""
import argparse
import os
import statistics
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')

import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
import paramfx.evolution.evolve # gives Learner evolve  # noqa: F401
import torch
from fastai.basics import Callback, CancelValidException, CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback.progress import ProgressCallback
from torch import nn
from torch.nn.functional import relu
from benchmarks.timing import table, write_table
from paramfx.core.samples import sample_batch
from paramfx.data.memory import digits_dls
from paramfx.evolution.generations import Evaluation
from paramfx.evolution.masks import extract_slim
from paramfx.evolution.policies import KELS, LLF, WELS
from paramfx.report.cost import n_params

RATE, SLIM, NEAR = .5, 87., 2.  # share of channels; percent that the slim network has to reach, and how far it may be from the whole one
GENERATIONS, EPOCHS, LR = 6, 15, 2e-2


def everything(model, sample, gen):
    "Masks that keep no weight of a layer"
    return {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters() if p.ndim > 1}


WAYS = {'kels': dict(policy=KELS(RATE)), 'kels, taught': dict(policy=KELS(RATE), distill=.5), 'wels': dict(policy=WELS(RATE)),
    'llf': dict(policy=LLF('b1')), 'born again': dict(policy=everything, distill=.5)}


class Net(nn.Module):
    "Four convolutions, the last two of them around shortcuts"
    def __init__(self, width=32):
        super().__init__()
        def conv(n_in, stride=1): return nn.Conv2d(n_in, width, 3, stride, 1, bias=False)
        self.a1, self.a2, self.b1, self.b2, self.fc = conv(1), conv(width), conv(width, 2), conv(width), nn.Linear(width, 10)
        self.bna1, self.bna2, self.bnb1, self.bnb2 = (nn.BatchNorm2d(width) for _ in range(4))

    def forward(self, x):
        x = relu(self.bna1(self.a1(x)))
        x = relu(x + self.bna2(self.a2(x)))
        x = relu(self.bnb1(self.b1(x)))
        return self.fc(relu(x + self.bnb2(self.b2(x))).mean((2, 3)))


class Unseen(Callback):
    "No validation between the epochs: a hundred images are trained on faster than they are measured"
    def before_validate(self): raise CancelValidException


class Timed:
    "A fit method that remembers the CPU seconds and the seconds of each fit"
    def __init__(self, method='fit_one_cycle', unseen=True): self.method, self.unseen, self.cpu, self.wall = method, unseen, [], []

    def __call__(self, learn, epochs, *args, cbs=None, **kw):
        cpu, wall = time.process_time(), time.perf_counter()
        getattr(learn, self.method)(epochs, *args, cbs=[*cbs, *[Unseen()]*self.unseen], **kw)
        self.cpu.append(time.process_time()-cpu)
        self.wall.append(time.perf_counter()-wall)


def learner(net, dls, seed, **kw):
    for dl in dls.loaders: dl.rng.seed(seed)
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kw).remove_cb(ProgressCallback)


def digits(n=100, bs=16): return digits_dls(bs=bs, valid_pct=1-n/1797, device='cpu')


def network(seed):
    set_seed(seed)
    return Net()


def run_seed(seed, generations=GENERATIONS, epochs=EPOCHS, lr=LR, ways=WAYS):
    "Accuracies in percent by generation, and CPU seconds, of every way; the long run has one"
    res = {}
    for name, how in ways.items():
        learn, timed = learner(network(seed), digits(), seed), Timed()
        log = learn.evolve(generations, epochs, lr=lr, seed=seed, fit_method=timed, file=None, evaluation=Evaluation(long_run=name == 'kels'), **how)
        res[f'{name}, whole' if 'slim_accuracy' in log[0] else name] = [100*r['accuracy'] for r in log], sum(timed.cpu[:generations])
        if 'slim_accuracy' in log[0]: res[f'{name}, slim'] = [100*r['slim_accuracy'] for r in log], sum(timed.cpu[:generations])
        if log.long_run: res['one run'] = [100*log.long_run['accuracy']], timed.cpu[-1]
    return res


def rows(runs):
    "A row per way, means over seeds"
    res = []
    for how in runs[0]:
        accs = [[r[how][0][i] for r in runs] for i in range(len(runs[0][how][0]))]
        names = [f'generation {i+1}' for i in range(len(accs))] if len(accs) > 1 else ['last']
        res.append(dict(trained=how) | {n: statistics.mean(a) for n, a in zip(names, accs)} | dict(sd=statistics.stdev(accs[-1]) if len(runs) > 1 else 0.))
        res[-1]['last'] = statistics.mean(accs[-1])
        res[-1]['seconds'] = statistics.mean(r[how][1] for r in runs)
    last = {r['trained']: r['last'] for r in res}
    for r in res:
        if r['trained'] == 'kels, slim': r['met'] = 'yes' if r['last'] >= SLIM and abs(r['last']-last['kels, whole']) <= NEAR else 'no'
    return res


NOTE = """Accuracy in percent on the 1,697 digits that are not trained on, means over {seeds} seeds; {generations} generations
of {epochs} epochs, one-cycle Adam at {lr:g}, batches of 16, split rate .5. `sd` is over seeds, of the last generation; seconds
are CPU time of training. `one run`: the same first network, trained once for {all} epochs - what the generations cost. `taught`
and `born again` learn from the generation before, too (weight .5); `born again` keeps no weight. `slim` is cut out as it is and
has {slim:,} of {dense:,} parameters. Goal: slim at least 87 % and within 2 points of the whole."""


def note(seeds, generations, epochs, lr):
    net, x = network(0), sample_batch(digits())
    return NOTE.format(seeds=seeds, generations=generations, epochs=epochs, lr=lr, all=generations*epochs,
        slim=n_params(extract_slim(net, x, RATE))[0], dense=n_params(net)[0])


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--generations', type=int, default=GENERATIONS)
    ap.add_argument('--epochs', type=int, default=EPOCHS)
    ap.add_argument('--lr', type=float, default=LR)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    runs = [run_seed(s, a.generations, a.epochs, a.lr) for s in range(a.seeds)]
    text = note(a.seeds, a.generations, a.epochs, a.lr)
    if a.dry: print(table(rows(runs)))
    else: print(write_table('evolve_digits', rows(runs), text, runs=[{k: v[0] for k, v in r.items()} for r in runs]).read_text())
