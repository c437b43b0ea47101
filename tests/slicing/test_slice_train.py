"""`SliceTrain` against what it should be: gradients pass by pass, rates that are put back, columns by another route, files, two processes."""
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Adam, Callback, CancelBatchException, CrossEntropyLossFlat, MSELossFlat, OptimWrapper, SGD, accuracy, error_rate
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from torch import nn

import fastai.callback.schedule # gives Learner fit_one_cycle  # noqa: F401
import paramfx.report.plan # gives Learner plan  # noqa: F401
from contracts import build, quiet, same, seed_all, small_net, snapshot, tiny_dls
from fresh import run_ranks
from paramfx.core.samples import rng_state, sample_batch
from paramfx.core.runs import RunState
from paramfx.export.materialize import load_recipe, materialize, save_recipe
from paramfx.slicing.passes import measure_norms
from paramfx.slicing.plan import slice_plan
from paramfx.slicing.callback import SliceTrain
from paramfx.slicing.layers import Sliced
from paramfx.slicing.rates import RateDraw
from paramfx.slicing.slice import Slicing, at_rate, set_rate, slice_model
from settings import slice_settings
from test_contracts import CPUPrecision

HERE = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning')
RATES = (1, .5, .25)


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path)


class Grads(Callback):
    "Gradients as the optimizer sees them at its first step, and the batches they are of"
    order, run_valid = 11.5, False
    def __init__(self): self.__dict__.update(seen=None, batches=[], start=None)
    def before_batch(self):
        if self.start is None: self.__dict__['start'] = deepcopy(self.learn.model)
    def after_pred(self):
        if self.seen is None: self.batches.append((self.x.clone(), self.y.clone()))
    def before_step(self):
        if self.seen is None: self.__dict__['seen'] = {n: None if p.grad is None else p.grad.clone() for n, p in self.learn.model.named_parameters()}


def by_hand(g, rates, distill=True, mean=False):
    "Sum of the gradients of single passes of copies that are set to one rate each"
    total = {}
    for r in rates:
        net = set_rate(deepcopy(g.start), r).train()
        for x, y in g.batches:
            pred = net(x)
            if r == rates[0] or not distill: loss = F.cross_entropy(pred, y)
            else:
                with torch.no_grad(): q = set_rate(deepcopy(g.start), rates[0]).train()(x).softmax(-1)
                loss = -(q*pred.log_softmax(-1)).sum(-1).mean()
            (loss/len(g.batches)/(len(rates) if mean else 1)).backward()
        for n, p in net.named_parameters():
            if p.grad is not None: total[n] = total.get(n, 0)+p.grad
    return total


def assert_close(a, b, tol=1e-5):
    assert {n for n, t in a.items() if t is not None} == set(b)
    for n in b: assert (a[n]-b[n]).abs().max() <= tol*max(1, b[n].abs().max()), n


@pytest.mark.parametrize('norm', ['switch', 'switch_affine', 'gn', 'recal'])
@pytest.mark.parametrize('distill', [True, False])
@pytest.mark.parametrize('reduce', ['sum', 'mean'])
def test_gradient_is_that_of_single_passes(mk, norm, distill, reduce):
    g = Grads()
    mk([SliceTrain(RATES, 'static', distill=distill, reduce=reduce, slicing=Slicing(groups=4 if norm == 'gn' else None, norm=norm)), g]).fit(1)
    assert_close(g.seen, by_hand(g, RATES, distill, reduce == 'mean'))


@pytest.mark.parametrize('schedule,rates', [('fixed', [.25]), ('random', None), ('cycle', [1.])])
def test_a_step_of_one_pass(mk, schedule, rates):
    g = Grads()
    learn = mk([SliceTrain(RATES, RateDraw(schedule, seed=4)), g])
    rates = rates or learn.slice_train.now
    learn.fit(1)
    assert_close(g.seen, by_hand(g, rates))


def test_without_the_full_width_narrow_passes_learn_labels(mk):
    g = Grads()
    learn = mk([SliceTrain((.75, .5, .25), 'static'), g])
    learn.fit(1)
    assert_close(g.seen, by_hand(g, [.75, .5, .25], distill=False))


@pytest.mark.parametrize('norm', ['switch', 'gn'])
def test_accumulation_and_clipping_keep_the_sum(mk, norm):
    g = Grads()
    slicing = Slicing(groups=4 if norm == 'gn' else None, norm=norm)
    mk([SliceTrain(RATES, 'static', slicing=slicing), g], dls=tiny_dls(bs=8)).fit(1, cbs=GradientAccumulation(32))
    assert len(g.batches) == 4
    if norm == 'gn': assert_close(g.seen, by_hand(g, RATES))
    clip = Grads()
    learn = mk([SliceTrain(RATES, 'static', slicing=Slicing(groups=4 if norm == 'gn' else None, norm=norm)), clip])
    learn.fit(1, cbs=GradientClip(.1))
    want = by_hand(clip, RATES)
    norm = torch.stack([t.norm() for t in want.values()]).norm()
    assert norm > .1
    assert_close(clip.seen, {n: t*(.1/(norm+1e-6)) for n, t in want.items()})


@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_mixed_precision(mk, mode):
    "All passes under autocast, all scaled; the gradient is the unscaled sum"
    seen, g = [], Grads()
    learn = mk([SliceTrain(RATES, 'static'), g])
    learn.model[1][2].register_forward_hook(lambda m, x, out: seen.append((m.training, out.dtype)))
    learn.fit(1, cbs=CPUPrecision(mode))
    half = dict(fp16=torch.float16, bf16=torch.bfloat16)[mode]
    assert {d for _, d in seen} == {half} and sum(t for t, _ in seen) == 3*8 and not torch.is_autocast_enabled('cpu')
    want = by_hand(g, RATES)
    for n in want:  # biases before a norm have no gradient but rounding
        if want[n].norm() > 1e-3: assert (g.seen[n]-want[n]).norm() < (.02 if mode == 'fp16' else .15)*want[n].norm(), n
    assert all(v[2] > 0 for v in learn.recorder.values)


def test_mixup_shares_the_batch(mk):
    inputs = []
    learn = mk(SliceTrain(RATES, 'static'))
    learn.model[0].register_forward_pre_hook(lambda m, x: inputs.append(x[0]) if m.training else None)
    learn.fit(1, cbs=MixUp(.4))
    assert len(inputs) == 3*8
    for i in range(0, 24, 3): assert inputs[i] is inputs[i+1] is inputs[i+2]
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)


@pytest.mark.parametrize('opt',
    [partial(SGD, mom=.9), Adam, partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9)), partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_affine_parameters_of_idle_slices_stay(mk, opt):
    learn = mk(SliceTrain(RATES, 'cycle', slicing=Slicing(norm='switch_affine')), opt_func=opt, wd=.1, wd_bn_bias=True)
    steps = []
    class Watch(Callback):
        order, run_valid = 12, False
        def before_batch(self): self.__dict__.update(was=snapshot(self.learn.model), rate=self.learn.slice_train.now[0])
        def after_step(self):
            moved = {n for n, p in self.learn.model.named_parameters() if n.startswith('0.1.') and not torch.equal(p, self.was[n])}
            steps.append((self.rate, moved))
    learn.fit(2, cbs=Watch())
    own = {1.: '', .5: '_1', .25: '_2'}
    assert len(steps) == 16
    for r, moved in steps: assert moved == {f'0.1.weight{own[r]}', f'0.1.bias{own[r]}'}, (r, moved)


# -- the rate in force

def key(learn):
    p = slice_plan(learn.model)
    assert p.key == p.current
    return p.current


@pytest.mark.parametrize('user', [1., .5])
@pytest.mark.parametrize('where', ['narrow', 'wide', 'loss', 'batch', 'valid', 'step'])
def test_the_rate_is_put_back(mk, user, where):
    learn = mk(SliceTrain(RATES, 'static'))
    set_rate(learn.model, user)
    class Break(Callback):
        order, run_valid = 20, True
        def before_batch(self):
            if where == 'batch' and self.training and self.iter == 2: raise CancelBatchException
        def after_batch(self): assert key(self.learn) == user
        def after_step(self):
            if where == 'step' and self.iter == 2: raise KeyboardInterrupt
        def before_validate(self): assert key(self.learn) == user
        def after_validate(self): assert key(self.learn) == user
    calls = [0]
    def fail(m, x, out):
        calls[0] += m.training or where == 'valid'
        if (where, calls[0]) in (('narrow', 5), ('wide', 4), ('valid', 28)): raise KeyboardInterrupt
    learn.model[0].register_forward_hook(fail)
    if where == 'loss':
        learn.slice_train.__dict__['distill'] = lambda p, q, y: 1/0
    stops = {'narrow': KeyboardInterrupt, 'wide': KeyboardInterrupt, 'valid': KeyboardInterrupt, 'step': KeyboardInterrupt, 'loss': ZeroDivisionError}
    if where in stops:
        with pytest.raises(stops[where]): learn.fit(1, cbs=Break())
    else: learn.fit(1, cbs=Break())
    assert key(learn) == user
    assert len(learn.metrics) == 1 and not {'_stack', '_hook', '_rates', '_memory'} & set(vars(learn.slice_train))
    where = ''
    learn.slice_train.__dict__['distill'] = True
    learn.fit(1)
    assert key(learn) == user


def test_an_outer_rate_does_not_reach_the_passes(mk):
    g = Grads()
    learn = mk([SliceTrain(RATES, 'static'), g])
    with at_rate(learn.model, .25): learn.fit(1)
    assert_close(g.seen, by_hand(g, RATES))


# -- columns

def test_columns_are_what_validation_at_the_rate_says(mk):
    learn = mk(SliceTrain(RATES), metrics=[accuracy, error_rate])
    calls = []
    learn.model[0].register_forward_hook(lambda m, x, out: calls.append(1) if not m.training else None)
    learn.fit(1)
    assert len(calls) == 3*len(learn.dls.valid)  # one pass a rate
    got = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert [n for n in got if '@' in n] == [f'{n}@{r}' for r in ('0.5', '0.25') for n in ('valid_loss', 'accuracy', 'error_rate')]
    for r in (1, .5, .25):
        set_rate(learn.model, r)
        loss, acc, err = learn.validate()
        at = '' if r == 1 else f'@{r}'
        assert np.allclose([got[f'valid_loss{at}'], got[f'accuracy{at}'], got[f'error_rate{at}']], [loss, acc, err], atol=1e-6)
    assert len(learn.metrics) == 2


def test_columns_as_monitors(mk):
    learn = mk(SliceTrain(RATES))
    save, stop = SaveModelCallback(monitor='accuracy@0.25', fname='best'), EarlyStoppingCallback(monitor='valid_loss@0.25', patience=1, min_delta=10.)
    learn.fit(6, cbs=[save, stop])
    col = learn.recorder.metric_names.index('accuracy@0.25')-1
    assert len(learn.recorder.values) == 2  # no epoch is better by 10
    best = max(v[col] for v in learn.recorder.values)
    set_rate(learn.model, .25)
    assert abs(learn.validate()[1]-best) < 1e-6


# -- statistics that are measured

def test_recal_measures_before_validation(mk):
    learn = mk([SliceTrain(RATES, slicing=Slicing(norm='recal')), RunState()])
    state = []
    class Look(Callback):
        order, run_valid = 10.4, False
        def after_train(self): state.append(rng_state(self.learn.dls))
        def before_validate(self): state.append(rng_state(self.learn.dls))
    learn.fit(2, cbs=Look())
    assert not same(state[0], state[1]) and not same(state[2], state[3])
    assert slice_plan(learn.model).ready == {1., .5, .25} and all(v[-1] > .2 for v in learn.recorder.values)
    assert int(learn.model[0][1].num_batches_tracked_2) == 8 and learn.model[0][1].momentum == .1
    learn.save('measured')
    other = mk(SliceTrain(RATES, slicing=Slicing(norm='recal')), seed=4)
    set_rate(other.model, .25)
    with pytest.raises(ValueError, match='recalibrate'): other.validate()
    other.load('measured')
    set_rate(learn.model, .25)
    assert list(other.validate()) == list(learn.validate())
    plain = mk(seed=5)
    plain.save('plain')
    other.load('plain')
    with pytest.raises(ValueError, match='recalibrate'): other.validate()


def test_an_error_while_measuring_leaves_all_as_it_was():
    net = small_net()
    slice_model(net, torch.zeros(1, 1, 8, 8), RATES, norm='recal')
    measure_norms(net, .5, [(torch.randn(8, 1, 8, 8),)])
    state, modes = snapshot(net), [m.training for m in net.modules()]
    with pytest.raises(RuntimeError): measure_norms(net, .5, [(torch.randn(8, 1, 8, 8),), (torch.randn(8, 3, 8, 8),)])
    assert not same(snapshot(net), state) and modes == [m.training for m in net.modules()] and not slice_plan(net).measuring


# -- losses

class Odd(nn.Module):
    def forward(self, p, y): return F.cross_entropy(p, y)


def test_an_unknown_loss_is_refused_before_anything_changes(mk):
    with pytest.raises(ValueError, match=r'Odd.*distill=f\(pred, full_pred, \*yb\), or distill=False'): mk(SliceTrain(), loss_func=Odd())
    learn = mk(SliceTrain(RATES))
    learn.loss_func, state = Odd(), snapshot(learn.model)
    with pytest.raises(ValueError, match='distill=False'): learn.fit(1)
    assert not same(snapshot(learn.model), state)
    seen = []
    def teach(p, q, y):
        seen.append((p.requires_grad, q.requires_grad, y.dtype))
        return (p-q).pow(2).mean()
    learn = mk(SliceTrain(RATES, 'static', distill=teach), loss_func=Odd())
    learn.fit(1)
    assert seen == [(True, False, torch.int64)]*16
    mk(SliceTrain(RATES, distill=False), loss_func=Odd()).fit(1)


@pytest.mark.parametrize('loss', [MSELossFlat(), nn.L1Loss(), nn.BCEWithLogitsLoss()])
def test_regression_and_several_labels(mk, loss):
    "A narrow pass that says what the full one says has no gradient"
    dls = tiny_dls()
    y = lambda d: F.one_hot(d.y, 10).float()
    from paramfx.data.memory import tensor_dls
    dls = tensor_dls(dls.train_ds.x, y(dls.train_ds), dls.valid_ds.x, y(dls.valid_ds), bs=32, normalize=False)
    learn = mk(SliceTrain(RATES), dls=dls, loss_func=loss, metrics=[])
    learn.fit(4)
    first, last = learn.recorder.values[0], learn.recorder.values[3]
    assert last[0] < first[0] and all(b < 1 for b in last)
    assert learn.recorder.metric_names[3] == 'valid_loss@0.5'


# -- models that are sliced already, and settings

def test_a_sliced_model_keeps_its_plan(mk):
    learn = mk()
    learn.slice(rates=(1, .5))
    plan, state = slice_plan(learn.model), snapshot(learn.model)
    for cb, text in ((SliceTrain((1, .25)), 'sliced at 1, 0.5'), (SliceTrain(slicing=Slicing(norm='gn')), "with 'switch'"),
        (SliceTrain(slicing=Slicing(only='0.0')), 'Leave only out'), (SliceTrain(slicing=Slicing(groups=4)), 'with None')):
        with pytest.raises(ValueError, match=text): learn.add_cb(cb)
        with pytest.raises(ValueError, match=text): learn.plan(cb)
    assert not same(snapshot(learn.model), state) and not [c for c in learn.cbs if isinstance(c, SliceTrain)]
    learn.add_cb(SliceTrain())
    assert slice_plan(learn.model) is plan and learn.slice_train.now == [1, .5]
    learn.fit(1)
    learn.release()
    assert slice_plan(learn.model) is plan
    set_rate(learn.model, .5)
    assert learn.validate()[1] > .2
    learn.fit(1, cbs=SliceTrain((.5, 1)))


@pytest.mark.parametrize('kw,text', [(dict(schedule='often'), 'random_min_max'),
    (dict(norm='bn'), 'norm=.*switch_affine'), (dict(sort='l2'), 'sort='), (dict(groups=0), 'groups=0'), (dict(rescale=1), 'rescale=1'),
    (dict(rates=()), 'at least one'), (dict(rates=(1, 2)), r'\(0, 1\]'), (dict(rates=(1, .5), probs=(1, 2, 3)), 'each of the rates'),
                                     (dict(reduce='max'), "'sum' or 'mean'"),
                                     (dict(distill='yes'), 'True, False'),
                                     (dict(rates=(1, .5, .25), n_random=2), 'draws from 1 rates'),
                                     (dict(rates=(1, .5), schedule='static', probs=(1, 1)), 'draws no rates')])
def test_bad_settings_are_refused_at_once(kw, text):
    with pytest.raises(ValueError, match=text): SliceTrain(**slice_settings(**kw))


def test_what_cannot_be_sliced_is_refused_and_left_alone(mk):
    learn = mk()
    state = snapshot(learn.model)
    for cb in (SliceTrain(slicing=Slicing(norm='gn', groups=5)), SliceTrain(schedule=RateDraw(n_random=3)),
        SliceTrain(schedule=RateDraw(probs=(1, 2, 3))), SliceTrain(slicing=Slicing(only='nowhere'))):
        with pytest.raises(ValueError): learn.add_cb(cb)
        with pytest.raises(ValueError): learn.fit(1, cbs=cb)
    assert not same(snapshot(learn.model), state) and not any(isinstance(m, Sliced) for m in learn.model.modules())
    with pytest.raises(ValueError, match='slice_model'): SliceTrain().plan(small_net())


# -- ways out

def test_each_width_leaves_as_an_ordinary_network(mk, tmp_path):
    learn = mk(SliceTrain(RATES))
    learn.fit(1)
    x = sample_batch(learn.dls, 8)[0]
    for r in RATES:
        with at_rate(learn.model.eval(), r): out = learn.model(x)
        assert torch.equal(materialize(learn.model, x, rate=r).eval()(x), out)
    f = save_recipe(learn.model, tmp_path/'it.pt')
    new = load_recipe(f, small_net())
    with at_rate(new.eval(), .25): assert torch.equal(new(x), out)
    assert not same(snapshot(new), snapshot(learn.model))
    quiet(learn).materialize(rate=.25)
    assert torch.equal(learn.model.eval()(x), out)
    learn.fit(1)


def test_files_of_the_whole_network_and_of_other_rates(mk):
    a = mk(SliceTrain(RATES, slicing=Slicing(norm='switch_affine')))
    plain = mk(seed=3)
    plain.fit(1)
    plain.save('whole')
    a.load('whole')
    with torch.no_grad(): assert torch.equal(a.model.eval()(sample_batch(a.dls, 4)[0]), plain.model.eval()(sample_batch(a.dls, 4)[0]))
    assert torch.equal(a.model[0][1]._parameters['weight_1'], plain.model[0][1].weight[:4])
    a.save('sliced')
    b = mk(SliceTrain((1, .75), slicing=Slicing(norm='switch_affine')))
    state = snapshot(b.model)
    with pytest.raises(ValueError, match='other rates than 1, 0.75'): b.load('sliced')
    assert not same(snapshot(b.model), state)


def test_schedule_goes_on_from_the_step(mk):
    rates = []
    class Note(Callback):
        run_valid, order = False, 5
        def before_batch(self): rates.append(self.learn.slice_train.now)
    learn = mk([SliceTrain(RATES, RateDraw('random', seed=3)), Note()])
    learn.fit(2)
    one = list(rates)
    rates.clear()
    learn.lr_find(num_it=9, show_plot=False, stop_div=False)
    assert len({tuple(r) for r in rates}) > 1
    rates.clear()
    learn.fit(1)
    want = learn.slice_train._schedule(RATES)
    assert one == [want.at(i) for i in range(16)] and rates == [want.at(i) for i in range(16, 24)]


# -- kinds of models

def test_vision_learner(tmp_path):
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet18
    seed_all()
    dls = tiny_dls(n=32, n_valid=16, bs=16, chans=3, scale=4)
    learn = quiet(vision_learner(dls, resnet18, pretrained=False, normalize=False, n_out=10, path=tmp_path, cbs=SliceTrain(RATES), metrics=accuracy))
    learn.fine_tune(1)
    assert learn.slice_train.effect.clock.steps == 4 and 'accuracy@0.25' in learn.recorder.metric_names
    learn.save('v'); learn.load('v')


def test_one_channel_timm_body(tmp_path):
    from fastai.vision.learner import vision_learner
    seed_all()
    learn = quiet(vision_learner(tiny_dls(n=16, n_valid=16, bs=16, scale=4), 'resnet10t', pretrained=False,
        normalize=False, n_in=1, n_out=10, path=tmp_path, cbs=SliceTrain((1, .5)), metrics=[]))
    learn.fit(1)
    assert learn.recorder.metric_names[3:-1] == ['valid_loss@0.5']


def test_resnet34_on_groceries(data_dir, tmp_path):
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet34
    from paramfx.data.memory import tensor_dls
    from paramfx.data.photos import grocery_dls
    if not (data_dir/'grocery').is_dir(): pytest.skip('no grocery folder in PARAMFX_DATA')
    seed_all()
    x, y = next(iter(grocery_dls(data_dir, size=64, bs=48, augment=False, max_memory=0, num_workers=0, device='cpu').train))
    dls = tensor_dls(x[:32], y[:32], x[32:], y[32:], bs=16, vocab=[*range(81)], normalize=False, device='cpu')
    learn = quiet(vision_learner(dls, resnet34, pretrained=False, normalize=False, n_out=81, path=tmp_path, cbs=SliceTrain(RATES), metrics=accuracy))
    learn.fit(1)
    assert 'accuracy@0.25' in learn.recorder.metric_names and learn.slice_train.effect.clock.steps == 2
    with at_rate(learn.model, .25): narrow = learn.get_preds()[0]
    learn.materialize(rate=.25)
    assert torch.equal(learn.get_preds()[0], narrow)
    assert sum(p.numel() for p in learn.model.parameters()) < .08*21_800_000


class Carries(nn.Module):
    "Goes on from what the last batch left, which is as wide as the pass that left it"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 10)
        self.reset()
    def reset(self): self.state = None
    def train(self, mode=True):
        self.reset()
        return super().train(mode)
    def forward(self, x):
        h = self.a(x.flatten(1)).relu()
        if self.state is not None: h = h+.5*self.state
        self.state = h.detach()
        return self.b(h)


@pytest.mark.parametrize('schedule', ['static', 'random'])
def test_each_width_carries_its_own_state(mk, schedule):
    seen, learn = [], mk(SliceTrain(RATES, RateDraw(schedule, seed=1)), model=Carries)
    learn.model.register_forward_pre_hook(lambda m, x: seen.append(['in', m.training, slice_plan(m).key, m.state]))
    learn.model.register_forward_hook(lambda m, x, out: seen[-1].append(m.state))
    class Batch(Callback):
        def before_batch(self): seen.append('batch')
    learn.fit(2, cbs=Batch())
    last, phase, n = {}, None, 0
    for o in seen:
        if o == 'batch': continue
        _, training, r, before, after = o
        if training != phase: last, phase = {}, training  # `train` and `eval` reset all widths
        assert before is last.get(r), (training, r)
        n += before is not None
        last[r] = after
    if schedule == 'static': assert n == 2*3*(7+1)  # all but the first batches of training and of validation
    else: assert n >= 2*3+2  # a width that was idle for some batches goes on, too
    assert sum(o != 'batch' for o in seen) == (2*3*(8+2) if schedule == 'static' else 2*(8+3*2))
    assert slice_plan(learn.model).states == {'': ('state',)}
    learn.model.reset()
    for r in RATES:
        with slice_plan(learn.model).at(r): assert learn.model.state is None


class Begins(nn.Module):
    "Has a `reset` of another kind"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(64, 16), nn.Linear(16, 10), None
    def reset(self): nn.init.zeros_(self.a.weight)
    def forward(self, x):
        self.seen = self.a(x.flatten(1)).relu()
        return self.b(self.seen)


def test_a_reset_of_weights_keeps_no_states():
    net = Begins()
    before = snapshot(net)
    slice_model(net, torch.zeros(1, 1, 8, 8), RATES)
    assert slice_plan(net).states == {} and not same(snapshot(net), before)
    with torch.no_grad(), at_rate(net, .5): net(torch.zeros(1, 1, 8, 8)), net.seen
    assert not same(snapshot(net), before)


# -- two processes

WORKER = '''
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from functools import partial
from fastai.basics import SGD
from ddp_worker import _broadcast
from contracts import build, snapshot, small_net, tiny_dls
from paramfx.slicing.callback import SliceTrain
from settings import slice_settings
dist.init_process_group('gloo')
rank = int(os.environ['RANK'])
for name, kw in (('gn', dict(schedule='static', norm='gn', groups=4)), ('one', dict(schedule='cycle', norm='gn', groups=4)),
         ('affine', dict(schedule='random_min', norm='switch_affine')), ('two', dict(schedule='random', n_random=2))):
    learn = build('.', SliceTrain(**slice_settings(rates=(1, .5, .25), **kw)), dls=tiny_dls(n=32, n_valid=32, bs=16), seed=rank, opt_func=partial(SGD, mom=.9))
    with learn.distrib_ctx(sync_bn=False): learn.fit(4)
    torch.save((snapshot(learn.model), [float(v) for v in learn.recorder.values[-1]]), f'{name}_{rank}.pt')
dist.barrier()
dist.destroy_process_group()
'''


def test_two_processes_are_one_with_twice_the_batch(tmp_path, mk):
    pytest.importorskip('accelerate', reason='fastai.distributed needs accelerate')
    (tmp_path/'worker.py').write_text(WORKER)
    r = run_ranks(tmp_path/'worker.py', HERE, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-6000:]
    for name in ('gn', 'one', 'affine', 'two'):
        (a, va), (b, vb) = (torch.load(tmp_path/f'{name}_{i}.pt') for i in (0, 1))
        for k in a: assert 'running' in k or torch.equal(a[k], b[k]), (name, k)
        assert np.allclose(va[1:], vb[1:]) or name in ('affine', 'two')
    for name, schedule in (('gn', 'static'), ('one', 'cycle')):
        slicing = Slicing(norm='gn', groups=4)
        whole = mk(SliceTrain((1, .5, .25), schedule, slicing=slicing), dls=tiny_dls(n=32, n_valid=32, bs=32), opt_func=partial(SGD, mom=.9))
        whole.fit(4)
        a, _ = torch.load(tmp_path/f'{name}_0.pt')
        for n, p in whole.model.named_parameters(): assert torch.allclose(p, a[n], atol=1e-5), (name, n)


@pytest.mark.parametrize('kw,told', [
    (dict(n_random=0), 'schedule=RateDraw(n_random=0)'), (dict(schedule='random', n_random=2, seed=1),
    "schedule=RateDraw(schedule='random', n_random=2, seed=1)"),
    (dict(probs=(1, 2, 3)), 'schedule=RateDraw(probs=(1, 2, 3))'), (dict(norm='gn', groups=4), "slicing=Slicing(groups=4, norm='gn')"),
    (dict(seed=3, only='0.0'), "schedule=RateDraw(seed=3) instead of seed=3; write slicing=Slicing(only='0.0')"),
    (dict(pin='1', embeddings=True), "slicing=Slicing(embeddings=True, pin='1')")])
def test_a_setting_that_has_moved_is_told_with_the_new_form(kw, told):
    with pytest.raises(TypeError, match='SliceTrain: write ') as e: SliceTrain((1, .5, .25), **kw)
    assert told in str(e.value)
    new = ', '.join(s.partition(' instead of ')[0] for s in str(e.value).split('write ')[1:])
    cb = eval(f'SliceTrain((1, .5, .25), {new})')
    held = {**vars(cb.schedule), **vars(cb.slicing)}
    assert {k: held[k] for k in kw} == kw


def test_equal_objects_continue_what_is_in_force(mk):
    learn = mk(SliceTrain((1, .5), RateDraw(n_random=0, seed=2), slicing=Slicing(norm='recal')))
    learn.fit(1)
    learn.fit(1, cbs=SliceTrain((1, .5), RateDraw(n_random=0, seed=2), slicing=Slicing(norm='recal')))
    with pytest.raises(ValueError, match=r'schedule\.seed=2 -> 3'):
        learn.add_cb(SliceTrain((1, .5), RateDraw(n_random=0, seed=3), slicing=Slicing(norm='recal')))
    with pytest.raises(ValueError, match='slicing.norm'): learn.add_cb(SliceTrain((1, .5), RateDraw(n_random=0, seed=2)))
    with pytest.raises(ValueError, match='give Slicing'): SliceTrain(slicing=dict(norm='gn'))


def test_a_recipe_has_the_draw_as_plain_data(mk, tmp_path):
    learn = mk(SliceTrain((1, .5), RateDraw('random', seed=2), reduce='mean'))
    learn.fit(1)
    save_recipe(learn.model, tmp_path/'r')
    step = torch.load(tmp_path/'r', weights_only=True)['recipe'][-1]
    assert step['args']['schedule'] == dict(name='RateDraw', schedule='random', n_random=1, probs=None, seed=2)
    other = mk(model=lambda: load_recipe(tmp_path/'r', small_net()))
    other.fit(1, cbs=SliceTrain((1, .5), RateDraw('random', seed=2), reduce='mean'))
    with pytest.raises(ValueError, match='schedule.seed'): other.fit(1, cbs=SliceTrain((1, .5), 'random', reduce='mean'))
