"""Split networks are the masked ones, cut: outputs, statistics, counts and files, and branches without connection."""
from copy import deepcopy
from pathlib import Path

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn

from paramfx import zoo
from paramfx.channels.trace import trace_channels
from paramfx.export.materialize import Recipe, load_recipe, save_recipe
from paramfx.splitnet.groups import class_groups, feature_groups
from paramfx.splitnet.split import SplitBlock, Splitting, masked_model, split_layer, split_model
from paramfx.splitnet.plan import split_plan
from fresh import run_fresh

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def shake(net, seed=0):
    "Random statistics and scales, so that no two channels are alike"
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t, a, b in ((m.running_mean, -.5, .5), (m.running_var, .5, 2), (m.weight, .5, 1.5), (m.bias, -.5, .5)):
                if t is not None: t.data.copy_(torch.rand(t.shape, generator=g)*(b-a)+a)
    return net.eval()


def uneven(plan, seed=0):
    "Random groups of unequal size, none empty"
    g = torch.Generator().manual_seed(seed)
    return {s: torch.cat([torch.arange(n), torch.rand(u-n, generator=g).pow(1.5).mul(n).long()])[
        torch.randperm(u, generator=g)] for s, (u, n) in plan.free.items()}


def same(a, b, tol): assert (a-b).abs().max() <= tol*b.abs().max(), ((a-b).abs().max()/b.abs().max()).item()


def seq(*layers): return nn.Sequential(*layers)
def conv(a, b, k=3, **kw): return nn.Conv2d(a, b, k, padding=k//2, **kw)
def head(c, n=10): return seq(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n))


def resnet(**kw):
    from torchvision.models import resnet18
    return resnet18(num_classes=10, **kw)


def learner_body():
    from fastai.vision.learner import create_vision_model
    from torchvision.models import resnet18
    return create_vision_model(resnet18, 10, pretrained=False)


def xres():
    from fastai.vision.models.xresnet import xresnet18
    return xresnet18(n_out=10)


def dense():
    from torchvision.models import DenseNet
    return DenseNet(8, (2, 2), 16, num_classes=10)


def flat(): return seq(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.PReLU(12),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 6))
def depth():
    return seq(conv(3, 12), nn.ReLU(), conv(12, 16, 1), nn.BatchNorm2d(16), conv(16, 16, groups=16), nn.ReLU6(), conv(16, 24, 1), nn.BatchNorm2d(24), head(24))
def one_d(): return seq(nn.Flatten(2), nn.Conv1d(3, 8, 3), nn.ReLU(),
    nn.Conv1d(8, 8, 3, stride=2, padding=1, padding_mode='circular'), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 6))


class Gather(nn.Module):
    "The trunk's channels must stay in place"
    def __init__(self): super().__init__(); self.a, self.n, self.b, self.c = conv(3, 8), nn.LayerNorm(8), conv(8, 12), head(12)
    def forward(self, x): return self.c(F.relu(self.b(self.n(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))))


class Skip(nn.Module):
    "A dense layer reads a space that a convolution reads, too; the classifier is a convolution"
    def __init__(self): super().__init__(); self.a, self.b, self.c, self.fc = conv(3, 8), conv(8, 8), conv(16, 8), nn.Conv2d(24, 7, 1)
    def forward(self, x):
        x = F.relu(self.a(x)); y = F.relu(self.b(x)); z = F.relu(self.c(torch.cat([x, y], 1)))
        return self.fc(torch.cat([x, y, z], 1)).mean((2, 3))


NETS = {
    'resnet': (resnet, {'layer4': 2, 'fc': 2}), 'hierarchy': (resnet, {'layer3': 2, 'layer4': 3, 'fc': 5}), 'identity': (resnet, {'layer4.1': 2, 'fc': 4}),
    'learner': (learner_body, {'layer4': 2, 'fc': 4}), 'xresnet': (xres, [2, 3]), 'densenet': (dense, {'features.denseblock2': 2, 'classifier': 3}),
    'flatten': (flat, {'3': 2, '7': 2, '10': 3}), 'depthwise': (depth, {'2': 2, '4': 2, '6': 2, '8': 3}), 'one_d': (one_d, {'3': 2, '6': 2}),
    'gather': (Gather, {'b': 2, 'c': 2}), 'skip': (Skip, {'b': 2, 'c': 2, 'fc': 3}), 'raw': (flat, {'0': 3, '3': 3, '7': 3, '10': 3}),
    'wrn': (lambda: zoo.build('cifar10/wrn_10_1'), [2, 2]), 'preact': (lambda: zoo.build('cifar10/preact_resnet20'), [2, 4]),
    'mobilenet': (lambda: zoo.build('cifar10/mobilenet_v2', width=.25), [2, 2]),
}


@pytest.mark.few(5)
@pytest.mark.parametrize('name,groups',
    [(n, 'uneven') for n in NETS]+[(n, c) for n in ('hierarchy', 'skip', 'depthwise', 'one_d') for c in ('random', 'cluster')])
def test_split_is_masked(name, groups):
    "In evaluation, and in training with the statistics it leaves behind; the model is left alone"
    make, splits = NETS[name]
    torch.manual_seed(0)
    net = shake(make()).double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    plan = split_plan(net, X.double(), splits)
    how = dict(groups=uneven(plan)) if groups == 'uneven' else dict(classes=groups)
    small, twin = split_model(net, X.double(), splits=splits, **how), masked_model(net, X.double(), splits=splits, **how)
    x = torch.randn(4, 3, 32, 32, dtype=torch.double)
    with torch.no_grad(): same(small(x), twin(x), 1e-10)
    assert not torch.allclose(small(x), net(x), rtol=1e-3)
    assert small.training == net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for m in (small, twin): # without dropout, which would draw in another order
        m.train()
        for o in m.modules():
            if isinstance(o, (nn.Dropout, nn.Dropout2d)): o.eval()
    same(small(x), twin(x), 1e-10)
    small.eval(), twin.eval()
    with torch.no_grad(): same(small(x), twin(x), 1e-10)


@pytest.mark.few(3)
@pytest.mark.parametrize('name', NETS)
def test_gradients_are_those_of_the_masked_network(name):
    "One step of gradient descent keeps them equal, where the twin's masked weights stay zero"
    make, splits = NETS[name]
    torch.manual_seed(0)
    net = shake(make()).double()
    plan = split_plan(net, X.double(), splits)
    groups = uneven(plan, 1)
    s = Splitting(plan, groups)
    small, twin, x, y = s.split(net), s.masked(net), torch.randn(4, 3, 32, 32, dtype=torch.double), torch.tensor([0, 1, 2, 3])
    for m in (small, twin):
        opt = torch.optim.SGD(m.parameters(), lr=1e-2, momentum=.9)
        for _ in range(2):
            opt.zero_grad(); F.cross_entropy(m(x), y).backward()
            opt.step()
            if m is twin:
                with torch.no_grad():
                    for l in plan.layers: (w := m.get_submodule(l.name).weight).mul_(s.mask(l, w))
    with torch.no_grad(): same(small(x), twin(x), 1e-9)


@pytest.mark.few(4)
@pytest.mark.parametrize('name', ['resnet', 'hierarchy', 'learner', 'densenet', 'flatten', 'depthwise', 'skip', 'gather'])
def test_branches_are_independent(name):
    "The gradient of a class's logit with respect to features of the trunk that another group reads is exactly 0"
    make, splits = NETS[name]
    torch.manual_seed(0)
    net = shake(make()).double()
    plan = split_plan(net, X.double(), splits)
    groups = uneven(plan)
    s = Splitting(plan, groups)
    small = s.split(net)
    low, top = min(plan.levels), plan.free[plan.classes][1]
    feats, n = [], 0
    entries = {l.name: s.sorted_sides(l)[0] for l in plan.layers if {p.space for p in l.inputs} <= {*plan.trunk}}
    def watch(m, args): x = args[0].requires_grad_(); x.retain_grad(); feats.append((small_names[m], x))
    small_names = {small.get_submodule(k): k for k in entries}
    for m in small_names: m.register_forward_pre_hook(watch)
    out = small(torch.randn(2, 3, 32, 32, dtype=torch.double))
    for c in range(out.shape[1]):
        mine = plan.coarse(groups[plan.classes], top, low)[c]
        got = torch.autograd.grad(out[:, c].sum(), [x for _, x in feats], retain_graph=True, allow_unused=True)
        for (k, x), g in zip(feats, got):
            if g is None: continue
            layer = next(l for l in plan.layers if l.name == k)
            at = plan.coarse(entries[k], layer.groups, low)
            per = g.abs().flatten(2).sum((0, 2)) if g.ndim > 2 else g.abs().sum(0)
            assert (per[at != mine] == 0).all(), (k, c)
            n += int((per[at == mine] > 0).sum())
    assert n > 0 and feats


@pytest.mark.parametrize('name', ['resnet', 'hierarchy'])
def test_names_of_groups_do_not_matter(name):
    "Branches in another order, as far as the tree allows, give the same network"
    make, splits = NETS[name]
    net = shake(make()).double()
    plan = split_plan(net, X.double(), splits)
    groups = uneven(plan)
    new = {2: [1, 0], 3: [0, 1, 2], 5: [1, 0, 3, 2, 4]} if name == 'hierarchy' else {2: [1, 0]} # 5 classes' groups: {0, 1}, {2, 3}, {4}
    if name == 'hierarchy': new[2] = [0, 1] # {0, 1, 2, 3} and {4} differ in size
    more = {s: torch.tensor(new[plan.free[s][1]])[g] for s, g in groups.items()}
    assert any(not torch.equal(more[s], groups[s]) for s in groups)
    a, b = (split_model(net, X.double(), g, splits) for g in (groups, more))
    assert not torch.equal(a.fc.put, b.fc.put)
    same(a(X.double()), b(X.double()), 1e-12)


def test_golden_split(golden):
    "The authors' branch implementation, run in float64"
    f = np.load(golden/'splitnet'/'split_g2.npz')
    t = {k: torch.from_numpy(np.asarray(f[k])) for k in f.files}
    net = seq(nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)).double()
    net[0].weight.data, net[4].weight.data, net[4].bias.data = t['w_conv'], t['w_fc'], t['b_fc']
    x = t['x'] if t['x'].shape[1] == 6 else t['x'].permute(0, 3, 1, 2)
    groups = {'input': t['p_group'].long(), '0': t['q_group'].long(), '4': t['c_group'].long()}
    small, twin = split_model(net, x, groups), masked_model(net, x, groups)
    torch.testing.assert_close(small(x), t['ref_class_out'], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(small(x), t['tf_class_out'], rtol=1e-9, atol=1e-12)
    assert torch.equal(twin[0].weight != 0, (t['conv_mask'][..., None, None] > 0).expand_as(twin[0].weight))
    conv_out = t['ref_conv_out'] if t['ref_conv_out'].shape[1] == 8 else t['ref_conv_out'].permute(0, 3, 1, 2)
    torch.testing.assert_close(small[0](x), conv_out[:, torch.argsort(groups['0'], stable=True)], rtol=1e-9, atol=1e-12)
    assert sum(p.numel() for p in small.parameters()) == int(t['tf_weights_and_biases'])


# what it costs

def total(m): return sum(p.numel() for p in m.parameters())


def test_resnet18_of_a_thousand_classes():
    from torchvision.models import resnet18
    net = resnet18()
    small = split_model(net, X, splits={'layer4': 2, 'fc': 2}, classes='random')
    assert (total(net), total(small)) == (11_689_512, 7_239_208)
    assert [small.layer4[0].conv1.groups, small.layer4[1].conv2.groups, small.layer4[0].downsample[0].groups] == [2, 2, 2]
    assert small.layer4[0].conv1.weight.shape == (512, 128, 3, 3)
    assert [b.in_features for b in small.fc.blocks] == [256, 256] and small.fc.take is None


WRN = {(1, 1, 2): (.9977, 1.), (1, 2, 2): (.6164, .8265), (1, 2, 4): (.6152, .8265), (2, 2, 2): (.5210, .6531),
    (1, 4, 4): (.4246, .7398), (2, 4, 4): (.3292, .5664)}


def wrn_counts(model, x):
    "Weights of convolutions and linear layers with biases, and two operations per multiply-add, as the authors count: without the first layer"
    macs = 0
    def hook(m, args, out): nonlocal macs; macs += out[0].numel()*m.weight[0].numel()
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][1:]
    handles = [m.register_forward_hook(hook) for m in layers]
    with torch.no_grad(): model.eval()(x)
    for h in handles: h.remove()
    return sum(total(m) for m in layers), 2*macs


@pytest.fixture(scope='module')
def wrn(): return zoo.build('cifar100/wrn_16_8')


def test_counts_of_wrn_dense(wrn):
    n, ops = wrn_counts(wrn, X[:1])
    assert n == 10_999_908 and f'{ops/1e9:.4f}' == '3.0955'


@pytest.mark.few(3)
@pytest.mark.parametrize('splits', WRN)
def test_counts_of_wrn(wrn, splits):
    "The table of the published counters, with equal groups"
    dense = wrn_counts(wrn, X[:1])
    cut = len([g for g in splits if g > 1])
    small = split_model(wrn, X[:1], splits=list(splits[3-cut:]), classes='random')
    assert tuple(f'{a/b:.4f}' for a, b in zip(wrn_counts(small, X[:1]), dense)) == tuple(f'{v:.4f}' for v in WRN[splits])


@pytest.mark.parametrize('name', ['resnet', 'hierarchy', 'flatten', 'densenet'])
def test_parameters_are_the_products_of_the_groups(name):
    "Kernel window times the sum of inputs times outputs over groups"
    make, splits = NETS[name]
    net = make()
    plan = split_plan(net, X, splits)
    groups = uneven(plan)
    small, want = split_model(net, X, groups, splits), total(net)
    for l in plan.layers:
        p, q = (o.bincount(minlength=l.groups) for o in Splitting(plan, groups).sides(l))
        w = net.get_submodule(l.name).weight
        want += int((p*q).sum())*w[0, 0].numel()-w.numel()
    assert total(small) == want


# how it is made

def test_hierarchy_needs_no_gather_inside():
    "Supergroups lie side by side, so lower layers are grouped convolutions, and the classifier only orders its outputs"
    net = resnet()
    net.fc = nn.Linear(512, 12)
    small = split_model(net, X, splits={'layer3': 2, 'layer4': 2, 'fc': 4}, classes='random')
    blocks = {n: m for n, m in small.named_modules() if isinstance(m, SplitBlock)}
    assert list(blocks) == ['fc'] and blocks['fc'].take is None and blocks['fc'].put is not None
    assert [*blocks['fc'].put.sort()[0]] == [*range(12)]


def test_sorted_classes_need_no_gather_at_all():
    small = split_model(resnet(), X, splits={'layer4': 2, 'fc': 2}, classes={c: c//5 for c in range(10)})
    assert small.fc.take is None and small.fc.put is None


def test_a_trunk_that_must_stay_in_place_is_gathered():
    net = shake(Gather())
    plan = split_plan(net, X, {'b': 2, 'c': 2})
    small = split_model(net, X, uneven(plan), plan.splits)
    assert small.b.take is not None and torch.equal(small.a.weight, net.a.weight)


def test_groups_alone_say_what_is_split():
    net = shake(resnet())
    splits = {'layer4': 2, 'fc': 4}
    plan = split_plan(net, X, splits)
    groups = uneven(plan)
    a, b = split_model(net, X, groups, splits), split_model(net, X, groups)
    assert all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values()))
    c = split_model(net, X, {('layer4.1.conv2' if k == 'layer4.0.conv2' else k): g for k, g in groups.items()}) # by another producer
    assert torch.equal(a(X), c(X))


def test_classes_need_not_be_balanced():
    "Features in proportion to the classes"
    net = shake(resnet())
    small = split_model(net, X, splits={'layer4': 2, 'fc': 2}, classes={c: int(c > 1) for c in range(10)})
    assert [len(g) for g in small._split['groups'].values()] == [256, 512, 512, 512, 10]
    assert [int(np.bincount(g)[0]) for g in small._split['groups'].values()] == [51, 102, 102, 102, 2]


def test_seeds():
    net = resnet()
    make = lambda seed: split_model(net, X, splits={'layer4': 2, 'fc': 2}, classes='random', seed=seed)._split['groups']
    state = torch.get_rng_state()
    assert make(0) == make(0) != make(1) and torch.equal(state, torch.get_rng_state())


def test_clusters_find_planted_classes():
    "Twenty classes that read four groups of features"
    torch.manual_seed(0)
    net = seq(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 20))
    q, p = torch.arange(20)*7%4, torch.arange(40)*3%4
    net[2].weight.data = torch.randn(20, 40)*.05+(q[:, None] == p)*(torch.rand(40)+.5)
    plan = split_plan(net, torch.randn(2, 6), {'2': 4})
    found = class_groups(net, plan, 'cluster')
    assert len({(a.item(), b.item()) for a, b in zip(q, found)}) == 4
    feats = feature_groups(net, plan, q)['0']
    assert torch.equal(feats, p)


def test_random_groups_lose_more_weight_than_those_by_weight():
    net = shake(resnet())
    splits = {'layer4': 2, 'fc': 2}
    kept = {}
    for c in ('random', 'cluster'):
        twin = masked_model(net, X, splits=splits, classes=c)
        kept[c] = twin.layer4[1].conv2.weight.pow(2).sum().item()
    assert kept['cluster'] > kept['random']


def test_recipe_in_a_fresh_process(tmp_path):
    net = shake(resnet())
    splits = {'layer4': 2, 'fc': 3}
    small = split_model(net, X, uneven(split_plan(net, X, splits)), splits)
    save_recipe(small, tmp_path/'r.pth')
    assert [s['verb'] for s in Recipe.of(small)] == ['split']
    torch.save((X, small(X)), tmp_path/'xy.pth')
    code = f'''
import torch
from torchvision.models import resnet18
from paramfx.export.materialize import load_recipe
torch.manual_seed(5)
m = load_recipe({str(tmp_path/'r.pth')!r}, resnet18(num_classes=10)).eval()
x,y = torch.load({str(tmp_path/'xy.pth')!r})
assert torch.equal(m(x), y)
'''
    run_fresh(code, check=True, cwd=Path(__file__).resolve().parent.parent.parent)


def test_split_after_a_cut_is_one_recipe(tmp_path):
    net = shake(resnet())
    slim = trace_channels(net, X).cut(.5, only=['layer4.0.conv1']).apply(net)
    small = split_model(slim, X, splits={'layer4': 2, 'fc': 2}, classes='random')
    save_recipe(small, tmp_path/'r.pth')
    again = load_recipe(tmp_path/'r.pth', resnet()).eval()
    assert [s['verb'] for s in Recipe.of(again)] == ['cut', 'split'] and torch.equal(again(X), small(X))


def test_export():
    net = shake(seq(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 9), nn.ReLU(), head(9)))
    small = split_model(net, X, splits={'3': 2, '5': 2}, classes='cluster')
    prog = torch.export.export(small, (X,), dynamic_shapes=[{0: torch.export.Dim('n', min=2)}])
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(prog.module()(x), small(x))
    torch.testing.assert_close(deepcopy(small)(x), small(x))


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    net = shake(seq(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 9), nn.ReLU(), head(9)))
    small = split_model(net, X, splits={'3': 2, '5': 2}, classes='cluster')
    torch.onnx.export(small, (X,), tmp_path/'m.onnx', dynamo=True, verbose=False)
    got = onnxruntime.InferenceSession(tmp_path/'m.onnx').run(None, {onnxruntime.InferenceSession(tmp_path/'m.onnx').get_inputs()[0].name: X.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), small(X), rtol=1e-4, atol=1e-5)


def test_a_split_network_is_an_ordinary_one():
    "It materializes, is traced and costed like any other"
    from paramfx.export.materialize import materialize
    from paramfx.report.cost import count_macs
    net = shake(resnet())
    small = split_model(net, X, splits={'layer4': 2, 'fc': 2}, classes='random')
    plain = materialize(small, X)
    assert torch.equal(plain(X), small(X))
    assert len(trace_channels(small, X).cuttable) >= 8
    n = sum(net.get_submodule(k).weight.numel()//2 for k in small._split['splits'])
    layer = {k: m for k, m in net.named_modules() if k in small._split['splits']}
    assert count_macs(net, (X[:1],))[0]-count_macs(small, (X[:1],))[0] == n # maps of one pixel
    assert len(layer) == 6


def test_frozen_and_plain_attributes_stay():
    net = shake(resnet()).to(memory_format=torch.channels_last)
    for p in net.layer4.parameters(): p.requires_grad_(False)
    small = split_model(net, X, splits={'layer4': 2, 'fc': 2}, classes='random')
    assert not any(p.requires_grad for p in small.layer4.parameters()) and all(p.requires_grad for p in small.fc.parameters())
    assert small.layer4[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert small.layer4[0].conv1.stride == (2, 2) and isinstance(small.layer4[0].conv1, nn.Conv2d)


@pytest.mark.parametrize('m,shape', [(nn.Conv1d(6, 8, 3, dilation=2), (2, 6, 9)),
    (nn.Conv2d(6, 8, (1, 3), bias=False), (2, 6, 5, 5)), (nn.Conv3d(6, 8, 2), (2, 6, 4, 4, 4)),
                                     (nn.Linear(6, 8), (2, 6)), (nn.Linear(6, 8, bias=False), (2, 3, 6)), (nn.Conv2d(6, 8, 3), (6, 5, 5))])
@pytest.mark.parametrize('p,q', [([0, 0, 0, 1, 1, 1], [0]*4+[1]*4), ([0, 1, 0, 1, 0, 1], [0]*4+[1]*4),
    ([0, 1, 1, 1, 1, 1], [1, 0, 2, 2, 1, 0, 0, 2]), ([0, 1, 2, 0, 1, 2], [0, 1, 2, 2, 1, 0, 0, 2])])
def test_split_layers(m, shape, p, q):
    p, q, m = torch.tensor(p), torch.tensor(q), deepcopy(m).double()
    if len(p) < 6 or p.max() < q.max(): p = torch.tensor([0, 1, 1, 2, 1, 2])
    x, twin = torch.randn(shape).double(), deepcopy(m)
    twin.weight.data *= (q[:, None] == p).view(8, 6, *[1]*(m.weight.ndim-2))
    torch.testing.assert_close(split_layer(m, p, q)(x), twin(x))


# bad input

def test_bad_input():
    net = resnet()
    splits = {'layer4': 2, 'fc': 2}
    plan = split_plan(net, X, splits)
    good = uneven(plan)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bad = [
        (dict(splits=splits), 'Give either groups'), (dict(splits=splits, groups=good, classes='random'), 'Give either groups'),
        (dict(classes='random'), "splits: say which layers"), (dict(splits=splits, classes='best'), "classes='best': choose"),
        (dict(splits=splits, classes={c: 0 for c in range(10)}), 'group 1 of 2 has no class'),
        (dict(splits=splits, classes={c: 0 for c in range(9)}), '9 has no group'), (dict(splits=splits, classes={'cat': 0}), "'cat' is no class"),
        (dict(splits=splits, groups=good | {'layer4.0.conv1': torch.zeros(512, dtype=int)}),
        r'layer4.0.conv1: group 1 of 2 is empty.*gamma_balance.*equal_groups'),
        (dict(splits=splits, groups=good | {'layer4.0.conv1': torch.ones(512, dtype=int)*2}), 'they run from 2 to 2'),
        (dict(splits=splits, groups=good | {'layer4.0.conv1': torch.rand(512)}), '512 whole numbers'),
        (dict(splits=splits, groups=good | {'layer4.0.conv1': good['fc']}), '512 whole numbers'),
        (dict(splits=splits, groups={k: g for k, g in good.items() if k != 'fc'}), 'nothing for fc'),
        (dict(splits=splits, groups=good | {'conv1': good['fc']}), "is not assigned in this split"),
        (dict(splits=splits, groups=good | {'layer9': good['fc']}), "No space is produced by 'layer9'"),
        (dict(groups={'fc': good['fc']}), 'no layer has both its inputs'),
        (dict(splits=splits, groups=good | {'layer4.1.conv2': good['layer4.0.conv2']}), 'named twice'),
    ]
    for kw, why in bad:
        with pytest.raises(ValueError, match=why): split_model(net, X, **kw)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not net.__dict__.get('_recipe')
    small = split_model(net, X, good, splits)
    with pytest.raises(ValueError, match='split already'): split_model(small, X, splits={'fc': 2}, classes='random')


def test_a_difference_raises(monkeypatch):
    "The self-check sees a wrong order of the classes"
    import paramfx.splitnet.split as sm
    real = sm.split_layer
    def wrong(m, p, q):
        new = real(m, p, q)
        if isinstance(new, SplitBlock) and new.put is not None: new.put = new.put.flip(0)
        return new
    monkeypatch.setattr(sm, 'split_layer', wrong)
    with pytest.raises(ValueError, match='The networks differ'): split_model(shake(resnet()), X, splits={'layer4': 2, 'fc': 2}, classes='random')


def test_learner(tmp_path):
    from fastai.basics import Learner, accuracy
    from paramfx.data.memory import digits_dls
    from paramfx.zoo.networks import convnet
    torch.manual_seed(0)
    learn = Learner(digits_dls(), convnet(), metrics=accuracy)
    names = [n for n, m in learn.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-2:]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        assert learn.split(splits=dict.fromkeys(names, 2), classes='random') is learn and learn.opt is None
        params = {id(p) for p in learn.model.parameters()}
        learn.fit(1, 1e-2)
        assert {id(p) for g in learn.opt.param_lists for p in g} == params
    rows = learn.paramfx['split']
    with pytest.raises(ValueError, match="no class is called 'cat'"): learn.split(splits={names[-1]: 2}, classes={'cat': 0})
    assert rows[-1]['what'] == 'parameters' and rows[-1]['units'] > total(learn.model)
    learn.path = tmp_path
    learn.export('l.pkl')
    with pytest.raises(ValueError, match='split already'): learn.split(splits={names[-1]: 2}, classes='random')


def test_classes_by_name():
    from types import SimpleNamespace
    from paramfx.splitnet.split import _numbered
    assert _numbered(SimpleNamespace(vocab=['cat', 'dog']), {'dog': 0, 'cat': 1}) == {1: 0, 0: 1}
    assert _numbered(SimpleNamespace(vocab=['cat', 'dog']), {0: 0, 1: 1}) == {0: 0, 1: 1}


def test_learned_groups_are_cut():
    "A network under `SplitNet`: the split one is its masked form by the groups of the callback"
    from fastai.basics import Learner
    from paramfx.data.memory import digits_dls
    from paramfx.zoo.networks import convnet
    from paramfx.splitnet.callback import SplitNet
    torch.manual_seed(0)
    cb = SplitNet([2, 2], equal_groups=True)
    learn = Learner(digits_dls(), convnet(), cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    groups, x = cb.groups(), learn.dls.valid.one_batch()[0]
    splits = {l.name: l.groups for l in split_plan(learn.model, x, [2, 2]).layers}
    dense = deepcopy(learn.model)
    learn.split()
    from paramfx.export.materialize import materialize
    twin = masked_model(materialize(dense, x, dead=False), x, groups, splits).eval()
    same(learn.model.eval()(x), twin(x), 1e-5)
    assert learn.opt is None and {s: torch.tensor(g).tolist() for s, g in learn.model._split['groups'].items()} == {s: g.tolist() for s, g in groups.items()}
