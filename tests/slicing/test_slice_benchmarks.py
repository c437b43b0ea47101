"The benchmarks of slicing run: tiny settings, no claim about speed; and what is recorded is complete."
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.slicing import slice_cifar, slice_digits, slice_forward, slice_step
from benchmarks.timing import RESULTS, write_table
from paramfx.data.memory import tensor_dls


def recorded(name): return json.loads((Path(RESULTS)/f'{name}.json').read_text())['rows']


@pytest.mark.slow
def test_forward(tmp_path, monkeypatch):
    monkeypatch.setattr(slice_forward, 'BATCHES', {1: 99., 2: 99.})
    rows = slice_forward.measure('resnet18', rounds=1, size=32)
    assert [r['what'] for r in rows] == ['slice / subnet']*4 + ['slice / full width']*2 + ['switch, microseconds'] and all(r['ratio'] > 0 for r in rows)
    assert [r['met'] for r in rows[:4]] == ['yes']*4
    assert write_table('t', rows, slice_forward.NOTE, folder=tmp_path).exists()
    assert {r['network'] for r in recorded('slice_forward')} == {*slice_forward.NETS}


def test_forward_notices_another_function(monkeypatch):
    def other(m, sample, rate): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    monkeypatch.setattr(slice_forward, 'materialize', other)
    with pytest.raises(AssertionError, match='does not compute'): slice_forward.measure('resnet18', rounds=1, size=32)


@pytest.mark.slow
def test_step(tmp_path, monkeypatch):
    monkeypatch.setattr(slice_step, 'NETS', {'toy': ('resnet18', 32, 2)})
    rows = [slice_step.measure('toy', (1, .5), rounds=1)]
    assert rows[0]['ratio'] > 0 and rows[0]['target'] == 1.05 and rows[0]['rates'] == '1 0.5'
    assert write_table('t', rows, slice_step.NOTE, folder=tmp_path).exists()
    assert {r['rates'] for r in recorded('slice_step')} == {'1 0.5 0.25', '1 0.75 0.5 0.25'}


@pytest.mark.slow
def test_digits(tmp_path):
    runs = [slice_digits.run_seed(s, epochs=1, lr=2e-2) for s in range(2)]
    rows = slice_digits.rows(runs)
    assert [r['trained'] for r in rows] == ['slice-trained', 'plain, sliced', 'plain, recalibrated', 'separately trained']
    mean = (runs[0]['slice-trained'][0][3]+runs[1]['slice-trained'][0][3])/2
    assert rows[0]['rate 0.25'] == pytest.approx(mean) and rows[3]['worst_difference'] == 0 and 'met' in rows[0]
    assert write_table('t', rows, slice_digits.NOTE.format(epochs=1, seeds=2), folder=tmp_path).exists()
    assert recorded('slice_digits')[0]['met'] == 'yes'


@pytest.mark.slow
def test_cifar(tmp_path):
    def make(net, seed):
        from fastai.basics import CrossEntropyLossFlat, Learner, accuracy
        from fastai.callback.progress import ProgressCallback
        g = torch.Generator().manual_seed(seed)
        x, y = torch.randn(48, 3, 16, 16, generator=g), torch.randint(10, (48,), generator=g)
        return Learner(tensor_dls(x, y, x, y, bs=16, device='cpu'), net, loss_func=CrossEntropyLossFlat(), metrics=accuracy).remove_cb(ProgressCallback)
    rows = slice_cifar.run(epochs=1, make=make)
    assert [r['trained'] for r in rows] == ['slice-trained', 'plain, sliced', 'plain, recalibrated', 'separately trained', 'million multiply-adds']
    assert all(0 <= r[f'rate {k:g}'] <= 100 for r in rows for k in slice_cifar.RATES) and rows[-1]['rate 1'] > 10*rows[-1]['rate 0.25']
    assert sum(p.numel() for p in slice_cifar.network(0).parameters()) == 78_042
    assert write_table('t', rows, slice_cifar.NOTE.format(epochs=1), folder=tmp_path).exists()
