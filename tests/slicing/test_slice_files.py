"""Files of slices: what is loaded against `materialize`, what is read counted byte by byte, what is damaged refused."""
import builtins
import io
import json
import os
import re
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, load_model, safe_open, save_file
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18, squeezenet1_1
from torchvision.models.densenet import DenseNet

from paramfx.slicing import files as slice_files
from paramfx.export.materialize import materialize, save_recipe
from paramfx.slicing.files import load_slice, save_slices
from paramfx.slicing.slice import at_rate, name_slice, set_rate, slice_model
from paramfx.sparse.sparsify import sparsify
from paramfx.sparse.tied import tie_weights
from fresh import run_fresh


class Tied(nn.Module):
    "Two layers with one weight, and a residual"
    def __init__(self):
        super().__init__()
        self.up, self.a, self.b, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = self.up(x)
        x = x+self.a(x).relu()
        return self.out(x+self.b(x).relu())


def mlp(n=32): return nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.BatchNorm1d(n), nn.ReLU(), nn.Linear(n, 4))
def dense(): return DenseNet(8, (2, 2), 16, num_classes=10)


def sliced(make, x, trained=True, **kw):
    "A sliced network whose slices have seen different things"
    torch.manual_seed(0)
    model = make()
    slice_model(model, x, **kw)
    for r in (1, .75, .5, .25) if trained else ():
        with at_rate(model, r): model.train()(torch.randn_like(x)+r)
    return model.eval()


def same(a, b): return [*a] == [*b] and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


NETS = {'mlp': (mlp, (4, 8), {}), 'affine': (mlp, (4, 8), dict(norm='switch_affine')),
    'rescale': (mlp, (4, 8), dict(rescale=True)), 'groups': (mlp, (4, 8), dict(norm='gn', groups=4)),
        'tied': (Tied, (4, 8), {}), 'concatenations': (dense, (2, 3, 32, 32), {}),
        'depthwise': (lambda: mobilenet_v3_small(num_classes=10), (2, 3, 32, 32), dict(divisor=8)),
        'branches': (lambda: squeezenet1_1(num_classes=10), (2, 3, 64, 64), dict(rescale=True)),
        'residual': (lambda: resnet18(num_classes=10), (2, 3, 32, 32), dict(rates=(1, .75, .5, .25), norm='switch_affine'))}


@pytest.mark.few(5)
@pytest.mark.parametrize('net', NETS)
def test_like_materialize(net, tmp_path):
    make, shape, kw = NETS[net]
    x = torch.randn(shape)
    model = sliced(make, x, **kw)
    with torch.no_grad():  # affine parameters of their own that differ
        for n, p in model.named_parameters(): p.add_(.01*torch.randn_like(p))
    before = deepcopy(model.state_dict())
    file = save_slices(model, tmp_path/'all.safetensors')
    for rate in (1, .5, .25):
        plain, state = materialize(model, x, rate=rate), load_slice(file, rate)
        assert same(state, plain.state_dict())
        assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in state.values())  # nothing of the file is held
    small = load_slice(file, .25, make().eval())
    assert {type(m) for m in small.modules()} == {type(m) for m in plain.modules()}
    assert same(small.state_dict(), plain.state_dict())
    with torch.no_grad(), at_rate(model, .25): assert torch.equal(small(x), model(x))
    assert same(model.state_dict(), before)


def test_shared_weights_stay_shared(tmp_path):
    x = torch.randn(4, 8)
    file = save_slices(sliced(Tied, x), tmp_path/'a')
    assert 'b.weight' not in load_file(file)
    small = load_slice(file, .5, Tied())
    assert small.b.weight is small.a.weight and small.a.weight.shape == (8, 8)
    assert torch.equal(load_slice(file, .5)['b.weight'], small.a.weight)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_types(dtype, tmp_path):
    model = sliced(mlp, torch.randn(4, 8)).to(dtype)
    file = save_slices(model, tmp_path/'a')
    x = torch.randn(4, 8, dtype=dtype)
    assert same(load_slice(file, .5), materialize(model, x, rate=.5).state_dict())
    small = load_slice(file, .5, mlp().to(dtype).eval())
    with torch.no_grad(), at_rate(model, .5): assert torch.equal(small(x), model(x))


def test_named_and_late_slices(tmp_path):
    x = torch.randn(4, 8)
    model = sliced(mlp, x)
    name_slice(model, 'odd', {'0': .25, '2': .75})
    name_slice(model, .6)
    set_rate(model, .5)  # the slice in force is of no concern to the file
    for r in ('odd', .6):
        with at_rate(model, r): model.train()(x*3)
    file = save_slices(model.eval(), tmp_path/'a')
    for r in ('odd', .6, .25, 1):
        plain = materialize(model, x, rate=r)
        assert same(load_slice(file, r), plain.state_dict())
        small = load_slice(file, r, mlp().eval())
        assert torch.equal(small(x), plain(x)) and save_recipe(small, tmp_path/'r').exists()
    assert same(load_slice(file, 3/5), load_slice(file, .6))


def test_the_whole_file_loads_elsewhere(tmp_path):
    "Names and values are those of the sliced network's own state"
    x = torch.randn(4, 8)
    model = sliced(mlp, x)
    assert same(dict(sorted(load_file(save_slices(model, tmp_path/'a')).items())), dict(sorted(model.state_dict().items())))


def test_recal_needs_statistics(tmp_path):
    from paramfx.slicing.plan import slice_plan
    x = torch.randn(4, 8)
    model = sliced(mlp, x, trained=False, norm='recal')
    file = save_slices(model, tmp_path/'a')
    assert same(load_slice(file, 1), materialize(model, x, rate=1).state_dict())
    with pytest.raises(ValueError, match='saved without statistics.*recalibrate'): load_slice(file, .5)
    slice_plan(model).ready.add(.5)
    assert same(load_slice(save_slices(model, file), .5), materialize(model, x, rate=.5).state_dict())


def test_masks_are_made_permanent(tmp_path):
    x = torch.randn(4, 8)
    model = sliced(mlp, x)
    sparsify(model, .5)
    before = deepcopy(model.state_dict())
    state = load_slice(save_slices(model, tmp_path/'a'), .5)
    assert same(state, materialize(model, x, rate=.5, dead=False).state_dict())
    assert (state['2.weight'] == 0).any() and same(before, model.state_dict()) and hasattr(model, '_effects')


# what is read

class Counting(io.FileIO):
    "Notes which bytes are asked for"
    def __init__(self, *args, seen=None):
        super().__init__(*args)
        self.seen = seen

    def readinto(self, buf):
        at = self.tell()
        n = super().readinto(buf)
        self.seen.append((at, n))
        return n


@pytest.fixture
def seen(monkeypatch):
    res = []
    monkeypatch.setattr(slice_files, 'open', lambda f, mode, buffering: Counting(f, seen=res), raising=False)
    return res


def big(): return nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8))


@pytest.mark.parametrize('rate', [.25, .5, 1])
def test_only_the_prefix_is_read(rate, tmp_path, seen):
    x = torch.randn(2, 512)
    model = sliced(big, x, trained=False)
    file = save_slices(model, tmp_path/'a')
    state = load_slice(file, rate)
    assert sum(n for _, n in seen) == sum(t.nbytes for t in state.values())
    # positions: those of the prefix, in the tensor as the header of the file tells where it lies
    with open(file, 'rb') as f:
        n = int.from_bytes(f.read(8), 'little')
        begin = json.loads(f.read(n))['2.weight']['data_offsets'][0]+8+n
    k = int(1024*rate)
    rows = {begin+4096*i: 4*k for i in range(k)} if k < 1024 else {begin: 4*1024*1024}
    assert {at: m for at, m in seen if begin <= at < begin+4*1024*1024} == rows


@pytest.mark.skipif(not os.path.exists('/proc/self/io'), reason='Linux counts what a process reads')
def test_the_system_agrees(tmp_path):
    file = save_slices(sliced(big, torch.randn(2, 512), trained=False), tmp_path/'a')
    read = lambda: int(re.search(r'rchar: (\d+)', open('/proc/self/io').read())[1])
    load_slice(file, .25)
    before = read()
    load_slice(file, .25)
    once = read()-before
    n = sum(t.nbytes for t in load_slice(file, .25).values())
    assert n < .11*file.stat().st_size and n <= once < n+20_000  # .0625 of two weights, .25 of the first; and the header


def test_the_rest_of_the_file_does_not_matter(tmp_path, seen):
    "Every byte that is not read is overwritten"
    x = torch.randn(2, 3, 32, 32)
    file = save_slices(sliced(dense, x), tmp_path/'a')
    state, raw = load_slice(file, .5), file.read_bytes()
    head, keep = 8+int.from_bytes(raw[:8], 'little'), bytearray(len(raw))
    keep[:head] = b'\1'*head
    for at, n in seen: keep[at:at+n] = b'\1'*n
    other = tmp_path/'b'
    other.write_bytes(bytes(b if k else b ^ 255 for b, k in zip(raw, keep)))
    assert sum(keep)-head == sum(t.nbytes for t in state.values()) < .4*(len(raw)-head)  # and nothing twice
    assert same(load_slice(other, .5), state)
    with pytest.raises(ValueError, match='checksum of slice 1.0'): load_slice(other, 1)


# what is refused

@pytest.fixture
def saved(tmp_path):
    x = torch.randn(4, 8)
    model = sliced(lambda: mlp(8), x)
    return save_slices(model, tmp_path/'slices.safetensors'), model, x


def test_unknown_slices(saved):
    file, *_ = saved
    for rate in (.6, .1, 2, 'thin', None, True, [.5], float('nan')):
        with pytest.raises(ValueError, match=re.escape(f'{file}: it has no slice {rate!r}. There are: 1.0, 0.75, 0.5, 0.25. Choose')): load_slice(file, rate)


def test_cut_off(saved, tmp_path):
    raw = saved[0].read_bytes()
    for n in (0, 1, 7, 8, 9, 100, len(raw)//2, len(raw)-1):
        (tmp_path/'short').write_bytes(raw[:n])
        with pytest.raises(ValueError, match='short: not a safetensors file, or damaged.*Copy it anew'): load_slice(tmp_path/'short', 1)
    (tmp_path/'long').write_bytes(raw+b'\0')
    with pytest.raises(ValueError, match='long: not a safetensors'): load_slice(tmp_path/'long', 1)


def test_any_altered_byte(saved, tmp_path):
    "Is found, or harmless"
    file, _, _ = saved
    raw, right, found = file.read_bytes(), load_slice(file, 1), 0
    bad = tmp_path/'bad'
    spots = [*range(0, len(raw), 37), *range(300)]
    for i in spots:
        bad.write_bytes(raw[:i]+bytes([raw[i] ^ 1 << i % 8])+raw[i+1:])
        try: state = load_slice(bad, 1)
        except ValueError as e:
            assert str(e).startswith(f'{bad}: ') and str(e).count('. ') >= 1
            found += 1
        else: assert same(state, right)
    assert found > .7*len(spots)


def rewritten(file, out, **meta):
    with safe_open(file, 'pt') as f: old = f.metadata()
    save_file(load_file(file), out, {**old, **meta})
    return out


def test_newer_files(saved, tmp_path):
    file = saved[0]
    with safe_open(file, 'pt') as f: tag = f.metadata()['paramfx_slices']
    newer = rewritten(file, tmp_path/'newer', paramfx_slices=f'2 99.1.0 {tag[-16:]}', index='of another kind')
    with pytest.raises(ValueError, match=r'newer: written in format 2 by paramfx 99\.1\.0.*reads format 1\. Update'): load_slice(newer, .5)
    for meta in (dict(paramfx_slices='what'), dict(index='{}')):
        with pytest.raises(ValueError, match='altered.*Copy it anew'): load_slice(rewritten(file, tmp_path/'odd', **meta), .5)
    assert same(load_slice(rewritten(file, tmp_path/'copy'), .5), load_slice(file, .5))


def test_foreign_files(saved, tmp_path):
    file, model, _ = saved
    torch.save(model.state_dict(), tmp_path/'a.pth')
    save_file(dict(a=torch.ones(3)), tmp_path/'b')
    (tmp_path/'c').write_text('no tensors at all'*10)
    for name, what in (('a.pth', 'a file of torch'), ('b', 'but not one of `save_slices`'), ('c', 'not a safetensors file')):
        with pytest.raises(ValueError, match=f'{name}: .*{what}.*\\. (Load|Copy)'): load_slice(tmp_path/name, .5)
    with pytest.raises(FileNotFoundError): load_slice(tmp_path/'none', .5)


@pytest.mark.parametrize('make', [lambda: mlp(12), lambda: nn.Linear(8, 4), lambda: nn.Sequential(*mlp(8), nn.Linear(4, 4))])
def test_another_network(saved, make):
    model = make()
    before, kinds = deepcopy(model.state_dict()), [*map(type, model.modules())]
    with pytest.raises(ValueError, match=re.escape(str(saved[0]))+': it does not fit this .*Build the network as it was'): load_slice(saved[0], .5, model)
    assert same(model.state_dict(), before) and kinds == [*map(type, model.modules())] and '_recipe' not in model.__dict__


def test_the_fresh_network_is_left_alone(saved):
    file, model, x = saved
    fresh = mlp(8)
    before = deepcopy(fresh.state_dict())
    small = load_slice(file, .5, fresh)
    assert same(fresh.state_dict(), before) and fresh.training and small.training and type(fresh[0]) is nn.Linear
    with pytest.raises(ValueError, match='sliced already'): load_slice(file, .5, model)


class Extra(nn.Linear):
    def get_extra_state(self): return {'a': 1}
    def set_extra_state(self, state): pass


@pytest.mark.parametrize('spoil, match', [
    (lambda m, x: mlp(8), 'not sliced'),
    (lambda m, x: [m.append(Extra(4, 4)), m][1], 'more than its tensors'),
    (lambda m, x: [m.register_buffer('z', torch.ones(2, dtype=torch.complex128)), m][1], 'z: safetensors cannot hold torch.complex128'),
    (lambda m, x: [m.append(nn.Linear(4, 16)), m.append(nn.Linear(16, 4)),
    tie_weights(m, .5, include=['6', '7']), m][-1], r'6: a TiedLinear is no ordinary layer'),
    (lambda m, x: [m.__dict__.update(_recipe=[dict(verb='v', args=dict(t=torch.ones(2)))]), m][1], 'recipe of this model holds tensors'),
])
def test_what_cannot_be_saved(saved, spoil, match, tmp_path):
    file, model, x = saved
    raw = file.read_bytes()
    with pytest.raises(ValueError, match=match): save_slices(spoil(model, x), file)
    assert file.read_bytes() == raw and [*tmp_path.iterdir()] == [file]


def test_an_old_file_survives_a_crash(saved, monkeypatch, tmp_path):
    file, model, _ = saved
    raw = file.read_bytes()
    def fails(tensors, path, meta):
        path.write_bytes(b'half')
        raise OSError('disk full')
    monkeypatch.setattr('safetensors.torch.save_file', fails)
    with pytest.raises(OSError): save_slices(model, file)
    assert file.read_bytes() == raw and [*tmp_path.iterdir()] == [file]


# a slice for others

@pytest.fixture
def learn(tmp_path):
    import pandas as pd
    from fastai.tabular.all import Categorify, CategoryBlock, Normalize, TabularDataLoaders, accuracy, tabular_learner
    import paramfx.slicing.slice # gives Learner slice  # noqa: F401
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(200, generator=g), torch.randint(0, 3, (200,), generator=g)
    df = pd.DataFrame(dict(a=a.numpy(), b=b.numpy().astype(str), y=(a+b > 1).long().numpy()))
    dls = TabularDataLoaders.from_df(df, tmp_path, [Categorify, Normalize], ['b'], ['a'], 'y',
        valid_idx=range(150, 200), bs=50, y_block=CategoryBlock(), device='cpu')
    return tabular_learner(dls, layers=[32, 16], metrics=accuracy, path=tmp_path)


def fitted(learn):
    from paramfx.core.runs import RunState
    learn.slice(rates=(1, .5, .25)).add_cb(RunState('run'))
    with learn.no_bar(), learn.no_logging():
        for r in (1, .5, .25):
            with at_rate(learn.model, r): learn.fit(1)
    return learn


def preds(learn, rate, dl=None):
    with learn.no_bar(), at_rate(learn.model, rate): return learn.get_preds(dl=dl)[0]


ELSEWHERE = '''
import sys, warnings
sys.modules['paramfx'] = None # whoever needs this library fails
warnings.simplefilter('ignore')
import pandas as pd, torch
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
dl = learn.dls.test_dl(pd.read_csv(sys.argv[2], dtype=dict(b=str)))
with learn.no_bar(), learn.no_logging():
    learn.export('again.pkl')
    torch.save((learn.get_preds(dl=dl)[0], sum(p.numel() for p in learn.model.parameters()),
        learn.opt is not None and len(learn.opt.state), sorted(vars(learn)), [c.name for c in learn.cbs]), sys.argv[3])
'''


def test_a_learner_for_inference(learn, tmp_path):
    fitted(learn)
    opt, cbs, state = learn.opt, [*learn.cbs], deepcopy(learn.model.state_dict())
    file = learn.export_slice(.5, 'small.pkl')
    assert file == tmp_path/'small.pkl'
    assert learn.opt is opt and [*learn.cbs] == cbs and all(cb.learn is learn for cb in cbs) and same(learn.model.state_dict(), state) and len(learn.dls.train)
    rows = learn.dls.valid.dataset.decode()
    rows.items[['a', 'b']].to_csv(tmp_path/'rows.csv', index=False, float_format='%.17g')
    dl = learn.dls.test_dl(__import__('pandas').read_csv(tmp_path/'rows.csv', dtype=dict(b=str)))
    run_fresh(ELSEWHERE, file, tmp_path/'rows.csv', tmp_path/'out', check=True, cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    theirs, n, _, names, cbs = torch.load(tmp_path/'out', weights_only=False)
    assert torch.equal(theirs, preds(learn, .5, dl)) and not torch.equal(theirs, preds(learn, 1, dl))
    assert n == sum(p.numel() for p in materialize(learn.model, learn.dls.one_batch()[:2], rate=.5).parameters())
    assert not {'_reports', '_n_fits', 'run_state'} & {*names} and 'run_state' not in cbs and {'train_eval', 'recorder'} <= {*cbs}


def test_the_learner_trains_on(learn):
    fitted(learn).export_slice(.25, 'small.pkl')
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.paramfx['slice'] and 'run_state' in learn.__dict__


@pytest.mark.parametrize('name, where',
    [('small', 'models/small.pth'), ('deep/small.pt', 'models/deep/small.pt'), ('small.safetensors', 'models/small.safetensors')])
def test_plain_weights(learn, tmp_path, name, where):
    fitted(learn)
    name_slice(learn.model, 'odd', .25)
    file = learn.export_slice('odd', name)
    assert file == tmp_path/where
    plain = materialize(learn.model, tuple(learn.dls.one_batch()[:2]), rate='odd')
    state = load_file(file) if name.endswith('safetensors') else torch.load(file, weights_only=True)
    assert same(dict(sorted(state.items())), dict(sorted(plain.state_dict().items())))
    assert same(state, {k: load_slice(save_slices(learn.model, tmp_path/'all'), 'odd')[k] for k in state})


def test_shared_weights_as_tensors(tmp_path):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    x = torch.randn(8, 8)
    dls = DataLoaders.from_dsets([*zip(x, x[:, :4])], [*zip(x, x[:, :4])], bs=4, device='cpu')
    learn = Learner(dls, Tied(), loss_func=nn.MSELoss(), path=tmp_path).slice()
    plain = materialize(learn.model, x, rate=.5)
    other = deepcopy(plain)
    for p in other.parameters(): p.data.zero_()
    load_model(other, learn.export_slice(.5, 'a.safetensors'))
    assert same(other.state_dict(), plain.state_dict())


def test_bad_exports(learn, tmp_path):
    with pytest.raises(ValueError, match='not sliced'): learn.export_slice(.5, 'a.pth')
    fitted(learn)
    there = sorted(tmp_path.rglob('*'))
    for rate, name, match in ((.6, 'a.pth', 'rate=0.6: not prepared'), (.1, 'a.pkl', 'narrowest '
        'that was prepared'), ('no', 'a.pth', 'no slice has this name'), (.5, 'a.tflite', r"a\.tflite: no such format. End the name in \.pth")):
        with pytest.raises(ValueError, match=match): learn.export_slice(rate, name)
    assert sorted(tmp_path.rglob('*')) == there


def test_onnx(tmp_path):
    pytest.importorskip('onnxscript')
    ort = pytest.importorskip('onnxruntime')
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    x = torch.randn(6, 8)
    dls = DataLoaders.from_dsets([*zip(x, x[:, :4])], [*zip(x, x[:, :4])], bs=2, device='cpu')
    learn = Learner(dls, mlp(), loss_func=nn.MSELoss(), path=tmp_path).slice()
    file = learn.export_slice(.25, 'small.onnx')
    assert file == tmp_path/'small.onnx' and [*tmp_path.iterdir()] == [file] and learn.model.training
    session = ort.InferenceSession(str(file))
    for n in (1, 2, 6):  # any batch
        with torch.no_grad(), at_rate(learn.model.eval(), .25): want = learn.model(x[:n])
        torch.testing.assert_close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x[:n].numpy()})[0]), want)
    real = builtins.__import__
    def without(name, *args, **kw):
        if name == 'onnxscript': raise ImportError(name)
        return real(name, *args, **kw)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(builtins, '__import__', without)
        with pytest.raises(ImportError, match=r'needs onnx and onnxscript.*pip install'): learn.export_slice(.25, 'other.onnx')
    assert not (tmp_path/'other.onnx').exists()
