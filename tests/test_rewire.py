"When and what `DynamicSparse` rewires: periods, stops, units moved, frozen layers"
import warnings

import pytest
import torch
from fastai.basics import L, Learner, SGD, accuracy, params, set_seed
from fastai.callback.schedule import SchedLin
from torch import nn

from paramfx.data import digits_dls
from paramfx.rewire import DynamicSparse, drop_threshold, threshold_for, unit_values
from paramfx.sparse import sparsify
from paramfx.state import effects


def net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture(scope='module')
def dls(): return digits_dls(bs=128, device='cpu')  # 12 batches an epoch


def fit(dls, epochs=2, **kw):
    set_seed(0)
    learn = Learner(dls, net(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2, cbs=DynamicSparse(**{'sparsity': .8, **kw}))
    return learn.dynamic_sparse


def steps(sp): return [h['step'] for h in sp.history]


def test_default_period_is_a_fifth_of_an_epoch_and_stops_at_90_percent(dls):
    n = len(dls.train)
    sp = fit(dls, 2)
    assert steps(sp) == [i for i in range(1, 2*n) if i % (n//5) == 0 and i/(2*n) < .9]


def test_period_1_rewires_after_every_batch_but_the_first(dls):
    assert steps(fit(dls, 1, period=1, stop_pct=1.)) == list(range(1, len(dls.train)))


def test_period_table_and_stop_epoch(dls):
    n = len(dls.train)
    sp = fit(dls, 3, period={0: 3, 1: 5}, stop_epoch=2, stop_pct=1.)
    assert steps(sp) == [i for i in range(1, 2*n) if i % (3 if i < n else 5) == 0]


def test_period_as_a_schedule_of_the_position(dls):
    n = len(dls.train)
    sp = fit(dls, 1, period=SchedLin(2, 6), stop_pct=1.)
    assert steps(sp) == [i for i in range(1, n) if i % max(1, int(2+4*i/n)) == 0]


def test_steps_count_over_all_fits(dls):
    set_seed(0)
    learn = Learner(dls, net()).sparsify(.8, period=10, stop_pct=1.)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2); learn.fit(1, 1e-2)
    assert steps(learn.dynamic_sparse) == [i for i in range(1, 2*len(dls.train)) if i % 10 == 0]


def test_span_total_stops_at_90_percent_of_all_epochs(dls):
    set_seed(0)
    n = len(dls.train)
    learn = Learner(dls, net()).sparsify(.8, period=1, span='total', epochs=4)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2); learn.fit(2, 1e-2)
    assert steps(learn.dynamic_sparse) == [i for i in range(1, 4*n) if i/(4*n) < .9]


def test_units_stay_in_their_layer_without_across_layers(dls):
    sp = fit(dls, 2, across_layers=False, threshold=.05)
    assert any(sum(h['dropped'].values()) for h in sp.history)
    for h in sp.history: assert h['dropped'] == h['grown'] and set(h['sparsity'].values()) == set(sp.history[0]['sparsity'].values())


def test_number_of_moved_units_settles_at_its_target(dls):
    sp = fit(dls, 8, n_realloc=40, period=2, threshold=.01)
    moved = sp.traces['moved'][10:]
    assert 20 <= sorted(moved)[len(moved)//2] <= 80


def test_grow_random_gives_weights_and_grow_zero_does_not(dls):
    for how, live_zero in (('zero', True), ('random', False)):
        set_seed(0)
        model = net()
        cb = DynamicSparse(.8, grow_init=how, threshold=.05)
        cb.__dict__['effect'] = cb.convert(model).attach(model)
        cb.effect.values['threshold'] = .05
        before = cb.masks
        cb.rewire()
        new = [(m & ~before[n]) for n, m in cb.masks.items()]
        grown = torch.cat([dict(model.named_parameters())[n][g] for (n, _), g in zip(cb.masks.items(), new)])
        assert len(grown) and bool((grown == 0).all()) == live_zero
        if how == 'random': assert (grown != 0).all() and .5 < grown[:].std()/64**-.5 < 3


def splitter(m): return L(params(m[:4]), params(m[4:]))


def test_frozen_layers_keep_their_masks(dls):
    learn = Learner(dls, net(), splitter=splitter, opt_func=SGD)
    learn.freeze()
    with pytest.warns(UserWarning, match='masked at random'): learn.sparsify(.8, period=1)
    before = learn.dynamic_sparse.masks
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert {n for h in learn.dynamic_sparse.history for n in h['grown']} == {'5.weight'}
    for n in ('1.weight', '3.weight'): assert torch.equal(before[n], learn.dynamic_sparse.masks[n])


def test_threshold_is_searched_anew_when_layers_are_unfrozen(dls):
    "A threshold found for the head must not empty the body at once"
    set_seed(0)
    learn = Learner(dls, net(), splitter=splitter)
    learn.freeze()
    learn.sparsify(.5, period=1, stop_pct=1., init_mask='magnitude')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    learn.dynamic_sparse.effect.values['threshold'] = 1.  # above every weight of the body
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
    first = learn.dynamic_sparse.history[len(dls.train)-1]
    live = learn.dynamic_sparse.store.live
    assert set(first['dropped']) == {'1.weight', '3.weight', '5.weight'}
    assert sum(first['dropped'].values()) <= round(.1*live) and first['threshold'] < 1.


def test_threshold_for_drops_just_the_target():
    set_seed(0)
    model = net()
    sparsify(model, .5)
    items = effects(model)['dynamic_sparse'].holder.items
    h = threshold_for(items, 100)
    assert sum(len(drop_threshold(unit_values(e), e.mask, h)) for e in items) == 100


def test_a_fit_without_a_rewire_warns_and_one_with_does_not(dls):
    with pytest.warns(UserWarning, match='without one rewire'): fit(dls, 1, period=1000)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*rewire.*')
        fit(dls, 1)
        fit(dls, 1, method='static')


def test_other_seed_other_masks_same_seed_same_masks():
    def run(seed):
        set_seed(0)  # the loader's own generator is seeded when it is made
        return fit(digits_dls(bs=128, device='cpu'), 1, seed=seed).masks
    a, b, c = map(run, (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


def test_slow_weights_of_lookahead_follow_the_masks(dls):
    "Else a unit that grows again would be pulled towards the value it had before it was dropped"
    from fastai.optimizer import ranger
    set_seed(0)
    learn = Learner(dls, net(), opt_func=ranger).sparsify(.8, period=2, threshold=.05)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    slow = {id(p): s for ps, ss in zip(learn.opt.param_lists, learn.opt.slow_weights) for p, s in zip(ps, ss)}
    learn.dynamic_sparse.rewire(learn.opt)
    for e in learn.dynamic_sparse.store.items: assert (slow[id(e.weight)][~e.full] == 0).all(), e.name


@pytest.mark.parametrize('period', [0, {0: 5, 2: 0}, SchedLin(3, 0)])
def test_a_period_below_one_step_is_refused(period):
    with pytest.raises(ValueError, match='period='): DynamicSparse(period=period)
