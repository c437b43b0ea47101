"The published recipes by their numbers, written down here once more, and what they come to in a run."
import json

import pytest
import torch
from fastai.basics import Callback, Learner, set_seed
from fastai.callback.progress import ProgressCallback

from paramfx import zoo
from paramfx.core.clock import as_sched
from paramfx.data.memory import digits_dls, tensor_dls
from paramfx.zoo.networks import lenet_300_100
from paramfx.sparse.prune import IterativePrune
from paramfx.sparse.methods import DSR, METHODS, DeepR, Static
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.published import PUBLISHED_DENSE, PUBLISHED_RECIPES, RECIPE_METHODS, sparse_recipe
from paramfx.sparse.penalties import L1

MNIST, WRN, RESNET = 'mnist/lenet_300_100', 'cifar10/wrn_28_2', 'imagenet/resnet50'
LIVE = {
    MNIST: {.9: 26_620, .95: 13_310, .96: 10_648, .97: 7986, .98: 5324, .99: 2662},
    WRN: {.5: 725_760, .6: 580_597, .7: 435_442, .8: 290_294, .9: 145_139},
    RESNET: {.8: 4_544_896, .9: 2_272_437},
}
DENSE = {MNIST: 820, WRN: 16_090, RESNET: 2_832_424}
# network, method -> epochs, weight decay, learning rates
TRAIN = [
    (MNIST, ('dense', 'static', 'set'), 100, 1e-4, {0: .1, 25: .02, 50: .004, 75: .0008}),
    (MNIST, ('dsr', 'deepr'), 100, 0, {0: .1, 25: .02, 50: .004, 75: .0008}),
    (MNIST, ('prune',), 39, 1e-4, {0: 0, 1: .02, 15: .02, 25: .004, 35: .0008}),
    (WRN, ('dense', 'set', 'dsr'), 200, 5e-4, {0: .1, 60: .02, 120: .004, 160: .0008}),
    (WRN, ('deepr',), 200, 0, {0: .1, 60: .02, 120: .004, 160: .0008}),
    (WRN, ('static', 'thin'), 400, 5e-4, {0: .1, 120: .02, 220: .004, 350: .0008}),
    (WRN, ('prune',), 48, 5e-4, {0: 0, 1: .02, 15: .02, 25: .004, 35: .0008}),
    (RESNET, ('dense', 'set', 'dsr'), 100, 1e-4, {0: .1, 30: .01, 60: .001, 90: .0001}),
    (RESNET, ('deepr',), 100, 0, {0: .1, 30: .01, 60: .001, 90: .0001}),
    (RESNET, ('static', 'thin'), 200, 1e-4, {0: .1, 60: .01, 120: .001, 180: .0001}),
    (RESNET, ('prune',), 48, 1e-4, {0: 0, 1: .01, 15: .01, 25: .001, 35: .0001}),
]
PERIOD = {MNIST: {0: 100, 25: 200, 50: 400, 75: 800}, WRN: {0: 100, 25: 200, 80: 400, 140: 800}, RESNET: {0: 1000, 25: 2000, 50: 4000, 75: 8000}}
TEMPERATURE = {MNIST: {0: 1e-3, 25: 1e-4, 50: 1e-5, 75: 1e-6}, WRN: {0: 1e-5, 25: 1e-8, 80: 1e-12, 140: 1e-15},
    RESNET: {0: 1e-5, 25: 1e-8, 50: 1e-12, 75: 1e-15}}
STOP, N_P, BS = {MNIST: 90, WRN: 190, RESNET: 95}, {MNIST: 600, WRN: 20_000, RESNET: 400_000}, {MNIST: 100, WRN: 100, RESNET: 256}


@pytest.mark.parametrize('network,method,epochs,wd,lr', [(n, m, e, wd, lr) for n, ms, e, wd, lr in TRAIN for m in ms])
def test_training(network, method, epochs, wd, lr):
    r = sparse_recipe(network, method, .9)
    assert (r.epochs, r.wd, r.lr, r.loader['bs']) == (epochs, wd, lr, BS[network])
    assert r.sparsity == (0 if method == 'dense' else .9)
    sched = as_sched(r.lr, r.epochs)
    for e in range(epochs): assert sched(e/epochs) == lr[max(k for k in lr if k <= e)]


def test_every_method_is_checked():
    assert {(n, m) for n, ms, *_ in TRAIN for m in ms} | {(MNIST, 'thin')} == {(n, m) for n in PUBLISHED_RECIPES for m in RECIPE_METHODS}


@pytest.mark.parametrize('network', PUBLISHED_RECIPES)
def test_moves(network):
    get = lambda method, **kw: sparse_recipe(network, method, .9, **kw).settings
    for method in ('dsr', 'set', 'deepr'):
        s = get(method)
        assert (s['method'].name, s['sparsity'], s['stop']) == (method, .9, STOP[network])
        assert s.get('period') == (None if method == 'deepr' else PERIOD[network])
    assert get('dsr')['method'] == DSR(n_realloc=N_P[network]) and get('dsr').get('regularizer') == (L1(1e-4) if network == MNIST else None)
    assert get('dsr', granularity='kernel')['method'].n_realloc == {MNIST: 600, WRN: 2000, RESNET: 40_000}[network]
    d = get('deepr')
    assert d['method'] == DeepR(eta=.001 if network == MNIST else .01, temperature=TEMPERATURE[network], noise='grad', sign='first_step')
    assert d['regularizer'] == L1(1e-4 if network == MNIST else 1e-5)
    assert get('static')['method'] == Static() and 'regularizer' not in get('static')


def test_the_share_that_set_drops():
    for s, f in {.9: .138, .8: .07, .7: .046, .6: .034, .5: .028}.items(): assert sparse_recipe(WRN, 'set', s).settings['method'].drop_frac == f
    for s, f in {.8: .089, .9: .14}.items(): assert sparse_recipe(RESNET, 'set', s).settings['method'].drop_frac == f
    for s, n in LIVE[MNIST].items(): assert sparse_recipe(MNIST, 'set', s).settings['method'].drop_frac*n == pytest.approx(600)
    assert sparse_recipe(WRN, 'set', .95).settings['method'].drop_frac*.05*1_451_520 == pytest.approx(20_000)


@pytest.mark.parametrize('network', PUBLISHED_RECIPES)
def test_counts_to_the_unit(network):
    net = zoo.build(network)
    total = sum(p.numel() for p in net.parameters())
    for s, n in LIVE[network].items():
        for method in ('static', 'dsr', 'set', 'prune'):
            rows = [r for r in sparse_recipe(network, method, s).callback().plan(net) if 'live' in r]
            assert sum(r['live'] for r in rows) == n
            assert total-sum(r['units'] for r in rows) == DENSE[network]
    units = sum(r['units'] for r in rows)
    assert PUBLISHED_RECIPES[network]['weights'] == units


@pytest.mark.parametrize('network,counts', [
    (WRN, {.9: 209_130, .8: 356_376, .7: 491_845, .6: 652_093, .5: 795_477}), (RESNET, {.8: 8_167_095, .9: 5_771_217})])
def test_thin_networks(network, counts):
    for s, n in counts.items(): assert sum(p.numel() for p in zoo.build(**sparse_recipe(network, 'thin', s).build).parameters()) == n


def test_targets_of_the_mlp():
    "The last layer has 100 live weights at any target above .9, and the first two share the rest evenly"
    assert sparse_recipe(MNIST, 'prune', .9).settings['target'] == .9
    for s in (.95, .98, .99, .935):
        t = sparse_recipe(MNIST, 'prune', s).settings['target']
        assert t['fc3'] == .9 and abs(t['fc1']-t['fc2']) < 1/30_000 and abs(t['fc1']-(s*266_200-900)/265_200) < 1/30_000
    cb = sparse_recipe(MNIST, 'prune', .98).callback()
    assert [e for e in range(39) if cb.falls_on(e)][:10] == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19] and cb.n_prunes == 10 and cb.schedule == 'exponential'
    wide = sparse_recipe(WRN, 'prune', .9).callback()
    assert (wide.start, wide.every, wide.post, wide.n_prunes, wide.schedule) == (0, 2, 10, 20, 'cubic')


def test_callbacks_are_fresh_and_complete():
    r = sparse_recipe(MNIST, 'dsr', .98, seed=4)
    a, b = r.callback(), r.callback()
    assert a is not b and isinstance(a, DynamicSparse) and a.settings == b.settings and a.seed == 4
    assert [type(c).__name__ for c in r.cbs()] == ['DynamicSparse', 'ParamScheduler']
    assert isinstance(sparse_recipe(MNIST, 'prune', .98).callback(), IterativePrune)
    assert [len(sparse_recipe(WRN, m, .9).cbs()) for m in ('dense', 'thin')] == [1, 1]
    if 'deepr' in METHODS:
        for n in PUBLISHED_RECIPES: assert sparse_recipe(n, 'deepr', .9).callback().method.name == 'deepr'


def test_what_was_printed():
    assert sparse_recipe(MNIST, 'prune', .98).published['top1'] == 98.12
    assert sparse_recipe(WRN, 'dsr', .9).published['spread'] == .17
    assert sparse_recipe(MNIST, 'dense').published['top1'] == 98.69
    assert sparse_recipe(RESNET, 'thin', .8).published['width'] == .54
    assert sparse_recipe(MNIST, 'dsr', .5).published == {}


def test_changes():
    r = sparse_recipe(MNIST, 'deepr', .9, epochs=50, wd=.1, bs=32, eta=.5)
    assert (r.epochs, r.wd, r.loader, r.settings['method'].eta, r.settings['stop']) == (50, .1, dict(bs=32), .5, 45)
    assert r.lr == {0: .1, 12.5: .02, 25: .004, 37.5: .0008} and list(r.settings['method'].temperature) == [0, 12.5, 25, 37.5]
    assert sparse_recipe(MNIST, 'dsr', epochs=1).settings['stop'] == 1
    assert sparse_recipe(WRN, 'dsr', epochs=29).lr.keys() == {0, 8.7, 17.4, 23.2}
    r = sparse_recipe(MNIST, 'dsr')
    r.lr[0] = r.settings['period'][0] = r.loader['bs'] = 7
    assert sparse_recipe(MNIST, 'dsr').settings['period'][0] == sparse_recipe(MNIST, 'dsr').loader['bs'] == 100
    assert PUBLISHED_RECIPES[MNIST]['train']['lr'] == {0: .1, 25: .02, 50: .004, 75: .0008}  # the source stays
    assert sparse_recipe(MNIST, 'prune', n_prunes=3, every=1, post=2).epochs == 5
    assert sparse_recipe(MNIST, 'dsr', stop=3, epochs=10).settings['stop'] == 3


def test_files_of_schedules(tmp_path):
    f = tmp_path/'s.yaml'
    f.write_text('lr: {0: .5, 2: .05}\nDeepR_temperature_schedule: [[0, .1], [2, .01]]\n')
    r = sparse_recipe(MNIST, 'deepr', steps=f, epochs=10)
    assert r.lr == {0: .5, 2: .05} and r.settings['method'].temperature == {0: .1, 2: .01}
    with pytest.raises(ValueError, match="setting='temperature'"): sparse_recipe(MNIST, 'prune', steps=f)
    assert sparse_recipe(MNIST, 'dense', steps='lr: {0: .5}', lr=.1).lr == .1  # what is given by name goes first


@pytest.mark.parametrize('args,kw,text', [
    (('mnist',), {}, "network='mnist': choose one of mnist/lenet_300_100"), ((MNIST, 'rigl'), {}, "method='rigl': choose one of dense"),
    ((MNIST, 'dsr', 1.), {}, 'sparsity=1.0'), ((MNIST, 'dense', .9), dict(l1=1.), "setting='l1': choose one of epochs, wd, lr"),
    ((MNIST, 'prune'), dict(epochs=4), "setting='epochs'"), ((MNIST, 'dsr'), dict(epochs=2.5), 'epochs=2.5'), ((MNIST, 'set'), dict(epochs=True),
        'epochs=True'),
    ((WRN, 'thin', .95), {}, 'sparsity of a thin network=0.95: choose one of 0.9, 0.8'), ((MNIST, 'prune'), dict(n_prunes=0), 'n_prunes=0')])
def test_bad_input(args, kw, text):
    with pytest.raises(ValueError) as e: sparse_recipe(*args, **kw)
    assert text in str(e.value)


def fitted(recipe, dls, model=None, **kw):
    set_seed(0)
    dls.train.rng.seed(0)
    learn = recipe.learner(dls, model or lenet_300_100(n_in=64), **kw).remove_cb(ProgressCallback)
    with learn.no_logging(): return recipe.fit(learn)


class Seen(Callback):
    "A callback of the user's"
    n = 0
    def after_epoch(self): self.n += 1


def test_a_fit_with_masks_from_before_equals_one_that_masks():
    "`learner` masks at once and `fit` brings the callback again: the same bits as when `fit` alone brings it"
    dls, r = digits_dls(bs=64, device='cpu'), sparse_recipe(MNIST, 'dsr', .9, epochs=4, period=7, n_realloc=.1)
    a = fitted(r, dls)
    set_seed(0)
    dls.train.rng.seed(0)
    b = Learner(dls, lenet_300_100(n_in=64), opt_func=r.opt_func).remove_cb(ProgressCallback)
    seen = Seen()
    with b.no_logging(): r.fit(b, seen)
    assert all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))
    assert seen.n == 4 and a.dynamic_sparse.history == b.dynamic_sparse.history and len(a.dynamic_sparse.history) == (3*22-1)//7


def test_another_recipe_is_not_taken_for_this_one():
    learn = sparse_recipe(MNIST, 'dsr', .9, n_realloc=.1).learner(digits_dls(device='cpu'), lenet_300_100(n_in=64))
    with pytest.raises(ValueError, match='other settings'): sparse_recipe(MNIST, 'dsr', .8, n_realloc=.1).fit(learn)


def test_published_network_on_other_data():
    "As many outputs as there are classes"
    x, y = torch.rand(40, 1, 28, 28), torch.arange(40) % 4
    r = sparse_recipe(MNIST, 'set', .9, epochs=2, period=1)
    learn = r.learner(tensor_dls(x, y, x, y, bs=10, device='cpu')).remove_cb(ProgressCallback)
    with learn.no_logging(): r.fit(learn)
    assert learn.model.fc3.out_features == 4 and learn.dynamic_sparse.store.live == 23_520+3000+40


def test_weight_decay_reaches_all_parameters():
    "One group of torch's SGD holds them all"
    learn = fitted(sparse_recipe(MNIST, 'dense', epochs=1), digits_dls(device='cpu'))
    g, = learn.opt.opt.param_groups
    assert (g['weight_decay'], g['momentum'], g['nesterov'], len(g['params'])) == (1e-4, .9, True, len(list(learn.model.parameters())))


def test_shows_what_it_says():
    r = sparse_recipe(MNIST, 'dsr', .98)
    assert repr(r) == "SparseRecipe('mnist/lenet_300_100', 'dsr', 0.98: 100 epochs, wd 0)"
    assert 'n_realloc=600' in r._repr_markdown_() and {o['what'] for o in r.table()} >= {'epochs', 'lr', 'wd', 'bs', 'period', 'regularizer'}
    json.loads(r.table().to_json())


def test_names_of_the_dense_layers_exist():
    for n in (WRN, RESNET):
        rows = [r for r in sparse_recipe(n, 'dsr', .9).callback().plan(zoo.build(n)) if r.get('note') == 'excluded']
        assert len(rows) == {WRN: 4, RESNET: 4}[n] and PUBLISHED_DENSE[n.split('/')[1]]
