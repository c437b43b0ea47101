"""One training step with tied weights, relative to a plain fastai step.

Every candidate is a real `learn.fit` that takes turns with the others, as in `masked_step`."""
import argparse
import statistics

from benchmarks.sparse import masked_step  # sets the threads before torch comes
from benchmarks.sparse.masked_step import Runner, make_learner
from benchmarks.timing import paired, quartiles, table, write_table

import torch
import paramfx.sparse.tied # brings `learn.tie`  # noqa: F401

NET, SPARSITY = 'LeNet-300-100', .98
TIED = {  # candidate -> (settings of `learn.tie`, target)
    'tied': (dict(), 1.2),
    'tied, sign hash': (dict(sign_hash=True), 1.3),
    'tied, rescaled gradient': (dict(rescale_grad=True), 1.2),
}


def measure(opt, rounds=20, repeats=8, net=NET, sparsity=SPARSITY):
    "Rows of one optimizer"
    batches, steps, plain = masked_step.NETS[net][4], {}, []
    for r in range(repeats):
        learns = {'plain': make_learner(net, opt, seed=r), 'plain again': make_learner(net, opt, seed=r)}
        learns |= {k: make_learner(net, opt, seed=r).tie(sparsity, seed=r, **kw) for k, (kw, _) in TIED.items()}
        runs = {k: Runner(learn, batches) for k, learn in learns.items()}
        times = paired(runs, rounds=rounds, warmup=3)
        for run in runs.values(): run.close()
        one, two = times.pop('plain'), times.pop('plain again')
        steps.setdefault('plain again', []).extend(b/a for a, b in zip(one, two))
        for k, v in times.items(): steps.setdefault(k, []).extend(2*t/(a+b) for t, a, b in zip(v, one, two))
        plain += one+two
    ms, rows = 1e3*statistics.median(plain)/batches, []
    for k, v in steps.items():
        q, goal = quartiles(v), TIED.get(k, (None, None))[1]
        rows.append(dict(network=net, optimizer=opt, step=k, ratio=q['median'], q1=q['q1'], q3=q['q3'], target='' if goal is None else goal,
                         met='' if goal is None else 'yes' if q['median'] <= goal else 'no', plain_ms=ms))
    return rows


NOTE = """One whole training step of a running `learn.fit` (loading, every event, optimizer), relative to the mean of two plain fits
that take turns with it: medians and quartiles of the ratios within a round, CPU time, one thread. Batches of 100, 784 inputs;
all three matrices are tied, to a fiftieth of their size. `plain again` is the second plain fit over the first: what it is off
from 1 is noise."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--opt', nargs='*', default=['SGD', 'Adam'], choices=list(masked_step.OPTS))
    ap.add_argument('--rounds', type=int, default=20, help='per repeat')
    ap.add_argument('--repeats', type=int, default=8)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = [row for opt in a.opt for row in measure(opt, a.rounds, a.repeats)]
    print(table(rows) if a.dry else write_table('tied_step', rows, NOTE).read_text())
