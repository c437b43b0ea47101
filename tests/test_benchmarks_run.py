"The benchmarks run: tiny settings, no claim about speed."
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import csr_infer
from benchmarks.channels import dead_filters
from benchmarks.sparse import deepr_step, lenet, masked_step, mnist_table, reallocation, sparse_files, tied_step
from benchmarks import imports
from benchmarks.splitnet import split_forward, split_penalty
from benchmarks.zoo.networks import small_cnn
from benchmarks.timing import table, write_table
from paramfx.data.memory import tensor_dls
from paramfx.sparse.published import PUBLISHED_RECIPES
from paramfx.sparse.methods import DSR


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "Networks and batches of toy size"
    monkeypatch.setattr(masked_step, 'NETS', {'toy': (partial(small_cnn, 4), (3, 32, 32), 4, 64, 1, 1.03)})


@pytest.mark.slow
@pytest.mark.parametrize('opt', ['SGD', 'OptimWrapper(torch SGD)'])
def test_masked_step(opt, tmp_path):
    rows = masked_step.measure('toy', opt, rounds=4, repeats=1)
    assert [r['step'] for r in rows] == ['plain again', 'idle', 'static', 'dsr, period 3', 'dsr, period 100']
    assert all(r['ratio'] > 0 for r in rows) and rows[-1]['rewire_ms'] > 0
    goal = masked_step.WRAPPED if 'Wrapper' in opt else 1.03
    assert [r['target'] for r in rows] == ['', masked_step.IDLE, goal, goal, goal]
    assert write_table('t', rows, masked_step.NOTE, folder=tmp_path).exists()


@pytest.mark.slow
def test_tied_step(tmp_path):
    rows = tied_step.measure('SGD', rounds=2, repeats=1, net='toy', sparsity=.8)
    assert [r['step'] for r in rows] == ['plain again', *tied_step.TIED] and all(r['ratio'] > 0 for r in rows)
    assert write_table('t', rows, tied_step.NOTE, folder=tmp_path).exists()


@pytest.mark.slow
def test_deepr_step(tmp_path, monkeypatch):
    monkeypatch.setattr(deepr_step, 'NET', 'toy')
    rows = [deepr_step.measure(.9, opt, rounds=2, repeats=1) for opt in deepr_step.OPTS]
    assert all(r['ratio'] > 0 and r['target'] == 1.5 and r['met'] in ('yes', 'no') for r in rows)
    assert write_table('t', rows, deepr_step.NOTE, folder=tmp_path).exists()
    published = json.loads((Path(deepr_step.__file__).parent.parent/'results'/'deepr_step.json').read_text())['rows']
    assert {(r['sparsity'], r['optimizer']) for r in published} == {(s, o) for s in deepr_step.TARGETS
        for o in deepr_step.OPTS} and all(r['moved'] > 1 for r in published)


@pytest.mark.slow
def test_split_forward(tmp_path, monkeypatch):
    monkeypatch.setattr(split_forward, 'SIZES', ((2, 32), (1, 32)))
    rows = split_forward.resnet(2, rounds=1, batch=1)
    assert [r['batch'] for r in rows] == [1, 2, 1] and all(r['time'] > 0 and r['macs'] < 1 for r in rows) and rows[0]['macs'] == .5
    assert write_table('t', rows, split_forward.NOTE, folder=tmp_path).exists()
    published = json.loads((Path(split_forward.__file__).parent.parent/'results'/'split_forward.json').read_text())['rows']
    assert len(published) == 12 and {r['met'] for r in published} == {'yes'}


@pytest.mark.slow
def test_split_penalty(tmp_path, monkeypatch):
    toy = dict(splits=[2], net=partial(small_cnn, 4), pixels=32)
    rows = split_penalty.steps(rounds=2, repeats=1, bs=4, **toy)
    assert [(r['how'], r['target']) for r in rows] == [('plain again', ''), ('every=1', .15),
        ('every=4', .05)] and all(r['ratio'] > 0 for r in rows) and all(r['share'] > 0 for r in rows[1:])
    forms = split_penalty.formulations(rounds=2, **toy)
    assert [r['how'] for r in forms] == ['matrix products under autograd', 'loops under autograd', 'closed form']
    assert split_penalty.missed([dict(rows[1], share=.2, met='no')]) == ['32 px step, every=1: 0.200, target 0.15']
    assert write_table('t', rows+forms, split_penalty.NOTE, folder=tmp_path).exists()
    monkeypatch.setattr(split_penalty, 'looped_term', lambda w, p, q: 2*split_penalty.split_totals([(w, p, q)], [p]).weight)
    with pytest.raises(SystemExit, match='loops under autograd: another gradient'): split_penalty.formulations(rounds=1, **toy)
    published = json.loads((Path(split_penalty.__file__).parent.parent/'results'/'split_penalty.json').read_text())['rows']
    assert sum(r.get('target', '') != '' for r in published) == 4 and not split_penalty.missed(published)


def test_sparse_files(tmp_path):
    rows = sparse_files.run(['LeNet-300-100'], rounds=1, rates=(.9,))
    assert [r['values'] for r in rows] == ['float32', 'float16'] and rows[0]['gzip'] > rows[0][
        'over_bound'] and not [m for m in sparse_files.missed(rows) if ' s (' not in m]
    assert sparse_files.missed([dict(rows[0], over_bound=1.06, save_s=3., load_layers=2.)])[1].endswith('(save_s), target 2.0')
    assert write_table('t', rows, sparse_files.NOTE, folder=tmp_path).exists()
    published = json.loads((Path(sparse_files.__file__).parent.parent/'results'/'sparse_files.json').read_text())['rows']
    assert len(published) == 24 and not sparse_files.missed(published)


@pytest.mark.slow
def test_csr_infer(tmp_path, monkeypatch):
    for k, v in dict(TARGETS={.9: {1: .01, 32: 99.}}, BLOCKS=(16,), CONVS=((32, 48, 6, 2),)).items(): monkeypatch.setattr(csr_infer, k, v)
    rows = csr_infer.run(rounds=2, n=128)
    assert [r['format'] for r in rows] == ['csr', 'csr', *['csr', 'bsr 8x8', 'bsr 16x16']*3, 'csr',
        'csr', 'csr', 'csr'] and all(r.get('ratio', 1) > 0 for r in rows)
    assert len(csr_infer.missed(rows)) == 1 and '0.9, 1 items' in csr_infer.missed(rows)[0] and all(0 < r['break_even'] < 1 for r in rows[-3:])
    assert write_table('t', rows, csr_infer.NOTE, folder=tmp_path).exists()


def test_csr_infer_fails_where_a_layer_ran_dense(monkeypatch):
    monkeypatch.setattr(csr_infer, 'materialize', lambda m, *a, **k: m)
    with pytest.raises(SystemExit, match='was to be csr and is Linear'): csr_infer.linear(.9, {1: .2}, 1, n=64)
    net = csr_infer.freeze_layers(csr_infer.masked(torch.nn.Linear(64, 64), .5, 16), {'0': 'bsr 8x8'})
    csr_infer.check(net, 'bsr 8x8')
    for kind in ('csr', 'bsr 16x16'):
        with pytest.raises(SystemExit, match=f'was to be {kind} and is FrozenBSR'): csr_infer.check(net, kind)


def test_csr_infer_as_published():
    published = json.loads((Path(csr_infer.__file__).parent.parent/'results'/'csr_infer.json').read_text())['rows']
    assert {(r['sparsity'], r['items']) for r in published if 'target' in r} == {(s, k) for s, goals in csr_infer.TARGETS.items() for k in goals}
    assert sum('break_even' in r for r in published) == 3 and {r.get('format') for r in published} == {'csr', 'bsr 8x8', 'bsr 16x16'}


def test_a_turn_is_that_many_batches_of_a_real_fit():
    learn = masked_step.make_learner('toy', 'SGD', masked_step.DynamicSparse(.5, period=2, method=DSR(threshold=1.)))
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


@pytest.mark.slow
def test_dead_filters():
    rows = dead_filters.measure('toy', 2, batches=(2,), cases={'toy': (partial(small_cnn, 4), (3, 32, 32), dead_filters.CONVS)})
    assert [r['forward'] for r in rows] == ['masked', 'materialized'] and all(r['ratio'] > 0 for r in rows)
    assert rows[1]['parameters'] < .7 and rows[1]['difference'] < 1e-5
    table = json.loads((Path(dead_filters.__file__).parent.parent/'results'/'dead_filters.json').read_text())['rows']
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
    rows = json.loads((Path(lenet.__file__).parent.parent/'results'/f'{name}.json').read_text())['rows']
    if name == 'lenet': assert len(rows) >= 3 and all(r['accuracy'] >= lenet.GOAL and r['epochs'] <= 10 for r in rows)
    else: assert max(rows[-1][k] for k in ('valid', 'final', 'test')) < 274 and rows[-1]['final'] < min(r['final'] for r in rows[:-1])


def toy_mnist():
    x, y = torch.rand(60, 1, 28, 28), torch.arange(60) % 10
    return tensor_dls(x, y, x, y, bs=20, device='cpu')


@pytest.fixture
def short(monkeypatch):
    "Two prunes, and few sparsities"
    monkeypatch.setitem(PUBLISHED_RECIPES[mnist_table.NETWORK], 'prune', dict(n_prunes=2, schedule='exponential', start=1, every=1, post=1))
    monkeypatch.setattr(mnist_table, 'MAIN', (.98,))
    monkeypatch.setattr(mnist_table, 'EXTRA', (.9,))


def test_mnist_table_cell_by_cell(tmp_path, short):
    said, dls = [], toy_mnist()
    def go(**kw): return mnist_table.run(folder=tmp_path, networks=tmp_path/'nets', dls=dls, tell=said.append, epochs=2, **kw)
    go(seeds=1, only=['pruned'])  # trains the dense network that it needs
    assert len(said) == 2 and [r['method'] for r in mnist_table.read(tmp_path)] == ['pruned', 'pruned']
    first = mnist_table.read(tmp_path)
    file = go(seeds=2, only=['dense', 'static', 'pruned', 'dsr', 'set'])
    runs = mnist_table.read(tmp_path)
    assert [r for r in runs if r['method'] == 'pruned' and r['seed'] == 0] == first  # not run again
    assert len(runs) == 2 + 4*3 and {r['live'] for r in runs} == {266_200, 5324, 26_620} and all(r['epochs']
        == (3 if r['method'] == 'pruned' else 2) for r in runs)
    assert len(list((tmp_path/'nets').iterdir())) == 2
    table = json.loads((tmp_path/'mnist_table.json').read_text())
    assert [(r['method'], r['seeds']) for r in table['rows'] if r['sparsity'] in (0, .98)] == [('dense', 2),
        ('static', 2), ('set', 2), ('dsr', 2), ('pruned', 2)]
    assert table['machine']['torch'] and 'verdict' in file.read_text()
    n = len(said)
    go(seeds=2, only=['dense', 'static', 'pruned', 'dsr', 'set'])
    assert len(said) == n  # all there
    mnist_table.run(seeds=1, only=['dense'], folder=tmp_path, networks=tmp_path/'nets', dls=dls, epochs=1)
    runs = {r['seed']: r['epochs'] for r in mnist_table.read(tmp_path) if r['method'] == 'dense'}
    assert runs == {0: 1, 1: 2}  # another recipe takes the place of the cell


def test_mnist_table_repeats_exactly():
    dls = toy_mnist()
    a, b, c = (mnist_table.train(dls, 'dsr', .9, seed, epochs=2)[1].state_dict() for seed in (1, 1, 2))
    assert all(map(torch.equal, a.values(), b.values()))
    assert not torch.equal(a['fc1.weight_mask'], c['fc1.weight_mask'])


def test_mnist_table_order_and_verdicts():
    todo = mnist_table.cells(3)
    assert todo[0] == ('dense', 0., 0) and {c[2] for c in todo[:11]} == {0} and len(todo) == len({*todo}) == 3*11+4*5
    assert {c[1] for c in todo[:33]} == {0., .98, .95} and all(c[2] == 0 for c in todo[33:])
    assert mnist_table.cells(1, ['set'])[:2] == [('set', .98, 0), ('set', .95, 0)]
    with pytest.raises(ValueError, match="'snip'"): mnist_table.cells(1, ['snip'])
    v = mnist_table.verdict
    assert [v(98.4, 98.1, None), v(98.41, 98.1, None), v(97.8, 98.1, None), v(97.7, 98.1, .1),
        v(97.7, 98.1, .2)] == ['within', 'better', 'within', 'below', 'within']
    p = mnist_table.printed()
    assert p['dsr', .98] == (98.14, None) and p['dense', 0.] == (98.69, None) and len(p) == 31
