"Shared filter bases: layers, groups, conversion, the verb, the callback, and everything fastai does to a Learner"
import json
import os
import pickle
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Adam, Callback, OptimWrapper, SGD, load_learner, params
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
from torch import nn
from torch.nn.utils import parametrizations

from contracts import OPTIMIZERS, build, quiet, same, seed_all, snapshot, tiny_dls
from paramfx.zoo import networks as nets
from paramfx.bases.share import SVD, Calibrated, plan_bases, share_bases
from paramfx.bases.layers import BasisConv2d, SharedConv2d, sharing_layers
from paramfx.bases.init import svd_filters
from paramfx.bases.plan import conv_places, find_groups
from paramfx.core.forward import check_same
from paramfx.bases.ortho import ortho_penalty
from paramfx.bases.callback import OrthoReg, StepWithoutDecay, basis_groups, decay_pull
from paramfx.export.materialize import Recipe, materialize, save_recipe
from paramfx.report.cost import count_macs, n_params
from paramfx.sparse.callback import DynamicSparse
from fresh import run_fresh

X = torch.zeros(1, 3, 32, 32)
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:fastai', 'ignore::FutureWarning', 'ignore::DeprecationWarning')


class Block(nn.Module):
    "Two convolutions and a shortcut"
    def __init__(self, n, k=3):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = nn.Conv2d(
            n, n, k, padding=k//2, bias=False), nn.BatchNorm2d(n), nn.Conv2d(n, n, k, padding=k//2), nn.BatchNorm2d(n)
    def forward(self, x): return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def block_net(c_in=1, n=8, blocks=3):
    return nn.Sequential(nn.Sequential(nn.Conv2d(c_in, n, 3, 2, 1),
        nn.Sequential(*[Block(n) for _ in range(blocks)])), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 10)))
def two_parts(m): return [params(m[0]), params(m[1])]


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path, model=block_net)


def close(a, b, tol): assert (a-b).abs().max() <= tol*b.abs().max().clamp(min=1), (a-b).abs().max()


# -- the penalty
def test_orthonormal_rows_cost_nothing():
    q = torch.linalg.qr(torch.randn(45, 12, dtype=torch.float64))[0].T.reshape(12, 5, 3, 3)
    for norm in ('global', 'group', 'sum'):
        for unique in (False, True): assert ortho_penalty([([q[:5], q[5:9]], [q[9:10], q[10:]]), ([q[:4]], [])], unique, norm) < 1e-24


@pytest.mark.parametrize('unique', [False, True])
@pytest.mark.parametrize('norm', ['global', 'group', 'sum'])
def test_penalty_entry_by_entry(unique, norm):
    "Another route: go through the entries that are held"
    torch.manual_seed(0)
    t = lambda n, c: torch.randn(n, c, 3, 3, dtype=torch.float64)
    groups = [([t(4, 2), t(3, 2)], [t(1, 2), t(2, 2)]), ([t(5, 4)], [t(2, 4)])]
    sums = []
    for s, u in groups:
        rows = [(('s', 0), r.flatten()) for b in s for r in b] + [(('u', i), r.flatten()) for i, b in enumerate(u) for r in b]*unique
        num = n = 0
        for i, (a, v) in enumerate(rows):
            for j, (b, w) in enumerate(rows):
                if a[0] == 's' or a == b: num, n = num+(float(v@w)-(i == j))**2, n+1
        sums.append((num, n))
    want = dict(sum=sum(a for a, _ in sums), group=sum(a/n for a, n in sums), **{'global': sum(a for a, _ in sums)/sum(n for _, n in sums)})[norm]
    assert abs(float(ortho_penalty(groups, unique, norm))/want-1) < 1e-12


def test_overcomplete_minimum():
    n, d = 12, 5
    q = torch.linalg.qr(torch.randn(n, d, dtype=torch.float64))[0].reshape(n, d, 1, 1)  # columns are orthonormal
    assert abs(float(ortho_penalty([([q], [])]))-(n-d)/n**2) < 1e-14 and ortho_penalty([([q], [])], side='auto') < 1e-24
    for _ in range(5): assert ortho_penalty([([q+.1*torch.randn_like(q)], [])]) > (n-d)/n**2


def test_penalty_in_half_precision_and_under_autocast():
    b = torch.randn(8, 4, 3, 3)/6
    want = ortho_penalty([([b], [])])
    with torch.autocast('cpu', dtype=torch.bfloat16): assert ortho_penalty([([b], [])]).dtype == torch.float32 and torch.equal(ortho_penalty([([b], [])]), want)
    r = ortho_penalty([([b.bfloat16()], [])])
    assert r.dtype == torch.float32 and torch.equal(r, ortho_penalty([([b.bfloat16().float()], [])]))


B = torch.randn(4, 2, 3, 3)
@pytest.mark.parametrize('groups,kw,text', [
    ([], {}, 'at least one'), (None, {}, 'groups=None'), ([B], {}, r'groups\[0\]: give a pair'),
    ([([B.int()], [])], {}, 'int32'), ([([B[0, 0, 0]], [])], {}, 'shape'),
    ([([[1.]], [])], {}, 'is a list'), ([([B, B[:, :1]], [])], {}, '9 and 18 entries.*joint=False'),
    ([([], [B])], {}, 'unique=True'), ([([B[:0]], [])], {}, 'at least one'),
    ([([B], [])], dict(norm='mean'), "norm='mean'"), ([([B], [])], dict(side='left'), "side='left'"),
    ([([B], [])], dict(joint=1), 'joint=1'), ([([B], [])], dict(unique=None), 'unique=None')])
def test_penalty_bad_input(groups, kw, text):
    with pytest.raises(ValueError, match=text): ortho_penalty(groups, **kw)


# -- the layer
FORMS = [dict(), dict(stride=2), dict(padding=0), dict(dilation=2, padding=2), dict(padding_mode='reflect'),
    dict(padding_mode='circular', stride=2), dict(padding='same'), dict(groups=2), dict(groups=4, stride=2),
         dict(bias=False), dict(norm=False), dict(norm=False, groups=2, bias=False), dict(unique=0),
         dict(shared=0, unique=4), dict(kernel_size=1, padding=0), dict(kernel_size=(3, 1), padding=(1, 0))]

def layer(**kw):
    torch.manual_seed(0)
    m = BasisConv2d(**{**dict(in_channels=8, out_channels=12, kernel_size=3, shared=4*kw.get('groups', 1),
        unique=2*kw.get('groups', 1), padding=1), **kw}).double()
    if m.bias is not None: m.bias.data.normal_()
    if m.norm is not None:
        for t in (m.norm.weight, m.norm.bias, m.norm.running_mean): t.data.normal_()
        m.norm.running_var.uniform_(.5, 2)
    return m


def by_hand(m, x, train):
    "Two convolutions, put together group by group, normed, combined"
    conv = lambda w: nn.Conv2d._conv_forward(m, x, w, None)
    zs = [conv(w).unflatten(1, (m.groups, -1)) for w in (m.unique, m.basis) if w is not None]
    z = torch.cat(zs, 2).flatten(1, 2)
    if m.norm is not None:
        z = F.batch_norm(z, None if train else m.norm.running_mean, None if train else m.norm.running_var, m.norm.weight, m.norm.bias, train, 0., m.norm.eps)
    return F.conv2d(z, m.coeff, m.bias, groups=m.groups)


@pytest.mark.parametrize('kw', FORMS, ids=str)
def test_layer_by_a_second_route(kw):
    m, x = layer(**kw), torch.randn(2, 8, 9, 9, dtype=torch.float64)
    for train in (True, False):
        m.train(train)
        want = by_hand(m, x, train)
        got = m(x)
        close(got, want, 1e-10)
        ps = [*m.parameters()]
        up = torch.randn_like(got)
        for a, b, p in zip(torch.autograd.grad(got, ps, up), torch.autograd.grad(want, ps, up), ps): close(a, b, 1e-10)
        plain = m.plain()
        assert type(plain) is nn.Conv2d and plain.training == train and (plain.stride, plain.padding_mode, plain.groups) == (m.stride, m.padding_mode, m.groups)
        close(plain(x), by_hand(m, x, False), 1e-10)
        close(deepcopy(m).float().plain()(x.float()).double(), by_hand(m, x, False), 1e-5)


@pytest.mark.parametrize('kw', [dict(shared=12), dict(shared=12, padding_mode='reflect', stride=2),
    dict(shared=4), dict(shared=12, unique=4, groups=2)], ids=str)
@pytest.mark.parametrize('fmt', [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_maps_stays(kw, fmt):
    "Wide layers go by channels last inside: single precision, both layouts, outputs and gradients by a second route"
    torch.manual_seed(0)
    m, x = BasisConv2d(8, 6, 3, padding=1, **kw), torch.randn(4, 8, 9, 9).to(memory_format=fmt).requires_grad_()
    seen = []
    m.norm.register_forward_pre_hook(lambda _, a: seen.append(a[0].is_contiguous()))
    got, want = m(x), by_hand(m, x, True)
    close(got, want, 1e-5)
    up = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, [x, *m.parameters()], up), torch.autograd.grad(want, [x, *m.parameters()], up)): close(a, b, 1e-4)
    assert got.is_contiguous(memory_format=fmt)
    m.eval().to(memory_format=fmt)
    got, want = m(x), by_hand(m, x, False)
    close(got, want, 1e-5)
    for a, b in zip(torch.autograd.grad(got, [x, *m.parameters()], up), torch.autograd.grad(want, [x, *m.parameters()], up)): close(a, b, 1e-4)
    assert m.groups > 1 or m.weight.is_contiguous(memory_format=fmt)
    seen = seen[:1]
    assert seen == [fmt == torch.contiguous_format and kw['shared'] == 4]


def test_data_parallel_is_refused():
    first = layer()
    first._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match='DataParallel.*distrib_ctx'): BasisConv2d(8, 6, 3, shared=first)._replicate_for_data_parallel()


def test_both_orders_agree_in_wide_layers():
    m = BasisConv2d(64, 48, 3, shared=6, unique=2, padding=1, stride=2).double().eval()
    m.norm.running_mean.normal_(); m.norm.bias.data.normal_()
    x = torch.randn(3, 64, 8, 8, dtype=torch.float64)
    assert m._in_two(x)
    close(m(x), by_hand(m, x, False), 1e-10)
    close(m(x), m.plain()(x), 1e-10)
    close(m(x[0]), m(x)[0], 1e-12)  # without a batch dimension


def test_a_frozen_norm_is_folded_and_stays():
    m, x = layer(), torch.randn(2, 8, 9, 9, dtype=torch.float64)
    m.train(); m.norm.eval()
    mean = m.norm.running_mean.clone()
    close(m(x), by_hand(m, x, False), 1e-10)
    assert torch.equal(m.norm.running_mean, mean)


def test_under_autocast_and_channels_last():
    m, x = layer().float(), torch.randn(2, 8, 9, 9)
    for train in (True, False):
        m.train(train)
        want = m(x)
        with torch.autocast('cpu', dtype=torch.bfloat16): got = m(x)
        assert got.dtype == torch.bfloat16
        close(got.float(), want, 3e-2)
        twin = deepcopy(m).to(memory_format=torch.channels_last)
        close(twin(x.to(memory_format=torch.channels_last)), want, 1e-5)


def test_torch_func():
    from torch.func import functional_call, grad, vmap
    net = nn.Sequential(a := BasisConv2d(3, 3, 3, 4, norm=False, padding=1), BasisConv2d(3, 3, 3, a, norm=False, padding=1)).double()
    p, x = dict(net.named_parameters()), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    got = vmap(grad(lambda p, x: functional_call(net, p, (x[None],)).pow(2).sum()), (None, 0))(p, x)
    net(x).pow(2).sum().backward()
    for n, q in net.named_parameters(): close(got[n].sum(0), q.grad, 1e-10)


# -- one tensor, once
@pytest.mark.few(3)
@pytest.mark.parametrize('kw', [dict(), dict(n_bases=2), dict(mode='tie'), dict(mode='tie', n_bases=2),
    dict(basis_norm=False), dict(init='svd', basis_norm='calibrated')], ids=str)
def test_a_basis_is_one_parameter(kw, tmp_path):
    net = nets.resnet_cifar(20).eval()
    table = share_bases(net, X, 4, 1, **kw)
    layers = sharing_layers(net)
    owners = {id(m.owner) for m in layers.values()}
    assert len(owners) == 3*kw.get('n_bases', 1) and len(layers) == 12
    state = net.state_dict()
    assert len({t.data_ptr() for t in state.values() if t.numel()}) == sum(t.numel() > 0 for t in state.values())
    assert sum(k.endswith('.shared') for k in state) == (0 if 'mode' in kw else len(owners))
    assert len([*net.parameters()]) == len(
        {id(p) for _, p in net.named_parameters(remove_duplicate=False)}) == len([*net.named_parameters(remove_duplicate=False)])
    rows = [r for r in table if 'params_after' in r]
    assert n_params(net)[0] == n_params(nets.resnet_cifar(20))[0]+sum(r['params_after']-r['params_before'] for r in rows)
    assert count_macs(net, X)[0] == count_macs(nets.resnet_cifar(20), X)[0]+sum(r['macs_after']-r['macs_before'] for r in rows)
    x = torch.randn(2, 3, 32, 32)
    out = net(x)
    twins = [deepcopy(net), pickle.loads(pickle.dumps(net))]
    torch.save(net, tmp_path/'net.pt')
    twins.append(torch.load(tmp_path/'net.pt', weights_only=False))
    for twin in twins:
        mine = sharing_layers(twin)  # raises where an owner is outside
        assert torch.equal(twin(x), out) and not {id(m.owner) for m in mine.values()} & owners
        with torch.no_grad(): next(iter(mine.values())).basis.mul_(2)
        assert not torch.equal(twin(x), out) and torch.equal(net(x), out)
    assert {m.basis.dtype for m in sharing_layers(deepcopy(net).double()).values()} == {torch.float64}
    assert {m.basis.device.type for m in sharing_layers(deepcopy(net).to('meta')).values()} == {'meta'}
    from safetensors.torch import load_file, save_file
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path/'net.safetensors')
    other = nets.resnet_cifar(20).eval()
    share_bases(other, X, 4, 1, **kw)
    other.load_state_dict(load_file(tmp_path/'net.safetensors'), strict=True)
    assert torch.equal(other(x), out)


COUNTED = {'ResNet32-S8U1': (lambda: nets.resnet_cifar(32), dict(shared_rank=8)), 'ResNet32-S16U1*': (lambda: nets.resnet_cifar(32), dict(n_bases=2)),
           'ResNet56-S16U1': (lambda: nets.resnet_cifar(56), dict()), 'ResNet32 shared-only '
           'S16': (lambda: nets.resnet_cifar(32), dict(unique_rank=0, n_bases=2)),
           'ResNet56 non-shared U16': (lambda: nets.resnet_cifar(56), dict(shared_rank=0, unique_rank=16)),
           'DenseNet121-S16U1': (lambda: nets.densenet_cifar(), dict(skip_first=False)),
           'MobileNetV2-Shared': (lambda: nets.mobilenet_v2(100, small=True), dict(mode='tie'))}

@pytest.mark.few(4)
@pytest.mark.parametrize('row', COUNTED)
def test_published_counts(row, golden):
    want = next(r for r in json.loads((golden/'shared_bases/counts.json').read_text())['rows'] if r['row'] == row)['counted']
    make, kw = COUNTED[row]
    net = make()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        share_bases(net, X, **kw)
    assert (n_params(net)[0], count_macs(net, X)[0]) == (want['params'], want['macs'])


def test_gradient_is_the_sum_over_uses():
    torch.manual_seed(0)
    net = block_net(n=6).double()
    share_bases(net, torch.zeros(1, 1, 8, 8).double(), 5, 1)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    net(x).pow(2).sum().backward()
    (owner,) = {m.owner for m in sharing_layers(net).values()}
    total = 0
    for i, n in enumerate(sharing_layers(net)):
        twin = deepcopy(net)
        own = sharing_layers(twin)[n]
        copy = BasisConv2d.of(own, nn.Parameter(own.basis.detach().clone()), own.unique, own.coeff, own.norm)  # this use has a basis of its own
        if own.owner is own:
            for m in sharing_layers(twin).values(): m.__dict__['_owner'] = own  # the others keep the old one
        twin.set_submodule(n, copy)
        twin(x).pow(2).sum().backward()
        total = total+copy.shared.grad
    close(total, owner.shared.grad, 1e-10)


# -- groups
def test_stage_of_nets_made_otherwise():
    from torchvision import models as tv
    groups = lambda net, **kw: find_groups(net, 8, **kw)[0]
    assert [(g.stage, len(g.layers)) for g in groups(tv.resnet18(weights=None))] == [(f'layer{i}', 2) for i in (1, 2, 3, 4)]
    assert [(g.stage, len(g.layers)) for g in groups(tv.resnet50(weights=None))] == [(f'layer{i}', n) for i, n in ((1, 2), (2, 3), (3, 5), (4, 2))]
    found, skip = find_groups(tv.mobilenet_v2(weights=None), 8)
    assert not found and skip['features.3.conv.1.0'].startswith('depthwise')
    found, skip = find_groups(tv.resnext50_32x4d(weights=None), 16)
    assert not found and '32 groups' in skip['layer1.1.conv2']
    assert len(find_groups(tv.resnext50_32x4d(weights=None), 32, 32, scale_rank=False)[0]) == 4
    from fastai.vision.models.xresnet import xresnet18
    assert [g.stage for g in groups(xresnet18(n_out=10))] == ['4', '5', '6', '7']
    assert conv_places(nn.Linear(2, 2)) == {}


def test_device_dtype_and_optimizer_keep_apart():
    net = nets.resnet_cifar(20)
    apart = {id(net.layer1[2].conv1.weight): 1, id(net.layer1[2].conv2.weight): 1}
    found = find_groups(net, apart=apart)[0]
    assert [g.layers for g in found if g.stage == 'layer1'] == [['layer1.1.conv1', 'layer1.1.conv2'], ['layer1.2.conv1', 'layer1.2.conv2']]
    with pytest.raises(ValueError, match='layer1.2.conv1: its parameter group'): find_groups(net, apart=apart, groups={'a': ['layer1.1', 'layer1.2']})


class Own(nn.Conv2d):
    def forward(self, x): return super().forward(x)*2

def odd(what):
    "A network of four blocks, in the third of which a layer cannot share"
    net = block_net(n=8, blocks=4)
    b = net[0][1][2]
    if what == 'depthwise': b.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    if what == 'grouped': b.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
    if what == 'pointwise': b.conv1 = nn.Conv2d(8, 8, 1)
    if what == 'transposed': b.conv1 = nn.ConvTranspose2d(8, 8, 3, padding=1)
    if what == 'lazy': b.conv1 = nn.LazyConv2d(8, 3, padding=1)
    if what == 'own': b.conv1 = Own(8, 8, 3, padding=1)
    if what == 'shared': b.conv1.weight = b.conv2.weight
    if what == 'masked': b.conv1.register_buffer('weight_mask', torch.ones(8, 8, 3, 3))
    if what == 'parametrized': parametrizations.weight_norm(b.conv1)
    if what == 'padding': b.conv1.padding_mode = 'reflect'; b.conv1._reversed_padding_repeated_twice = [1]*4
    return net

ODD = dict(depthwise='depthwise', grouped='only one of its kind', pointwise='1x1', transposed='ConvTranspose2d',
    lazy='lazy', own='Own', shared='another layer', masked='masked', parametrized='parametrization', padding='only one of its kind')

@pytest.mark.parametrize('what', ODD)
def test_what_cannot_share_is_skipped_or_refused(what):
    net, x = odd(what), torch.randn(2, 1, 8, 8)
    if what == 'lazy': net(x); net = odd(what)  # it stays lazy
    name, before = '0.1.2.conv1', [(n, id(m)) for n, m in net.named_modules()]
    if what != 'lazy':
        table = share_bases(deepcopy(net), x, 4, 1)
        note = {r['layer']: r['note'] for r in table if 'note' in r}
        assert ODD[what] in note[name], note
        assert '0.1.1.conv1' in {r['layer'] for r in table if 'params_after' in r}
    if what == 'pointwise': return
    with pytest.raises(ValueError, match=f"{name}: .*\\.") as e: share_bases(net, x, 4, 1, groups={'a': ['0.1.1.conv1', name]})
    assert [(n, id(m)) for n, m in net.named_modules()] == before and not net.__dict__.get('_recipe')
    if what in ('grouped', 'padding'): assert 'different groups' in str(e.value)


def test_pointwise_layers_share_if_asked_and_grouped_ones_if_ranks_divide():
    net = nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.Conv2d(12, 8, 1)) for _ in range(3)])
    x = torch.randn(2, 8, 6, 6)
    with pytest.raises(ValueError, match='0.1: 3 shared and 1 unique filters do not divide into its 4 groups'):
        share_bases(net, x, 3, 1, groups={'a': ['0.1', '1.1', '2.1']})
    found = find_groups(net, 4, 4)[0]
    assert [g.layers for g in found] == [['1.1', '2.1']]
    share_bases(net, x, 4, 4, groups={'a': ['0.1', '1.1', '2.1'], 'b': ['0.0', '1.0']}, scale_rank=False)
    assert isinstance(net[0][0], BasisConv2d) and net[1][1].groups == 4
    materialize(net, x, tol=1e-4)


@pytest.mark.parametrize('kw,text', [
    (dict(shared_rank=1.5), 'shared_rank=1.5'), (dict(shared_rank=True), 'shared_rank=True'),
    (dict(unique_rank=-1), 'unique_rank=-1'), (dict(unique_rank='2'), "unique_rank='2'"),
    (dict(shared_rank=0, unique_rank=0), 'no filter'), (dict(n_bases=0), 'n_bases=0'),
    (dict(n_bases=True), 'n_bases=True'), (dict(mode='share'), "mode='share'"), (dict(init='pca'), "init='pca'"),
    (dict(basis_norm=None), 'basis_norm=None'), (dict(basis_norm=0), 'basis_norm=0'),
    (dict(scale_rank=1), 'scale_rank=1'), (dict(skip_first='no'), "skip_first='no'"), (dict(groups=[]), r'groups=\[\]'),
    (dict(groups={}), 'groups={}'), (dict(groups={'a': ['nope']}), "No layer is called 'nope'"),
    (dict(groups={'a': ['0.1.1.conv1']}), 'the only layer of group'),
    (dict(groups={'a': ['0.1.1', '0.0']}), 'in_channels'),
    (dict(groups={'a': ['0.1.1'], 'b': ['0.1.1.conv2', '0.1.2.conv2']}), '0.1.1.conv2: named in the groups'),
    (dict(shared_rank=float('nan')), 'shared_rank=nan'), (dict(basis_norm=Calibrated([])), 'batches: there is none'),
    (dict(mode='tie', basis_norm='calibrated'), 'a tied layer has no norm'),
    (dict(groups={'a': ['0.1.1'], 'b': []}), r"groups\['b'\]: \[\] stands for no layer"), (dict(groups=lambda n, m: [n]), 'the only layer'),
    (dict(shared_rank=200), 'Nothing to share: .*72 dimensions'),
    (dict(shared_rank=200, groups={'a': ['0.1.1']}), '0.1.1.conv1: 200.1 filters.*lower ranks'), (dict(sample='x'), 'sample')])
def test_errors_come_before_anything_changes(kw, text):
    net = block_net()
    state, keys = snapshot(net), {n: id(m) for n, m in net.named_modules()}
    kw = dict(sample=torch.zeros(1, 1, 8, 8)) | kw
    with pytest.raises(ValueError, match=text): share_bases(net, **kw)
    assert {n: id(m) for n, m in net.named_modules()} == keys and not same(snapshot(net), state) and '_recipe' not in vars(net)


@pytest.mark.parametrize('kw,told', [(dict(init='svd', sweeps=3), 'init=SVD(3)'),
    (dict(basis_norm='calibrated', batches=[torch.zeros(1, 1, 8, 8)]), 'basis_norm=Calibrated(batches)')])
def test_settings_that_have_moved(kw, told):
    net, batches = block_net(), kw.get('batches')  # noqa: F841  the new form reads it
    with pytest.raises(TypeError, match='share_bases: write ') as e: share_bases(net, torch.zeros(1, 1, 8, 8), 4, **kw)
    assert told in str(e.value) and len(str(e.value)) < 150
    eval(f'share_bases(net, torch.zeros(1, 1, 8, 8), 4, {told})')


@pytest.mark.parametrize('make,text', [(lambda: SVD(-1), 'sweeps=-1'), (lambda: SVD(1.5), 'sweeps=1.5'), (lambda: SVD(True), 'sweeps=True'),
    (lambda: Calibrated(torch.zeros(2, 1, 8, 8)), 'batches is a tensor')])
def test_bad_settings_of_objects(make, text):
    with pytest.raises(ValueError, match=text): make()
    assert SVD() == SVD(10) != SVD(3)


def test_a_failing_calibration_puts_the_layers_back():
    net = block_net()
    keys = {n: id(m) for n, m in net.named_modules()}
    with pytest.raises(ValueError, match="does not run through the model"):
        share_bases(net, torch.zeros(1, 1, 8, 8), 4, basis_norm=Calibrated([torch.zeros(1, 3, 8, 8)]))
    assert {n: id(m) for n, m in net.named_modules()} == keys


def test_what_breaks_while_layers_change_leaves_them(monkeypatch):
    "An interrupt in the middle of calibration, and an error between two layers"
    class Stop(KeyboardInterrupt): pass
    def stop(*_): raise Stop
    net, x = block_net(), torch.zeros(1, 1, 8, 8)
    share_bases(net, x, 4, groups={'a': ['0.1.0']})
    keys, recipe = {n: id(m) for n, m in net.named_modules()}, deepcopy(net._recipe)
    import paramfx.bases.share
    real, done = paramfx.bases.share.swap_module, []
    def half(model, name, new):
        if len(done) == 2: done.append(0); raise Stop
        done.append(0)
        return real(model, name, new)
    for name, f, kw in (('calibrate', stop, dict(basis_norm='calibrated')), ('swap_module', half, {})):
        with monkeypatch.context() as mp, pytest.raises(Stop):
            mp.setattr(f'paramfx.bases.share.{name}', f)
            share_bases(net, x, 4, groups={'a': ['0.1.1', '0.1.2']}, **kw)
        assert {n: id(m) for n, m in net.named_modules()} == keys and net._recipe == recipe


def test_norms_are_as_they_were_after_a_failing_calibration():
    from paramfx.bases.init import calibrate
    net, x = block_net(), torch.zeros(1, 1, 8, 8)
    share_bases(net, x, 4)
    layers = [*sharing_layers(net).values()]
    norms = [m.norm for m in layers]
    with pytest.raises(ValueError, match='there is none'): calibrate(net, layers, iter([]))
    with pytest.raises(ValueError, match="does not run through the model"): calibrate(net, layers, [x, x[:, :0]])
    assert all(a is m.norm for a, m in zip(norms, layers)) and not any(m._forward_pre_hooks for m in layers)


@pytest.mark.parametrize('kw', [dict(), dict(basis_norm='calibrated'), dict(init='svd', basis_norm=False), dict(mode='tie')], ids=str)
def test_frozen_layers_stay_frozen(kw):
    net = block_net()
    for p in net[0][1].parameters(): p.requires_grad_(False)
    share_bases(net, torch.zeros(1, 1, 8, 8), **{**dict(shared_rank=4), **kw})
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {'0.0.weight', '0.0.bias', '1.2.weight', '1.2.bias'}


@pytest.mark.parametrize('kw', [dict(shared_rank=.5, unique_rank=2),
    dict(n_bases=2, shared_rank=4, unique_rank=0), dict(shared_rank=4, basis_norm=False), dict(shared_rank=4, init=SVD(1), basis_norm='calibrated'),
                                dict(mode='tie'), dict(shared_rank=4, scale_rank=False, skip_first=False),
                                dict(shared_rank=4, groups={'a': ['0.1.1']})], ids=str)
def test_the_plan_is_what_is_done(kw):
    net, x = block_net(), torch.zeros(1, 1, 8, 8)
    table = plan_bases(net, x, **kw)
    assert not sharing_layers(net) and not net.__dict__.get('_recipe')
    done = share_bases(net, x, **kw)
    assert list(done) == list(
        table) and done.note == table.note and f'-> {n_params(net)[0]:,}' in done.note and done.note.endswith(f'-> {count_macs(net, x)[0]:,}')
    with pytest.raises(TypeError, match='shared_rnk'): plan_bases(net, x, shared_rnk=4)


@pytest.mark.parametrize('kw', [dict(), dict(basis_norm=False, unique_rank=0), dict(n_bases=2)], ids=str)
def test_grouped_layers_are_counted(kw):
    net, x = nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=4),
        nn.Conv2d(16, 8, 3, 2, 1, groups=2)) for _ in range(3)]), torch.randn(2, 8, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        table = share_bases(net, x, **{**dict(shared_rank=4, unique_rank=4, scale_rank=False), **kw})
    assert len(sharing_layers(net)) == 4 and f'-> {n_params(net)[0]:,}' in table.note and table.note.endswith(f'-> {count_macs(net, x)[0]:,}')


def test_without_values():
    net, x = block_net().to('meta'), torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match='0.0: its weight is on the device meta'): share_bases(net, x, 4, init='svd')
    share_bases(net, x, 4)
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {'meta'} and ortho_penalty(basis_groups(net)[0]).is_meta


def test_sharing_twice_and_under_an_effect_is_refused(mk):
    net, x = block_net(), torch.zeros(1, 1, 8, 8)
    share_bases(net, x, 4)
    with pytest.raises(ValueError, match='it shares filters already'): share_bases(net, x, 4)
    with pytest.raises(ValueError, match='shares filters already'): share_bases(net, x, 4, groups={'a': ['0.1.1']})
    from paramfx.channels.trace import trace_channels
    net = block_net()
    net._pending = [trace_channels(net, x).cut(.5)]
    with pytest.raises(ValueError, match='A cut waits'): share_bases(net, x, 4)
    with pytest.raises(ValueError, match='under dynamic_sparse'): mk(DynamicSparse(.5)).share_bases()


def test_warnings():
    net, x = block_net(), torch.zeros(1, 1, 8, 8)
    with pytest.warns(UserWarning, match='0.1: 30 shared and 1 unique filters in 4 layers need .* ordinary ones 2,304. Give lower ranks'):
        plan_bases(net, x, shared_rank=30)
    with pytest.warns(UserWarning, match='n_bases=2: no block has a second layer'):
        plan_bases(nets.densenet_cifar(), X, skip_first=False, scale_rank=False, n_bases=2)
    with pytest.warns(UserWarning, match="calibrated"): plan_bases(net, x, shared_rank=4, init='svd')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plan_bases(net, x, shared_rank=4)
        plan_bases(net, x, shared_rank=4, n_bases=2)


# -- conversion
def test_svd_error_is_the_tail_and_full_rank_is_exact():
    torch.manual_seed(0)
    net, x = block_net(n=4).double().eval(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    ws = torch.cat([b.get_submodule(c).weight.detach().flatten(1) for b in net[0][1][1:] for c in ('conv1', 'conv2')])
    sv = torch.linalg.svdvals(ws)
    for s in (3, 10, 16):
        twin = deepcopy(net)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            share_bases(twin, x, s, 0, init='svd', basis_norm=False)
        new = torch.cat([m.plain().weight.detach().flatten(1) for m in sharing_layers(twin).values()])
        assert abs(float((new-ws).square().sum()-sv[s:].square().sum())) < 1e-10
        assert ortho_penalty(basis_groups(twin)[0]) < 1e-20
    assert check_same(twin, net, x) < 1e-10  # 16 rows there are


@pytest.mark.parametrize('groups', [1, 2])
def test_sweeps_never_end_worse(groups):
    for seed in range(4):
        torch.manual_seed(seed)
        ws = [torch.randn(8, 6//groups, 3, 3, dtype=torch.float64) for _ in range(4)]
        errs = [svd_filters(ws, 4, 2, groups, sweeps=n) for n in (0, 1, 10)]
        assert errs[0][3] > errs[2][3] and errs[0][3] >= errs[1][3] >= errs[2][3]  # they help, too
        b, us, cs, err = errs[2]
        m = lambda t: t.flatten(1).unflatten(0, (groups, -1))
        got = sum((m(w)-c.flatten(1).unflatten(0, (groups, -1))@torch.cat([m(u), m(b)], 1)).square().sum() for w, u, c in zip(ws, us, cs))
        assert abs(float(got/sum(w.square().sum() for w in ws))-err) < 1e-10


@pytest.mark.parametrize('rows', [3, 9, 20])
def test_filters_are_those_of_another_decomposition(rows):
    "Against numpy's singular vectors, with fewer rows than dimensions and with more"
    import numpy as np
    rng = np.random.default_rng(rows)
    ws = [rng.standard_normal((rows, 2, 3, 3)) for _ in range(2)]
    flat = [w.reshape(rows, 18) for w in ws]
    b, us, cs, err = svd_filters([torch.from_numpy(w) for w in ws], 3, 2, sweeps=0)
    top = lambda m, n: np.linalg.svd(m)[2][:n]
    v = top(np.concatenate(flat), 3)
    b = b.flatten(1).numpy()
    assert np.abs(b.T@b-v.T@v).max() < 1e-8
    left = 0
    for w, u, c in zip(flat, us, cs):
        rest = w-w@v.T@v
        t, u = top(rest, 2), u.flatten(1).numpy()
        if rows > 3: assert np.abs(u.T@u-t.T@t).max() < 1e-8
        left += (np.linalg.svd(rest)[1][2:]**2).sum()
        assert np.abs(w-c.flatten(1).numpy()@np.concatenate([u, b])-(rest-rest@t.T@t)).max() < 1e-8
    assert abs(err-left/sum((w**2).sum() for w in flat)) < 1e-10


def test_sweeps_that_go_wrong_are_left_out(monkeypatch):
    "Exact ones never do; those of large matrices might"
    torch.manual_seed(0)
    ws = [torch.randn(8, 6, 3, 3, dtype=torch.float64) for _ in range(4)]
    want, top = svd_filters(ws, 4, 2, sweeps=0), svd_filters.__globals__['_top']
    monkeypatch.setitem(svd_filters.__globals__, '_top', lambda m, n, start=None: top(m, n) if start is None
        else torch.linalg.qr(torch.randn(1, 54, n, dtype=torch.float64))[0].mT)
    got = svd_filters(ws, 4, 2, sweeps=5)
    assert got[3] == want[3] and torch.equal(got[0], want[0]) and all(torch.equal(a, b) for a, b in zip(got[1]+got[2], want[1]+want[2]))


def test_large_matrices_are_turned(monkeypatch):
    torch.manual_seed(0)
    ws = [torch.randn(8, 6, 3, 3, dtype=torch.float64) for _ in range(4)]
    exact = svd_filters(ws, 4, 2)[3]
    monkeypatch.setattr('paramfx.bases.init._EXACT', 4)
    assert svd_filters(ws, 4, 2, sweeps=0)[3] >= svd_filters(ws, 4, 2)[3] and abs(svd_filters(ws, 4, 2)[3]-exact) < .02*exact


def test_folded_and_converted_again_is_the_same():
    torch.manual_seed(0)
    net, x = nets.resnet_cifar(20).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    share_bases(net, x, 6, 0, n_bases=2)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, .1); m.running_var.uniform_(.5, 1.5); m.weight.data.uniform_(.5, 1.5); m.bias.data.normal_(0, .1)
    plain = materialize(net, x)
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    share_bases(plain, x, 6, 0, n_bases=2, init='svd', basis_norm=False)
    assert check_same(plain, net, x) < 1e-10


def test_calibrated_norm_begins_as_the_identity():
    torch.manual_seed(0)
    a, x = block_net(n=8).eval(), torch.randn(64, 1, 8, 8)
    b = deepcopy(a)
    share_bases(a, x, 6, 1, init='svd', basis_norm=False)
    share_bases(b, x, 6, 1, init='svd', basis_norm='calibrated')
    assert check_same(b, a, x, tol=1e-4) > 0
    m = sharing_layers(b)['0.1.1.conv1']
    seen = []
    h = m.register_forward_pre_hook(lambda m, args: seen.append(m.responses(args[0])))
    b(x); h.remove()
    close(m.norm.running_mean, seen[0].mean((0, 2, 3)), 1e-5)
    close(m.norm.running_var, seen[0].transpose(0, 1).flatten(1).var(1), 1e-4)
    for n in sharing_layers(b).values(): n.norm.train()
    with torch.no_grad(): assert 0 < (b(x)-a(x)).abs().max() < .02*a(x).abs().max()  # in training, on the batch it was calibrated on


def test_tie_takes_the_mean():
    net, x = block_net(), torch.zeros(1, 1, 8, 8)
    ws = [b.conv1.weight.detach().clone() for b in net[0][1][1:]]
    share_bases(net, x, mode='tie', n_bases=2, init='svd')
    m = net[0][1][2].conv1
    assert type(m) is SharedConv2d and m.weight is net[0][1][1].conv1.weight and torch.allclose(m.weight, sum(ws)/2)
    plain = materialize(net, x)
    assert type(plain[0][1][2].conv1) is nn.Conv2d and plain[0][1][2].conv1.weight is not plain[0][1][1].conv1.weight


def test_tied_weights_begin_orthonormal_from_scratch():
    net = block_net()
    share_bases(net, torch.zeros(1, 1, 8, 8), mode='tie', n_bases=2)
    bases = {id(m.owner): m.basis for m in sharing_layers(net).values()}
    assert len(bases) == 2 and all(ortho_penalty([([b], [])]) < 1e-10 for b in bases.values())


def test_first_and_second_bases_apart():
    net = nets.resnet_cifar(20)
    share_bases(net, X, 8, 2, n_bases=2)
    parts = basis_groups(net, joint=False)
    assert [[(len(s), len(u)) for s, u in p] for p in parts] == [[(1, 2)]*3]*2 and not {id(t)
        for s, _ in parts[0] for t in s} & {id(t) for s, _ in parts[1] for t in s}
    for p, conv in zip(parts, ('conv1', 'conv2')):
        assert p[0][0][0] is sharing_layers(net)[f'layer1.1.{conv}'].basis and p[0][1][1] is sharing_layers(net)[f'layer1.2.{conv}'].unique


def test_a_learner_calibrates_on_batches_of_training(mk):
    "On the first ones, and no random state moves"
    kw, learn, other, one = dict(shared_rank=6, init='svd', basis_norm='calibrated'), *(mk() for _ in range(3))
    for l in (learn, other): l.dls.train.rng.seed(1); l.dls.train.rng.random()
    before = torch.get_rng_state(), learn.dls.train.rng.getstate()
    learn.share_bases(**kw)
    assert torch.equal(torch.get_rng_state(), before[0]) and learn.dls.train.rng.getstate() == before[1]
    other.share_bases(**kw | dict(basis_norm=Calibrated([(b[0],) for b in [*other.dls.train][:4]])))
    one.share_bases(**kw | dict(basis_norm=Calibrated([one.dls.valid.one_batch()[0][:1]])))
    mean = lambda l: sharing_layers(l.model)['0.1.1.conv1'].norm.running_mean
    assert torch.allclose(mean(learn), mean(other), atol=1e-5) and not torch.allclose(mean(learn), mean(one), atol=1e-3)


def test_coefficients_keep_activations_in_the_backward_pass():
    "Kaiming's rule for outputs, as published; they have nothing to do with how many filters there are"
    net = nn.Sequential(*[Block(128) for _ in range(2)])
    share_bases(net, torch.zeros(1, 128, 4, 4), 32, 0, skip_first=False)
    for m in sharing_layers(net).values(): assert abs(float(m.coeff.detach().std())/(2/128)**.5-1) < .04


def test_ranks_are_rounded_to_the_nearest():
    class Wider(nn.Sequential):
        def forward(self, x): return super().forward(F.pad(x, (0, 0, 0, 0, 0, 8)))
    net = nn.Sequential(nn.Sequential(*[Block(16) for _ in range(3)]), Wider(*[Block(24) for _ in range(3)]))
    ranks = lambda *args, **kw: [(g.shared, g.unique) for g in find_groups(net, *args, **kw)[0]]
    assert ranks(3, 1) == [(3, 1), (5, 2)] and ranks(3, 1, scale_rank=False) == [(3, 1), (3, 1)]
    assert ranks(.3, .07) == ranks(.3, .07, scale_rank=False) == [(5, 1), (7, 2)]
    # as many as there are dimensions, then one more
    assert ranks(16*9-1, 1, scale_rank=False)[0] == (143, 1) and ranks(16*9, 1, scale_rank=False) == [(144, 1)]


def test_init_is_orthonormal_in_all_of_a_stage():
    net = nets.resnet_cifar(20)
    share_bases(net, X, 16, 1, n_bases=2)
    for g in basis_groups(net)[0]: assert len(g[0]) == 2
    assert ortho_penalty(basis_groups(net)[0], unique=True) < 1e-10


# -- Learner
def test_learner_trains_saves_loads_exports_predicts(mk, tmp_path):
    learn = mk(opt_func=SGD).share_bases(shared_rank=6).add_cb(OrthoReg(1., unique=True))
    learn.fit_one_cycle(2, 1e-2)
    assert learn.recorder.metric_names[-2] == 'ortho' and learn.opt is not None
    learn.save('there')
    learn.export('there.pkl')
    x = tiny_dls().valid.one_batch()[0]
    out = learn.model.eval()(x)
    other = mk(seed=5, opt_func=SGD).share_bases(shared_rank=6).add_cb(OrthoReg(1., unique=True))
    other.load('there')
    assert torch.equal(other.model.eval()(x), out)
    other.fit(1)
    again = quiet(load_learner(tmp_path/'there.pkl'))
    assert torch.equal(again.model.eval()(x), out)
    again.dls = tiny_dls()
    again.fit(1)
    assert sharing_layers(again.model)
    learn.lr_find(num_it=5, show_plot=False)
    assert torch.equal(learn.model.eval()(x), out)
    preds = learn.get_preds(dl=learn.dls.valid)[0]
    learn.materialize()
    assert not sharing_layers(learn.model) and torch.allclose(learn.get_preds(dl=learn.dls.valid)[0], preds, atol=1e-4)
    learn.fit(1)


@pytest.mark.parametrize('ext', ['', '.safetensors'])
@pytest.mark.parametrize('mode', ['basis', 'tie'])
def test_plain_files(mk, ext, mode):
    learn = mk().share_bases(shared_rank=6, mode=mode).add_cb(OrthoReg(1.))
    learn.fit(1)
    f = learn.save_plain(f'plain{ext}')
    from safetensors.torch import load_file
    state = load_file(f) if ext else torch.load(f, weights_only=True)
    assert state.keys() == {k for k in learn.model.state_dict() if not k.endswith('_effect')}
    fresh = mk(seed=3).share_bases(shared_rank=6, mode=mode)
    fresh.model.load_state_dict(state, strict=True)
    x = tiny_dls().valid.one_batch()[0]
    assert torch.equal(fresh.model.eval()(x), learn.model.eval()(x))


def test_file_of_ordinary_layers_is_explained(mk):
    a = mk()
    a.create_opt(); a.save('dense')
    with pytest.raises(RuntimeError, match='0.1.1.conv1: the file holds the weight of an ordinary layer'):
        mk().share_bases(shared_rank=6).load('dense', with_opt=False)


def test_recipe_in_a_fresh_process(mk, tmp_path):
    learn = mk().share_bases(shared_rank=6, unique_rank=2, n_bases=2).add_cb(OrthoReg(2.))
    learn.fit(1)
    save_recipe(learn.model, tmp_path/'net.pth')
    save_recipe(materialize(learn.model, torch.zeros(2, 1, 8, 8)), tmp_path/'plain.pth')
    x = tiny_dls().valid.one_batch()[0]
    torch.save((x, learn.model.eval()(x)), tmp_path/'out.pt')
    code = f'''
import sys, torch
sys.path[:0] = {[str(p) for p in Path(__file__).resolve().parents[:2]]!r}
from test_bases import block_net
from paramfx.export.materialize import load_recipe
x, out = torch.load('out.pt')
net = load_recipe('net.pth', block_net()).eval()
assert torch.equal(net(x), out)
from paramfx.core.state import effects
assert effects(net)['ortho_reg'].settings['ortho_lambda'] == 2.
plain = load_recipe('plain.pth', block_net()).eval()
assert (plain(x)-out).abs().max() < 1e-4 and type(plain[0][1][1].conv1) is torch.nn.Conv2d
'''
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(Path(__file__).resolve().parent.parent.parent), os.environ.get('PYTHONPATH', '')])}
    r = run_fresh(code, cwd=tmp_path, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    with pytest.raises(ValueError, match='had a convolution here'): Recipe.of(learn.model).apply(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.few(3)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_an_optimizer_that_is_there_follows(mk, name):
    learn = mk(splitter=two_parts, **OPTIMIZERS[name])
    learn.fit(1)
    kept = learn.model[1][2].weight
    before = {k: v.clone() for k, v in _state(learn.opt, kept).items() if torch.is_tensor(v)}
    learn.share_bases(shared_rank=6)
    ids = [id(p) for g in learn.opt.param_lists for p in g]
    assert sorted(ids) == sorted(id(p) for p in learn.model.parameters()) and len(learn.opt.param_lists) == 2
    assert before and not same(before, {k: v for k, v in _state(learn.opt, kept).items() if torch.is_tensor(v)})
    learn.fit(1)
    frozen = mk(splitter=two_parts, **OPTIMIZERS[name])
    frozen.freeze()
    frozen.share_bases(shared_rank=6)
    owner = sharing_layers(frozen.model)['0.1.1.conv1']
    old = owner.shared.detach().clone()
    frozen.fit(1)
    assert torch.equal(owner.shared, old) and frozen.opt.frozen_idx == 1  # still frozen
    frozen.unfreeze(); frozen.fit(1)
    assert not torch.equal(owner.shared, old)


def _state(opt, p):
    while not isinstance(opt, torch.optim.Optimizer) and 'opt' in vars(opt): opt = opt.opt
    return dict(opt.state[p])


def test_fine_tune_and_plan(mk):
    learn = mk(splitter=two_parts).share_bases(shared_rank=6).add_cb(OrthoReg())
    learn.fine_tune(1, freeze_epochs=1)
    fresh = mk()
    state = snapshot(fresh.model)
    import paramfx.report.plan # gives Learner plan  # noqa: F401
    table = fresh.plan('share_bases', shared_rank=6)
    assert not same(snapshot(fresh.model), state) and table.after.params < table.before.params == n_params(fresh.model)[0]
    assert table.after.params == n_params(fresh.share_bases(shared_rank=6).model)[0] and fresh.paramfx['share_bases'] == list(table)


def test_layers_of_two_parameter_groups_do_not_share(mk):
    split = lambda m: [params(m[0][0])+params(m[0][1][:2]), params(m[0][1][2])+params(m[1])]
    learn = mk(splitter=split).share_bases(shared_rank=4, unique_rank=0)
    layers = sharing_layers(learn.model)
    assert len({id(m.owner) for m in layers.values()}) == 2 and layers['0.1.2.conv1'].owner is layers['0.1.2.conv1']
    import paramfx.report.plan # gives Learner plan  # noqa: F401
    planned = mk(splitter=split).plan('share_bases', shared_rank=4, unique_rank=0)
    assert list(planned) == learn.paramfx['share_bases'] and planned.after.params == n_params(learn.model)[0]
    by_opt = mk(splitter=split)
    by_opt.create_opt()
    by_opt.splitter = params  # the optimizer that is there decides
    assert len({id(m.owner) for m in sharing_layers(by_opt.share_bases(shared_rank=4, unique_rank=0).model).values()}) == 2
    with pytest.raises(ValueError, match='parameter group'): mk(splitter=split).share_bases(shared_rank=4, groups={'a': ['0.1.1', '0.1.2']})


@pytest.mark.parametrize('reg', [True, False])
def test_a_basis_in_two_parameter_groups_is_refused(mk, reg):
    twice = lambda m: [params(m[0]), params(m[1])+[o.basis for o in m.modules() if isinstance(o, BasisConv2d)][:1]]
    learn = mk(opt_func=SGD).share_bases(shared_rank=4)
    if reg: learn.add_cb(OrthoReg())
    state = snapshot(learn.model)
    learn.splitter = twice
    with pytest.raises(ValueError, match='0.1.1.conv1.shared: 2 times in the optimizer .parameter groups 0, 1.'): learn.fit(1)
    assert not same(snapshot(learn.model), state) and learn.opt is None
    if reg:  # an optimizer made by hand
        learn.opt = SGD(twice(learn.model), lr=.1)
        with pytest.raises(ValueError, match='2 times in the optimizer'): learn.fit(1)
        assert not same({k: v for k, v in snapshot(learn.model).items() if 'effect' not in k}, {k: v for k, v in state.items() if 'effect' not in k})


@pytest.mark.parametrize('kind', ['raises', 'computed', 'twice'])
def test_a_splitter_that_knows_the_old_layers(mk, kind):
    "The optimizer cannot be made anew: network, optimizer and report are as before"
    def split(m):
        if kind == 'twice': return [params(m[0]), params(m[1])+[o.basis for o in m.modules() if isinstance(o, BasisConv2d)][:1]]
        ws = [(b.conv1._parameters['weight'] if kind == 'raises' else b.conv1.weight) for b in m[0][1]]
        return [ws, [p for p in m.parameters() if all(p is not w for w in ws)]]
    learn = mk(opt_func=SGD, splitter=split)
    learn.fit(1)
    before, opt = {n: id(m) for n, m in learn.model.named_modules()}, learn.opt
    with pytest.raises((KeyError, ValueError), match=dict(raises='weight', computed='group 0 .* computed tensor of shape .8, 8, 3, 3.', twice='2 times')[kind]):
        learn.share_bases(shared_rank=4)
    assert {n: id(m) for n, m in learn.model.named_modules()} == before and learn.opt is opt and not learn.paramfx and '_recipe' not in vars(learn.model)
    learn.fit(1)


def test_vision_learner_and_one_channel(tmp_path):
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet18
    dls = tiny_dls(n=64, n_valid=32, bs=16, scale=4)
    learn = quiet(vision_learner(dls, resnet18, pretrained=False, n_in=1, n_out=10, path=tmp_path, loss_func=nn.CrossEntropyLoss()))
    learn.share_bases(shared_rank=8).add_cb(OrthoReg())
    assert len(sharing_layers(learn.model)) == 8
    learn.fine_tune(1, freeze_epochs=1)
    assert check_same(materialize(learn.model, dls.valid.one_batch()[0]), learn.model, dls.valid.one_batch()[0]) < 1e-4


def test_timm_body():
    timm = pytest.importorskip('timm')
    net = timm.create_model('resnet10t', pretrained=False, num_classes=10, in_chans=1)
    x = torch.randn(2, 1, 64, 64)
    share_bases(net, x, 8, 1, skip_first=False)
    assert sharing_layers(net) and check_same(materialize(net, x), net, x) < 1e-4


# -- the callback
DECAYING = {'fastai sgd': partial(SGD, mom=.9), 'fastai adam': Adam,
    'fastai l2': partial(SGD, mom=.9, decouple_wd=False), 'torch sgd': partial(OptimWrapper,
    opt=partial(torch.optim.SGD, weight_decay=.1)), 'torch adamw': partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=.1))}

@pytest.mark.few(3)
@pytest.mark.parametrize('opt', DECAYING)
@pytest.mark.parametrize('unique', [False, True])
def test_bases_out_of_weight_decay(mk, opt, unique):
    "Frozen by a zero gradient, a decayed weight shrinks and a basis does not"
    class NoGrad(Callback):
        order = 10.6
        def before_step(self):
            for p in self.learn.model.parameters(): p.grad = torch.zeros_like(p)
    def run(**kw):
        learn = mk(opt_func=DECAYING[opt], **{} if 'torch' in opt else dict(wd=.1)).share_bases(shared_rank=6, unique_rank=2)
        start = snapshot(learn.model)
        learn.fit(1, 1e-2, cbs=[OrthoReg(1., unique=unique, **kw), NoGrad()])
        return learn, {k: bool((snapshot(learn.model)[k].abs().sum() < start[k].abs().sum()*.999))
            for k in ('0.1.1.conv1.shared', '0.1.1.conv1.unique', '0.1.1.conv1.coeff', '1.2.weight')}
    assert all(run()[1].values())
    learn, shrunk = run(basis_wd=False)
    assert list(shrunk.values()) == [False, not unique, True, True]
    n = len(learn.opt.param_lists)
    assert n == 1  # the groups are whole again
    learn.release()
    learn.fit(1, 1e-2, cbs=NoGrad())
    start = snapshot(learn.model)
    learn.fit(1, 1e-2, cbs=NoGrad())
    assert snapshot(learn.model)['0.1.1.conv1.shared'].abs().sum() < start['0.1.1.conv1.shared'].abs().sum()*.999  # and weight decay is back


def test_split_groups_are_exact():
    "A torch optimizer with split groups against one built with two groups"
    for make in (partial(torch.optim.SGD, lr=.1, momentum=.9, weight_decay=.1),
        partial(torch.optim.AdamW, lr=.1, weight_decay=.1), partial(torch.optim.Adam, lr=.1, weight_decay=.1)):
        torch.manual_seed(0)
        a = [nn.Parameter(torch.randn(3)) for _ in range(3)]
        b = deepcopy(a)
        one, two = make(a), make([dict(params=[b[0], b[2]]), dict(params=[b[1]], weight_decay=0.)])
        off = StepWithoutDecay(one, [a[1]])
        for _ in range(4):
            for p, q in zip(a, b): p.grad = torch.randn(3); q.grad = p.grad.clone()
            one.step(); two.step()
            assert len(one.param_groups) == 1
        assert all(torch.equal(p, q) for p, q in zip(a, b))
        off.remove()


def test_a_group_that_counts_keeps_count():
    "Some optimizers write into their groups"
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for g in self.param_groups: g['k'] = g.get('k', 0)+1
            return super().step(closure)
    ps = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    opt = Counting([dict(params=ps[:2]), dict(params=ps[2:])], lr=.1, weight_decay=.5)
    off = StepWithoutDecay(opt, ps[1:])
    for p in ps: p.grad = torch.zeros(2)
    for _ in range(3): opt.step()
    off.remove()
    assert [(g['k'], g['weight_decay'], len(g['params'])) for g in opt.param_groups] == [
        (3, .5, 2), (3, .5, 1)] and ps[1].tolist() == ps[2].tolist() == [1, 1] and ps[0][0] < 1


def test_files_of_another_setting(mk):
    "Weights are weights; a run that is to be continued is the same run"
    from paramfx.core.runs import RunState
    class Stop(Callback):
        order = 90
        def after_epoch(self):
            if self.epoch == 0: raise RuntimeError('stop')
    new = lambda *args, **kw: mk(opt_func=SGD, wd=.1).share_bases(shared_rank=4).add_cb(OrthoReg(*args, **kw))
    a = new(1., basis_wd=False)
    a.fit(2, 1e-3, cbs=RunState('whole')); a.save('file')
    b = new(1., basis_wd=False)
    with pytest.raises(RuntimeError, match='stop'): b.fit(2, 1e-3, cbs=[RunState('half'), Stop()])
    same_run = new(1., basis_wd=False).resume('half')
    same_run.fit(2, 1e-3)
    assert not same(snapshot(same_run.model), snapshot(a.model))
    for args, kw, text in (((2.,), dict(basis_wd=False), 'ortho_lambda=1.0 -> 2.0'), ((1.,), {}, 'basis_wd=False -> True')):
        with pytest.raises(ValueError, match=text): new(*args, **kw).resume('half').fit(2, 1e-3)
    other = new(2.)
    other.load('file')
    basis = lambda l: sharing_layers(l.model)['0.1.1.conv1'].shared
    assert torch.equal(basis(other), basis(a)) and other.opt.state[basis(other)]['do_wd'] is False  # so says the file
    other.fit(1, 1e-3)
    assert 'do_wd' not in other.opt.state[basis(other)]  # the callback decides


def test_bases_of_other_kinds_are_not_stacked():
    net = nn.ModuleList([BasisConv2d(4, 8, 3, 4), BasisConv2d(36, 8, 1, 4), BasisConv2d(4, 8, 3, 4).double(), BasisConv2d(4, 8, 3, 4)])
    for m in net: m.stage = 'a'
    assert [[len(s), len(u)] for s, u in basis_groups(net)[0]] == [[2, 2], [1, 1], [1, 1]]
    assert OrthoReg(unique=True).plan(net)[0]['filters'] == 8


def test_no_shared_bases_and_bad_settings(mk):
    learn = mk()
    state = snapshot(learn.model)
    with pytest.raises(ValueError, match='learn.share_bases'): learn.add_cb(OrthoReg())
    with pytest.raises(ValueError, match='learn.share_bases'): learn.fit(1, cbs=OrthoReg())
    assert not same(snapshot(learn.model), state)
    for kw, text in ((dict(ortho_lambda=-1), 'ortho_lambda=-1'), (dict(ortho_lambda=float('nan')), 'nan'),
        (dict(ortho_lambda='1'), "'1'"), (dict(norm='x'), "norm='x'"), (dict(side='x'), "side='x'"),
        (dict(joint=2), 'joint=2'), (dict(basis_wd=0), 'basis_wd=0'), (dict(unique='y'), "unique='y'")):
        with pytest.raises(ValueError, match=text): OrthoReg(**kw)


@pytest.mark.parametrize('kw', [dict(), dict(unique=True), dict(norm='group'), dict(norm='sum', side='auto'), dict(joint=False)], ids=str)
def test_penalty_is_added_once_and_not_shown(mk, kw):
    "The gradient of one step is that of the loss plus that of the penalty, and the loss on record is the task's"
    class Seen(Callback):
        order = 12
        def before_step(self):
            if not hasattr(self, 'grads'): self.grads = {n: p.grad.clone() for n, p in self.learn.model.named_parameters()}; self.shown = float(self.learn.loss)
    seen, plain = Seen(), Seen()
    a, b = (mk().share_bases(shared_rank=6, n_bases=2) for _ in range(2))
    for l in (a, b):
        with torch.no_grad():
            for m in sharing_layers(l.model).values(): m.basis.mul_(1.1)
    twin = deepcopy(a.model)
    for l, cbs in ((a, [OrthoReg(3., **kw), seen]), (b, [plain])):
        seed_all(1); l.dls.train.rng.seed(1)
        l.fit(1, cbs=cbs)
    parts = basis_groups(twin, kw.get('joint', True))
    (3*sum(ortho_penalty(g, kw.get('unique', False), kw.get('norm', 'global'), True, kw.get('side', 'rows')) for g in parts)).backward()
    assert seen.shown == plain.shown and any(p.grad is not None and p.grad.abs().max() > 1e-3 for p in twin.parameters())
    for n, p in twin.named_parameters():
        want = plain.grads[n]+(0 if p.grad is None else p.grad)
        assert torch.allclose(seen.grads[n], want, atol=1e-6), n


def test_balance_formula():
    "Weight decay alone against the penalty: the row comes to rest where the formula says"
    n, lam, wd = 4, 1., .1
    b = nn.Parameter(torch.linalg.qr(torch.randn(18, n))[0].T.reshape(n, 2, 3, 3).contiguous())
    opt = torch.optim.SGD([b], lr=.5, weight_decay=wd)
    for _ in range(500):
        opt.zero_grad(); (lam*ortho_penalty([([b], [])])).backward(); opt.step()
    assert torch.allclose(b.flatten(1).square().sum(1), torch.tensor(1-wd*n*n/(4*lam)), atol=1e-3)


AT_REST = {'sgd': (partial(SGD, mom=.9), .02), 'sgd l2': (partial(SGD, mom=.9, decouple_wd=False), .02),
    'torch sgd': (partial(torch.optim.SGD, weight_decay=.2, momentum=.9, nesterov=True), .02),
           'torch nadam': (partial(torch.optim.NAdam, weight_decay=.2), .01), 'torch adagrad': (partial(torch.optim.Adagrad, weight_decay=.2), .05)}

@pytest.mark.parametrize('name', AT_REST)
def test_pull_of_weight_decay(name):
    "Where a row comes to rest under each optimizer, against the formula with `decay_pull`"
    f, lr = AT_REST[name]
    torch.manual_seed(0)
    b = nn.Parameter(torch.linalg.qr(torch.randn(18, 4))[0].T.reshape(4, 2, 3, 3).contiguous())
    opt = f([b], lr=lr)
    if hasattr(opt, 'set_hypers'): opt.set_hypers(wd=.2)
    for _ in range(600):
        opt.zero_grad(); ortho_penalty([([b], [])]).backward(); opt.step()
    hyper = opt.hypers[0] if hasattr(opt, 'hypers') else dict(wd=.2)
    assert torch.allclose(b.flatten(1).square().sum(1), torch.tensor(1-decay_pull(opt, hyper)*4*4/4), atol=5e-3)


@pytest.mark.parametrize('kw,warns', [(dict(wd=.1), True), (dict(wd=.1, opt_func=partial(SGD, mom=.9)), False),
    (dict(wd=.1, opt_func=partial(SGD, mom=.9, decouple_wd=False)), True), (dict(wd=1e-4), False),
    (dict(wd=.1, opt_func=Adam), False), (dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, weight_decay=.1))), True),
                                      (dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=.1))), False)],
                         ids=['SGD', 'momentum', 'momentum, l2', 'little decay', 'decoupled', 'torch SGD', 'torch AdamW'])
def test_warning_where_unit_norm_cannot_hold(mk, kw, warns):
    for norm, told in (('global', warns), ('sum', False)):
        learn = mk(**{'opt_func': SGD, **kw}).share_bases(shared_rank=8).add_cb(OrthoReg(1., norm=norm))
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            learn.fit(1, 1e-3)
        assert any('settle at a norm' in str(w.message) for w in ws) == told


@pytest.mark.few(2)
@pytest.mark.parametrize('ranks,kw,entries', [((6, 2), {}, 2*36), ((6, 2), dict(norm='group'), 36),
    ((6, 2), dict(norm='sum'), 1), ((6, 2), dict(unique=True), 2*(6*(6+4*2)+4*4)), ((0, 2), dict(unique=True), 2*4*4)], ids=str)
def test_warning_tells_the_norm_of_the_formula(mk, ranks, kw, entries):
    "1 - w c/(4 lambda) is the squared norm; two stages of two blocks that share"
    def net():
        return nn.Sequential(nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1),
            *[nn.Sequential(*[Block(8) for _ in range(3)]) for _ in range(2)]), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))
    for low in (.3, -.2, .55):
        learn = mk(model=net, opt_func=SGD, wd=.01).share_bases(shared_rank=ranks[0], unique_rank=ranks[1])
        learn.add_cb(OrthoReg(.01*entries/(4*(1-low)), **kw))
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            learn.fit(1, 1e-4)
        told = [str(w.message) for w in ws if 'settle at a norm' in str(w.message)]
        assert len(told) == (low < .5) and all(f'norm of {max(low, 0)**.5:.2f} ' in t for t in told)


class HalfCPU(MixedPrecision):
    "Autocast as on a GPU, on the CPU"
    def before_fit(self): self.autocast, self.learn.scaler = torch.autocast('cpu', dtype=torch.bfloat16), torch.amp.GradScaler('cpu', enabled=False)
    def before_batch(self): self.autocast.__enter__()
    def after_loss(self): self.autocast.__exit__(None, None, None)
    def before_backward(self): pass
    def before_step(self): pass


def test_mixed_precision_and_accumulation(mk):
    learn = mk().share_bases(shared_rank=6).add_cb(OrthoReg(1.))
    learn.fit(1, cbs=[HalfCPU(), GradientAccumulation(64)])
    assert all(p.isfinite().all() for p in learn.model.parameters()) and learn.ortho_reg.effect.clock.steps == 4


def test_part_of_a_network_is_refused(mk):
    learn = mk().share_bases(shared_rank=6)
    part = nn.Sequential(learn.model[0][1][2])
    with pytest.raises(ValueError, match='0.conv1: the layer that owns'): OrthoReg().plan(part)
