"The benchmark of CSR steps fails where a layer that was to be sparse was not, however that came about"
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramfx.kernels.csr
from benchmarks.sparse import csr_step, masked_step
from benchmarks.timing import write_table
from paramfx.kernels.csr import CSRLinear


def toy():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(masked_step.NETS, 'toy', (toy, (3, 4, 4), 8, 64, 2, 0.))
    monkeypatch.setitem(csr_step.NETS, 'toy', (toy, (3, 4, 4), 8, 2, .8, ['1', '3', '5'], (9., 9.)))


@pytest.mark.slow
def test_it_runs(tmp_path):
    rows = [r for opt in csr_step.LOOP_OPTS for r in csr_step.measure('toy', opt, rounds=2, repeats=1)] + [csr_step.rewires('toy', 'SGD', rounds=2)]
    assert [r['what'] for r in rows[:2]] == ['step, loop', 'step, Learner'] and all(r['ratio'] > 0 for r in rows[:4])
    assert write_table('t', rows, csr_step.NOTE, folder=tmp_path).exists()


def dense_product(self, x): return F.linear(x, self.weight, self.bias)

def dense_gradient(self, x):
    y = F.linear(x, self.weight, self.bias)
    with torch.no_grad(): sparse = torch.mm(self.index.of(self.values), x.t()).t()
    return y + (sparse-y).detach()


@pytest.mark.parametrize('change,match', [
    ((csr_step, 'to_csr', lambda layer, mask: layer), '1 ran dense: Linear'),  # the loop
    ((torch.backends.mkl, 'is_available', lambda: False), '1 ran dense: Linear'),  # the Learner, which says why in its plan and goes on
    ((CSRLinear, 'product', dense_product), '1 ran dense: no sparse addmm of 40x48'),
    ((CSRLinear, 'product', dense_gradient), '1 ran dense: no sparse'),
    ((paramfx.kernels.csr, '_times', lambda a, x: a.to_dense() @ x), '1 ran dense: no sparse addmm')])
def test_layers_that_ran_dense(monkeypatch, change, match):
    monkeypatch.setattr(*change)
    with pytest.raises(SystemExit, match=match): csr_step.measure('toy', 'SGD', rounds=1, repeats=1)


def test_one_of_several_layers_ran_dense():
    net = csr_step.sparse(toy(), ['1', '3', '5'], .8)
    csr_step.check(net, ['1', '3', '5'], (3, 4, 4))
    assert all(p.grad is None for p in net.parameters())
    net[5].product = lambda x: dense_product(net[5], x)
    # one of the two of that size
    with pytest.raises(SystemExit, match='3 ran dense: no sparse .*addmm of 40x40'): csr_step.check(net, ['1', '3', '5'], (3, 4, 4))
    paramfx.kernels.csr.to_dense(net[5])
    with pytest.raises(SystemExit, match='5 ran dense: Linear'): csr_step.check(net, ['1', '3', '5'])


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='the peak is read from /proc')
def test_memory_of_a_sparse_step():
    rows = {r['what']: r for r in csr_step.memory('LeNet-300-100', ['SGD'])}
    assert rows['parameters']['csr'] == '7,124' and rows['gradients and state, over the live share']['ratio'] == pytest.approx(1, abs=.01)
    assert rows['peak of three steps']['ratio'] < .7
