"""Generations, schedules and losses of the original knowledge evolution, against what `learn.evolve` does in fastai's own loop."""
import json
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import AvgMetric, Callback, CrossEntropyLossFlat, Learner, accuracy
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn

import paramfx.evolution.generations
from contracts import quiet
from paramfx.evolution.masks import kels_masks
from paramfx.evolution.evolve import KE_PAPER
from paramfx.evolution.generations import CosineWarmup
from paramfx.evolution.policies import KELS
from paramfx.evolution.generations import EvolveLog, epoch_lr
from test_golden_channels import Chain


class Ends(Callback):
    "Weights when a generation starts and when it ends, its learning rates, and whether the optimizer knew nothing"
    order = 65  # after the schedule
    def __init__(self): self.__dict__.update(starts=[], ends=[], lrs=[], knew=[])
    def before_train(self):
        if not self.learn.epoch: self.starts.append(copied(self.learn.model)), self.knew.append(sum('grad_avg' in o for o in self.learn.opt.state.values()))
        self.lrs.append(self.learn.opt.hypers[-1]['lr'])
    def after_fit(self):
        if not self.learn.lock.locked(): self.ends.append(copied(self.learn.model))


class Shown(Callback):
    "The loss is trained in double precision; fastai's Recorder averages single precision only"
    def after_loss(self): self.learn.loss = self.loss.float()


class Logits:
    "A metric that writes down what it is given"
    __name__ = 'logits'
    def __init__(self): self.seen = []
    def __call__(self, pred, y):
        self.seen.append(pred.clone())
        return pred.sum()


def copied(model): return {k: v.clone() for k, v in model.state_dict().items() if 'num_batches' not in k}
def part(z, name): return {k.removeprefix(f'{name}/'): torch.from_numpy(z[k]) for k in z.files if k.startswith(f'{name}/')}


@pytest.fixture(scope='module')
def given(golden):
    d = golden/'knowledge_evolution'
    return json.loads((d/'trajectory_chain_50.json').read_text()), np.load(d/'trajectory_chain_50.npz')


def drawn(z):
    "Re-initialisation of the original run: what it had drawn for its next generation"
    calls = {}
    def values(name, w, generator):
        calls[name] = calls.get(name, 0)+1
        return torch.from_numpy(z[f'g{calls[name]}_start/{name}'])
    values.calls = calls
    return values


def paper_run(given, path):
    d, z = given
    x, y = torch.from_numpy(z['x']).double(), torch.from_numpy(z['y'])
    items = list(zip(x, y))
    net = Chain().double()
    net.load_state_dict(part(z, 'g0_start'), strict=False)
    ends, logits, values = Ends(), Logits(), drawn(z)
    dls = DataLoaders(DataLoader(items, bs=d['batch_size']), DataLoader(items, bs=len(x)))
    preset = {**KE_PAPER['learner'], 'loss_func': KE_PAPER['learner']['loss_func'].func}  # fastai's wrapper of it computes in single precision
    learn = quiet(Learner(dls, net, **preset, metrics=[accuracy, AvgMetric(logits)], path=path, cbs=[ends, Shown()]))
    settings = {**KE_PAPER['evolve'], **dict(generations=d['generations'], epochs=d['epochs'],
        policy=KELS(d['split_rate']), lr=d['lr'], fit_method=CosineWarmup(d['warmup_length']))}
    log = learn.evolve(**settings, reinit=values)
    return log, learn, ends, logits, values


def check(given, run):
    d, z = given
    log, learn, ends, logits, values = run
    n = d['epochs']
    assert len(log) == len(ends.ends) == d['generations'] and ends.knew == [0]*d['generations']
    assert len(logits.seen) == d['generations']*(n+1)  # each epoch, then the slim network
    for g, row in enumerate(d['rows']):
        for at, seen in (('start', ends.starts[g]), ('end', ends.ends[g])):
            want = part(z, f'g{g}_{at}')
            assert set(want) == set(seen)
            for k, v in want.items(): assert torch.allclose(seen[k], v, rtol=0, atol=1e-10), f'generation {g+1}, {at}: {k}'
        assert np.allclose(ends.lrs[g*n:g*n+n], row['lrs'], rtol=1e-12)
        dense, slim = logits.seen[(n+1)*g+n-1], logits.seen[(n+1)*g+n]
        for name, got in (('dense', dense), ('slim', slim)):
            assert np.allclose(got, z[f'g{g}_logits_{name}'], rtol=0, atol=1e-10), f'generation {g+1}: {name}'
        assert not torch.allclose(dense, slim, atol=1e-2)
    assert values.calls == {'conv1.weight': 2, 'conv2.weight': 2, 'fc.weight': 2}


def test_trajectory(given, tmp_path): check(given, paper_run(given, tmp_path))


def test_rows_of_the_trajectory(given, tmp_path):
    d, z = given
    log, y = paper_run(given, tmp_path)[0], torch.from_numpy(z['y'])
    masks = {n: m for n, m in kels_masks(Chain(), torch.zeros(1, 3, 8, 8), d['split_rate']).items()}
    kept = sum(int(m.sum()) for m in masks.values())
    for g, row in enumerate(log):
        for prefix, name in (('', 'dense'), ('slim_', 'slim')):
            out = torch.from_numpy(z[f'g{g}_logits_{name}'])
            assert row[f'{prefix}accuracy'] == pytest.approx(float((out.argmax(1) == y).double().mean()), abs=1e-6)
            loss = nn.functional.cross_entropy(out, y, label_smoothing=d['label_smoothing'])
            assert row[f'{prefix}valid_loss'] == pytest.approx(float(loss), abs=1e-5)  # the recorder's mean is of single precision
        end = part(z, f'g{g}_end')
        norms = [sum(float((end[n][m if keep else ~m]**2).sum()) for n, m in masks.items())**.5 for keep in (True, False)]
        assert row['reset_norm'] == pytest.approx(norms[1]/norms[0], rel=1e-9)
        assert (row['kept'], row['reset']) == ((kept, sum(m.numel() for m in masks.values())-kept) if g else (1217, 0))  # before the first reset all is kept


def test_reset_positions_of_the_original(given):
    "What changes between two of its generations is what our masks give up, and nothing else"
    d, z = given
    masks = kels_masks(Chain(), torch.zeros(1, 3, 8, 8), d['split_rate'])
    for g in range(d['generations']-1):
        end, start = part(z, f'g{g}_end'), part(z, f'g{g+1}_start')
        for k in end: assert torch.equal(end[k] == start[k], masks.get(k, torch.ones(end[k].shape, dtype=torch.bool))), k


STUBS = dict(keeps_the_optimizer=('Evolution.fresh_opt', lambda self: None), resets_nothing=('Evolution.forget_', lambda self, gen: None),
             other_schedule=('EpochLR.before_train', lambda self: None), dense_twice=('Evolution.slim', lambda self, *args, **kwargs: self.learn.model))

@pytest.mark.parametrize('stub', STUBS)
def test_the_trajectory_needs_each_part(given, tmp_path, monkeypatch, stub):
    "Without one of these the check above fails"
    (cls, name), f = STUBS[stub][0].split('.'), STUBS[stub][1]
    monkeypatch.setattr(getattr(paramfx.evolution.generations, cls), name, f)
    with pytest.raises(AssertionError): check(given, paper_run(given, tmp_path))


# schedules and losses ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def formulas(golden): return json.loads((golden/'knowledge_evolution'/'schedules_losses.json').read_text())


def test_schedules(formulas):
    assert {s['policy'] for s in formulas['schedules']} == {'cosine_lr', 'step_lr', 'constant_lr'}
    for s in formulas['schedules']:
        f = partial(epoch_lr, n_epoch=s['epochs'], lr=s['lr'], warmup=s['warmup_length'], policy=s['policy'].removesuffix('_lr'))
        for epoch, v in s['values']: assert f(epoch) == pytest.approx(v, rel=1e-12), (s['policy'], epoch)


def test_label_smoothing(formulas):
    f = formulas['losses']
    logits, y = torch.tensor(f['logits']), torch.tensor(f['target'])
    for eps, v in f['label_smoothing'].items():
        loss = CrossEntropyLossFlat(label_smoothing=float(eps))
        assert float(loss(logits, y)) == pytest.approx(v, abs=1e-6)
    assert float(KE_PAPER['learner']['loss_func'](logits, y)) == pytest.approx(f['label_smoothing']['0.1'], abs=1e-6)


def test_published_runs_are_logs(golden):
    "A published run is a log of ours: the same rows, the same picture"
    runs = json.loads((golden/'knowledge_evolution'/'published_runs.json').read_text())
    for run in (r for r in runs.values() if 'generation' in r['columns']):
        log = EvolveLog([dict(zip(run['columns'], r)) for r in run['rows']])
        assert [r['generation'] for r in log] == list(range(1, len(run['rows'])+1))
        slim = [v for k, v in log[0].items() if k.startswith('slim')]
        assert all(v < 6 for v in slim)  # after one generation the fit part knows nothing yet
