"""What holds at every step of every sparse method, whatever the network, the optimizer and the settings.

A run of a dozen steps is watched by two callbacks. One stands just before the masks are applied and changed, the other after it;
what goes and comes is worked out from copies of masks, weights, gradients and momentum, by loops and NumPy, and not by the library's
own counters. Properties of the functions behind it (quotas, thresholds, draws) are in `test_budget.py`, blocks and n:m groups in
`test_blocks.py`, files, interrupts and optimizers on one real network in `test_contracts.py`, two ranks in `test_ddp.py`, and the
replays of the published code, to the bit, are `test_replay`, `test_deepr_replay`, `test_rigl` and `test_snfs` of `test_golden_sparse.py`."""
import os
import random
from contextlib import ExitStack
from functools import partial
from math import cos, pi
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, Learner, OptimWrapper, SGD
import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
from fastai.callback.training import GradientAccumulation
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from contracts import Stop, opt_state_of, quiet, same, seed_all, snapshot, sparse_facts
from paramfx.data.memory import tensor_dls
import paramfx.export.materialize  # noqa: F401 - gives Learner materialize
from paramfx.core.runs import RunState
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.methods import DSR
from paramfx.sparse.plots import MaskRecorder
from settings import sparse_settings

pytestmark = pytest.mark.filterwarnings('ignore')  # such as a fit too short for its schedule

def examples(n):
    return settings(max_examples=n if 'PARAMFX_SLOW' in os.environ else max(5, n//3), derandomize=True,
        deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))

OPTIMIZERS = {'sgd': partial(SGD, mom=.9), 'adam': Adam, 'torch nesterov': partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, nesterov=True)),
              'torch adamw': partial(OptimWrapper, opt=torch.optim.AdamW)}
METHODS = {'dsr': dict(), 'set': dict(drop_frac=.3), 'rigl': dict(drop_frac=.5), 'snfs': dict(drop_frac=.5), 'granet': dict(drop_frac=.5, start_sparsity=.2),
           'deepr': dict(eta=.05, temperature=.05), 'static': dict()}
BATCHES, PERIOD = 6, 2  # of an epoch; optimizer steps between rewires


# -- tiny networks and runs

def data():
    x = torch.randn(28, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return tensor_dls(x[4:], torch.arange(24)%4, x[:4], torch.arange(4), bs=4, normalize=False, device='cpu')

def network(a, b, c, k, groups):
    return nn.Sequential(nn.Conv2d(4, a, k, padding=1), nn.Tanh(), nn.Conv2d(a, b, k), nn.BatchNorm2d(b),
        nn.Tanh(), nn.ConvTranspose2d(b, b, k, groups=groups), nn.Tanh(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(b, c), nn.Tanh(), nn.Linear(c, 4))


def learner(case, method, cbs=(), weights=0, path=None, plain=False, **kw):
    "A Learner as `case` has it; `plain`: the same one without a mask"
    seed_all(weights)
    dls, model = data(), network(*case['shape'])
    cbs = [*cbs, *([GradientAccumulation(8)] if case['accumulate'] else [])]
    learn = quiet(Learner(dls, model, CrossEntropyLossFlat(), opt_func=OPTIMIZERS[case['opt']], lr=.05, wd=case['wd'], cbs=cbs, path=path))
    args = {**METHODS[method], **case['more'],
        **dict(method=method, granularity=case['granularity'], include=case['include'], l1=case['l1'], stop=1.), **kw}
    args.setdefault('sparsity', {'0': 0., '*': case['sparsity']} if case['full'] and case['include'] else case['sparsity'])
    if not plain: learn.add_cb(DynamicSparse(**sparse_settings(**args, **({} if method in ('deepr', 'static') else dict(period=PERIOD)))))
    return learn


@st.composite
def cases(draw, method):
    gran = draw(st.sampled_from(['weight'] if method == 'deepr' else ['weight', 'kernel', 'filter', '2x2'] + ['2:4']*(method != 'granet')))
    width = st.sampled_from([4, 8] if gran in ('2x2', '2:4') else [4, 6, 7])
    a, b, c = draw(width), draw(width), draw(width)
    more = {'dsr': dict(threshold=[.01, .1, 1e9], across_layers=[True, True, False],
        grow_init=['zero', 'random']), 'set': dict(two_ended=[False]+[True]*(gran == 'weight'), grow_init=['zero', 'random']),
            'deepr': dict(noise=['grad', 'weight'], sign=['first_step', 'random']), 'snfs': dict(across_layers=[True, False])}.get(method, {})
    full = method != 'granet' and gran != '2:4' and draw(st.booleans())
    return dict(shape=(a, b, c, draw(st.integers(1, 3)), 2 if b%4 == 0 and draw(st.booleans()) else 1), granularity=gran,
        sparsity=draw(st.sampled_from([.5, .7] if gran == 'weight' else [.5])), full=full,
        include='*' if full else draw(st.sampled_from([None, '*'])), opt=draw(st.sampled_from(list(OPTIMIZERS))), wd=draw(st.sampled_from([0., .1])),
        l1=draw(st.sampled_from([0., 1e-2])), accumulate=draw(st.booleans()), more={k: draw(st.sampled_from(v)) for k, v in more.items()})


# -- the same by another route

def whole(mask, shape): # a value per unit, at each of its weights
    return np.kron(mask, np.ones([a//b for a, b in zip(shape, mask.shape)], bool)).astype(bool)
def per_unit(t, mask):
    "Mean magnitude of each unit"
    t = np.abs(t).reshape([n for a, b in zip(t.shape, mask.shape) for n in (b, a//b)])
    return t.mean(tuple(range(1, t.ndim, 2)))

def masks_of(model): return {n[:-5]: b.numpy().copy() for n, b in model.named_buffers() if n.endswith('_mask')}
def weights_of(model, names): return {n: model.get_parameter(n).detach().numpy().copy() for n in names}
def smallest(score, where, n):
    "Bool: the `n` smallest of `where`; of equal ones, the first"
    idx = np.flatnonzero(where)
    res = np.zeros(where.size, bool)
    res[idx[np.argsort(score.ravel()[idx], kind='stable')[:n]]] = True
    return res.reshape(where.shape)

def momentum(state):
    "By name, of fastai's and torch's optimizers"
    m = next(state[k] for k in ('grad_avg', 'momentum_buffer', 'exp_avg') if k in state)
    v = next((state[k] for k in ('sqr_avg', 'exp_avg_sq') if k in state), None)
    return (m if v is None else m/(v.sqrt()+1e-8)).numpy().copy()


class Eve(Callback):
    "What is there just before gradients are masked, and just before a rewire"
    order, run_valid = 10.4, False
    def before_step(self): self.seen.grads = {n: np.array(self.model.get_parameter(n).grad) for n in self.seen.was}
    def after_step(self):
        self.seen.stepped = weights_of(self.model, self.seen.was)
        if self.seen.method == 'snfs': self.seen.momentum = {n: momentum(opt_state_of(self.opt, self.model.get_parameter(n))) for n in self.seen.was}


class Watch(Callback):
    "Holds a run to the invariants 1 to 7"
    order, run_valid = 60, False
    def __init__(self, method, case, h=None):
        self.seen = SimpleNamespace(method=method, was={})
        self.case, self.h, self.steps, self.batches, self.mark, self.moves = case, h, 0, 0, 0, 0

    def before_fit(self):
        m = masks_of(self.model)
        self.first = sum(int(v.sum()) for v in m.values())

    def before_batch(self):
        self.seen.was = masks_of(self.model)
        self.before = weights_of(self.model, self.seen.was)

    def before_step(self):
        "2, of the gradients; SNFS asks for those of dead weights, by design"
        for n, m in self.seen.was.items():
            if self.seen.method != 'snfs':
                assert not self.model.get_parameter(n).grad.numpy()[~whole(m, self.before[n].shape)].any(), f'{n}: gradient of a dead weight'

    def after_batch(self): self.batches += 1
    def after_step(self):
        now, after, seen = masks_of(self.model), weights_of(self.model, self.seen.was), self.seen
        layers = [SimpleNamespace(name=n, was=m, now=now[n], gone=m & ~now[n], new=now[n] & ~m,
            live=int(m.sum()), free=int((~m).sum()), before=self.before[n], stepped=seen.stepped[n], after=after[n],
            score=per_unit(seen.stepped[n], m), grad=per_unit(seen.grads[n], m),
            momentum=per_unit(seen.momentum[n], m) if seen.method == 'snfs' else None) for n, m in seen.was.items()]
        due = seen.method != 'static' and (self.steps%PERIOD == 0 and self.steps > 0 or seen.method == 'deepr')
        self.pos = self.mark/(self.learn.n_epoch*BATCHES)
        for l in layers: self.clean(l)
        if due:
            self.moves += sum(int(l.new.sum()) for l in layers)
            RULES[seen.method](self, layers)
            for l in layers: self.moved(l)
        else: assert not any(l.gone.any() or l.new.any() for l in layers), 'masks changed out of turn'
        total = sum(int(l.now.sum()) for l in layers)
        assert total == (self.goal() if seen.method == 'granet' and due else sum(l.live for l in layers)) and (
            seen.method == 'granet' or total == self.first), 'the budget is off'
        if self.case['granularity'] == '2:4':
            for l in layers:  # inputs lie side by side in a group
                if l.now.ndim == 2: assert (l.now.reshape(-1, 4).sum(1) == 2).all()
        self.steps, self.mark = self.steps+1, self.batches+1

    def goal(self):
        "Live units of GraNet after a rewire at this position"
        start, end = self.budgets
        return end+int((start-end)*(1-self.pos)**3+.1)

    def clean(self, l):
        "2 and 6"
        dead = ~whole(l.now, l.after.shape)
        assert l.now.any(), f'{l.name}: nothing is left of it'
        assert not l.after[dead].any(), f'{l.name}: a dead weight is not zero'
        if self.seen.method == 'snfs': return  # it keeps the momentum of dead weights, by design
        for k, t in opt_state_of(self.opt, self.model.get_parameter(l.name)).items():
            if torch.is_tensor(t) and tuple(t.shape) == l.after.shape: assert not t.numpy()[dead].any(), f'{l.name}: a dead weight has {k}'

    def moved(self, l):
        "3: what stays is left alone, what comes begins anew; what goes and comes is disjoint as what stays keeps its weight"
        stay, new = whole(l.was & l.now, l.after.shape), whole(l.new, l.after.shape)
        if self.case['more'].get('noise') != 'weight':
            assert np.array_equal(l.after[stay], l.stepped[stay]), f'{l.name}: a weight that stays was changed'
        if self.case['more'].get('grow_init') == 'random': assert l.after[new].all(), f'{l.name}: a new weight is 0'
        else: assert not l.after[new].any(), f'{l.name}: a new weight is not 0'
        if self.seen.method == 'snfs': return
        for k, t in opt_state_of(self.opt, self.model.get_parameter(l.name)).items():
            if torch.is_tensor(t) and tuple(t.shape) == l.after.shape: assert not t.numpy()[new].any(), f'{l.name}: a new weight has {k}'

    def share(self):
        "RigL's share of the live units that goes, half a cosine down to 0"
        return self.case['frac']/2*(1+cos(pi*self.pos))


# -- who goes, and how many come where

def exchanged(layers, chosen, within, quotas=None):
    "Just `chosen` go where there is room for as many; in a layer of its own, or shared out by `quotas`"
    k, free, grown = [int(c.sum()) for c in chosen], [l.free for l in layers], [int(l.new.sum()) for l in layers]
    if within:
        for l, c, n in zip(layers, chosen, k):
            assert not (l.gone & ~c).any() and l.gone.sum() == l.new.sum() == min(n, l.free), f'{l.name}: {l.gone.sum()} went, {l.new.sum()} came'
        return
    assert sum(grown) == min(sum(k), sum(free)) == sum(int(l.gone.sum()) for l in layers)
    for l, c in zip(layers, chosen):
        assert not (l.gone & ~c).any() and (sum(k) > sum(free) or np.array_equal(l.gone, c)), f'{l.name}: others went than those to be dropped'
    if all(g < f for g, f in zip(grown, free)):  # 5: no layer is full
        for l, g, q in zip(layers, grown, quotas):
            assert abs(g-sum(k)*q/sum(quotas)) < 1+1e-6, f'{l.name}: {g} units came, its quota was {sum(k)*q/sum(quotas):.2f}'


def dsr(w, layers):
    chosen = []
    for l in layers:
        low = l.was & (l.score < w.h)  # 4
        if low.sum() == l.live: low.flat[np.where(l.was, l.score, -1.).argmax()] = False
        chosen.append(low)
    k = sum(int(c.sum()) for c in chosen)
    within = not w.case['more']['across_layers'] or w.case['granularity'] == '2:4'
    exchanged(layers, chosen, within, [l.live-int(c.sum()) for l, c in zip(layers, chosen)])
    target = max(1, round(.1*sum(l.live for l in layers)))
    w.h = w.h/2 if k > 1.1*target else 2*w.h if k < .9*target else w.h
    assert w.learn.dynamic_sparse.effect.values['threshold'] == w.h, 'the threshold does not follow its rule'


def set_(w, layers):
    f = METHODS['set']['drop_frac']
    def weak(l):
        if not w.case['more']['two_ended']: return smallest(l.score, l.was, int(f*l.live))
        return np.logical_or(*[smallest(l.score, side, int(f*side.sum())) for side in (l.was & (l.stepped > 0), l.was & (l.stepped < 0))])
    exchanged(layers, list(map(weak, layers)), True)


def rigl(w, layers):
    for l in layers:
        rest = ~l.was | smallest(l.score, l.was, int(w.share()*l.live))
        assert np.array_equal(l.before, l.stepped), f'{l.name}: the optimizer made its step, too'
        assert not (l.gone & ~rest).any() and l.now.sum() == l.live, f'{l.name}: {l.live} units before, {l.now.sum()} after'
        if w.case['granularity'] != '2:4' and (rest & l.now).any() and (~l.now).any():
            assert l.grad[rest & l.now].min() >= l.grad[~l.now].max()-1e-6, f'{l.name}: a larger gradient was passed over'


def snfs(w, layers):
    within = not w.case['more']['across_layers'] or w.case['granularity'] == '2:4'
    exchanged(layers, [smallest(l.score, l.was, int(w.share()*l.live)) for l in layers], within, [float(l.momentum[l.was].mean()) for l in layers])
    for l in layers:
        left = ~l.was & ~l.now
        if w.case['granularity'] != '2:4' and l.new.any() and left.any():
            assert l.momentum[l.new].min() >= l.momentum[left].max()-1e-6, f'{l.name}: a larger momentum was passed over'


def granet(w, layers):
    for l in layers:
        left = ~l.was & ~l.now
        if l.new.any() and left.any(): assert l.grad[l.new].min() >= l.grad[left].max()-1e-6, f'{l.name}: a larger gradient was passed over'


def deepr(w, layers):
    "7, where there is room"
    for l in layers:
        if l.free < l.live:
            assert l.gone.sum() == l.new.sum() <= l.free
            continue
        stay = l.was & l.now
        assert not (l.before*l.after < 0)[stay].any(), f'{l.name}: a weight changed its sign and stayed'
        if w.case['more']['noise'] == 'weight': continue
        flipped = l.was & (l.before*l.stepped < 0)
        other = l.gone & ~flipped  # only a connection that woke up against its own random sign
        assert (l.gone | ~flipped).all() and not (l.before[other]).any() and (w.case['more']['sign'] == 'random' or not other.any())


RULES = dict(dsr=dsr, set=set_, rigl=rigl, snfs=snfs, granet=granet, deepr=deepr)


def watched(case, method, epochs=2):
    case = case | dict(frac=METHODS[method].get('drop_frac'))
    watch, eve = Watch(method, case, case['more'].get('threshold')), Eve()
    learn = learner(case, method)
    eve.seen = watch.seen
    if method == 'granet': watch.budgets = [sum(r[k] for r in learn.dynamic_sparse.effect.report if 'live' in r) for k in ('live', 'end')]
    learn.add_cbs([watch, eve])
    learn.fit(epochs*(2 if case['accumulate'] else 1))
    assert watch.steps == BATCHES*epochs
    return learn, watch


# -- 1 to 7, 12 and 13

@pytest.mark.parametrize('method', METHODS)
def test_every_step_keeps_every_promise(method):
    moves, alive = [], []

    @given(cases(method))
    @examples(16)
    def run(case):
        leaves_alone(learner(case, method))
        learn, watch = watched(case, method)
        moves.append(watch.moves)
        live = sum(int(m.sum()) for m in masks_of(learn.model).values())
        assert live == (watch.budgets[1] if method == 'granet' else watch.first), 'the budget at the end'
        leaves_alone(learn)
        alive.append(stands_for_itself(learn, case['shape']))
    run()
    assert sum(alive) > len(alive)/2, 'most networks say the same to everything'
    assert method == 'static' or sum(m > 0 for m in moves) > len(moves)/2, 'hardly a unit was moved, so nothing was tested'


def leaves_alone(learn):
    "13: `lr_find` changes no weight, no mask, no counter, though it runs longer than a period"
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, (Eve, Watch))])
    before = snapshot(learn.model), sparse_facts(learn)
    with ExitStack() as stack:
        for c in (learn.no_bar(), learn.no_logging()): stack.enter_context(c)
        learn.lr_find(num_it=3*PERIOD, show_plot=False, suggest_funcs=())
    assert not (where := same(before, (snapshot(learn.model), sparse_facts(learn)))), where


def stands_for_itself(learn, shape):
    "12: the weights where masks are, zeros elsewhere, in a network that knows nothing of masks; `materialize` may leave out what is dead"
    x, net = torch.randn(5, 4, 4, 4), learn.model.eval()
    plain, masks = network(*shape).eval(), masks_of(net)
    with torch.no_grad():
        out, state = net(x), {k: v.clone() for k, v in net.state_dict().items() if not k.endswith(('_mask', '_effect'))}
        for n, m in masks.items(): state[n] *= torch.from_numpy(whole(m, state[n].shape))
        plain.load_state_dict(state, strict=True)
        assert torch.equal(plain(x), out)
        done = learn.materialize().model.eval()
        assert set(done.state_dict()) <= set(state) and torch.allclose(done(x), out, rtol=1e-5, atol=1e-6)
    return bool(out.std(0).any())


# -- 4: at its edges

@pytest.mark.parametrize('tol,n,moves', [(.1, 90, 1.), (.1, 89, 2.), (.1, 110, 1.), (.1, 111, .5),
    (.25, 75, 1.), (.25, 74, 2.), (.25, 125, 1.), (.25, 126, .5)])
def test_the_threshold_stays_at_the_edges_of_its_tolerance(tol, n, moves):
    "By whole rewires of a layer in which `n` of 1000 live units lie below it; at the threshold itself they stay. A quarter is exact in binary, a tenth is not"
    model = nn.Sequential(nn.Linear(40, 50))
    cb = DynamicSparse(init_mask={'0.weight': torch.arange(2000).view(50, 40) < 1000}, method=DSR(n_realloc=100, threshold=.5, tol=tol))
    with torch.no_grad(): model[0].weight.copy_(torch.where(torch.arange(2000).view(50, 40) < n, .25, .5))
    cb.__dict__['effect'] = cb.convert(model).attach(model)
    cb.effect.values['threshold'] = .5
    cb.rewire()
    h = cb.history[-1]
    assert sum(h['dropped'].values()) == sum(h['grown'].values()) == n
    assert cb.effect.values['threshold'] == .5*moves


# -- 8

def after(seed, method, weights=0, **kw):
    case = dict(shape=(6, 8, 8, 2, 1), granularity='weight', sparsity=.6, full=False, include=None,
        opt='sgd', wd=0., l1=0., accumulate=False, more=dict(threshold=.1) if method == 'dsr' else {})
    learn = learner(case, method, weights=weights, seed=seed, **kw)
    start = masks_of(learn.model)
    random.random(), torch.rand(3), np.random.rand()
    learn.fit(2)
    return start, masks_of(learn.model), weights_of(learn.model, start)

def alike(a, b): return all(np.array_equal(a[n], b[n]) for n in a)

@pytest.mark.few(4)
@pytest.mark.parametrize('method', METHODS)
def test_masks_depend_on_the_seed(method):
    "On two ranks: `test_ddp.py`"
    a, b, c, d = after(3, method), after(3, method), after(4, method), after(3, method, weights=1)
    assert all(map(alike, a, b))
    assert not alike(a[0], c[0]) and not alike(a[1], c[1])
    assert alike(a[0], d[0]), 'the first masks are drawn from the seed alone'


@pytest.mark.few(4)
@pytest.mark.parametrize('method', METHODS)
def test_growth_is_drawn_from_the_seed_or_not_drawn(method):
    "With the same masks to begin with, another seed is seen where growth is random, and nowhere else"
    a, b = (after(s, method, init_mask='magnitude') for s in (3, 4))
    assert alike(a[0], b[0]) and alike(a[1], b[1]) == (method in ('rigl', 'snfs', 'granet', 'static'))


# -- 9

VARIANTS = {'dsr': dict(threshold=.1), 'dsr random': dict(threshold=.1, grow_init='random'), 'set': {},
    'set two_ended': dict(two_ended=True), 'rigl': {}, 'snfs': {}, 'snfs within': dict(across_layers=False),
            'granet': {}, 'deepr': dict(noise='weight'), 'deepr random': dict(sign='random'), 'static': {}}

def varied(name, **case):
    method = name.split()[0]
    return method, {**dict(shape=(4, 8, 6, 2, 2), granularity='weight', sparsity=.6, full=False,
        include='*', opt='torch nesterov', wd=.1, l1=1e-3, accumulate=False, more=VARIANTS[name]), **case}

def everything(learn): return snapshot(learn.model), sparse_facts(learn), {n: opt_state_of(learn.opt, p) for n, p in learn.model.named_parameters()}

@pytest.mark.parametrize('accumulate', [False, True])
@pytest.mark.parametrize('name', VARIANTS)
def test_saved_and_loaded_goes_on_as_if_nothing_had_been(name, accumulate, tmp_path):
    "`learn.save` between two fits, loaded by a Learner of other weights and random states"
    method, case = varied(name, accumulate=accumulate, opt='adam' if accumulate else 'torch nesterov')
    a, b = (learner(case, method, [MaskRecorder(follow=True)], weights=s, path=tmp_path) for s in (0, 5))
    a.fit(1)
    a.save('half')
    b.create_opt()
    b.load('half')
    assert not (where := same(snapshot(a.model), snapshot(b.model))), where
    for o in (a, b):
        o.dls = a.dls
        for dl in o.dls.loaders: dl.rng = random.Random(7)  # else they shuffle in another order
        seed_all(9)
        o.fit(2)
    done = [everything(o) for o in (a, b)]
    for d in done: d[1].pop('history')  # it is of the run, and not in the file
    assert not (where := same(*done)), where
    assert method == 'static' or any(sum(h['grown'].values()) for h in b.dynamic_sparse.history), 'nothing moved'


@pytest.mark.few(5)
@pytest.mark.parametrize('name', VARIANTS)
def test_resumed_is_uninterrupted(name, tmp_path):
    "Stopped in mid-epoch, between the period's rewires, and taken up by a Learner of other weights and random states"
    method, case = varied(name, opt='sgd')
    whole_, half, rest = (learner(case, method, [RunState(), *cbs], weights=s, path=tmp_path)
        for s, cbs in ((0, ()), (0, [Stop(2*BATCHES+3)]), (7, ())))
    with pytest.raises(KeyboardInterrupt): half.fit_one_cycle(3, .05)
    rest.resume()
    rest.fit_one_cycle(3, .05)
    whole_.fit_one_cycle(3, .05)
    assert not (where := same(everything(whole_), everything(rest))), where


# -- 10

@given(cases('static'), st.sampled_from(list(METHODS)))
@examples(12)
def test_without_zeros_it_is_plain_training(case, method):
    "To the bit, for static masks; and for methods that have nothing to exchange"
    case = case | dict(l1=0., full=False, granularity='weight' if method == 'deepr' or case['granularity'] == '2:4' else case['granularity'])
    still = dict(deepr=dict(temperature=0.), granet=dict(start_sparsity=0.)).get(method, {})
    a, b = learner(case, method, sparsity=0., **still), learner(case, method, plain=True)
    for o in (a, b): o.fit(2)
    for (n, p), q in zip(a.model.named_parameters(), b.model.parameters()): assert torch.equal(p, q), n
    for n, p in b.model.named_buffers(): assert torch.equal(p, a.model.get_buffer(n)), n
