"""The static half of Knowledge Evolution against the golden vectors of its original code: masks bit for bit, sizes of slim networks,
what a boundary between two generations keeps and changes. Trajectory, schedules and losses are tested with what trains."""
import base64
import hashlib
from math import ceil

import numpy as np
import pytest
import torch
from torch import nn

from paramfx.evolution.masks import extract_slim, fit_cut, kels_masks, reinit_, wels_masks
from paramfx.core.forward import check_same
from paramfx.report.cost import layer_macs, n_params
from paramfx.core.samples import generator
from test_golden_channels import TINY, build, kept, read

FILES = ['kels_resnet18.json', 'kels_resnet50.json', 'kels_googlenet.json', 'kels_densenet121.json.gz']
DERIVED = ['mobilenet_v2 0.5', 'mobilenet_v2 0.3', 'squeezenet1_1 0.3', 'resnext50_32x4d 0.5', 'vision_learner_resnet18 0.5', 'xresnet18 0.3']
SIZES = [f'{a} {r}' for a in ('resnet18', 'resnet50', 'densenet121', 'googlenet') for r in (.2, .5, .8)] + ['resnet18 0.3', 'resnet18 0.5 100']


def sha(mask): return hashlib.sha256(np.packbits(mask.numpy().ravel()).tobytes()).hexdigest()[:16]


def small(arch, classes, value=.01):
    "A network whose numbers are all the same: only shapes matter"
    model = build(arch, classes)
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()): t.fill_(value)
    return model


# --- channel-wise masks

@pytest.mark.parametrize('file', FILES)
def test_kels_masks_bit_for_bit(golden, file):
    cases = read(golden, file)
    model,x = small(cases[0]['arch'], cases[0]['num_classes']),torch.zeros(1, 3, 64, 64)
    rates = set()
    for case in cases:
        model = model if case['num_classes'] == cases[0]['num_classes'] else small(case['arch'], case['num_classes'])
        masks = kels_masks(model, x, case['split_rate'])
        assert {n for n in masks} == {f"{o['name']}.weight" for o in case['layers']}
        for o in case['layers']:
            m = masks[f"{o['name']}.weight"]
            assert (list(m.shape), int(m.sum()), sha(m)) == (o['shape'], o['fit'], o['sha']), (case['split_rate'], o['name'])
            rows,cols = ({int(i) for a,b in o[k] for i in range(a, b)} for k in ('out', 'in'))
            flat = m.flatten(2) if m.ndim > 2 else m[..., None]
            assert set(flat.any(2).any(1).nonzero().flatten().tolist()) == rows and set(flat.any(2).any(0).nonzero().flatten().tolist()) == cols
        total = sum(m.numel() for m in masks.values())
        assert (total, sum(int(m.sum()) for m in masks.values())) == (case['masked_weights'], case['fit_weights'])
        assert case['fit_weights']/total == pytest.approx(case['fit_fraction'], abs=1e-8)
        rates.add(case['split_rate'])
    assert {.2, .5, .8} <= rates


@pytest.mark.parametrize('file', FILES)
def test_norms_keep_the_same_channels(golden, file):
    cases = read(golden, file)
    model,x = small(cases[0]['arch'], cases[0]['num_classes']),torch.zeros(1, 3, 64, 64)
    for case in cases[:3]:
        cut = fit_cut(model, x, case['split_rate'])
        for norm in case['norms']:
            for t in ('weight', 'bias', 'running_mean', 'running_var'): assert kept(cut, norm['name'], t, 0, norm['n']) == norm['keep'], norm['name']
        assert not [n for n in kels_masks(model, x, case['split_rate'], bias=False) if any(n.startswith(o['name']+'.') for o in case['norms'])]


@pytest.mark.parametrize('which', SIZES)
def test_slim_sizes(golden, which):
    "Parameters and multiply-adds at 224 pixels, from a trace at 64"
    arch,rate,*classes = which.split()
    case, = [c for c in read(golden, 'slim_counts.json') if (c['arch'], c['split_rate'], c['num_classes']) == (arch, float(rate), int((classes or [102])[0]))]
    model = small(arch, case['num_classes'])
    slim = extract_slim(model, torch.ones(1, 3, 64, 64), case['split_rate'])
    assert (n_params(model)[0], n_params(slim)[0]) == (case['dense_params'], case['fit_params'])
    wide = torch.zeros(1, 3, 224, 224)
    for net,key in ((slim, 'fit_macs'), *(((model, 'dense_macs'),) if rate == '0.5' and arch == 'resnet18' else ())):
        assert sum(p.numel() for n,p in net.named_parameters() if p.ndim > 1) == case['fit_weights' if net is slim else 'masked_weights']
        assert sum(layer_macs(net, wide).values()) == case[key]
    if case['repo_slim_equals_fit']: assert (case['slim_params'], case['slim_macs']) == (case['fit_params'], case['fit_macs'])


def test_the_originals_slim_densenet_is_wider_than_its_mask(golden):
    "Why `fit_params` is the golden number: at rates where 4*ceil(g*r) != ceil(4*g*r) the published slim network holds reset weights"
    for c in read(golden, 'slim_counts.json'):
        g = 32*c['split_rate']
        assert c['repo_slim_equals_fit'] == (c['arch'] != 'densenet121' or ceil(round(4*g, 9)) == 4*ceil(round(g, 9)))
        if not c['repo_slim_equals_fit']: assert c['slim_params'] > c['fit_params']


@pytest.mark.parametrize('which', DERIVED)
def test_models_that_the_original_does_not_support(golden, which):
    cases = read(golden, 'derived_slim.json')
    assert [f"{c['model']} {c['split_rate']}" for c in cases] == DERIVED
    case = cases[DERIVED.index(which)]
    model,x = small(case['model'], case['num_classes']),torch.ones(1, 3, 96, 96)
    slim,masks = extract_slim(model, x, case['split_rate']),kels_masks(model, x, case['split_rate'])
    assert (n_params(model)[0], n_params(slim)[0]) == (case['dense_params'], case['fit_params'])
    weighted = [n for n,m in model.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    assert set(case['layers']) == set(weighted) and {f'{n}.weight' for n in weighted} == set(masks)
    for n,(o,i,groups) in case['layers'].items():
        m,dense = slim.get_submodule(n),model.get_submodule(n)
        sides = (m.out_features, m.in_features, 1) if isinstance(m, nn.Linear) else (m.out_channels, m.in_channels, m.groups)
        assert sides[:2] == (o, i) == (m.weight.shape[0], m.weight.shape[1]*sides[2]) and getattr(dense, 'groups', 1) == groups, n
        assert int(masks[f'{n}.weight'].sum()) == m.weight.numel(), n # masks and tensors tell the same, grouped layers included
    for n,k in case['norms'].items(): assert slim.get_submodule(n).num_features == len(slim.get_submodule(n).running_var) == k


# --- weight-wise masks

def in_order(layers):
    "Layers of these shapes, in this order"
    make = lambda s: nn.Linear(s[1], s[0], device='meta') if len(s) == 2 else nn.Conv2d(s[1], s[0], s[2:], bias=False, device='meta')
    return nn.ModuleList([make(o['shape']) for o in layers])


@pytest.mark.parametrize('i', [0, 1])
def test_wels_masks_of_a_numpy_seed(golden, i):
    case = read(golden, 'wels.json')['full'][i]
    model = in_order(case['construction_order'])
    masks = wels_masks(model, case['split_rate'], np.random.RandomState(case['numpy_seed']))
    assert list(masks) == [f'{k}.weight' for k in range(len(model))]
    for o,m in zip(case['construction_order'], masks.values()):
        assert (int(m.sum()), sha(m)) == (o['fit'], o['sha']), o['name']
        assert m.float().mean().item() == pytest.approx(o['fraction'], abs=1e-6)
    assert sum(int(m.sum()) for m in masks.values())/sum(m.numel() for m in masks.values()) == pytest.approx(case['fit_fraction'], abs=1e-6)


def test_wels_masks_of_the_chain(golden):
    "Packed bits: every single one, in the order in which the network defines its layers"
    cases = read(golden, 'wels.json')['tiny']
    assert [c['net'] for c in cases] == ['chain']*2
    for case in cases:
        masks = wels_masks(TINY[case['net']](), case['split_rate'], np.random.RandomState(case['numpy_seed']))
        assert list(masks) == [f'{n}.weight' for n in case['masks']]
        for n,o in case['masks'].items():
            bits = np.unpackbits(np.frombuffer(base64.b64decode(o['packbits_b64']), np.uint8))[:np.prod(o['shape'])].astype(bool)
            assert np.array_equal(masks[f'{n}.weight'].numpy().ravel(), bits) and bits.sum() == o['fit']


# --- one boundary between two generations

BOUNDARIES = ['chain_30', 'chain_50', 'concat_30', 'concat_50', 'concat_80', 'residual_30', 'residual_50']


def load(z, net):
    model = TINY[net]().eval()
    missing = model.load_state_dict({k[7:]: torch.tensor(z[k]) for k in z.files if k.startswith('before/')}, strict=False)
    assert not missing.unexpected_keys and all('num_batches' in k for k in missing.missing_keys)
    return model


@pytest.mark.parametrize('name', BOUNDARIES)
def test_a_boundary(golden, name):
    "Masks, what is kept, where the original wrote, and the three outputs"
    z = np.load(golden/'knowledge_evolution'/f'tiny_{name}.npz')
    net,rate = name.split('_')
    model,x = load(z, net),torch.tensor(z['x'])
    masks = kels_masks(model, x, int(rate)/100)
    assert {n[:-7] for n in masks} == {k[5:] for k in z.files if k.startswith('mask/')}
    for n,m in masks.items(): assert np.array_equal(m.numpy(), z[f'mask/{n[:-7]}'].astype(bool)), n
    changed = {k[6:] for k in z.files if k.startswith('after/')}
    counts = reinit_(model, masks, {k: torch.tensor(z[f'after/{k}']) for k in changed})
    for k,t in model.state_dict().items(): # with the original's numbers, all is as the original left it
        if 'num_batches' not in k: assert np.array_equal(t.numpy(), z[f'after/{k}' if k in changed else f'before/{k}']), k
    assert set(counts) == changed and counts == {k: int((~masks[k]).sum()) for k in changed}
    model = load(z, net)
    reinit_(model, masks, generator=generator(0)) # with our own, it is so where a mask is True
    for k,t in model.state_dict().items():
        old = z.get(f'before/{k}')
        if k not in masks: assert old is None or np.array_equal(t.numpy(), old), k; continue
        m = masks[k].numpy()
        assert np.array_equal(t.numpy()[m], old[m]) and (t.numpy()[~m] != old[~m]).all() and np.abs(t.numpy()[~m]).max(initial=0) <= t[0].numel()**-.5
        assert np.abs(z[f'after/{k}'][~m]).max(initial=0) <= t[0].numel()**-.5


@pytest.mark.parametrize('name', BOUNDARIES)
def test_a_slim_network_to_the_bit(golden, name):
    z = np.load(golden/'knowledge_evolution'/f'tiny_{name}.npz')
    net,rate = name.split('_')
    model,x = load(z, net).double(),torch.tensor(z['x']).double()
    slim,masks = extract_slim(model, x, int(rate)/100),kels_masks(model, x, int(rate)/100)
    state,tensors = slim.state_dict(),{k[5:] for k in z.files if k.startswith('slim/')}
    assert {k for k in state if 'num_batches' not in k} == {k for k in tensors if 'num_batches' not in k}
    for k in tensors: assert np.array_equal(state[k].numpy(), z[f'slim/{k}'].astype(state[k].numpy().dtype)), k
    masked = load(z, net).double()
    with torch.no_grad():
        for n,p in masked.named_parameters(): p.mul_(masks.get(n, 1))
        ys = dict(y_dense=model(x), y_masked=masked(x), y_slim=slim(x))
    for k,y in ys.items(): assert np.abs(y.numpy()-z[k]).max() <= 1e-12*np.abs(z[k]).max(), k
    assert check_same(slim, masked, x) < 1e-12 and (ys['y_dense']-ys['y_slim']).abs().max() > 1e-3


# --- what new weights look like

@pytest.mark.parametrize('i', range(3))
def test_statistics_of_new_weights(golden, i):
    "Bound and deviation of the whole layer's fan-in; as many as the original kept and reset; all the rest as it was"
    case = read(golden, 'reinit_stats.json')[i]
    model = small(case['arch'], 102, 7.)
    masks = kels_masks(model, torch.zeros(1, 3, 64, 64), case['split_rate'])
    counts = reinit_(model, masks, generator=generator(i))
    assert (sum(int(m.sum()) for m in masks.values()), sum(counts.values())) == (case['kept_total'], case['reset_total'])
    for o in case['layers']:
        n = f"{o['layer']}.weight"
        w,m = model.get_parameter(n).detach(),masks[n]
        new,bound = w[~m],o['fan_in']**-.5
        assert (int(m.sum()), len(new), counts[n]) == (o['kept_bit_identical'], o['reset_positions'], o['reset_positions'])
        assert o['reinit_bound'] == pytest.approx(bound) and .999*bound < new.abs().max() <= bound
        assert abs(new.std()/o['reinit_std_theory']-1) < .02 and abs(new.mean()) < 4*bound/(3*len(new))**.5
    for k,t in model.state_dict().items():
        assert (t[masks[k]] == 7).all() and (t[~masks[k]] != 7).all() if k in masks else (t == 7).all(), k
