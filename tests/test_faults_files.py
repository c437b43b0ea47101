"A file of a network that a verb has changed says so where it does not fit, and what to do; what was to be filled stays as it was."
import json

import pytest
import torch
from torch import nn

from contracts import build, run_record, same, small_net, snapshot, two_groups
from paramfx.all import DynamicSparse, IterativePrune, KnowledgeEvolution, RunState, load_recipe, save_recipe
from paramfx.core.samples import sample_batch
from paramfx.core.samples import rng_state
from paramfx.core.runs import stored_steps
from paramfx.core.state import effects
from fresh import run_fresh

pytestmark = pytest.mark.filterwarnings('ignore')

def net():
    "The small network with three layers more, so that there is something to split and to share"
    res = small_net()
    for _ in range(2): res[0].extend(nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()))
    res[1].extend(nn.Sequential(nn.ReLU(), nn.Linear(10, 10)))
    return res

def new(path, seed=0, **kw): return build(path, seed=seed, model=net, splitter=two_groups, **kw)

def slim(learn):
    learn.add_cb(IterativePrune(.6, 1, granularity='filter'))
    learn.fit(1)
    return learn.materialize()

def evolved(learn):
    learn.evolve(1, 1)
    return learn.extract_slim()

SHARED = dict(shared_rank=6, unique_rank=2, scale_rank=False, basis_norm=False, groups={'body': ['0.6', '0.8']})
CHANGES = {  # how -> (change a Learner, what the message calls it, can the same call on a fresh network be followed by `load`?)
    'split': (lambda l: l.split(splits={'0.8': 2, '1.2': 2, '1.4': 2}, classes='random'), r'after `split` \(', True),
    'tie': (lambda l: l.tie(.5), r'after `tie` \(4|after `tie` \(5', True),
    'share_bases': (lambda l: l.share_bases(**SHARED), r'after `share_bases` \(2 layers, 1 bases\)', True),
    'slice': (lambda l: l.slice(rates=(1, .5)), r'after `slice` \(rates 1, 0.5\)', True),
    'materialize': (slim, r'after `cut` \(', False),
    'tie, then materialize': (lambda l: l.tie(.5).materialize(), r'', None),  # an ordinary network of the same shape again: it fits
    'slice, then a slice': (lambda l: l.slice(rates=(1, .5)).materialize(rate=.5), r'after `slice` \(rates 1, 0.5\), `materialize` \(', False),
    'evolve': (evolved, r'after `cut` \(', False),
}
SAVES = {'save': lambda l: l.save('it'), 'save_plain': lambda l: l.save_plain('it')}

@pytest.fixture(params=CHANGES)
def how(request): return request.param


@pytest.mark.parametrize('save', SAVES)
def test_file_of_a_changed_network_on_the_one_it_was_made_of(how, save, tmp_path):
    change, told, again = CHANGES[how]
    learn = change(new(tmp_path))
    path = SAVES[save](learn)
    other = new(tmp_path, seed=3)
    if again is None: return assert_filled(other.load('it', with_opt=False), learn)
    state, rng = snapshot(other.model), rng_state(other.dls)
    with pytest.raises(ValueError, match=told) as e: other.load('it')
    said = str(e.value)
    assert str(path) in said and 'this one is as it was built' in said and '\n' not in said and 'Missing key' not in said
    assert not same(snapshot(other.model), state) and not same(rng_state(other.dls), rng)
    assert (f'`learn.{how}(...)`' in said) == again
    if again: assert_filled(change(new(tmp_path, seed=3)).load('it', with_opt=False), learn)  # the first remedy
    fresh = new(tmp_path, seed=4).model
    assert f'load_recipe({str(path)!r}, net)' in said or not again and save == 'save_plain'
    made = eval(f'load_recipe({str(path)!r}, net)', dict(load_recipe=load_recipe, net=fresh))  # the second
    assert_filled(made, learn)
    other = build(tmp_path, model=lambda: made)
    other.load('it', with_opt=False)
    assert_filled(other, learn)


def assert_filled(got, learn):
    a, b = (m if isinstance(m, nn.Module) else m.model for m in (got, learn))
    x = sample_batch(learn.dls, 8)
    with torch.no_grad(): assert torch.equal(a.eval()(*x), b.eval()(*x))


def test_file_of_the_network_as_it_was_built_on_a_changed_one(how, tmp_path):
    change, told, again = CHANGES[how]
    new(tmp_path, seed=5).save('it')
    learn = change(new(tmp_path))
    if again is None or how == 'slice': return learn.load('it', with_opt=False)  # a dense file fits, by intention
    state = snapshot(learn.model)
    with pytest.raises((ValueError, RuntimeError), match='before') as e: learn.load('it')
    assert 'Missing key' not in str(e.value) and ('ordinary layer' in str(e.value) or 'holds a network as it was built' in str(e.value))
    assert not same(snapshot(learn.model), state)


@pytest.mark.parametrize('kind', ['weights of torch', 'of an older version'])
def test_file_that_does_not_tell(how, kind, tmp_path):
    "Nothing is claimed that is not known"
    change, told, again = CHANGES[how]
    if again is None: pytest.skip('it fits')
    learn = change(new(tmp_path))
    state = dict(learn.model.state_dict())
    torch.save(state if kind == 'weights of torch' else dict(model=state, opt=None),
        tmp_path/'models'/'it.pth') if (tmp_path/'models').mkdir(exist_ok=True) is None else None
    other = new(tmp_path, seed=3)
    with pytest.raises(ValueError, match='The file does not tell how its network was changed.*do the same to the network as it was built, then load') as e:
        other.load('it')
    assert 'after' not in str(e.value)
    with pytest.raises(ValueError, match='no file of `save_recipe`, but a file of .*`learn.load.*does not tell how'):
        load_recipe(tmp_path/'models'/'it.pth', net())


def test_changed_in_another_way(tmp_path):
    new(tmp_path).share_bases(**SHARED).save('it')
    learn = new(tmp_path).tie(.5)
    state, facts = snapshot(learn.model), [dict(s.values) for s in effects(learn.model).values()]
    with pytest.raises(ValueError, match=r'after `share_bases` .*, and this one is after '
        r'`tie`.*`learn.share_bases\(...\)`\), then load, or begin with `load_recipe'): learn.load('it')
    assert not same(snapshot(learn.model), state) and [dict(s.values) for s in effects(learn.model).values()] == facts


def test_another_network_that_was_changed_likewise(tmp_path):
    "No verb is at fault"
    build(tmp_path, model=small_net).tie(.5).save('it')
    learn = build(tmp_path, model=lambda: small_net(norm=False)).tie(.5)
    with pytest.raises(ValueError, match='Build the network as it was when the file was saved, and change it with the same settings'): learn.load('it')


def test_refused_file_leaves_masks_and_history(tmp_path):
    slim(new(tmp_path)).save('it')
    learn = new(tmp_path, cbs=DynamicSparse(.8, period=2))
    learn.fit(1)
    st, state = effects(learn.model)['dynamic_sparse'], snapshot(learn.model)
    history, steps, masks = [dict(h) for h in st.history], st.clock.steps, {k: v.clone() for k, v in st.holder.masks.items()}
    assert history and steps
    with pytest.raises(ValueError, match='`cut`|masks'): learn.load('it')
    assert not same(snapshot(learn.model), state) and st.history == history and st.clock.steps == steps and not same(dict(st.holder.masks), masks)
    learn.fit(1)


def test_effects_in_force_are_in_the_recipe(tmp_path):
    "A network that was cut and then masked"
    learn = slim(new(tmp_path)).sparsify(.5, method='static')
    learn.fit(1)
    made = load_recipe(learn.save('it'), net())
    assert_filled(made, learn)
    assert 'dynamic_sparse' in effects(made)
    learn.release()
    learn.add_cb(KnowledgeEvolution(policy='wels', reinit=lambda name, w, generator: w))  # a function is no plain data
    with pytest.raises(ValueError, match='effects in force that cannot be recorded.*knowledge_evolution_effect'): load_recipe(learn.save('it'), net())


def test_resume_on_another_structure(tmp_path):
    learn = new(tmp_path).tie(.5)
    learn.fit(1, cbs=RunState())
    other = new(tmp_path, seed=3)
    state = snapshot(other.model)
    with pytest.raises(ValueError, match='run.pth: it does not fit.*after `tie`.*`learn.tie'): other.resume()
    assert not same(snapshot(other.model), state)
    again = new(tmp_path, seed=3).tie(.5).resume()
    again.fit(1)
    assert not same(run_record(again)['model'], run_record(learn)['model'])


def test_each_reader_names_the_file_it_was_given(tmp_path):
    "Files of torch, crosswise: what it is, and which call reads it"
    learn = new(tmp_path)
    learn.fit(1, cbs=RunState())
    learn.save('saved')
    learn.save_plain('plain')
    save_recipe(learn.model, tmp_path/'models'/'recipe.pth')
    learn.evolve(1, 1, file='evolution')
    torch.save([1], tmp_path/'models'/'odd.pth')
    files = dict(run='`RunState`. Continue its run with `learn.resume`', saved='`learn.save`. Read it with `learn.load`', plain='weights alone',
                 recipe='`save_recipe`. Read it with `load_recipe', evolution='`learn.evolve`. Go on with `learn.evolve')
    def told(f, file, text):
        state = snapshot(learn.model)
        with pytest.raises(ValueError) as e: f(file)
        assert text in str(e.value) and f'{file}' in str(e.value), str(e.value)
        assert not same(snapshot(learn.model), state)
    for file in ('run', 'recipe', 'evolution'): told(learn.load, file, files[file])
    for file in ('saved', 'plain', 'recipe', 'evolution'): told(learn.resume, file, files[file])
    for file in ('run', 'evolution'): told(lambda n: load_recipe(tmp_path/'models'/f'{n}.pth', net()), file, files[file])
    for file in ('run', 'saved', 'plain', 'recipe'): told(lambda n: learn.evolve(1, 1, file=n, resume=True), file, files[file])
    told(learn.resume, 'odd', 'damaged, or no file of `RunState`')
    told(lambda n: load_recipe(tmp_path/'models'/f'{n}.pth', net()), 'odd', 'no file of `save_recipe`')
    learn.load('saved')  # `evolve` has trained it on
    for file in ('saved', 'plain'): assert_filled(load_recipe(tmp_path/'models'/f'{file}.pth', net()), learn)


def test_files_load_without_this_library(tmp_path):
    "What they tell stands where torch keeps version numbers: strictly loaded by torch, and by fastai, in a process that knows neither"
    learn = slim(new(tmp_path))
    learn.save('it')
    learn.save_plain('bare')
    sd = torch.load(tmp_path/'models'/'bare.pth', weights_only=True)
    assert list(sd) == list(learn.model.state_dict()) and [s['verb'] for s in stored_steps(sd)] == ['cut']
    widths = json.dumps({k: list(v.shape) for k, v in sd.items()})
    code = f"""
import json, sys, torch
from torch import nn
from fastai.basics import *
from fastai.test_utils import synth_dbunch
w = json.loads({widths!r})
conv = lambda i, **kw: nn.Conv2d(w[f'0.{{i}}.weight'][1], w[f'0.{{i}}.weight'][0], 3, padding=1, **kw)
body = nn.Sequential(conv(0), nn.BatchNorm2d(w['0.1.weight'][0]), nn.ReLU(),
        conv(3, stride=2), nn.BatchNorm2d(w['0.4.weight'][0]), nn.ReLU(), conv(6), nn.ReLU(), conv(8), nn.ReLU())
net = nn.Sequential(body, nn.Sequential(nn.Flatten(), nn.Dropout(0), nn.Linear(*w['1.2.weight'][::-1]), nn.ReLU(), nn.Linear(*w['1.4.weight'][::-1])))
net.load_state_dict(torch.load({str(tmp_path/'models'/'bare.pth')!r}, weights_only=True))
learn = Learner(synth_dbunch(), net, path={str(tmp_path)!r}, loss_func=nn.MSELoss(), splitter=lambda m: [params(m[0]), params(m[1])])
learn.load('it', with_opt=True)
assert 'paramfx' not in sys.modules
"""
    res = run_fresh(code)
    assert res.returncode == 0, res.stderr[-2000:]
    assert 'optimizer' not in res.stderr


def test_saving_leaves_the_network_alone(tmp_path):
    learn = new(tmp_path).tie(.5)
    learn.save('it')
    learn.save_plain('it')
    assert not learn.model._state_dict_hooks and not stored_steps(learn.model.state_dict())


def test_split_in_another_order_is_filled(tmp_path):
    "Other groups of the same sizes: which units they hold comes with the file"
    a, b = (new(tmp_path).split(splits={'0.8': 2, '1.2': 2, '1.4': 2}, classes='random', seed=s) for s in (0, 1))
    a.save('it')
    b.load('it', with_opt=False)
    assert_filled(b, a)
