"The benchmarks of evolution run: tiny settings, no claim about speed; and what is recorded is complete."
import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.evolution import evolve_cost, evolve_digits, evolve_grocery
from benchmarks.timing import RESULTS, write_table
from paramfx.data.memory import tensor_dls


def recorded(name): return json.loads((Path(RESULTS)/f'{name}.json').read_text())['rows']


def toy(n=48):
    g = torch.Generator().manual_seed(0)
    return tensor_dls(x := torch.randn(n, 1, 8, 8, generator=g), y := torch.arange(n) % 10, x, y, bs=16, device='cpu')


@pytest.mark.slow
def test_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve_digits, 'digits', toy)
    runs = [evolve_digits.run_seed(s, generations=2, epochs=1) for s in range(2)]
    rows = evolve_digits.rows(runs)
    assert [r['trained'] for r in rows] == ['kels, whole', 'kels, slim', 'one run', 'kels, taught, whole', 'kels, taught, slim', 'wels', 'llf', 'born again']
    assert rows[0]['generation 2'] == rows[0]['last'] == pytest.approx(sum(r['kels, whole'][0][1] for r in runs)/2)
    assert 'generation 1' not in rows[2] and rows[1]['met'] == 'no'  # chance
    good = {'kels, whole': ([10., 90.], 1.), 'kels, slim': ([10., 88.], 1.)}
    assert [evolve_digits.rows([{**good, 'kels, slim': ([10., s], 1.)}])[1]['met'] for s in (88., 86.9, 87.9, 92.1)] == ['yes', 'no', 'no', 'no']
    assert write_table('t', rows, evolve_digits.note(2, 2, 1, .02), folder=tmp_path).exists()
    table = recorded('evolve_digits')
    assert table[1]['met'] == 'yes' and len([k for k in table[1] if k.startswith('generation')]) == 6


def test_the_network_is_the_one_described():
    convs = [m for m in evolve_digits.network(0).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 4 and {m.out_channels for m in convs} == {32} and len(evolve_digits.digits().train_ds) == 100


@pytest.mark.slow
def test_cost(tmp_path):
    rows = [evolve_cost.measure('toy', {'toy': (partial(evolve_digits.Net, 8), toy, 2, 1, 1e-2)}), evolve_cost.trace_and_reset('resnet18', rounds=1, size=32)]
    assert rows[0]['training_s'] > 0 and rows[0]['share'] == rows[0]['added_s']/rows[0]['training_s']
    assert 0 < rows[0]['slim_s'] + rows[0]['file_s'] + rows[0]['reset_s'] <= rows[0]['added_s'] and rows[0]['slim_validation_s'] > 0
    assert write_table('t', rows, evolve_cost.NOTE, folder=tmp_path).exists()
    assert [r['met'] for r in recorded('evolve_cost')] == ['yes']*3


def test_watched_counts_and_leaves():
    class A:
        def f(self): time.sleep(0); return sum(range(200_000))
    old = A.f
    with evolve_cost.watched({'f': (A, 'f'), 'none': (A, '__repr__')}) as spent: A().f()
    assert spent['f'] > 0 and spent['none'] == 0 and A.f is old


def test_grocery(tmp_path):
    kw = dict(net=lambda seed: evolve_digits.Net(8), dls=toy(), folder=tmp_path)
    rows = evolve_grocery.run(2, 1, **kw)
    assert [r['trained'] for r in rows] == ['generation 1', 'generation 2', 'one run', 'million multiply-adds']
    assert rows[2]['epochs'] == 2 and rows[-1]['dense'] > 3*rows[-1]['slim'] and all(r['cpu_minutes'] > 0 for r in rows[:3])
    again = evolve_grocery.run(2, 1, **kw)  # goes on where the file was left: only the long run is trained again
    assert [(r['dense'], r.get('slim')) for r in again] == [(r['dense'], r.get('slim')) for r in rows] and again[0]['cpu_minutes'] == 0
    assert write_table('t', rows, evolve_grocery.NOTE.format(generations=2, epochs=1, lr=1e-2), folder=tmp_path).exists()
    table = recorded('evolve_grocery')
    assert len([r for r in table if r['trained'].startswith('generation')]) >= 4 and all(0 <= r['slim'] <= 100 for r in table[:4]) and table[-2]['minutes'] > 0
