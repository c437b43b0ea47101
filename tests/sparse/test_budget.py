"""The budget, to the unit: properties of every function that decides how many units live where, and of whole rewires."""
import os
from math import prod

import pytest
import torch
from fastai.basics import Adam
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from torch import nn

from paramfx.masks.store import density_erk, density_uniform, initial_counts
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.moves import adapt_threshold, allocate_growth, readmit
from paramfx.masks.units import draw_positions, live_units, unit_shape
from paramfx.core.samples import generator
from paramfx.sparse.methods import DSR
from settings import sparse_settings

FEW = settings(max_examples=60 if 'PARAMFX_SLOW' in os.environ else 60//3, deadline=None, suppress_health_check=list(HealthCheck))
counts = st.integers(0, 400)


@st.composite
def layers(draw):
    "Units dropped, left and free of some layers, as a rewire finds them"
    n = draw(st.integers(1, 6))
    pruned = [draw(counts) for _ in range(n)]
    remaining = [draw(st.integers(1, 400)) for _ in range(n)]  # no layer is ever empty
    return pruned, remaining, [draw(st.integers(0, 600)) for _ in range(n)]


@given(layers())
@FEW
def test_growth_is_exact_and_fits(case):
    pruned, remaining, free = case
    grow = allocate_growth(pruned, remaining, free)
    assert sum(grow) == min(sum(pruned), sum(free))
    assert all(isinstance(g, int) and 0 <= g <= f for g, f in zip(grow, free))


@given(layers())
@FEW
def test_growth_follows_the_quota_where_nothing_is_full(case):
    pruned, remaining, _ = case
    k = sum(pruned)
    free = [k+1]*len(pruned)
    for g, r in zip(allocate_growth(pruned, remaining, free), remaining): assert abs(g-k*r/sum(remaining)) < 1


@given(layers())
@FEW
def test_growth_never_turns_the_order_round(case):
    "Of two layers with room to spare, the one with more left gets no less"
    pruned, remaining, _ = case
    grow = allocate_growth(pruned, remaining, [sum(pruned)+1]*len(pruned))
    for i in range(len(grow)):
        for j in range(len(grow)):
            if remaining[i] > remaining[j]: assert grow[i] >= grow[j]


@given(layers())
@FEW
def test_growth_when_all_that_is_left_is_nothing(case):
    "Layers without a unit left still take what has nowhere else to go"
    pruned, remaining, free = case
    grow = allocate_growth(pruned, [0]*len(remaining), free)
    assert sum(grow) == min(sum(pruned), sum(free))


@given(st.integers(1, 300), st.data())
@FEW
def test_drawn_positions_are_new_and_unique(size, data):
    taken = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    before, room = taken.clone(), int((~taken).sum())
    n = data.draw(st.integers(0, room))
    idx = draw_positions(taken, n, generator(0, size, n), data.draw(st.sampled_from([None, int(before.sum())])))
    assert len(idx) == n == len(set(idx.tolist()))
    assert not before[idx].any() and taken[idx].all()
    assert int(taken.sum()) == int(before.sum())+n
    with pytest.raises(ValueError, match='free'): draw_positions(taken, room-n+1, generator(0))


def test_drawn_positions_are_uniform():
    "Both ways of drawing: by trial, and from a list of what is free"
    for fill, n in ((0, 3), (8, 2)):
        hits = torch.zeros(10)
        for i in range(3000):
            taken = torch.zeros(10, dtype=torch.bool)
            taken[:fill] = True
            hits[draw_positions(taken, n, generator(1, i))] += 1
        free = hits[fill:]
        assert not hits[:fill].any()
        assert (free/free.sum()-1/len(free)).abs().max() < .02


shapes = st.lists(st.one_of(st.tuples(st.integers(1, 40), st.integers(1, 40)),
                            st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(1, 5))), min_size=1, max_size=6)

@given(shapes, st.floats(0, .999))
@FEW
def test_erk_densities_keep_the_budget(shapes, sparsity):
    d = density_erk(shapes, sparsity)
    sizes = [prod(s) for s in shapes]
    assert all(0 <= x <= 1 for x in d)
    total = sum(n-int(sparsity*n) for n in sizes)  # zeros are rounded down in each layer
    assert abs(sum(x*n for x, n in zip(d, sizes))-total) < 1e-6*sum(sizes)
    raw = [sum(s)/n for s, n in zip(shapes, sizes)]
    open_ = [(r, x) for r, x in zip(raw, d) if x < 1]
    for r, x in open_: assert abs(x*open_[0][0]-open_[0][1]*r) < 1e-6  # in proportion to raw where not full
    assert density_uniform(shapes, sparsity) == [1-sparsity]*len(shapes)


@given(st.floats(1e-9, 10), st.integers(0, 1000), st.floats(1, 1000), st.floats(.01, .9))
@FEW
def test_threshold_moves_towards_the_target(t, n, target, tol):
    new = adapt_threshold(t, n, target, tol)
    assert new == (t/2 if n > target*(1+tol) else 2*t if n < target*(1-tol) else t)
    assert adapt_threshold(t, target, target, tol) == t
    for edge in (target*(1+tol), target*(1-tol)): assert adapt_threshold(t, edge, target, tol) == t


@given(shapes, st.floats(0, .99), st.sampled_from(['weight', 'row', 'kernel', 'filter']))
@FEW
def test_initial_counts(shapes, sparsity, granularity):
    for s, n in zip(shapes, initial_counts(shapes, sparsity, granularity)):
        units = prod(unit_shape(s, granularity))
        assert n == live_units(units, sparsity) and 0 <= n <= units
        assert abs(n-(1-sparsity)*units) < 1
        assert initial_counts([s], 0., granularity) == [units]


# whole rewires ---------------------------------------------------------------------------------------------------------------

def net(widths, kernel, groups):
    "Two convolutions, one of them transposed, and two matrices"
    a, b, c = widths
    return nn.Sequential(nn.Conv2d(a, b, kernel), nn.ConvTranspose2d(b, b, kernel, groups=groups if b%groups == 0 else 1), nn.Linear(b, c),
        nn.Linear(c, a))


def attached(cb, model):
    "`cb` on `model`, with an optimizer that has state everywhere, and no Learner"
    cb.__dict__['effect'] = cb.convert(model).attach(model)
    cb.effect.values['threshold'] = cb.method.threshold
    opt = Adam(list(model.parameters()), lr=0.)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    return opt


cases = st.fixed_dictionaries(dict(
    widths=st.tuples(*[st.integers(1, 9)]*3), kernel=st.integers(1, 3), groups=st.integers(1, 2),
    sparsity=st.one_of(st.sampled_from([0., .01, .02, .5, .9]),
        st.floats(0, .95)), granularity=st.sampled_from(['weight', 'row', 'kernel', 'filter']),
    threshold=st.sampled_from([1e-9, .05, .2, 1e9]), across_layers=st.booleans(), grow_init=st.sampled_from(['zero', 'random']), seed=st.integers(0,
        3),
    n_realloc=st.sampled_from([.1, .9, 1])))

@given(cases)
@settings(max_examples=80 if 'PARAMFX_SLOW' in os.environ else 80//3, deadline=None, suppress_health_check=list(HealthCheck))
def test_rewires_keep_every_promise(case):
    widths, kernel, groups, kw = case.pop('widths'), case.pop('kernel'), case.pop('groups'), case
    torch.manual_seed(0)
    model = net(widths, kernel, groups)
    cb = DynamicSparse(include='*', **sparse_settings(**kw))
    try: opt = attached(cb, model)
    except ValueError as e:  # a budget below one unit is refused, never rounded
        assert 'less than one' in str(e)
        assume(False)
    total, items = cb.store.live, cb.store.items
    for _ in range(3):
        live = [e.live for e in items]
        before, weights, state = [e.mask.clone() for e in items], [e.weight.detach().clone() for e in items], [opt.state[e.weight]['grad_avg'].clone()
            for e in items]
        cb.rewire(opt)
        assert cb.store.live == total
        last = cb.history[-1]
        for e, m, w, s, n in zip(items, before, weights, state, live):
            assert e.live == int(e.mask.sum()) > 0, 'a layer is empty'
            gone, come = m & ~e.mask, e.mask & ~m
            # what is grown was not live before: so it is none of what was dropped, either
            assert (int(gone.sum()), int(come.sum())) == (last['dropped'][e.name], last['grown'][e.name])
            if not kw['across_layers']: assert e.live == n
            full, new, avg = e.full, come.expand_as(w), opt.state[e.weight]['grad_avg']
            assert not e.weight[~full].any()
            assert torch.equal(e.float, e.mask.float())
            assert torch.equal(e.weight[full & ~new], w[full & ~new]), 'a weight that stays has changed'
            if kw['grow_init'] == 'zero': assert not e.weight[new].any()
            assert not avg[new].any() and not avg[gone.expand_as(w)].any(), 'state of a moved unit'
            stay = m.expand_as(w) & full
            assert torch.equal(avg[stay], s[stay]), 'state of a unit that stays has changed'


@given(st.lists(st.tuples(st.integers(2, 60), st.integers(0, 3)), min_size=1, max_size=4), st.integers(0, 5))
@FEW
def test_readmission_keeps_the_budget_of_full_layers(sizes, seed):
    "Nearly full layers: only as many may go as can come, and the largest of those stay"
    torch.manual_seed(seed)
    model = nn.Sequential(*[nn.Linear(n, 1) for n, _ in sizes])
    masks = {f'{i}.weight': torch.arange(n).view(1, -1) >= min(gap, n-1) for i, (n, gap) in enumerate(sizes)}
    cb = DynamicSparse(init_mask=masks)
    attached(cb, model)
    items, total = cb.store.items, cb.store.live
    dropped = [e.mask.flatten().nonzero().flatten()[1:] for e in items]
    grow = allocate_growth([len(d) for d in dropped], [e.live-len(d) for e, d in zip(items, dropped)], [e.units-e.live for e in items])
    kept = readmit(items, dropped, grow)
    assert sum(map(len, kept)) == sum(grow)
    for e, d, k in zip(items, dropped, kept):
        assert set(k.tolist()) <= set(d.tolist())
        back = sorted(set(d.tolist())-set(k.tolist()))
        score = e.weight.detach().abs().flatten()
        if len(back) and len(k): assert score[back].min() >= score[k].max()
    cb.effect.values['threshold'] = 1e9
    cb.rewire()
    assert cb.store.live == total and all(e.live > 0 for e in items)


def test_the_same_seed_rewires_alike_and_another_does_not():
    def masks(seed, elsewhere):
        torch.manual_seed(0)
        model = net((4, 8, 8), 3, 1)
        cb = DynamicSparse(.5, seed=seed, method=DSR(threshold=.05))
        opt = attached(cb, model)
        torch.manual_seed(elsewhere)  # the global random state plays no part
        for _ in range(3): cb.rewire(opt)
        return cb.masks
    a, b, c = masks(1, 8), masks(1, 9), masks(2, 8)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_one_unit_layers_never_die():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 40), nn.Linear(40, 1))
    cb = DynamicSparse({'0': 0., '1': .5, '2': .9}, method=DSR(threshold=1e9))
    opt = attached(cb, model)
    for _ in range(5):
        cb.effect.values['threshold'] = 1e9
        cb.rewire(opt)
        assert cb.store.live == 25 and cb.store.items[0].live == 1 and min(e.live for e in cb.store.items) > 0
