"When and what `DynamicSparse` rewires: periods, stops, units moved, frozen layers"
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fastai.basics import (Callback, CancelFitException, CrossEntropyLossFlat, L, Learner, OptimWrapper, RMSProp, SGD, accuracy, load_learner, params,
    set_seed)
from fastai.callback.schedule import SchedLin
from torch import nn

from contracts import quiet, seed_all
from paramfx.core.clock import SchedConst, SchedSteps
from paramfx.data.memory import digits_dls, tensor_dls
import paramfx.report.plan # gives Learner plan  # noqa: F401
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.methods import METHODS, Rewirer
from paramfx.sparse.moves import drop_threshold, threshold_for, unit_values
from paramfx.sparse.sparsify import sparsify
from paramfx.core.state import effects
from paramfx.sparse.methods import DSR, SET, DeepR, GraNet, RigL, Static
from paramfx.sparse.penalties import L1
from paramfx.core.clock import AllFits
from settings import sparse_settings
from paramfx.sparse.plots import MaskRecorder


def net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture(scope='module')
def dls(): return digits_dls(bs=128, device='cpu')  # 12 batches an epoch


def fit(dls, epochs=2, **kw):
    set_seed(0)
    learn = Learner(dls, net(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2, cbs=DynamicSparse(**sparse_settings(**{'sparsity': .8, **kw})))
    return learn.dynamic_sparse


def steps(sp): return [h['step'] for h in sp.history]


def test_default_period_is_a_fifth_of_an_epoch_and_stops_at_90_percent(dls):
    n = len(dls.train)
    sp = fit(dls, 2)
    assert steps(sp) == [i for i in range(1, 2*n) if i % (n//5) == 0 and i/(2*n) < .9]


def test_period_1_rewires_after_every_batch_but_the_first(dls):
    assert steps(fit(dls, 1, period=1, stop=1.)) == list(range(1, len(dls.train)))


def test_period_table_and_stop_epoch(dls):
    n = len(dls.train)
    sp = fit(dls, 3, period={0: 3, 1: 5}, stop=2)
    assert steps(sp) == [i for i in range(1, 2*n) if i % (3 if i < n else 5) == 0]


def test_period_as_a_schedule_of_the_position(dls):
    n = len(dls.train)
    sp = fit(dls, 1, period=SchedLin(2, 6), stop=1.)
    assert steps(sp) == [i for i in range(1, n) if i % max(1, int(2+4*i/n)) == 0]


def test_steps_count_over_all_fits(dls):
    set_seed(0)
    learn = Learner(dls, net()).sparsify(.8, period=10, stop=1.)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2); learn.fit(1, 1e-2)
    assert steps(learn.dynamic_sparse) == [i for i in range(1, 2*len(dls.train)) if i % 10 == 0]


def test_span_total_stops_at_90_percent_of_all_epochs(dls):
    set_seed(0)
    n = len(dls.train)
    learn = Learner(dls, net()).sparsify(.8, period=1, span=AllFits(4))
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
        cb = DynamicSparse(.8, method=DSR(grow_init=how, threshold=.05))
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
    learn.sparsify(.5, period=1, stop=1., init_mask='magnitude')
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
    learn = Learner(dls, net(), opt_func=ranger).sparsify(.8, period=2, method=DSR(threshold=.05))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    slow = {id(p): s for ps, ss in zip(learn.opt.param_lists, learn.opt.slow_weights) for p, s in zip(ps, ss)}
    learn.dynamic_sparse.rewire(learn.opt)
    for e in learn.dynamic_sparse.store.items: assert (slow[id(e.weight)][~e.full] == 0).all(), e.name


@pytest.mark.parametrize('period', [0, {0: 5, 2: 0}, SchedLin(3, 0)])
def test_a_period_below_one_step_is_refused(period):
    with pytest.raises(ValueError, match='period='): DynamicSparse(period=period)


# -- other methods than DSR

def trained(method, epochs=2, sparsity=.8, cbs=(), **kw):
    "A small run, with all masks and weights after each optimizer step"
    set_seed(0)
    dls = digits_dls(bs=256, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)), lr=1e-2, opt_func=partial(SGD, mom=.9),
        cbs=list(cbs))
    learn.add_cb(DynamicSparse(sparsity, **sparse_settings(method, **kw)))
    class Seen(Callback):
        order = 90
        rows = []
        def after_step(self):
            self.rows.append([(e.mask.clone(), e.weight.detach().clone(), e.weight.grad.clone()) for e in learn.dynamic_sparse.store.items])
    Seen.rows = []
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=Seen())
    return learn, Seen.rows


@pytest.mark.parametrize('two_ended', [False, True])
def test_set_exchanges_the_smallest_of_each_layer(two_ended):
    learn, rows = trained('set', period=3, drop_frac=.25, two_ended=two_ended)
    steps = [h['step'] for h in learn.dynamic_sparse.history]
    assert len(steps) >= 2
    for s in steps:
        for (before, _, _), (after, w, _) in zip(rows[s-1], rows[s]):
            gone, new = before & ~after, after & ~before
            assert gone.sum() == new.sum() and not w[gone | new].any()
            if not two_ended: assert gone.sum() == int(.25*int(before.sum()))
            left = w[before & after].abs()
            assert left.numel() and (two_ended or left.min() > 0)


def test_rigl_grows_where_the_dense_gradient_is_and_makes_no_step_then():
    learn, rows = trained('rigl', period=3)
    cb = learn.dynamic_sparse
    steps = [h['step'] for h in cb.history]
    assert len(steps) >= 2 and cb.effect.clock.steps == len(rows)
    for s in steps:
        for (before, old, _), (after, w, _) in zip(rows[s-1], rows[s]):
            both = before & after
            assert torch.equal(old[both], w[both]), 'the optimizer has stepped'
            assert not w[after & ~before].any() and int(after.sum()) == int(before.sum())
    plain = next(s for s in range(1, len(rows)) if s not in steps)
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(rows[plain-1], rows[plain]))


def test_rigl_takes_the_dense_gradients():
    "By a second route: the gradients of the same batch on a twin without masks"
    set_seed(0)
    seen = {}
    class Twin(Callback):
        order = 6.5 # before the gradients are masked
        def before_step(self):
            net, cb = learn.model, learn.dynamic_sparse
            if cb.due(): seen.setdefault('dense', {n: p.grad.clone() for n, p in net.named_parameters()})
        def after_step(self):
            if 'dense' in seen and 'score' not in seen: seen['score'] = {e.name: s for e, s in learn.dynamic_sparse.dense.items()}
    learn = Learner(digits_dls(bs=256, device='cpu'), nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)), lr=1e-2)
    learn.add_cbs([DynamicSparse(.8, method='rigl', period=2), Twin()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    for n, s in seen['score'].items():
        assert torch.equal(s, seen['dense'][n].abs())
        dead = ~learn.dynamic_sparse.masks[n]
        assert s[dead].any(), 'the gradient was masked already'


def test_rigl_without_free_places_is_plain_training():
    "Nothing can be exchanged, so no step is given away either"
    a, b = (trained(m, sparsity=0., **kw)[0] for m, kw in (('rigl', dict(period=1)), ('static', {})))
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)


def test_fractions():
    def f(pos, stop=1., frac=None):
        cb = SimpleNamespace(stop_pos=stop, value=lambda sched: sched(pos), effect=SimpleNamespace(clock=SimpleNamespace(step_pos=pos)))
        return [m(**{} if frac is None else dict(drop_frac=frac)).fraction(cb) for m in (SET, RigL)]
    assert f(.5) == [.1, pytest.approx(.15)] and f(0.) == [.1, .3] and f(1.)[1] == pytest.approx(0) and f(.45, stop=.9)[1] == pytest.approx(.15)
    assert f(.5, frac=.2) == [.2, pytest.approx(.1)] and f(.25, frac=SchedSteps({0: .4})) == [.4, .4]


@pytest.mark.parametrize('make,text', [
    (lambda: SET(drop_frac=0), 'drop_frac=0'), (lambda: SET(drop_frac=1.), 'drop_frac=1.0'), (lambda: RigL(drop_frac=-.1), 'drop_frac=-0.1'),
    (lambda: SET(drop_frac=SchedConst(1.5)), 'drop_frac='), (lambda: DynamicSparse(granularity='filter', method=SET(two_ended=True)),
        "granularity='weight'"),
    (lambda: DynamicSparse(granularity='2:4', method=SET(two_ended=True)), "granularity='weight'"), (lambda: DynamicSparse(method='lottery'),
        'choose one of'),
    (lambda: DynamicSparse(method=SET), r'SET\(\)'), (lambda: DynamicSparse(method=3), 'method=3: choose one of'),
    (lambda: DeepR(eta=-1), 'eta=-1'), (lambda: DeepR(temperature=-1.), 'temperature=-1'), (lambda: GraNet(start_sparsity=1.), 'start_sparsity')])
def test_bad_settings_of_the_methods(make, text):
    with pytest.raises(ValueError, match=text): make()


def test_a_setting_of_another_method_cannot_be_given():
    for cls, kw in ((DSR, dict(drop_frac=.1)), (SET, dict(eta=.1)), (RigL, dict(two_ended=True)), (Static, dict(grow_init='zero', tol=.1))):
        with pytest.raises(TypeError, match='unexpected keyword'): cls(**kw)


OLD = [(dict(method='set', drop_frac=.2, two_ended=True), 'method=SET(drop_frac=0.2, two_ended=True)'),
    (dict(n_realloc=9), 'method=DSR(n_realloc=9)'), (dict(eta=.1), 'method=DeepR(eta=0.1)'),
       (dict(method='granet', start_sparsity=.2, drop_frac=.1), 'method=GraNet(start_sparsity=0.2, drop_frac=0.1)'), (dict(l1=.1),
           'regularizer=L1(0.1)'),
       (dict(l1=.1, group_lasso=True), 'regularizer=GroupLasso(0.1)'), (dict(stop_pct=.5), 'stop=0.5'), (dict(stop_epoch=3), 'stop=3'),
       (dict(span='total', epochs=9), 'span=AllFits(9)')]

@pytest.mark.parametrize('old,new', OLD)
def test_old_keywords_tell_the_new_form_which_works_when_pasted(old, new):
    import paramfx.all
    for call in (DynamicSparse, two_paths().sparsify):
        with pytest.raises(TypeError) as e: call(.9, **old)
        assert f'write {new} instead of' in str(e.value)
    eval(f'DynamicSparse(.9, {new})', vars(paramfx.all))
    with pytest.raises(TypeError, match='GraNet'): DynamicSparse(.9, 'granet', start_sparsity=.2)  # by position, too


@pytest.mark.parametrize('old,new', [(dict(l1=.1), 'regularizer=L1(0.1)'), (dict(span='total', epochs=9), 'span=AllFits(9)')])
def test_old_keywords_of_pruning(old, new):
    with pytest.raises(TypeError) as e: two_paths().prune(.9, **old)
    assert f'IterativePrune: write {new} instead of' in str(e.value)


def test_methods_are_values():
    "Equal settings are the same method: another object continues what is in force, other settings do not"
    learn = two_paths().sparsify(.5, method=SET(drop_frac=SchedSteps({0: .2, 2: .1})), regularizer=L1(1e-4), span=AllFits(4))
    learn.fit(1, 1e-2)
    same = lambda frac=.2, l1=1e-4, n=4: DynamicSparse(.5, method=SET(drop_frac=SchedSteps({0: frac, 2: .1})), regularizer=L1(l1), span=AllFits(n))
    learn.fit(1, 1e-2, cbs=same())
    for other in (same(.3), same(l1=1e-3), same(n=5)):
        with pytest.raises(ValueError, match='other settings'): learn.fit(1, cbs=other)
    falling = lambda end=.1: DynamicSparse(.5, method=SET(drop_frac=SchedLin(.3, end)))  # fastai's schedules have no equality
    learn = two_paths().sparsify(.5, method=SET(drop_frac=SchedLin(.3, .1)))
    learn.fit(1, cbs=falling())
    with pytest.raises(ValueError, match='other settings'): learn.fit(1, cbs=falling(.2))
    assert DSR() == DSR(n_realloc=.1) != DSR(n_realloc=.2) and RigL() != SET(drop_frac=.3)
    with pytest.raises(AttributeError): DSR().tol = .2
    assert DynamicSparse(method='rigl').settings['method'] == RigL()


def test_a_rewirer_has_to_drop():
    class Nothing(Rewirer): pass
    with pytest.raises(NotImplementedError, match='Nothing defines no `drop`'): Nothing().drop(None, [])


@pytest.mark.parametrize('method', ['set', 'rigl'])
@pytest.mark.parametrize('granularity', ['kernel', 'filter', 'row'])
def test_units_of_other_sizes(method, granularity):
    set_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    learn = Learner(digits_dls(bs=256, device='cpu'), net, lr=1e-2)
    learn.add_cb(DynamicSparse(.5, method=METHODS[method](drop_frac=.4), granularity=granularity, period=2))
    live = [e.live for e in learn.dynamic_sparse.store.items]
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert [e.live for e in learn.dynamic_sparse.store.items] == live and sum(sum(h['grown'].values()) for h in learn.dynamic_sparse.history) > 0



@pytest.mark.parametrize('method', [*METHODS])
def test_a_network_of_one_layer(method):
    "Its parameters have no layer's name before theirs"
    set_seed(0)
    x, y = torch.randn(64, 20), torch.randint(0, 5, (64,))
    learn = Learner(tensor_dls(x, y, x, y, bs=16, normalize=False), nn.Linear(20, 5), nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9), lr=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=DynamicSparse(.6, method=method, period=1))
    w, mask = learn.model.weight, learn.dynamic_sparse.masks['weight']
    assert int(mask.sum()) == 40 and not w[~mask].any() and list(learn.materialize().model.state_dict()) == ['weight', 'bias']


class Each(Callback):
    "Calls `f(learn)` after each optimizer step and rewire"
    order = 60
    name = 'each_step'
    def __init__(self, f): self.__dict__['f'] = f
    def after_step(self): self.f(self.learn)


def granet(period=2, **kw):
    set_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    learn = Learner(digits_dls(bs=256, device='cpu'), net, lr=1e-2)
    return learn.add_cb(DynamicSparse(.9, method=GraNet(start_sparsity=.4), period=period, **kw))


@pytest.mark.parametrize('kw', [{}, dict(stop=3.), dict(stop=2), dict(stop=0), dict(period=50), dict(span=AllFits(2))])
def test_granet_ends_at_its_target(kw):
    "Whenever it stops, and where no rewire falls on the end"
    learn = granet(**kw)
    counts = []
    with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=Each(lambda l: counts.append(l.dynamic_sparse.store.live)))
    assert learn.dynamic_sparse.store.live == 307+48 and counts == sorted(counts, reverse=True)
    assert all(min(e.live for e in learn.dynamic_sparse.store.items) > 0 for _ in counts)
    if not kw:  # half-way, along the cubic of its 20 steps
        first, last, left = 1843+288, 355, 1-10/20/.9
        assert counts[10] == last+int((first-last)*left**3 + .1)


def test_granet_half_way_through_a_recipe(tmp_path):
    "Its file keeps more than the target; a recipe takes it, a callback on foreign masks does not"
    from paramfx.export.materialize import load_recipe, save_recipe
    learn = granet(span=AllFits(4))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    live = learn.dynamic_sparse.store.live
    assert 355 < live < 2131
    save_recipe(learn.model, tmp_path/'half.pth')
    net = load_recipe(tmp_path/'half.pth', nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)))
    assert effects(net)['dynamic_sparse'].holder.live == live
    other = Learner(learn.dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 48)), lr=1e-2)
    sparsify(other.model, .9)
    with other.no_bar(), pytest.raises(ValueError, match='learn.release'): other.fit(1, cbs=DynamicSparse(.9, method='granet'))


# -- layers that a method has nothing to go by, frozen ones, and runs that end early

class TwoPaths(torch.nn.Module):
    "Its second head never gets a gradient"
    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = torch.nn.Linear(20, 16), torch.nn.Linear(16, 4), torch.nn.Linear(16, 4)
    def forward(self, x): return self.head(self.body(x).relu())

def two_paths(**kw):
    seed_all()
    x = torch.randn(64, 20)
    return quiet(Learner(tensor_dls(x, torch.arange(64)%4, x[:8], torch.arange(8)%4, bs=8, device='cpu'), TwoPaths(), CrossEntropyLossFlat(),
                         splitter=lambda m: [list(m.body.parameters()), [*m.head.parameters(), *m.aux.parameters()]], **kw))

def test_snfs_leaves_alone_what_never_had_a_gradient():
    learn = two_paths().sparsify(.7, method='snfs')
    before = learn.dynamic_sparse.masks
    learn.fit(2, 1e-2)
    after = learn.dynamic_sparse.masks
    assert torch.equal(before['aux.weight'], after['aux.weight'])
    assert not torch.equal(before['body.weight'], after['body.weight'])

@pytest.mark.parametrize('noise', ['grad', 'weight'])
def test_noise_of_deepr_spares_frozen_layers_that_were_trained_before(noise):
    learn = two_paths(opt_func=SGD).sparsify(.5, method=DeepR(noise=noise, eta=10., temperature=1.))
    learn.fit(1, 1e-2, wd=0.)
    learn.freeze()
    before = learn.model.body.weight.detach().clone()
    learn.fit(1, 1e-2, wd=0.)
    assert torch.equal(before, learn.model.body.weight)

@pytest.mark.parametrize('method', ['rigl', 'granet', 'set', 'snfs'])
def test_the_column_counts_what_the_history_counts(method):
    "Not the units that were dropped and came back at once"
    learn = two_paths().sparsify(.5, method=METHODS[method](drop_frac=.5), period=2)
    learn.fit(1, 1e-3)
    cb = learn.dynamic_sparse
    assert int(cb.effect.values['rewired']) == sum(cb.traces['moved']) > 0

def test_granet_leaves_dense_what_a_dict_leaves_out():
    assert [r['layer'] for r in two_paths().plan(DynamicSparse({'head': .9}, method='granet')) if 'live' in r] == ['head.weight']

def test_the_plan_of_granet_has_the_cost_of_the_end():
    note = two_paths().plan(DynamicSparse(.9, method='granet')).note
    assert '44 at the end' in note and f'nonzero 472 -> {44+24}' in note # 24 biases

def test_granet_says_when_it_was_stopped_above_its_target():
    class Stop(Callback):
        def after_epoch(self): raise CancelFitException
    learn = two_paths().sparsify(.9, method='granet')
    with pytest.warns(UserWarning, match='was stopped before .* and 44 the target'): learn.fit(4, 1e-2, cbs=Stop())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, 1e-2)
    assert learn.dynamic_sparse.store.live == 44

def test_what_was_explored_agrees_with_files_that_do_not_know_of_it(tmp_path):
    a = two_paths(path=tmp_path).sparsify(.5, method='set', seed=3)
    a.fit(1, 1e-2)
    a.save('without')
    b = two_paths(path=tmp_path, cbs=MaskRecorder(follow=True)).sparsify(.5, method='set')
    b.load('without')
    first = {n: m.clone() for n, m in b.dynamic_sparse.masks.items()}
    b.fit(1, 1e-2)
    for e in b.dynamic_sparse.store.items: assert (e.ever >= (first[e.name] | e.mask)).all() and e.ever.sum() > e.mask.sum()
    assert b.recorder.metric_names[-2] == 'explored' and b.recorder.values[-1][-1] == b.dynamic_sparse.store.explored
    b.save('with')
    c = two_paths(path=tmp_path).sparsify(.5, method='set')
    c.load('with') # following only shows something: no reason to refuse the file, and it goes on
    for x, y in zip(b.dynamic_sparse.store.items, c.dynamic_sparse.store.items): assert torch.equal(x.mask, y.mask) and torch.equal(x.ever, y.ever)


def test_tables_have_keys_within_an_epoch():
    "As those of `sparse_recipe(epochs=2)`, which stretches a hundred epochs"
    seen = []
    class See(Callback):
        def before_batch(self):
            if self.training: seen.append(self.learn.dynamic_sparse.method.now(self.learn.dynamic_sparse))
    two_paths().sparsify(.5, method=DeepR(temperature={0: 4., .5: 3., 1: 2., 1.5: 1.})).fit(2, 1e-2, cbs=See())
    assert seen == [4.]*4 + [3.]*4 + [2.]*4 + [1.]*4

@pytest.mark.parametrize('opt', [SGD, partial(OptimWrapper, opt=torch.optim.SGD), RMSProp])
def test_snfs_without_momentum_is_refused_before_anything_is_masked(opt):
    learn = two_paths(opt_func=opt)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match='keeps none'): learn.fit(1, cbs=DynamicSparse(.5, method='snfs'))
    with pytest.raises(ValueError, match='keeps none'): learn.sparsify(.5, method='snfs')
    after = learn.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())

def test_a_fit_after_the_span_is_no_reason_to_warn():
    learn = two_paths().sparsify(.5, method='set', span=AllFits(1))
    learn.fit(1, 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, 1e-2)


@pytest.mark.parametrize('noise', ['grad', 'weight'])
def test_noise_of_deepr_has_its_deviation(noise):
    "sqrt(2*eta*T), on the live weights alone, and another one at every step"
    learn = Learner(digits_dls(bs=256, device='cpu'), nn.Sequential(nn.Flatten(), nn.Linear(64, 400)), lr=0.)
    cb = DynamicSparse(.5, method=DeepR(eta=.02, temperature=.5, noise=noise), stop=1.)
    learn.add_cb(cb)
    e, seen = cb.store.items[0], []
    where = (lambda: e.weight.grad) if noise == 'grad' else (lambda: e.weight.data)
    add = type(cb.method).before_step if noise == 'grad' else type(cb.method).after_step
    e.weight.grad = torch.zeros_like(e.weight)
    cb.method.ready(cb, learn)
    for step in (0, 1):
        cb.effect.clock.steps = step
        before = where().clone()
        add(cb.method, cb, learn)
        seen.append((where()-before)[e.mask])
        assert not where()[~e.mask].any()
    for n in seen: assert abs(float(n.std())/(2*.02*.5)**.5-1) < .03 and abs(float(n.mean())) < .01
    assert abs(float(torch.corrcoef(torch.stack(seen))[0, 1])) < .05


def test_drawn_signs_of_deepr():
    "A connection that wakes has the sign of its place; both signs occur, and the seed alone says which"
    def lists(seed, **kw):
        set_seed(0)
        learn = Learner(digits_dls(bs=256, device='cpu'), nn.Sequential(nn.Flatten(), nn.Linear(64, 40)), lr=.1)
        cb = DynamicSparse(.5, method=DeepR(**kw), seed=seed)
        learn.add_cb(cb)
        e = cb.store.items[0]
        e.weight.data[:, ::2] = 0.  # awake, but at 0
        cb.method.ready(cb, learn)
        l = cb.lists[e]
        return l.idx, l.sign, e.weight.data.flatten()[l.idx]
    idx, sign, w = lists(3, sign='random')
    assert torch.equal(sign[w != 0], w[w != 0].sign()) and .4 < float((sign[w == 0] > 0).float().mean()) < .6 and (sign != 0).all()
    again = lists(3, sign='random')
    assert torch.equal(again[0], idx) and torch.equal(again[1], sign)
    assert not lists(3)[1][w == 0].any()  # without: none before the first step


def test_two_ended_leaves_zeros_to_neither_side():
    e = SimpleNamespace(weight=torch.tensor([[0., 0., .1, .2, -.3, -.1]]), mask=torch.ones(1, 6, dtype=torch.bool))
    assert sorted(SET()._ends(e, .5).tolist()) == [2, 5]


def test_what_a_step_leaves_is_not_exported(tmp_path):
    for method in ('deepr', 'snfs', 'rigl'):
        learn = Learner(digits_dls(bs=256, device='cpu'), nn.Sequential(nn.Flatten(), nn.Linear(64, 40)), opt_func=partial(SGD, mom=.9), lr=.1,
            path=tmp_path)
        learn.add_cb(DynamicSparse(.5, method=method, period=1))
        with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt):
            learn.fit(1, cbs=Each(lambda l: (_ for _ in ()).throw(KeyboardInterrupt()) if l.train_iter > 3 else None))
        assert any(k in vars(learn.dynamic_sparse) for k in ('dense', 'momentum', 'lists'))
        learn.remove_cbs([c for c in learn.cbs if type(c) is Each])
        learn.export('stopped.pkl')
        assert not any(k in vars(load_learner(tmp_path/'stopped.pkl').dynamic_sparse) for k in ('dense', 'momentum', 'lists'))
