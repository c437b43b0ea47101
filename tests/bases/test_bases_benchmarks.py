"The benchmarks of shared bases run: tiny settings, no claim about speed; and what is recorded is complete."
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.bases import bases_cifar, bases_step
from benchmarks.timing import RESULTS, write_table
from paramfx.data.memory import tensor_dls


def recorded(name): return json.loads((Path(RESULTS)/f'{name}.json').read_text())['rows']


@pytest.mark.slow
def test_cifar(tmp_path):
    def make(net, seed):
        from fastai.basics import SGD, CrossEntropyLossFlat, Learner
        from fastai.callback.progress import ProgressCallback
        g = torch.Generator().manual_seed(seed)
        x, y = torch.randn(32, 3, 16, 16, generator=g), torch.randint(10, (32,), generator=g)
        return Learner(tensor_dls(x, y, x, y, bs=16, device='cpu'), net, loss_func=CrossEntropyLossFlat(),
            opt_func=partial(SGD, mom=.9), cbs=bases_cifar.NoValidation).remove_cb(ProgressCallback)
    rows = bases_cifar.run(epochs=1, make=make)
    named = {r['network']: r for r in rows}
    assert [*named][:3] == ['plain ResNet-20', 'plain ResNet-32', 'ResNet-32-S16U1, converted by SVD'] and len(named) == len(rows) == 14
    # the published counts
    assert named['ResNet-32-S8U1']['params'] == named['ResNet-32-S8U1, converted, an epoch more']['params'] == 150_666 and rows[1]['params'] == 464_154
    assert all(0 <= r['error'] <= 100 for r in rows)
    assert write_table('t', rows, bases_cifar.NOTE.format(epochs=1, lr=.1, n=32), folder=tmp_path).exists()
    assert [r['network'] for r in recorded('bases_cifar')] == [r['network'] for r in rows]


@pytest.mark.slow
def test_step(tmp_path, monkeypatch):
    monkeypatch.setattr(bases_step, 'STEPS', 1)
    torch.manual_seed(0)
    rows = bases_step.run(rounds=1, ranks=(8,), bs=2)
    assert len(rows) == 18 and all(r['ratio'] > 0 for r in rows) and {r['layout'] for r in rows} == {*bases_step.LAYOUTS}
    assert write_table('t', rows, bases_step.NOTE.format(rounds=1, steps=3), folder=tmp_path).exists()
    assert {r['what'] for r in rows} < {r['what'] for r in recorded('bases_step')}


def test_step_notices_another_function(monkeypatch):
    monkeypatch.setattr(bases_step, 'agree', lambda rank, x: 1.)
    with pytest.raises(AssertionError, match='does not compute'): bases_step.measure(8, 'contiguous', 1, bs=2)
    monkeypatch.undo()
    forward = bases_step.Published.forward
    monkeypatch.setattr(bases_step.Published, 'forward', lambda self, x: forward(self, x).flip(1))
    assert bases_step.agree(8, torch.randn(2, 3, 32, 32)) > 1e-3
