"""Sparse files: round trips of all kinds of tensors, every way of damage, files made to harm, and masks in force."""
import json
import os
import re
import subprocess
import sys
import tracemalloc
import zlib
from copy import deepcopy
from functools import partial
from hashlib import blake2b

import numpy as np
import pytest
import safetensors.torch
import torch
from fastai.basics import Adam, OptimWrapper
from hypothesis import example, given, settings, strategies as st
from torch import nn

from contracts import build, opt_state_of, small_net
from paramfx.kernels.csr import CSR, to_csr, to_dense, why_not_csr
from paramfx.sparse.coding import decode_mask, encode_mask, mask_entropy, plan_code
from paramfx.sparse.prune import IterativePrune
from paramfx.sparse.callback import DynamicSparse
from paramfx.sparse.plots import MaskRecorder
from paramfx.sparse.container import SealedFile, packed, write_sealed
from paramfx.sparse.sparsify import sparsify
from paramfx.sparse.tensors import BLOCK
from paramfx.sparse.files import load_sparse, save_sparse
from paramfx.core.state import effects
from paramfx.sparse.methods import DSR, GraNet
from fresh import run_fresh

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning', 'ignore::FutureWarning')


# -- the code of masks

def rice_by_hand(mask, k):
    "The same code, one gap after another, with strings of bits"
    rare = 1 if 2*sum(mask) <= len(mask) else 0
    gaps, last = [], -1
    for i, m in enumerate(mask):
        if m == rare: gaps.append(i-last-1); last = i
    streams = [''.join('0'*(g >> k) + '1' for g in gaps), *(''.join(str(g >> j & 1) for g in gaps) for j in range(k))]
    return b''.join(int((s+'0'*(-len(s) % 8))[i:i+8], 2).to_bytes(1, 'big') for s in streams for i in range(0, len(s), 8))


@example([False]*204+[True], 4) # one gap: each plane of bits fills a byte
@settings(deadline=None, max_examples=150)
@given(st.one_of(st.lists(st.booleans(), max_size=300), st.tuples(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 9)).map(
    lambda a: list(np.random.default_rng(a[2]).random(a[0]) < a[1]))), st.integers(0, 6))
def test_coder(mask, k):
    mask = np.array(mask, bool)
    live, best, size = plan_code(mask)
    assert live == mask.sum() and size == len(encode_mask(mask, best)) <= len(encode_mask(mask, k))
    code = encode_mask(mask, k)
    assert code.tobytes() == rice_by_hand(mask.tolist(), k)
    for j, c in ((k, code), (best, encode_mask(mask, best))): assert (decode_mask(c, live, j, len(mask)) == mask).all()


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 16), st.integers(0, 200))
def test_any_bytes_are_a_mask_or_refused(code, live, k, units):
    try: mask = decode_mask(np.frombuffer(code, np.uint8), live, k, units)
    except ValueError as e: assert 'code of a mask' in str(e)
    else: assert mask.shape == (units,) and mask.sum() == live


@pytest.mark.parametrize('density', [.2, .1, .05, .02])
def test_near_entropy(density):
    mask = np.random.default_rng(0).random(10**6) < density
    live, _, size = plan_code(mask)
    assert .999*mask_entropy(live, 10**6) < size < 1.025*mask_entropy(live, 10**6)


# -- round trips

class Odd(nn.Module):
    "Every kind of tensor a state can hold"
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.lin, self.tied = nn.Linear(30, 40, dtype=dtype), nn.Linear(30, 40, bias=False, dtype=dtype)
        self.tied.weight = self.lin.weight
        self.conv, self.bn = nn.Conv2d(6, 8, 3, dtype=dtype), nn.BatchNorm2d(8)
        self.up, self.rnn, self.emb = nn.ConvTranspose1d(6, 8, 5, dtype=dtype), nn.LSTM(10, 12, 2, bidirectional=True), nn.Embedding(20, 12,
            padding_idx=0)
        self.scale, self.none = nn.Parameter(torch.tensor(3.5)), nn.Parameter(torch.empty(0, 4))
        for n, b in dict(flags=torch.tensor([True, False, True]), ids=torch.arange(5),
            few=torch.arange(3, dtype=torch.int8), one=torch.tensor(7, dtype=torch.uint8),
                         wave=torch.randn(3, dtype=torch.complex64), brain=torch.randn(5).bfloat16(), wide=torch.randn(2, 2).double(),
                         tiny=torch.tensor([-3], dtype=torch.int16)).items():
            self.register_buffer(n, b)
        self.register_buffer('gone', torch.ones(9), persistent=False)


def thin(model, density, seed=0):
    "Exact zeros in all matrices"
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.mul_(torch.rand(p.shape, generator=gen) < density)
    return model


def fresh(make, seed=1):
    torch.manual_seed(seed)
    return make()


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}

def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('density', [0., .02, .1, .5, .9, 1.])
def test_round_trip(tmp_path, dtype, density):
    model = thin(fresh(partial(Odd, dtype), 0), density)
    model.bn.num_batches_tracked += 5
    file = save_sparse(model, tmp_path/'a.safetensors')
    other = fresh(partial(Odd, dtype))
    assert load_sparse(file, other) is other and other.tied.weight is other.lin.weight
    assert_same(state(other), state(model))
    assert safetensors.torch.load_file(file)['index'].dtype == torch.uint8


@pytest.mark.parametrize('name,n', [('one live', 1), ('all but one', 2399), ('half', 1200)])
def test_edges_of_a_mask(tmp_path, name, n):
    model = nn.Linear(60, 40)
    with torch.no_grad(): model.weight.view(-1)[torch.randperm(2400, generator=torch.Generator().manual_seed(0))[n:]] = 0
    other = load_sparse(save_sparse(model, tmp_path/'a'), nn.Linear(60, 40))
    assert_same(state(other), state(model))


def test_many_blocks_and_special_values(tmp_path):
    model = thin(nn.Linear(700, 3*BLOCK//700+5), .03)
    with torch.no_grad(): model.weight.view(-1)[[0, BLOCK-1, BLOCK, BLOCK+7]] = torch.tensor([float('nan'), float('inf'), 1e-45, -float('inf')])
    with torch.no_grad(): model.weight.view(-1)[2*BLOCK:3*BLOCK] = 0  # a block of which nothing is left
    other = load_sparse(save_sparse(model, tmp_path/'a'), nn.Linear(*model.weight.shape[::-1]))
    assert model.weight.view(torch.int32)[model.weight != 0].equal(other.weight.view(torch.int32)[model.weight != 0])
    assert other.weight[model.weight == 0].eq(0).all() and int(other.weight.count_nonzero()) == int(model.weight.count_nonzero())


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', torch.float16])
def test_precision_of_live_values_only(tmp_path, dtype):
    model = thin(fresh(Odd, 0), .1)
    other, kind = load_sparse(save_sparse(model, tmp_path/'a', dtype=dtype), fresh(Odd)), getattr(torch, str(dtype).rpartition('.')[2])
    for k, v in model.state_dict().items():
        coded = v.ndim > 1 and v.numel() > 0 and k != 'wide'
        assert torch.equal(other.state_dict()[k], v.to(kind).to(v.dtype) if coded else v), k
    assert (tmp_path/'a').stat().st_size < save_sparse(model, tmp_path/'b').stat().st_size


@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
def test_memory_formats(tmp_path, layout):
    make = lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3))
    model, other = thin(make(), .2).to(memory_format=layout), make().to(memory_format=torch.channels_last)
    load_sparse(save_sparse(model, tmp_path/'a'), other)
    assert_same(state(other), state(model))
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('unit,bits', [('weight', 72), ('kernel', 8), ('filter', 8)])
def test_whole_kernels_are_found_in_zeros(tmp_path, unit, bits):
    model, plain = nn.Sequential(nn.Conv2d(32, 64, 3, bias=False)), nn.Sequential(nn.Conv2d(32, 64, 3, bias=False))
    sparsify(model, .5, granularity=unit, include='0')
    plain[0].weight.data.copy_(model[0].weight.data)
    for net in (model, plain):
        file = save_sparse(net, tmp_path/f'{unit}.safetensors')
        n = len(safetensors.torch.load_file(file)['gaps'])
        assert n <= 32*64*bits/64 and torch.equal(load_sparse(file, nn.Sequential(nn.Conv2d(32, 64, 3, bias=False)))[0].weight, model[0].weight)


def test_shared_and_wrapped_modules(tmp_path):
    block = nn.Linear(20, 20)
    model = thin(nn.Sequential(block, nn.ReLU(), block), .1)
    twin = nn.Linear(20, 20)
    other = nn.Sequential(twin, nn.ReLU(), twin)
    load_sparse(save_sparse(nn.DataParallel(model), tmp_path/'a'), nn.DataParallel(other))
    assert_same(state(other), state(model))
    with pytest.raises(ValueError, match='it lacks 2.weight, 2.bias, which this model has'):
        load_sparse(tmp_path/'a', nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20)))


def test_given_masks(tmp_path):
    model = thin(nn.Linear(50, 40), .1)
    mask = (model.weight != 0) | (torch.rand(40, 50) < .1)  # some of them live at 0
    other = nn.Linear(50, 40)
    sparsify(other, 1-int(mask.sum())/2000+1e-6, init_mask={'weight': mask.roll(1, 0)})
    load_sparse(save_sparse(model, tmp_path/'a', masks={'weight': mask}), other)
    assert torch.equal(other.weight_mask, mask) and torch.equal(other.weight, model.weight)
    for masks, match in (({'w': mask}, "'w' is no parameter"),
        ({'weight': mask.float()}, 'needs a bool tensor'), ({'weight': mask[:7]}, r'of shape \(40, 50\)'),
                         ({'weight': torch.zeros_like(mask)}, 'not 0 where the mask is False')):
        with pytest.raises(ValueError, match=match): save_sparse(model, tmp_path/'a', masks=masks)


def test_what_cannot_be_saved(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self): return {'a': 1}
    with pytest.raises(ValueError, match='keeps more than tensors'): save_sparse(Extra(3, 4), tmp_path/'a')
    model = nn.Linear(3, 4)
    model.register_buffer('c', torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(ValueError, match='c: safetensors has no name for torch.complex128'): save_sparse(model, tmp_path/'a')
    with pytest.raises(ValueError, match="dtype='half'"): save_sparse(nn.Linear(3, 4), tmp_path/'a', dtype='half')
    assert not list(tmp_path.iterdir())


# -- damage

@pytest.fixture(params=['plain', 'csr'])
def small(tmp_path, request):
    "A small file, and a network to load it into that must not change; with CSR layers in both, or in none"
    make = lambda: nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
    model, other = thin(fresh(make, 0), .2), fresh(make)
    file = save_sparse(model, tmp_path/'small.safetensors')
    if request.param == 'csr':
        before = file.read_bytes()
        to_csr(model[0]); to_csr(other[0], torch.rand(16, 12) < .3)
        assert save_sparse(model, file).read_bytes() == before
    return file, other, state(other)


def refused(data, path, model, match=''):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as e: load_sparse(path, model)
    text = str(e.value)
    assert text.startswith(f'{path}: ') and text.endswith('.') and len(text) < 400
    return text


def test_every_truncation(small, tmp_path):
    file, other, before = small
    data = file.read_bytes()
    for n in range(len(data)): refused(data[:n], tmp_path/'cut', other)
    refused(data+b'\0', tmp_path/'cut', other, 'checksum')
    assert_same(state(other), before)


def test_flipped_bits(small, tmp_path):
    file, other, before = small
    data, rng = file.read_bytes(), np.random.default_rng(0)
    for i in [*range(0, 8*90, 5), *rng.choice(8*len(data), 200, replace=False)]:  # all of the beginning, and 200 anywhere
        flipped = bytearray(data)
        flipped[i//8] ^= 1 << i % 8
        refused(flipped, tmp_path/'flip', other)
    assert_same(state(other), before)


def test_foreign_files(small, tmp_path):
    _, other, before = small
    safetensors.torch.save_file(before, tmp_path/'plain.safetensors')
    torch.save(before, tmp_path/'plain.pth')
    for name, match in (('plain.safetensors', r'but not one of `save_sparse`. Load it with .* `safetensors.torch.load_file`'),
        ('plain.pth', 'a file of torch')):
        refused((tmp_path/name).read_bytes(), tmp_path/name, other, match)
    for data in (b'', b'hello', b'\0'*1000, b'[]'*100): refused(data, tmp_path/'x', other, 'not a file of `save_sparse`')
    with pytest.raises(FileNotFoundError): load_sparse(tmp_path/'nowhere', other)


def test_other_networks(small):
    file, other, _ = small
    for model, match in ((nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)),
        r'2.weight has shape \(2, 16\) there and \(5, 16\) in this model'),
                         (nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16)), 'it has 2.weight, 2.bias, and this model does not'),
                         (nn.Sequential(*other, nn.Linear(2, 2)), 'it lacks 3.weight, 3.bias, which this model has')):
        before = state(model)
        with pytest.raises(ValueError, match=match): load_sparse(file, model)
        assert_same(state(model), before)
    other[1].num_batches_tracked = other[1].num_batches_tracked.int()
    with pytest.raises(ValueError, match='1.num_batches_tracked is of torch.int64 there and of torch.int32'): load_sparse(file, other)


# -- files made to harm: their checksum is right

def resealed(data):
    "Set length of the header and checksum of altered bytes"
    m = re.search(rb'paramfx_sparse":"\d+ \S+ ([0-9a-f]{16})"', data)
    zeroed = data[:m.start(1)] + b'0'*16 + data[m.end(1):]
    return zeroed[:m.start(1)] + blake2b(zeroed, digest_size=8).hexdigest().encode() + zeroed[m.end(1):]


def with_header(data, change):
    n = int.from_bytes(data[:8], 'little')
    head = json.loads(data[8:8+n])
    head = json.dumps(change(head) or head, separators=(',', ':')).encode()
    return resealed(len(head).to_bytes(8, 'little') + head + data[8+n:])


def with_index(file, change, path):
    "The same regions with another index"
    with open(file, 'rb') as f:
        src = SealedFile(f, 'x')
        rows = src.unpack('index', 10**6)
        kinds = {k: k.rpartition('.')[2] if '.' in k else 'U8' for k in src.regions}
        regions = [(k, kinds[k], n, partial(lambda b: [b], src.read(at, n))) for k, (at, n) in src.regions.items() if k != 'index']
    text = packed(change(rows) or rows)
    return write_sealed(path, [*regions, ('index', 'U8', len(text), lambda: [text])]).read_bytes()


def put(i, j, value):
    def change(rows): rows[i][j] = value
    return change


HUGE = 2**61
INDEXES = dict(
    shape=put(0, 2, [HUGE, HUGE]), negative=put(0, 2, [-16, -12]), floats=put(0, 2, [16., 12.]), nested=put(0, 2, [[16], [12]]), dtype=put(0, 1,
        'F99'), odd_dtype=put(0, 1, ['F32']),
    live=put(0, 3, [HUGE, 1, 4]), shift=put(0, 3, [48, HUGE, 4]), length=put(0, 3, [48, 1, HUGE]), blocks=put(0, 3, [48, 1, 4]*5000), few=put(0, 3,
        [48, 1]), text=put(0, 3, 'abc'),
    fewer=put(0, 3, [47, 2, 24]), dead=put(0, 3, [0, 0, 0]), name=put(0, 0, 'weight'), number=put(0, 0, 5), twice=lambda rows: [*rows,
        rows[0]], nothing=lambda rows: rows.clear(), none=lambda rows: {'a': 1},
    string=lambda rows: 'abc', short=lambda rows: [[]], units=lambda rows: [[*rows[0], [HUGE, 1]], *rows[1:]], tiles=lambda rows: [[*rows[0], [0, 0]],
        *rows[1:]], one=lambda rows: [[*rows[0], [1, 1]], *rows[1:]],
    ints=lambda rows: [[r[0], 'I64', *r[2:]] for r in rows], bomb=lambda rows: '0'*10**7, deep=lambda rows: json.loads('['*500 + ']'*500))


@pytest.mark.parametrize('name', INDEXES)
def test_hostile_index(small, tmp_path, name):
    file, other, before = small
    data = with_index(file, INDEXES[name], tmp_path/'bad')
    load_sparse(file, other)  # imports
    other.load_state_dict(before)
    tracemalloc.start()
    refused(data, tmp_path/'bad', other)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21 and not [k for k, v in state(other).items() if not torch.equal(v, before[k])]


def entry(name, **kw):
    def change(head): head[name].update(kw)
    return change

HEADERS = dict(size=entry('values.F32', shape=[HUGE], data_offsets=[0, 4*HUGE]),
    overlap=entry('gaps', data_offsets=[0, 8]), text=entry('gaps', shape='a'), bool=entry('gaps', shape=[True]),
               backwards=entry('values.F32', data_offsets=[40, 0]), kind=entry('gaps', dtype='F32'), shape=entry('values.F32',
                   shape=[2, 2]), no_index=lambda h: {k: v for k, v in h.items() if k != 'index'},
               unknown=lambda h: dict(h, **{'values.F128': h['gaps']}), more=lambda h: dict(h, x=dict(dtype='U8', shape=[0], data_offsets=[0, 0])))


@pytest.mark.parametrize('name', HEADERS)
def test_hostile_header(small, tmp_path, name):
    file, other, before = small
    text = refused(with_header(file.read_bytes(), HEADERS[name]), tmp_path/'bad', other)
    assert 'header' in text or 'index' in text
    assert_same(state(other), before)


def test_hostile_sizes_of_the_whole(small, tmp_path):
    file, other, _ = small
    data = file.read_bytes()
    refused(resealed(b'\xff'*8 + data[8:]), tmp_path/'bad', other, 'a header of 18446744073709551615 bytes')
    refused(resealed((3).to_bytes(8, 'little') + data[8:]), tmp_path/'bad', other, 'no JSON')
    bomb = zlib.compress(b'['*10**7, 9)
    refused(write_sealed(tmp_path/'b', [('index', 'U8', len(bomb), lambda: [bomb])]).read_bytes(), tmp_path/'bad', other, 'its index has more than')
    refused(write_sealed(tmp_path/'b', [('index', 'U8', 5, lambda: [b'abcde'])]).read_bytes(), tmp_path/'bad', other, 'cannot be unpacked')
    future = data.replace(b'sparse":"1 0', b'sparse":"2 7')
    refused(future, tmp_path/'bad', other, r'written in format 2 by paramfx 7[\w.]*; this is paramfx .* Install paramfx 7')


@pytest.mark.parametrize('seed', range(3))
def test_hostile_codes(small, tmp_path, seed):
    "Wrong codes with right sizes: refused, or a mask with as many live units"
    file, other, before = small
    data, rng = file.read_bytes(), np.random.default_rng(seed)
    with open(file, 'rb') as f: at, n = SealedFile(f, 'x').regions['gaps']
    outcomes = set()
    for _ in range(30):
        bad = data[:at] + rng.integers(0, 256, n, np.uint8).tobytes() + data[at+n:] if rng.random() < .5 else bytearray(data)
        bad = bytearray(bad)
        bad[at+rng.integers(n)] ^= 1 << rng.integers(8)
        (tmp_path/'bad').write_bytes(resealed(bytes(bad)))
        other.load_state_dict(before)
        try: load_sparse(tmp_path/'bad', other)
        except ValueError: outcomes.add('refused'); assert_same(state(other), before)
        else: outcomes.add('loaded')
    assert 'refused' in outcomes


# -- CSR layers made by hand

def some_csr(model, density=None, seed=0):
    "Linear layers and 1x1 convolutions of `model` as CSR layers; live is what is not zero, or a random share"
    gen = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if not why_not_csr(m): to_csr(m, None if density is None else torch.rand(m.weight.shape, generator=gen) < density)
    return model


def pixels(dtype=torch.float32):
    "All kinds of layers that can be sparse, one of more than a block, one that is shared, and one that cannot"
    shared = nn.Linear(40, 40, dtype=dtype)
    return nn.Sequential(nn.Conv2d(3, 8, 3, dtype=dtype), nn.Conv2d(8, 300, 1, dtype=dtype),
        nn.BatchNorm2d(300), nn.Conv1d(6, 7, 1, bias=False, dtype=dtype), nn.Conv3d(4, 5, 1, dtype=dtype),
                         nn.Linear(400, 3*BLOCK//400+9, dtype=dtype), shared, nn.ReLU(), shared, nn.Linear(5, 1, bias=False, dtype=dtype))


def dense_state(model):
    "As the plain network would have it"
    model = deepcopy(model)
    for m in model.modules():
        if isinstance(m, CSR): to_dense(m)
    return state(model)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('density', [.02, .1, .9, 1.])
@pytest.mark.parametrize('half', [None, 'bfloat16'])
def test_csr_layers_make_the_same_file(tmp_path, dtype, density, half):
    make, kind = partial(fresh, partial(pixels, dtype)), getattr(torch, str(half), dtype)
    plain = thin(make(0), density)
    masks = {f'{i}.weight': plain[i].weight != 0 for i in (1, 3, 4, 5, 6, 9)}
    file, sparse = save_sparse(plain, tmp_path/'a', dtype=half, masks=masks), some_csr(deepcopy(plain))
    assert [isinstance(m, CSR) for m in sparse] == [i in (1, 3, 4, 5, 6, 8, 9) for i in range(10)]
    assert save_sparse(sparse, tmp_path/'b', dtype=half).read_bytes() == file.read_bytes()
    want = state(load_sparse(file, make()))
    for n in masks: assert torch.equal(want[n], plain.state_dict()[n].to(kind).to(dtype))
    for share in (.3, 1., 0.):
        other = some_csr(make(), share)
        load_sparse(file, other)
        assert_same(dense_state(other), want)
        for n, m in masks.items(): assert torch.equal(other[int(n[0])].flat, m.flatten().nonzero().flatten())
        assert other[6] is other[8] and save_sparse(other, tmp_path/'c', dtype=half).read_bytes() == file.read_bytes()
        other[5](torch.randn(2, 400, dtype=dtype)).sum().backward()
        assert other[5].values.grad.shape == other[5].values.shape


def test_a_live_zero_of_a_csr_layer_stays(tmp_path):
    model = to_csr(nn.Linear(50, 40), mask := torch.rand(40, 50) < .1)
    model.values.data[3:6] = torch.tensor([0., -0., float('nan')])
    other = to_csr(nn.Linear(50, 40), torch.rand(40, 50) < .4)
    p = other.values
    load_sparse(save_sparse(model, tmp_path/'a'), other)
    assert other.values is p and p.view(-1).view(torch.int32).equal(model.values.view(torch.int32)) and torch.equal(other.flat,
        model.flat) and other.values.requires_grad
    masks = {'weight': mask | (torch.rand(40, 50) < .1)}
    load_sparse(save_sparse(model, tmp_path/'b', masks=masks), other)
    assert torch.equal(other.flat, masks['weight'].flatten().nonzero().flatten())
    with pytest.raises(ValueError, match='not 0 where the mask is False'): save_sparse(model, tmp_path/'b', masks={'weight': ~mask})
    with pytest.raises(ValueError, match="'values' is no parameter"): save_sparse(model, tmp_path/'b', masks={'values': model.values != 0})


def test_a_dense_file_keeps_the_places(tmp_path):
    dense, other = fresh(lambda: nn.Sequential(nn.Linear(700, 200), nn.Linear(200, 3)),
        0), some_csr(fresh(lambda: nn.Sequential(nn.Linear(700, 200), nn.Linear(200, 3))), .2)
    flat = [m.flat.clone() for m in other]
    load_sparse(save_sparse(dense, tmp_path/'a'), other)
    for m, f, d in zip(other, flat, dense):
        assert torch.equal(m.flat, f) and torch.equal(m.values, d.weight.flatten()[f]) and torch.equal(m.bias, d.bias)


def test_memory_with_csr_layers(tmp_path):
    "The peak of a process that saves and loads a layer of 64 million weights: below the 256 MB of the dense one, half of that being the mask and its pieces"
    code = """
import resource, sys, torch
from torch import nn
from paramfx.kernels.csr import CSRLinear, to_csr
from paramfx.sparse.files import load_sparse, save_sparse
def layer(live, n=8000):
    m = to_csr(nn.Linear(8, 8, bias=False))
    m.in_features = m.out_features = n
    m.place_(torch.arange(live)*(n*n//live), torch.randn(live))
    return nn.Sequential(m)
a, b = layer(400_000), layer(1000)
load_sparse(save_sparse(layer(10, 80), 'x'), layer(20, 80))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
base = peak()
load_sparse(save_sparse(a, 'x'), b)
assert torch.equal(b[0].values, a[0].values) and torch.equal(b[0].flat, a[0].flat)
print(peak()-base)
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=root),
        capture_output=True, text=True).stdout
    assert float(out) < 110, out


# -- masks in force

CBS = {'dsr': partial(DynamicSparse, .8, period=2, method=DSR(threshold=.02)), 'kernel': partial(DynamicSparse,
    .5, method='set', granularity='kernel', period=2), 'block': partial(DynamicSparse, .5, method='set', granularity='2x4', period=2),
       '2:4': partial(DynamicSparse, granularity='2:4', method='set', period=2), 'prune': partial(IterativePrune, .8, n_prunes=2),
       'explored': partial(DynamicSparse, .8, method='set', period=2)}


@pytest.fixture
def mk(tmp_path): return partial(build, tmp_path)

def fit(learn, n=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, **kw)
    return learn

def masked_state(learn): return {k: v for k, v in state(learn.model).items() if not k.endswith(('_effect', '_ever'))}


@pytest.mark.parametrize('kind', CBS)
def test_learner_with_masks(mk, kind):
    seen = [MaskRecorder(follow=True)] if kind == 'explored' else []
    learn = fit(mk(), 2, cbs=[CBS[kind](), *seen])
    path = learn.save_sparse('run')
    assert path == learn.path/learn.model_dir/'run.safetensors' and learn.save_sparse('run.safetensors') == path
    other = fit(mk(seed=1), cbs=[CBS[kind](), *seen])
    key = {e.name: e for st in effects(other.model).values() for e in st.holder.items}
    other.load_sparse('run')
    assert_same(masked_state(other), masked_state(learn))
    for n, e in key.items():
        assert e.live == int(e.mask.sum()) and torch.equal(e.float, e.mask.expand_as(e.float).float() if not e.tiled else e.full.float()), n
        assert not opt_state_of(other.opt, e.weight), 'momentum of what was replaced'
        if e.ever is not None: assert not (e.mask & ~e.ever).any()
    fit(other)
    plain = mk(seed=2).load_sparse(path)
    want = {k: v for k, v in masked_state(learn).items() if not k.endswith('_mask')}
    assert_same(state(plain.model), want)


def spread(learn):
    "Masks and dense weights of a run, whether its layers are masked or CSR"
    return {e.name: (e.mask.clone(), e.weight.detach().clone()) for e in learn.dynamic_sparse.store.items}

RUNS = {'static': dict(method='static'), 'dsr': dict(method=DSR(threshold=.02), period=2), 'granet': dict(method=GraNet(drop_frac=.1), period=2)}
OPTS = {'adam': Adam, 'adamw': partial(OptimWrapper, opt=torch.optim.AdamW), 'sgd': partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))}


@pytest.mark.parametrize('method,opt', [('static', 'sgd'), ('dsr', 'adam'), ('dsr', 'adamw'), ('dsr', 'sgd'), ('granet', 'adam')])
@pytest.mark.parametrize('there', ['dense', 'csr'])
@pytest.mark.parametrize('here', ['dense', 'csr'])
def test_runs_with_csr_layers(mk, here, there, method, opt):
    "The file of one run goes into another, whichever of them computes how, and makes the same file again"
    learn, other = (fit(mk(seed=i, opt_func=OPTS[opt]), 2, cbs=DynamicSparse(.8, compute=c, seed=i, **RUNS[method]))
        for i, c in enumerate((there, here)))
    want, old = spread(learn), spread(other)
    assert any(not torch.equal(want[n][0], old[n][0]) for n in want) and {e.masks for e in other.dynamic_sparse.store.items} == {True,
        here == 'dense'}
    path = learn.save_sparse('run')
    params = [*map(id, other.model.parameters())]
    other.load_sparse('run')
    assert [*map(id, other.model.parameters())] == params
    got = spread(other)
    for n in want: assert torch.equal(got[n][0], want[n][0]) and torch.equal(got[n][1], want[n][1]), n
    for e in other.dynamic_sparse.store.items: assert not any(torch.is_tensor(t) and t.ndim for t in opt_state_of(other.opt, e.param).values())
    assert other.save_sparse('again').read_bytes() == path.read_bytes()
    plain, by_hand = mk(seed=2).load_sparse('run').model, some_csr(mk(seed=3).model, .3)
    assert_same(state(plain), dense_state(load_sparse(path, by_hand)))
    for n, (m, w) in want.items(): assert torch.equal(plain.get_parameter(n), w)
    fit(other)
    for e in other.dynamic_sparse.store.items: assert e.live == int(e.mask.sum())


def test_a_model_filled_beside_its_optimizer(mk):
    "`load_sparse` of a model does not know the optimizer, whose state is of the old values"
    learn, other = (fit(mk(seed=i), 2, cbs=DynamicSparse(.8, compute='csr', **RUNS['dsr'])) for i in range(2))
    load_sparse(learn.save_sparse('run'), other.model)
    fit(other)
    for e in other.dynamic_sparse.store.sparse:
        assert {t.shape for t in opt_state_of(other.opt, e.param).values() if torch.is_tensor(t) and t.ndim} == {e.param.shape}


def test_masks_that_do_not_fit_csr_layers(mk):
    path = fit(mk(), cbs=DynamicSparse(.8, method='static')).save_sparse('run')
    dense = fit(mk()).save_sparse('dense')
    other = fit(mk(), cbs=DynamicSparse(.5, method='static', compute='csr'))
    before, want = state(other.model), spread(other)
    with pytest.raises(ValueError, match='masks keep .* units, these') as e: other.load_sparse(path)
    assert str(e.value).startswith(str(path))
    assert_same(state(other.model), before)
    other.load_sparse(dense)
    net = mk().load_sparse(dense).model
    for n, (m, w) in spread(other).items(): assert torch.equal(m, want[n][0]) and torch.equal(w, net.get_parameter(n)*m)


def test_masks_that_do_not_fit(mk):
    path = fit(mk(), cbs=DynamicSparse(.8, method='static')).save_sparse('run')
    plain = fit(mk()).save_sparse('dense')
    for cb, match in ((DynamicSparse(.5, method='static'), "masks keep .* units, these"),
        (DynamicSparse(.8, method='static', granularity='kernel'), 'cuts through units'),
                      (DynamicSparse(granularity='2:4', method='static'), 'another n:m pattern')):
        other = fit(mk(), cbs=cb)
        before = state(other.model)
        with pytest.raises(ValueError, match=match) as e: other.load_sparse(path)
        assert str(e.value).startswith(str(path))
        assert_same(state(other.model), before)
    masks = {k: v for k, v in before.items() if k.endswith('_mask')}
    other.load_sparse(plain)  # nothing in it says what to mask
    assert_same({k: v for k, v in state(other.model).items() if k in masks}, masks)
    for e in other.dynamic_sparse.store.items: assert not e.weight[~e.full].any()


def test_a_plain_file_brings_its_masks(mk):
    learn = fit(mk(), 2, cbs=DynamicSparse(.8, method='static'))
    masks = learn.dynamic_sparse.masks
    learn.release()
    other = mk(seed=3, cbs=DynamicSparse(.8, method='static', seed=9))
    other.load_sparse(learn.save_sparse('plain'))
    assert all(torch.equal(m, masks[n]) for n, m in other.dynamic_sparse.masks.items())


@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))])
def test_optimizers_forget(mk, opt_func):
    learn = fit(mk(opt_func=opt_func))
    path = learn.save_sparse('run')
    fit(learn.load_sparse(path))


def test_part_of_a_model(tmp_path):
    make = lambda: nn.Sequential(nn.Linear(30, 20), nn.Sequential(nn.Linear(20, 20), nn.ReLU()))
    model, other = fresh(make), fresh(make, 2)
    for i, m in enumerate((model, other)): sparsify(m[1], .8, seed=i)
    file = save_sparse(model, tmp_path/'a')
    load_sparse(file, other)
    assert torch.equal(other[1][0].weight_mask, model[1][0].weight_mask) and torch.equal(other[1][0].weight, model[1][0].weight)
    load_sparse(file, fresh(make))


def test_in_a_new_process(tmp_path):
    make = "torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20))"
    model = eval(make)
    sparsify(model, .8)
    save_sparse(model, tmp_path/'a')
    code = f"import torch; from paramfx.sparse.files import load_sparse; torch.save(load_sparse('a', {make}).state_dict(), 'out.pth')"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    run_fresh(code, check=True, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=root))
    assert_same(torch.load(tmp_path/'out.pth'), {k: v for k, v in model.state_dict().items() if not k.endswith(('_mask', '_effect'))})


def test_memory_while_saving_and_loading(tmp_path):
    "NumPy's and Python's share, traced: well below the largest layer"
    make = lambda: nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(6)])
    model, other = thin(make(), .2), make()
    for job in (lambda: save_sparse(model, tmp_path/'a'), lambda: load_sparse(tmp_path/'a', other)):
        tracemalloc.start()
        job()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < .8*4e6
    assert_same(state(other), state(model))


@pytest.mark.cuda
def test_on_the_gpu(tmp_path):
    model, other = thin(small_net(), .2).cuda(), small_net().cuda()
    load_sparse(save_sparse(model, tmp_path/'a', dtype='bfloat16'), other)
    for k, v in model.state_dict().items():
        assert other.state_dict()[k].is_cuda and torch.equal(other.state_dict()[k], v.bfloat16().to(v.dtype) if v.ndim > 1 else v)
