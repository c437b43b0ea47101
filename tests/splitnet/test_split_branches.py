"""Branches taken apart give what the split network does, each from its own channels, on devices and in processes."""
from copy import deepcopy

import pytest, torch
from torch import nn

from paramfx.splitnet.branches import Feature, branches
from paramfx.splitnet.split import split_model
from paramfx.splitnet.plan import split_plan
from paramfx.splitnet.workers import BranchProcesses
from test_split_model import NETS, X, resnet, same, shake, total, uneven


def make(name):
    build, splits = NETS[name]
    torch.manual_seed(0)
    net = shake(build()).double()
    plan = split_plan(net, X.double(), splits)
    return split_model(net, X.double(), uneven(plan), splits), plan


@pytest.mark.few(3)
@pytest.mark.parametrize('name', NETS)
def test_branches_give_what_the_network_does(name):
    split, plan = make(name)
    before = {k: v.clone() for k, v in split.state_dict().items()}
    apart = branches(split)
    x = torch.randn(5, 3, 32, 32, dtype=torch.double)
    with torch.no_grad(): same(apart(x), split(x), 1e-10)
    assert len(apart.branches) == min(plan.levels) and all(torch.equal(v, before[k]) for k, v in split.state_dict().items())
    with torch.no_grad(): # a branch alone, with nothing but its channels
        feats = apart.trunk(x)
        for b in apart.branches: same(b(*b.select(feats)), split(x)[:, b.classes], 1e-10)
    for m in apart.modules(): assert not isinstance(m, Feature) or m.value is None


@pytest.mark.few(3)
@pytest.mark.parametrize('name', ['resnet', 'hierarchy', 'learner', 'flatten', 'depthwise', 'densenet', 'wrn'])
def test_nothing_is_there_twice(name):
    split, _ = make(name)
    assert total(branches(split)) == total(split)


def test_a_branch_gets_its_channels_only():
    split, plan = make('resnet')
    apart = branches(split)
    feats = apart.trunk(X.double())
    sizes = [[f.shape[1] for f in b.select(feats)] for b in apart.branches]
    assert [f.shape[1] for f in feats] == [256] and sum(s[0] for s in sizes) == 256
    p = torch.tensor(split._split['groups']['layer3.0.conv2']).bincount().tolist()
    assert sizes == [[n] for n in p]
    assert not any(n.startswith(('conv1', 'layer1', 'layer2', 'layer3')) for b in apart.branches for n, _ in b.net.named_parameters())


def test_hierarchy_stays_split_inside_of_a_branch():
    split, plan = make('hierarchy')
    apart = branches(split)
    assert total(apart) == total(split) and {type(m).__name__ for b in apart.branches for m in b.net.modules()} >= {'SplitBlock'}
    assert [len(b.classes) for b in apart.branches] == plan.coarse(torch.tensor(split._split['groups']['fc']), 5, 2).bincount().tolist()


def test_another_size_of_image_and_of_batch():
    split, _ = make('resnet')
    x = torch.randn(1, 3, 96, 64, dtype=torch.double)
    with torch.no_grad(): same(branches(split)(x), split(x), 1e-10)


def test_training_apart_is_training_together():
    "Gradients of trunk and branches add up to those of the split network"
    split, _ = make('flatten')
    apart, x = branches(split), X.double()
    y = torch.tensor([0, 1])
    for m in (split, apart): nn.functional.cross_entropy(m(x), y).backward()
    for a, b in zip(apart.trunk.parameters(), split.parameters()): torch.testing.assert_close(a.grad, b.grad)
    assert sum(p.grad.pow(2).sum() for p in apart.parameters()).isclose(sum(p.grad.pow(2).sum() for p in split.parameters()))


def test_copies_and_devices():
    split, _ = make('resnet')
    apart = deepcopy(branches(split)).place(['cpu', 'cpu'])
    with torch.no_grad(): same(apart(X.double()), split(X.double()), 1e-10)
    with pytest.raises(ValueError, match='3 for 2 branches'): apart.place(['cpu']*3)
    with pytest.raises(ValueError, match='it is not split'): branches(resnet())


@pytest.mark.cuda
def test_a_branch_on_the_gpu():
    split, _ = make('resnet')
    apart = branches(split).place(['cuda', 'cpu'])
    with torch.no_grad(): out = apart(X.double())
    assert out.device.type == 'cpu'
    same(out, split(X.double()), 1e-8)


@pytest.mark.parametrize('method', ['fork', pytest.param('spawn', marks=pytest.mark.slow)])
def test_two_processes(method):
    split, _ = make('hierarchy')
    with BranchProcesses(branches(split), method=method) as run:
        pids = {p.pid for p in run.procs}
        for n in (1, 3):
            x = torch.randn(n, 3, 32, 32, dtype=torch.double)
            with torch.no_grad(): same(run(x), split(x), 1e-10)
        assert len(pids) == 2 and all(p.is_alive() for p in run.procs)
        procs = run.procs
        with pytest.raises(RuntimeError, match='A branch broke off'): run.ask([(torch.ones(1),)]*2)
    assert not any(p.is_alive() for p in procs)
    with pytest.raises(ValueError, match='have ended'): run(X.double())


def test_code_that_holds_a_width_is_refused():
    class Fixed(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        def forward(self, x): return self.c(self.b(self.a(x)).mean((2, 3)).view(-1, 8))
    split = split_model(Fixed(), X, splits={'b': 2, 'c': 2}, classes='random')
    with pytest.raises(ValueError, match='Fixed: its branches'): branches(split)
