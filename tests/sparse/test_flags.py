"""Every command-line flag of the published code of dynamic sparse reparameterization has a line here that does the same, and does it.

A row holds the flags, what they are called here, the line of code that a user would write, and a check that fails where the setting is
ignored. In a line `learn` is a new Learner of four small layers, `dls` its data, `model` its network and `folder` an empty folder."""
import struct
from collections import namedtuple
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, OptimWrapper, SGD, accuracy  # noqa: F401 - for the lines below
from fastai.callback.schedule import *
from torch import nn

from contracts import quiet, seed_all
from paramfx.all import *
from paramfx.core.clock import read_steps  # noqa: F401
from paramfx.core.samples import generator  # noqa: F401
from paramfx.data.memory import tensor_dls
from paramfx.sparse.sparsify import plan_masks  # noqa: F401
from paramfx.sparse.tied import Tied
from paramfx.zoo import networks as nets  # noqa: F401

pytestmark = pytest.mark.filterwarnings('ignore')  # such as a fit too short for its schedule

SPEC = """epochs start-epoch batch-size workers data lr momentum nesterov weight-decay L1-loss-coeff print-freq layers widen-factor prune
start-pruning-after-epoch prune-epoch-frequency prune-target-sparsity-fc prune-target-sparsity-conv prune-iterations post-prune-epochs
cubic-prune-schedule rewire n-prune-params threshold-prune rewire-fraction rewire-scaling big-new-weights stop-rewire-epoch
initial-sparsity-conv initial-sparsity-fc sub-kernel-granularity sparse-resnet-downsample conv-group-lasso DeepR DeepR_eta tied
rescale-tied-gradient no-batch-norm validate-set no-validate-train no-augment copy-mask-from resume schedule-file job-idx name""".split()

BATCHES = 4  # of an epoch
Row = namedtuple('Row', 'flags ours code check')
FLAGS = []
def flag(flags, ours, code):
    "Register a check of a line of code; it is called with the names that the line leaves"
    def _register(f):
        FLAGS.append(Row(flags.split(), ours, code, f))
        return f
    return _register


# -- what a line begins with

def data():
    x = torch.randn(32, 20, generator=torch.Generator().manual_seed(0))
    return tensor_dls(x, torch.arange(32)%4, x[:8], torch.arange(8)%4, bs=8, vocab=list('abcd'), normalize=False, device='cpu')

def net():
    return nn.Sequential(nn.Unflatten(1, (5, 2, 2)), nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 8, 3, padding=1),
        nn.Flatten(), nn.Linear(32, 20), nn.Tanh(), nn.Linear(20, 4))

def new(path=None):
    seed_all()
    return quiet(Learner(data(), net(), CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), lr=.1, metrics=accuracy, path=path))

class Names(dict):
    "Names for a line of code: those of this module, and a new Learner; every Learner is quiet"
    def __init__(self, folder):
        super().__init__(globals(), folder=folder,
            Learner=lambda *a, **kw: quiet(Learner(*a, **{**dict(loss_func=CrossEntropyLossFlat(), path=folder), **kw})))
        self['learn'] = new(folder)
        self.update(dls=self['learn'].dls, model=self['learn'].model)
    __getattr__ = dict.__getitem__

def run(code, folder, before=None):
    o = Names(folder)
    if before is not None: before(o)
    exec(code, o)
    return o

def live(cb): return {n: int(m.sum()) for n, m in cb.masks.items()}
def densities(cb): return {n: float(m.float().mean()) for n, m in cb.masks.items()}
def moved(cb): return sum(sum(h['grown'].values()) for h in cb.history)
def again(code, folder, a, b):
    "The same line with another value"
    assert a in code
    return run(code.replace(a, b), folder)


# -- fastai's own

@flag('epochs start-epoch', '`fit`', "learn.fit(3, start_epoch=1)")
def _(o): assert sum(map(bool, o.learn.recorder.values)) == 2 and len(o.learn.recorder.losses) == 2*BATCHES

@flag('batch-size workers data', '`mnist_dls`, `cifar_dls`, `folder_dls` or any `DataLoaders`', "dls = mnist_dls(folder, bs=10, num_workers=1)")
def _(o):
    assert o.dls.train.bs == 10 and o.dls.train.fake_l.num_workers == 1 and len(o.dls.train_ds) == 10_020 and len(o.dls.valid_ds) == 30
    assert o.dls.train_ds.x.shape[1:] == (1, 2, 2)

@flag('lr momentum', '`lr`, `mom`', "learn = Learner(dls, model, opt_func=partial(SGD, mom=.8), lr=.05); learn.fit(1)")
def _(o): assert {(h['lr'], h['mom']) for h in o.learn.opt.hypers} == {(.05, .8)}

@flag('nesterov', '`OptimWrapper`', "learn = Learner(dls, model, opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True)); "
    "learn.fit(1)")
def _(o):
    plain = again(o.code, o.folder, 'nesterov=True', 'nesterov=False')
    assert not all(torch.equal(a, b) for a, b in zip(o.model.parameters(), plain.model.parameters()))

@flag('weight-decay', '`wd`, `wd_bn_bias`; as an L2 penalty `decouple_wd=False`',
      "learn = Learner(dls, model, opt_func=partial(SGD, decouple_wd=False), lr=.1, wd=.2, wd_bn_bias=True); learn.fit(1)")
def _(o):
    "Of all parameters, by hand: with one batch, of the whole set"
    start, dls = net(), o.dls
    whole = dls.train.new(bs=32, shuffle=False, drop_last=False)
    o['dls'] = type(dls)(whole, dls.valid)
    o['model'] = deepcopy(start)
    exec(o.code, o)
    CrossEntropyLossFlat()(start(dls.train_ds.x), dls.train_ds.y).backward()
    for (n, p), q in zip(start.named_parameters(), o.model.parameters()): assert torch.allclose(q, p-.1*(p.grad+.2*p), atol=1e-5), n

@flag('print-freq', '`Recorder` keeps every batch; `ShowGraphCallback` draws them', "learn.fit(2); every_third = learn.recorder.losses[::3]")
def _(o): assert len(o.learn.recorder.losses) == 2*BATCHES and len(o.every_third) == 3 and len(o.learn.recorder.values) == 2

@flag('validate-set', "`valid='split'`, or a splitter", "dls = mnist_dls(folder, valid='split')")
def _(o):
    assert len(o.dls.train_ds) == 20 and len(o.dls.valid_ds) == 10_000, 'the last 10,000 training items'
    assert torch.equal(o.dls.valid_ds.y, torch.arange(10_020)[20:]%10)

@flag('no-validate-train', 'off, unless `train_metrics`', "learn.recorder.train_metrics = True; learn.fit(1)")
def _(o):
    assert 'train_accuracy' in o.learn.recorder.metric_names
    assert 'train_accuracy' not in again(o.code, o.folder, 'True', 'False').learn.recorder.metric_names

@flag('no-augment', '`augment`', "dls = cifar_dls(folder, augment=False)")
def _(o):
    first = lambda o: o.dls.train.new(shuffle=False).one_batch()[0]
    augmented = again(o.code, o.folder, 'False', 'True')
    assert torch.equal(first(o), first(o)) and not torch.equal(first(augmented), first(augmented))


# -- networks

@flag('layers widen-factor', '`zoo.build`', "model = zoo.build('cifar10/wrn_16_4')")
def _(o):
    convs = lambda m: [c for c in m.modules() if isinstance(c, nn.Conv2d) and c.kernel_size != (1, 1)]
    other = again(o.code, o.folder, '16_4', '10_1')
    assert [len(convs(m)) for m in (o.model, other.model)] == [13, 7] and [m.fc.in_features for m in (o.model, other.model)] == [256, 64]

@flag('no-batch-norm', '`norm`', "model = zoo.build('mnist/lenet_300_100', norm=False)")
def _(o):
    def kinds(m): return [type(c).__name__ for c in m if 'Norm' in type(c).__name__], [c.bias is not None for c in m if isinstance(c, nn.Linear)]
    assert kinds(o.model) == ([], [True]*3) and kinds(again(o.code, o.folder, 'False', 'True').model) == (['BatchNorm1d']*3, [False]*3)


# -- iterative pruning

@flag('prune', '`learn.prune`, `IterativePrune`', "learn.prune(.8).fit(1)")
def _(o): assert live(o.learn.iterative_prune) == {n: int(.2*m.numel()+.1) for n, m in o.learn.iterative_prune.masks.items()}

@flag('start-pruning-after-epoch', '`start`', "learn.prune(.8, start=1).fit(3)")
def _(o): assert [h['epoch'] for h in o.learn.iterative_prune.history] == [1]

@flag('prune-epoch-frequency', '`every`', "learn.prune(.8, n_prunes=2, every=3).fit(4)")
def _(o): assert [h['epoch'] for h in o.learn.iterative_prune.history] == [0, 3]

@flag('prune-target-sparsity-fc prune-target-sparsity-conv', '`target`', "learn.prune({'fc': .9, 'conv': .5}).fit(1)")
def _(o): assert live(o.learn.iterative_prune) == {'4.weight': 216, '6.weight': 64, '8.weight': 8}

@flag('prune-iterations', '`n_prunes`', "learn.prune(.8, n_prunes=3).fit(5)")
def _(o): assert len(o.learn.iterative_prune.history) == 3 and all(sum(h['dropped'].values()) > 0 for h in o.learn.iterative_prune.history)

@flag('post-prune-epochs', '`post`', "cb = IterativePrune(.8, n_prunes=3, every=2, post=1); learn.fit(cb.run_length, cbs=cb)")
def _(o):
    assert len(o.learn.recorder.values) == 5 and [h['epoch'] for h in o.cb.history] == [0, 2, 4] and again(o.code, o.folder, 'post=1',
        'post=4').cb.run_length == 8

@flag('cubic-prune-schedule', '`schedule`', "learn.prune(.8, n_prunes=2, schedule='cubic').fit(1)")
def _(o):
    "After the first of two: 1-s+s/8, or the root of 1-s"
    n = live(o.learn.iterative_prune)['6.weight']
    assert n == int(640*(.2+.8/8)+.1) != live(again(o.code, o.folder, 'cubic', 'exponential').learn.iterative_prune)['6.weight'] == int(640*.2**.5+.1)


# -- rewiring

@flag('rewire', '`learn.sparsify`, `DynamicSparse`', "learn.sparsify(.8, period=2).fit(4)")
def _(o):
    cb = o.learn.dynamic_sparse
    assert moved(cb) > 0 and sum(live(cb).values()) == sum(int(.2*m.numel()+.1) for m in cb.masks.values())
    still = again(o.code, o.folder, 'period=2', "method='static'").learn.dynamic_sparse
    assert not still.history and any(not torch.equal(still.masks[n], m) for n, m in cb.masks.items())

@flag('n-prune-params', '`n_realloc` of `DSR`', "learn.sparsify(.5, method=DSR(threshold=.05, n_realloc=2), period=1).fit(2)")
def _(o):
    "A number of units, or a share; the threshold is moved towards it"
    few, many = (c.learn.dynamic_sparse for c in (o, again(o.code, o.folder, 'n_realloc=2', 'n_realloc=300')))
    share = again(o.code, o.folder, 'n_realloc=2', 'n_realloc=.25').learn.dynamic_sparse
    assert min(few.traces['threshold']) < few.method.threshold == max(few.traces['threshold']) < max(many.traces['threshold'])
    assert [cb.method.target(cb.store.live) for cb in (few, many, share)] == [2, 300, round(.25*sum(live(share).values()))]

@flag('threshold-prune', '`threshold` of `DSR`', "learn.sparsify(.5, method=DSR(threshold=.05), period=2).fit(1)")
def _(o):
    "Exactly the units below it: `test_invariants.py`"
    first, none, all_ = (c.learn.dynamic_sparse.history[0] for c in (o, *(again(o.code, o.folder, '=.05', v) for v in ('=1e-9', '=1e9'))))
    assert first['threshold'] == .05 and sum(none['dropped'].values()) == 0 and list(all_['dropped'].values()) == [215, 319,
        39], ('one of each layer stays')
    assert 10 < sum(first['dropped'].values()) < 500

@flag('rewire-fraction', '`drop_frac` of `SET`, `RigL`, ...', "learn.sparsify(.5, method=SET(drop_frac=.25), period=2).fit(1)")
def _(o):
    assert o.learn.dynamic_sparse.history and all(h['dropped'] == {n: int(.25*k) for n, k in live(o.learn.dynamic_sparse).items()}
        for h in o.learn.dynamic_sparse.history)

@flag('rewire-scaling', '`across_layers` of `DSR`', "learn.sparsify(.5, method=DSR(threshold=.05, across_layers=True), period=2).fit(2)")
def _(o):
    there, here = live(o.learn.dynamic_sparse), live(again(o.code, o.folder, 'True', 'False').learn.dynamic_sparse)
    assert here == dict(zip(here, (216, 320, 40))) != there and sum(here.values()) == sum(there.values())

@flag('big-new-weights', '`grow_init` of a method', "learn.sparsify(.5, method=DSR(threshold=.05, grow_init='random'), period=2).fit(1)")
def _(o):
    def grown(cb):
        before = cb.masks
        cb.rewire()
        return torch.cat([cb.store.items[i].weight[m & ~before[n]] for i, (n, m) in enumerate(cb.masks.items())])
    w = grown(o.learn.dynamic_sparse)
    assert len(w) > 10 and w.all() and not grown(again(o.code, o.folder, 'random', 'zero').learn.dynamic_sparse).any()

@flag('stop-rewire-epoch', '`stop`: an epoch, or a position', "learn.sparsify(.5, period=1, stop=2).fit(4)")
def _(o):
    assert {h['epoch'] for h in o.learn.dynamic_sparse.history} == {0, 1}
    share = again(o.code, o.folder, 'stop=2', 'stop=.75').learn.dynamic_sparse
    assert {h['epoch'] for h in share.history} == {0, 1, 2}

@flag('initial-sparsity-conv initial-sparsity-fc', '`sparsity`', "learn.sparsify({'conv': .5, 'fc': .9})")
def _(o): assert live(o.learn.dynamic_sparse) == {'4.weight': 216, '6.weight': 64, '8.weight': 8}

@flag('sub-kernel-granularity', "`granularity`: 1 `'filter'`, 2 `'kernel'`, 3 `'row'`, 4 `'weight'`", "learn.sparsify(.5, granularity='kernel')")
def _(o):
    for g, shape in dict(filter=(8, 1, 1, 1), kernel=(8, 6, 1, 1), row=(8, 6, 3, 1), weight=(8, 6, 3, 3)).items():
        c = again(o.code, o.folder, 'kernel', g)
        m = c.model[4].weight_mask
        assert m.shape == shape and c.model[6].weight_mask.shape == (20, 32) and int(m.sum()) == m.numel()//2
        assert torch.equal(c.model[4].weight != 0, m.expand(8, 6, 3, 3))

@flag('sparse-resnet-downsample', '`include`, `exclude`', "model = nets.resnet((1, 1), 10, first=4); table = plan_masks(model, .5, "
    "exclude='*.downsample.0')")
def _(o):
    masked = lambda o: [r['layer'] for r in o.table if 'live' in r]
    names = masked(again(o.code, o.folder, "'*.downsample.0'", 'None'))
    assert any('downsample' in n for n in names) and masked(o) == [n for n in names if 'downsample' not in n]

@flag('L1-loss-coeff', '`regularizer=L1(...)`', "learn.sparsify(.5, method='static', regularizer=L1(.1)); learn.fit(2)")
def _(o):
    size = lambda o: sum(p.detach().abs().sum().item() for n, p in o.model.named_parameters() if n in o.learn.dynamic_sparse.masks)
    assert size(o) < .9*size(again(o.code, o.folder, 'regularizer=L1(.1)', 'regularizer=None'))

@flag('conv-group-lasso', '`regularizer=GroupLasso(...)`', "learn.sparsify(.5, method='static', regularizer=GroupLasso(.1)); learn.fit(1)")
def _(o):
    w = [o.model[i].weight.detach() for i in (4, 6, 8)]
    want = .1*(w[0].flatten(2).norm(dim=2).sum()+w[1].abs().sum()+w[2].abs().sum())
    assert torch.isclose(o.learn.dynamic_sparse.penalty(), want, rtol=1e-4)
    assert not torch.equal(w[0], again(o.code, o.folder, 'GroupLasso', 'L1').model[4].weight)

@flag('DeepR', "`method='deepr'`", "learn.sparsify(.5, method='deepr', regularizer=L1(1e-3)).fit(2)")
def _(o):
    h = o.learn.dynamic_sparse.history
    assert h and 'temperature' in h[0] and all(x['dropped'] == x['grown'] for x in h) and moved(o.learn.dynamic_sparse) > 0

@flag('DeepR_eta', '`eta` of `DeepR`', "learn.sparsify(.5, method=DeepR(eta=.5, temperature=.1, noise='weight'), stop=1.).fit(2)")
def _(o):
    "The weights jump by sqrt(2*eta*T) at each step, so their signs change all the time"
    assert moved(o.learn.dynamic_sparse) > 3*moved(again(o.code, o.folder, 'eta=.5', 'eta=1e-8').learn.dynamic_sparse)


# -- tied weights

@flag('tied', '`learn.tie`, `tie_weights`', "learn.tie(.75)")
def _(o):
    assert isinstance(o.model[6], Tied) and [len(o.model[i].bank) for i in (4, 6, 8)] == [108, 160, 20]
    o.learn.fit(1)
    assert len(o.model[6].weight.unique()) <= 160

@flag('rescale-tied-gradient', '`rescale_grad`', "learn.tie(.75, rescale_grad=True)")
def _(o):
    def grad(o):
        o.learn.loss_func(o.model(o.dls.train_ds.x), o.dls.train_ds.y).backward()
        return o.model[6].bank.grad
    assert torch.allclose(4*grad(o), grad(again(o.code, o.folder, 'True', 'False')), atol=1e-7)


# -- files

def finished(o):
    "A sparse run in `folder`, whose files are masks.pth and run.pth"
    done = new(o.folder).sparsify(.7, method=DSR(threshold=.05), period=2)
    done.fit(2, cbs=RunState('run'))
    done.save('masks')
    o['done'] = done

@flag('copy-mask-from', '`learn.load_masks`', "learn.load_masks('masks')")
def _(o):
    before = o.done.dynamic_sparse.masks
    assert live(o.learn.dynamic_sparse) == live(o.done.dynamic_sparse) and all(torch.equal(m, before[n])
        for n, m in o.learn.dynamic_sparse.masks.items())
    assert not torch.equal(o.model[1].weight, o.done.model[1].weight), 'the weights are its own'

@flag('resume', '`RunState` and `learn.resume`; weights and masks alone: `learn.load`',
    "learn.sparsify(.7, method=DSR(threshold=.05), period=2); learn.resume('run'); learn.fit(2)")
def _(o):
    for a, b in zip(o.model.parameters(), o.done.model.parameters()): assert torch.equal(a, b)
    assert o.learn.dynamic_sparse.history == o.done.dynamic_sparse.history and len(o.learn.recorder.values) == 2
    load = run("learn.sparsify(.7, method=DSR(threshold=.05), period=2); learn.load('masks')", o.folder)
    assert live(load.learn.dynamic_sparse) == live(o.done.dynamic_sparse) and load.learn.dynamic_sparse.effect.clock.steps == 2*BATCHES

@flag('schedule-file', '`lr`, `period`, `temperature`: tables, callables, or a file by `read_steps`',
      "t = read_steps(folder/'schedule.yaml', n_epoch=4); learn.sparsify(.5, method=DeepR(temperature=t['temperature']), period=t['period']); "
      "learn.fit(4, cbs=ParamScheduler({'lr': t['lr']}))")
def _(o):
    h = o.learn.dynamic_sparse.history
    assert [round(float(v), 4) for v in o.learn.recorder.lrs[::BATCHES]] == [.1, .1, .02, .004]
    steps = {x['step']: x['temperature'] for x in h}
    assert steps == {0: 1e-2, 2: 1e-2, 4: 1e-2, 8: 1e-4, 12: 1e-4}, 'every second step in the first epoch, every fourth later'
    recipe = sparse_recipe('mnist/lenet_300_100', 'deepr', steps=o.folder/'schedule.yaml')
    assert recipe.lr == {0: .1, 2: .02, 3: .004}

@flag('job-idx name', 'a name for files', "learn.fit(1, cbs=RunState('job7')); learn.save('job7-end')")
def _(o): assert (o.folder/'models/job7.pth').is_file() and (o.folder/'models/job7-end.pth').is_file()


# -- the table

def mnist(o):
    "Files of tiny images in MNIST's format"
    for part, n in (('train', 10_020), ('t10k', 30)):
        (o.folder/f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 0x803, n, 2, 2)+bytes(4*n))
        (o.folder/f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 0x801, n)+bytes((np.arange(n)%10).astype(np.uint8)))

def cifar(o):
    from test_images import write_cifar
    write_cifar(o.folder/'cifar-10-batches-py', 10, 200)

def schedule(o): (o.folder/'schedule.yaml').write_text('lr: {0: .1, 2: .02, 3: .004}\nperiod: {0: 2, 1: 4}\ntemperature: {0: .01, 2: .0001}\n')

BEFORE = {'data': mnist, 'validate-set': mnist, 'no-augment': cifar, 'copy-mask-from': finished, 'resume': finished, 'schedule-file': schedule}

@pytest.mark.parametrize('row', FLAGS, ids=[' '.join(r.flags) for r in FLAGS])
def test_flag(row, tmp_path):
    before = next((BEFORE[f] for f in row.flags if f in BEFORE), None)
    o = run(row.code, tmp_path, before)
    o['code'] = row.code
    row.check(o)


def test_every_flag_has_a_row_and_one_only():
    flags = [f for r in FLAGS for f in r.flags]
    assert sorted(flags) == sorted(SPEC)


def test_the_docs_show_these_rows():
    "The table of notebook 44a, line for line"
    import json
    from pathlib import Path
    cells = json.loads((Path(__file__).parent.parent.parent/'nbs/sparse/09_published.ipynb').read_text(encoding='utf8'))['cells']
    table = next(''.join(c['source']) for c in cells if ''.join(c['source']).startswith('## Flags of the published code'))
    shown = [r.split('|')[1:] for r in table.splitlines() if r.startswith('|`')]
    flags = lambda fs: ', '.join(f'`{f}`' for f in fs)
    assert sorted((s[0], s[1], '|'.join(s[2:]).rstrip('|')) for s in shown) == sorted(
        (flags(r.flags), r.ours, '<br>'.join(f'`{line}`' for line in r.code.split('; '))) for r in FLAGS)
