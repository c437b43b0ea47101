"Sparse products in a network that is only used"
import pickle

import pytest
import torch
from torch import nn

from contracts import seed_all
from paramfx.csr import CSRLinear
from paramfx.csr_infer import FrozenCSR, break_even, plan_infer, sparse_infer, time_infer
from paramfx.rewire import DynamicSparse


def net(density=.02):
    seed_all()
    m = nn.Sequential(nn.Linear(600, 500), nn.ReLU(), nn.Linear(500, 10))
    with torch.no_grad(): m[0].weight.mul_(torch.rand(500, 600) < density)
    return m


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(600,), (1, 600), (31, 600), (65, 600), (2, 40, 600), (0, 600)])
def test_outputs(bias, shape):
    m = net()[0].double()
    if not bias: m.bias = None
    x = torch.randn(shape, dtype=torch.float64)
    y = FrozenCSR(m)(x)
    assert y.shape == m(x).shape and torch.allclose(y, m(x), atol=1e-12) and not y.requires_grad
    assert torch.equal(FrozenCSR(m).plain().weight, m.weight)


def test_of_a_csr_layer_and_pickled():
    m = net()[0]
    fast = FrozenCSR(CSRLinear.of(m))
    x = torch.randn(3, 600)
    assert torch.allclose(fast(x), m(x), atol=1e-5) and torch.equal(pickle.loads(pickle.dumps(fast))(x), fast(x))


def test_the_verb():
    m, x = net(), torch.randn(32, 600)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    new = sparse_infer(m, x)
    assert [type(o) for o in new] == [FrozenCSR, nn.ReLU, nn.Linear] and all(torch.equal(v, m.state_dict()[k]) for k, v in before.items())
    assert torch.allclose(new(x), m(x), atol=1e-5)
    assert type(sparse_infer(net(.9), x)[0]) is nn.Linear and type(sparse_infer(net(.9), x, 'csr')[0]) is FrozenCSR
    assert [r['layer'] for r in plan_infer(m, x)] == ['0'] and not plan_infer(m, x, include='2')


def test_errors():
    m, x = net(), torch.randn(4, 600)
    with pytest.raises(ValueError, match="fmt='bsr'"): sparse_infer(m, x, 'bsr')
    DynamicSparse(.5, 'static').convert(m).attach(m)
    with pytest.raises(ValueError, match='materialize'): sparse_infer(m, x)


def test_trials_leave_the_random_state():
    seed_all(5)
    want = torch.rand(1)
    seed_all(5)
    time_infer(64, 64, 100, 3)
    assert torch.equal(torch.rand(1), want) and 0 < break_even(300, 300, 8) < 1
