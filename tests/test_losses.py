"""Learning from a teacher and from a partner of the same class: golden values, formulas by hand, and everything fastai does to a callback."""
import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from contracts import build, digit, label, same, small_net, snapshot, tiny_dls
from functools import partial
from fastai.basics import (CancelFitException, CancelTrainException, Callback, CrossEntropyLossFlat,
    DataLoader, Datasets, L, MSELossFlat, SGD, load_learner, nn)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
import fastai.callback.schedule # brings `fit_one_cycle` and `lr_find`  # noqa: F401
from fastai.callback.training import GradientAccumulation

from paramfx.losses import CSKD, Distill, PairedDL, bare_loss, class_labels, distill_each, distill_loss, same_class_partners
from paramfx.core.runs import RunState
from paramfx.slicing.callback import SliceTrain


@pytest.fixture
def mk(tmp_path):
    def f(cbs=None, **kwargs): return build(tmp_path, cbs, **kwargs)
    return f


def plain_net(): return small_net(norm=False)
def teacher(seed=9, **kwargs):
    torch.manual_seed(seed)
    return small_net(**kwargs)


class Seen(Callback):
    "What each batch was, and the gradient that it left"
    order, run_valid = 12, False
    def __init__(self): self.__dict__.update(rows=[])
    def before_backward(self):  # after everyone's `after_loss`
        self.rows.append(dict(x=self.x.clone(), y=self.y.clone(), pred=self.pred.detach().clone(),
            loss=self.learn.loss.item(), trained=self.loss_grad.item(), auto=torch.is_autocast_enabled('cpu')))


class Amp(MixedPrecision):
    "Mixed precision on the CPU"
    def before_fit(self):
        super().before_fit()
        self.autocast, self.learn.scaler = torch.autocast('cpu', dtype=torch.bfloat16), torch.amp.GradScaler('cpu', enabled=False)


# -- formulas

@pytest.fixture(scope='module')
def gold(golden): return json.loads((golden/'knowledge_evolution'/'schedules_losses.json').read_text())['losses']


def test_golden_distillation(gold):
    s, t = torch.tensor(gold['logits'], dtype=torch.float64), torch.tensor(gold['kd']['teacher_logits'], dtype=torch.float64)
    T = gold['kd']['temperature']
    assert distill_loss(s, t, T).item() == pytest.approx(gold['kd']['value'], rel=1e-9)
    assert (F.kl_div((s/T).log_softmax(1), (t/T).softmax(1), reduction='batchmean')*T*T).item() == pytest.approx(gold['kd']['value'], rel=1e-9)
    cb = CSKD()
    assert (cb.temperature, cb.weight) == (T, gold['kd']['weight_in_total_loss'])


@pytest.mark.parametrize('eps', ['0.0', '0.1', '0.2'])
def test_golden_label_smoothing_is_torchs(gold, eps):
    s, y = torch.tensor(gold['logits'], dtype=torch.float64), torch.tensor(gold['target'])
    assert nn.CrossEntropyLoss(label_smoothing=float(eps))(s, y).item() == pytest.approx(gold['label_smoothing'][eps], rel=1e-9)


def test_gradient_by_hand():
    "T*(p-q)/N, and nothing for the teacher"
    s, t, T = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64, requires_grad=True), 3.
    distill_loss(s, t, T).backward()
    assert torch.allclose(s.grad, T*((s/T).softmax(1)-(t/T).softmax(1))/5) and t.grad is None


def test_large_temperature_is_half_the_squared_distance():
    s, t = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    centred = lambda o: o-o.mean(1, keepdim=True)
    assert distill_loss(s, t, 1e4).item() == pytest.approx(((centred(s)-centred(t))**2).mean(1).mean().item()/2, rel=1e-3)


def test_positions_weights_and_types():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    flat = lambda o: o.permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.allclose(distill_loss(s, t, axis=1), distill_loss(flat(s), flat(t)))
    w = (torch.rand(2, 4, 5) > .5).float()
    assert torch.allclose(distill_loss(s, t, axis=1, weight=w), distill_each(flat(s), flat(t))[w.flatten() > 0].mean())
    with torch.autocast('cpu', dtype=torch.bfloat16): assert distill_loss(s, t, axis=1).dtype == torch.float32
    assert torch.equal(distill_loss(s.bfloat16(), t.bfloat16()), distill_loss(s.bfloat16().float(), t.bfloat16().float()))
    for bad in (t[:1], (t,)):
        with pytest.raises(ValueError, match='The student puts out .*same classes'): distill_loss(s, bad)
    with pytest.raises(ValueError, match='one class on axis -1'): distill_loss(s[..., :1], t[..., :1])


# -- a teacher

def test_what_is_trained_and_what_is_shown(mk):
    big, seen = teacher(), Seen()
    start = snapshot(big)
    big.train()
    learn = mk([Distill(big, weight=.7, temperature=2), seen])
    learn.fit(1)
    for o in seen.rows:
        with torch.no_grad(): kd = F.kl_div((o['pred']/2).log_softmax(1), (big(o['x'])/2).softmax(1), reduction='batchmean')*4
        ce = F.cross_entropy(o['pred'], o['y'])
        assert o['trained'] == pytest.approx((.3*ce+.7*kd).item(), rel=1e-5) and o['loss'] == pytest.approx(ce.item(), rel=1e-6)
    assert not big.training and not same(start, snapshot(big)) and all(p.grad is None for p in big.parameters())


@pytest.mark.parametrize('make', [lambda: Distill(teacher(), weight=0), lambda: CSKD(weight=0)], ids=['distill', 'cskd'])
def test_weight_0_is_the_plain_run(mk, make):
    runs = []
    for cb in (None, make()):
        runs.append(mk(cb, model=partial(small_net, dropout=.3)))
        runs[-1].fit_one_cycle(2)
    a, b = runs
    assert not same(snapshot(a.model), snapshot(b.model)) and a.recorder.losses == b.recorder.losses


def test_weight_1_knows_no_labels(mk):
    res = []
    for labels in (True, False):
        dls = tiny_dls()
        if not labels: dls.train_ds.y = torch.full_like(dls.train_ds.y, 3)
        learn = mk(Distill(teacher(), weight=1), dls=lambda: dls)
        dls.train.rng.seed(0)
        learn.fit(1)
        res.append(snapshot(learn.model))
    assert not same(*res)


def test_accumulated_batches_are_one_large_batch(mk):
    res = []
    for bs, cbs in ((64, []), (16, [GradientAccumulation(64)])):
        dls = tiny_dls(bs=bs, shuffle=False)
        learn = mk([Distill(teacher()), *cbs], dls=lambda: dls, model=plain_net, opt_func=SGD)
        learn.fit(1)
        res.append(snapshot(learn.model))
    assert all(torch.allclose(res[0][k], res[1][k], atol=1e-6) for k in res[0])


@pytest.mark.parametrize('make', [lambda: Distill(teacher()), CSKD], ids=['distill', 'cskd'])
def test_mixed_precision(mk, make):
    "The networks run in half precision, the term is computed in single, and no error leaves autocast on"
    kinds, seen = [], Seen()
    cb = make()
    net = cb.teacher if isinstance(cb, Distill) else None
    learn = mk([cb, Amp(), seen], loss_func=CrossEntropyLossFlat())
    (net or learn.model).register_forward_hook(lambda m, i, o: kinds.append((o.dtype, torch.is_grad_enabled())))
    learn.fit(1)
    assert (torch.bfloat16, False) in kinds and len(seen.rows) == 8 and not any(o['auto'] for o in seen.rows)
    assert all(o['trained'] != o['loss'] for o in seen.rows)


def test_an_error_leaves_autocast_and_weights_alone(mk):
    for wrong, msg in ((nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), r'\[32, 10\], the teacher \[32, 3\].*same classes'), (nn.Linear(5, 10), 'Distill')):
        learn = mk([Amp()])
        start = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
        with pytest.raises((ValueError, RuntimeError), match=msg): learn.fit(1, cbs=Distill(wrong))
        assert not torch.is_autocast_enabled('cpu') and not hasattr(learn, 'distill')
        assert all(torch.equal(p, start[n]) for n, p in learn.model.named_parameters())
        learn.fit(1, cbs=Distill(teacher()))


@pytest.mark.parametrize('make', [lambda: Distill(teacher(), weight=.5), CSKD], ids=['distill', 'cskd'])
def test_only_training_is_changed(mk, make):
    cb = make()
    learn = mk(cb)
    list(learn.dls.train)
    loader, opts = learn.dls.train, dict(vars(learn.dls.train))
    learn.fit(1)
    calls = []
    type(cb).term, term = lambda self: calls.append(1) or term(self), type(cb).term
    try:
        a = learn.validate(), learn.get_preds(with_loss=True)[2].mean().item()
        start = snapshot(learn.model)
        assert not calls
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=10, show_plot=False)
        assert calls and not same(start, snapshot(learn.model))
        learn.remove_cb(cb)
        assert list(learn.validate()) == list(a[0]) and a[0][0] == pytest.approx(a[1], rel=1e-5)
    finally: type(cb).term = term
    assert learn.dls.train is loader and vars(loader).keys() == opts.keys()
    assert all(vars(loader)[k] is opts[k] for k in ('bs', 'n', 'dataset', 'fake_l'))


def test_the_teacher_stays_behind(mk, tmp_path):
    big = mk(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3000), nn.ReLU(), nn.Linear(3000, 10)))
    learn = mk(Distill(big))
    learn.fit(1)
    learn.export('student.pkl')
    assert (tmp_path/'student.pkl').stat().st_size < 150_000
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        back = load_learner(tmp_path/'student.pkl')
    x = learn.dls.valid_ds.x[:4]
    assert torch.equal(back.model.eval()(x), learn.model.eval()(x))
    twin = deepcopy(learn)
    with pytest.raises(ValueError, match=r'teacher has not been saved.*remove_cb\(Distill\)'): twin.fit(1)
    twin.remove_cb(Distill)
    twin.fit(1)
    learn.fit(1)


@pytest.mark.parametrize('kwargs,msg', [(dict(weight=-.1), 'weight=-0.1'), (dict(weight=1.1), 'from 0 to 1'),
    (dict(weight=float('nan')), 'weight=nan'), (dict(weight='a'), "weight='a'"),
                                        (dict(temperature=0), 'temperature=0'), (dict(temperature=-1), 'above 0'), (dict(match=3), 'match=3')])
def test_bad_settings(kwargs, msg):
    with pytest.raises(ValueError, match=msg): Distill(teacher(), **kwargs)
    if 'match' in kwargs or kwargs.get('weight') == 1.1: return
    with pytest.raises(ValueError, match=msg.replace('from 0 to 1', 'from 0 on')): CSKD(**kwargs)


def test_refused_before_training(mk):
    learn = mk()
    start = snapshot(learn.model)
    with pytest.raises(ValueError, match='no network'): Distill(3)
    for t in (learn, learn.model, learn.model[0], nn.Sequential(nn.Identity(), learn.model)):
        with pytest.raises(ValueError, match='its own teacher'): learn.fit(1, cbs=Distill(t))
    learn.loss_func = nn.BCEWithLogitsLoss()
    with pytest.raises(ValueError, match='BCEWithLogitsLoss.*match=f'): learn.fit(1, cbs=Distill(teacher()))
    assert not same(start, snapshot(learn.model))


def test_other_outputs(mk):
    "Regression by `match`; several outputs, of which a callback takes one; classes on another axis"
    dls = tiny_dls()
    for ds in (dls.train_ds, dls.valid_ds): ds.y, ds.vocab = ds.y[:, None].float(), None
    head = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    mk(Distill(head(), match=F.mse_loss), dls=lambda: dls, model=head, loss_func=MSELossFlat(), metrics=None).fit(1)

    class Two(nn.Module):
        def __init__(self): super().__init__(); self.net = small_net()
        def forward(self, x): return x, self.net(x)
    class Pick(Callback):
        order = 0
        def after_pred(self): self.learn.pred = self.pred[1]
    big, seen = Two(), Seen()
    mk([Pick(), Distill(big, weight=1.), seen], model=Two).fit(1)
    o = seen.rows[-1]
    assert o['trained'] == pytest.approx(distill_loss(o['pred'], big(o['x'])[1]).item(), rel=1e-5)

    dense = lambda: nn.Conv2d(1, 3, 1)
    ce = lambda p, y: F.cross_entropy(p, (y % 3)[:, None, None].expand(-1, 8, 8))
    with pytest.raises(ValueError, match='on which axis.*Give axis='): mk(Distill(dense()), model=dense, loss_func=ce, metrics=None).fit(1)
    big, seen = dense(), Seen()
    mk([Distill(big, weight=1., axis=1), seen], model=dense, loss_func=ce, metrics=None).fit(1)
    o = seen.rows[-1]
    assert o['trained'] == pytest.approx(distill_loss(o['pred'].movedim(1, -1), big(o['x']).movedim(1, -1)).item(), rel=1e-5)
    assert bare_loss(CrossEntropyLossFlat(axis=1))[1] == 1


# -- partners

@pytest.mark.parametrize('seed', range(5))
def test_partners_have_the_class(seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(-3, 12, (int(torch.randint(1, 300, (1,), generator=g)),), generator=g)*7
    p = same_class_partners(y, seed)
    me, alone = torch.arange(len(y)), (y[:, None] == y).sum(1) == 1
    assert torch.equal(y[p], y) and torch.equal(p == me, alone)
    assert torch.equal(p, same_class_partners(y.tolist(), seed))


def test_each_partner_is_as_likely():
    y = torch.tensor([0, 1, 0, 0, 1, 0])
    n = torch.zeros(6, 6)
    for epoch in range(3000): n[torch.arange(6), same_class_partners(y, epoch=epoch)] += 1
    allowed = (y[:, None] == y) & ~torch.eye(6, dtype=bool)
    assert not n[~allowed].any() and ((n/3000-allowed/allowed.sum(1, keepdim=True)).abs() < .04).all()
    assert not torch.equal(same_class_partners(torch.zeros(99), 0, 1), same_class_partners(torch.zeros(99), 1, 0))


def two_parts(**kwargs):
    "The digits as fastai `Datasets`, which make items one by one"
    return Datasets(L(range(70)), [[digit], [label]], splits=[list(range(50)), list(range(50, 70))]).dataloaders(bs=16, **kwargs)


@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('make', [partial(tiny_dls, n=50, n_valid=20, bs=16), two_parts], ids=['memory', 'datasets'])
def test_batches_are_those_of_the_loader(make, workers, drop_last):
    "To the bit and in the order; partners beside them, from any number of workers"
    dls = make(num_workers=workers, drop_last=(drop_last, False) if make is not two_parts else drop_last)
    dl = dls.train
    y = class_labels(dl)
    p = same_class_partners(y)
    xs = torch.stack([dl.dataset[i][0] for i in range(len(y))])
    dl.rng.seed(1); plain = list(dl)
    dl.rng.seed(1); rows = []
    paired = PairedDL(dl, p)
    for b in paired: rows.append((b, paired.others))
    assert len(paired) == len(dl) == len(rows) == len(plain) == 4-drop_last
    for (x, t), (b, (ox, ot)) in zip(plain, rows):
        assert torch.equal(b[0], x) and torch.equal(b[1], t) and torch.equal(ot, t) and len(ox) == len(x)
        who = [(xs == o).flatten(1).all(1).nonzero()[0].item() for o in x]
        assert torch.equal(ox.cpu(), xs[p[who]])


def test_tables_have_partners_too():
    import pandas as pd
    from fastai.tabular.core import Categorify, CategoryBlock, TabularPandas
    df = pd.DataFrame(dict(a=range(40), c=list('xy')*20, t=list('pqqp')*10)).astype({'a': float})
    dls = TabularPandas(df, [Categorify], 'c', 'a', 't', y_block=CategoryBlock(), splits=[list(range(30)), list(range(30, 40))]).dataloaders(bs=8)
    paired = PairedDL(dls.train, same_class_partners(class_labels(dls.train)))
    n = 0
    for cat, cont, t in paired:
        assert torch.equal(t, paired.others[2]) and not torch.equal(cont, paired.others[1])
        n += len(t)
    assert n == 24  # the last part is dropped


def test_pieces_of_a_distributed_run(monkeypatch):
    pytest.importorskip('accelerate')
    from fastai.distributed import DistributedDL
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self, t, rank: list(t))
    dl, seen = tiny_dls(n=64, bs=8).train, []
    for rank in (0, 1):
        dl.rng.seed(0)
        paired = PairedDL(dl, same_class_partners(class_labels(dl)))
        for x, y in DistributedDL(paired, rank=rank, world_size=2):
            assert torch.equal(paired.others[1], y) and len(y) == len(x)
            seen += y.tolist()
    assert sorted(seen) == sorted(dl.dataset.y.tolist())


def test_labels_that_are_none():
    dl = tiny_dls(n=50).train
    for bad, msg in ((torch.rand(50), 'one class per item'), (torch.ones(50, 2).long(), 'one class per item'),
        ([[1, 2]]*50, 'one class per item'), ([0]*49, '49 labels for 50')):
        with pytest.raises(ValueError, match=msg): class_labels(dl, bad)
    class Blind:
        def __len__(self): return 50
        def __getitem__(self, i): return digit(i), label(i)
    with pytest.raises(ValueError, match='Blind.*labels='): class_labels(DataLoader(Blind(), bs=8))
    assert class_labels(DataLoader(Blind(), bs=8), list('ab')*25).tolist() == [0, 1]*25
    for odd in (DataLoader(iter(range(9)), bs=2), DataLoader([1, 2]), torch.utils.data.DataLoader([1, 2])):
        with pytest.raises(ValueError, match='fastai DataLoader'): PairedDL(odd, None)


# -- CS-KD

def test_the_term_by_hand(mk):
    seen, cb = Seen(), CSKD(weight=2., temperature=3., seed=4)
    learn = mk([cb, seen], opt_func=SGD, lr=0.)
    net, ps = deepcopy(learn.model).train(), [same_class_partners(learn.dls.train_ds.y, 4, epoch) for epoch in range(2)]
    learn.fit(2)
    xs = learn.dls.train_ds.x
    for i, o in enumerate(seen.rows):
        p = ps[i//8]
        who = [(xs == x).flatten(1).all(1).nonzero()[0].item() for x in o['x']]
        assert torch.equal(learn.dls.train_ds.y[who], o['y'])
        with torch.no_grad(): pred, other = net(o['x']), net(xs[p[who]])
        ce, kd = F.cross_entropy(pred, o['y']), F.kl_div((pred/3).log_softmax(1), (other/3).softmax(1), reduction='batchmean')*9
        assert torch.allclose(pred, o['pred'], atol=1e-5) and o['trained'] == pytest.approx(
            (ce+2*kd).item(), rel=1e-4) and o['loss'] == pytest.approx(ce.item(), rel=1e-5)


@pytest.mark.parametrize('update', [False, True])
def test_partners_leave_statistics_alone(mk, update):
    "A weight of almost nothing is the plain run to the bit, though partners are loaded and run"
    a, b = mk(opt_func=SGD), mk(CSKD(weight=1e-30, update_stats=update), opt_func=SGD)
    for learn in (a, b): learn.fit(2)
    where = same(snapshot(a.model), snapshot(b.model))
    assert ('running' in where) == update and (update or not where)
    assert update or a.recorder.losses == b.recorder.losses
    if not update: assert not same(*[learn.dls.train.rng.getstate()[1] for learn in (a, b)])


class Boom(Callback):
    order, run_valid = 20, False
    def __init__(self, ex): self.__dict__.update(ex=ex)
    def after_step(self): raise self.ex


@pytest.mark.parametrize('ex', [ValueError('boom'), CancelFitException(), CancelTrainException(), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_loaders_are_untouched_however_a_fit_ends(mk, ex):
    learn = mk(CSKD())
    loader, bs, n = learn.dls.train, learn.dls.train.bs, learn.dls.train.n
    try: learn.fit(1, cbs=Boom(ex))
    except (ValueError, KeyboardInterrupt): pass
    assert learn.dls.train is loader and (loader.bs, loader.n) == (bs, n) and 'get_idxs' not in vars(loader)
    assert next(iter(learn.dls.train))[0].shape[0] == bs
    learn.remove_cb(CSKD)
    learn.fit(1)


def test_resumed_is_uninterrupted(mk):
    whole = mk()
    whole.fit_one_cycle(3, cbs=[CSKD(), RunState('a')])
    cut = mk()
    class Crash(Callback):
        order = 69
        def after_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): cut.fit_one_cycle(3, cbs=[CSKD(), RunState('b'), Crash()])
    rest = mk(seed=7)
    rest.resume('b')
    rest.fit_one_cycle(3, cbs=[CSKD(), RunState('b')])
    assert not (where := same(snapshot(whole.model), snapshot(rest.model))), where


def test_cskd_refuses(mk):
    with pytest.raises(ValueError, match='MixUp.*one of the two'): mk().fit(1, cbs=[MixUp(), CSKD()])
    with pytest.raises(ValueError, match='alone in its class'): mk().fit(1, cbs=CSKD(labels=range(256)))
    wrong = torch.arange(256) % 10
    with pytest.raises(ValueError, match='not of its item'): mk().fit(1, cbs=CSKD(labels=wrong))
    dls = tiny_dls()
    for ds in (dls.train_ds, dls.valid_ds): ds.y, ds.vocab = ds.y[:, None].float(), None
    with pytest.raises(ValueError, match='one class per item'): mk(dls=lambda: dls, loss_func=MSELossFlat(), metrics=None).fit(1, cbs=CSKD())


def test_cskd_travels_light_and_goes_with_others(mk, tmp_path):
    "Export holds no data; a teacher, partners, accumulation and slices in one run"
    learn = mk([CSKD(), Distill(teacher()), GradientAccumulation(64)])
    learn.fit(1)
    learn.export('both.pkl')
    assert (tmp_path/'both.pkl').stat().st_size < 150_000
    learn = mk([SliceTrain((1, .5), 'static'), CSKD(), Distill(teacher())])
    start = snapshot(learn.model)
    learn.fit(1)
    assert same(start, snapshot(learn.model)) and all(p.isfinite().all() for p in learn.model.parameters())
    learn.fit(1, start_epoch=0)
