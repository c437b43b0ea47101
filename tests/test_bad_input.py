"""What cannot work is refused before training starts, with layer, value and remedy named, and leaves the network as it was."""
import re
from functools import partial

import pytest
import torch
from torch import nn

from contracts import METHODS, build, footprint, same, small_net, snapshot
from paramfx.core.state import effects
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.sparsify import plan_masks, sparsify
from paramfx.sparse.penalties import L1
from paramfx.core.clock import AllFits
from paramfx.sparse.methods import DSR


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path)


def mask(shape=(12, 8, 3, 3), dtype=torch.bool): return torch.ones(shape, dtype=dtype)


# settings -> what the message has to name: the value (or the layer) and a remedy
BAD = {
    'sparsity of 1': (dict(sparsity=1.), 'sparsity=1.0', r'\[0, 1\)'),
    'sparsity above 1': (dict(sparsity=90), 'sparsity=90', r'\[0, 1\)'),
    'sparsity below 0': (dict(sparsity=-.1), 'sparsity=-0.1', r'\[0, 1\)'),
    'sparsity nan': (dict(sparsity=float('nan')), 'sparsity=nan', r'\[0, 1\)'),
    'sparsity text': (dict(sparsity='.9'), "sparsity='.9'", r'\[0, 1\)'),
    'sparsity none': (dict(sparsity=None), 'sparsity=None', r'\[0, 1\)'),
    'sparsity bool': (dict(sparsity=True), 'sparsity=True', r'\[0, 1\)'),
    'sparsity of a kind': (dict(sparsity={'conv': .5, 'fc': 1.5}), 'fc=1.5', r'\[0, 1\)'),
    'sparsity of no layer': (dict(sparsity={'layer9': .5}), 'layer9', r'0\.3'),
    'sparsity of nothing': (dict(sparsity={}), 'Nothing to mask', 'no sparsity given'),
    'below one unit': (dict(sparsity=.999, granularity='filter'), r'0\.3\.weight.*12 units', 'Lower the sparsity.*exclude'),
    'below one unit in one layer': (dict(sparsity={'0.3': .9999, '1.2': .5}), r'0\.3\.weight', 'exclude'),
    'erk below one unit': (dict(sparsity=.9999, distribution='erk'), 'weight', 'exclude'),
    'erk of a dict': (dict(sparsity={'conv': .5, 'fc': .9}, distribution='erk'), 'erk', 'uniform'),
    'unknown layer': (dict(include='layer9'), 'layer9', r'0\.0, 0\.3, 1\.2'),
    'unknown exclude': (dict(exclude=['0.3', 'nope']), 'nope', r'0\.0, 0\.3, 1\.2'),
    'nothing left': (dict(exclude='*'), 'Nothing to mask', 'include= or exclude='),
    'nothing of this type': (dict(include=nn.LSTM), 'Nothing to mask', 'include= or exclude='),
    'nothing by predicate': (dict(include=lambda n, m: False), 'Nothing to mask', 'include= or exclude='),
    'method': (dict(method='rigged'), "method='rigged'", 'dsr'),
    'granularity': (dict(granularity='channel'), "granularity='channel'", 'kernel'),
    'granularity of wrong pattern': (dict(granularity='4:2', method='static'), "4:2", '0 < n < m'),
    'block of nothing': (dict(granularity='0x4'), "granularity='0x4'", "'RxC'"),
    'block that does not fit': (dict(granularity='4x4', exclude='0.3'), r"1\.\d\.weight: granularity='4x4': "
    r"blocks of 4 by 4.*\(10, ", "another granularity.*exclude='1"),
    'mask that cuts through blocks': (dict(init_mask={'0.3.weight': mask().tril()}, granularity='4x4'), r'0\.3\.weight', "granularity='weight'"),
    'mask of another pattern': (dict(init_mask={'0.3.weight': mask()}, granularity='2:4', method='static'),
    '0\\.3\\.weight does not keep 2 of each 4', "granularity='weight'"),
    'pattern that does not fit': (dict(granularity='3:7', method='static'), r'0\.3\.weight', 'exclude'),
    'distribution': (dict(distribution='er'), "distribution='er'", 'uniform'),
    'init_mask name': (dict(init_mask='magic'), "init_mask='magic'", 'magnitude'),
    'mask of no layer': (dict(init_mask={'2.weight': mask()}), "2.weight", r'There are'),
    'mask shape': (dict(init_mask={'0.3.weight': mask((12, 8))}), r'0\.3\.weight.*\(12, 8\)', r'\(12, 8, 3, 3\)'),
    'mask type': (dict(init_mask={'0.3.weight': mask(dtype=torch.float32)}), r'0\.3\.weight.*float32', 'bool'),
    'mask of another granularity': (dict(init_mask={'0.3.weight': mask().tril()}, granularity='kernel'), r'0\.3\.weight', "granularity='weight'"),
    'mask of zeros': (dict(init_mask={'0.3.weight': ~mask()}), r'0\.3\.weight', ''),
    'grow_init': (lambda: dict(method=DSR(grow_init='ones')), "grow_init='ones'", 'random'),
    'state': (dict(state='reset'), "state='reset'", 'keep'),
    'n_realloc 0': (lambda: dict(method=DSR(n_realloc=0)), 'n_realloc=0', 'above 0'),
    'n_realloc of too many': (lambda: dict(method=DSR(n_realloc=10**6)), 'n_realloc=1000000', 'smaller'),
    'n_realloc fraction of units': (lambda: dict(method=DSR(n_realloc=1.5)), 'n_realloc=1.5', ''),
    'threshold': (lambda: dict(method=DSR(threshold=0.)), 'threshold=0.0', 'above 0'),
    'threshold text': (lambda: dict(method=DSR(threshold='auto')), 'threshold', ''),
    'tol': (lambda: dict(method=DSR(tol=-.1)), 'tol=-0.1', 'above 0'),
    'stop': (dict(stop=0.), 'stop=0.0', 'a float above 0'),
    'stop text': (dict(stop='end'), "stop='end'", 'whole number'),
    'period 0': (dict(period=0), 'period=0', 'at least 1'),
    'period text': (dict(period='each'), 'each', 'number'),
    'l1': (lambda: dict(regularizer=L1(-1.)), r'L1\(-1', 'above 0'),
    'l1 as a number': (dict(regularizer=1e-4), 'regularizer=0.0001', r'L1\(1e-4\)'),
    'l1 nan': (lambda: dict(regularizer=L1(float('nan'))), r'L1\(nan', ''),
    'span': (dict(span='all'), "span='all'", r'AllFits\(90\)'),
    'span without epochs': (lambda: dict(span=AllFits(0)), r'AllFits\(0\)', 'number of epochs'),
}

@pytest.mark.parametrize('case', BAD)
@pytest.mark.parametrize('way', ['cbs', 'fit', 'sparsify'])
def test_wrong_settings_are_refused(mk, case, way):
    kw, value, remedy = BAD[case]
    learn = mk()
    state, feet, cbs, metrics = snapshot(learn.model), footprint(learn.model), list(learn.cbs), list(learn.metrics)
    with pytest.raises(ValueError) as e:
        if callable(kw): kw = kw()  # an object that refuses its settings
        if way == 'cbs': learn.add_cb(DynamicSparse(**kw))
        elif way == 'fit': learn.fit(1, cbs=DynamicSparse(**kw))
        else: learn.sparsify(**kw)
    msg = str(e.value)
    assert re.search(value, msg, re.S) or value in msg, msg
    assert re.search(remedy, msg, re.S), msg
    assert not same(snapshot(learn.model), state)
    assert footprint(learn.model) == feet
    assert list(learn.cbs) == cbs and list(learn.metrics) == metrics
    assert not effects(learn.model) and not hasattr(learn, 'dynamic_sparse')


def test_network_without_layers_is_refused(mk):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    feet = footprint(model)
    with pytest.raises(ValueError, match='Nothing to mask'): mk(DynamicSparse(), model=model)
    with pytest.raises(ValueError, match='Nothing to mask'): sparsify(model, .9)
    with pytest.raises(ValueError, match='first convolution'): sparsify(nn.Sequential(nn.Conv2d(1, 4, 3)), .9)
    assert footprint(model) == feet


def test_unknown_option_names_itself():
    with pytest.raises(TypeError, match='sparsities'): DynamicSparse(sparsities=.9)


@pytest.mark.parametrize('m', METHODS.values(), ids=list(METHODS))
def test_second_instance_with_other_settings(m, mk):
    learn = mk(m.make(), model=m.net)
    state, cbs = snapshot(learn.model), list(learn.cbs)
    with pytest.raises(ValueError, match=rf'(?s){m.told}.*learn\.release'): learn.add_cb(m.other())
    assert not same(snapshot(learn.model), state)
    assert list(learn.cbs) == cbs


def test_verb_on_a_masked_model_is_refused(mk):
    learn = mk(DynamicSparse(.8))
    state = snapshot(learn.model)
    with pytest.raises(ValueError, match='release'): sparsify(learn.model, .8)
    assert not same(snapshot(learn.model), state)


def test_parametrized_layers_are_named_and_left(mk):
    "Their weight is no parameter of theirs"
    model = small_net()
    nn.utils.parametrizations.weight_norm(model[1][2])
    rows = plan_masks(model)
    assert [r['note'] for r in rows if r['layer'] == '1.2'] == ['no weight of its own (parametrized, or weight_norm: remove it first)']
    assert [r['layer'] for r in rows if 'live' in r] == ['0.3.weight']


def test_plan_says_what_is_skipped_and_why():
    rows = {r['layer']: r for r in plan_masks(small_net(), .5, exclude='1.2')}
    assert rows['0.3.weight']['live'] == 432 and 'first convolution' in rows['0.0']['note'] and rows['1.2']['note'] == 'excluded'
