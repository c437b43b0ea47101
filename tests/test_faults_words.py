"""What a message tells its reader to do, done: each remedy is taken out of the message, run as it stands, and has to help.

A case is code: what was before, what is refused or warned about, and which of the remedies in backticks is followed. The
names are those that the docs use: `learn`, `model`, `x`, `dls`, `file`. A Learner's user is told of Learners, a model's of models."""
import re
import warnings

import pytest
import torch
from fastai.basics import DataLoaders, CrossEntropyLossFlat, Learner, accuracy, params
from torch import nn

import paramfx.all
from paramfx.all import zoo
from paramfx.export.materialize import defer
from paramfx.kernels.timing import sparse_infer
from paramfx.slicing.plan import slice_plan

MODEL_VERBS = 'slice_model', 'split_model', 'share_bases(', 'tie_weights', '= materialize'


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def tied_net():
    m = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    m[5].weight = m[3].weight
    return m


def resnet(): return zoo.build('cifar10/resnet20', width=.5)


def space(build, tmp_path):
    "What a user has at hand"
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    data = [*zip(x, y)]
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0)
    ns = {n: v for n, v in vars(paramfx.all).items() if n[0] != '_'}
    ns |= dict(defer=defer, sparse_infer=sparse_infer, torch=torch, nn=nn, x=x[:2], dls=dls, model=build(), file=tmp_path/'file.pth', tmp_path=tmp_path)
    ns['fresh'] = build
    ns['learn'] = Learner(dls, build(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, splitter=params, path=tmp_path)
    ns['learn'].remove_cbs([c for c in ns['learn'].cbs if type(c).__name__ in ('Recorder', 'ProgressCallback')])
    return ns


def run(code, ns):
    "Run `code` as a cell of a notebook: no function of ours has a Learner among its arguments. Returns the message, or None"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        try: exec(code, ns)
        except Exception as e: return f'{e}'
    # how much a verb takes away is told besides, and no refusal
    told = [t for w in seen if w.category is UserWarning and 'of the squared weight is lost' not in (t := str(w.message))]
    return told[0] if told else None


def ticks(text): return re.findall('`([^`]+)`', text)


# name: (network, what was before, what is refused, what the message says, number of the remedy, what helps then: True for the same again)
SHARE = 'share_bases(model, x, shared_rank=8)'
CUT = 'trace_channels(model, x).cut(.5).apply(model)'
CASES = {
    # verbs on a model
    'share under masks': (resnet, 'sparsify(model)', SHARE, 'under dynamic_sparse', 0, True),
    'share before a cut': (resnet, "defer(model, trace_channels(model, x).cut(.5, whole='keep'))",
    SHARE, 'cut waits', 0, 'share_bases(model, x, shared_rank=2, unique_rank=0)'),
    'share again': (net, "share_bases(model, x, 4, groups={'a': ['3', '5']})", "share_bases(model, "
    "x, 4, groups={'b': ['3', '5']})", 'shares filters already', 0, True),
    'share a masked part': (net, 'sparsify(model[3])', "share_bases(model, x, 4, groups={'a': ['3', '5']})", 'masked', 0, True),
    'join elsewhere': (resnet, '', 'join_bases(model, x)', 'no stage has two bottleneck', 0, None),
    'filters of none': (resnet, '', 'stage_filters(model)', 'no layer of this model shares', 1, True),
    'use of none': (resnet, '', 'use_grads(model, x, torch.tensor([0, 1]))', 'uses a shared basis', 1, True),
    'penalty of none': (resnet, 'from paramfx.bases.callback import basis_groups', 'basis_groups(model)', 'shares filters', 0, True),
    'cut under masks': (net, 'sparsify(model)', CUT, 'under dynamic_sparse', 0, True),
    'cut of slices': (net, 'slice_model(model, x)', CUT, 'is sliced', 0, True),
    'cut of slices, undone': (net, 'slice_model(model, x)', CUT, 'is sliced', 1, True),
    'cut a parametrization': (net, 'nn.utils.parametrizations.weight_norm(model[3])', CUT, 'parametrized', 0, True),
    'cut a weight norm': (net, 'nn.utils.weight_norm(model[3])', CUT, 'WeightNorm', 0, True),
    'cut what torch prunes': (net, "nn.utils.prune.l1_unstructured(model[3], 'weight', .5)", CUT, 'prune', 0, True),
    'slice under masks': (net, 'sparsify(model)', 'slice_model(model, x)', 'under dynamic_sparse', 1, True),
    'slice twice': (net, 'slice_model(model, x)', 'slice_model(model, x)', 'sliced already', 0, True),
    'slice twice, one more': (net, 'slice_model(model, x)', 'slice_model(model, x)', 'sliced already', 1, None),
    'a rate of no slices': (net, '', 'set_rate(model, .5)', 'not sliced', 0, True),
    'a rate not prepared': (net, 'slice_model(model, x)', 'set_rate(model, .4)', 'not prepared', 0, True),
    'a rate too low': (net, 'slice_model(model, x)', 'set_rate(model, .1)', 'narrowest', 0, 'slice_model(model, x, (1, .1)); set_rate(model, .1)'),
    'no statistics': (net, "slice_model(model, x, norm='recal'); set_rate(model.eval(), .5)", 'model(x)', 'no statistics', 0, True),
    'no statistics in a file': (net, "slice_model(model, x, norm='recal'); save_slices(model, file)",
    'load_slice(file, .5)', 'without statistics', 0, 'save_slices(model, file); load_slice(file, .5)'),
    'split under masks': (net, 'sparsify(model)', "split_model(model, x, splits=[2], classes='cluster')", 'under dynamic_sparse', 0, True),
    'split tied weights': (tied_net, '', "split_model(model, x, splits={'3': 2, '5': 2, '7': 2}, classes='random')", 'is tied', 0, True),
    'split shared filters': (net, "share_bases(model, x, 4, groups={'a': ['3', '5']})",
    "split_model(model, x, splits={'3': 2, '5': 2, '9': 2}, classes='random')", 'is computed', 0, True),
    'branches of one': (net, '', 'branches(model)', 'not split', 0, True),
    'processes of one': (net, '', "BranchProcesses(model, method='fork').close()", 'not split', 0, True),
    'mask twice': (net, 'sparsify(model)', 'sparsify(model, .8)', 'masked already', 0, True),
    'mask a masked part': (net, 'sparsify(model[3], .5)', 'sparsify(model, .8)', 'masking a part', 1, True),
    'mask what is tied': (net, 'tie_weights(model, .5)', 'sparsify(model)', 'Tied', 0, True),
    'tie what is masked': (net, 'sparsify(model)', 'tie_weights(model)', 'masked', 0, True),
    'fast under masks': (net, 'sparsify(model)', "sparse_infer(model, x)", 'in force', 0, None),
    'record a cut': (net, 'defer(model, trace_channels(model, x).cut(.5))', 'save_recipe(model, file)', 'cut waits', 0, True),
    'record a part': (net, 'sparsify(model[3], .5)', 'save_recipe(model, file)', 'steps of its own', 0, 'torch.save(model.state_dict(), file)'),
    'recipe the wrong way round': (net, 'save_recipe(model, file)', 'load_recipe(model, file)', 'file first', 0, None),
    # the same on a Learner
    'learn: share under masks': (resnet, 'learn.sparsify()', 'learn.share_bases(shared_rank=8)', 'under dynamic_sparse', 0, True),
    'learn: slice under masks': (net, 'learn.sparsify()', 'learn.slice()', 'under dynamic_sparse', 1, True),
    'learn: slice twice': (net, 'learn.slice()', 'learn.slice()', 'sliced already', 0, True),
    'learn: other rates': (net, 'learn.slice()', 'learn.add_cb(SliceTrain((1, .5)))', 'is sliced at', 0, True),
    'learn: another norm': (net, 'learn.slice()', "learn.add_cb(SliceTrain(slicing=Slicing(norm='recal')))", 'sliced already', 0, True),
    'learn: rates of none': (net, '', 'learn.validate_rates()', 'not sliced', 0, True),
    'learn: report of none': (net, '', 'learn.slice_report(repeats=1)', 'not sliced', 0, None),
    'learn: export of none': (net, '', "learn.export_slice(.5, 'a.pth')", 'not sliced', 0, True),
    'learn: recalibrate none': (net, '', 'learn.recalibrate()', 'not sliced', 0, True),
    'learn: a rate not prepared': (net, 'learn.slice()', "learn.export_slice(.4, 'a.pth')", 'not prepared', 0, True),
    'learn: no statistics': (net, "learn.slice(norm='recal')", 'learn.validate_rates()', 'no statistics', 0, True),
    'learn: penalty of none': (resnet, '', 'learn.add_cb(OrthoReg())', 'shares filters', 0, True),
    'learn: tie what is masked': (net, 'learn.sparsify()', 'learn.tie()', 'masked', 0, True),
    'learn: mask what is tied': (net, 'learn.tie(.5)', 'learn.sparsify()', 'Tied', 0, True),
    'learn: mask a masked part': (net, 'sparsify(learn.model[3], .5)', 'learn.sparsify(.8)', 'masking a part', 1, True),
    'learn: other masks': (net, 'learn.sparsify()', 'learn.sparsify(.8)', 'other settings', 0, True),
    'learn: copied masks twice': (net, "learn.sparsify(); learn.save('a')", "learn.load_masks('a')", 'masked already', 0, True),
    'learn: split without groups': (net, '', 'learn.split()', 'No groups were learned', 0, None),
    'learn: split tied weights': (tied_net, '', "learn.split(splits={'3': 2, '5': 2, '7': 2}, classes='random')", 'is tied', 0, True),
    'learn: cut a parametrization': (net, 'nn.utils.parametrizations.weight_norm(learn.model[3])', 'learn.slice()', 'parametrized', 0, True),
    'learn: loose masks': (net, 'sparsify(learn.model)', 'learn.fit(1)', 'holds it in force', 0, True),
}


@pytest.mark.parametrize('name', CASES)
def test_the_remedy_helps(name, tmp_path):
    build, before, refused, says, number, then = CASES[name]
    ns = space(build, tmp_path)
    assert run(before, ns) is None
    told = run(refused, ns)
    assert told is not None and says in told, told
    remedy = ticks(told)[number]
    if name.startswith('learn'): assert not any(v in remedy.replace('learn.share_bases(', '') for v in MODEL_VERBS), told
    else: assert 'learn.' not in remedy, told
    assert (failed := run(remedy, ns)) is None, f'{remedy}: {failed}'
    if then is None: return
    again = run(refused if then is True else then, ns)
    assert again is None, f'after {remedy}: {again}'


def test_a_period_of_one_cannot_be_smaller(tmp_path):
    ns = space(net, tmp_path)
    ns['GradientAccumulation'] = __import__('fastai.callback.training', fromlist=['x']).GradientAccumulation
    fit = "learn.fit(2, cbs=[DynamicSparse(.5, method='set', {}), {}])"
    told = run(fit.format('period=1', 'GradientAccumulation(1000)'), ns)
    assert 'without one rewire' in told and 'period=' not in told
    ns['learn'].release()
    ns['learn'].remove_cbs([c for c in ns['learn'].cbs if type(c).__name__ == 'GradientAccumulation'])
    assert run(fit.format('period=1', ticks(told)[0]), ns) is None
    ns = space(net, tmp_path)
    told = run("learn.fit(2, cbs=DynamicSparse(.5, method='set', period=9))", ns)
    period = re.search(r'set (period=\d+)\.$', told)[1]
    assert run(f"learn.release(); learn.fit(2, cbs=DynamicSparse(.5, method='set', {period}))", ns) is None


@pytest.mark.parametrize('what', ["'share_base'", "'materialize'", 'nn.Module'])
def test_a_plan_of_something_else_lists_the_verbs(what, tmp_path):
    told = run(f'learn.plan({what})', ns := space(net, tmp_path))
    verbs = re.search(r'(?:There are: |or a verb: )([^.]*)', told)[1].replace("'", '').split(', ')
    assert {'join_bases', 'prune', 'share_bases', 'slice', 'sparsify', 'tie'} <= {*verbs}
    for v in verbs: assert callable(getattr(Learner, v)) and hasattr(getattr(Learner, v), 'effect')
    assert run("learn.plan('slice')", ns) is None


def test_a_recipe_the_wrong_way_round_is_one_line(tmp_path):
    ns = space(net, tmp_path)
    run('save_recipe(model, file)', ns)
    told = run('load_recipe(fresh(), file)', ns)
    assert len(told) < 200 and '\n' not in told and 'Sequential' in told


def test_onnx_without_its_packages_names_the_file(tmp_path, monkeypatch):
    ns, real = space(net, tmp_path), __import__
    def fake(name, *args, **kwargs):
        if name == 'onnxscript': raise ImportError(name)
        return real(name, *args, **kwargs)
    run('learn.slice()', ns)
    with monkeypatch.context() as m:
        m.setattr('builtins.__import__', fake)
        told = run("learn.export_slice(.5, 'narrow.onnx')", ns)
    assert told.startswith('narrow.onnx: ') and 'paramfx[export]' in told


class Odd(nn.Module):
    "An operator without a rule, beside layers that can be sliced"
    def __init__(self):
        super().__init__()
        self.a, self.fft, self.b = nn.Conv2d(3, 8, 3, padding=1), Fft(), nn.Linear(8, 8)
        self.c = nn.Linear(8, 4)
    def forward(self, x): return self.c(self.b(self.fft(self.a(x)).mean((2, 3))).relu())


class Fft(nn.Module):
    def forward(self, x): return torch.fft.fft(x).real


@pytest.mark.parametrize('call,again', [
    ('slice_model(model, x{})', 'set_rate(model, .5)(x)'),
    ('learn.slice({})', 'learn.fit(1, cbs=SliceTrain())'), ('learn.add_cb(SliceTrain({}))', 'learn.fit(1)')])
def test_a_module_without_a_rule_is_pinned_as_the_message_says(call, again, tmp_path):
    ns = space(Odd, tmp_path)
    told = run(call.format(''), ns)
    pin = re.search(r'(slicing=Slicing\()?pin=\[.*?\]\)?', told)[0]
    assert run(call.format(f', {pin}' if call.startswith('slice_model') else pin), ns) is None
    assert run(again, ns) is None
    model = ns['model'] if 'slice_model' in call else ns['learn'].model
    assert {*slice_plan(model).spaces} == {'b'}
    run(f"save_recipe({'model' if 'slice_model' in call else 'learn.model'}, file)", ns)
    assert run('load_recipe(file, fresh())', ns) is None


@pytest.mark.parametrize('call,again', [
    ("split = split_model(model, x, splits={{'b': 2, 'c': 2}}, classes='random'{})", 'branches(split)(x)'),
    ("learn.split(splits={{'b': 2, 'c': 2}}, classes='random'{})", 'learn.fit(1)'),
    ("learn.add_cb(SplitNet({{'b': 2, 'c': 2}}, equal_groups=True{}))", 'learn.fit(1); learn.split(); learn.fit(1)')])
def test_what_a_split_cannot_follow_is_pinned_as_the_message_says(call, again, tmp_path):
    ns = space(Odd, tmp_path)
    told = run(call.format(''), ns)
    pin = re.search(r'pin=\[.*?\]', told)[0]
    assert run(call.format(f', {pin}'), ns) is None
    assert run(again, ns) is None
    run(f"save_recipe({'split' if 'split_model' in call else 'learn.model'}, file)", ns)
    assert run('load_recipe(file, fresh())', ns) is None
