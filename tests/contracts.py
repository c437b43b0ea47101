"""The methods under contract: one line each, and the small real runs that `test_contracts.py` puts them through.

A new method adds its `Method` to `METHODS` in the change that brings it; the matrix then runs it through every trap."""
import random
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Callable

import numpy as np
import torch
from fastai.basics import (Adam, Callback as FastaiCallback, CrossEntropyLossFlat, Datasets, L, Learner, OptimWrapper, RMSProp, SGD,
                           accuracy, params, ranger)
from torch import nn

from paramfx.bases.layers import BasisConv2d
from paramfx.bases.callback import OrthoReg
from paramfx.bases.share import share_bases
from paramfx.data.memory import digits_dls, tensor_dls
from paramfx.evolution.callback import KnowledgeEvolution
from paramfx.evolution.policies import Magnitude
from paramfx.core.state import effects, root_module
from paramfx.masks.store import initial_counts
from paramfx.sparse.prune import IterativePrune
from paramfx.sparse.callback import DynamicSparse
from paramfx.slicing.callback import SliceTrain
from paramfx.splitnet.callback import SplitNet
from paramfx.sparse.methods import GraNet
from paramfx.sparse.penalties import L1
from settings import evolve_settings, slice_settings, sparse_settings, split_settings


@dataclass(frozen=True)
class Method:
    "What the matrix has to know of a method"
    name: str
    make: Callable        # make(**kw) -> callback, with settings under which a run of a few steps is full of events
    facts: Callable       # facts(learn) -> dict of everything the effect must not lose: masks, counters, history
    check: Callable       # check(learn, grads=True): assert what holds at every step; grads: of the gradients, too
    noop: Callable        # a callback whose settings do nothing at all
    other: Callable       # a callback with settings that contradict those of `make`
    moves: bool           # do masks change in training?
    penalty: dict = field(default_factory=dict)  # settings that add a penalty to the loss
    columns: tuple = ()   # what it logs
    effect: str = 'dynamic_sparse'  # name of its effect
    rate: str = 'sparsity'  # its setting for the share of zeros, .8 in `make` and .5 in `other`
    shrinks: bool = False  # may units be lost?
    at_end: bool = False  # does it act after the last step of an epoch?
    coarse: bool = True  # does it know units larger than a weight?
    compressed: bool = False  # do layers hold their live values only, under another name? `test_csr.py` has what is different then
    dense_state: bool = False  # does it keep gradients and optimizer state of what is dead?
    masked: bool = True  # does it hold masks? What only these can be asked is skipped else
    steps: tuple = ()  # verbs in the recipe of what it leaves after `materialize`
    classes: bool = False  # does it ask for several classes?
    told: str = r'0\.8 -> 0\.5'  # what is said of the settings of `other`
    refusal: str = r'units.*sparsity'  # what is said to a file of `other`
    net: Callable = lambda *args, **kw: small_net(*args, **kw)  # the network it is put through the matrix on
    folds: bool = False  # has that network layers that `materialize` replaces?

    def __repr__(self): return self.name
    def on(self, learn): return getattr(learn, self.effect)  # its callback, attached or held
    def held_to(self, live, before): return sum(live) <= sum(before) if self.shrinks else sum(live) == sum(before)  # the budget


# -- sparse training

def opt_state_of(opt, p):
    "Optimizer state of one parameter, by a route of its own: through fastai's wrappers down to the dict"
    while not isinstance(opt, torch.optim.Optimizer) and 'opt' in vars(opt): opt = opt.opt
    return dict(opt.state[p]) if p in opt.state else {}


def sparse_facts(learn, effect='dynamic_sparse'):
    st = effects(learn.model)[effect]
    return dict(clock={n: getattr(st.clock, n) for n in st.clock.names}, values=dict(st.values), history=[dict(o) for o in st.history],
                masks={k: v.clone() for k, v in st.holder.masks.items()}, live=[e.live for e in st.holder.items])


def masks_check(learn, effect, grads=True):
    st, opt = effects(learn.model)[effect], learn.opt
    if getattr(st.settings.get('method'), 'name', None) == 'snfs': grads, opt = False, None  # it asks for the momentum of what is dead
    for e in st.holder.items:
        dead = ~e.mask.expand_as(e.weight)
        assert int(e.mask.sum()) == e.live > 0, f'{e.name}: {e.live} said to be live, {int(e.mask.sum())} are'
        assert torch.equal(e.float, e.mask.to(e.float.dtype)), f'{e.name}: the working copy is out of step'
        assert not e.weight.detach()[dead].any(), f'{e.name}: a dead weight is not zero'
        if grads and e.weight.grad is not None: assert not e.weight.grad[dead].any(), f'{e.name}: a dead weight has a gradient'
        for k, t in (opt_state_of(opt, e.weight) if opt is not None else {}).items():
            if torch.is_tensor(t) and t.shape == e.weight.shape: assert not t[dead].any(), f'{e.name}: a dead weight has {k}'
    return st


def sparse_check(learn, grads=True):
    st = masks_check(learn, 'dynamic_sparse', grads)
    rate, gran = st.settings['sparsity'], st.settings['granularity']
    if isinstance(rate, float):
        planned = lambda s: sum(initial_counts([tuple(e.weight.shape) for e in st.holder.items], s, gran))
        live = sum(e.live for e in st.holder.items)
        how = st.settings.get('method')
        if isinstance(how, GraNet): assert planned(rate) <= live <= planned(how.start_sparsity), 'outside of its budget'
        else: assert live == planned(rate), 'the budget is off'


def sparse(method, still={}, others={}, name=None, **defaults):
    "Line of one method of `DynamicSparse`; `still`: settings without which a dense network would be changed"
    make = lambda **kw: DynamicSparse(**sparse_settings(**{**dict(method=method, sparsity=.8), **defaults, **kw}))
    shown = {'static': (), 'dsr': ('rewired', 'threshold')}.get(method, ('rewired',))
    return Method(name or method, make, sparse_facts, sparse_check, noop=partial(make, sparsity=0., **still), other=partial(make, sparsity=.5, **others),
                  moves=method != 'static', coarse=method != 'deepr' and 'compute' not in defaults, compressed='compute' in defaults,
                  shrinks=method == 'granet', dense_state=method == 'snfs', penalty=dict(regularizer=L1(1e-2)), columns=('density', *shown))


def prune_check(learn, grads=True):
    "Each layer has exactly the units of its schedule, by a formula of the test's own"
    st = masks_check(learn, 'iterative_prune', grads)
    rate, n = st.settings['target'], st.settings['n_prunes']
    for i, e in enumerate(st.holder.items):
        k = int(st.values[f'done_{i}'])
        planned = min(e.units, max(1, int((1-rate)**(k/n)*e.units + .1))) if isinstance(rate, float) else e.live
        assert e.live == planned, f'{e.name}: {e.live} units after {k} prunes, planned were {planned}'


def pruning(**defaults):
    "Line of `IterativePrune`; settings that only a rewire has are left out"
    def make(sparsity=.8, **kw):
        kw = {k: v for k, v in kw.items() if k not in ('period', 'threshold', 'stop', 'init_mask')}
        return IterativePrune(sparsity, **{**defaults, **kw})
    return Method('prune', make, partial(sparse_facts, effect='iterative_prune'), prune_check, noop=partial(make, sparsity=0.),
                  other=partial(make, sparsity=.5), moves=True, penalty=dict(regularizer=L1(1e-2)), columns=('density', 'pruned'),
                  effect='iterative_prune', rate='target', shrinks=True, at_end=True)


# -- model slicing

def slice_facts(learn):
    st = effects(learn.model)['slice_train']
    return dict(clock={n: getattr(st.clock, n) for n in st.clock.names}, values=dict(st.values), history=[], masks={}, live=[])


def slice_check(learn, grads=True):
    "Between two batches the network is whole, and each slice knows its part of each layer"
    from paramfx.slicing.plan import slice_plan
    plan = slice_plan(learn.model)
    assert plan.key == plan.current == 1 and set(plan.rates) == set(effects(learn.model)['slice_train'].values.values())
    assert not grads or all(p.grad is None or p.grad.isfinite().all() for p in learn.model.parameters())


def slicing(**defaults):
    "Line of `SliceTrain`; settings that only masks have are left out"
    def make(**kw): return SliceTrain(**slice_settings(**{**defaults, **{k: v for k, v in kw.items() if k in ('rates', 'schedule', 'n_random', 'seed')}}))
    return Method('slice_train', make, slice_facts, slice_check,
        noop=partial(make, rates=(1, .5), schedule='random_max', n_random=0), other=partial(make, rates=(1, .75)),
                  moves=False, columns=tuple(f'{n}@{r}' for r in (.5, .25) for n in ('valid_loss', 'accuracy')),
                  effect='slice_train', rate='rates', coarse=False, masked=False,
                  told=r'\(1, 0\.5, 0\.25\) -> \(1, 0\.75\)', refusal='rates', steps=('slice', 'plain'))


# -- splitting

def split_facts(learn):
    st = effects(learn.model)['split_net']
    held = {k: st.holder.model.get_buffer(k).clone() for k in st.holder.keys()}
    return dict(clock={n: getattr(st.clock, n) for n in st.clock.names}, values=dict(st.values) | held,
        history=[], masks={}, live=[], epochs=[dict(o) for o in st.history])


def split_check(learn, grads=True):
    "Assignments are shares, of the classes and of the features below them, and nothing has run away"
    st = effects(learn.model)['split_net']
    for s, p in st.holder.soft().items():
        assert p.shape == st.holder.free[s][::-1] and torch.allclose(p.sum(0), torch.ones_like(p[0])) and p.isfinite().all(), s
    assert st.values['updates'] <= st.clock.steps+1
    assert not grads or all(p.grad is None or p.grad.isfinite().all() for p in learn.model.parameters())


def splitting(**defaults):
    "Line of `SplitNet`; settings that only masks have are left out"
    own = lambda k: k in ('splits', 'every', 'seed') or k.startswith('gamma')
    def make(**kw): return SplitNet(**split_settings(**{**defaults, **{k: v for k, v in kw.items() if own(k)}}))
    return Method('split_net', make, split_facts, split_check,
        noop=partial(make, gamma_weight=0., gamma_disjoint=0., gamma_balance=0.), other=partial(make, splits=[5]), moves=False,
                  columns=('split_weight', 'split_disjoint', 'split_balance', 'split_smallest', 'classes_1',
                  'classes_2'), effect='split_net', rate='splits', coarse=False, masked=False,
                  told=r'\[2\] -> \[5\]', refusal='groups', classes=True)


# -- knowledge evolution

def evolve_facts(learn):
    st = effects(learn.model)['knowledge_evolution']
    return dict(clock={n: getattr(st.clock, n) for n in st.clock.names}, values=dict(st.values),
        history=[], masks={}, live=[], lineage=deepcopy(st.holder.run_state()))


def evolve_check(learn, grads=True):
    "Generations are whole numbers, and what a policy holds in place does not move"
    st = effects(learn.model)['knowledge_evolution']
    gen = st.values['generation']
    assert gen == int(gen) >= 0 and st.values['due'] in (0, 1) and st.values['staged'] in (0, 1)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    if isinstance(st.settings['policy'], Magnitude) and gen%2 == 1:
        for n in ('0.3.weight', '1.2.weight'):
            w = root_module(learn.model).get_parameter(n)
            assert int((w == 0).sum()) >= w.numel()//2, f'{n}: {int((w == 0).sum())} zeros'


def evolving(name, **defaults):
    "Line of `KnowledgeEvolution`; settings that only masks have are left out"
    def make(**kw): return KnowledgeEvolution(**evolve_settings(**{**defaults, **{k: v for k, v in kw.items() if k in ('split_rate', 'seed')}}))
    return Method(name, make, evolve_facts, evolve_check,
        noop=lambda: KnowledgeEvolution(**evolve_settings(**{**defaults, 'split_rate': 1., 'clear_state': 'reset'})),
        other=partial(make, split_rate=.75), moves=False,
                  columns=('generation',) if defaults['policy'] == 'magnitude' else ('generation', 'reset_norm'),
                  effect='knowledge_evolution', rate='policy.split_rate', coarse=False, masked=False, told=r'0\.5 -> 0\.75',
                  refusal='another policy')


# -- shared bases

def based_net(*args, **kw):
    "The small network with a stage of two blocks in the middle of its body, whose convolutions share a basis"
    net = small_net(*args, **kw)
    for _ in range(2): net[0].extend(nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()))
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)][-2:]
    share_bases(net, torch.zeros(1, *((args or (1,))[0], 8, 8)), 6, 2, scale_rank=False, basis_norm=False, groups={'body': layers})
    return net


def ortho_facts(learn):
    st = effects(learn.model)['ortho_reg']
    return dict(clock={n: getattr(st.clock, n) for n in st.clock.names}, values=dict(st.values), history=[], masks={}, live=[])


def ortho_check(learn, grads=True):
    "The basis is in the network and in the optimizer once"
    owner, user = [m for m in learn.model.modules() if isinstance(m, BasisConv2d)]
    assert user.owner is owner and user.basis is owner.shared and sum(p is owner.shared for p in learn.model.parameters()) == 1
    if learn.opt is not None:
        assert sum(p is owner.shared for g in (learn.opt.param_lists if hasattr(learn.opt, 'param_lists')
            else [g['params'] for g in learn.opt.param_groups]) for p in g) == 1


def ortho(**defaults):
    "Line of `OrthoReg`; settings that only masks have are left out"
    def make(ortho_lambda=2., **kw): return OrthoReg(ortho_lambda, **{**defaults, **{k: v for k, v in kw.items() if k in ('unique', 'norm')}})
    return Method('ortho_reg', make, ortho_facts, ortho_check, noop=partial(make, 0.), other=partial(make, 1.), moves=False, columns=('ortho',),
                  effect='ortho_reg', rate='ortho_lambda', coarse=False, masked=False, told=r'2\.0 -> 1\.0', refusal='', net=based_net, folds=True)


METHODS = {m.name: m for m in [
    sparse('dsr', period=2, threshold=.02),
    sparse('static'),
    sparse('set', period=2, drop_frac=.2),
    sparse('deepr', noise='weight', temperature=.02, eta=1e-2, still=dict(temperature=0.)),
    sparse('snfs', period=2, drop_frac=.4),
    sparse('rigl', period=2, drop_frac=.3),
    sparse('granet', period=2, drop_frac=.1, still=dict(start_sparsity=0.), others=dict(start_sparsity=.3, epochs=9)),
    sparse('dsr', name='csr', period=2, threshold=.02, compute='csr'),
    pruning(n_prunes=6),
    slicing(rates=(1, .5, .25), schedule='random', n_random=2),
    splitting(splits=[2], every=2, disjoint_warmup=(0., .5)),
    evolving('evolve', policy='kels', when='every', every=1),
    evolving('evolve_dsd', policy='magnitude', when='fit_end', clear_state='reset'),
    ortho(unique=True),
]}


# -- the small runs

N_STEPS = 8  # optimizer steps of an epoch of `tiny_dls()`

@lru_cache
def _digits():
    d = digits_dls(bs=16)
    return d.train_ds.x, d.train_ds.y, d.valid_ds.x, d.valid_ds.y


def tiny_dls(n=256, n_valid=64, bs=32, chans=1, scale=1, dtype=torch.float32, **kwargs):
    "A few of the real digits; the loader's own random state depends on the global one"
    x, y, xv, yv = _digits()
    f = lambda t, k: t[:k].repeat(1, chans, 1, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3).to(dtype)
    return tensor_dls(f(x, n), y[:n], f(xv, n_valid), yv[:n_valid], bs=bs, normalize=False, **kwargs)


def digit(i): return _digits()[0][i]
def label(i): return _digits()[1][i]
def datasets_dls(bs=16):
    "The digits as fastai `Datasets`, which `tta` asks for"
    return Datasets(L(range(96)), [[digit], [label]], splits=[list(range(64)), list(range(64, 96))]).dataloaders(bs=bs, num_workers=0)


def small_net(c_in=1, dropout=0., norm=True):
    "Convolutions, batch norm and a head, of classes that any process can unpickle"
    bn = (lambda n: [nn.BatchNorm2d(n)]) if norm else (lambda n: [])
    body = nn.Sequential(nn.Conv2d(c_in, 8, 3, padding=1), *bn(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), *bn(12), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(12*16, 10)))


def two_groups(m): return [params(m[0]), params(m[1])]


def seed_all(seed=0):
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)


def build(path, cbs=None, seed=0, dls=None, model=None, **kwargs):
    "A Learner whose every random state starts from `seed`; without a log on the terminal"
    _digits()  # the first call makes loaders, which take random numbers
    seed_all(seed)
    dls = tiny_dls() if dls is None else dls() if callable(dls) else dls
    model = small_net() if model is None else model() if not isinstance(model, nn.Module) else model
    kwargs = {**dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=1e-2, path=path), **kwargs}
    learn = Learner(dls, model, cbs=cbs, **kwargs)
    return quiet(learn)


def quiet(learn):
    "No bar and no table on the terminal"
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = no_log
    return learn


def no_log(*args): pass


OPTIMIZERS = {
    'adam': dict(opt_func=Adam),
    'sgd+momentum+wd': dict(opt_func=partial(SGD, mom=.9), wd=.1),
    'rmsprop+l2': dict(opt_func=partial(RMSProp, mom=.9, decouple_wd=False), wd=.1),
    'ranger': dict(opt_func=partial(ranger, k=3)),
    'torch adamw': dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
    'torch sgd': dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, nesterov=True, weight_decay=.1))),
}


class Probe(FastaiCallback):
    "Holds the method to its contract at every step, after everything else has had its turn"
    order, run_valid = 12, False
    def __init__(self, method): self.method, self.steps = method, 0
    def before_step(self): self.method.check(self.learn)
    def after_step(self):
        self.method.check(self.learn, grads=False)  # a rewire comes after the step; the gradients are spent and about to be cleared
        self.steps += 1


class Stop(FastaiCallback):
    "Presses Ctrl-C before a batch; counted over everything that is trained"
    order, run_valid = 7, False
    def __init__(self, at): self.__dict__.update(at=at, seen=0)
    def before_batch(self):
        self.__dict__['seen'] += 1
        if self.seen == self.at: raise KeyboardInterrupt


# -- comparing

def snapshot(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a, b, where=''):
    "Name of the first place where two nested things differ by a single bit, or ''"
    if torch.is_tensor(a) and torch.is_tensor(b):
        alike = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7e7) if a.is_floating_point() else a,
                                                                          b.nan_to_num(7e7) if b.is_floating_point() else b)
        return '' if alike else where or 'tensor'
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b): return f'{where}: keys {sorted(map(str, set(a) ^ set(b)))} or their order'
        return next((r for k in a if (r := same(a[k], b[k], f'{where}/{k}'))), '')
    if isinstance(a, (list, tuple, L)) and isinstance(b, (list, tuple, L)):
        if len(a) != len(b): return f'{where}: {len(a)} and {len(b)} entries'
        return next((r for i, (x, y) in enumerate(zip(a, b)) if (r := same(x, y, f'{where}[{i}]'))), '')
    return '' if a == b or (a != a and b != b) else f'{where}: {a!r} and {b!r}'


def footprint(model):
    "Everything an effect could leave behind in a network: attributes, buffers, hooks"
    def size(v): return sorted(map(str, v)) if isinstance(v, dict) and not all(isinstance(k, int)
        for k in v) else len(v) if hasattr(v, '__len__') and not torch.is_tensor(v) else type(v).__name__
    return {n: {k: size(v) for k, v in sorted(vars(m).items())} for n, m in model.named_modules()}


def run_record(learn):
    "What a run leaves: weights, buffers, optimizer, logged numbers, losses, learning rates"
    opt = learn.opt.state_dict()
    state = [{k: v for k, v in s.items()} for s in opt['state']] if isinstance(opt['state'], (list, L)) else opt['state']
    rec = learn.recorder
    return dict(model=snapshot(learn.model), opt=state, values=[list(map(float, v)) for v in rec.values],
        losses=[float(o) for o in rec.losses], lrs=list(rec.lrs))
