"""Channel maps against two independent oracles, and exact cuts through two libraries of networks.

The networks of the whole sweep are in `benchmarks/results/channels_sweep.json`, made by `python -m benchmarks.channels.channels`."""
import json
import re
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from fastai.tabular.model import TabularModel
from fastai.vision.learner import create_vision_model
from fastai.vision.models.xresnet import xresnet18
from torch import nn

from benchmarks.channels import channels
from benchmarks.timing import RESULTS
from oracles import Coupled, cut_channels, disagreements, last_producer, nan_probe, prefix, unit_channels
from paramfx.channels.trace import trace_channels

RATES = .25, .5, .75


def pictures(n=2): return (torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(0)),)


def make(name):
    "A network with random weights and its inputs"
    if name == 'tabular': # two embeddings, three numbers
        model,xs = TabularModel([(9, 5), (4, 3)], 3, 2, [40, 20]), (torch.arange(12).view(6, 2)%4, torch.randn(6, 3))
    elif name == 'xresnet18': model,xs = xresnet18(n_out=10), pictures()
    elif name == 'vision learner': model,xs = create_vision_model(tv.resnet18, 10, pretrained=False), pictures()
    elif name == 'resnest14d': model,xs = timm.create_model(name), pictures()
    else: model,xs = tv.get_model(name, weights=None, **(dict(aux_logits=False, init_weights=False) if name == 'googlenet' else {})), pictures()
    return channels.fill(model), xs


def regnet_unit(name):
    "Rows of RegNet-Y 400MF that only go eight at a time: what its grouped convolutions read, and the gates on what they produce"
    return 8 if re.search(r'\.f\.(a\.0|se\.fc2)$', name) else 1


# network -> checks: two sides of each convolution, linear layer and batch norm, at three rates
PROBED = {'resnet18': 246, 'resnext50_32x4d': 642, 'vgg11_bn': 114, 'densenet121': 1452, 'googlenet': 690, 'mobilenet_v3_small': 528,
          'efficientnet_b0': 786, 'squeezenet1_1': 156, 'regnet_y_400mf': 834, 'xresnet18': 270, 'vision learner': 264, 'tabular': 36}


@pytest.mark.few(3)
@pytest.mark.parametrize('name', PROBED)
def test_nan_probe_reads_the_same_channels(name):
    "Each layer keeps the first rows; where its NaNs arrive, the cut removes columns, and nowhere else"
    model,xs = make(name)
    cmap,last,n = trace_channels(model, xs),last_producer(model, xs),0
    for r in RATES:
        k,bad = disagreements(model, xs, cmap, cmap.cut(r, whole='keep'), prefix(r, last, regnet_unit if 'regnet' in name else lambda n: 1))
        assert not bad, f'rate {r}: {bad[:5]}'
        n += k
    assert n == PROBED[name]


@pytest.mark.few(3)
@pytest.mark.parametrize('name', [*PROBED, 'shufflenet_v2_x0_5', 'resnest14d'])
def test_nan_probe_follows_any_units(name):
    "Other units in each space, as many as it likes: the probe is told which rows go, and finds the columns that the cut removes"
    model,xs = make(name)
    cmap,rng = trace_channels(model, xs),np.random.default_rng(0)
    for _ in range(2):
        cut = cmap.cut(lambda s: np.sort(rng.permutation(s.size)[:max(1, int(s.size*rng.uniform(.2, .9)))]), whole='keep')
        rows = {m: np.flatnonzero(~v['out']) for m,v in cut_channels(cmap, cut).items()}
        n,bad = disagreements(model, xs, cmap, cut, lambda name, m, n: rows[name])
        assert not bad and n >= PROBED.get(name, 3)//3, bad[:5]


def test_probe_sees_a_wrong_map():
    "One column attributed to another channel, and a concatenation in the wrong order"
    for name,layer in (('resnet18', 'layer3.0.conv1'), ('densenet121', 'features.denseblock2.denselayer5.norm1'), ('googlenet', 'inception4b.branch1.conv')):
        model,xs = make(name)
        cmap,last = trace_channels(model, xs),last_producer(model, xs)
        wrong = deepcopy(cmap)
        for (m,t,d),(kind,lab) in wrong.bindings.items():
            if m == layer and kind in ('cols', 'pass'): lab[[0, -1]] = lab[[-1, 0]] if name == 'resnet18' else lab[[len(lab)//3, len(lab)//3]]
        check = lambda cm: disagreements(model, xs, cm, cm.cut(.5), prefix(.5, last))[1]
        assert not check(cmap) and {m for m,_ in check(wrong)} == {layer}


def test_probe_finds_what_a_grouped_layer_cannot_lose():
    conv = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1)).eval()
    with pytest.raises(AssertionError, match='1: its groups are left with different shapes'):
        nan_probe(conv, pictures(), lambda name, m, n: [0] if name == '0' else [])
    with pytest.raises(AssertionError, match='NaN in the output'): nan_probe(conv, pictures(), lambda name, m, n: [0] if name == '2' else [])
    live = nan_probe(conv, pictures(), lambda name, m, n: {'0': [0, 1, 2, 3], '1': None, '2': []}[name])
    assert live['1'][1].tolist() == live['2'][0].tolist() == [False]*4 + [True]*4
    live = nan_probe(conv, pictures(), lambda name, m, n: {'0': [1, 5], '1': [0, 4], '2': []}[name])
    assert live['1'][0].tolist() == [True, False, True, True]*2 and live['2'][0].tolist() == [False, True, True, True]*2


# network without grouped convolutions, depthwise ones aside -> units compared
COUPLED = {'resnet18': 36, 'vgg11_bn': 30, 'densenet121': 356, 'googlenet': 168, 'mobilenet_v3_small': 79, 'efficientnet_b0': 117,
           'squeezenet1_1': 73, 'mnasnet0_5': 73, 'resnet50': 110}


def couplings(model, xs, cmap):
    "First, last and another unit of each space: what goes with it by the map, and by Torch-Pruning"
    ask,rng = Coupled(model, xs),np.random.default_rng(0)
    for s in cmap.cuttable:
        name = s.producers[0]
        for u in sorted({0, s.size-1, int(rng.integers(s.size))}):
            row = int(np.flatnonzero(cmap.bindings[name, 'weight', 0][1] == cmap.units[cmap.find(s)][u])[0])
            yield (s.name, u), unit_channels(cmap, s, u), ask(name, row)


@pytest.mark.few(3)
@pytest.mark.parametrize('name', COUPLED)
def test_torch_pruning_couples_the_same_channels(name):
    model,_ = make(name)
    cmap = trace_channels(model, pictures(1))
    found = list(couplings(model, pictures(1), cmap))
    assert not [at for at,ours,theirs in found if ours != theirs]
    assert len(found) == COUPLED[name] and min(len(ours) for _,ours,_ in found) >= 2


def test_torch_pruning_sees_a_wrong_map():
    model,_ = make('googlenet')
    cmap = trace_channels(model, pictures(1))
    lab = cmap.bindings['inception4b.branch1.conv', 'weight', 1][1]
    lab[:] = np.roll(lab, 1)
    assert {at[0] for at,ours,theirs in couplings(model, pictures(1), cmap) if ours != theirs} == {
        f'inception4a.branch{b}.conv' for b in ('1', '2.1', '3.1', '4.1')}


# --- the sweep: what the checked-in table says, and whether it is still true

REFUSED = { # network -> part of the reason; all others are exact
    'timm/ecaresnet26t': 'reads them as positions', # a convolution over the channels
    'timm/resnetv2_50x1_bit': 'Nothing to cut', # weights are standardized over what they read
    'timm/res2net50_26w_4s': 'takes them at fixed positions (split)', # the width is a number in the code
    'timm/resnest14d': 'binds the channels of a group', # two groups that are then added
    'timm/dpn68': 'takes them at fixed positions (__getitem__)', # the width is a number in the code
    'timm/nfnet_l0': 'combines them with channels that stay whole', # weights are standardized over what they read
    'timm/convnextv2_atto': 'normalizes over all channels'} # the response norm reads all of them
FAST = '''torchvision/resnet18 torchvision/resnext50_32x4d torchvision/densenet121 torchvision/googlenet torchvision/mobilenet_v3_small
 torchvision/efficientnet_b0 torchvision/shufflenet_v2_x0_5 torchvision/squeezenet1_1 torchvision/regnet_y_400mf torchvision/mnasnet0_5
 torchvision/convnext_tiny torchvision/inception_v3 timm/resnet26d timm/seresnet18 timm/skresnet18 timm/ghostnet_100 timm/mobilenetv4_conv_small
 timm/ese_vovnet19b_dw timm/repvgg_a0 timm/dla34'''.split() + list(REFUSED)


def key(row): return f"{row['library']}/{row['network']}"


@pytest.fixture(scope='module')
def rows(): return {key(r): r for r in json.loads((RESULTS/'channels_sweep.json').read_text())['rows']}


def test_the_table_holds_every_network(rows):
    assert list(rows) == [f'{lib}/{name}' for lib,_,name in channels.networks()]
    assert Counter(r['library'] for r in rows.values()) == dict(torchvision=68, timm=25)
    assert len({r['family'] for r in rows.values() if r['library'] == 'timm'}) == 25


def test_the_table_counts(rows):
    exact = Counter(r['library'] for r in rows.values() if r['verdict'] == 'exact')
    assert exact['torchvision'] >= 60 and exact['timm'] >= 18
    assert {k for k,r in rows.items() if r['verdict'] != 'exact'} == set(REFUSED)
    for k,why in REFUSED.items(): assert rows[k]['verdict'] == 'refused' and why in rows[k]['reason']


def test_the_table_is_judged_by_its_numbers(rows):
    for r in rows.values():
        assert channels.judge(r) == r['verdict']
        if r['verdict'] == 'exact': assert r['coverage'] >= .9 and r['f32'] <= 1e-5 and r['f64'] <= 1e-12 and r['left'] < .6
        if r['f32'] != '': assert min(r['depends'], r['changed']) >= channels.DEPENDS
    good = next(iter(rows.values()))
    for bad in (dict(f32=2e-5), dict(f64=2e-12), dict(f32=float('nan')), dict(depends=0.), dict(changed=0.)): assert channels.judge(good | bad) == 'wrong'
    assert channels.judge(good | dict(coverage=.89)) == channels.judge(good | dict(f32='')) == 'refused'


def assert_same(new, old):
    assert {k: new[k] for k in ('verdict', 'spaces', 'reason')} == {k: old[k] for k in ('verdict', 'spaces', 'reason')}
    assert (new['coverage'], new['left']) == (pytest.approx(old['coverage'], abs=1e-9),
        pytest.approx(old['left'], abs=1e-9)) if old['f32'] != '' else new['f32'] == ''


@pytest.mark.few(3)
@pytest.mark.parametrize('name', FAST)
def test_a_part_of_the_sweep(name, rows): assert_same(*channels.sweep([name]), rows[name])


@pytest.mark.slow
@pytest.mark.parametrize('name', [k for k in (f'{lib}/{n}' for lib,_,n in channels.networks()) if k not in FAST])
def test_the_rest_of_the_sweep(name, rows): assert_same(*channels.sweep([name]), rows[name])


def test_the_sweep_sees_a_wrong_cut(monkeypatch):
    "Columns of the wrong channels: same shapes, other numbers"
    from paramfx.channels.cuts import Cut
    index = Cut.index
    def shifted(self, lab):
        i = index(self, lab)
        return i if i is None or len(i) < 200 else (i+1)%len(lab)
    monkeypatch.setattr(Cut, 'index', shifted)
    row, = channels.sweep(['torchvision/resnet18'])
    assert row['verdict'] == 'wrong' and row['f64'] > 1e-3


@pytest.mark.slow
def test_timing_table():
    rows = json.loads((RESULTS/'channels.json').read_text())['rows']
    assert [r['step'] for r in rows] == ['forward', 'trace_channels', 'ChannelMap.cut', 'Cut.apply(check=False)', 'Cut.apply']
    assert all(r['met'] == ('yes' if r['ms'] <= r['target_ms'] else 'no') for r in rows if r['target_ms'] != '')
    quick = channels.timing(rounds=1, name='squeezenet1_1')
    assert [r['step'] for r in quick] == [r['step'] for r in rows]
