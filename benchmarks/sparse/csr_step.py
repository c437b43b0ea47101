"""One training step with layers in compressed rows, relative to the dense step.

Each network is trained in a bare torch loop and through `learn.fit`, in turns with the dense one. Live values, bytes of
gradients and optimizer state, and the peak memory of a step are measured beside the time. The script fails where a target is
missed, or where a layer that was to be sparse was not."""
import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from benchmarks.sparse import masked_step  # sets the threads before torch comes
from benchmarks.sparse.masked_step import Runner, make_learner, rewire
from benchmarks.timing import paired, quartiles, table, write_table

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from paramfx import zoo
from paramfx.kernels.csr import CSR, to_csr
from paramfx.sparse.callback import DynamicSparse


def mlp(n=2048): return nn.Sequential(nn.Flatten(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n))


NETS = {  # network -> (builder, shape of an input, batch size, batches per turn, sparsity, sparse layers, targets of loop and Learner)
    'LeNet-300-100': (partial(zoo.build, 'mnist/lenet_300_100'), (1, 28, 28), 100, 40, .98, ['fc1', 'fc2'], (.45, .60)),
    'MLP 2048-2048-2048': (mlp, (2048,), 128, 1, .95, ['1', '3'], (.25, .25)),
}
MEMORY = 1.5  # gradients and optimizer state, over the live share of the dense ones
for name, (build, shape, bs, batches, *_) in NETS.items(): masked_step.NETS[name] = (build, shape, bs, 60_000, batches, 0.)


def sparse(net, layers, sparsity, seed=0):
    "`net` with random masks, in compressed rows"
    gen = torch.Generator().manual_seed(seed)
    for n in layers:
        w = net.get_submodule(n).weight
        live = torch.randperm(w.numel(), generator=gen)[:round((1-sparsity)*w.numel())]
        to_csr(net.get_submodule(n), torch.zeros(w.numel(), dtype=torch.bool).index_fill_(0, live, True).view(w.shape))
    return net


class Products(TorchDispatchMode):
    "Counts the products with a sparse operand, by its shape"
    def __init__(self):
        super().__init__()
        self.sparse = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'addmm' in func.__name__:
            self.sparse.update((func.overloadpacket.__name__, tuple(a.shape)) for a in args[:2] if torch.is_tensor(a) and a.layout == torch.sparse_csr)
        return func(*args, **(kwargs or {}))


def check(net, layers, shape=None, bs=2):
    "Fail where one of `layers` is dense; with the shape of an input, also where its products are, which a step tells"
    mods = {n: net.get_submodule(n) for n in layers}
    for n, m in mods.items():
        if not isinstance(m, CSR): raise SystemExit(f'{n} ran dense: {type(m).__name__}')
    if shape is None: return
    with Products() as seen: F.cross_entropy(net(torch.randn(bs, *shape)), torch.zeros(bs, dtype=torch.int64)).backward()
    net.zero_grad()
    for n, m in mods.items():
        for op in ('addmm', 'sparse_sampled_addmm'):
            if seen.sparse[op, m.size] < sum(o.size == m.size for o in mods.values()):
                raise SystemExit(f'{n} ran dense: no sparse {op} of {m.size[0]}x{m.size[1]}')


class Loop:
    "Some steps of a bare training loop"
    def __init__(self, net, shape, bs, batches, opt):
        self.net, self.batches, self.opt = net, batches, opt(net.parameters())
        self.x, self.y = torch.randn(bs, *shape), torch.randint(0, 10, (bs,))

    def __call__(self):
        for _ in range(self.batches):
            self.opt.zero_grad()
            F.cross_entropy(self.net(self.x), self.y).backward()
            self.opt.step()


LOOP_OPTS = {'SGD': partial(torch.optim.SGD, lr=1e-3, momentum=.9), 'Adam': partial(torch.optim.Adam, lr=1e-4)}


def measure(name, opt, rounds, repeats):
    "Rows of one network and one optimizer: through the loop and through the Learner"
    build, shape, bs, batches, sparsity, layers, targets = NETS[name]
    times = {'loop': ([], []), 'Learner': ([], [])}
    for seed in range(repeats):
        torch.manual_seed(seed)
        loops = [Loop(net, shape, bs, batches, LOOP_OPTS[opt]) for net in (build(), sparse(build(), layers, sparsity, seed))]
        learns = [make_learner(name, opt, cb, seed) for cb in (None, DynamicSparse(sparsity, 'static', include=layers, compute='csr', seed=seed))]
        for net in (loops[1].net, learns[1].model): check(net, layers, shape)
        fits = [Runner(learn, batches) for learn in learns]
        for way, (dense, csr) in (('loop', loops), ('Learner', fits)):
            took = paired({'dense': dense, 'csr': csr}, rounds=rounds, warmup=3)
            for seen, k in zip(times[way], took): seen += took[k]
        for run in fits: run.close()
        for net in (loops[1].net, learns[1].model): check(net, layers, shape)
    return [row(name, opt, way, *times[way], goal) for way, goal in zip(times, targets)]


def row(name, opt, way, dense, csr, goal):
    q, batches = quartiles([b/a for a, b in zip(dense, csr)]), NETS[name][3]
    return dict(network=name, optimizer=opt, what=f'step, {way}', ratio=q['median'], q1=q['q1'],
        q3=q['q3'], target=goal, met='yes' if q['median'] <= goal else 'no',
                dense=f'{1e3*statistics.median(dense)/batches:.3g} ms', csr=f'{1e3*statistics.median(csr)/batches:.3g} ms')


# -- memory

def trained_bytes(loop):
    "Bytes of the gradients and of the optimizer state"
    state = [t for p in loop.net.parameters() for t in loop.opt.state[p].values() if torch.is_tensor(t)]
    return sum(t.nbytes for t in [p.grad for p in loop.net.parameters()]+state)


def _status(key):
    line = next(s for s in Path('/proc/self/status').read_text().splitlines() if s.startswith(key))
    return 1024*int(line.split()[1])


def child(name, kind, opt):
    "In a process of its own: live values, bytes of gradients and state, and the memory that three steps need over the bare imports"
    build, shape, bs, _, sparsity, layers, _ = NETS[name]
    torch.set_num_threads(1)
    Loop(nn.Sequential(nn.Flatten(), nn.Linear(8, 10)), (8,), 16, 1, LOOP_OPTS[opt])()  # libraries that load at first use
    start = _status('RssAnon')
    net = build()
    if kind == 'csr': sparse(net, layers, sparsity)
    loop = Loop(net, shape, bs, 3, LOOP_OPTS[opt])
    loop()  # reads what it needs of the libraries
    Path('/proc/self/clear_refs').write_text('5')  # begin the peak anew
    loop()
    peak, code = _status('VmHWM'), _status('RssFile')
    trained = trained_bytes(loop)
    if kind == 'csr': check(net, layers, shape)
    print(json.dumps(dict(values=sum(p.numel() for p in net.parameters()), trained=trained, peak=peak-code-start, code=code)))


ALONE = dict(MALLOC_MMAP_THRESHOLD_='16384', MALLOC_TRIM_THRESHOLD_='0')  # memory that the imports have freed holds no tensor


def memory(name, opt):
    "Rows of one network: what is trained, gradients and state, peak"
    ask = lambda kind: json.loads(subprocess.run([sys.executable, '-W', 'ignore', '-m', 'benchmarks.sparse.csr_step', '--child', name, kind, opt[0]],
                                                 capture_output=True, text=True, check=True, env=os.environ | ALONE).stdout)
    dense, csr = map(ask, ('dense', 'csr'))
    share = csr['values']/dense['values']
    over = csr['trained']/dense['trained']/share
    human = lambda b: f'{b/2**20:.3g} MiB'
    base = dict(network=name, optimizer=opt[0])
    return [base | dict(what='parameters', ratio=share, dense=f"{dense['values']:,}", csr=f"{csr['values']:,}"),
            base | dict(what='gradients and state, over the live share', ratio=over, target=MEMORY,
            met='yes' if over <= MEMORY else 'no', dense=human(dense['trained']), csr=human(csr['trained'])),
            base | dict(what='peak of three steps', ratio=csr['peak']/dense['peak'], dense=human(dense['peak']), csr=human(csr['peak']))]


def rewires(name, opt, rounds=6):
    "A rewire that moves a tenth of the live weights across layers, in dense steps"
    build, shape, bs, batches, sparsity, layers, _ = NETS[name]
    learn = make_learner(name, opt, DynamicSparse(sparsity, stop=2., include=layers, compute='csr'))
    cb = learn.dynamic_sparse
    cb.due = lambda: False
    run = Runner(learn, batches)
    for _ in range(3): run()
    moves = [rewire(cb) for _ in range(rounds)][1:]
    run()
    check(learn.model, layers)
    run.close()
    return dict(network=name, optimizer=opt, what='rewire, a tenth of the live weights', csr=f'{1e3*statistics.median(moves):.3g} ms')


NOTE = """One whole training step with layers that hold and multiply their live weights only (`compute='csr'`), relative to the
dense step: medians and quartiles of the ratios within a round, CPU time, one thread. Random data; LeNet-300-100 with batch
norm, batch 100, sparsity .98 in its first two layers, the third one dense; an MLP of two matrices of 2048x2048, batch 128,
sparsity .95. `loop` is a bare torch loop, `Learner` a running `learn.fit` with loading, all events and the optimizer, against a
plain fit. Gradients and optimizer state are given over the share of the parameters that is left. The peak is that of the
process during three steps of the loop, over what it held before the network was made, without the pages of torch's own
libraries. These pages are read at first use, some 4 MiB more of them for sparse kernels; they are shared among processes and as
many for any network. With them LeNet-300-100 had a peak of 6.4 MiB, and 4.5 MiB as a dense one: its tensors need 1.4 MiB during
a sparse step, by torch's own count, index and transposed copies included, and 4.5 MiB during a dense one."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--net', nargs='*', default=list(NETS), choices=list(NETS))
    ap.add_argument('--opt', nargs='*', default=['SGD', 'Adam'], choices=list(LOOP_OPTS))
    ap.add_argument('--rounds', type=int, default=12, help='per repeat')
    ap.add_argument('--repeats', type=int, default=4)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    ap.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.child: sys.exit(child(*a.child))
    torch.set_num_threads(1)
    rows = []
    for net in a.net:
        for opt in a.opt: rows += measure(net, opt, a.rounds, a.repeats)
        rows += memory(net, a.opt) + [rewires(net, a.opt[0])]
    print(table(rows) if a.dry else write_table('csr_step', rows, NOTE).read_text())
    missed = [f"{r['network']}, {r['optimizer']}, {r['what']}: {r['ratio']:.3f} > {r['target']}" for r in rows if r.get('met') == 'no']
    if missed: raise SystemExit('Missed: ' + '; '.join(missed))
