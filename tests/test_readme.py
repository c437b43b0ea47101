"""README against the library: every block of Python runs, on small data, and every name that a sentence mentions is there."""
import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from fastai.basics import Datasets, Learner

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT/'README.md').read_text(encoding='utf8')
BLOCKS = re.findall(r'^```python\n(.*?)^```', TEXT, re.M | re.S)

# what a reader has at hand where a block begins, by a piece of the block
PRELUDE = {
    'learn.plan(DynamicSparse': '',
    "method='dsr'": '',
    "learn.save('sparse')": 'learn = small(); learn.sparsify(.9)',
    'save_sparse': 'learn = small(); learn.sparsify(.9); model = small().model',
    'learn.release()': 'learn = small(); learn.sparsify(.9)',
    'save_recipe': "learn = small(); learn.sparsify(.5, granularity='filter'); learn.materialize()",
    'learn.prune(': 'learn = small()',
    'SliceTrain': '',
    'save_slices': 'learn = vision_learner(dls, resnet34, metrics=accuracy); learn.slice()',
    'resume=True': 'learn = small(); beside = Evaluation(long_run=True); learn.evolve(generations=2, epochs=1, evaluation=beside)',
    'learn.evolve': 'learn = small()',
    'SplitNet': '',
    'OrthoReg(unique=True)': 'learn = small()',
    "init='svd'": 'learn = small(); learn.fit(1)',
    'trace_channels': 'model = resnet18(num_classes=4).eval()',
    'RunState': 'learn = small()',
    'zoo.build': ''}

# smaller: epochs, data and budgets that fit a test, and one device; groups that so short a training would leave empty
SMALLER = [
    ('fit_one_cycle(5,', 'fit_one_cycle(1,'), ('fit_one_cycle(5)', 'fit_one_cycle(1)'), ('fit_one_cycle(20,', 'fit_one_cycle(1,'),
    ('fit_one_cycle(3)', 'fit_one_cycle(1)'), ('fit_one_cycle(3,', 'fit_one_cycle(1,'), ('learn.fit(20, 1e-4', 'learn.fit(1, 1e-4'),
    ('fine_tune(3)', 'fine_tune(1)'), ('fine_tune(5)', 'fine_tune(1)'), ('generations=6, epochs=15', 'generations=2, epochs=1'),
    ('slice_report()', 'slice_report(repeats=1)'), ('pick_rate(5)', 'pick_rate(5000)'), ("['cuda:0', 'cuda:1']", "['cpu', 'cpu']"),
    ('search_rates(.4e9)', "search_rates(learn.slice_report(repeats=1)[0]['macs']*.8, n_batches=1, n_valid=1)"),
    ("'fc': 4})", "'fc': 4}, equal_groups=True)"), ('n_prunes=4', 'n_prunes=1')]


def picture(i): return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i))
def label(i): return torch.tensor(i % 4)


def at_hand():
    import fastai.vision.all as vision
    import paramfx.all as ours
    torch.manual_seed(0)
    dsets = Datasets([*range(32)], [[picture], [label]], splits=[[*range(16)], [*range(16, 32)]])
    dls = dsets.dataloaders(bs=8, num_workers=0)
    dls.c = 4
    names = lambda m: m.__all__ if hasattr(m, '__all__') else [n for n in dir(m) if n[0] != '_']
    ns = {n: getattr(m, n) for m in (vision, ours) for n in names(m)} | dict(dls=dls, x=torch.randn(2, 3, 32, 32))
    loss = vision.CrossEntropyLossFlat()
    ns['Learner'] = lambda *args, **kw: quiet(Learner(*args, **kw, loss_func=loss))
    offline = dict(pretrained=False, normalize=False, loss_func=loss)
    ns['vision_learner'] = lambda *args, **kw: quiet(vision.vision_learner(*args, **kw, **offline))
    ns['small'] = lambda: ns['Learner'](dls, vision.xresnet18(n_out=4), metrics=vision.accuracy)
    return ns


def quiet(learn):
    learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback'])
    return learn


def prelude(block):
    hits = [k for k in PRELUDE if k in block]
    assert hits, f'no prelude for the block\n{block}'
    return PRELUDE[hits[0]]


@pytest.mark.slow
@pytest.mark.parametrize('i', range(len(BLOCKS)))
def test_block_runs(i, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.chdir(tmp_path)
    ns, code = at_hand(), '\n'.join(l for l in BLOCKS[i].splitlines() if 'import *' not in l)
    if 'zoo.dls' in code: code = '\n'.join(l for l in code.splitlines() if 'dls' not in l) # no data set here
    for a, b in SMALLER: code = code.replace(a, b)
    exec(prelude(BLOCKS[i]), ns)
    with torch.random.fork_rng(): exec(code, ns)
    plt.close('all')


def test_what_is_made_smaller_is_there():
    for a, _ in SMALLER: assert any(a in b for b in BLOCKS), f'{a}: README has changed'
    for k in PRELUDE: assert any(k in b for b in BLOCKS), f'{k}: README has changed'


def calls(block):
    "(called, keywords) of each call in a block"
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Call): yield node.func, len(node.args), [k.arg for k in node.keywords]


@pytest.mark.parametrize('block', BLOCKS, ids=lambda b: b.splitlines()[0][:30])
def test_calls_bind(block):
    "The quick half: functions and verbs exist, and take the arguments that they are given"
    import paramfx.all as ours
    for func, n, kw in calls(block):
        f = ast.unparse(func)
        if f in vars(ours): target, first = getattr(ours, f), ()
        elif f.startswith('learn.') and f.count('.') == 1: target, first = getattr(Learner, f[6:]), (None,)
        elif f.startswith('zoo.'): target, first = getattr(ours.zoo, f[4:]), ()
        else: continue
        inspect.signature(target).bind(*first, *range(n), **dict.fromkeys(kw))


def names(text):
    "Names of the library in the running text: code in backticks that is a name or a call"
    for code in re.findall('`([^`\n]+)`', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)):
        m = re.fullmatch(r'(learn\.)?([A-Za-z_]\w*)(\(.*\))?', code)
        if m: yield code, m[1], m[2]


def test_names_in_sentences_exist():
    import fastai.vision.all as vision
    import paramfx.all as ours
    own = {p for f in vars(ours).values() if callable(f) for p in params_of(f)} # settings stand in backticks, too
    own |= {p.stem for p in Path(ours.__file__).parent.rglob('*') if p.suffix in ('', '.py')} # packages and modules
    own |= {'paramfx', 'weights', 'split_weight'} # the package, and a column
    for code, learn, name in names(TEXT):
        if learn: assert hasattr(Learner, name), code
        else: assert any(hasattr(o, name) for o in (ours, vision, Learner)) or name in own, code


def params_of(f):
    try: return inspect.signature(f).parameters
    except (TypeError, ValueError): return ()
