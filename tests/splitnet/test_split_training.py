"The benchmarks that train split networks run: tiny settings, no claim about accuracy; and what is recorded is complete."
import csv, json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest, torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy
from fastai.callback.progress import ProgressCallback

from benchmarks.splitnet import split_cifar100, split_digits
from benchmarks.timing import RESULTS, write_table
from paramfx.data.memory import tensor_dls


def recorded(name): return json.loads((Path(RESULTS)/f'{name}.json').read_text())


@pytest.mark.slow
def test_digits(tmp_path):
    make, splits = split_digits.NETS['convnet']
    start = split_digits.begin(make, 0, 1)
    runs = [split_digits.run_seed(start, make, splits, s, 1, 1) for s in range(2)]
    rows = split_digits.rows('convnet', runs)
    assert len(rows) == 8 and rows[3]['accuracy'] == pytest.approx(rows[2]['accuracy'], abs=.3)  # split is masked
    assert rows[2]['change'] == pytest.approx(rows[2]['accuracy']-rows[1]['accuracy']) and rows[3]['parameters'] < .8*rows[2]['parameters']
    assert all(sorted(c for g in r['with SplitNet, uncut'][2] for c in g) == [*range(10)] for r in runs)
    assert write_table('t', rows, split_digits.NOTE.format(seeds=2, epochs=1, tune=1, first=1), folder=tmp_path, runs=runs).exists()


def test_partitions_have_no_numbers():
    a, b = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 0, 1])
    assert split_digits.partition(a) == split_digits.partition(b) == ((0, 3), (1, 2))


def test_digits_as_recorded():
    "Masking after grouping costs at most half a point, and three of four seeds agree"
    got = recorded('split_digits')
    for name in split_digits.NETS:
        mine = [r for r in got['rows'] if r['network'] == name]
        of = {r['trained']: r for r in mine}
        assert of['masked']['change'] >= -split_digits.COST and of['masked']['met'] == of['with SplitNet, uncut']['met'] == 'yes'
        assert of['dense, split at random']['change'] < -5 and of['split, finetuned']['accuracy'] >= of['dense, split at random, finetuned']['accuracy']
        parts = [json.dumps(r['with SplitNet, uncut'][2]) for r in got['runs'] if r['network'] == name]
        assert len(parts) == 4 and Counter(parts).most_common(1)[0][1] >= split_digits.SAME


TWO = {'one': ['c0', 'c1', 'c2', 'c3'], 'two': ['c4', 'c5', 'c6', 'c7']}


def make(net, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(48, 3, 16, 16, generator=g), torch.arange(48) % 8
    dls = tensor_dls(x, y, x, y, bs=16, device='cpu', vocab=[f'c{i}' for i in range(8)])
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy).remove_cb(ProgressCallback)


@pytest.mark.slow
def test_cifar100(tmp_path, monkeypatch):
    monkeypatch.setattr(split_cifar100, 'GROUPS', 2)
    monkeypatch.setattr(split_cifar100, 'HOW', dict(equal_groups=True))  # in three steps nothing is learned
    def go(**kw): return split_cifar100.run(epochs=1, tune=1, make=make, net=lambda s: split_cifar100.network(s, 8, (4, 8, 8)), table=TWO, keep=tmp_path, **kw)
    said = []
    rows, named = go(tell=said.append)
    assert said == rows[:-2] and [r['network'].split(',')[0] for r in said] == ['dense', 'with SplitNet', *['learned']*2, *['cluster']*2, *['random']*2]
    assert sorted(c for v in named.values() for c in v) == sorted(sum(TWO.values(), []))
    assert rows[-1]['ari'] == rows[-1]['together']/100 == 1 and all(0 <= r['accuracy'] <= 100 for r in said)
    assert len([*tmp_path.glob('*.pth')]) == 2 and go()[0][0] == rows[0]  # the dense network is not trained again
    note = split_cifar100.NOTE.format(groups=2, epochs=1, tune=1, minutes=1, gammas='', named='')
    assert write_table('t', rows, note, folder=tmp_path, runs=[named]).exists()


def test_agreement():
    supers = np.repeat(np.arange(4), 3)
    exact, merged = split_cifar100.agreement(supers, supers), split_cifar100.agreement(supers//2, supers)
    assert exact == dict(ari=1, nmi=pytest.approx(1), together=100) and merged['together'] == 100 and 0 < merged['ari'] < 1
    chance = split_cifar100.by_chance(supers//2, supers, 200)
    assert abs(chance['ari']) < .03 and chance['best_ari'] < merged['ari']+1e-9 and abs(chance['together']-100*5/11) < 3
    assert split_cifar100.coarse(['trout', 'apple', 'seal']).tolist() == [1, 4, 0]


def test_superclasses():
    assert len(split_cifar100.SUPER) == 20 and len({c for v in split_cifar100.SUPER.values()
        for c in v}) == 100 and {*map(len, split_cifar100.SUPER.values())} == {5}


def test_superclasses_are_those_of_the_data(data_dir):
    file = data_dir/'cifar100'/'classes.csv'
    if not file.exists(): pytest.skip('no table of superclasses beside the images')
    theirs = {}
    for r in csv.DictReader(file.open()): theirs.setdefault(r['coarse_id'], set()).add(r['name'])
    assert {frozenset(v) for v in theirs.values()} == {frozenset(v) for v in split_cifar100.SUPER.values()}


def test_cifar100_as_recorded():
    "Learned groups fit the superclasses better than any of a thousand random partitions of the same sizes"
    got = recorded('split_cifar100')
    of = {r['network']: r for r in got['rows']}
    learned, chance = of['learned, masked'], of['1000 partitions of those sizes, mean']
    assert learned['ari'] > chance['best_ari'] and learned['nmi'] > chance['nmi'] and learned['together'] > chance['together']+5
    assert len([c for v in got['runs'][0].values() for c in v]) == 100
