"""One training step with masks, relative to a plain fastai step.

Every candidate is a real `learn.fit`, in a thread of its own that waits in its data loader: a turn lets it run a few whole
batches, loading, all events, optimizer and bookkeeping included, and no two of them ever run at once. Turns rotate, so that
drift of the machine cancels; every repeat builds all networks anew, so that the luck of one memory layout does too."""
import argparse
import os
import statistics
import threading
import time
from functools import partial

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch: threads that the fits run in take their number from here

import torch
from fastai.basics import SGD, Adam, CancelFitException, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper
from benchmarks.zoo.networks import small_cnn
from benchmarks.timing import paired, quartiles, write_table
from paramfx import zoo
from paramfx.data.memory import InMemory, MemoryDL
from paramfx.core.callback import EffectCallback
from paramfx.sparse.callback import DynamicSparse
from paramfx.core.state import EffectState

NETS = {  # network -> (builder, shape of an input, batch size, items of an epoch, batches per turn, target)
    'resnet18': (partial(zoo.build, 'imagenet/resnet18', 10), (3, 32, 32), 32, 50_000, 1, 1.04),
    'small CNN': (small_cnn, (3, 32, 32), 32, 50_000, 5, 1.03),
    'LeNet-300-100': (partial(zoo.build, 'mnist/lenet_300_100'), (1, 28, 28), 100, 60_000, 6, 1.08),
}
OPTS = {
    'SGD': partial(SGD, mom=.9),
    'Adam': Adam,
    'OptimWrapper(torch SGD)': partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9),
}
WRAPPED, IDLE = 1.10, 1.01  # targets through OptimWrapper, and of an idle callback


class Idle(EffectCallback):
    "An effect that does nothing: what the base class and the keeper cost by themselves"
    def __init__(self): super().__init__()
    def plan(self, model, learn=None): return []
    def convert(self, model, learn=None): return EffectState('idle', self.settings)


class Repeated(InMemory):
    "A few items, repeated to an epoch of natural length"
    length = 0
    def __len__(self): return self.length or len(self.x)
    def __getitem__(self, i): return super().__getitem__(i % len(self.x))


class TurnDL(MemoryDL):
    "A loader without end that hands over to `turn` before each batch"
    turn = None
    def __iter__(self):
        while True:
            for b in super().__iter__():
                self.turn()
                yield b


class Runner:
    "A fit that advances by a given number of batches when told to"
    def __init__(self, learn, batches):
        self.learn, self.batches, self.left, self.over, self.error = learn, batches, 0, False, None
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        learn.dls.train.turn = self._wait
        self.thread = threading.Thread(target=self._fit, daemon=True)
        self.thread.start()
        self.done.acquire()  # it has reached its first batch

    def _fit(self):
        try:
            with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit(1, .01)
        except BaseException as e: self.error = e
        finally:
            self.over = True
            self.done.release()

    def _wait(self):
        if self.left == 0:
            self.done.release()
            self.go.acquire()
            if self.over: raise CancelFitException
            self.left = self.batches
        self.left -= 1

    def __call__(self):
        self.go.release()
        self.done.acquire()
        if self.over: raise RuntimeError('the fit ended') from self.error

    def close(self):
        self.over = True
        self.go.release()
        self.thread.join()
        if self.error is not None: raise self.error


def make_learner(net, opt, cbs=None, seed=0):
    "A Learner on random data, in memory"
    build, shape, bs, length, *_ = NETS[net]
    torch.manual_seed(seed)
    ds = Repeated(torch.randn(max(1_000, 2*bs), *shape), torch.randint(0, 10, (max(1_000, 2*bs),)), vocab=list(range(10)))
    ds.length = length
    dls = DataLoaders(TurnDL(ds, bs=bs, shuffle=True, drop_last=True, device=torch.device('cpu')), MemoryDL(ds, bs=bs))
    return Learner(dls, build(), CrossEntropyLossFlat(), opt_func=OPTS[opt], cbs=cbs)


def tenth(cb):
    "Set the threshold so that the next rewire moves a tenth of the live weights"
    live = torch.cat([e.weight.data[e.mask].abs() for e in cb.store.items])
    cb.effect.values['threshold'] = live.kthvalue(max(1, len(live)//10)).values.item()


def rewire(cb):
    "CPU seconds of one whole rewire, a tenth of the live weights"
    tenth(cb)
    start = time.process_time()
    cb.rewire(cb.learn.opt)
    return time.process_time()-start


def measure(net, opt, rounds, repeats):
    "Rows of one network and one optimizer"
    _, _, bs, length, batches, target = NETS[net]
    steps, moves, plain = {}, [], []
    for r in range(repeats):
        cbs = {'plain': None, 'plain again': None, 'idle': Idle(), 'static': DynamicSparse(.9, 'static'),
               'dsr': DynamicSparse(.9, stop=2.)}
        cbs['dsr'].due = lambda: False  # rewires are timed apart: an amortised cost is no median
        runs = {k: Runner(make_learner(net, opt, cb, seed=r), batches) for k, cb in cbs.items()}
        times, moved = {k: [] for k in cbs}, []
        for i in range(4):  # a rewire now and then, between the rounds
            for k, v in paired(runs, rounds=max(1, rounds//4), warmup=1 if i else 3).items(): times[k] += v
            moved.append(rewire(cbs['dsr']))
        moves += moved[1:]  # the first one is a warm-up
        one, two = times.pop('plain'), times.pop('plain again')
        steps.setdefault('plain again', []).extend(b/a for a, b in zip(one, two))
        for k, v in times.items(): steps.setdefault(k, []).extend(2*t/(a+b) for t, a, b in zip(v, one, two))
        plain += one+two
        for run in runs.values(): run.close()
    step, move = statistics.median(plain)/batches, statistics.median(moves)
    default = max(1, length//bs//5)
    wanted = WRAPPED if 'OptimWrapper' in opt else target
    rows = [(k, quartiles(v), 0., None if k == 'plain again' else IDLE if k == 'idle' else wanted) for k, v in steps.items() if k != 'dsr']
    rows += [(f'dsr, period {p}', quartiles(steps['dsr']), move/p/step, wanted) for p in (default, 100)]
    return [dict(network=net, optimizer=opt, step=k, ratio=q['median']+extra, q1=q['q1']+extra, q3=q['q3']+extra,
                 target='' if goal is None else goal, met='' if goal is None else 'yes' if q['median']+extra <= goal else 'no',
                 plain_ms=1e3*step, rewire_ms=1e3*move if extra else '') for k, q, extra, goal in rows]


NOTE = """One whole training step of a running `learn.fit` (loading, every event, optimizer), relative to the mean of two plain fits
that take turns with it: medians and quartiles of the ratios within a round, CPU time, one thread. Batches of 32 (pictures of
32x32) and 100 (784 inputs); nine of ten weights are masked. `plain again` is the second plain fit over the first: what it is
off from 1 is noise. `idle` is a callback that does nothing, with its keeper. `dsr` adds the cost of a rewire that moves a tenth
of the live weights (median, timed apart: `rewire_ms`), divided by the period; the first period is the default one, a fifth of
an epoch of 50,000 (60,000) items."""


def run(nets=tuple(NETS), opts=tuple(OPTS), rounds=None, repeats=None):
    "All rows"
    return [row for net in nets for opt in opts for row in measure(net, opt, rounds or (12 if 'resnet' in net else 20),
                                                                       repeats or (4 if 'resnet' in net else 8))]


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--net', nargs='*', default=list(NETS), choices=list(NETS))
    ap.add_argument('--opt', nargs='*', default=list(OPTS), choices=list(OPTS))
    ap.add_argument('--rounds', type=int, default=None, help='per repeat')
    ap.add_argument('--repeats', type=int, default=None)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = run(a.net, a.opt, a.rounds, a.repeats)
    if a.dry:
        from benchmarks.timing import table
        print(table(rows))
    else: print(write_table('masked_step', rows, NOTE).read_text())
