"""Plans of split networks: which spaces are assigned, on every kind of network, and what is refused by name."""
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn

from paramfx import zoo
from paramfx.splitnet.plan import merged_index, split_plan

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def seq(*layers): return nn.Sequential(*layers)
def conv(a, b, k=3, **kw): return nn.Conv2d(a, b, k, padding=k//2, **kw)
def head(c, n=10): return seq(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n))


def covers(plan, model):
    "Parts fit the weights, and every layer's groups follow from those of its spaces"
    for l in plan.layers:
        w = model.get_submodule(l.name).weight
        assert sum(len(p.index) for p in l.outputs) == w.shape[0] and sum(len(p.index) for p in l.inputs) == w.shape[1], l.name
        for p in (*l.inputs, *l.outputs):
            units, g = plan.free[p.space]
            assert 0 <= p.index.min() and p.index.max() < units and l.groups <= g
            assert (p.merges[-1] if p.merges else g) == l.groups, (l.name, p)
    assert plan.layers[-1].outputs[0].space == plan.classes
    return plan


@pytest.mark.parametrize('n,into', [(2, 1), (5, 2), (5, 3), (7, 3), (6, 6), (100, 7)])
def test_merging_is_even_contiguous_and_first_ones_larger(n, into):
    sizes = merged_index(n, into).bincount().tolist()
    assert len(sizes) == into and max(sizes)-min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert [len(a) for a in np.array_split(np.arange(n), into)] == sizes
    assert (merged_index(n, into).diff() >= 0).all()


def test_resnet18_has_the_spaces_of_the_paper():
    from torchvision.models import resnet18
    net = resnet18()
    plan = covers(split_plan(net, X, {'layer4': 2, 'fc': 2}), net)
    assert plan.free == {'layer3.0.conv2': (256, 2), 'layer4.0.conv1': (512, 2), 'layer4.0.conv2': (512, 2), 'layer4.1.conv1': (512, 2), 'fc': (1000, 2)}
    sides = {l.name: (l.inputs[0].space, l.outputs[0].space) for l in plan.layers}
    assert sides == {'layer4.0.conv1': ('layer3.0.conv2', 'layer4.0.conv1'), 'layer4.0.conv2': ('layer4.0.conv1', 'layer4.0.conv2'),
                     'layer4.0.downsample.0': ('layer3.0.conv2', 'layer4.0.conv2'), 'layer4.1.conv1': ('layer4.0.conv2', 'layer4.1.conv1'),
                     'layer4.1.conv2': ('layer4.1.conv1', 'layer4.0.conv2'), 'fc': ('layer4.0.conv2', 'fc')}
    assert plan.trunk == ['layer3.0.conv2'] and not plan.merged


def test_identity_block_alone_shares_the_space_with_the_trunk():
    from torchvision.models import resnet18
    net = resnet18(num_classes=10)
    plan = covers(split_plan(net, X, {'layer4.1': 2, 'fc': 2}), net)
    assert list(plan.free) == ['layer4.0.conv2', 'layer4.1.conv1', 'fc']


def test_three_levels_merge_along_the_tree():
    "5 groups of classes become 2 by way of 3, so that no branch of 3 reads from two of the 2"
    from torchvision.models import resnet18
    net = resnet18(num_classes=10)
    plan = covers(split_plan(net, X, [2, 3, 5]), net)
    assert plan.levels == [5, 3, 2] and plan.merged == {'layer3.0.conv2': [2], 'layer4.0.conv2': [3]}
    assert plan.coarse(torch.arange(5), 5, 2).tolist() == [0, 0, 0, 0, 1] != merged_index(5, 2).tolist()


def test_fastai_head_reads_one_space_twice():
    from fastai.vision.learner import create_vision_model
    from torchvision.models import resnet18
    net = create_vision_model(resnet18, 10, pretrained=False)
    plan = covers(split_plan(net, X, {'layer4': 2, 'fc': 4}), net)
    assert plan.free['0.7.0.conv2'] == (512, 4) and plan.merged == {'0.7.0.conv2': [2]}
    first = next(l for l in plan.layers if l.name == '1.4')
    assert [p.index.tolist() for p in first.inputs] == [[*range(512)]*2]
    assert split_plan(net, X, {'stage-1': 2, 'head': 4}).free == split_plan(net, X, [2, 4]).free == plan.free


def test_densenet_reads_a_list_of_spaces():
    from torchvision.models import DenseNet
    net = DenseNet(8, (2, 2), 16, num_classes=10)
    plan = covers(split_plan(net, X, {'features.denseblock2': 2, 'classifier': 4}), net)
    last = plan.layers[-1]
    assert len(last.inputs) == 3 and [len(p.index) for p in last.inputs] == [16, 8, 8]
    assert last.inputs[0].space == 'features.transition1.conv' and plan.trunk == ['features.transition1.conv']
    assert all(plan.free[p.space][1] == 4 for p in last.inputs)


def test_flatten_repeats_each_unit():
    net = seq(conv(3, 8), nn.ReLU(), conv(8, 12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 6))
    plan = covers(split_plan(net, X, {'2': 2, '6': 2, '8': 2}), net)
    assert plan.layers[1].inputs[0].index.tolist() == [i for i in range(12) for _ in range(4)]
    vgg = zoo.build('cifar10/vgg11')
    assert covers(split_plan(vgg, X, [2, 2]), vgg).free[split_plan(vgg, X, [2, 2]).classes] == (10, 2)


def test_depthwise_layers_have_no_weight_penalty():
    net = zoo.build('cifar10/mobilenet_v2')
    top = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-5:]
    plan = covers(split_plan(net, X, {tuple(top)[0].rsplit('.', 1)[0]: 2, **{n: 2 for n in top}}), net)
    assert plan.depthwise and not set(plan.depthwise) & set(plan.names)


@pytest.mark.parametrize('name', ['cifar10/wrn_16_8', 'cifar10/preact_resnet20', 'cifar10/densenet121'])
def test_networks_of_the_zoo(name):
    net = zoo.build(name)
    plan = covers(split_plan(net, X, [2, 2]), net)
    assert plan.free[plan.classes] == (10, 2) and plan.trunk


def test_wrn_has_the_assignments_of_the_published_code():
    "p, r and q of each block; identity shortcuts share"
    net = zoo.build('cifar100/wrn_16_8')
    plan = covers(split_plan(net, X, [2, 4, 4]), net)
    assert [v for v in plan.free.values()] == [(128, 2), (256, 4), (256, 2), (256, 2), (512, 4), (512, 4), (512, 4), (100, 4)]
    assert len(plan.layers) == 11


def test_xresnet():
    from fastai.vision.models.xresnet import xresnet18
    net = xresnet18(n_out=10)
    covers(split_plan(net, X, [2, 2]), net)


def test_raw_inputs_are_assigned_too():
    net = seq(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    plan = covers(split_plan(net, torch.randn(2, 64), {'0': 2, '2': 2}), net)
    assert plan.free == {'input': (64, 2), '0': (32, 2), '2': (10, 2)} and plan.trunk == ['input']


def test_the_plan_leaves_model_and_random_state_alone():
    net = seq(conv(3, 8), nn.BatchNorm2d(8), nn.Dropout(.5), head(8)).train()
    before, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    split_plan(net, X, {'3': 2})
    assert net.training and torch.equal(rng, torch.get_rng_state()) and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# what is refused

class Res(nn.Module):
    def __init__(self, a, b=None): super().__init__(); self.a, self.b = a, b or nn.Identity()
    def forward(self, x): return self.a(x)+self.b(x)


class SE(nn.Module):
    def __init__(self, c): super().__init__(); self.fc1, self.fc2 = nn.Conv2d(c, c//2, 1), nn.Conv2d(c//2, c, 1)
    def forward(self, x): return x*self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Attend(nn.Module):
    def forward(self, x): return x*torch.softmax(x.mean((2, 3)), 1)[:, :, None, None]


class Tokens(nn.Module):
    def __init__(self, c): super().__init__(); self.att = nn.MultiheadAttention(c, 2, batch_first=True)
    def forward(self, x): t = x.flatten(2).transpose(1, 2); return self.att(t, t, t)[0].mean(1)


class Shuffle(nn.Module):
    def forward(self, x): n, c, h, w = x.shape; return x.view(n, 4, c//4, h, w).transpose(1, 2).reshape(n, c, h, w)


class Two(nn.Module):
    def __init__(self): super().__init__(); self.c, self.a, self.b = conv(3, 8), nn.Linear(8, 4), nn.Linear(8, 6)
    def forward(self, x): x = self.c(x).mean((2, 3)); return self.a(x), self.b(x)


class Norm(nn.Module):
    def __init__(self, c): super().__init__(); self.n = nn.LayerNorm(c)
    def forward(self, x): return self.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def inside(*between): return seq(conv(3, 8), nn.ReLU(), conv(8, 8), seq(*between), head(8)), {'2': 2, '3': 2, '4': 2}
def mixes(m): net, splits = inside(m); return net, {k: v for k, v in splits.items() if k != '3'}


def tied():
    net = seq(conv(3, 8), conv(8, 8), conv(8, 8), head(8))
    net[1].weight = net[2].weight
    return net


def parametrized():
    net = seq(conv(3, 8), conv(8, 8), head(8))
    nn.utils.parametrizations.weight_norm(net[1])
    return net


PLAIN = seq(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), head(8))
BAD = {
    'unknown name': (PLAIN, {'layer7': 2}, "No layer is called 'layer7'"),
    'no splits': (PLAIN, {}, 'give {layer or stage: groups}'),
    'too long a list': (PLAIN, [2]*9, 'has [0-9]+ stages'),
    'one group': (PLAIN, {'4': 1}, r'4: 1 groups split nothing'),
    'half a group': (PLAIN, {'4': 2.5}, 'Give a whole number'),
    'named twice': (PLAIN, {'4': 2, '4.2': 4}, r"4.2: 2 groups, and as part of '4.2' 4"),
    'too many groups': (PLAIN, {'2': 9, '4': 9}, '9 groups of 8 units'),
    'too many classes': (PLAIN, {'4': 11}, '.*groups of .* units. Use at most'),
    'fewer towards the output': (PLAIN, {'2': 4, '4': 2}, r'4.2 \(Linear\): 2 groups read the 4 of 2'),
    'gap': (PLAIN, {'0': 2, '4': 2}, r'2 \(Conv2d\): a gap: it reads all channels of 0'),
    'not to the classifier': (PLAIN, {'2': 2}, r'4.2 \(Linear\): the split layers must reach the classifier'),
    'no split of the shortcut': (seq(conv(3, 8), Res(seq(conv(8, 8), nn.ReLU(), conv(8, 8)), conv(8, 8, 1)),
    head(8)), {'1.a': 2, '2': 2}, r'1.b \(Conv2d\): a gap: it carries all features past'),
    'grouped': (seq(conv(3, 8), conv(8, 8, groups=2), head(8)), {'1': 2, '2': 2}, r'1 \(Conv2d\): it is grouped already, in 2'),
    'layer norm': (*mixes(Norm(8)), r'2: its channels cannot be split: 3.0.n \(LayerNorm\) normalizes over all channels'),
    'group norm': (*mixes(nn.GroupNorm(2, 8)), r'2: its channels cannot be split: 3.0 \(GroupNorm\) binds channels'),
    'group norm of one group': (*mixes(nn.GroupNorm(1, 8)), r'2: its channels cannot be split: 3.0 \(GroupNorm\) normalizes over all'),
    'local response norm': (*mixes(nn.LocalResponseNorm(2)), r'2: its channels cannot be split: 3.0 \(LocalResponseNorm\) mixes them'),
    'squeeze and excitation': (*inside(SE(8)), r'3.0 \(SE\): it multiplies channels by numbers computed from all of them'),
    'channel attention': (*mixes(Attend()), r'2: its channels cannot be split: 3.0 \(Attend\) compares them|3.0 \(Attend\): it multiplies'),
    'channel shuffle': (*mixes(nn.ChannelShuffle(2)), r'2: its channels cannot be split: .*channel_shuffle|2: .*(dealt out|binds)'),
    'reshape': (*mixes(Shuffle()), r'2: its channels cannot be split: .*(takes channels apart|dealt out)'),
    'attention is no layer to split': (seq(conv(3, 8), Tokens(8), nn.Linear(8, 4)), {'1': 2, '2': 2},
    r'1.att \(MultiheadAttention\): only convolutions and linear'),
    'attention on split features': (seq(conv(3, 8), conv(8, 8), Tokens(8), nn.Linear(8, 4)), {'1': 2, '3': 2}, r'1: its channels cannot be split: 2.att'),
    'transposed': (seq(conv(3, 8), nn.ConvTranspose2d(8, 8, 1), head(8)), {'1': 2, '2': 2}, r'1 \(ConvTranspose2d\): only convolutions and linear'),
    'added with other groups': (seq(conv(3, 16), Res(conv(16, 16), conv(16, 16, 1)), head(16)),
    {'1.a': 2, '1.b': 4, '2': 4}, r'1.b \(Conv2d\): its 4 groups are added to the 2 of 1.a'),
    'tied': (tied(), {'2': 2, '3': 2}, r'2 \(Conv2d\): its weight is tied: 1.weight, 2.weight'),
    'computed': (parametrized(), {'1': 2, '2': 2}, r'1 \(ParametrizedConv2d\).*parametrized'),
    'two outputs': (Two(), {'a': 2, 'b': 2}, r'Two: it returns \(Tensor\[.*, not one tensor'),
    'one number': (seq(conv(3, 8), head(8, 1)), {'1': 2}, '1.2: no class axis: 1 outputs'),
    'softmax at the end': (seq(conv(3, 8), head(8), nn.Softmax(1)), {'1': 2}, '1.2: no class axis: 10 outputs that are compared'),
    'shortcut padded with zeros': (zoo.build('cifar10/resnet20'), [2, 2], r'layer3.0.conv2: its '
    r'channels cannot be split: layer3.0 \(BasicBlock\) combines them'),
    'no layer at the end': (seq(conv(3, 8), nn.AdaptiveAvgPool2d(1), Tokens(8)), {'0': 2}, 'class axis'),
}


@pytest.mark.parametrize('case', BAD)
def test_refused_by_name(case):
    net, splits, why = BAD[case]
    before = [*net.state_dict()]
    with pytest.raises(ValueError, match=why): split_plan(net, X, splits)
    assert [*net.state_dict()] == before


def test_a_layer_that_does_not_run():
    class Aux(nn.Module):
        def __init__(self): super().__init__(); self.body, self.aux, self.fc = conv(3, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        def forward(self, x): return self.fc(self.body(x).mean((2, 3)))
    with pytest.raises(ValueError, match=r'aux \(Linear\): it did not run'): split_plan(Aux(), X, {'aux': 2, 'fc': 2})


def test_norms_and_gates_in_the_trunk_are_no_obstacle():
    net = seq(conv(3, 8), Norm(8), SE(8), conv(8, 8), nn.BatchNorm2d(8), nn.InstanceNorm2d(8), head(8))
    plan = covers(split_plan(net, X, {'3': 2, '6': 2}), net)
    assert [*plan.free.values()] == [(8, 2), (8, 2), (10, 2)]
