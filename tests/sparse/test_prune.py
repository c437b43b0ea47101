"""Iterative pruning: counts by integers, by second routes, and what a run, a file or a fit too short must not do to them."""
import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Adam
import fastai.callback.schedule # brings `fine_tune` and `lr_find`  # noqa: F401
from fastai.callback.training import ShortEpochCallback
from torch import nn

from contracts import METHODS, N_STEPS, Probe, build, same, seed_all, small_net, snapshot, tiny_dls, two_groups
from paramfx.masks.store import Masked, initial_counts
from paramfx.export.materialize import load_recipe, save_recipe
from paramfx.sparse.prune import CRITERIA, SCHEDULES, IterativePrune, prune_counts, prune_fractions
from paramfx.sparse.moves import keep_global
from paramfx.sparse.callback import DynamicSparse
from paramfx.core.state import effects
from paramfx.core.clock import AllFits

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning')


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path)


def live(learn): return {e.name: e.live for e in learn.iterative_prune.store.items}
def big(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))


# -- counts

@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('n', [1, 2, 3, 7, 20, 100])
@pytest.mark.parametrize('s', [0., .1, .5, .9, .98, .999])
def test_counts(schedule, n, s):
    for units in (1, 2, 3, 10, 99, 1000, 12345, 10**6):
        c = prune_counts(units, s, n, schedule)
        assert len(c) == n+1 and c[0] == units and all(isinstance(k, int) for k in c)
        assert all(a >= b >= 1 for a, b in zip(c, c[1:]))
        assert c[-1] == max(1, initial_counts([(units, 1)], s)[0])
        left = np.cumprod([1.]+[1-f for f in prune_fractions(s, n, schedule)])*units  # by the fractions, one after the other
        assert all(abs(k-x) <= 1 for k, x in zip(c, left) if x >= 1)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_counts_from_a_sparse_start(schedule):
    for units, start, s in ((1000, 400, .9), (1000, 100, .9), (12345, 12344, .5), (50, 7, .95)):
        c = prune_counts(units, s, 5, schedule, start)
        assert c[0] == start and c[-1] == max(1, int((1-s)*units+.1)) and all(a >= b for a, b in zip(c, c[1:]))
    assert prune_counts(1000, .9, 5, schedule, 1000) == prune_counts(1000, .9, 5, schedule)
    assert prune_counts(1000, .9, 4, schedule, 100) == [100]*5


def test_zhu_gupta_begins_where_the_network_is():
    "Their formula has an initial sparsity: s_f + (s_i - s_f)(1 - k/n)^3"
    units, start, s, n = 10**6, 600_000, .9, 8
    formula = [1-(s+(.4-s)*(1-k/n)**3) for k in range(n+1)]
    assert np.abs(np.array(prune_counts(units, s, n, 'cubic', start))-np.array(formula)*units).max() <= 1


# -- which

def masks_of(*ws):
    items = []
    for i, w in enumerate(ws):
        m = nn.Linear(w.shape[1], w.shape[0], bias=False)
        m.weight.data = w.clone()
        items.append(Masked(f'l{i}', m, 'weight', torch.ones(w.shape, dtype=torch.bool)))
    return items


def test_global_is_one_threshold():
    gen = torch.Generator().manual_seed(0)
    items = masks_of(*[torch.randn(a, b, generator=gen)*s for a, b, s in ((20, 30, 1), (10, 20, .1), (5, 10, 3))])
    keep = keep_global(items, [60, 20, 5])
    assert sum(int(k.sum()) for k in keep) == 85
    ws = torch.cat([e.weight.detach().abs().flatten() for e in items])
    cut = ws.sort(descending=True).values[84]
    got = [e.weight.detach().abs() >= cut for e in items]
    assert not got[1].any() and keep[1].sum() == 1  # below the threshold with all it has: its largest stays
    assert items[1].weight.abs().flatten()[keep[1].flatten()] == items[1].weight.abs().max()
    for i in (0, 2): assert (got[i] ^ keep[i]).sum() <= 1


@pytest.mark.parametrize('how', CRITERIA)
def test_what_is_dead_stays_dead(how):
    items = masks_of(torch.rand(8, 9)+1, torch.rand(7, 9)+1)
    for e in items:
        e.mask.view(-1)[::2] = False
        e.refresh()
    before = [e.mask.clone() for e in items]
    for goals in ([20, 20], [99, 99], [1, 1], [3, 30]):  # also more than is live
        keep = CRITERIA[how](items, goals)
        assert all(not (k & ~b).any() and k.any() for k, b in zip(keep, before))
        assert sum(int(k.sum()) for k in keep) <= sum(goals)


# -- the run

@pytest.mark.parametrize('granularity', ['weight', 'row', 'kernel', 'filter', '2x1'])
def test_one_prune_is_the_magnitude_mask(mk, granularity):
    learn = mk()
    learn.fit(1)
    ws = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    kw = dict(target={'conv': .5, 'fc': .9}, granularity=granularity, include='*')
    other = DynamicSparse(kw['target'], method='static', granularity=granularity, include='*', init_mask='magnitude').convert(deepcopy(learn.model))
    learn.prune(**kw)
    learn.iterative_prune.prune(learn.opt)
    assert not same(learn.iterative_prune.masks, other.holder.masks)
    for n, m in learn.iterative_prune.masks.items(): assert torch.equal(learn.model.get_parameter(n), ws[n]*m)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_epochs_and_counts_of_a_run(mk, schedule):
    learn = mk(model=big, dls=lambda: tiny_dls(n=64))
    cb = IterativePrune(.93, n_prunes=3, schedule=schedule, start=1, every=2, post=2)
    assert cb.run_length == 7
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='IterativePrune')
        learn.fit(cb.run_length, cbs=cb)
    assert [h['epoch'] for h in cb.history] == [1, 3, 5] == cb.traces['epoch']
    for i, (n, units) in enumerate((('1.weight', 2560), ('3.weight', 1200), ('5.weight', 300))):
        d = [(1-.93)**(k/3) if schedule == 'exponential' else .07+.93*(1-k/3)**3 for k in (1, 2, 3)]
        counts = [int(x*units+.1) for x in d]
        assert [round((1-h['sparsity'][n])*units) for h in cb.history] == counts
        assert np.cumsum([h['dropped'][n] for h in cb.history]).tolist() == [units-c for c in counts]
        assert live(learn)[n] == counts[-1] == int(learn.model.get_parameter(n).count_nonzero())
    cols = {c: [v[i+1] for v in learn.recorder.values] for i, c in ((2, 'density'), (3, 'pruned'))}
    assert learn.recorder.metric_names[4:6] == ['density', 'pruned']
    assert [v > 0 for v in cols['pruned']] == [False, True, False, True, False, True, False]
    assert abs(cols['density'][-1]-sum(live(learn).values())/4060) < 1e-9 and cols['density'][0] == 1


def test_the_prune_comes_before_the_validation(mk):
    learn = mk(IterativePrune(.99, include='1'), opt_func=SGD, lr=0.)
    learn.fit(1)
    logged = learn.recorder.values[-1][1]
    assert learn.validate()[0] == logged


def test_dropped_weights_lose_their_momentum(mk):
    learn = mk(IterativePrune(.8, n_prunes=2), opt_func=Adam)
    learn.fit(1)
    for n, m in learn.iterative_prune.masks.items():
        state = learn.opt.state[learn.model.get_parameter(n)]
        for k in ('grad_avg', 'sqr_avg'): assert not state[k][~m].any() and state[k][m].any()
    kept = mk(IterativePrune(.8, n_prunes=2, state='keep'), opt_func=Adam)
    kept.fit(1)
    assert any(kept.opt.state[kept.model.get_parameter(n)]['grad_avg'][~m].any() for n, m in kept.iterative_prune.masks.items())
    for n, m in kept.iterative_prune.masks.items(): assert not kept.model.get_parameter(n)[~m].any()


def test_until_the_first_prune_it_is_plain_training(mk):
    a, b = mk(), mk(IterativePrune(.9, start=2))
    for learn in (a, b): learn.fit(2)
    state = snapshot(a.model)
    assert not same({k: v for k, v in snapshot(b.model).items() if k in state}, state)


def test_global_over_layers(mk):
    a, b = (mk(IterativePrune(.9, n_prunes=3, criterion=c), model=big) for c in CRITERIA)
    for learn in (a, b): learn.fit(4)
    assert sum(live(a).values()) == sum(live(b).values()) == sum(initial_counts([(40, 64), (30, 40), (10, 30)], .9))
    assert live(a) != live(b) and min(live(b).values()) > 0
    b.save('g')
    c = mk(IterativePrune(.9, n_prunes=3, criterion='global'), model=big, seed=4).load('g')
    assert live(c) == live(b)


def test_frozen_layers_go_through_all_of_their_prunes(mk):
    learn = mk(IterativePrune(.9, n_prunes=3), splitter=two_groups)
    learn.fine_tune(3, freeze_epochs=2)
    h = learn.iterative_prune.history
    assert ['0.3.weight' in o['dropped'] for o in h] == [False, False, True, True, True]
    assert ['1.2.weight' in o['dropped'] for o in h] == [True, True, True, False, False]
    assert list(live(learn).values()) == initial_counts([(12, 8, 3, 3), (10, 192)], .9)


def test_epochs_over_several_fits(mk):
    a, b = mk(IterativePrune(.9, n_prunes=3, start=1, every=2, span=AllFits(6))), mk(IterativePrune(.9, n_prunes=3, start=1, every=2))
    for _ in range(2): a.fit(3)
    b.fit(6)
    assert [h['step'] for h in a.iterative_prune.history] == [h['step'] for h in b.iterative_prune.history] == [2*N_STEPS-1, 4*N_STEPS-1, 6*N_STEPS-1]
    assert live(a) == live(b)


def test_a_shortened_epoch_ends_with_its_prune(mk):
    learn = mk(IterativePrune(.9, n_prunes=2))
    learn.fit(2, cbs=ShortEpochCallback(pct=.5))
    assert len(learn.iterative_prune.history) == 2


# -- files

def test_saved_between_prunes(mk):
    new = lambda seed=0: mk([IterativePrune(.9, n_prunes=4, span=AllFits(6)), Probe(METHODS['prune'])], seed=seed)
    a = new()
    a.fit(2)
    a.save('two')
    b = new(9).load('two')
    assert live(b) == live(a) and b.iterative_prune.effect.values == a.iterative_prune.effect.values
    for learn in (a, b):
        seed_all(4); learn.dls.train.rng.seed(4)
        learn.fit(4)
    assert not same(snapshot(b.model), snapshot(a.model))
    assert list(live(b).values()) == initial_counts([(12, 8, 3, 3), (10, 192)], .9)
    b.load('two', with_opt=True)  # back again: the later prunes are no longer its history
    assert len(b.iterative_prune.history) == 0 and len(a.load('two').iterative_prune.history) == 2


@pytest.mark.parametrize('kw', [dict(target=.8), dict(target=.9, schedule='cubic'), dict(n_prunes=3)])
def test_file_of_another_schedule_is_refused(mk, kw):
    a, b = mk(IterativePrune(**{**dict(target=.9, n_prunes=4), **kw})), mk(IterativePrune(.9, n_prunes=4), seed=2)
    a.fit(1)
    a.save('x')
    state = snapshot(b.model)
    with pytest.raises(ValueError, match=r"0\.3\.weight: the file's mask keeps \d+ of 864 units"): b.load('x')
    assert not same(snapshot(b.model), state)


def test_file_with_masks_for_other_layers_names_them(mk):
    a, b = mk(IterativePrune(.8, include='1')), mk(IterativePrune(.8))
    a.save('fewer')
    with pytest.raises(ValueError, match='0.3.weight: the file holds masks, but none for this parameter'): b.load('fewer')


def test_going_on_from_the_zeros_of_a_pruned_network(mk):
    learn = mk(IterativePrune(.8))
    learn.fit(1)
    masks = learn.iterative_prune.masks
    learn.release()
    with pytest.raises(ValueError, match=r'0\.3\.weight: target sparsity=0.5 is below the current 0.8\d* \(172 of 864 units live\).*exclude'):
        learn.prune(.5, init_mask='current')
    assert not effects(learn.model)
    cb = IterativePrune(.95, n_prunes=3, init_mask='current')
    learn.add_cb(cb)
    assert not same(cb.masks, masks)
    learn.fit(1)
    learn.save('on')
    assert live(learn)['0.3.weight'] == int(172*(.05*864/172)**(1/3)+.1) == 108
    other = mk(IterativePrune(.95, n_prunes=3, init_mask='current'), seed=3).load('on')
    for l in (learn, other): l.fit(1)
    assert live(other)['0.3.weight'] == live(learn)['0.3.weight'] == int(172*(.05*864/172)**(2/3)+.1)  # on the way from 172, not from 864
    for l in (learn, other): l.fit(1)
    assert live(other) == live(learn) == {'0.3.weight': 43, '1.2.weight': 96}
    given = mk(IterativePrune(.95, init_mask={'0.3.weight': masks['0.3.weight']}))
    assert live(given) == {'0.3.weight': 172, '1.2.weight': 1920}


def test_recipe(mk, tmp_path):
    learn = mk(IterativePrune({'conv': .5, 'fc': .9}, n_prunes=3))
    learn.fit(2)
    net = load_recipe(save_recipe(learn.model, tmp_path/'r.pth'), small_net())
    assert not same(snapshot(net), snapshot(learn.model))
    again = mk(IterativePrune({'conv': .5, 'fc': .9}, n_prunes=3), model=net)
    again.fit(1)
    assert list(live(again).values()) == [432, 192]


# -- looking, warning, refusing

@pytest.mark.parametrize('criterion', CRITERIA)
def test_plan_shows_the_end(mk, criterion):
    learn = mk(model=big)
    state = snapshot(learn.model)
    plan = learn.plan('prune', target=.9, n_prunes=5, criterion=criterion)
    ends = sum(initial_counts([(40, 64), (30, 40), (10, 30)], .9))
    assert plan.note.startswith(f'4,060 -> {ends} of 4,060 units live in 5 prunes')
    assert plan.before.nonzero == 4060+80 and plan.after.nonzero == ends+80
    assert not same(snapshot(learn.model), state) and not effects(learn.model)
    assert learn.prune(.9, n_prunes=5, criterion=criterion) is learn
    assert live(learn) == {'1.weight': 2560, '3.weight': 1200, '5.weight': 300}


def test_a_fit_too_short_warns_before_it_begins(mk):
    def seen(f):
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            f()
        return [str(o.message) for o in w if 'IterativePrune' in str(o.message)]
    learn = mk(IterativePrune(.9, n_prunes=3, every=2), splitter=two_groups)
    w, = seen(lambda: learn.fit(2))
    assert '2 epochs have room for 1 of 3 prunes' in w and 'Train 5 or more' in w
    w, = seen(lambda: learn.fit(1))  # one is done: two to come
    assert '1 epochs have room for 1 of 2 prunes' in w
    assert seen(lambda: learn.fit(1)) == [] == seen(lambda: learn.fit(1))  # the last one; none to come
    tune = mk(IterativePrune(.9, n_prunes=3), splitter=two_groups)
    assert seen(lambda: tune.fine_tune(3)) == []  # the frozen epoch is not the whole story
    total = mk(IterativePrune(.9, n_prunes=3, span=AllFits(3)))
    assert [seen(lambda: total.fit(1)) for _ in range(3)] == [[]]*3
    assert seen(lambda: mk(IterativePrune(.9)).lr_find(num_it=4, show_plot=False)) == []


@pytest.mark.parametrize('kw, words', [
    (dict(target=1.), 'target=1.0: give the share'), (dict(target={'conv': -.1}), 'conv=-0.1: give the share'), (dict(target='.9'), "target='.9'"),
    (dict(n_prunes=0), 'n_prunes=0: give a whole number, at least 1'), (dict(n_prunes=2.5), 'n_prunes=2.5'), (dict(n_prunes=True), 'n_prunes=True'),
    (dict(start=-1), 'start=-1: give a whole number, at least 0'), (dict(every=0), 'every=0'), (dict(post=-1), 'post=-1'),
    (dict(schedule='linear'), "schedule='linear': choose one of exponential, cubic"), (dict(criterion='both'),
        "criterion='both': choose one of local, global"),
    (dict(granularity='2:4'), 'no steps in between'), (dict(granularity='pixel'), "granularity='pixel'"), (dict(init_mask='random'),
        "init_mask='random': choose"),
    (dict(state='lose'), "state='lose'"), (dict(regularizer=1e-4), 'regularizer=0.0001'), (dict(span='total'), 'AllFits')])
def test_bad_settings(kw, words):
    with pytest.raises(ValueError) as e: IterativePrune(**kw)
    assert words in str(e.value) and '\n' not in str(e.value)


def test_what_a_network_cannot_do_is_refused_untouched(mk):
    learn = mk()
    state = snapshot(learn.model)
    for kw, words in ((dict(target=.9999), '0.3.weight: sparsity 0.9999 leaves'), (dict(target={'conv9': .5}), 'conv9'),
                      (dict(init_mask={'9.weight': torch.ones(2) > 0}), "no pruned parameter is called '9.weight'"),
                      (dict(init_mask={'0.3.weight': torch.ones(2) > 0}), '0.3.weight: mask of shape'),
                      (dict(init_mask={'0.3.weight': torch.zeros(12, 8, 3, 3) > 0}), '0.3.weight: target')):
        with pytest.raises(ValueError, match=words): learn.prune(**kw)
    assert not same(snapshot(learn.model), state)
    learn.sparsify(.5)
    with pytest.raises(ValueError, match='has a `weight_mask` already'): learn.prune(.9)
    assert list(effects(learn.model)) == ['dynamic_sparse']


def test_numbers_of_numpy_are_numbers(mk):
    learn = mk(IterativePrune(np.float64(.9), n_prunes=np.int64(2)))
    learn.fit(2)
    assert live(learn)['1.2.weight'] == 192


def test_the_rule_of_the_published_mlp():
    "Its last layer gets .9, the others absorb the rest: by targets of their own"
    net = nn.Sequential(nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10))
    for s, resolved in ((.99, .9903393665158371), (.98, .9803016591251885)):
        rest = (s*266_200-900)/265_200
        assert abs(rest-resolved) < 1e-12
        rows = [r for r in IterativePrune({'fc': rest, '2': .9}, n_prunes=10).plan(net) if 'live' in r]
        assert [r['live'] for r in rows] == [int((1-rest)*235_200+.1), int((1-rest)*30_000+.1), 100]
        assert 0 <= (1-s)*266_200-sum(r['live'] for r in rows) < 2
