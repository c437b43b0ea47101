"Blocks as units, and n:m patterns whose weights move inside of their groups"
import os
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Adam, Learner, SGD, accuracy, set_seed
import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from contracts import Stop
from paramfx.data.memory import digits_dls
from paramfx.masks.store import Masked
from paramfx.core.runs import RunState
from paramfx.export.materialize import load_recipe, materialize, save_recipe
from paramfx.sparse.prune import IterativePrune
from paramfx.report.cost import cost
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.methods import DSR, METHODS, Rewirer, rewirer
from paramfx.sparse.sparsify import plan_masks, sparsify
from paramfx.core.state import effects
from paramfx.masks.units import expand_units, unit_scores

SLOW = dict(deadline=None, suppress_health_check=list(HealthCheck))


def kron(mask, shape):
    "A mask of a value per unit at the weight's shape, by another route than `expand_units`"
    return torch.from_numpy(np.kron(mask.numpy(), np.ones([a//b for a, b in zip(shape, mask.shape)], bool))).bool()


def conv_net(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 10))


def attached(cb, model, lr=.1):
    "`cb` on `model`, with an optimizer that has state everywhere, and no Learner"
    cb.__dict__['effect'] = cb.convert(model).attach(model)
    cb.effect.values['threshold'] = getattr(cb.method, 'threshold', 0.)
    opt = Adam(list(model.parameters()), lr=lr)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    cb.store.weights_(); cb.store.state_(opt)
    cb.__dict__['dense'] = {e: unit_scores(torch.randn_like(e.weight), e.mask.shape) for e in cb.store.items}
    return opt


# -- blocks

tilings = st.tuples(*[st.integers(1, 4)]*4, st.lists(st.integers(1, 3), max_size=2), st.booleans())

@given(tilings, st.integers(0, 9))
@settings(max_examples=60 if 'PARAMFX_SLOW' in os.environ else 60//3, **SLOW)
def test_scores_and_expansion_by_kron_and_by_loops(case, seed):
    a, b, r, c, kernel, last = case
    g = torch.Generator().manual_seed(seed)
    w, units = torch.randn(a*r, b*c, *kernel, generator=g), torch.rand(a, b, *[1]*len(kernel), generator=g) < .5
    if last and w.ndim == 4: w = w.contiguous(memory_format=torch.channels_last)
    assert torch.equal(expand_units(units, w.shape), kron(units, w.shape))
    scores = unit_scores(w, units.shape)
    for i in range(a):
        for j in range(b): assert torch.isclose(scores[i, j].squeeze(), w[i*r:(i+1)*r, j*c:(j+1)*c].abs().mean())


@given(st.tuples(*[st.integers(1, 3)]*4), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 9))
@settings(max_examples=60 if 'PARAMFX_SLOW' in os.environ else 60//3, **SLOW)
def test_fill_touches_the_picked_blocks_and_nothing_else(case, k, conv, last, seed):
    a, b, r, c = case
    m = nn.Conv2d(b*c, a*r, k) if conv else nn.Linear(b*c, a*r)
    e = Masked('m', m, 'weight', torch.ones(a, b, *[1]*(2*conv), dtype=torch.bool))
    idx = torch.randperm(a*b, generator=torch.Generator().manual_seed(seed))[:a*b//2]
    t = m.weight.data.clone(memory_format=torch.channels_last if last and conv else torch.contiguous_format)
    want = torch.where(kron(e.picked(idx), t.shape), 7., t)
    assert e.fill_(t, idx, 7.) is not None and torch.equal(t, want)


BLOCKS = ['1x1', '2x4', '4x2', '1x8', '4x1', '2x2']

@pytest.mark.parametrize('init', ['random', 'magnitude'])
@pytest.mark.parametrize('block', BLOCKS)
def test_masks_are_whole_blocks_and_equal_single_weight_masks(block, init):
    r, c = map(int, block.split('x'))
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3), nn.ConvTranspose2d(8, 4, 2), nn.Conv1d(16, 8, 3, groups=2), nn.Linear(24, 20))
    dense = deepcopy(net)
    report = sparsify(net, .5, granularity=block, init_mask=init)
    store = effects(net)['dynamic_sparse'].holder
    by = {row['layer']: row for row in report if 'live' in row}
    assert len(by) == 4
    for e in store.items:
        w, before = e.weight.detach(), dense.get_submodule(e.layer).weight.detach()
        rr, cc = (c, r) if isinstance(e.module, nn.ConvTranspose2d) else (r, c)
        assert e.mask.shape == (w.shape[0]//rr, w.shape[1]//cc, *[1]*(w.ndim-2)) and e.units == by[e.name]['units']
        assert e.live == int(e.mask.sum()) == int(.5*e.units+.1) == by[e.name]['live']
        full = kron(e.mask, w.shape)
        assert torch.equal(w, before*full) and torch.equal(e.full, full) and torch.equal(e.float.expand_as(w), full.float())
        if init == 'magnitude':
            s = np.abs(before.numpy()).reshape(w.shape[0]//rr, rr, w.shape[1]//cc, cc, -1).mean((1, 3, 4)).ravel()
            m = e.mask.numpy().ravel()
            assert s[m].min() >= s[~m].max()
    single = deepcopy(dense)
    sparsify(single, .5, init_mask=store.masks)
    for a, b in zip(net.parameters(), single.parameters()): assert torch.equal(a, b)


@pytest.mark.parametrize('last', [False, True])
def test_training_equals_that_of_single_weight_masks(last):
    "The same masks by np.kron, static: the same network to the bit, and the same after `materialize`"
    def run(**kw):
        set_seed(0)
        model = conv_net().to(memory_format=torch.channels_last) if last else conv_net()
        learn = Learner(digits_dls(bs=256, device='cpu'), model, lr=1e-2, opt_func=partial(SGD, mom=.9), metrics=accuracy).sparsify(.5, method='static', **kw)
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        return learn
    kw = dict(exclude=['0', '8'])
    blocks = run(granularity='4x4', **kw)
    single = run(init_mask={e.name: kron(e.mask, e.weight.shape) for e in blocks.dynamic_sparse.store.items}, **kw)
    for a, b in zip(blocks.model.parameters(), single.model.parameters()): assert torch.equal(a, b)
    x = blocks.dls.one_batch()[0]
    plain = [materialize(o.model.eval(), x[:8]) for o in (blocks, single)]
    assert torch.equal(plain[0](x), plain[1](x)) and torch.equal(plain[0](x), blocks.model(x)) and not any('mask' in k for k in plain[0].state_dict())
    costs = [cost(o.model, x[:1]) for o in (blocks, single)]
    for k in ('params', 'nonzero', 'macs', 'macs_executed'): assert getattr(costs[0], k) == getattr(costs[1], k), k


cases = st.fixed_dictionaries(dict(sparsity=st.sampled_from([0., .3, .5, .8]),
    method=st.sampled_from(['dsr', 'set', 'rigl']), granularity=st.sampled_from(['2x2', '1x4', '4x1', '4x4']),
    threshold=st.sampled_from([.05, .2, 1e9]), across_layers=st.booleans(),
    grow_init=st.sampled_from(['zero', 'random']), seed=st.integers(0, 3), drop_frac=st.sampled_from([None, .5])))

@given(cases, st.integers(1, 3), st.booleans())
@settings(max_examples=60 if 'PARAMFX_SLOW' in os.environ else 60//3, **SLOW)
def test_rewires_of_blocks_keep_every_promise(kw, k, last):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, k), nn.ConvTranspose2d(8, 8, k, groups=2), nn.Linear(12, 8), nn.Conv2d(8, 4, k, groups=2))
    if last: model = model.to(memory_format=torch.channels_last)
    own = {k: kw[k] for k in METHODS[kw['method']].__dataclass_fields__ if k in kw and kw[k] is not None}
    cb = DynamicSparse(kw['sparsity'], METHODS[kw['method']](**own), kw['granularity'], include='*', seed=kw['seed'])
    try: opt = attached(cb, model)
    except ValueError as e:
        assert 'less than one' in str(e)
        assume(False)
    total, items = cb.store.live, cb.store.items
    for _ in range(3):
        old = [(e.live, kron(e.mask, e.weight.shape), e.weight.detach().clone(), opt.state[e.weight]['grad_avg'].clone()) for e in items]
        cb.rewire(opt)
        assert cb.store.live == total
        for e, (n, m, w, avg) in zip(items, old):
            now, v, state = kron(e.mask, e.weight.shape), e.weight.detach(), opt.state[e.weight]['grad_avg']
            assert e.live == int(e.mask.sum()) > 0 and (kw['method'] == 'dsr' and kw['across_layers'] or e.live == n)
            assert torch.equal(e.full, now) and torch.equal(e.float.expand_as(now), now.float())
            stay, new = m & now, now & ~m
            assert not v[~now].any() and torch.equal(v[stay], w[stay]) and bool(v[new].any()) == (kw['grow_init'] == 'random' and bool(new.any()))
            assert not state[~now].any() and not state[new].any() and torch.equal(state[stay], avg[stay])


@pytest.mark.few(1)
@pytest.mark.parametrize('granularity', ['4x4', '2:4'])
@pytest.mark.parametrize('method', ['dsr', 'set', 'rigl'])
def test_resumed_equals_uninterrupted(tmp_path, method, granularity):
    "Stopped in mid-epoch and taken up by a Learner of other random states: weights, masks and history bit for bit"
    def new(seed, *cbs):
        set_seed(seed)
        learn = Learner(digits_dls(bs=128, device='cpu'), conv_net(), lr=1e-2, path=tmp_path, opt_func=Adam, cbs=[RunState(every=1), *cbs])
        return learn.add_cb(DynamicSparse(.5, method=DSR(threshold=.02) if method == 'dsr' else method, granularity=granularity, period=3, exclude='8'))
    whole, half, rest = new(0), new(0, Stop(18)), new(7)
    with half.no_bar(), half.no_logging(), pytest.raises(KeyboardInterrupt): half.fit_one_cycle(3, 1e-2)
    with rest.no_bar(), rest.no_logging(): rest.resume(); rest.fit_one_cycle(3, 1e-2)
    with whole.no_bar(), whole.no_logging(): whole.fit_one_cycle(3, 1e-2)
    for (n, a), b in zip(whole.model.named_parameters(), rest.model.parameters()): assert torch.equal(a, b), n
    a, b = (o.dynamic_sparse for o in (whole, rest))
    assert a.history == b.history and sum(a.traces['moved']) > 0 and all(torch.equal(a.masks[n], b.masks[n]) for n in a.masks)


def test_a_recipe_rebuilds_blocks(tmp_path):
    model = conv_net()
    sparsify(model, .5, granularity='4x4', exclude='8')
    save_recipe(model, tmp_path/'r.json')
    again = load_recipe(tmp_path/'r.json', conv_net())
    for a, b in zip(*(effects(m)['dynamic_sparse'].holder.items for m in (model, again))):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.float, b.float) and torch.equal(a.weight, b.weight)


def test_pruning_of_blocks_is_exact_and_by_their_means():
    set_seed(0)
    learn = Learner(digits_dls(bs=256, device='cpu'), conv_net(), lr=1e-2)
    learn.add_cb(IterativePrune(.75, n_prunes=3, granularity='4x4', exclude='8'))
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    for e in learn.iterative_prune.store.items:
        assert e.live == int(e.mask.sum()) == max(1, int(.25*e.units+.1))
        assert torch.equal(e.weight != 0, kron(e.mask, e.weight.shape))


def test_a_block_that_does_not_fit_changes_nothing():
    net = conv_net()
    before = {n: p.clone() for n, p in net.named_parameters()}
    for f in (plan_masks, sparsify, lambda m, *a, **k: IterativePrune(*a, **k).convert(m)):
        with pytest.raises(ValueError, match=r"8\.weight: granularity='4x4': blocks of 4 by 4 .*\(10, 20\).*exclude='8'"): f(net, .5, granularity='4x4')
    assert not effects(net) and all(torch.equal(p, before[n]) for n, p in net.named_parameters()) and not any('mask' in n for n, _ in net.named_buffers())


# -- n:m

def per_group(mask, m, transposed):
    "Live weights of each group, by loops: inputs first, then the kernel"
    a = mask.numpy()
    if transposed: a = a.swapaxes(0, 1)
    rows = [[a[(o, i, *k)] for k in np.ndindex(*a.shape[2:]) for i in range(a.shape[1])] for o in range(a.shape[0])]
    return [sum(row[j:j+m]) for row in rows for j in range(0, len(row), m)]


@st.composite
def patterns(draw):
    m = draw(st.integers(2, 6))
    return draw(st.integers(1, m-1)), m

@given(patterns(), st.sampled_from(['linear', 'conv1', 'conv2', 'grouped', 'transposed', 'transposed grouped']), st.integers(1, 3), st.integers(1, 3),
       st.sampled_from(['dsr', 'set', 'rigl']), st.sampled_from(['random', 'magnitude']), st.booleans(),
       st.sampled_from([.1, .5, .95]), st.integers(0, 99), st.booleans())
@settings(max_examples=120 if 'PARAMFX_SLOW' in os.environ else 120//3, **SLOW)
def test_each_group_keeps_its_number(nm, kind, times, k, method, init, across, share, seed, bad):
    n, m = nm
    torch.manual_seed(seed)
    i, o = m*times, 4
    layer = {'linear': lambda: nn.Linear(i, o), 'conv1': lambda: nn.Conv1d(i, o, k),
        'conv2': lambda: nn.Conv2d(i, o, k), 'grouped': lambda: nn.Conv2d(2*i, o, k, groups=2),
             'transposed': lambda: nn.ConvTranspose2d(i, o, k), 'transposed grouped': lambda: nn.ConvTranspose1d(2*i, o, k, groups=2)}[kind]()
    tr = 'transposed' in kind
    how = DSR(across_layers=across, threshold=share/i**.5) if method == 'dsr' else METHODS[method](drop_frac=share)
    cb = DynamicSparse(method=how, granularity=f'{n}:{m}', include='*', init_mask=init, seed=seed)
    opt = attached(cb, nn.Sequential(layer, nn.Linear(2*m, 3)))
    if bad: # not a number, or all alike: the counts hold
        for s in cb.dense.values(): s.view(-1)[::2] = float('nan') if seed%2 else 1.
    moved = 0
    for _ in range(3):
        before = [e.mask.clone() for e in cb.store.items]
        cb.rewire(opt)
        for e, was, t in zip(cb.store.items, before, (tr, False)):
            assert set(per_group(e.mask, m, t)) == {n} and e.live == int(e.mask.sum()) == e.units*n//m
            lost = per_group(was & ~e.mask, m, t)
            assert lost == per_group(e.mask & ~was, m, t) and max(lost) <= min(n, m-n)
            assert not e.weight[~e.mask].any() and not e.weight[e.mask & ~was].any() and torch.equal(e.float.bool(), e.mask)
            moved += sum(lost)
        cb.store.weights_()
        for e in cb.store.items: e.weight.data.add_(torch.randn_like(e.weight)*e.float*.1)
    assert moved or method != 'set' or share < .5 or min(e.live for e in cb.store.items) < 4, 'nothing was tested'


@pytest.mark.parametrize('method', ['set', 'rigl'])
def test_what_goes_and_what_comes_in_a_group(method):
    "By hand: one layer, two groups of each row"
    w = torch.tensor([[.1, .2, 0., 0., .9, 0., .8, 0.], [.7, .6, 0., 0., 0., .3, 0., .4]])
    model = nn.Sequential(nn.Linear(8, 2, bias=False))
    with torch.no_grad(): model[0].weight.copy_(w)
    cb = DynamicSparse(method=METHODS[method](drop_frac=lambda pos: 3/8), granularity='2:4', include='*', init_mask={'0.weight': w != 0})
    cb.__dict__['effect'] = cb.convert(model).attach(model)
    e = cb.store.items[0]
    cb.__dict__['dense'] = {e: torch.tensor([[5., 0., 1., 2., 9., 9., 9., 9.], [0., 0., 0., 0., 1., 2., 4., 9.]])}
    cb.rewire()
    now = e.mask
    if method == 'set': # .1, .2 and .3 go; what comes was empty before
        assert now[0].tolist() == [False, False, True, True, True, False, True, False]
        assert now[1, :4].tolist() == [True, True, False, False] and not now[1, 5] and now[1, 7]
    else: # .1 comes back by its gradient and keeps its value; .2 gives way to the fourth; .3 to the third
        assert now[0].tolist() == [True, False, False, True, True, False, True, False] and e.weight[0, 0] == .1
        assert now[1].tolist() == [True, True, False, False, False, False, True, True]

def test_own_methods_keep_the_pattern_too():
    class Half(Rewirer):
        "Half of the live units, at random places"
        def drop(self, cb, items): return [e.mask.flatten().nonzero().flatten()[1::2] for e in items]
    rewirer('half')(Half)
    try:
        set_seed(0)
        cb = DynamicSparse(method='half', granularity='3:4', include='*')
        opt = attached(cb, nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)))
        for _ in range(3):
            cb.rewire(opt)
            for e in cb.store.items: assert set(per_group(e.mask, 4, False)) == {3}
        assert sum(cb.traces['moved']) > 0
    finally: METHODS.pop('half')


def test_a_file_of_another_pattern_is_refused(tmp_path):
    "2:4 and 4:8 keep as many"
    def new(g):
        learn = Learner(digits_dls(bs=256, device='cpu'), conv_net(), path=tmp_path)
        return learn.add_cb(DynamicSparse(method='set', granularity=g, exclude='8'))
    a, b = new('4:8'), new('2:4')
    a.save('eights')
    with pytest.raises(ValueError, match=r'2\.weight.*(n:m pattern|4:8)'): b.load('eights')
    for e in b.dynamic_sparse.store.items: assert set(per_group(e.mask, 4, False)) == {2}
