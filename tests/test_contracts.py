"""Every method through every trap of fastai's training loop: each registered method runs the whole matrix."""
import os
import pickle
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import L, Callback, CancelBatchException, CancelStepException, SGD, load_learner
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
import fastai.callback.hook  # brings `learn.summary`
import fastai.callback.progress
from torch import nn

from contracts import (METHODS, N_STEPS, OPTIMIZERS, Probe, Stop, build, datasets_dls, footprint, quiet, run_record, same, seed_all,
                      small_net, snapshot, tiny_dls, two_groups)
from paramfx.core.clock import SchedCubic
from paramfx.core.samples import rng_state, sample_batch, set_rng_state
from paramfx.core.state import effects
from paramfx.core.runs import RunState
from paramfx.sparse.callback import DynamicSparse
from fresh import run_fresh

HERE = Path(__file__).resolve().parent
pytestmark = [pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning'),
              pytest.mark.few(5)]  # of the methods, others in each test; all of them under --slow


@pytest.fixture(params=METHODS.values(), ids=list(METHODS))
def m(request): return request.param


@pytest.fixture
def mk(tmp_path, request):
    "Builder of Learners that write below this test's own folder, with the network of the method under test"
    m = request.getfixturevalue('m') if 'm' in request.fixturenames else None
    return partial(build, tmp_path, **{} if m is None else dict(model=m.net))


def assert_same(a, b): assert not (where := same(a, b)), where
def assert_moved(m, a, b): assert bool(same(a['masks'], b['masks'])) == m.moves


# 1. lr_find ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('when', ['before any fit', 'after a fit', 'after fit(cbs=)'])
def test_lr_find_acts_but_does_not_advance(m, mk, when):
    probe = Probe(m)
    learn = mk([probe] if when == 'after fit(cbs=)' else [m.make(), probe])
    if when == 'after a fit': learn.fit(1)
    if when == 'after fit(cbs=)': learn.fit(1, cbs=m.make())
    facts, state, opt, n = m.facts(learn), snapshot(learn.model), deepcopy(learn.opt.state_dict()) if learn.opt else None, probe.steps
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*without one rewire')  # no fit has ended here
        learn.lr_find(num_it=12, show_plot=False, stop_div=False)
    assert probe.steps == n+12  # the masks held at each of these steps
    assert_same(m.facts(learn), facts)
    assert_same(snapshot(learn.model), state)
    if opt: assert_same(learn.opt.state_dict(), opt)
    assert not set(m.columns) & set(learn.recorder.metric_names)
    assert len(learn.metrics) == 1
    learn.fit(1)
    assert_moved(m, facts, m.facts(learn)) if when != 'after fit(cbs=)' else assert_same(m.facts(learn), facts)


def test_lr_find_counts_no_penalty_twice_and_changes_no_later_run(m, mk):
    a, b = (mk(m.make(**m.penalty)) for _ in range(2))
    for learn, look in ((a, False), (b, True)):
        seed_all(3); learn.dls.train.rng.seed(3)
        state = rng_state(learn.dls)
        if look:
            learn.lr_find(num_it=7, show_plot=False)
            seed_all(3); learn.dls.train.rng.seed(3); set_rng_state(state, learn.dls)
        learn.fit(1)
    assert_same(run_record(a)['model'], run_record(b)['model'])
    assert_same(m.facts(a), m.facts(b))


# 2. validation and inspection ------------------------------------------------------------------------------------------------

LOOKS = dict(validate=lambda l: l.validate(), get_preds=lambda l: l.get_preds(), summary=lambda l: l.summary(),
             tta=lambda l: l.tta(n=2), cost=lambda l: l.cost(latency=False), sample=lambda l: sample_batch(l.dls),
             predict=lambda l: l.predict(l.dls.train_ds[0][0]))

@pytest.mark.parametrize('look', LOOKS)
def test_looking_changes_nothing(m, mk, look):
    dls = datasets_dls if look in ('tta', 'predict') else None
    learn = mk([m.make(), Probe(m)], dls=dls)
    for n in (0, 1, 2):
        facts, state, metrics = m.facts(learn), snapshot(learn.model), list(learn.metrics)
        res = LOOKS[look](learn)
        if look == 'validate': assert len(res) == 2  # loss and accuracy: no column of ours
        assert_same(m.facts(learn), facts)
        assert_same(snapshot(learn.model), state)
        assert list(learn.metrics) == metrics
        learn.fit(1)
    assert m.facts(learn)['clock']['steps'] == 3*len(learn.dls.train)


def test_columns_come_with_training_and_go_again(m, mk):
    learn = mk(m.make())
    learn.fit(2)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', *m.columns, 'time']
    assert all(len(v) == 3+len(m.columns) for v in learn.recorder.values)
    assert len(learn.metrics) == 1
    learn.validate()
    assert len(learn.metrics) == 1


def test_a_fit_without_a_rewire_warns(mk):
    learn = mk(DynamicSparse(.8, period=1000))
    with pytest.warns(UserWarning, match='without one rewire'): learn.fit(1)


# 3. continuing ---------------------------------------------------------------------------------------------------------------

def test_same_instance_continues(m, mk):
    cb = m.make()
    learn = mk([Probe(m)])
    learn.fit(1, cbs=cb)
    one = m.facts(learn)
    learn.fit(2, cbs=cb)
    two = m.facts(learn)
    assert (one['clock']['steps'], two['clock']['steps']) == (N_STEPS, 3*N_STEPS)
    assert_same(two['history'][:len(one['history'])], one['history'])
    assert_moved(m, one, two)
    assert bool(len(two['history'])) == m.moves


@pytest.mark.of(masked=True)
def test_fine_tune_and_frozen_layers(m, mk):
    learn = mk([m.make(), Probe(m)], splitter=two_groups)
    learn.freeze()
    start = m.facts(learn)
    learn.fit(2)
    frozen = m.facts(learn)
    assert_same(frozen['masks']['0.3.weight'], start['masks']['0.3.weight'])
    assert bool(same(frozen['masks']['1.2.weight'], start['masks']['1.2.weight'])) == m.moves
    w = learn.model[0][3].weight.detach().clone()
    learn.unfreeze()
    assert torch.equal(learn.model[0][3].weight, w)
    learn.fine_tune(1, freeze_epochs=1)
    facts = m.facts(learn)
    assert facts['clock']['steps'] == 4*N_STEPS
    assert m.held_to(facts['live'], start['live'])
    if m.moves: assert same(facts['masks']['0.3.weight'], start['masks']['0.3.weight'])


def cell(period): return DynamicSparse(.8, period=period, include=lambda n, m: isinstance(m, nn.Linear))
RERUN = dict(
    plain=lambda: DynamicSparse(.8, period=2), lambdas=lambda: cell(lambda pos: 2+pos), annealer=lambda: cell(SchedCos(2, 4)),
    cubic=lambda: cell(SchedCubic(2, 4)), pair=lambda: cell((2, 4)), table=lambda: cell({0: 2, 1: 4}), array=lambda: cell(np.float64(2)),
    predicates=lambda: DynamicSparse(.8, period=2, include=[lambda n, m: isinstance(m, nn.Linear)]), types=lambda: DynamicSparse(.8, include=[nn.Linear]),
    mask=lambda: DynamicSparse(.8, period=2, init_mask={'1.2.weight': torch.arange(1920).view(10, 192)%5 == 0}),
    closure=lambda n=2: cell((lambda k: lambda pos: k)(n)), partials=lambda n=2: cell(partial(max, n)))

@pytest.mark.parametrize('form', RERUN)
def test_equal_settings_continue(mk, form):
    "As when a notebook cell is run again: new objects, equal meaning"
    learn = mk()
    learn.fit(1, cbs=RERUN[form]())
    learn.fit(1, cbs=RERUN[form]())
    assert learn.dynamic_sparse.effect.clock.steps == 2*N_STEPS


def test_an_edited_cell_above_does_not_change_a_lambda(mk):
    "The same source on another line is the same function"
    make = lambda line: cell(eval(compile('\n'*line+'lambda pos: 2', 'cell', 'eval')))
    learn = mk()
    learn.fit(1, cbs=make(0))
    learn.fit(1, cbs=make(5))
    assert learn.dynamic_sparse.effect.clock.steps == 2*N_STEPS


DIFFER = dict(
    number=(lambda: cell(2), lambda: cell(3)), lambdas=(lambda: cell(lambda pos: 2), lambda: cell(lambda pos: 3)),
    closure=(lambda: RERUN['closure'](2), lambda: RERUN['closure'](3)), partials=(lambda: RERUN['partials'](2), lambda: RERUN['partials'](3)),
    defaults=(lambda: cell(lambda pos, k=2: k), lambda: cell(lambda pos, k=3: k)),
    annealer=(lambda: cell(SchedCos(2, 4)), lambda: cell(SchedCos(2, 5))), kind=(lambda: cell(SchedCos(2, 4)), lambda: cell(SchedCubic(2, 4))))

@pytest.mark.parametrize('form', DIFFER)
def test_other_functions_are_other_settings(mk, form):
    a, b = DIFFER[form]
    learn = mk(a())
    with pytest.raises(ValueError, match='learn.release'): learn.add_cb(b())


@pytest.mark.few(7)
def test_other_settings_raise_and_release_makes_room(m, mk):
    learn = mk(m.make())
    learn.fit(1)
    facts, state, cbs = m.facts(learn), snapshot(learn.model), list(learn.cbs)
    with pytest.raises(ValueError, match=rf'{m.rate}={m.told}.*learn\.release\(\)'): learn.fit(1, cbs=m.other())
    with pytest.raises(ValueError, match=r'learn\.release\(\)'): learn.add_cb(m.other())
    assert_same(m.facts(learn), facts)
    assert_same(snapshot(learn.model), state)
    assert list(learn.cbs) == cbs
    learn.release()
    learn.fit(1, cbs=[m.other(), Probe(m)])
    assert m.facts(learn)['clock']['steps'] == N_STEPS
    assert not m.masked or sum(m.facts(learn)['live']) > sum(facts['live'])


@pytest.mark.few(6)
def test_attached_twice_acts_once(m, mk):
    "A cell run again beside the instance that is attached: one penalty, one step each"
    a, b = (mk(m.make(**m.penalty), opt_func=partial(SGD, mom=.9)) for _ in range(2))
    a.fit(1)
    b.fit(1, cbs=m.make(**m.penalty))
    assert_same(run_record(a), run_record(b))
    assert_same(m.facts(a), m.facts(b))
    for learn in (a, b): learn.fit(1)
    assert_same(run_record(a), run_record(b))


# 4. staying in force ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_effect_outlives_its_callback(m, mk, opt):
    learn = mk([Probe(m)], **OPTIMIZERS[opt])
    cb = m.make()
    learn.fit(1, cbs=cb)
    facts = m.facts(learn)
    assert m.on(learn) is cb and cb.learn is None and cb not in learn.cbs
    learn.fit(2)
    assert_same(m.facts(learn), facts)  # no rewire, no count: the callback is not there
    if m.masked: assert_same(m.on(learn).masks, facts['masks'])
    learn.fit(1, cbs=cb)
    assert m.facts(learn)['clock']['steps'] == 2*N_STEPS


@pytest.mark.parametrize('end', ['release', 'materialize'])
@pytest.mark.parametrize('attached', [True, False])
@pytest.mark.of(compressed=False)
def test_the_end_leaves_nothing_behind(m, mk, end, attached):
    if m.folds and end == 'materialize': pytest.skip('its network becomes another one: test_bases.py')
    fresh = footprint(m.net())
    learn = mk(m.make() if attached else None)
    learn.fit(1, cbs=None if attached else m.make())
    masks, weights = m.facts(learn)['masks'], {k: v.clone() for k, v in learn.model.named_parameters()}
    x = sample_batch(learn.dls, 4)
    out = learn.model.eval()(*x)
    assert getattr(learn, end)() is learn
    if m.steps and end == 'materialize': assert len(learn.model.__dict__.pop('_recipe')) == len(m.steps)
    assert footprint(learn.model) == fresh
    assert effects(learn.model) == {} and 'effect_keeper' not in vars(learn) and not hasattr(learn, m.effect)
    assert not [c for c in learn.cbs if 'paramfx' in type(c).__module__]
    assert_same(dict(learn.model.named_parameters()), weights)
    assert torch.equal(learn.model.eval()(*x), out)
    assert list(learn.model.state_dict()) == list(m.net().state_dict())
    learn.fit(1)
    assert not masks or any(learn.model.get_parameter(n)[~k].any() for n, k in masks.items())  # dense training again


# 5. files --------------------------------------------------------------------------------------------------------------------

def test_fresh_learner_takes_over_a_checkpoint(m, mk):
    "In mid-run, optimizer included, in a Learner that has never trained"
    a = mk([m.make(), Probe(m)])
    a.fit(2)
    a.save('mid')
    b = mk([m.make(), Probe(m)], seed=9)
    b.load('mid', with_opt=True)
    for k in ('clock', 'values', 'masks', 'live'): assert_same(m.facts(b)[k], m.facts(a)[k])
    assert_same(snapshot(b.model), snapshot(a.model))
    for learn in (a, b):
        seed_all(4); learn.dls.train.rng.seed(4)
        learn.fit(1)
    assert_same(run_record(b), run_record(a))
    assert m.facts(b)['clock'] == m.facts(a)['clock']


def test_checkpoint_is_made_of_plain_types(m, mk):
    learn = mk(m.make())
    learn.fit(1)
    f = learn.save('plain_types')
    with torch.serialization.safe_globals([L]): state = torch.load(f, weights_only=True)  # fastai keeps hyper-parameters in an `L`
    assert set(state) == {'model', 'opt'}
    assert_same(dict(state['model']), snapshot(learn.model))
    assert sum(v.numel()*v.element_size() for v in state['model'].values()) < 1.5*sum(p.numel()*4 for p in learn.model.parameters())


@pytest.mark.of(masked=True, compressed=False)
def test_dense_file_into_sparse_learner_is_masked(m, mk):
    dense = mk(seed=5)
    dense.fit(1)
    dense.save('dense')
    learn = mk([m.make(), Probe(m)])
    masks = m.on(learn).masks
    learn.load('dense')
    for n, p in learn.model.named_parameters(): assert torch.equal(p, dense.model.get_parameter(n)*(masks[n] if n in masks else 1))
    assert_same(m.on(learn).masks, masks)
    learn.fit(1)  # with the dense run's optimizer state: `Probe` sees that none of it leaks


def test_sparse_file_into_dense_learner_names_the_remedy(m, mk):
    a = mk(m.make())
    a.fit(1)
    a.save('sparse')
    b = mk(seed=7)
    state, feet = snapshot(b.model), footprint(b.model)
    with pytest.raises(ValueError, match='(?s)callback.*save_plain'): b.load('sparse')
    assert_same(snapshot(b.model), state)
    assert footprint(b.model) == feet


def test_file_of_another_budget_is_refused(m, mk):
    if not m.refusal: pytest.skip('it has no budget: a file fits whatever the weight of its penalty')
    a = mk(m.other())
    a.fit(1)
    a.save('other')
    b = mk(m.make())
    b.fit(1)
    state, facts = snapshot(b.model), m.facts(b)
    with pytest.raises(ValueError, match=m.refusal): b.load('other')
    assert_same(snapshot(b.model), state)
    assert_same(m.facts(b), facts)
    b.fit(1, cbs=Probe(m))


@pytest.mark.of(masked=True, coarse=True)
def test_file_of_another_granularity_is_refused(m, mk):
    a, b = mk(m.make(granularity='kernel')), mk(m.make())
    a.save('kernels')
    state = snapshot(b.model)
    with pytest.raises(ValueError, match=r'0\.3\.weight.*granularity'): b.load('kernels')
    assert_same(snapshot(b.model), state)


@pytest.mark.parametrize('ext', ['', '.pth', '.safetensors'])
@pytest.mark.of(compressed=False)
def test_save_plain_fits_a_plain_network(m, mk, ext):
    learn = mk(m.make())
    learn.fit(1)
    f = learn.save_plain(f'plain{ext}')
    assert f.suffix == (ext or '.pth')
    if ext == '.safetensors':
        from safetensors.torch import load_file
        state = load_file(f)
    else: state = torch.load(f, weights_only=True)
    net = m.net()
    assert net.load_state_dict(state, strict=True)
    assert set(state) == set(net.state_dict())
    x = sample_batch(learn.dls, 4)
    assert torch.equal(net.eval()(*x), learn.model.eval()(*x))
    if ext != '.safetensors':
        dense = mk()
        dense.load('plain')
    assert effects(learn.model)  # the run goes on


class Watch(Callback):
    "Weights and facts at the end of each epoch"
    order = 80
    def __init__(self, method): self.__dict__.update(method=method, seen=[])
    def after_epoch(self):
        if not self.learn.lock.locked(): self.seen.append((snapshot(self.learn.model), self.method.facts(self.learn)))


@pytest.mark.parametrize('with_opt', [False, True])
def test_save_model_callback_reloads_masks_with_weights(m, mk, with_opt):
    watch = Watch(m)
    bad = ParamScheduler({'lr': lambda pos: 1e-2 if pos < .6 else 1.})  # so that an early epoch is the best
    learn = mk([m.make(stop=1.), Probe(m)])
    learn.fit(3, cbs=[SaveModelCallback(fname='best', with_opt=with_opt), watch, bad])
    best = int(np.argmin([v[1] for v in learn.recorder.values]))
    assert best < 2
    if getattr(m.on(learn), 'when', '') == 'fit_end': learn.restore_generation()  # it has begun anew in the weights that were reloaded
    assert_same({k: v for k, v in snapshot(learn.model).items() if 'effect' not in k}, {k: v for k, v in watch.seen[best][0].items() if 'effect' not in k})
    assert_same(m.facts(learn)['masks'], watch.seen[best][1]['masks'])
    if m.moves: assert same(watch.seen[2][1]['masks'], watch.seen[best][1]['masks'])
    learn.fit(1)  # the optimizer's state is of other masks: `Probe` sees that none of it leaks


def test_load_in_mid_fit_keeps_the_contract(m, mk):
    "Back to an older file between two batches of one epoch"
    learn = mk([m.make(), Probe(m)])
    learn.fit(1)
    learn.save('old')
    live = m.facts(learn)['live']
    class Back(Callback):
        order, run_valid = -20, False
        def before_batch(self):
            if self.iter == 5: self.learn.load('old', with_opt=False)
    learn.fit(1, cbs=Back())
    assert m.held_to(m.facts(learn)['live'], live)


CHILD = '''
import sys
import torch
from contracts import METHODS, Probe, build, quiet, snapshot, tiny_dls
from fastai.basics import load_learner
import paramfx.core.runs
for m in map(METHODS.get, sys.argv[2:]):
    path = sys.argv[1]+'/'+m.name
    learn = build(path, [m.make(), Probe(m)], seed=11, model=m.net)
    learn.load('there')
    other = quiet(load_learner(path+'/there.pkl'))
    got = [dict(facts=m.facts(l), model=snapshot(l.model)) for l in (learn, other)]
    other.dls = tiny_dls()
    for l in (learn, other):
        l.fit(1)
        m.check(l)
    torch.save((got, [m.facts(l) for l in (learn, other)]), path+'/seen.pt')
'''

@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory, request):
    "What another process, started once, made of the files of each method that is asked for"
    out, here = tmp_path_factory.mktemp('elsewhere'), {}
    asked = [i.callspec.params['m'] for i in request.session.items
             if getattr(i, 'originalname', '') == 'test_another_process_loads_and_goes_on' and not i.get_closest_marker('skip')]
    for m in asked:
        learn = build(out/m.name, [m.make(), Probe(m)], model=m.net)
        learn.fit(1)
        learn.save('there')
        learn.export('there.pkl')
        here[m.name] = dict(facts=m.facts(learn), model=snapshot(learn.model))
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get('PYTHONPATH', '')])}
    r = run_fresh(CHILD, str(out), *[m.name for m in asked], env=env, cwd=out)
    assert r.returncode == 0, r.stderr
    return out, here


def test_another_process_loads_and_goes_on(m, elsewhere):
    out, here = elsewhere
    got, later = torch.load(out/m.name/'seen.pt', weights_only=False)
    for g in got:
        assert_same(g['model'], here[m.name]['model'])
        for k in ('clock', 'values', 'masks', 'live'): assert_same(g['facts'][k], here[m.name]['facts'][k])
    for facts in later: assert facts['clock']['steps'] == 2*N_STEPS


# 6. resuming -----------------------------------------------------------------------------------------------------------------

def dropout_run(mk, m, **kwargs):
    "A run that depends on everything: dropout, shuffling, momentum schedule, trackers"
    cbs = [m.make(**m.penalty), Probe(m), RunState(), SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=9)]
    return mk(cbs, model=partial(m.net, dropout=.3), splitter=two_groups, **kwargs)


@pytest.mark.few(3)
def test_resume_under_a_progress_bar(m, mk, whole, capsys):
    "The bar, which every user has, begins at an epoch that is not the first"
    f, n = RUNS['one cycle']
    a = dropout_run(mk, m)
    a.add_cbs([Stop(2*N_STEPS+4), fastai.callback.progress.ProgressCallback()])
    with pytest.raises(KeyboardInterrupt): f(a)
    b = dropout_run(mk, m, seed=17)
    b.add_cb(fastai.callback.progress.ProgressCallback())
    b.resume()
    f(b)
    assert_same(finished(b, m), whole(m, 'one cycle'))


def finished(learn, m): return dict(run_record(learn), facts=m.facts(learn), best=float(learn.save_model.best), wait=learn.early_stopping.wait)


RUNS = {'one cycle': (lambda l: l.fit_one_cycle(4, 1e-2), 4*N_STEPS), 'fine_tune': (lambda l: l.fine_tune(3, freeze_epochs=2), 5*N_STEPS)}

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Uninterrupted runs, made once"
    done = {}
    def get(m, run):
        if (m.name, run) not in done:
            learn = dropout_run(partial(build, tmp_path_factory.mktemp('whole')), m)
            RUNS[run][0](learn)
            done[m.name, run] = finished(learn, m)
        return done[m.name, run]
    return get


@pytest.mark.parametrize('run,at', [('one cycle', 2*N_STEPS+4), ('one cycle', N_STEPS+1),
    ('fine_tune', N_STEPS+3), ('fine_tune', 2*N_STEPS+3), ('fine_tune', 4*N_STEPS+5)])
def test_resumed_run_is_the_uninterrupted_one(m, mk, whole, run, at):
    f, n = RUNS[run]
    a = dropout_run(mk, m)
    a.add_cb(Stop(at))
    with pytest.raises(KeyboardInterrupt): f(a)
    del a
    b = dropout_run(mk, m, seed=17)  # other weights, other order: all of it has to come from the file
    seed_all(23)
    b.resume()
    f(b)
    assert_same(finished(b, m), whole(m, run))
    assert m.facts(b)['clock']['steps'] == n or m.name == 'evolve' and b.save_model.best < b.recorder.values[-1][1]  # back to before the last reset


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_resume_restores_every_optimizer(mk, opt):
    m = METHODS['dsr']
    new = lambda seed=0: mk([m.make(), Probe(m), RunState()], seed=seed, **OPTIMIZERS[opt])
    whole, half, rest = new(), new(), new(17)
    whole.fit_one_cycle(3, 1e-2)
    half.add_cb(Stop(2*N_STEPS+1))
    with pytest.raises(KeyboardInterrupt): half.fit_one_cycle(3, 1e-2)
    rest.resume()
    rest.fit_one_cycle(3, 1e-2)
    assert_same(snapshot(rest.model), snapshot(whole.model))
    assert_same([float(o) for o in rest.recorder.losses], [float(o) for o in whole.recorder.losses])
    assert_same(m.facts(rest), m.facts(whole))


@pytest.mark.parametrize('look', ['summary', 'validate', 'lr_find', 'get_preds'])
def test_looking_between_resume_and_fit(m, mk, whole, look):
    f, n = RUNS['one cycle']
    a = dropout_run(mk, m)
    a.add_cb(Stop(2*N_STEPS+4))
    with pytest.raises(KeyboardInterrupt): f(a)
    b = dropout_run(mk, m, seed=17)
    b.resume()
    dict(LOOKS, lr_find=lambda l: l.lr_find(num_it=6, show_plot=False))[look](b)
    f(b)
    assert_same(finished(b, m), whole(m, 'one cycle'))


def test_resume_refuses_what_it_cannot_continue(m, mk, tmp_path):
    learn = mk([m.make(), RunState()])
    learn.fit(1)
    state, facts, cbs = snapshot(learn.model), m.facts(learn), list(learn.cbs)
    models = tmp_path/'models'
    learn.save('checkpoint')
    (models/'garbage.pth').write_bytes(b'not a file of torch')
    (models/'half.pth').write_bytes((models/'run.pth').read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match='RunState'): learn.resume('absent')
    with pytest.raises(ValueError, match='learn.load'): learn.resume('checkpoint')
    for f in ('garbage', 'half'):
        with pytest.raises(Exception) as e: learn.resume(f)
        assert isinstance(e.value, ValueError) and f in str(e.value), f'{f}: {type(e.value).__name__} {e.value}'
    assert_same(snapshot(learn.model), state)
    assert_same(m.facts(learn), facts)
    assert list(learn.cbs) == cbs


def test_resume_with_another_callback_or_none_raises(m, mk):
    a = mk([m.make(), RunState()])
    a.fit(1)
    b = mk(m.other())
    state = snapshot(b.model)
    if m.refusal:
        with pytest.raises(ValueError): b.resume()
        assert_same(snapshot(b.model), state)
    else:
        with pytest.raises(ValueError, match=m.rate): b.resume().fit(1)
    c = mk()  # it may still come with `fit(cbs=...)`: only the fit can tell
    state = snapshot(c.model)
    c.resume()
    with pytest.raises(ValueError, match='no such callback'): c.fit(1)
    assert_same(snapshot(c.model), state)


def test_resume_with_another_number_of_epochs_raises(mk, m):
    a = mk([m.make(), RunState()])
    a.fit(2)
    b = mk(m.make()).resume()
    with pytest.raises(ValueError, match='trains 2 epochs in this fit, and 3 are asked for'): b.fit(3)


@pytest.mark.few(3)
def test_resume_with_everything_in_fit(m, mk):
    "Nothing is attached to the Learner: the call that is made again brings all callbacks"
    fit = lambda learn, *cbs: learn.fit_one_cycle(4, 1e-2, cbs=[m.make(**m.penalty), Probe(m), RunState(), *cbs])
    new = lambda seed=0: mk(model=partial(m.net, dropout=.3), seed=seed)
    ref = new()
    fit(ref)
    with pytest.raises(KeyboardInterrupt): fit(new(), Stop(3*N_STEPS+4))
    b = new(seed=17)
    b.resume()
    fit(b)
    assert_same(run_record(b), run_record(ref))
    assert_same(m.facts(b), m.facts(ref))


def test_a_crash_while_writing_leaves_the_old_file(m, mk, tmp_path, monkeypatch):
    learn = mk([m.make(), RunState()])
    learn.fit(1)
    f = tmp_path/'models'/'run.pth'
    old, names = f.read_bytes(), sorted(os.listdir(f.parent))
    def crash(obj, file, **kwargs):
        Path(file).write_bytes(b'half')
        raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', crash)
    with pytest.raises(OSError): learn.fit(1)
    assert f.read_bytes() == old and sorted(os.listdir(f.parent)) == names
    with pytest.raises(OSError): learn.save_plain('run')
    assert f.read_bytes() == old and sorted(os.listdir(f.parent)) == names


# 7. doing nothing ------------------------------------------------------------------------------------------------------------

@pytest.mark.of(compressed=False)
def test_settings_that_do_nothing_are_the_plain_run(m, mk):
    net = partial(m.net, dropout=.3)
    plain, idle = mk(model=net, splitter=two_groups), mk(m.noop(), model=net, splitter=two_groups)
    for learn in (plain, idle):
        seed_all(6)
        learn.fine_tune(2, freeze_epochs=1)
    a, b = run_record(plain), run_record(idle)
    assert_same({k: v for k, v in b['model'].items() if k in a['model']}, a['model'])
    assert_same(b['opt'], a['opt'])
    assert_same([v[:3] for v in b['values']], [v[:3] for v in a['values']])
    assert_same((b['losses'], b['lrs']), (a['losses'], a['lrs']))


def test_a_penalty_of_zero_is_no_penalty(m, mk):
    a, b = mk(m.make()), mk(m.make(**{k: None if k == 'regularizer' else type(v)(0) for k, v in m.penalty.items()}))
    for learn in (a, b): learn.fit(1)
    assert_same(run_record(a), run_record(b))


def test_inspection_takes_no_random_number(m, mk):
    net = partial(m.net, dropout=.3)
    a, b = (mk(m.make(), model=net) for _ in range(2))
    seed_all(6)
    a.fit(1); a.fit(1)
    seed_all(6)
    def look(learn):
        state = rng_state(learn.dls)
        sample_batch(learn.dls), sample_batch(learn.dls, 3), learn.cost(latency=False), m.make()
        if hasattr(learn, 'plan'): learn.plan(m.make())
        assert_same(rng_state(learn.dls), state)
    look(b); b.fit(1); look(b); b.fit(1); look(b)
    assert_same(run_record(a), run_record(b))
    assert_same(m.facts(a), m.facts(b))


# 8. the training loop --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_gradient_accumulation_is_a_bigger_batch(m, mk, dtype, tol):
    "No batch norm, which sees the micro-batch; no shuffling, which would order them otherwise"
    net = lambda: m.net(norm=False).to(dtype)
    dls = lambda bs: tiny_dls(n=128, bs=bs, dtype=dtype, shuffle=(False, False), drop_last=(False, False))
    big = mk([m.make(**m.penalty, stop=1.), Probe(m)], dls=dls(32), model=net, opt_func=partial(SGD, mom=.5), lr=.1)
    acc = mk([m.make(**m.penalty, stop=1.), Probe(m)], dls=dls(8), model=net, opt_func=partial(SGD, mom=.5), lr=.1)
    big.fit(2)
    acc.fit(2, cbs=GradientAccumulation(32))
    assert m.facts(acc)['clock']['steps'] == m.facts(big)['clock']['steps'] == 8
    for k in ('masks', 'live'): assert_same(m.facts(acc)[k], m.facts(big)[k])
    for n, p in acc.model.named_parameters(): assert torch.allclose(p, big.model.get_parameter(n), rtol=0, atol=tol), n


class Norm(Callback):
    "Norm of the gradients before and after clipping, of what is alive and of everything"
    order, run_valid = 11.5, False
    def __init__(self): self.__dict__['seen'] = []
    def before_step(self):
        self.seen.append(torch.stack([p.grad.norm() for p in self.learn.model.parameters() if p.grad is not None]).norm().item())


@pytest.mark.of(masked=True, dense_state=False) # else gradients stay dense, and are clipped as such
def test_gradient_clip_clips_what_is_alive(m, mk):
    norm, raw, dead = Norm(), Norm(), Norm()
    raw.order, dead.order = 10.9, 10.1  # after the masks and before them
    learn = mk([m.make(), Probe(m)])
    if m.shrinks: learn.fit(1)  # nothing is dead before
    learn.fit(1, cbs=[norm, raw, dead, GradientClip(.2)])
    assert all(a > b for a, b in zip(dead.seen, raw.seen))  # dead weights did have gradients
    assert np.allclose(norm.seen, np.minimum(raw.seen, .2), atol=1e-5) and max(raw.seen) > .2


def test_mixup(m, mk):
    learn = mk([m.make(**m.penalty), Probe(m)])
    learn.fit(2, cbs=MixUp(.4))
    assert m.facts(learn)['clock']['steps'] == 2*N_STEPS


class CPUPrecision(MixedPrecision):
    "fastai's own asks for a GPU; the same on the CPU"
    def before_fit(self):
        super().before_fit()
        half = str(getattr(self.amp_mode, 'value', self.amp_mode)) == 'fp16'
        self.autocast = torch.autocast('cpu', dtype=torch.float16 if half else torch.bfloat16)
        if half: self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**8, growth_interval=10**6)


def spy_penalty(cb):
    "Record what the penalty of `cb` returns, and whether autocast was on then"
    seen, f = [], cb.penalty
    def penalty():
        res = f()
        seen.append((res, torch.is_autocast_enabled('cpu')))
        return res
    cb.__dict__['penalty'] = penalty
    return seen


@pytest.mark.of(masked=True)
def test_autocast_keeps_penalties_in_full_precision(m, mk):
    cb = m.make(**m.penalty)
    seen = spy_penalty(cb)
    learn = mk([cb, Probe(m)])
    learn.fit(1, cbs=CPUPrecision('bf16'))
    assert len(seen) == N_STEPS and all(r.dtype == torch.float32 and not on for r, on in seen)
    exact = sum(e.weight.detach().double().abs().sum() for e in m.on(learn).store.items)*m.penalty['regularizer'].weight
    with torch.autocast('cpu', dtype=torch.bfloat16): got = m.on(learn).penalty()
    assert not torch.is_autocast_enabled('cpu')
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())
    assert abs(float(got)-float(exact)) < 1e-2*float(exact)


class Overflow(Callback):
    "An infinite gradient at some steps, as a loss scale that is too high makes it"
    order, run_valid = 9, False
    def __init__(self, at): self.__dict__.update(at=at, n=0)
    def before_step(self):
        if self.n in self.at: next(self.learn.model.parameters()).grad.fill_(float('inf'))
        self.__dict__['n'] += 1


def test_overflow_counts_no_step(m, mk):
    learn = mk([m.make(stop=1.), Overflow([0, 3, 5])])
    learn.fit(1, cbs=CPUPrecision('fp16'))
    facts = m.facts(learn)
    assert facts['clock']['steps'] == N_STEPS-3
    assert facts['clock']['batches'] == facts['clock']['planned'] == N_STEPS
    m.check(learn)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    steps = [h['step'] for h in facts['history'] if any(h.get('grown', h['dropped']).values())]  # an entry without growth is a last prune
    assert steps == sorted(set(steps)), 'a skipped step rewired again'


class SkipStep(Callback):
    order, run_valid = 10, False
    def before_step(self):
        if self.iter%2: raise CancelStepException

def test_cancelled_steps_count_no_step(m, mk):
    learn = mk([m.make(), SkipStep()])
    learn.fit(2)
    assert m.facts(learn)['clock']['steps'] == N_STEPS
    m.check(learn)


def test_a_batch_cancelled_early_is_still_a_batch(m, mk):
    class Skip(Callback):
        run_valid = False
        def before_batch(self):
            if self.iter == 2: raise CancelBatchException
    learn = mk([m.make(), Probe(m), Skip()])
    learn.fit(1)
    assert m.facts(learn)['clock']['steps'] == N_STEPS-1
    assert m.facts(learn)['clock']['batches'] == N_STEPS


def test_position_is_1_at_the_end_of_a_shortened_fit(m, mk):
    cb = m.make()
    mk(cb).fit(2, cbs=ShortEpochCallback(pct=.5))
    assert cb.effect.clock.pos == 1


@pytest.mark.parametrize('where', ['Learner', 'fit'])
def test_interrupt_in_mid_fit_leaves_a_sound_learner(m, mk, where):
    cb = m.make()
    learn = mk([cb] if where == 'Learner' else None)
    cbs = [cb] if where == 'fit' else []
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=cbs+[Stop(5)])
    assert m.facts(learn)['clock']['steps'] == 4
    learn.fit(2, cbs=cbs+[Probe(m)])
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', *m.columns, 'time']
    assert len(learn.metrics) == 1
    assert m.facts(learn)['clock']['steps'] == 4+2*N_STEPS
    assert m.on(learn).effect.clock.pos == 1
    learn.release()
    assert footprint(learn.model) == footprint(m.net())


# 9. copies -------------------------------------------------------------------------------------------------------------------

def test_export_and_load_in_this_process(m, mk, tmp_path):
    learn = mk([m.make(), Probe(m)], dls=datasets_dls)
    learn.fit(1)
    x = learn.dls.train_ds[0][0]
    preds = learn.predict(x)[2]
    learn.export('it.pkl')
    other = load_learner(tmp_path/'it.pkl')
    assert torch.equal(other.predict(x)[2], preds)
    assert_same(m.facts(other), m.facts(learn))
    facts = m.facts(learn)
    other.release()
    assert footprint(other.model) == footprint(m.net())
    assert_same(m.facts(learn), facts)
    learn.fit(1)  # export has replaced the optimizer


def test_copy_of_a_learner_lives_its_own_life(m, mk):
    learn = mk([m.make(), Probe(m)])
    learn.fit(1)
    other = deepcopy(learn)
    assert_same(m.facts(other), m.facts(learn))
    if m.masked: assert m.on(other).store.items[0].weight is other.model[0][3].weight
    facts, state = m.facts(learn), snapshot(learn.model)
    other.fit(1)
    assert_same(m.facts(learn), facts)
    assert_same(snapshot(learn.model), state)
    other.release()
    learn.fit(1)
    assert m.facts(learn)['clock']['steps'] == 2*N_STEPS


def test_copy_of_a_model_lives_its_own_life(m, mk):
    learn = mk([m.make(), Probe(m)])
    learn.fit(1)
    net = deepcopy(learn.model)
    facts = m.facts(learn)
    st = effects(net)[m.effect]
    assert st is not effects(learn.model)[m.effect] and (st.holder.items[0].module is net[0][3] if m.masked else getattr(st.holder, 'model', net) is net)
    st.release(net)
    assert footprint(net) == footprint(m.net())
    assert_same(m.facts(learn), facts)
    learn.fit(1)
    learn.save('still')
    copy = mk(m.make(), model=deepcopy(learn.model))  # a new Learner on a copy continues
    assert m.facts(copy)['clock']['steps'] == 2*N_STEPS


def test_callback_can_be_pickled(m, mk):
    cb = pickle.loads(pickle.dumps(m.make(period=SchedCubic(1, 3))))
    learn = mk([cb])
    learn.fit(1, cbs=Probe(m))
    learn.remove_cb(cb)
    again = pickle.loads(pickle.dumps(cb))
    learn.fit(1, cbs=[again, Probe(m)])
    assert m.facts(learn)['clock']['steps'] == 2*N_STEPS


@pytest.mark.few(2)
@pytest.mark.of(masked=True, compressed=False)
def test_compiled_model_is_traced_once(m, mk):
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    learn = mk([m.make(), Probe(m)])
    learn.model.compile(backend=counter)
    learn.fit(1)
    n = counter.frame_count
    assert 0 < n <= 2  # training and evaluation
    learn.fit(2)
    assert counter.frame_count == n
    learn.save('compiled')
    plain = mk(m.make())
    plain.load('compiled')
    assert_same(snapshot(plain.model), snapshot(learn.model))
    torch._dynamo.reset()


@pytest.mark.parametrize('kind', ['torch', 'torch buffers', 'timm'])
@pytest.mark.of(masked=True, compressed=False)
def test_moving_averages_follow(m, mk, kind):
    def average(net):
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        if kind == 'timm':
            from timm.utils import ModelEmaV3
            return ModelEmaV3(net, decay=.5)
        return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(.5), use_buffers=kind == 'torch buffers')
    class Average(Callback):
        run_valid = False
        order = 30
        def before_fit(self): self.__dict__['ema'] = average(self.learn.model)
        def after_step(self): (self.ema.update if kind == 'timm' else self.ema.update_parameters)(self.learn.model)
    ema = Average()
    learn = mk([m.make(), Probe(m)])
    learn.fit(2, cbs=ema)
    x = sample_batch(learn.dls, 4)
    out = ema.ema.module.eval()(*x)
    assert torch.isfinite(out).all() and out.shape == (4, 10)
    ref = mk([m.make()])
    ref.fit(2)
    assert_same(snapshot(learn.model), snapshot(ref.model))  # following does not disturb
    mask = m.on(learn).masks
    if not m.moves:
        for n, k in mask.items(): assert not ema.ema.module.get_parameter(n)[~k].any()
    # averaged masks are the union of those seen; copied ones are the newest
    old, new = ema.ema.module.get_buffer('0.3.weight_mask'), learn.model.get_buffer('0.3.weight_mask')
    if m.at_end: assert old.sum() > new.sum() and not (new & ~old).any()  # the last prune came after the last step
    elif kind != 'torch buffers': assert_same(old, new)


# data and networks of other kinds --------------------------------------------------------------------------------------------

@pytest.mark.few(2)
@pytest.mark.of(masked=True)
def test_vision_learner_with_frozen_body(m, tmp_path):
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet18
    seed_all()
    dls = tiny_dls(n=16, n_valid=16, bs=16, chans=3, scale=4)  # one step a fit
    learn = vision_learner(dls, resnet18, pretrained=False, normalize=False, n_out=10, path=tmp_path,
                           cbs=m.make(sparsity=.9, period=1, span='total', epochs=9), metrics=[])
    quiet(learn)
    learn.freeze()
    start = m.facts(learn)
    learn.fit(1)
    m.check(learn)
    mid = m.facts(learn)
    body = [n for n in start['masks'] if n.startswith('0.')]
    assert body and len(body) < len(start['masks'])
    assert_same({n: mid['masks'][n] for n in body}, {n: start['masks'][n] for n in body})
    learn.unfreeze()
    learn.fit(1)
    m.check(learn)
    assert_moved(m, start, m.facts(learn))
    assert m.held_to(m.facts(learn)['live'], start['live'])


@pytest.mark.few(2)
@pytest.mark.of(masked=True)
def test_timm_body_on_one_channel(m, tmp_path):
    from fastai.vision.learner import vision_learner
    seed_all()
    dls = tiny_dls(n=16, n_valid=16, bs=16, scale=4)
    learn = vision_learner(dls, 'resnet10t', pretrained=False, normalize=False, n_in=1, n_out=10, path=tmp_path, cbs=[m.make(sparsity=.9), Probe(m)])
    quiet(learn)
    learn.fit(1)
    assert m.facts(learn)['clock']['steps'] == 1
    r = learn.cost(latency=False)
    assert r.nonzero < (.75 if m.shrinks else .2)*r.params


@pytest.mark.of(folds=False)
def test_tabular(m, tmp_path):
    from fastai.tabular.all import CategoryBlock, Categorify, Normalize, TabularDataLoaders, tabular_learner
    seed_all()
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=r.normal(size=128), b=r.normal(size=128), c=r.choice(list('xyz'), 128)))
    df['y'] = ((df.a+df.b > 0) ^ (df.c == 'x')).astype(str)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['c'], cont_names=['a', 'b'],
        y_names='y', y_block=CategoryBlock, bs=32, num_workers=0)
    learn = tabular_learner(dls, layers=[32, 16], n_out=2, path=tmp_path, cbs=[m.make(sparsity=.5), Probe(m)])
    quiet(learn)
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit_one_cycle(2, 1e-2)
    assert m.facts(learn)['clock']['steps'] == 2*len(dls.train)
    assert not any('embed' in n for n in m.facts(learn)['masks'])


@pytest.mark.of(folds=False)
def test_synthetic_regression(m, tmp_path):
    from fastai.test_utils import synth_learner
    seed_all()
    learn = synth_learner(cbs=None, path=tmp_path)
    learn.model = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1))
    quiet(learn)
    if m.classes:
        with pytest.raises(ValueError, match='no class axis'): learn.fit(2, cbs=m.make())
        return
    learn.fit(2, cbs=[m.make(sparsity=.5), Probe(m)])
    assert m.facts(learn)['clock']['steps'] == 2*len(learn.dls.train)


def net_on_rows(*layers):
    "Digits as sequences of 8 rows of 8 pixels"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.core, self.head = layers[0](), nn.Linear(16, 10)
        def forward(self, x): return self.head(layers[1](self.core, x.view(len(x), 8, 8)).mean(1))
    return Net()


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.att = nn.Linear(8, 16), nn.MultiheadAttention(16, 2, batch_first=True)
    def forward(self, x): return self.att(*[self.up(x)]*3, need_weights=False)[0]


class Tied(nn.Module):
    "Encoder and decoder share one matrix"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.b.weight = self.a.weight
    def forward(self, x): return self.head(self.b(self.a(x.flatten(1)).relu()).relu())


NETS = {
    'lstm': (lambda: net_on_rows(lambda: nn.LSTM(8, 16, batch_first=True), lambda c, x: c(x)[0]), {'core.weight_ih_l0', 'core.weight_hh_l0', 'head.weight'}),
    'gru both ways': (lambda: net_on_rows(lambda: nn.GRU(8, 8, bidirectional=True, batch_first=True), lambda c, x: c(x)[0]), {'core.weight_hh_l0_reverse'}),
    'attention': (lambda: net_on_rows(Attend, lambda c, x: c(x)), {'core.att.in_proj_weight', 'core.att.out_proj.weight', 'core.up.weight'}),
    'transposed': (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 8, 3, groups=2),
    nn.Flatten(), nn.Linear(512, 10)), {'2.weight', '4.weight'}),
    'one dimension': (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 8, 5, stride=2), nn.ReLU(),
    nn.Conv1d(8, 8, 5, stride=2), nn.Flatten(), nn.Linear(104, 10)), {'3.weight', '5.weight'}),
    'depthwise': (lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3, groups=16),
    nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(256, 10)), {'1.weight', '2.weight'}),
    'channels last': (lambda: small_net().to(memory_format=torch.channels_last), {'0.3.weight', '1.2.weight'}),
    'tied': (Tied, {'a.weight', 'head.weight'}),
    'half': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(torch.bfloat16), {'1.weight', '3.weight'}),
    'double': (lambda: small_net().double(), {'0.3.weight'}),
    'bilinear': (lambda: Pair(), {'it.weight'}),
}


def float_loss(pred, targ):
    "fastai's recorder takes no half precision loss"
    return nn.functional.cross_entropy(pred.float(), targ)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.it = nn.Bilinear(32, 32, 10)
    def forward(self, x):
        x = x.flatten(1)
        return self.it(x[:, :32], x[:, 32:])


def of_net(net):
    "What `build` takes for one of `NETS`"
    dtype = {'half': torch.bfloat16, 'double': torch.float64}.get(net, torch.float32)
    return dict(model=NETS[net][0], dls=lambda: tiny_dls(n=64, bs=16, dtype=dtype), **dict(loss_func=float_loss) if net == 'half' else {})


@pytest.mark.parametrize('net', ['half', 'bilinear'])
def test_layers_without_sparse_products(mk, net):
    with pytest.raises(ValueError, match='none of the masked layers can be sparse'): mk(METHODS['csr'].make(), **of_net(net))


@pytest.mark.parametrize('net', [n for n in NETS if n not in ('half', 'bilinear')])
def test_other_layers_of_live_values(mk, net): test_other_layers(METHODS['csr'], mk, net)


@pytest.mark.parametrize('net', NETS)
@pytest.mark.of(masked=True, compressed=False)
def test_other_layers(m, mk, net):
    (make, expected), kw = NETS[net], of_net(net)
    learn = mk([m.make(), Probe(m)], **kw)
    masks = m.facts(learn)['masks']
    assert expected <= set(masks)
    assert 'b.weight' not in masks  # the second name of a tied matrix
    learn.fit(2)
    assert_moved(m, dict(masks=masks), m.facts(learn))
    learn.save('layers')
    other = mk([m.make(), Probe(m)], seed=3, **kw)
    other.load('layers', with_opt=True)
    assert_same(snapshot(other.model), snapshot(learn.model))
    m.check(other)
    other.materialize()
    assert list(other.model.state_dict()) == list(make().state_dict())


@pytest.mark.parametrize('granularity', ['row', 'kernel', 'filter'])
@pytest.mark.parametrize('net', ['plain', 'transposed', 'channels last'])
@pytest.mark.of(masked=True, coarse=True)
def test_coarse_units(m, mk, granularity, net):
    make = small_net if net == 'plain' else NETS[net][0]
    learn = mk([m.make(granularity=granularity, sparsity={'conv': .5, 'fc': .8}, **dict(threshold=.1)
        if m.name in ('dsr', 'csr') else {})], model=make, dls=lambda: tiny_dls(n=64, bs=16))
    live = m.facts(learn)['live']
    learn.fit(2, cbs=Probe(m))
    assert m.held_to(m.facts(learn)['live'], live)
    for n, k in m.on(learn).masks.items():
        if k.ndim == 4 and granularity != 'row':
            units = k.flatten(2) if granularity == 'kernel' else (k.transpose(0, 1) if net == 'transposed' and n == '2.weight' else k).flatten(1)
            assert torch.equal(units.all(-1), units.any(-1)), f'{n}: half a unit'


@pytest.mark.parametrize('granularity', ['row', 'kernel', 'filter'])
@pytest.mark.parametrize('name', ['deepr', 'csr'])
def test_methods_of_single_weights_refuse_larger_units(name, granularity):
    assert [n for n, m in METHODS.items() if m.masked and not m.coarse] == ['deepr', 'csr']
    with pytest.raises(ValueError, match="granularity='weight'"): METHODS[name].make(granularity=granularity)


def test_cast_or_moved_after_masking(m, mk):
    "`model.double()` and `channels_last` after the masks are there"
    learn = mk(m.make())
    learn.model.double()
    learn.dls = tiny_dls(dtype=torch.float64)
    learn.fit(1, cbs=Probe(m))
    learn.model.to(memory_format=torch.channels_last)
    learn.fit(1, cbs=Probe(m))
    assert m.facts(learn)['clock']['steps'] == 2*N_STEPS
