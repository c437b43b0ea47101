"""Two processes over gloo: every method keeps the same masks on both ranks, though they begin with different weights."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contracts import METHODS, Probe, build, same, small_net, snapshot

HERE = Path(__file__).resolve().parent
pytest.importorskip('accelerate', reason='fastai.distributed needs accelerate')


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "Folder with what both ranks of one run over all methods left"
    out = tmp_path_factory.mktemp('ddp')
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
           'PYTHONPATH': os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get('PYTHONPATH', '')])}
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(HERE/'ddp_worker.py'), str(out)]
    r = subprocess.run(cmd, capture_output=True, text=True, env=env, cwd=out, timeout=180)
    assert r.returncode == 0, r.stderr[-6000:]
    return out


@pytest.mark.parametrize('m', METHODS.values(), ids=list(METHODS))
def test_ranks_agree(m, ranks, tmp_path):
    a, b = (torch.load(ranks/f'{m.name}_{r}.pt', weights_only=False) for r in (0, 1))
    assert a['checksum'] == b['checksum']
    assert not (where := same(a['facts'], b['facts'])), where
    assert all(f'{k}_mask' in a['model'] for k in ('0.3.weight',) + (() if m.compressed else ('1.2.weight',)))
    for k in a['model']:
        if 'running' not in k: assert torch.equal(a['model'][k], b['model'][k]), k  # the statistics of batch norm are of each rank's own batches
    steps = a['facts']['clock']['steps']
    assert steps == 2*4  # 64 items a rank, 16 at a time
    start = build(tmp_path, m.make(init_mask='magnitude'))
    assert m.held_to(a['facts']['live'], m.facts(start)['live'])
    assert bool(a['facts']['history']) == m.moves
    again = [torch.load(ranks/f'{m.name}_{r}_again.pt', weights_only=False) for r in (0, 1)]
    assert not (where := same(*again)), where
    assert again[0]['clock']['steps'] == 3*4


@pytest.mark.parametrize('m', METHODS.values(), ids=list(METHODS))
def test_file_of_rank_0_loads_without_ddp(m, ranks, tmp_path):
    a = torch.load(ranks/f'{m.name}_0.pt', weights_only=False)
    learn = build(tmp_path, [m.make(**dict(across_layers=False) if m.compressed else {}, period=2, stop_pct=1., init_mask='magnitude'), Probe(m)], seed=5)
    learn.load(ranks/'models'/f'{m.name}_ddp')
    assert not (where := same(snapshot(learn.model), a['model'])), where
    assert m.facts(learn)['clock'] == a['facts']['clock']
    learn.fit(1)
    net = small_net()
    net.load_state_dict(torch.load(a['plain'], weights_only=True), strict=True)
