"""Accuracy of networks split along learned groups, beside the dense and a randomly split one, on scikit-learn's digits.

A perceptron 64-128-128-10 and the zoo's convnet, two groups, four seeds of the initial assignments, batches and random splits.
All begin with one trained network, as the warm-up of `gamma_disjoint` asks for, and one row goes without both: there the
initial noise decides."""
import argparse
import os
import statistics

os.environ.setdefault('OMP_NUM_THREADS', '1')

from collections import Counter

import torch
from torch import nn
from benchmarks.slicing.slice_digits import fit, learner, score
from benchmarks.timing import table, write_table
from fastai.basics import set_seed
from paramfx import zoo
from paramfx.core.samples import sample_batch
from paramfx.core.forward import copy_model
from paramfx.splitnet.split import masked_model, split_model
from paramfx.splitnet.callback import SplitNet, SplitPenalty

COST, SAME = .5, 3  # points of accuracy that masking may cost on average; seeds of four with one partition


def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
def conv(): return zoo.build('digits/convnet')


NETS = {'mlp 64-128-128-10': (mlp, {'3': 2, '5': 2}), 'convnet': (conv, {'6': 2, '11': 2})}


def params(model): return sum(p.numel() for p in model.parameters())


def partition(groups):
    "Groups of classes, whatever their numbers"
    return tuple(sorted(tuple(c for c, g in enumerate(groups.tolist()) if g == k) for k in groups.unique()))


def train(model, seed, epochs, lr, cb=None):
    "At a constant rate, so that weights between groups go on shrinking until the end"
    learn = learner(model, seed)
    if cb is not None: learn.add_cb(cb)
    with learn.no_logging(): learn.fit(epochs, lr)
    return learn


def learn_groups(model, splits, seed, epochs, lr, regularizer=SplitPenalty()):
    "The network that was trained with SplitNet, and its groups"
    cb = SplitNet(splits, regularizer, seed=seed)
    learn = train(model, seed, epochs, lr, cb)
    groups = cb.groups()
    learn.materialize(sample_batch(learn.dls))
    return learn.model, groups


def begin(make, seed, epochs, lr=1e-2):
    set_seed(seed)
    learn = learner(make(), seed)
    fit(learn, epochs, lr)
    return learn


def run_seed(start, make, splits, seed, epochs, tune, lr=1e-3):
    "Row -> (accuracy, parameters, partition of the classes or None)"
    x, dls = sample_batch(start.dls), start.dls
    def outcome(m, top=None): return score(m, dls), params(m), None if top is None else partition(top)
    def tuned(m): return outcome(train(m, seed, tune, lr).model)
    dense = train(copy_model(start.model), seed, epochs, lr).model
    model, groups = learn_groups(copy_model(start.model), splits, seed, epochs, lr)
    top = groups[[*groups][-1]]
    how, chance = dict(groups=groups, splits=splits), dict(classes='random', seed=seed, splits=splits)
    res = {'dense': outcome(dense), 'with SplitNet, uncut': outcome(model, top), 'masked': outcome(masked_model(model, x, **how)),
           'split': outcome(split_model(model, x, **how)), 'split, finetuned': tuned(split_model(model, x, **how)),
           'dense, split at random': outcome(split_model(dense, x, **chance)), 'dense, split at random, finetuned': tuned(split_model(dense, x, **chance))}
    set_seed(seed)
    other, groups = learn_groups(make(), splits, seed, epochs, lr, SplitPenalty(disjoint_warmup=None))
    return res | {'SplitNet, untrained start, no warm-up': outcome(other, groups[[*groups][-1]])}


def rows(name, runs):
    "Means over seeds"
    res, mean = [], {k: statistics.mean(r[k][0] for r in runs) for k in runs[0]}
    for k in runs[0]:
        accs, parts = [r[k][0] for r in runs], [r[k][2] for r in runs]
        row = dict(network=name, trained=k, accuracy=mean[k], sd=statistics.stdev(accs) if len(accs) > 1
            else 0., parameters=round(statistics.mean(r[k][1] for r in runs)))
        if None not in parts: row['same_partition'] = f'{Counter(parts).most_common(1)[0][1]} of {len(runs)}'
        if k == 'with SplitNet, uncut': row['met'] = 'yes' if Counter(parts).most_common(1)[0][1] >= SAME/4*len(runs) else 'no'
        if k == 'masked': row |= dict(change=mean[k]-mean['with SplitNet, uncut'], met='yes' if mean['with SplitNet, uncut']-mean[k] <= COST+1e-6 else 'no')
        if k == 'dense, split at random': row['change'] = mean[k]-mean['dense']
        res.append(row)
    return res


def run(seeds=4, epochs=40, tune=10, first=20):
    "Rows, and what each seed gave"
    res, every = [], {}
    for name, (make, splits) in NETS.items():
        start = begin(make, 0, first)
        every[name] = [run_seed(start, make, splits, s, epochs, tune) for s in range(seeds)]
        res += rows(name, every[name])
    return res, every


NOTE = f"""Validation accuracy in percent on 360 digits, means and deviations over {{seeds}} seeds. One network is trained for
{{first}} epochs; dense and SplitNet go on from there for {{epochs}}; split networks are finetuned for {{tune}}. `change` is
what masking, or a random split of the dense network, does at once; masking may cost {COST} points. `same_partition`: seeds that
found the most frequent partition of the ten classes; {SAME} of 4 are asked for."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--seeds', type=int, default=4)
    ap.add_argument('--epochs', type=int, default=40)
    ap.add_argument('--tune', type=int, default=10)
    ap.add_argument('--first', type=int, default=20)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    how = dict(seeds=a.seeds, epochs=a.epochs, tune=a.tune, first=a.first)
    res, every = run(**how)
    print(table(res) if a.dry else write_table('split_digits', res, NOTE.format(**how),
        runs=[dict(network=n, seed=i, **r) for n, rs in every.items() for i, r in enumerate(rs)]).read_text())
