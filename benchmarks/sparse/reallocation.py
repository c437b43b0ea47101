"""One whole reallocation: drop, quotas, growth, weights, optimizer state and masks.

Before every timed rewire weights, momentum and masks are put back (unmeasured), so that each moves the same share."""
import argparse
import gc
import os
import time
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from fastai.basics import SGD, CrossEntropyLossFlat, DataLoaders, Learner
from benchmarks.timing import quartiles, write_table
from paramfx.data.memory import InMemory, MemoryDL
from paramfx import zoo
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.published import PUBLISHED_DENSE

CASES = {  # name -> (builder, settings, target in seconds)
    'ResNet-50': (partial(zoo.build, 'imagenet/resnet50'), dict(sparsity=.9), .10),
    'ResNet-50, kernels': (partial(zoo.build, 'imagenet/resnet50'), dict(sparsity=.9, granularity='kernel'), None),
    'WRN-28-2': (partial(zoo.build, 'cifar10/wrn_28_2'), dict(sparsity=.9, exclude=PUBLISHED_DENSE['wrn_28_2']), .010),
    'LeNet-300-100': (partial(zoo.build, 'mnist/lenet_300_100'), dict(sparsity=.98), .001),
}


def make(build, settings, opt_func=partial(SGD, mom=.9)):
    "A callback in force on a network with momentum, its threshold set to move a tenth of the live units"
    torch.manual_seed(0)
    model = build()
    x = InMemory(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), vocab=[0, 1])
    learn = Learner(DataLoaders(MemoryDL(x, bs=2), MemoryDL(x, bs=2)), model, CrossEntropyLossFlat(), opt_func=opt_func)
    cb = DynamicSparse(**settings)
    learn.add_cb(cb)
    learn.create_opt()
    for p in model.parameters(): p.grad = torch.randn_like(p)
    cb.store.grads_()
    learn.opt.set_hypers(lr=1e-6)  # leaves the weights as good as untouched, and momentum everywhere
    learn.opt.step()
    scores = torch.cat([e.scores().flatten()[e.mask.flatten()] for e in cb.store.items])
    cb.effect.values['threshold'] = scores.kthvalue(max(1, len(scores)//10)).values.item()
    return learn, cb


class Snapshot:
    "Everything that a rewire changes"
    def __init__(self, learn, cb):
        self.cb, self.live, self.values = cb, [e.live for e in cb.store.items], dict(cb.effect.values)
        tensors = [t for e in cb.store.items for t in (e.weight.data, e.mask, e.float, *e.states(learn.opt))]
        self.pairs = [(t, t.clone()) for t in tensors]

    def restore(self):
        n = self.cb.effect.values['rewires']
        for t, old in self.pairs: t.copy_(old)
        for e, k in zip(self.cb.store.items, self.live): e.live = k
        self.cb.effect.values.update(self.values, rewires=n)  # other random numbers each time
        self.cb.effect.history.clear()


def measure(name, rounds, warmup=3, cases=CASES):
    "One row: CPU milliseconds of a rewire"
    build, settings, target = cases[name]
    learn, cb = make(build, settings)
    start, times, before = Snapshot(learn, cb), [], cb.store.live
    gc.collect()
    gc.disable()
    try:
        for r in range(-warmup, rounds):
            start.restore()
            t = time.process_time()
            cb.rewire(learn.opt)
            took = time.process_time()-t
            if r >= 0: times.append(took)
            if cb.store.live != before: raise AssertionError(f'{name}: {before} live units became {cb.store.live}')
    finally: gc.enable()
    q = quartiles(times)
    return dict(network=name, sparsity=settings['sparsity'], units=cb.store.units, live=before,
                moved=sum(cb.history[-1]['grown'].values())/before, ms=1e3*q['median'], q1=1e3*q['q1'], q3=1e3*q['q3'],
                target_ms='' if target is None else 1e3*target,
                met='' if target is None else 'yes' if q['median'] <= target else 'no')


NOTE = """CPU time of one whole rewire of `DynamicSparse` (dsr): drop below the threshold, share out, grow, and set weights, momentum
and masks; medians and quartiles over many rewires, one thread. The threshold is such that a tenth of the live units move
(`moved`: the share that did); state before each rewire is the same, random numbers are not. Optimizer: fastai's SGD with
momentum. ResNet-50: all layers but the first convolution. WRN-28-2: the convolutions of the blocks but 1x1 shortcuts."""


def run(names=tuple(CASES), rounds=None):
    "All rows; networks that are quick get more rounds"
    torch.set_num_threads(1)
    return [measure(n, rounds or (40 if 'ResNet' in n else 300)) for n in names]


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--rounds', type=int, default=None)
    ap.add_argument('--case', nargs='*', default=list(CASES), choices=list(CASES))
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    rows = run(a.case, a.rounds)
    if a.dry:
        from benchmarks.timing import table
        print(table(rows))
    else: print(write_table('reallocation', rows, NOTE).read_text())
