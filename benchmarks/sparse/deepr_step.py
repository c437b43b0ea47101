"""One training step of DeepR, which looks at every live weight after every step, relative to a static sparse one.

Both are real fits that take turns, as in `masked_step`; LeNet-300-100 with the published recipe's penalty and first temperature."""
import argparse
import os
import statistics
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from benchmarks.sparse import masked_step
from benchmarks.sparse.masked_step import Runner, make_learner
from benchmarks.timing import paired, quartiles, write_table
from fastai.basics import OptimWrapper
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.methods import DeepR
from paramfx.sparse.penalties import L1

NET, TARGETS = 'LeNet-300-100', {.9: 1.5, .98: 1.25}  # sparsity -> at most this often the step of static masks
OPTS = {'SGD': 'SGD', 'torch SGD, Nesterov': 'nesterov'}
masked_step.OPTS['nesterov'] = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True)


def measure(sparsity, opt, rounds, repeats):
    "A row: DeepR over static masks"
    ratios, again, steps, moved = [], [], [], []
    batches = masked_step.NETS[NET][4]
    for r in range(repeats):
        kw = dict(regularizer=L1(1e-5), stop=2.)
        cbs = {'static': DynamicSparse(sparsity, 'static', **kw), 'static again': DynamicSparse(sparsity, 'static', **kw),
               'deepr': DynamicSparse(sparsity, DeepR(temperature=1e-3, eta=1e-3), **kw)}
        runs = {k: Runner(make_learner(NET, OPTS[opt], cb, seed=r), batches) for k, cb in cbs.items()}
        t = paired(runs, rounds=rounds)
        mean = [(a+b)/2 for a, b in zip(t['static'], t['static again'])]
        ratios += [d/m for d, m in zip(t['deepr'], mean)]
        again += [b/a for a, b in zip(t['static'], t['static again'])]
        steps += [m/batches for m in mean]
        moved.append(cbs['deepr'].effect.values['rewired']/cbs['deepr'].effect.clock.steps)
        for run in runs.values(): run.close()
    q = quartiles(ratios)
    return dict(sparsity=sparsity, optimizer=opt, ratio=q['median'], q1=q['q1'], q3=q['q3'], again=statistics.median(again), target=TARGETS[sparsity],
                met='yes' if q['median'] <= TARGETS[sparsity] else 'no', static_ms=1e3*statistics.median(steps), moved=statistics.mean(moved))


NOTE = """`DynamicSparse(method='deepr')`: noise on the gradients of live weights, and after every step all weights that changed their
sign replaced (`moved`: how many per step). Ratio to the step of `method='static'` of the same sparsity, whole steps of a running
`learn.fit` that take turns, medians and quartiles of the ratios within a round, CPU time, one thread. `again` is a second static fit
over the first: what it is off from 1 is noise. The published code's DeepR step takes 21 times its dense one."""


def run(sparsities=tuple(TARGETS), opts=tuple(OPTS), rounds=20, repeats=8):
    return [measure(s, o, rounds, repeats) for s in sparsities for o in opts]


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--rounds', type=int, default=20)
    ap.add_argument('--repeats', type=int, default=8)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = run(rounds=a.rounds, repeats=a.repeats)
    if a.dry:
        from benchmarks.timing import table
        print(table(rows))
    else: print(write_table('deepr_step', rows, NOTE).read_text())
