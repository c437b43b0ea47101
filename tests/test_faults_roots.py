"Averages of dead weights, exact zeros or faded ones, must not make the steps of an optimizer slow, and what lives must not change by a bit"
from functools import partial
from statistics import median
from time import perf_counter

import pytest
import torch
from fastai.basics import Learner, OptimWrapper, set_seed
from fastai.optimizer import QHAdam, Adam, Lamb, Larc, Lookahead, RAdam, RMSProp, SGD
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramfx.evolution.forgetting
import paramfx.sparse.sparsify
from paramfx.all import DynamicSparse, IterativePrune, KnowledgeEvolution, tensor_dls
from paramfx.core.optimizers import opt_state, spare_roots

TINY = torch.finfo(torch.float32).tiny


def wrapped(cls, **kw): return lambda params, lr=1e-2, **_: OptimWrapper(params, cls, lr=lr, **kw)


OPTS = dict(adam=Adam, radam=RAdam, lamb=Lamb, qhadam=QHAdam, rmsprop=RMSProp, larc=Larc,
    sgd=partial(SGD, mom=.9), lookahead=lambda *a, **kw: Lookahead(Adam(*a, **kw)),
            t_adamw=wrapped(torch.optim.AdamW), t_adam=wrapped(torch.optim.Adam),
            t_amsgrad=wrapped(torch.optim.AdamW, amsgrad=True), t_radam=wrapped(torch.optim.RAdam), t_nadam=wrapped(torch.optim.NAdam),
            t_rmsprop=wrapped(torch.optim.RMSprop), t_centered=wrapped(torch.optim.RMSprop, centered=True,
            momentum=.9), t_adagrad=wrapped(torch.optim.Adagrad), t_sgd=wrapped(torch.optim.SGD, momentum=.9))


def learner(opt_func, *cbs, width=40):
    set_seed(0)
    x = torch.randn(64, 20)
    dls = tensor_dls(x, (x[:, :1] > 0).long()[:, 0], x[:8], (x[:8, 0] > 0).long(), bs=8, device='cpu')
    net = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 2))
    learn = Learner(dls, net, opt_func=opt_func, cbs=cbs)
    learn.recorder.train_metrics = False
    return learn


def fit(learn, n=2):
    with learn.no_logging(), learn.no_bar(): learn.fit(n, 1e-2)
    return learn


class Roots(TorchDispatchMode):
    "Smallest number that a root was taken of"
    least, seen = float('inf'), 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.sqrt, torch.ops.aten.sqrt_) and args[0].numel() > 1:
            self.least, self.seen = min(self.least, float(args[0].min())), self.seen+1
        return func(*args, **(kwargs or {}))


def one_step(learn):
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    with Roots() as r: learn.opt.step()
    return r


METHODS = dict(static=lambda **kw: DynamicSparse(.9, method='static', include='*', **kw),
    set=lambda **kw: DynamicSparse(.9, method='set', period=3, include='*', **kw),
               prune=lambda **kw: IterativePrune(.9, n_prunes=2, include='*', **kw))


@pytest.mark.parametrize('state', ('zero', 'keep'))
@pytest.mark.parametrize('opt', OPTS)
def test_no_root_of_what_is_next_to_nothing(opt, state):
    if state == 'keep' and opt == 'lookahead': pytest.skip('as adam')
    for make in METHODS.values() if opt in ('adam', 't_adamw') else [METHODS['set']]:
        learn = fit(learner(OPTS[opt], make(state=state)))
        rooted = [v for p in learn.model.parameters() for k, v in opt_state(learn.opt, p).items()
            if k in ('sqr_avg', 'exp_avg_sq', 'square_avg', 'sum', 'max_exp_avg_sq')]
        assert all(type(v) is torch.Tensor for v in rooted)
        for v in rooted:
            if v.ndim > 1: v[:, ::2].fill_(7e-44); v[:, 1::4].zero_()
        r = one_step(learn)
        assert (r.seen > 0) == bool(rooted)
        assert not r.seen or r.least >= TINY, f'the root of {r.least}'


@pytest.mark.parametrize('state', ('zero', 'keep'))
@pytest.mark.parametrize('opt', OPTS)
def test_live_weights_stay_the_same_to_the_bit(opt, state, monkeypatch):
    def run():
        learn = fit(learner(OPTS[opt], METHODS['set'](state=state)), 3)
        return [p.detach().clone() for p in learn.model.parameters()] + [v.clone()
            for p in learn.model.parameters() for v in opt_state(learn.opt, p).values() if torch.is_tensor(v)]
    new = run()
    monkeypatch.setattr(paramfx.sparse.sparsify, 'spare_roots', lambda opt: None)
    monkeypatch.setattr(paramfx.masks.store.MaskStore, 'zero_faded_', lambda self, opt: None)
    old = run()
    assert len(new) == len(old) and all(map(torch.equal, new, old))


@pytest.mark.parametrize('opt', ('adam', 'rmsprop', 'sgd', 't_adamw', 't_sgd'))
@pytest.mark.parametrize('make', (lambda: DynamicSparse(.9, method='static', state='keep', include='*'), lambda: IterativePrune(.9, state='keep', include='*')))
def test_kept_state_of_dead_weights_fades_to_zero(opt, make):
    "It is kept for weights that come back, and ends at 0 rather than at the smallest numbers there are"
    learn = fit(learner(OPTS[opt], make()), 1)
    cb = next(c for c in learn.cbs if hasattr(c, 'store'))
    items = cb.store.items
    for e in items:
        for t in e.states(learn.opt): t[~e.full] = torch.tensor([7e-44, 0., -4.2e-45, 1e-20]).repeat(t.numel())[:int((~e.full).sum())]
    kept = [[t.clone() for t in e.states(learn.opt)] for e in items]
    cb.effect.clock.steps = 50
    cb.on_update(learn)
    for e, old in zip(items, kept):
        for t, o in zip(e.states(learn.opt), old):
            assert torch.equal(t[e.full], o[e.full]) and torch.equal(t[~e.full], o[~e.full].where(o[~e.full] == 1e-20, 0.))


def test_hundreds_of_steps_leave_no_subnormal_state():
    learn = fit(learner(Adam, DynamicSparse(.9, method='static', state='keep', include='*')), 1)
    e = learn.dynamic_sparse.store.items[0]
    for t in e.states(learn.opt): t[~e.full] = 1e-38
    fit(learn, 13)
    for t in e.states(learn.opt): assert not (t[~e.full] != 0).any()


def test_what_a_generation_holds_in_place_is_spared():
    learn = learner(wrapped(torch.optim.AdamW), KnowledgeEvolution('magnitude'))
    fit(fit(learn, 1), 1)
    r = one_step(learn)
    assert r.seen and r.least >= TINY


def test_a_step_with_a_tiny_eps_is_left_alone():
    p = nn.Parameter(torch.ones(4))
    opt = torch.optim.AdamW([p], eps=1e-30)
    spare_roots(opt)
    spare_roots(opt)
    assert len(opt._optimizer_step_pre_hooks) == 1
    p.grad = torch.tensor([0., 1, 1, 1])
    with Roots() as r: opt.step()
    assert r.least == 0


@pytest.mark.slow
@pytest.mark.parametrize('opt', ('adam', 'radam', 't_adamw', 't_rmsprop'))
def test_steps_take_as_long_as_those_of_a_dense_network(opt):
    "Interleaved, with averages as they are after some thousand steps"
    learns = [fit(learner(OPTS[opt], *cbs, width=20_000), 1) for cbs in ([], [DynamicSparse(.9, method='static', include='*')])]
    times = [[], []]
    for _ in range(21):
        for l, ts in zip(learns, times):
            for p in l.model.parameters(): p.grad = torch.ones_like(p)
            if hasattr(l, 'dynamic_sparse'): l.dynamic_sparse.store.grads_()
            start = perf_counter()
            l.opt.step()
            ts.append(perf_counter()-start)
    assert min(median(b/a for a, b in zip(*times)), min(times[1])/min(times[0])) < 1.3
