"""Two processes over gloo: every method keeps the same masks on both ranks, though they begin with different weights."""
from pathlib import Path

import pytest
import torch

from contracts import METHODS, Probe, build, same, snapshot
from fresh import run_ranks

HERE = Path(__file__).resolve().parent
pytest.importorskip('accelerate', reason='fastai.distributed needs accelerate')


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "Folder with what both ranks of one run over all methods left"
    out = tmp_path_factory.mktemp('ddp')
    r = run_ranks(HERE/'ddp_worker.py', out, cwd=out)
    assert r.returncode == 0, r.stderr[-6000:]
    return out


@pytest.mark.parametrize('m', METHODS.values(), ids=list(METHODS))
def test_ranks_agree(m, ranks, tmp_path):
    a, b = (torch.load(ranks/f'{m.name}_{r}.pt', weights_only=False) for r in (0, 1))
    assert a['checksum'] == b['checksum']
    assert not (where := same(a['facts'], b['facts'])), where
    if m.masked: assert all(f'{k}_mask' in a['model'] for k in ('0.3.weight',) + (() if m.compressed else ('1.2.weight',)))
    for k in a['model']:
        if 'running' not in k: assert torch.equal(a['model'][k], b['model'][k]), k  # the statistics of batch norm are of each rank's own batches
    steps = a['facts']['clock']['steps']
    assert steps == 2*4  # 64 items a rank, 16 at a time
    start = build(tmp_path, m.make(init_mask='magnitude'), model=m.net)
    assert m.held_to(a['facts']['live'], m.facts(start)['live'])
    assert bool(a['facts']['history']) == m.moves
    again = [torch.load(ranks/f'{m.name}_{r}_again.pt', weights_only=False) for r in (0, 1)]
    assert not (where := same(*again)), where
    assert again[0]['clock']['steps'] == 3*4


@pytest.mark.parametrize('m', METHODS.values(), ids=list(METHODS))
def test_file_of_rank_0_loads_without_ddp(m, ranks, tmp_path):
    a = torch.load(ranks/f'{m.name}_0.pt', weights_only=False)
    learn = build(tmp_path, [m.make(**dict(across_layers=False) if m.compressed else {}, period=2, stop=1., init_mask='magnitude'), Probe(m)], seed=5,
        model=m.net)
    learn.load(ranks/'models'/f'{m.name}_ddp')
    assert not (where := same(snapshot(learn.model), a['model'])), where
    assert m.facts(learn)['clock'] == a['facts']['clock']
    learn.fit(1)
    net = m.net()
    net.load_state_dict(torch.load(a['plain'], weights_only=True), strict=True)


RESIZING = '''
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from ddp_worker import _broadcast
from contracts import METHODS, build, snapshot, tiny_dls
from paramfx.core.state import root_module
dist.init_process_group('gloo')
for name in ('dsr', 'granet'):
    make = METHODS[name].make
    learn = build('.', make(compute='csr', period=2), dls=tiny_dls(n=128, bs=16))
    assert learn.dynamic_sparse.store.sparse, 'nothing is sparse'
    before = snapshot(learn.model)
    try:
        with learn.distrib_ctx(sync_bn=False): learn.fit(1)
    except ValueError as e: print(f'{name}: ' + ' '.join(str(e).split()))
    now = snapshot(root_module(learn.model))  # fastai leaves it wrapped after an error
    for k in before: assert 'effect' in k or torch.equal(before[k], now[k]), k
    assert learn.dynamic_sparse.effect.clock.steps == 0, name
for name, kw in (('static', {}), ('rigl', {}), ('set', {}), ('dsr', dict(across_layers=False))):
    learn = build('.', METHODS[name].make(compute='csr', **kw), dls=tiny_dls(n=128, bs=16))
    with learn.distrib_ctx(sync_bn=False): learn.fit(1)
    assert learn.dynamic_sparse.effect.clock.steps > 0
print('done')
dist.destroy_process_group()
'''


@pytest.mark.slow
def test_methods_that_resize_csr_layers_are_refused(tmp_path):
    "DDP knows the size that a gradient had at first: what would change it is told before the first step, and all else trains"
    (tmp_path/'worker.py').write_text(RESIZING)
    r = run_ranks(tmp_path/'worker.py', HERE, cwd=tmp_path, n=1)
    assert r.returncode == 0, r.stderr[-6000:]
    told = [line for line in r.stdout.splitlines() if line.startswith(('dsr: ', 'granet: '))]
    assert [t.split(':')[0] for t in told] == ['dsr', 'granet'] and r.stdout.rstrip().endswith('done')
    for t in told:
        assert "1.2.weight: in a distributed run the number of values of a layer is fixed. Use method=DSR(across_layers=False), or compute='dense'." in t
