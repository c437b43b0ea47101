"""Shared bases against the golden vectors: the penalty with its gradients, and the published blocks in both modes."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paramfx.bases.layers import BasisConv2d, SharedConv2d
from paramfx.bases.ortho import ortho_penalty

TOL = 1e-10


@pytest.fixture(scope='module')
def ortho(golden): return np.load(golden/'shared_bases/ortho_reg.npz')


@pytest.fixture(scope='module')
def blocks(golden): return np.load(golden/'shared_bases/blocks.npz')


def close(got, want): assert (got.detach()-torch.from_numpy(np.asarray(want))).abs().max() <= TOL, (got.detach()-torch.from_numpy(np.asarray(want))).abs().max()


# -- the penalty
PENALTIES = ['cifar10_double_with_unique', 'cifar10_double_shared_terms_only', 'cifar10_single_with_unique', 'cifar10_single_shared_terms_only',
             'cifar10_sharedonly', 'cifar100_single_3x3', 'cifar100_single_grouped', 'cifar100_single_overcomplete_1x1', 'cifar100_double_separate',
             'ilsvrc_double_joint', 'ilsvrc_single']


def test_no_case_is_left_out(ortho, blocks):
    assert {k.split('/')[0] for k in ortho.files} == set(PENALTIES)
    assert {k.split('/')[0] for k in blocks.files} == set(BLOCKS) | RECURSION


@pytest.fixture
def case(ortho):
    "Weights of a case by name, and its groups"
    def f(name):
        ws = {k.split('/w/')[1]: torch.from_numpy(ortho[k]).requires_grad_() for k in ortho.files if k.startswith(f'{name}/w/')}
        groups = {}
        for k, t in ws.items(): groups.setdefault(k.split('/')[0], ([], []))['unique' in k].append(t)
        return ws, list(groups.values())
    return f


@pytest.mark.parametrize('side', ['rows', 'auto'])
@pytest.mark.parametrize('name', PENALTIES)
def test_penalty(ortho, case, name, side):
    ws, groups = case(name)
    kw = dict(unique=name.endswith('with_unique'), joint='separate' not in name, side=side)
    r = ortho_penalty(groups, **kw)
    r.backward()
    over = sum(max(0, len(s)-s[0].numel()) for g in groups for s in g[0])
    if side == 'rows' or not over: close(r, ortho[f'{name}/value'])
    else: assert r < float(ortho[f'{name}/value'])
    for k, t in ws.items():
        want = ortho[f'{name}/g/{k}'] if f'{name}/g/{k}' in ortho.files else 0*t.detach().numpy()
        close(torch.zeros_like(t) if t.grad is None else t.grad, want)


@pytest.mark.parametrize('name', [n for n in PENALTIES if 'separate' in n])
def test_parts_of_separate(ortho, case, name):
    _, groups = case(name)
    for i in (0, 1): close(ortho_penalty([([s[i]], []) for s, _ in groups]), ortho[f'{name}/value{i+1}'])


# -- the blocks
class Case:
    "Modules of one golden block, from its weights"
    def __init__(self, z, name, block=''):
        self.z, self.name, self.pre = z, name, f'{name}/w/{block}'
        self.parts = nn.ModuleDict()

    def t(self, key): return torch.from_numpy(self.z[self.pre+key])
    def has(self, key): return self.pre+key in self.z.files
    def param(self, key): return nn.Parameter(self.t(key)) if self.has(key) else None

    def bn(self, key):
        bn = nn.BatchNorm2d(len(self.t(f'{key}.weight'))).double()
        bn.load_state_dict({k: self.t(f'{key}.{k}') for k in ('weight', 'bias', 'running_mean', 'running_var')}, strict=False)
        self.parts[key.replace('.', '_')] = bn
        return bn

    def conv(self, key, groups=1, **kw):
        w = self.t(f'{key}.weight')
        c = nn.Conv2d(w.shape[1]*groups, len(w), w.shape[-1], padding=w.shape[-1]//2, bias=False, groups=groups, **kw).double()
        c.weight = nn.Parameter(w)
        self.parts[key.replace('.', '_')] = c
        return c

    def basis(self, i, shared):
        "The i-th decomposed convolution; `shared`: its basis, or a layer that owns it"
        coeff = self.param(f'coeff{i}.weight')
        any_ = self.t(f'unique{i}.weight') if self.has(f'unique{i}.weight') else shared
        conv = nn.Conv2d(any_.shape[1], len(coeff), 3, padding=1, bias=False).double()
        m = BasisConv2d.of(conv, shared, self.param(f'unique{i}.weight'), coeff, self.bn(f'basisbn{i}'))
        self.parts[f'd{i}'] = m
        return m


def basic(c):
    "Two decomposed convolutions and a shortcut"
    d1 = c.basis(1, c.param('shared1.weight'))
    s2 = c.param('shared2.weight') if c.has('shared2.weight') else d1 if d1.basis is not None else None
    d2, b1, b2 = c.basis(2, s2), c.bn('bn1'), c.bn('bn2')
    return lambda x: F.relu(b2(d2(F.relu(b1(d1(x))))) + x)


def densenet(c):
    d, b0, b1, conv1 = c.basis(2, c.param('shared1.weight')), c.bn('bn0'), c.bn('bn1'), c.conv('conv1')
    return lambda x: torch.cat([x, d(F.relu(b1(conv1(F.relu(b0(x))))))], 1)


def resnext(c):
    "Filters of two layers without coefficients: the block's last convolution has their part"
    conv1, conv3, b1, b2, b3 = c.conv('conv1'), c.conv('conv3'), c.bn('bn1'), c.bn('bn2'), c.bn('bn3')
    groups = lambda key: len(conv1.weight)//c.t(key).shape[1]
    one = lambda key: SharedConv2d.of(c.conv(key[:-7], groups(key)), c.param(key))
    u, s = one('unique2.weight'), one('shared1.weight')
    c.parts['s1'] = s
    def both(a): return torch.cat([u(a), s(a)], 1)
    return lambda x: F.relu(b3(conv3(F.relu(b2(both(F.relu(b1(conv1(x)))))))) + x)


def tied(c, key):
    "A whole convolution that is shared"
    conv = c.conv(key)
    m = c.parts[f's{key[-1]}'] = SharedConv2d.of(conv, nn.Parameter(conv.weight.detach().clone()))
    return m


def mobilenet(c):
    s1, conv2, b1, b2, b3 = tied(c, 'shared1'), c.conv('conv2', 12), c.bn('bn1'), c.bn('bn2'), c.bn('bn3')
    last = c.conv('conv3')
    return lambda x: b3(last(F.relu(b2(conv2(F.relu(b1(s1(x)))))))) + x


def bottleneck(c):
    conv1, s1, b1, b2, b3 = c.conv('conv1'), tied(c, 'shared1'), c.bn('bn1'), c.bn('bn2'), c.bn('bn3')
    last = c.conv('conv3')
    return lambda x: F.relu(b3(last(F.relu(b2(s1(F.relu(b1(conv1(x)))))))) + x)


BLOCKS = dict(basic_single=basic, basic_double=basic, basic_sharedonly=basic, basic_nonshared=basic, densenet_single=densenet,
              resnext_single=resnext, mobilenet_shared=mobilenet, bottleneck_shared_single=bottleneck)
RECURSION = {'recursion_single_2blocks'}


@pytest.mark.parametrize('name', BLOCKS)
def test_block(blocks, name):
    c = Case(blocks, name)
    f, z, x = BLOCKS[name](c), blocks, torch.from_numpy(blocks[f'{name}/x'])
    outs = {}
    for i in (1, 2):
        if f'd{i}' in c.parts: c.parts[f'd{i}'].register_forward_hook(lambda m, a, out, i=i: outs.update({i: (a[0].detach(), out.detach())}))
    c.parts.eval()
    close(f(x), z[f'{name}/eval/y'])
    for i, (a, out) in outs.items():  # in evaluation, by itself, and as an ordinary convolution
        key = f'{name}/eval/coeff{i}_out'
        close(out, z[key])
        plain = c.parts[f'd{i}'].plain()
        assert type(plain) is nn.Conv2d
        close(plain(a), z[key])
    c.parts.train()
    y = f(x)
    close(y, z[f'{name}/train/y'])
    (y*torch.from_numpy(z[f'{name}/probe'])).sum().backward()
    shared = {1: [m for k, m in c.parts.items() if k in ('d1', 's1')]
        or [m for k, m in c.parts.items() if k == 'd2'], 2: [m for k, m in c.parts.items() if k in ('d2', 's2')]}
    n = 0
    for i in (1, 2):
        if f'{name}/train/grad_shared{i}.weight' in z.files:
            close(shared[i][0].basis.grad, z[f'{name}/train/grad_shared{i}.weight']); n += 1
        for k in ('running_mean', 'running_var'):
            if f'{name}/train/after_basisbn{i}.{k}' in z.files: close(getattr(c.parts[f'basisbn{i}'], k), z[f'{name}/train/after_basisbn{i}.{k}'])
    assert n == sum(k.startswith(f'{name}/train/grad') for k in z.files) and (n or 'nonshared' in name)


@pytest.mark.parametrize('name', sorted(RECURSION))
def test_gradient_of_a_basis_is_the_sum_over_its_uses(blocks, name):
    z, x, n = blocks, torch.from_numpy(blocks[f'{name}/x']), int(name[-7])
    def chain(apart):
        "The blocks, sharing one basis, or each use with a copy of its own"
        owner, fs, layers = None, [], []
        for i in range(1, n+1):
            c = Case(z, name, f'block{i}/')
            pre, c.pre = c.pre, f'{name}/w/'
            shared = c.param('shared1.weight')
            c.pre = pre
            d1 = c.basis(1, owner if owner is not None and not apart else shared)
            owner = d1 if owner is None else owner
            d2 = c.basis(2, nn.Parameter(shared.detach().clone()) if apart else owner)
            b1, b2 = c.bn('bn1'), c.bn('bn2')
            layers += [d1, d2]
            fs.append(lambda v, d1=d1, d2=d2, b1=b1, b2=b2: F.relu(b2(d2(F.relu(b1(d1(v))))) + v))
        v = x
        for f in fs: v = f(v)
        (v*torch.from_numpy(z[f'{name}/probe'])).sum().backward()
        return v, layers
    y, layers = chain(False)
    close(y, z[f'{name}/train/y'])
    close(layers[0].shared.grad, z[f'{name}/train/grad_shared1.weight'])
    y, layers = chain(True)
    close(y, z[f'{name}/train/y'])
    for i, m in enumerate(layers): close(m.shared.grad, z[f'{name}/train/grad_use{i+1}'])
    close(sum(m.shared.grad for m in layers), z[f'{name}/train/grad_shared1.weight'])
