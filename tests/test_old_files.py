"""Files that version 0.0.1 wrote when all modules lay in one folder are read as before.

`files/before_packages.zip` holds, per method of the contracts, a file of `learn.save`, one of `RunState` after the first of two
epochs, a recipe, and what the network said; besides, recipes of each verb, sparse files and all slices in one file."""
import zipfile
from pathlib import Path

import pytest
import torch
from fastai.basics import SGD
from functools import partial

import paramfx.all # gives Learner the verbs  # noqa: F401
from contracts import METHODS, based_net, build, small_net
from paramfx.core.runs import RunState
from paramfx.core.clock import AllFits
from paramfx.core.state import effects
from paramfx.export.materialize import load_recipe, save_recipe
from paramfx.slicing.files import load_slice
from paramfx.sparse.files import load_sparse
from paramfx.sparse.penalties import L1, GroupLasso

OLD = Path(__file__).parent/'files'/'before_packages.zip'
VERBS = dict(cut=small_net, tie=small_net, untied=small_net, share_bases=based_net, folded=based_net, slice=small_net,
             split=small_net, frozen=small_net)


@pytest.fixture(scope='module')
def old(tmp_path_factory):
    path = tmp_path_factory.mktemp('old')
    with zipfile.ZipFile(OLD) as z: z.extractall(path)
    return path


@pytest.fixture(scope='module')
def facts(old): return torch.load(old/'facts.pth', weights_only=True)


def says(model, x):
    with torch.no_grad(): return model.eval()(x)


def learner(path, name):
    m = METHODS[name]
    return build(path, cbs=m.make(), model=m.net, opt_func=partial(SGD, mom=.9) if name == 'snfs' else SGD)


def plain_base(name):
    "The network that a method's recipe begins with"
    return small_net() if name != 'ortho_reg' else unshared()


def unshared():
    "`based_net` before its layers share a basis"
    from torch import nn
    net = small_net()
    for _ in range(2): net[0].extend(nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()))
    return net


@pytest.mark.parametrize('name', METHODS)
def test_saved_weights(name, old, facts, tmp_path):
    learn = learner(tmp_path, name)
    learn.load(old/f'{name}_saved', with_opt=False)
    torch.testing.assert_close(says(learn.model, facts['x']), facts[name]['preds'])


@pytest.mark.parametrize('name', METHODS)
def test_interrupted_runs_go_on(name, old, facts, tmp_path):
    learn = learner(tmp_path, name)
    learn.resume(old/f'{name}_run.pth')
    learn.fit(2, cbs=RunState(str(tmp_path/'run')))
    torch.testing.assert_close(says(learn.model, facts['x']), facts[name]['preds'])


@pytest.mark.parametrize('name', [n for n in METHODS if n != 'csr'])
def test_recipes_of_methods(name, old, facts):
    new = load_recipe(old/f'{name}_recipe.pth', plain_base(name))
    torch.testing.assert_close(says(new, facts['x']), facts[name]['preds'])


@pytest.mark.parametrize('name', VERBS)
def test_recipes_of_verbs(name, old, facts):
    net = unshared() if VERBS[name] is based_net else small_net()
    new = load_recipe(old/f'{name}_recipe.pth', net)
    torch.testing.assert_close(says(new, facts['x']), facts[name]['preds'])


@pytest.mark.parametrize('name', ['dsr', 'csr'])
def test_sparse_files(name, old, facts):
    net = small_net()
    load_sparse(old/f'{name}_sparse.safetensors', net)
    torch.testing.assert_close(says(net, facts['x']), facts[name]['preds'])


def test_slices(old, facts):
    net = load_slice(old/'all_slices.safetensors', 1, small_net())
    torch.testing.assert_close(says(net, facts['x']), facts['slice_train']['preds'])
    assert says(load_slice(old/'all_slices.safetensors', .25, small_net()), facts['x']).shape == (8, 10)


@pytest.mark.parametrize('kw,penalty,span', [
    (dict(l1=.1, span='total', epochs=9), L1(.1), AllFits(9)), (dict(l1=0., span='fit', epochs=None), None, 'fit'),
    (dict(regularizer=dict(name='GroupLasso', weight=.1), span=dict(name='AllFits', epochs=9)), GroupLasso(.1), AllFits(9))])
def test_settings_of_pruning_in_a_recipe(kw, penalty, span, tmp_path):
    "Flat ones of version 0.0.1, and those of now: as name and settings, and written so again"
    steps = [dict(verb='iterative_prune', args=dict(target=.5, n_prunes=2, include=['0.3', '1.2'], **kw))]
    net = load_recipe(steps, small_net())
    got = effects(net)['iterative_prune'].settings
    assert (got['regularizer'], got['span']) == (penalty, span)
    again = load_recipe(save_recipe(net, tmp_path/'again.pth'), small_net())
    assert effects(again)['iterative_prune'].settings == got


def test_a_recipe_does_not_choose_what_is_made():
    steps = [dict(verb='iterative_prune', args=dict(target=.5, include=['0.3'], regularizer=dict(name='Path', weight=1)))]
    with pytest.raises(ValueError, match="'Path' is no known setting: L1, GroupLasso"): load_recipe(steps, small_net())
