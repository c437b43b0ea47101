"Counts of `paramfx.report.cost` against second routes: PyTorch's counter, hooks, files, arithmetic"
import copy, os, random, zipfile
import numpy as np, pytest, torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from paramfx.report.cost import compare, cost, count_macs, file_bytes, human, n_params, peak_memory

MODELS = '''alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1
swin_t vgg11_bn vit_b_32'''.split()
SIZES = dict(inception_v3=96, maxvit_t=224, vit_b_32=224)

def build(name):
    "A torchvision model; the two with 100 million weights get zeros, to save the time of drawing them"
    import torchvision
    kw,big = {'init_weights': False} if name in ('googlenet', 'inception_v3') else {}, name in ('alexnet', 'vgg11_bn')
    with torch.device('meta' if big else 'cpu'): model = getattr(torchvision.models, name)(weights=None, **kw)
    if big:
        for t in (model := model.to_empty(device='cpu')).state_dict().values(): t.zero_()
    return model

def by_hooks(model, x):
    "Multiply-adds of convolutions and linear layers from the shapes of their outputs"
    n,hooks = [0],[]
    def conv(m, i, o): n[0] += o.numel()*m.weight[0].numel()
    def linear(m, i, o): n[0] += o.numel()*m.in_features
    for m in model.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)): hooks.append(m.register_forward_hook(conv))
        elif isinstance(m, nn.Linear): hooks.append(m.register_forward_hook(linear))
    with torch.no_grad(): model.eval()(x)
    for h in hooks: h.remove()
    return n[0]

def cpu_attention():
    "Torch's own formula for its kernel on the CPU, which torch before 2.15 does not list"
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count
    kernel = getattr(torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu', None)
    return {} if kernel is None or kernel in flop_registry else {kernel: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v)}

@pytest.mark.few(4)
@pytest.mark.parametrize('name', MODELS)
def test_torchvision_agrees_with_flop_counter(name):
    "Attention is counted by the same formulas, with its fused path off; all else operator by operator"
    model,x = build(name),torch.randn(1, 3, *[SIZES.get(name, 64)]*2)
    macs = count_macs(model, x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=cpu_attention()) as fc: model.eval()(x)
    finally: torch.backends.mha.set_fastpath_enabled(True)
    assert macs[0] == fc.get_total_flops()/2 > 0
    assert macs[1] == macs[0] and macs[2] <= macs[0]
    if name in ('resnet18', 'vgg11_bn', 'mobilenet_v2', 'densenet121'): assert macs[0] == by_hooks(model, x)

def test_published_macs():
    "ResNet-18 and VGG-11 at 224 pixels: 1.814 and 7.609 billion multiply-adds"
    assert count_macs(build('resnet18'), torch.randn(1,3,224,224))[0] == 1_814_073_344
    assert count_macs(build('vgg11_bn'), torch.randn(1,3,224,224))[0] == 7_609_090_048

def small(): return nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(4*6*6,10))

def test_masked_macs_by_hand():
    "Zeros in a convolution and a linear layer leave the executed multiply-adds alone"
    model = small()
    model[0].weight.data[0] = 0
    model[5].weight.data[:,:36] = 0
    conv,lin = 4*9*36, 4*36*10
    assert count_macs(model, torch.randn(3,1,8,8)) == (3*(conv+lin), 3*(conv+lin), round(3*(conv+lin)*.75))

def test_tied_and_sliced_weights_are_found():
    "A transposed tied weight and a slice of one bring their own density"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(6,4)); self.w.data[:3] = 0
        def forward(self, x): return x @ self.w.t(), x @ self.w[:3].t(), torch.mv(self.w, x[0])
    assert count_macs(Net(), torch.randn(2,4)) == (48+24+24, 48+24+24, 24+0+12)

def test_shared_tensors_once():
    a,b = nn.Linear(5,5),nn.Linear(5,5)
    b.weight = a.weight
    c = nn.Linear(5,5)
    c.weight = nn.Parameter(a.weight.data.t())
    assert n_params(nn.Sequential(a,b,c)) == (25+15, 25+15)
    a.weight.data[0] = 0
    assert n_params(nn.Sequential(a,b,c)) == (25+15, 20+15)

@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2'])
def test_bytes_is_the_real_file(name, tmp_path):
    "Exact for the archive's own name; another name changes each record's two copies of it, one of them within padding"
    model = build(name)
    n = file_bytes(model)
    for stem in ('archive', 'm', 'a_rather_long_name'):
        torch.save(model.state_dict(), tmp_path/f'{stem}.pth')
        size = os.path.getsize(tmp_path/f'{stem}.pth')
        records = len(zipfile.ZipFile(tmp_path/f'{stem}.pth').namelist())
        if stem == 'archive': assert n == size
        else: assert abs(size - n - records*(len(stem) - 7)) <= 64*records

def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

class Noisy(nn.Module):
    "Draws from every generator, evaluation mode or not, and remembers its last output"
    def __init__(self): super().__init__(); self.lin,self.last = nn.Linear(4,4),'nothing yet'
    def forward(self, x):
        random.random(); np.random.rand()
        self.last = self.lin(nn.functional.dropout(x, training=True))
        return self.last

@pytest.mark.parametrize('bad', [False, True])
def test_leaves_no_trace(bad):
    "Flags, attributes, hooks, gradients, buffers, backend switches and random states, after errors too"
    model = nn.Sequential(Noisy(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4,2))
    model[1].eval(); model[3].weight.requires_grad_(False)
    before,rng,sd = [m.training for m in model.modules()], states(), copy.deepcopy(model.state_dict())
    if bad:
        with pytest.raises(ValueError, match=r'\[1, 5\].*RuntimeError.*shapes'): cost(model, torch.randn(1,5, generator=torch.Generator()))
    else: cost(model, torch.ones(1,4), n_runs=2, max_seconds=.1)
    assert [m.training for m in model.modules()] == before and states() == rng
    assert all(torch.equal(v, sd[k]) for k,v in model.state_dict().items())
    assert model[0].last == 'nothing yet' and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() and torch.is_grad_enabled()

class Half(nn.Module):
    "Says that it executes half of what its inner layer does"
    def __init__(self, inner, *more): super().__init__(); self.inner,self.more = inner,more
    def forward(self, x): return self.inner(x)
    def macs(self, x, y): return (x.shape[-1]*y.numel(), x.shape[-1]*y.numel()//2, *self.more)

def test_protocol():
    "The answer replaces what is inside, also when nested, called twice, or with a third number"
    lin,x = nn.Linear(8,8),torch.randn(2,8)
    n = 2*8*8
    assert count_macs(nn.Sequential(Half(lin), nn.Linear(8,8)), x) == (2*n, n//2+n, n//2+n)
    assert count_macs(nn.Sequential(Half(Half(lin))), x) == (n, n//2, n//2)
    twice = Half(lin)
    assert count_macs(nn.Sequential(twice, twice), x) == (2*n, n, n)
    assert count_macs(Half(lin, 7), x) == (n, n//2, 7)
    lin.weight.data[:4] = 0
    assert count_macs(Half(lin), x) == (n, n//2, n//4)

def test_protocol_error_is_named():
    class Broken(Half):
        def macs(self, x, y): raise KeyError('no answer')
    model = Broken(nn.Linear(4,4))
    with pytest.raises(ValueError, match='KeyError'): count_macs(model, torch.randn(1,4))
    assert not model._forward_hooks and not model._forward_pre_hooks

@pytest.mark.parametrize('kind,gates', [('RNN',1), ('GRU',3), ('LSTM',4)])
def test_recurrent(kind, gates):
    "Two layers, both directions, by hand"
    model = getattr(nn, kind)(8, 16, num_layers=2, bidirectional=True)
    macs = count_macs(model, torch.randn(5,2,8))
    assert macs[0] == 5*2*2*gates*16*((8+16) + (32+16))
    model.weight_hh_l0.data[:] = 0
    assert count_macs(model, torch.randn(5,2,8))[2] == macs[0] - 5*2*gates*16*16

def test_attention():
    "Projections, scores and mixing; the fused path of evaluation mode hides nothing"
    enc = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    n = 5*(4*16*16 + 2*16*32) + 2*5*5*16
    assert count_macs(enc, torch.randn(1,5,16)) == (n,n,n)
    enc.self_attn.in_proj_weight.data[:16] = 0
    assert count_macs(enc, torch.randn(1,5,16))[2] == n - 5*16*16

def test_tabular_two_inputs():
    from fastai.tabular.model import TabularModel
    model = TabularModel([(10,4),(3,2)], n_cont=5, out_sz=2, layers=[20])
    rep = cost(model, (torch.tensor([[1,2]]), torch.randn(1,5)), n_runs=2)
    assert rep.macs == 11*20 + 20*2 and rep.sample == '[1, 2], [1, 5]'

def test_awd_lstm_keeps_its_hidden_state():
    from fastai.text.models.awdlstm import AWD_LSTM
    model = AWD_LSTM(50, 12, 16, 2)
    model(torch.randint(0,50,(4,7)))
    hidden = model.hidden
    cost(model, torch.randint(0,50,(1,7), generator=torch.Generator()), latency=False)
    assert model.bs == 4 and model.hidden is hidden

@pytest.mark.parametrize('sample', [3, 'x', [1,2], (), None])
def test_sample_of_wrong_type(sample):
    with pytest.raises(ValueError, match='tensor'): cost(small(), sample)

def test_nan_weights_are_stored():
    a,b = nn.Linear(3,3, bias=False),nn.Linear(3,3, bias=False)
    a.weight.data.fill_(float('nan'))
    b.weight = nn.Parameter(a.weight.data.t())
    assert n_params(nn.Sequential(a,b)) == (9,9)

def test_lazy_model():
    with pytest.raises(ValueError, match='one batch'): cost(nn.LazyLinear(3), torch.randn(1,2))

def test_model_without_parameters(): assert cost(nn.ReLU(), torch.randn(1,2), latency=False).macs == 0

def test_peak_memory_by_hand():
    mlp = nn.Sequential(nn.Linear(100,200), nn.ReLU(), nn.Linear(200,50))
    fixed = 100*200+200 + 200*50+50
    assert peak_memory(mlp, torch.randn(1,100)) == 4*(fixed + 100 + 200+200)
    assert peak_memory(mlp, torch.randn(64,100)) == 4*(fixed + 64*(100 + 200+200))
    assert peak_memory(nn.BatchNorm1d(4), torch.randn(2,4)) >= 4*(8+8) + 8 + 4*16

def test_peak_memory_does_not_pile_up():
    "A deep chain needs no more than its widest step"
    deep = nn.Sequential(*[nn.ReLU() for _ in range(20)])
    assert peak_memory(deep, torch.randn(1,1000)) == 4*3000

def test_batch_scales_macs_not_storage():
    model = small()
    one,many = (cost(model, torch.randn(n,1,8,8), latency=False) for n in (1,16))
    assert many.macs == 16*one.macs and many.bytes == one.bytes and many.params == one.params

def test_latency_is_optional_and_bounded():
    import time
    rep = cost(small(), torch.randn(1,1,8,8), latency=False)
    assert rep.latency_ms is None and rep.latency_p90_ms is None
    class Slow(nn.Module):
        def forward(self, x): time.sleep(.02); return x
    start = time.perf_counter()
    assert cost(Slow(), torch.randn(1), n_runs=1000, max_seconds=.1).latency_ms >= 20
    assert time.perf_counter() - start < 2

def test_learner_takes_its_own_item():
    from fastai.test_utils import synth_learner
    learn = synth_learner()
    rng,shuffle = states(), learn.dls.train.rng.getstate()
    rep = learn.cost(latency=False)
    assert rep.params == 2 and rep.sample.startswith('[1') and states() == rng and learn.dls.train.rng.getstate() == shuffle

def test_human(): assert [human(o,'B') for o in (999, 999.6, 15e3, 71.2e6, 1.5e9)] == ['999 B', '1.00 kB', '15.0 kB', '71.2 MB', '1.50 GB']

def test_compare():
    "Models and reports mix; ratios are to the first row"
    import json
    table = compare(dict(a=small(), b=cost(small(), torch.randn(2,1,8,8), latency=False)), torch.randn(1,1,8,8), latency=False)
    assert table['b'].macs == 2*table['a'].macs and list(table.reports) == ['a','b']
    df = table.to_df()
    assert list(df.index) == ['a','b'] and df.macs_ratio.tolist() == [1,2] and df.params_ratio.tolist() == [1,1]
    assert json.loads(table.to_json())['b']['macs_ratio'] == 2
    md = table._repr_markdown_()
    assert '(2.00x)' in md and 'latency' not in md and len(md.splitlines()) == 4 and repr(table) == md
    assert md.splitlines()[1].startswith('|---|--:|--:|') and 'x)' not in md.splitlines()[2] # numbers to the right, no ratios of the first row to itself
    assert [r['macs_ratio'] for r in table] == [1,2] and len(copy.deepcopy(table)) == 2
    with pytest.raises(ValueError, match="'a' is a model"): compare(dict(a=small()))
    with pytest.raises(ValueError, match='at least one'): compare({})
