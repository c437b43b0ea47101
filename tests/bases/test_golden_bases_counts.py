"""The published table of shared bases: every row by name, its parameters and multiply-adds to the unit, what was printed about it,
and its checkpoints, read into a network of ours and compared with one written down here in the published layout."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paramfx import zoo
from paramfx.bases.layers import sharing_layers
from paramfx.bases.join import Joined, join_bases
from paramfx.bases.published import printed_flops, published_keys, share_published, shared_recipe
from paramfx.zoo.networks import ECA
from paramfx.export.materialize import materialize
from paramfx.report.cost import count_macs, n_params
from fresh import run_fresh

GOLDEN = Path(__file__).parent.parent/'golden/shared_bases'
ROWS = json.loads((GOLDEN/'counts.json').read_text())['rows']
DATASETS = {'CIFAR-10': 'cifar10', 'CIFAR-100': 'cifar100', 'ILSVRC2012': 'imagenet'}
NAMES = {'ResNeXt50': 'resnext50_32x4d', 'MobileNetV2': 'mobilenet_v2', 'DenseNet': 'densenet', 'ResNet': 'resnet'}
ABLATIONS = {'ResNet32 shared-only S16': 'resnet32-S16U0*', 'ResNet56 non-shared U16': 'resnet56-S0U16'}
SWAPPED = {'DenseNet121-S64U4': 'densenet121-S16U1', 'ResNeXt50-S16U1': 'resnext50_32x4d-S64U4'}


def ours(r):
    "Data set and row of ours"
    name = SWAPPED.get(r['row']) or ABLATIONS.get(r['row']) or r['row']
    for k, v in NAMES.items(): name = name.replace(k, v)
    return DATASETS[r['dataset']], name + ('_expand' if (r['dataset'], name) == ('ILSVRC2012', 'mobilenet_v2') else '')


COUNTED = [r for r in ROWS if r['counted']]


@pytest.fixture(scope='module')
def table(): return {(r['dataset'], r['row']): r for r in zoo.published('shared_bases').to_dict('records')}


# ------------------------------------------------------------------ counts
@pytest.mark.parametrize('row', COUNTED, ids=lambda r: '/'.join(ours(r)))
def test_every_row_to_the_unit(table, row):
    got, want = table[ours(row)], row['counted']
    assert (got['row_params'], got['row_macs']) == (want['params'], want['macs'])


@pytest.mark.parametrize('row', COUNTED, ids=lambda r: '/'.join(ours(r)))
def test_every_row_in_printed_flops(table, row):
    "The convention behind the printed FLOPs, to the unit, too"
    got = table[ours(row)]
    assert got['row_flops'] == row['counted']['ptflops_macs']*(1 if got['flops_are'] == 'MACs' else 2)


TRUNCATED = {'resnet32-S16U1*': 1000, 'resnet56-S16U1*': 1000}


def test_every_printed_figure_rounds_from_what_is_counted(table):
    "Of parameters and FLOPs, also of the rows without a golden count; printed figures that are cut off or misprinted are known"
    seen = 0
    for (_, name), r in table.items():
        for printed, n in ((r['params'], r['row_params']), (r['flops'], r['row_flops'])):
            if not printed: continue
            unit = dict(M=1e6, G=1e9)[printed[-1]]
            digits = len(printed.partition('.')[2])-1
            same = f'{n/unit:.{digits}f}{printed[-1]}' == printed
            if printed.endswith('M') and name in TRUNCATED: assert not same and f'{math.floor(n/unit*100)/100:.2f}M' == printed
            elif printed.endswith('M') and name == 'resnet56-S16U1': assert not same and 'misprint' in r['note']
            else: assert same, (name, printed, n)
            seen += 1
    assert seen == 44


@pytest.mark.parametrize('row', [r for r in COUNTED if r['published'] and r['kind'] in ('shared', 'alt')], ids=lambda r: '/'.join(ours(r)))
def test_breakdown(row):
    "The network that `build` makes under the name of the row: the basis once, all else where it was"
    net, b = zoo.build('/'.join(ours(row))), row['counted']['breakdown']
    layers = sharing_layers(net)
    if shared_recipe('/'.join(ours(row)))['mode'] == 'basis':
        got = dict(shared_basis=sum(m.shared.numel() for m in layers.values() if m.owner is m), unique_basis=sum(m.unique.numel() for m in layers.values()),
                   coefficients=sum(m.coeff.numel() for m in layers.values()))
    else: got = dict(shared_basis=sum(m.weight.numel() for m in layers.values() if m.owner is m), unique_basis=0, coefficients=0)
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert {**got, 'batchnorm': norms} == {k: b[k] for k in ('shared_basis', 'unique_basis', 'coefficients', 'batchnorm')}
    assert n_params(net)[0] == row['counted']['params']


def test_mislabelled_rows_are_under_their_true_ranks(table):
    a, b = table['cifar100', 'densenet121-S16U1'], table['cifar100', 'resnext50_32x4d-S64U4']
    assert (a['shared_rank'], a['unique_rank'], b['shared_rank'], b['unique_rank']) == (16, 1, 64, 4)
    assert 'DenseNet121-S64U4' in a['note'] and 'ResNeXt50-S16U1' in b['note'] and (a['top1'], b['top1']) == (22.15, 20.09)
    assert not {('cifar100', 'densenet121-S64U4'), ('cifar100', 'resnext50_32x4d-S16U1')} & table.keys()
    with pytest.raises(ValueError, match='multiple of 4'): zoo.build('cifar100/resnext50_32x4d-S16U1')


def test_settings_of_the_table_are_those_of_the_name(table):
    for (dataset, name), r in table.items():
        if '-' not in name: assert r['mode'] == ''; continue
        kw = shared_recipe(f'{dataset}/{name}')
        assert kw.pop('network') == r['network'] and {k: r[k] for k in kw} == kw
        assert 'shared_rank' in kw or r['mode'] == 'tie'


@pytest.mark.parametrize('name', ['cifar10/resnet32-S16U1', 'cifar100/mobilenet_v2-SharedDouble',
    'cifar100/resnext50_32x4d-S64U4', 'imagenet/mobilenet_v2-Shared++'])
def test_counts_without_values_are_those_with(table, name):
    "The table is counted on the device meta; these are real, and run"
    net, r = zoo.build(name), table[tuple(name.split('/'))]
    assert (n_params(net)[0], *printed_flops(net, zoo.sample(name), r['network'])) == (r['row_params'],
        r['row_macs'], r['row_flops']//(1 if r['flops_are'] == 'MACs' else 2))


def test_other_ranks_and_classes():
    net = zoo.build('cifar10/resnet20-S4U2*', n_out=7, width=.5)
    assert net.eval()(zoo.sample('cifar10')).shape == (1, 7) and len(sharing_layers(net)) == 12
    with torch.no_grad(): assert zoo.build('imagenet/mobilenet_v2-Shared++', n_out=3).eval()(zoo.sample('imagenet', size=(3, 64, 64))).shape == (1, 3)


@pytest.mark.parametrize('name,text', [
    ('cifar10/resnet32-S16', "'S16' is no form"), ('cifar10/resnet32-', "'' is no form"),
    ('cifar10/resnt32-S8U1', 'resnet32'), ('cifar11/resnet32-S8U1', 'data set'),
    ('cifar10/resnet32-S0U0', 'no filter'), ('cifar10/resnet32-S9999U1', 'dimensions'), ('cifar10/resnet32-Shared+', "'Shared+' is no form"),
    ('cifar100/resnext50_32x4d-S64U4*', 'one basis per stage'), ('cifar100/resnext50_32x4d-S12U4', 'do not divide')])
def test_names_that_say_nothing(name, text):
    with pytest.raises(ValueError, match=re.escape(text)): zoo.build(name)


def test_data_of_a_shared_row(tmp_path):
    "The form does not matter to the loader, a network that is not there does"
    with pytest.raises(Exception, match='CIFAR'): zoo.dls('cifar10/resnet32-S16U1*', path=tmp_path)
    with pytest.raises(ValueError, match='No network is called'): zoo.dls('cifar10/nosuchnet-S16U1', path=tmp_path)


def test_the_zoo_counts_without_any_other_import():
    "Families register themselves when they are asked"
    code = ("from paramfx import zoo; import sys; assert 'paramfx.bases.share' not in sys.modules; "
        "print(zoo.published('shared_bases', 'cifar10').row_params.min())")
    assert run_fresh(code, check=True).stdout.split()[-1] == '150666'


# ------------------------------------------------------------------ ResNeXt's form
def test_resnext_block_is_the_golden_one():
    import numpy as np
    z = np.load(GOLDEN/'blocks.npz')
    t = lambda k: torch.from_numpy(z[f'resnext_single/{k}'])
    w = lambda k: t(f'w/{k}.weight')
    groups = lambda k: len(w('conv1'))//w(k).shape[1]
    convs = {k: nn.Conv2d(len(w('conv1')), len(w(k)), 3, padding=1, groups=groups(k), bias=False).double() for k in ('unique2', 'shared1')}
    for k, m in convs.items(): m.weight.data = w(k)
    m = Joined(convs['unique2'], convs['shared1']).eval()
    bn = lambda x, k: F.batch_norm(x, t(f'w/{k}.running_mean'), t(f'w/{k}.running_var'), w(k), t(f'w/{k}.bias'))
    a = F.relu(bn(F.conv2d(t('x'), w('conv1')), 'bn1'))
    y = F.relu(bn(F.conv2d(F.relu(bn(m(a), 'bn2')), w('conv3')), 'bn3') + t('x'))
    torch.testing.assert_close(y, t('eval/y'), rtol=0, atol=1e-10)


def test_resnext_trains_and_leaves():
    from paramfx.zoo.networks import resnet
    torch.manual_seed(0)
    net, x = resnet((1, 3, 3), 4, bottleneck=True, stem=3, first=16, groups=4, base_width=16), torch.randn(8, 3, 16, 16)
    join_bases(net, x, 8, 4)
    opt = torch.optim.SGD(net.parameters(), .05)
    before = net.layer2[1].conv2.shared.weight.detach().clone()
    F.cross_entropy(net(x), torch.arange(8)%4).backward()
    basis = net.layer2[1].conv2.shared.weight
    assert net.layer2[2].conv2.shared.weight is basis and basis.grad.abs().sum() > 0 and sum(p is basis for p in net.parameters()) == 1
    opt.step()
    assert not torch.equal(before, net.layer2[1].conv2.shared.weight)
    net.eval()
    plain = materialize(net, x)
    with torch.no_grad(): torch.testing.assert_close(plain.eval()(x), net(x))
    assert not sharing_layers(plain) and count_macs(plain, x)[0] == count_macs(net, x)[0] and n_params(plain)[0] > n_params(net)[0]


def test_channel_attention_by_hand():
    torch.manual_seed(0)
    m, x = ECA(3), torch.randn(2, 5, 4, 4)
    k, mean = m.conv.weight.detach().flatten(), F.pad(x.mean((2, 3)), (1, 1))
    scale = torch.stack([(mean[:, i:i+3]*k).sum(1) for i in range(5)], 1).sigmoid()
    with torch.no_grad(): torch.testing.assert_close(m(x), x*scale[:, :, None, None])


# ------------------------------------------------------------------ checkpoints
class Block(nn.Module):
    "A block in the published layout; `bases`: one for both convolutions, or one for each; none: an ordinary block"
    def __init__(self, n_in, n, stride, bases, u):
        super().__init__()
        self.pad, self.two = (stride, n-n_in), len(bases or ()) == 2
        if bases is None:
            self.conv1, self.bn1 = nn.Conv2d(n_in, n, 3, stride, 1, bias=False), nn.BatchNorm2d(n)
            self.conv2, self.bn2 = nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n)
            return
        for i, b in enumerate(bases, 1): setattr(self, f'shared_basis_{i}' if self.two else 'shared_basis', b)
        for i in (1, 2):
            r = u + bases[-1].out_channels
            for k, m in (('basis_conv', nn.Conv2d(n, u, 3, padding=1, bias=False)),
                ('basis_bn', nn.BatchNorm2d(r)), ('coeff_conv', nn.Conv2d(r, n, 1, bias=False)), ('bn', nn.BatchNorm2d(n))):
                setattr(self, f'{k}{i}', m)

    def one(self, x, i):
        if hasattr(self, f'conv{i}'): return getattr(self, f'conv{i}')(x)
        basis = getattr(self, f'shared_basis_{i}' if self.two else 'shared_basis')
        return getattr(self, f'coeff_conv{i}')(getattr(self, f'basis_bn{i}')(torch.cat([getattr(self, f'basis_conv{i}')(x), basis(x)], 1)))

    def forward(self, x):
        s, extra = self.pad
        y = self.bn2(self.one(F.relu(self.bn1(self.one(x, 1))), 2))
        return F.relu(y + F.pad(x[:, :, ::s, ::s], (0, 0, 0, 0, extra//2, extra//2)))


class Published(nn.Module):
    "A CIFAR-10 network in the layout of its checkpoints"
    def __init__(self, n, s, u, two):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        c = 16
        for i in (1, 2, 3):
            w, m = 16*2**(i-1), 2**(i-1)
            bases = [nn.Conv2d(w, s*m, 3, padding=1, bias=False) for _ in range(1+two)]
            for j, b in enumerate(bases, 1): setattr(self, f'shared_basis_{i}_{j}' if two else f'shared_basis_{i}', b)
            setattr(self, f'layer{i}', nn.Sequential(Block(c, w, 1 if i == 1 else 2, None, 0), *[Block(w, w, 1, bases, u*m) for _ in range(n-1)]))
            c = w
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


LAYOUTS = json.loads((GOLDEN/'checkpoint_keys.json').read_text())


def published_net(row):
    torch.manual_seed(1)
    depth, s, u, star = re.fullmatch(r'ResNet(\d+)-S(\d+)U(\d+)(\*?)', row).groups()
    net = Published((int(depth)-2)//6, int(s), int(u), bool(star)).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, .2); m.running_var.uniform_(.5, 2); nn.init.uniform_(m.weight, .5, 1.5); nn.init.normal_(m.bias, 0, .2)
    return net


@pytest.fixture(params=list(LAYOUTS))
def case(request, tmp_path):
    "Name of ours, published network, path and content of its checkpoint"
    net = published_net(request.param)
    content = dict(net_state_dict=net.state_dict(), acc=92.5, epoch=299, optimizer_state_dict=torch.optim.SGD(net.parameters(), .1).state_dict())
    torch.save(content, tmp_path/'net.pth')
    return 'cifar10/'+request.param.lower().replace('s', 'S', 2).replace('reSnet', 'resnet').replace(
        '-s', '-S').replace('u', 'U'), request.param, net, tmp_path/'net.pth', content


def test_the_layout_is_the_golden_one(case):
    "Of the network written down here, and of our map"
    name, row, net, *_ = case
    want = LAYOUTS[row]
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == dict(map(tuple, want['state_dict']))
    keys = published_keys(name)
    assert keys.keys() == {k for k, _ in want['state_dict']}
    same = {}
    for k, o in keys.items(): same.setdefault(o, set()).add(k)
    assert sorted(map(sorted, (v for v in same.values() if len(v) > 1))) == sorted(map(sorted, want['keys_holding_the_same_tensor']))
    assert set(keys.values()) == zoo.build(name).state_dict().keys()


def test_a_published_checkpoint_gives_the_published_outputs(case):
    name, _, net, path, _ = case
    new, x = zoo.load_published(path, name), zoo.sample(name, 4)
    assert not new.training
    with torch.no_grad():
        torch.testing.assert_close(new(x), net(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(materialize(new, x)(x), net(x), rtol=1e-4, atol=1e-4)
    with path.open('rb') as f: assert torch.equal(zoo.load_published(f, name).fc.weight, net.fc.weight)


@pytest.mark.few(8)
@pytest.mark.parametrize('change,text', [
    (lambda s, b: s.update({b[1]: s[b[1]]+1e-6}), 'hold the same basis, and differ'),
    (lambda s, b: s.pop('fc.bias'), 'lacks fc.bias'), (lambda s, b: s.pop(b[2]), 'lacks layer1.2'),
    (lambda s, b: s.update({'module.fc.bias': s['fc.bias']}), 'has not, module.fc.bias'),
    (lambda s, b: s.update({'bn1.bias': torch.zeros(8)}), r'bn1.bias has shape (8,), that of the network (16,)'),
    (lambda s, b: s.update({'fc.bias': [0.]*10}), 'fc.bias is no ordinary tensor'),
    (lambda s, b: s.update({'fc.bias': torch.zeros(10, dtype=torch.int64)}), 'fc.bias is of torch.int64'),
    (lambda s, b: s.clear(), 'lacks shared_basis_1')])
def test_what_is_no_checkpoint_of_the_row_is_refused(case, change, text):
    name, row, _, path, content = case
    state = dict(content['net_state_dict'])
    change(state, LAYOUTS[row]['keys_holding_the_same_tensor'][0])
    torch.save({**content, 'net_state_dict': state}, path)
    with pytest.raises(ValueError, match=re.escape(text)) as e: zoo.load_published(path, name)
    assert '\n' not in str(e.value) and 'net.pth' in str(e.value)


def test_a_checkpoint_of_another_row(case):
    name, row, _, path, _ = case
    others = ['cifar10/'+o for o in ('resnet32-S8U1', 'resnet32-S16U1', 'resnet32-S16U1*', 'resnet56-S16U1',
        'resnet56-S16U1*', 'resnet32-S8U2') if 'cifar10/'+o != name]
    for o in others:
        with pytest.raises(ValueError, match='no checkpoint of '+re.escape(o)): zoo.load_published(path, o)


class Evil:
    def __reduce__(self): return (print, ('run',))


def test_files_that_are_none(tmp_path, capsys):
    name, path = 'cifar10/resnet32-S8U1', tmp_path/'x.pth'
    for content, text in ((dict(net_state_dict=Evil()), 'without running code'),
        (dict(state_dict={}), "'net_state_dict'; this has state_dict"), ([1], 'no published checkpoint'), (zoo.build(name), 'without running code')):
        torch.save(content, path)
        with pytest.raises(ValueError, match=re.escape(text)): zoo.load_published(path, name)
    for raw in (b'', b'nothing', path.read_bytes()[:500]):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match='x.pth'): zoo.load_published(path, name)
    with pytest.raises(FileNotFoundError): zoo.load_published(tmp_path/'none.pth', name)
    for other in ('cifar100/resnet34-S16U1', 'cifar10/resnet32-S16U0*', 'cifar10/resnet56-S0U16', 'imagenet/resnet50-Shared'):
        with pytest.raises(ValueError, match='layout'): zoo.load_published(path, other)
    with pytest.raises(ValueError, match='no form'): zoo.load_published(path, 'cifar10/resnet32')
    assert 'run' not in capsys.readouterr().out


def test_as_published_on_a_network_without_rules():
    net, x = zoo.build('cifar10/vgg11'), zoo.sample('cifar10')
    share_published(net, x, 'cifar10/vgg11', skip_first=False, shared_rank=8, unique_rank=0)
    assert len(sharing_layers(net)) >= 4
