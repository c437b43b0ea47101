"""Slices against the golden vectors of Model Slicing: channel counts, single layers with their gradients, whole networks, and what they cost.

The numbers come from the published code, which slices layer by layer; here a network is traced and sliced as a whole, and each layer is asked
for what it does inside of it."""
import json

import numpy as np
import pytest
import torch
import torchvision.models as tv
from torch import nn

from paramfx.zoo import networks as nets
from paramfx.export.materialize import materialize
from paramfx.report.cost import count_macs, n_params
from paramfx.slicing.slice import at_rate, set_rate, slice_model
from paramfx.slicing.plan import slice_count

GSEED, TOL = 1900, 1e-9
TINY = torch.finfo(torch.float64).tiny


@pytest.fixture(scope='module')
def files(golden):
    root = golden/'model_slicing'
    return lambda name: np.load(root/name) if name.endswith('npz') else json.loads((root/name).read_text())


def close(got, want, dtype=torch.float64):
    "1e-9 absolute in float64, 2e-4 relative in float32; weight gradients are stored in float32, so half a step of that comes on top"
    half = torch.from_numpy(np.spacing(np.abs(want))/2).double() if want.dtype == np.float32 else 0.
    got,want = got.detach().double(),torch.from_numpy(want).double()
    assert got.shape == want.shape
    if dtype == torch.float64: assert ((got-want).abs()-half).max() <= TOL
    else: assert ((got-want).abs().max()/want.abs().max().clamp_min(TINY)) <= 2e-4


# --- numbers of channels

def test_channel_counts(files):
    rows,n,m = files('channels.json'),0,0
    for row in rows:
        c,r = row['C'],row['rate']
        if row['exact'] and row['agree']:
            assert slice_count(c, r) == row['conv_linear_out'] == row['norm_channels'], row
            n += 1
        for g,v in row['gn_groups'].items():
            if not (v['group_aligned'] and v['valid']): continue
            k = slice_count(c, r, int(g))
            assert k == row['conv_linear_out'] and k*int(g) == v['groups']*c, (row, g)
            m += 1
    assert n >= 40 and m >= 40, (n, m)


def test_where_the_published_code_fails_the_count_is_sound(files):
    "No channels at all, or another group size: ours keeps at least one channel and the size of a group"
    assert slice_count(2, .25) == 1 and slice_count(10, .75) == 8 and slice_count(32, .625, 4) == 24
    for row in files('channels.json'):
        if row['conv_linear_out'] < 1: assert slice_count(row['C'], row['rate']) == 1


# --- single layers

MAKE = dict(linear=nn.Linear, conv=nn.Conv2d, norm=nn.GroupNorm, bn=nn.BatchNorm2d)

def around(case):
    "The layer in the smallest network in which it has this role, sliced: network, layer"
    cfg = {k: v for k,v in case['config'].items() if k != 'affine'}
    layer = MAKE[case['kind']](**cfg).double()
    cin,cout = case['channels'][0]
    one = nn.Linear if case['kind'] == 'linear' else lambda i, o: nn.Conv2d(i, o, 1)
    parts = [*([] if case['role'] == 'first' else [one(2, cin)]), layer, *([] if case['role'] == 'last' else [one(cout, 2)])]
    model = nn.Sequential(*parts).double()
    first = cin if case['role'] == 'first' else 2
    x = torch.randn(2, first, dtype=torch.float64) if case['kind'] == 'linear' else torch.randn(2, first, 5, 5, dtype=torch.float64)
    slice_model(model, x, case['rates'], norm='switch_affine')
    return model,layer


def names(files): return [c['name'] for c in files('layers.json')]
CASES = 'linear_mid linear_first linear_last conv3x3_s2 conv1x1 conv_first conv_last conv_depthwise conv_grouped gn gn_eps bn'.split()

def test_no_layer_is_left_out(files): assert names(files) == CASES


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('name', CASES[:-1])
def test_layers(files, name, dtype):
    case,z = next(c for c in files('layers.json') if c['name'] == name),files('layers.npz')
    model,layer = around(case)
    with torch.no_grad():
        for n,p in layer.named_parameters(): p.copy_(torch.from_numpy(z[f'{name}.{n}']))
    model.to(dtype)
    assert {n for n,_ in layer.named_parameters()} == {k.split('.')[1] for k in z.files if k.startswith(f'{name}.')} & {'weight', 'bias'}
    full,dim = torch.from_numpy(z[f'{name}.x']).to(dtype),-1 if case['kind'] == 'linear' else 1
    seen = 0
    for i,(r,(ci,co)) in enumerate(zip(case['rates'], case['channels'])):
        x = full.narrow(dim, 0, ci).clone().requires_grad_()
        with at_rate(model, r):
            y = layer(x)
            with torch.no_grad(): assert torch.equal(layer.eval()(x), layer.train()(x)), 'copies and views'
        assert y.shape[dim] == co
        close(y, z[f'{name}.y.{i}'], dtype)
        if f'{name}.dw.{i}' not in z.files: continue
        g = torch.from_numpy(np.random.RandomState(GSEED+i).standard_normal(y.shape).astype('float32')).to(dtype)
        layer.zero_grad()
        (y*g).sum().backward()
        grad,want = layer._parameters['weight'].grad,z[f'{name}.dw.{i}']
        close(grad, want, dtype)
        outside = torch.ones(grad.shape, dtype=torch.bool)
        inside = outside[:co] if case['kind'] in ('linear', 'conv') else outside[:ci]
        if case['kind'] in ('linear', 'conv') and case['config'].get('groups', 1) == 1: inside = inside[:, :ci]
        inside.fill_(False)
        assert (grad[outside] == 0).all() and (grad[~outside] != 0).all(), 'exact zeros outside'
        if f'{name}.dx.{i}' in z.files: close(x.grad, z[f'{name}.dx.{i}'], dtype)
        seen += 1
    assert seen or not any(k.startswith(f'{name}.dw') for k in z.files)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_batch_norm(files, dtype):
    case,z = files('layers.json')[-1],files('layers.npz')
    model,layer = around(case)
    model.to(dtype)
    x = torch.from_numpy(z['bn.x']).to(dtype)
    for i,(r,(c,_)) in enumerate(zip(case['rates'], case['channels'])):
        with at_rate(model, r):
            with torch.no_grad():
                for t in ('weight', 'bias'): getattr(layer, t).copy_(torch.from_numpy(z[f'bn.{t}.{i}']))
            close(layer.train()(x[:, :c]), z[f'bn.y_train.{i}'], dtype)
    for i,(r,(c,_)) in enumerate(zip(case['rates'], case['channels'])): # after all others have trained
        with at_rate(model, r):
            for t in ('running_mean', 'running_var'): close(getattr(layer, t), z[f'bn.{t}.{i}'], dtype)
            assert layer.num_batches_tracked == 1
            close(layer.eval()(x[:, :c]), z[f'bn.y_eval_after_one_train_pass.{i}'], dtype)


# --- networks

def small_flatten_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))

def network(name):
    if name == 'small_flatten_net': return small_flatten_net()
    return tv.resnet18(num_classes=10) if 'resnet18' in name else tv.mobilenet_v2(num_classes=10, dropout=0.)


@torch.no_grad()
def fill(model, seed, norms):
    "The recipe of the golden files; `norms`: norm parameters, too"
    skip = () if norms else {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    for k,(n,p) in enumerate(model.named_parameters()):
        v = np.random.RandomState(seed*10000+k).standard_normal(p.shape)
        v = v*np.sqrt(2/np.prod(p.shape[1:])) if p.ndim >= 2 else 1+.1*v if n.endswith('weight') else .1*v
        if p not in skip: p.copy_(torch.from_numpy(v.astype('float32')))
    return model


KEYS = ['small_flatten_net.G8', 'small_flatten_net.G0', 'torchvision.resnet18(num_classes=10).G8',
    'torchvision.resnet18(num_classes=10).G0', 'torchvision.mobilenet_v2(num_classes=10,dropout=0.0).G8']

def test_no_network_is_left_out(files): assert [c['key'] for c in files('networks.json')] == KEYS


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('key', KEYS)
def test_networks(files, key, dtype):
    case,z = next(c for c in files('networks.json') if c['key'] == key),files('networks.npz')
    model,groups = network(case['model']),case['num_groups']
    assert [n for n,_ in model.named_parameters()][:5] == case['plain_param_names_first5'] and len([*model.parameters()]) == case['plain_param_tensors']
    x = torch.from_numpy(np.random.RandomState(case['seed']).standard_normal(case['input_shape']).astype('float32')).to(dtype)
    fill(model, case['seed'], groups > 0).to(dtype)
    slice_model(model, x[:1], case['rates'], **(dict(norm='gn', groups=groups) if groups else dict(norm='switch_affine')))
    for i,r in enumerate(case['rates']):
        if groups: break
        with at_rate(model.train(), r): close(model(x), z[f'{key}.train.{i}'], dtype)
    model.eval()
    for i,r in enumerate(case['rates']):
        want = z[f'{key}.eval.{i}']
        close(set_rate(model, r)(x), want, dtype)
        with torch.no_grad():
            close(model(x), want, dtype)
            close(materialize(set_rate(model, 1), x, rate=r)(x), want, dtype)


# --- what it costs

def cost_net(name):
    "A network of `params_macs.json`, without the time for random weights, and the size of its pictures for tracing"
    kind,_,rest = name.partition(' ')
    cfg = dict(o.split('=') for o in rest.split())
    depth = cfg.get('depth')
    with torch.device('meta'):
        if kind == 'cifar_resnet': model = nets.preact_resnet(int(depth), int(cfg.get('classes', 10)), width=float(cfg['k']))
        elif kind == 'cifar_vgg': model = nets.vgg_cifar(int(depth), 10)
        elif kind == 'imagenet_resnet': model = tv.get_model(f'resnet{depth}', weights=None)
        elif kind == 'imagenet_vgg': model = tv.get_model(f'vgg{depth}_bn', weights=None)
        elif kind == 'imagenet_mobilenetv2': model = tv.mobilenet_v2()
        else: model = tv.googlenet(weights=None, aux_logits=False, init_weights=False)
    model = model.to_empty(device='cpu')
    with torch.no_grad():
        for p in model.parameters(): p.fill_(1e-3)
        for n,b in model.named_buffers(): b.fill_('var' in n)
    return model.eval()


MODELS = [f'cifar_resnet depth={d}' for d in ('20 k=1', '56 k=2', '110 k=1', '164 k=1',
    '164 k=1 classes=100')] + [f'cifar_vgg depth={d}' for d in (11, 13, 16, 19)] + [
    f'imagenet_resnet depth={d}' for d in (18, 34, 50, 101, 152)] + [f'imagenet_vgg depth={d}'
    for d in (11, 13, 16, 19)] + ['imagenet_mobilenetv2', 'imagenet_googlenet aux_logits=False']
QUICK = 'cifar_resnet depth=20 k=1', 'cifar_vgg depth=13', 'imagenet_resnet depth=18', 'imagenet_mobilenetv2'

def test_no_cost_is_left_out(files): assert [*dict.fromkeys(r['model'] for r in files('params_macs.json'))] == MODELS


@pytest.mark.parametrize('name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_parameters_and_multiply_adds(files, name):
    "Counted on the subnet that comes out, and on the sliced forward itself"
    rows = [r for r in files('params_macs.json') if r['model'] == name]
    hw = rows[0]['input_hw']
    model,small,x = cost_net(name),torch.randn(1, 3, min(hw, 64), min(hw, 64)),torch.randn(1, 3, hw, hw)
    full = n_params(model)[0]
    slice_model(model, small, (1, *[r['rate'] for r in rows]))
    for row in rows:
        sub = materialize(model, small, rate=row['rate'], dead=False)
        assert n_params(sub)[0] == row['active_params'] and round(n_params(sub)[0]/full, 6) == row['params_fraction'], row
        assert count_macs(sub, x)[0] == row['macs'], row
        with at_rate(model, row['rate']): assert count_macs(model, x)[0] == row['macs'], row
        if row['rate'] == 1: assert full == row['stored_params_gn_mode']
