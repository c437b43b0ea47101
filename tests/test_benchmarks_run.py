"The benchmarks run: tiny settings, no claim about speed."
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import dead_filters, imports, lenet, masked_step, reallocation, tied_step
from benchmarks.networks import small_cnn
from benchmarks.timing import table, write_table
from paramfx.data import tensor_dls


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "Networks and batches of toy size"
    monkeypatch.setattr(masked_step, 'NETS', {'toy': (partial(small_cnn, 4), (3, 32, 32), 4, 64, 1, 1.03)})


@pytest.mark.parametrize('opt', ['SGD', 'OptimWrapper(torch SGD)'])
def test_masked_step(opt, tmp_path):
    rows = masked_step.measure('toy', opt, rounds=4, repeats=1)
    assert [r['step'] for r in rows] == ['plain again', 'idle', 'static', 'dsr, period 3', 'dsr, period 100']
    assert all(r['ratio'] > 0 for r in rows) and rows[-1]['rewire_ms'] > 0
    goal = masked_step.WRAPPED if 'Wrapper' in opt else 1.03
    assert [r['target'] for r in rows] == ['', masked_step.IDLE, goal, goal, goal]
    assert write_table('t', rows, masked_step.NOTE, folder=tmp_path).exists()


def test_tied_step(tmp_path):
    rows = tied_step.measure('SGD', rounds=2, repeats=1, net='toy', sparsity=.8)
    assert [r['step'] for r in rows] == ['plain again', *tied_step.TIED] and all(r['ratio'] > 0 for r in rows)
    assert write_table('t', rows, tied_step.NOTE, folder=tmp_path).exists()


def test_a_turn_is_that_many_batches_of_a_real_fit():
    learn = masked_step.make_learner('toy', 'SGD', masked_step.DynamicSparse(.5, period=2, threshold=1.))
    run = masked_step.Runner(learn, 3)
    for _ in range(4): run()
    cb = learn.dynamic_sparse
    assert cb.effect.clock.steps == learn.train_iter == 12
    assert [o['step'] for o in cb.history][:2] == [2, 4]
    run.close()
    assert not run.thread.is_alive()


def test_errors_of_a_fit_reach_the_caller():
    learn = masked_step.make_learner('toy', 'SGD')
    learn.model.forward = lambda x: 1/0
    run = masked_step.Runner(learn, 1)
    with pytest.raises(RuntimeError, match='ended') as e: run()
    assert 'ZeroDivisionError' in repr(e.value.__cause__)


@pytest.mark.parametrize('granularity', ['weight', 'kernel'])
def test_reallocation(granularity):
    cases = {'toy': (small_cnn, dict(sparsity=.8, granularity=granularity), .01)}
    row = reallocation.measure('toy', rounds=3, warmup=1, cases=cases)
    assert abs(row['moved']-.1) < .01 and row['ms'] > 0 and row['target_ms'] == 10


def test_a_snapshot_brings_everything_back():
    learn, cb = reallocation.make(small_cnn, dict(sparsity=.8))
    start = reallocation.Snapshot(learn, cb)
    before = cb.store.checksum(), cb.effect.values['threshold'], [e.live for e in cb.store.items]
    cb.rewire(learn.opt)
    assert cb.store.checksum() != before[0]
    start.restore()
    assert before == (cb.store.checksum(), cb.effect.values['threshold'], [e.live for e in cb.store.items])
    assert list(cb.store.counts().values()) == before[2]
    assert all(torch.equal(e.float.bool(), e.full) and not e.weight[~e.full].any() for e in cb.store.items)


def test_dead_filters():
    rows = dead_filters.measure('toy', 2, batches=(2,), cases={'toy': (partial(small_cnn, 4), (3, 32, 32), dead_filters.CONVS)})
    assert [r['forward'] for r in rows] == ['masked', 'materialized'] and all(r['ratio'] > 0 for r in rows)
    assert rows[1]['parameters'] < .7 and rows[1]['difference'] < 1e-5
    table = json.loads((Path(dead_filters.__file__).parent/'results'/'dead_filters.json').read_text())['rows']
    assert all(r['ratio'] < .95 for r in table if r['forward'] == 'materialized') and len(table) == 12


def test_imports_rows():
    rows = imports.run(rounds=1, base='import json', ours='import wave')
    assert len(rows) == 3 and rows[0]['modules'] == 0 and 'wave' in rows[0]['also_loaded'] and 'wave' in table(rows)
    with pytest.raises(RuntimeError, match='no_such_module'): imports.probe('', 'import no_such_module')


def test_import_loads_nothing_heavy():
    imports.check([imports.probe(imports.FASTAI, 'import paramfx.all')])
    with pytest.raises(AssertionError, match='sklearn'): imports.check([dict(new=['sklearn'], before=[])])


def test_lenet(tmp_path):
    x, y = torch.rand(64, 1, 28, 28), torch.arange(64) % 10
    rows = lenet.run(seeds=2, epochs=1, dls=tensor_dls(x, y, x, y, bs=16, device='cpu'))
    assert [r['seed'] for r in rows] == [0, 1] and all(0 <= r['accuracy'] <= 100 and r['loading_ms'] > 0 for r in rows)
    assert write_table('lenet', rows, lenet.NOTE, folder=tmp_path).exists()


@pytest.mark.parametrize('name', ['lenet', 'lstm'])
def test_recorded_trainings_reach_their_goals(name):
    "The checked-in tables: accuracy of the MLP on MNIST, perplexity of the language model against that of counted word pairs"
    rows = json.loads((Path(lenet.__file__).parent/'results'/f'{name}.json').read_text())['rows']
    if name == 'lenet': assert len(rows) >= 3 and all(r['accuracy'] >= lenet.GOAL and r['epochs'] <= 10 for r in rows)
    else: assert max(rows[-1][k] for k in ('valid', 'final', 'test')) < 274 and rows[-1]['final'] < min(r['final'] for r in rows[:-1])
