"""Accuracy of one sliced network at each rate, against networks trained at that width alone, on scikit-learn's digits.

Five seeds; the network is `zoo.build('digits/convnet')`. Rows of comparison: the network trained at full width only and then
sliced, as it is and with statistics measured again; what it would cost to train each width on its own is the last column."""
import argparse
import os
import statistics
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')

import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback.progress import ProgressCallback
from benchmarks.timing import table, write_table
from paramfx import zoo
from paramfx.core.samples import sample_batch
from paramfx.data.memory import digits_dls
from paramfx.export.materialize import materialize
from paramfx.slicing.tools import recalibrate
from paramfx.slicing.callback import SliceTrain
from paramfx.slicing.slice import at_rate, slice_model

RATES, NEAR = (1, .75, .5, .25), .5  # points of accuracy that a slice may lie below a network of its own
HOW = dict(schedule='random_min_max')


def learner(net, seed, bs=64):
    dls = digits_dls(bs=bs, device='cpu')
    set_seed(seed)
    for dl in dls.loaders: dl.rng.seed(seed)
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy).remove_cb(ProgressCallback)


def network(seed):
    set_seed(seed)
    return zoo.build('digits/convnet')


def fit(learn, epochs, lr, cbs=None):
    start = time.process_time()
    with learn.no_logging(): learn.fit_one_cycle(epochs, lr, cbs=cbs)
    return time.process_time()-start


def score(model, dls):
    "Accuracy in percent, over the model itself"
    model.eval()
    with torch.no_grad(): hits = [(model(x).argmax(1) == y).float() for x, y in dls.valid]
    return 100*float(torch.cat(hits).mean())


def scores(model, dls):
    res = []
    for r in RATES:
        with at_rate(model, r): res.append(score(model, dls))
    return res


def run_seed(seed, epochs, lr):
    "Accuracies at each rate, and seconds, of every way to train"
    learn = learner(network(seed), seed)
    seconds = fit(learn, epochs, lr, SliceTrain(rates=RATES, **HOW))
    res = {'slice-trained': (scores(learn.model, learn.dls), seconds)}
    plain = learner(network(seed), seed)
    seconds = fit(plain, epochs, lr)
    slice_model(plain.model, sample_batch(plain.dls), rates=RATES)
    res['plain, sliced'] = scores(plain.model, plain.dls), seconds
    recalibrate(plain)
    res['plain, recalibrated'] = scores(plain.model, plain.dls), seconds
    alone, total = [], 0
    for r in RATES:
        m = network(seed)
        slice_model(m, sample_batch(plain.dls), rates=RATES)
        one = learner(materialize(m, sample_batch(plain.dls), rate=r), seed)
        total += fit(one, epochs, lr)
        alone.append(score(one.model, one.dls))
    res['separately trained'] = alone, total
    return res


def rows(runs):
    "A row per way, means over seeds"
    res, base = [], [statistics.mean(r['separately trained'][0][i] for r in runs) for i in range(len(RATES))]
    for how in runs[0]:
        acc = [[r[how][0][i] for r in runs] for i in range(len(RATES))]
        row = dict(trained=how) | {f'rate {r:g}': statistics.mean(a) for r, a in zip(RATES, acc)}
        row |= dict(worst_difference=min(statistics.mean(a)-b for a, b in zip(acc, base)), sd=max(statistics.stdev(a) if len(a) > 1 else 0. for a in acc),
                    seconds=statistics.mean(r[how][1] for r in runs))
        if how == 'slice-trained': row['met'] = 'yes' if row['worst_difference'] >= -NEAR - 1e-6 else 'no'
        res.append(row)
    return res


NOTE = f"""Validation accuracy in percent on 360 digits after {{epochs}} epochs, means over {{seeds}} seeds; `sd` is the largest
deviation over seeds of a column. `worst_difference` is over the rates, from a network trained at that width alone; it may be
-{NEAR}. Seconds of CPU time."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--seeds', type=int, default=5)
    ap.add_argument('--epochs', type=int, default=30)
    ap.add_argument('--lr', type=float, default=2e-2)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    runs = [run_seed(s, a.epochs, a.lr) for s in range(a.seeds)]
    if a.dry: print(table(rows(runs)))
    else: print(write_table('slice_digits', rows(runs), NOTE.format(epochs=a.epochs, seeds=a.seeds),
        runs=[{k: v[0] for k, v in r.items()} for r in runs]).read_text())
