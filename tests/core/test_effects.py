"Corners of effects, files and layer selection that the contract matrix does not cross"
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, SGD, accuracy, set_seed
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paramfx.core.layers import pick_layers, stages
from paramfx.core.samples import rng_guard, sample_batch
from paramfx.core.optimizers import swap_module
from paramfx.data.memory import digits_dls, tensor_dls
from paramfx.core.callback import EffectCallback, _same
from paramfx.core.runs import RunState
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.sparsify import plan_masks, sparsify
from paramfx.core.state import EffectState, effects
from paramfx.report import plan as dryrun  # noqa: F401  (gives Learner plan)
from paramfx.sparse.methods import DSR


def net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture
def mk(tmp_path):
    def _mk(*cbs, model=None, **kw):
        set_seed(0)
        learn = Learner(digits_dls(bs=256, device='cpu'), model or net(), metrics=accuracy, cbs=list(cbs), path=tmp_path, **kw)
        learn.logger = lambda *o: None
        return learn.remove_cb(learn.progress) if hasattr(learn, 'progress') else learn
    return _mk


class Crash(Callback):
    order = 80
    def __init__(self, at): self.at, self.n = at, {'fits': 0}
    def before_fit(self): self.n['fits'] += 1
    def before_epoch(self):
        if (self.n['fits'], self.epoch) == self.at: raise KeyboardInterrupt


def test_several_fits_that_each_bring_a_run_state_resume_in_the_right_one(mk):
    def script(learn, crash=None):
        if crash: learn.add_cb(crash)
        try:
            learn.fit(2, 1e-2, cbs=[DynamicSparse(.8, period=2), RunState()])
            learn.fit(3, 1e-2, cbs=[DynamicSparse(.8, period=2), RunState()])
        except KeyboardInterrupt: pass
        return learn
    whole = script(mk())
    script(mk(), Crash((2, 1)))
    again = script(mk().resume())
    assert again.dynamic_sparse.effect.clock.steps == whole.dynamic_sparse.effect.clock.steps
    for a, b in zip(again.model.parameters(), whole.model.parameters()): assert torch.equal(a, b)


def test_a_module_may_be_wrapped_under_its_optimizer():
    "Parameters that are trained already need no counterpart"
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    opt = SGD(model.parameters(), .1)
    before = [*opt.param_lists[0]]
    swap_module(model, '0', nn.Sequential(model[0], nn.ReLU()), opt)
    assert all(a is b for a, b in zip(before, opt.param_lists[0])) and model[0][0].weight is before[0]
    model.eval()
    assert not swap_module(model, '1', nn.Linear(2, 2), opt).training # as the one before it
    with pytest.raises(ValueError, match='2.weight, 2.bias have no counterpart'): swap_module(model, '0', nn.Sequential(*model[0], nn.Linear(2, 2)), opt)


class Own:
    "What an effect holds: numbers with an optimizer of their own, outside of model and Learner"
    def __init__(self):
        self.x = nn.Parameter(torch.ones(3))
        self.opt = torch.optim.Adam([self.x], lr=.1)
    def step(self, model):
        self.opt.zero_grad()
        (self.x*model[1].weight.detach()[0, :3]).sum().add(self.x.square().sum()).backward()
        self.opt.step()
    def keys(self): return []
    def check(self, state_dict, prefix): pass
    def burn_in(self): pass
    def release(self): pass
    def run_state(self): return dict(x=self.x, opt=self.opt.state_dict())
    def set_run_state(self, state):
        self.x.data.copy_(state['x'])
        self.opt.load_state_dict(state['opt'])


class Owner(EffectCallback):
    def plan(self, model, learn=None): return []
    def convert(self, model, learn=None): return EffectState(self.name, self.settings, holder=Own())
    def on_update(self, learn): self.effect.holder.step(learn.model)


def test_what_an_effect_owns_is_resumed(mk):
    "Tensors and optimizer of a holder continue as if nothing had happened"
    def script(learn, crash=None):
        if crash: learn.add_cb(crash)
        try: learn.fit(4, 1e-2, cbs=[Owner(), RunState()])
        except KeyboardInterrupt: pass
        return learn.owner.effect.holder
    whole = script(mk())
    script(mk(), Crash((1, 2)))
    again = script(mk().resume())
    assert torch.equal(again.x, whole.x) and not torch.equal(whole.x, torch.ones(3))
    assert torch.equal(again.opt.state[again.x]['exp_avg'], whole.opt.state[whole.x]['exp_avg'])


def test_two_trackers_keep_their_own_best(mk):
    trackers = lambda: [SaveModelCallback('valid_loss', fname='a'), SaveModelCallback('accuracy', fname='b')]
    a = mk(*trackers(), RunState())
    a.fit(2, 1e-2)
    saved = torch.load(a.path/'models/run.pth', weights_only=True)['callbacks']['trackers']
    assert [round(s['best'], 6) for _, s in saved] == [round(float(t.best), 6) for t in a.cbs if isinstance(t, SaveModelCallback)]
    assert saved[0][1]['best'] != saved[1][1]['best']


def test_generators_of_torch_loaders_are_guarded_and_restored():
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 4), torch.zeros(32))
    dls = DataLoaders(DataLoader(data, 8, shuffle=True, generator=g), DataLoader(data, 8))
    before = g.get_state()
    sample_batch(dls)
    with rng_guard(dls): next(iter(dls.train))
    assert torch.equal(before, g.get_state())


def test_sample_of_nested_inputs_is_cut_in_each_of_them():
    class Pairs(TensorDataset):
        def __getitem__(self, i): return (self.tensors[0][i], self.tensors[0][i]), self.tensors[1][i]
    data = Pairs(torch.randn(32, 4), torch.zeros(32))
    (a, b), = sample_batch(DataLoaders(DataLoader(data, 8), DataLoader(data, 8)), 2)
    assert a.shape == b.shape == (2, 4)


def test_plan_takes_the_callback_that_is_in_use(mk):
    cb = DynamicSparse(.8)
    learn = mk(cb)
    assert 'already in force' in learn.plan(cb).note
    with pytest.raises(ValueError, match='learn.release'): learn.plan(DynamicSparse(.7))


def test_a_refused_callback_leaves_no_other_behind(mk):
    learn = mk()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    for bad in (DynamicSparse(.5), DynamicSparse(.9999)):
        with pytest.raises(ValueError): learn.fit(1, cbs=[DynamicSparse(.8), bad])
        assert not any(isinstance(c, EffectCallback) for c in learn.cbs) and effects(learn.model) == {}
        assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_a_model_masked_by_the_verb_is_not_trained_without_a_keeper(mk):
    model = net()
    sparsify(model, .8)
    learn = mk(model=model)
    with pytest.raises(ValueError, match='DynamicSparse'): learn.fit(1)
    learn.fit(1, cbs=DynamicSparse(.8))
    for e in learn.dynamic_sparse.store.items: assert (e.weight[~e.full] == 0).all()


def test_a_replaced_model_or_layer_is_noticed(mk):
    learn = mk(DynamicSparse(.8))
    old, learn.model = learn.model, net()
    learn.opt = None
    with pytest.raises(ValueError, match='does not carry the effect'): learn.fit(1)
    learn.model = old
    learn.model[3] = nn.Linear(32, 10)
    learn.opt = None
    with pytest.raises(ValueError, match='3: the layer was replaced'): learn.fit(1)


def test_release_through_torch_compile(mk):
    learn = mk(DynamicSparse(.8))
    inner = learn.model
    learn.model = torch.compile(inner, backend='aot_eager')
    assert list(learn.paramfx) == ['dynamic_sparse']
    learn.release()
    assert effects(inner) == {} and not any('mask' in k for k in inner.state_dict())


def test_columns_end_with_an_interrupted_fit(mk):
    learn = mk(DynamicSparse(.8))
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Crash((1, 1)))
    assert len(learn.validate()) == 2


def test_a_callback_added_within_an_epoch_begins_there(mk):
    class Late(Callback):
        def after_batch(self):
            if self.training and self.epoch == 0 and self.iter == 1: self.learn.add_cb(DynamicSparse(.8, period=1, stop=1.))
    learn = mk()
    learn.fit(2, 1e-2, cbs=Late())
    sp = learn.dynamic_sparse
    assert sp.history and sp.effect.clock.steps == 2*len(learn.dls.train)-2
    for e in sp.store.items: assert (e.weight[~e.full] == 0).all()


def test_history_ends_where_a_loaded_file_ends(mk):
    learn = mk(DynamicSparse(.8, period=2, stop=1.))
    learn.fit(1, 1e-2)
    learn.save('early')
    n = len(learn.dynamic_sparse.history)
    learn.fit(2, 1e-2)
    learn.load('early')
    assert len(learn.dynamic_sparse.history) == n > 0


def test_a_name_of_the_learner_cannot_be_taken():
    with pytest.raises(TypeError, match='Choose another name'): type('Fit', (EffectCallback,), {})


def test_a_model_of_its_own_with_such_a_name_loads(mk):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fixed_effect = net(), nn.Parameter(torch.ones(3))
        def forward(self, x): return self.body(x)
    learn = mk(model=Mixed())
    learn.save('x')
    learn.load('x')


def test_tied_weights_are_masked_once_and_embeddings_never():
    model = nn.ModuleDict({'e': nn.Embedding(50, 8), 'a': nn.Linear(8, 8), 'b': nn.Linear(8, 8), 'out': nn.Linear(8, 50)})
    model.out.weight, model.b.weight = model.e.weight, model.a.weight
    plan = plan_masks(model, .5)
    assert [r['layer'] for r in plan if 'live' in r] == ['a.weight']
    notes = {r['layer']: r['note'] for r in plan if 'note' in r}
    assert 'shared with the embedding e' in notes['out.weight'] and 'shared with a.weight' in notes['b.weight']
    DynamicSparse(.5).convert(model)


def test_old_weight_norm_is_named_and_left():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    plan = plan_masks(model, .5)
    assert [r['layer'] for r in plan if 'live' in r] == ['1.weight']
    assert 'weight_norm' in plan[-1]['note']


def test_a_part_that_is_masked_already_is_refused():
    model = nn.Sequential(net(), nn.Linear(10, 10))
    sparsify(model[0], .8)
    state = set(model.state_dict())
    with pytest.raises(ValueError, match='0.1.weight: the layer has a `weight_mask` already'): sparsify(model, .5)
    assert set(model.state_dict()) == state


def test_a_file_with_masks_for_fewer_layers_is_refused(mk):
    a, b = mk(DynamicSparse(.8, include='1')), mk(DynamicSparse(.8))
    a.save('fewer')
    with pytest.raises(ValueError, match='3.weight: the file holds masks, but none for this parameter'): b.load('fewer')


@pytest.mark.parametrize('a, b, equal', [
    (lambda x: x+1, lambda x: x+1, True), (lambda x: x+1, lambda x: x+2, False),
    (partial(max, 1), partial(max, 1), True), (partial(max, 1), partial(max, 2), False),
    (np.arange(3), np.arange(3), True), ([1].append, [2].append, False), (torch.ones(2), torch.ones(2), True),
    ({'a': torch.ones(2)}, {'a': torch.zeros(2)}, False), (.8, np.float64(.8), True), (np.arange(3), None, False)])
def test_equality_of_settings(a, b, equal): assert bool(_same(a, b)) == equal


def test_numbers_of_numpy_are_numbers():
    DynamicSparse(np.float32(.8), period=np.int64(3), method=DSR(n_realloc=np.float64(.1)))


def test_a_file_name_or_a_path_both_resume(mk):
    learn = mk(RunState())
    learn.fit(1)
    for file in ('run', 'run.pth', learn.path/'models/run.pth'): mk().resume(file)
    files = [p.name for p in (learn.path/'models').iterdir()]
    learn.run_state.file = 'run.pth'
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert [p.name for p in (learn.path/'models').iterdir()] == files  # the same file, not run.pth.pth


def test_plain_files_with_a_dot_in_their_name(mk):
    learn = mk()
    learn.save_plain('v1.2')
    learn.load('v1.2')


def test_layers_between_stages_belong_to_the_next_one():
    import torchvision
    names = stages(torchvision.models.densenet121(weights=None))
    assert any('transition1' in n for n in names['stage2']) and not any('transition1' in n for n in names['stage1'])


def test_a_container_selects_the_layers_in_it():
    model = nn.Sequential(net(), nn.Linear(10, 10))
    assert list(pick_layers(model, [model[0], '1'])) == ['0.1', '0.3', '1']
    with pytest.raises(ValueError, match='5 selects no layer'): pick_layers(model, 5)


def test_warning_about_rewires_is_about_this_fit(mk):
    import warnings
    learn = mk(DynamicSparse(.8, period=2))
    learn.fit(1, 1e-2)
    learn.save('one')
    learn.fit(2, 1e-2)
    learn.load('one')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*without one rewire.*')
        learn.fit(2, 1e-2)


@pytest.mark.parametrize('opt', [SGD, partial(OptimWrapper, opt=torch.optim.SGD)], ids=['fastai', 'torch'])
@pytest.mark.parametrize('how', ['frozen after it was trained', 'accumulating'])
def test_gradients_that_are_left_are_resumed(how, opt, tmp_path):
    "fastai decays a frozen layer that still has a gradient of zeros; accumulated gradients, and their count, cross the end of an epoch"
    def run(folder, stop=False, resume=False):
        set_seed(7 if resume else 0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
        learn = Learner(tensor_dls(x, torch.arange(40)%3, x, torch.arange(40)%3, bs=8, normalize=False,
            device='cpu'), net, CrossEntropyLossFlat(), opt_func=opt,
                        splitter=lambda m: [[*m[0].parameters()], [*m[2].parameters()]], path=tmp_path/folder, wd=.1, cbs=RunState())
        if how == 'accumulating': learn.add_cb(GradientAccumulation(24))
        if stop: learn.add_cb(Crash((2, 2)))
        if resume: learn.resume()
        with learn.no_bar(), learn.no_logging():
            try:
                learn.fit(1, .1)
                if how != 'accumulating': learn.freeze()
                learn.fit(4, .1)
            except KeyboardInterrupt: pass
        return net
    whole = run('a')
    half = run('b', stop=True)
    rest = run('b', resume=True)
    assert not any(torch.equal(p, q) for p, q in zip(whole.parameters(), half.parameters()) if p.requires_grad)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), rest.parameters()))


VERBS = ('load', 'save', 'export', 'slice', 'share_bases', 'join_bases', 'evolve', 'extract_slim', 'split', 'fine_tune', 'slice_report', 'search_rates',
    'recalibrate', 'validate_rates', 'cost', 'release', 'resume', 'save_plain')

@pytest.mark.parametrize('verb', VERBS)
def test_help_of_a_verb_shows_its_parameters(verb):
    "No `**kwargs`: who asks for help or completes by tab sees what there is. `materialize` and `plan` take what modules and verbs do, which is open"
    import inspect
    import paramfx.all  # noqa: F401  gives Learner the verbs
    ps = inspect.signature(getattr(Learner, verb)).parameters.values()
    assert not [p for p in ps if p.kind is p.VAR_KEYWORD] and all(p.name != 'kwargs' for p in ps)


def test_objects_are_compared_by_their_fields():
    from dataclasses import dataclass
    from paramfx.core.callback import _same, _unlike
    @dataclass(frozen=True)
    class How:
        at:object
        kind:str = 'a'
    assert _same(How(torch.ones(3)), How(torch.ones(3))) and not _same(How(torch.ones(3)), How(torch.zeros(3)))
    assert _same(How([1, How(lambda x: x)]), How([1, How(lambda x: x)])) and not _same(How(1), How(1, 'b'))
    assert _unlike('how', How(1), How(2, 'b')) == ['how.at=1 -> 2', "how.kind='a' -> 'b'"]
