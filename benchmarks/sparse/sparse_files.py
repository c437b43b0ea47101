"""Sparse files: size against the values and the entropy of the masks, seconds to save and to load, and the memory it takes."""
import argparse
import ctypes
import gc
import gzip
import io
import lzma
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from benchmarks.timing import table, write_table
from paramfx import zoo
from paramfx.sparse.coding import mask_entropy
from paramfx.sparse.sparsify import sparsify
from paramfx.sparse.files import load_sparse, save_sparse
from paramfx.core.state import effects

NETS = {'LeNet-300-100': 'mnist/lenet_300_100', 'WRN-28-2': 'cifar10/wrn_28_2', 'ResNet-50': 'imagenet/resnet50'}
RATES = (.8, .9, .95, .98)
SIZE, SECONDS, LAYERS = 1.05, 2., 1.  # targets: size over the bound; to save or load; memory, in largest layers


def make(net, sparsity, masked=True):
    "A network with random masks, or without any"
    torch.manual_seed(0)
    model = zoo.build(NETS[net])
    if masked: sparsify(model, sparsity)
    return model


def plain_state(model):
    "What has to be kept of a network, as an ordinary file would hold it"
    ours = {k for st in effects(model).values() for k in st.keys()}
    return {k: v for k, v in model.state_dict().items() if k not in ours}


def bound(model, width):
    "Bytes of all values that are kept, live ones of `width` bytes each, and the entropy of the masks"
    items = {e.name: e for st in effects(model).values() for e in st.holder.items}
    rest = sum(v.numel()*v.element_size() for k, v in plain_state(model).items() if k not in items)
    return rest + sum(e.live*e.size*width + mask_entropy(e.live, e.units) for e in items.values())


def seconds(f, rounds):
    "Median time on the clock: it is the disk's, too"
    times = []
    for _ in range(rounds+1):
        gc.collect()
        start = time.perf_counter()
        f()
        times.append(time.perf_counter()-start)
    return statistics.median(times[1:])


def zipped(model, compress):
    buf = io.BytesIO()
    torch.save(plain_state(model), buf)
    return len(compress(buf.getvalue()))


def _kb(field):
    with open('/proc/self/status') as f: return next(int(line.split()[1]) for line in f if line.startswith(field))


def extra_memory(net, sparsity, what, file):
    "Peak of the resident memory while saving or loading, in MB over what was there before; Linux only"
    model = make(net, sparsity, masked=what == 'save')
    small = torch.nn.Linear(64, 64)
    sparsify(small, .5)
    load_sparse(save_sparse(small, f'{file}.small'), torch.nn.Linear(64, 64))  # code and tables that are read in once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that the process still holds would hide what is taken
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
    before = _kb('VmRSS')
    save_sparse(model, f'{file}.again') if what == 'save' else load_sparse(file, model)
    return (_kb('VmHWM')-before)/1024


def memory_apart(net, sparsity, what, file):
    "`extra_memory` in a process of its own, where nothing else was ever allocated"
    if not sys.platform.startswith('linux'): return ''
    call = f"from benchmarks.sparse.sparse_files import extra_memory as f; print(f({net!r}, {sparsity!r}, {what!r}, {str(file)!r}))"
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', call], capture_output=True, text=True)
    if res.returncode: raise RuntimeError(res.stderr[-2000:])
    return float(res.stdout)


def measure(net, sparsity, rounds=3, zips=True, memory=True):
    "Two rows: values in full and in half precision"
    model, empty, rows = make(net, sparsity), make(net, sparsity, masked=False), []
    layer = max(p.numel()*p.element_size() for p in model.parameters())/2**20
    with tempfile.TemporaryDirectory() as tmp:
        for dtype, width in (('float32', 4), ('float16', 2)):
            file = Path(tmp)/f'{dtype}.safetensors'
            save = seconds(lambda: save_sparse(model, file, dtype), rounds)
            load = seconds(lambda: load_sparse(file, empty), rounds)
            size = file.stat().st_size
            rows.append(dict(network=net, sparsity=sparsity, values=dtype, bytes=size, over_bound=size/bound(model, width), save_s=save, load_s=load))
        if memory:
            rows[0] |= {f'{w}_layers': ''
                if (mb := memory_apart(net, sparsity, w, Path(tmp)/'float32.safetensors')) == '' else mb/layer for w in ('save', 'load')}
    if zips:
        for name, f in dict(gzip=lambda b: gzip.compress(b, 6), xz=lambda b: lzma.compress(b, preset=1)).items():
            start = time.perf_counter()
            rows[0][name], rows[0][f'{name}_s'] = zipped(model, f)/bound(model, 4), time.perf_counter()-start
    return rows


def missed(rows):
    "Targets that were not reached, in words"
    res = []
    for r in rows:
        where = f"{r['network']} at {r['sparsity']} in {r['values']}"
        if r['over_bound'] > SIZE: res.append(f"{where}: {r['over_bound']:.3f} times the bound, target {SIZE}")
        res += [f"{where}: {r[k]:.2f} s ({k}), target {SECONDS}" for k in ('save_s', 'load_s') if r[k] > SECONDS]
        res += [f"{where}: {r[k]:.2f} ({k}), target {LAYERS}" for k in ('save_layers', 'load_layers') if r.get(k) and r[k] > LAYERS]
    return res


NOTE = f"""Files of `save_sparse`, with random masks of `sparsify` on all layers but a first convolution. `over_bound`: bytes
over the sum of all values that are kept (live ones in the given precision, norms, biases and buffers as they are) and the
entropy of the masks, N H(density) per layer; target {SIZE}. `save_s`, `load_s`: seconds on the clock, medians, one thread;
target {SECONDS:g}. `save_layers`, `load_layers`: peak of the resident memory over what was there before, in sizes of the
largest layer (9 MB of 97 in ResNet-50), in a process of its own; target {LAYERS}. `gzip` (level 6) and `xz` (preset 1): the
plain state dict by `torch.save`, compressed, over the same bound, and the seconds that takes; at .9 only."""


def run(nets=tuple(NETS), rounds=3, rates=RATES, zips=True):
    "All rows; memory is measured where a layer is large against the interpreter's own ups and downs"
    torch.set_num_threads(1)
    return [r for n in nets for s in rates for r in measure(n, s, rounds, zips and s == .9, memory=n == 'ResNet-50')]


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--case', nargs='*', default=list(NETS), choices=list(NETS))
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    rows = run(a.case, a.rounds)
    print(table(rows) if a.dry else write_table('sparse_files', rows, NOTE).read_text())
    if bad := missed(rows): sys.exit('\n'.join(['Targets missed:', *bad]))
