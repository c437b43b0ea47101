"A training loader without a batch is told before training, whatever is trained, and nothing has changed by then."
import pytest
import torch
from fastai.basics import DataLoaders, Datasets, L
from torch.utils.data import DataLoader, TensorDataset

from contracts import METHODS, build, digit, footprint, label, same, small_net, snapshot, tiny_dls, two_groups
import paramfx.all # gives the Learner its verbs  # noqa: F401

pytestmark = pytest.mark.filterwarnings('ignore')

def short_dls(): return tiny_dls(n=10, n_valid=16, bs=16, drop_last=(True, False))

FITS = {
    'fit': lambda l: l.fit(2), 'one cycle': lambda l: l.fit_one_cycle(1), 'fine_tune': lambda l: l.fine_tune(1),
    'flat cos': lambda l: l.fit_flat_cos(1), 'evolve': lambda l: l.evolve(2, 1),
}
VERBS = {
    'none': lambda l: l, 'sparsify': lambda l: l.sparsify(.5, method='static'), 'prune': lambda l: l.prune(.5), 'slice': lambda l: l.slice(rates=(1, .5)),
    'tie': lambda l: l.tie(.5),
}

def refused(learn, f):
    state, mods = snapshot(learn.model), footprint(learn.model)
    free, files = [p.requires_grad for p in learn.model.parameters()], sorted(learn.path.rglob('*'))
    with pytest.raises(ValueError, match=r'10 items.*batch size is 16.*drop_last = False.*of 10 or less'): f(learn)
    assert not same(snapshot(learn.model), state) and footprint(learn.model) == mods
    assert [p.requires_grad for p in learn.model.parameters()] == free and sorted(learn.path.rglob('*')) == files


@pytest.mark.parametrize('m', METHODS.values(), ids=list(METHODS))
def test_methods_say_that_there_is_no_batch(m, tmp_path):
    learn = build(tmp_path, model=m.net, dls=short_dls)
    refused(learn, lambda l: l.fit(1, cbs=m.make()))  # a callback that comes with the fit has changed nothing
    learn.add_cb(m.make())
    refused(learn, lambda l: l.fit(1))
    learn.dls.train.drop_last = False  # what the message says
    learn.fit(1)
    assert m.facts(learn)['clock']['steps'] == 1


@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('verb', VERBS)
def test_verbs_say_that_there_is_no_batch(verb, fit, tmp_path):
    learn = VERBS[verb](build(tmp_path, model=small_net, dls=short_dls, splitter=two_groups))
    refused(learn, FITS[fit])


def test_other_loaders(tmp_path):
    x, y = torch.stack([digit(i) for i in range(10)]), torch.stack([label(i) for i in range(10)])
    torchs = lambda n, **kw: DataLoaders(*[DataLoader(TensorDataset(x[:n], y[:n]), **kw), DataLoader(TensorDataset(x, y), batch_size=16)])
    with pytest.raises(ValueError, match=r'10 items.*batch size is 16.*train on them, make the loaders with a batch size of 10 or less'):
        build(tmp_path, dls=torchs(10, batch_size=16, drop_last=True)).fit(1)
    with pytest.raises(ValueError, match='holds no items'): build(tmp_path, dls=torchs(0, batch_size=16)).fit(1)
    learn = build(tmp_path, dls=Datasets(L(range(24)), [[digit], [label]], splits=[list(range(10)), list(range(10, 24))]).dataloaders(bs=16, num_workers=0))
    refused(learn, lambda l: l.fit(1))
    build(tmp_path, dls=torchs(10, batch_size=10, drop_last=True)).fit(1)


def test_fit_of_no_epoch_asks_for_no_batch(tmp_path):
    build(tmp_path, dls=short_dls).fit(0)
