"""Exact cuts through whole libraries of networks, and what a trace and a cut cost.

Half of every space that can be cut is cut out of each network. It counts as exact if these spaces hold 90 % of the weights of
its convolutions and linear layers, and the smaller network equals the masked one to 1e-5 in float32 and 1e-12 in float64."""
import argparse
import gc
import os
import re
import time
import warnings
from contextlib import nullcontext
from zlib import crc32

os.environ.setdefault('OMP_NUM_THREADS', '1')

import timm
import torch
import torchvision
from torch import nn
from benchmarks.timing import paired, quartiles, write_table
from paramfx.channels.trace import trace_channels
from paramfx.core.forward import check_same

COVERAGE, TOL32, TOL64 = .9, 1e-5, 1e-12
DEPENDS = 3e-4  # smallest relative change with the input, and by the cut: equal constants would prove nothing
TIMM = {  # family -> network; one small member each, chosen before any of them was traced
    'resnet-d': 'resnet26d', 'seresnet': 'seresnet18', 'ecaresnet': 'ecaresnet26t', 'resnetv2 (BiT)': 'resnetv2_50x1_bit',
    'res2net': 'res2net50_26w_4s', 'resnest': 'resnest14d', 'skresnet': 'skresnet18', 'dpn': 'dpn68', 'densenet': 'densenet121',
    'efficientnet': 'efficientnet_b0', 'mobilenetv3': 'mobilenetv3_small_100', 'mobilenetv4': 'mobilenetv4_conv_small',
    'fbnet': 'fbnetc_100', 'regnet': 'regnety_002', 'repvgg': 'repvgg_a0', 'cspnet': 'cspresnet50', 'dla': 'dla34',
    'hrnet': 'hrnet_w18_small', 'inception_v4': 'inception_v4', 'inception_resnet': 'inception_resnet_v2',
    'xception': 'legacy_xception', 'vovnet': 'ese_vovnet19b_dw', 'ghostnet': 'ghostnet_100', 'nfnet': 'nfnet_l0',
    'convnextv2': 'convnextv2_atto'}


def networks():
    "(library, family, name) of the whole sweep"
    tv = [n for n in torchvision.models.list_models(module=torchvision.models) if not n.startswith(('swin', 'vit', 'maxvit'))]
    family = lambda n: re.match(r'(wide_resnet|efficientnet_v2|[a-z]+(?:_v\d|_[xy])?)', n)[0]
    return [('torchvision', family(n), n) for n in tv] + [('timm', f, n) for f, n in TIMM.items()]


def fill(model, seed=0):
    "Seeded random weights and biases, scales of residual branches included: many start as zeros, which would hide a mistake"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            for k, t in m.named_parameters(recurse=False):
                if t.ndim > 1 and k == 'weight': t.uniform_(-1, 1, generator=g).mul_((6*t.shape[0]/t.numel())**.5)
                elif k == 'bias': t.uniform_(-.2, .2, generator=g)
                else: t.uniform_(.5, 1.5, generator=g)
    return model.eval()


def settle(model, *xs, seed=0):
    "Batch norm statistics near those of the inputs `xs`, and random: without them activations fade or explode"
    g = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momentum = [m.momentum for m in norms]
    for m in norms: m.train().momentum = 1.
    with torch.no_grad():
        if norms: model(*xs)
        for m, old in zip(norms, momentum):
            m.eval().momentum = old
            m.running_var.add_(.01).mul_(torch.empty_like(m.running_var).uniform_(.5, 1.5, generator=g))
            m.running_mean.add_(m.running_var.sqrt()*torch.empty_like(m.running_var).uniform_(-.2, .2, generator=g))
    return model


def build(lib, name):
    "A network without auxiliary heads"
    if lib == 'timm': return fill(timm.create_model(name))
    more = dict(aux_logits=False, init_weights=False) if name in ('googlenet', 'inception_v3') else {}
    lazy = nullcontext() if 'regnet' in name else torch.device('meta')  # their own initialization takes minutes; RegNet computes its widths in tensors
    with lazy: model = torchvision.models.get_model(name, weights=None, **more)
    if isinstance(lazy, nullcontext): return fill(model)
    state = {k: torch.zeros_like(b, device='cpu') for k, b in model.named_buffers()}
    model = model.to_empty(device='cpu')
    for k, b in model.named_buffers(): b.copy_(state[k])
    return fill(model)


def sample(name):
    "Two small pictures, with structure: averages over plain noise hardly differ"
    n, g = 96 if 'inception' in name else 64, torch.Generator().manual_seed(crc32(name.encode()))
    coarse, fine = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 3, n, n, generator=g)
    return nn.functional.interpolate(coarse, size=(n, n), mode='bilinear') + fine/3


def difference(a, b): return ((a-b).abs().max()/b.abs().max()).item()


def why_whole(cmap):
    "The reason that keeps the largest share of the weights whole"
    base, shares = cmap.coverage(), {}
    for s in cmap:
        if s.cuttable or s.is_output: continue
        shares.setdefault(s.why, []).append(s.name)
    gain = {w: cmap.coverage([s.name for s in cmap.cuttable]+names)-base for w, names in shares.items()}
    return max(gain, key=gain.get, default='')


def judge(row):
    "'exact', 'refused' or 'wrong'"
    if row['f32'] == '': return 'refused'
    if not (row['f32'] <= TOL32 and row['f64'] <= TOL64 and min(row['depends'], row['changed']) >= DEPENDS): return 'wrong'
    return 'exact' if row['coverage'] >= COVERAGE else 'refused'


def measure(lib, family, name):
    "One row of the sweep"
    x = sample(name)
    model = settle(build(lib, name), x)
    row = dict(library=lib, network=name, family=family, verdict='', spaces='', coverage='', f32='', f64='', left='', depends='', changed='',
               trace_s='', apply_s='', reason='')
    try:
        start = time.process_time()
        cmap = trace_channels(model, x)
        row |= dict(trace_s=time.process_time()-start, spaces=f'{len(cmap.cuttable)}/{len(cmap)}', coverage=cmap.coverage())
        cut = cmap.cut(.5, whole='keep')
    except (NotImplementedError, ValueError, RuntimeError) as e:
        row['reason'] = f'{type(e).__name__}: {e}'
        return row | dict(verdict=judge(row))
    with torch.no_grad():
        full = model(x)
        for key in ('f32', 'f64'):
            if key == 'f64': model, x, small = model.double(), x.double(), None
            start = time.process_time()
            small = cut.apply(model, check=False)
            if key == 'f32': row['apply_s'] = time.process_time()-start
            row[key] = check_same(small, cut.masked(model), x, tol=float('inf'))
    count = lambda m: sum(map(torch.Tensor.numel, m.parameters()))
    out = small(x).detach()
    row |= dict(left=count(small)/count(model), depends=difference(out[:1], out[1:]), changed=difference(out, full))
    row['verdict'] = judge(row)
    if row['coverage'] < COVERAGE: row['reason'] = why_whole(cmap)
    return row


def sweep(which=None, report=None):
    "All rows, or those of the networks `which`; memory is given back between them"
    rows = []
    for lib, family, name in networks():
        if which is not None and f'{lib}/{name}' not in which: continue
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            rows.append(measure(lib, family, name))
        gc.collect()
        if report is not None: report(rows[-1])
    return rows


SWEEP = f"""Half of every space that can be cut, of each network of torchvision but swin, vit and maxvit, and of one timm network of each of
{len(TIMM)} families. `spaces`: how many can be cut, and how many there are; `coverage`: share of the weights of convolutions and linear
layers that lie in a row or column of a space that can be cut; `f32`, `f64`: largest difference of the smaller and the masked network,
relative to the largest output; `left`: share of the parameters; `depends`, `changed`: how far the output moves with the input and by the
cut, relative as well; seconds: CPU time of one trace and of one `Cut.apply(check=False)`, one thread. Exact: coverage at least {COVERAGE:g},
differences at most {TOL32:g} and {TOL64:g}. Refused: the reason that keeps most weights whole. Random weights, two pictures of 64 or 96
pixels, no auxiliary heads."""


def timing(rounds=15, name='resnet50', size=64):
    "Rows: a forward pass, a trace and a cut of one network"
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = settle(build('torchvision', name), x)
    cmap = trace_channels(model, x)
    cut = cmap.cut(.5)
    with torch.no_grad():
        times = paired({'forward': lambda: model(x), 'trace_channels': lambda: trace_channels(model, x), 'ChannelMap.cut': lambda: cmap.cut(.5),
                        'Cut.apply(check=False)': lambda: cut.apply(model, check=False), 'Cut.apply': lambda: cut.apply(model)}, rounds=rounds)
    goals, rows = {'trace_channels': .2, 'Cut.apply(check=False)': .3, 'Cut.apply': .3}, []
    for step, ts in times.items():
        q, goal = quartiles(ts), goals.get(step)
        ratio = quartiles([t/b for t, b in zip(ts, times['forward'])])['median']
        rows.append(dict(network=name, step=step, ms=1e3*q['median'], q1=1e3*q['q1'], q3=1e3*q['q3'], forwards=ratio,
                         target_ms='' if goal is None else 1e3*goal, met='' if goal is None else 'yes' if q['median'] <= goal else 'no'))
    return rows


TIMING = """CPU time on one thread, ResNet-50 in evaluation mode, one picture of 64 pixels, half of every space; medians and quartiles.
`forwards`: in units of a forward pass of the same round. `Cut.apply` compares its result with the masked network, `check=False` does not."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--part', nargs='*', default=['timing', 'sweep'], choices=['timing', 'sweep'])
    ap.add_argument('--rounds', type=int, default=15)
    ap.add_argument('--only', nargs='*', help='LIBRARY/NETWORK; prints, writes no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    if a.only: sweep(a.only, report=lambda r: print(r, flush=True))
    else:
        if 'timing' in a.part: print(write_table('channels', timing(a.rounds), TIMING).read_text())
        if 'sweep' in a.part: print(write_table('channels_sweep', sweep(report=lambda r: print(r, flush=True)), SWEEP).read_text())
