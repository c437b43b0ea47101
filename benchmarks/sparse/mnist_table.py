"""The published table of LeNet-300-100 on MNIST, run anew: dense, static, SET, DeepR, DSR and pruned, by the library's own recipes.

A cell is one training: a method, a sparsity and a seed. Each is written as soon as it is done, and one that is there already,
by the same recipe, is not run again; so a run may be stopped at any time, and started again with more."""
import argparse
import json
import os
import statistics
import tempfile
import time
import zlib
from functools import cache
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from fastai.basics import set_seed
from fastai.callback.progress import ProgressCallback
from benchmarks.timing import RESULTS, write_table
from paramfx import zoo
from paramfx.core.arguments import to_plain
from paramfx.sparse import methods
from paramfx.sparse.published import sparse_recipe

NAME, NETWORK = 'mnist_table', 'mnist/lenet_300_100'
METHODS = 'dense', 'static', 'set', 'deepr', 'dsr', 'pruned'
MAIN, EXTRA = (.98, .95), (.99, .97, .96, .9)  # with several seeds, with one
NEAR = .3  # points from the printed mean that are no difference, where two printed deviations are not more
NOTE = f"""Accuracy on the 10,000 test images after the last epoch, in percent: mean over seeds, with its deviation, beside what
was printed. Recipes are those of `sparse_recipe('{NETWORK}', ...)`: batches of 100, no augmentation, 100 epochs, for pruning 39
more from the dense run of the same seed. `live` counts masked weights that are not zero, of 266,200. A cell is `within` at most
two printed deviations or {NEAR} points of the printed mean, else `better` or `below`; where no deviation is printed per cell,
the raw runs' were .03 to .2, with static masks up to 6.5. Minutes are of one training on one thread of a shared machine."""


def cells(seeds=3, only=None):
    "(method, sparsity, seed) of all trainings, the most telling first"
    def some(sparsities, seed): return [(m, 0. if m == 'dense' else s, seed) for s in sparsities for m in METHODS]
    todo = [c for seed in range(seeds) for c in some(MAIN, seed)] + some(EXTRA, 0)
    unknown = sorted({*(only or ())} - {*METHODS})
    if unknown: raise ValueError(f"method {unknown[0]!r}: choose of {', '.join(METHODS)}")
    return [c for c in dict.fromkeys(todo) if only is None or c[0] in only]


def recipe(method, sparsity, seed=None, **changes):
    "The library's recipe; `seed` is that of the masks"
    changes = {k: v for k, v in changes.items() if method != 'pruned' or k != 'epochs'}
    if seed is not None and method not in ('dense', 'pruned'): changes['seed'] = seed
    return sparse_recipe(NETWORK, 'prune' if method == 'pruned' else method, sparsity, **changes)


def mark(method, sparsity, **changes):
    "A short word that differs where a recipe does; that of a pruned run includes the dense one before it"
    r = recipe(method, sparsity, **changes)
    own = json.dumps([r.epochs, r.wd, r.lr, r.loader, {k: to_plain(v) for k, v in r.settings.items()}], sort_keys=True)
    return f'{zlib.crc32(own.encode()):08x}' + (mark('dense', 0., **changes) if method == 'pruned' else '')


def train(dls, method, sparsity, seed, model=None, **changes):
    "Train one cell: its row and its network"
    set_seed(seed)
    for dl in dls.loaders: dl.rng.seed(seed)
    r = recipe(method, sparsity, seed, **changes)
    learn = r.learner(dls, model).remove_cb(ProgressCallback)
    start = time.perf_counter()
    with learn.no_logging(): r.fit(learn)
    minutes = (time.perf_counter()-start)/60
    masks = [m for n, m in learn.model.named_buffers() if n.endswith('weight_mask')]
    live = sum(map(int, map(torch.sum, masks))) if masks else sum(p.numel() for p in learn.model.parameters() if p.ndim > 1)
    return dict(method=method, sparsity=sparsity, seed=seed, accuracy=round(100*float(learn.recorder.final_record[2]), 2), live=live,
                best=round(100*max(v[2] for v in learn.recorder.values), 2), epochs=r.epochs, minutes=round(minutes, 2),
                recipe=mark(method, sparsity, **changes)), learn.model


def dense_run(dls, seed, folder, **changes):
    "Row and trained network of the dense run of a seed, from the cache or trained now"
    file = Path(folder)/f"dense_{seed}_{mark('dense', 0., **changes)}.pth"
    if not file.exists():
        row, model = train(dls, 'dense', 0., seed, **changes)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(row=row, model=model.state_dict()), file.with_suffix('.tmp'))
        os.replace(file.with_suffix('.tmp'), file)
    saved, model = torch.load(file, weights_only=True), zoo.build(NETWORK, dls.c)
    model.load_state_dict(saved['model'])
    return saved['row'], model


def run_cell(dls, cell, folder, **changes):
    "Run a cell: its row"
    method, sparsity, seed = cell
    if method == 'dense': return dense_run(dls, seed, folder, **changes)[0]
    model = dense_run(dls, seed, folder, **changes)[1] if method == 'pruned' else None
    return train(dls, method, sparsity, seed, model, **changes)[0]


@cache
def printed():
    "(method, sparsity) -> printed mean and deviation (None: not printed)"
    res = {}
    for r in zoo.published('dynamic_sparse', 'mnist', count=False).to_dict('records'):
        _, method, *s = r['row'].split()
        res[method, float(s[0]) if s else 0.] = r['top1'], None if r['spread'] != r['spread'] else r['spread']
    return res


def verdict(ours, mean, spread):
    "Is `ours` as good as what was printed?"
    if abs(ours-mean) <= max(NEAR, 2*(spread or 0)) + 1e-9: return 'within'
    return 'better' if ours > mean else 'below'


def rows(runs):
    "The table of these runs, beside the printed one"
    groups, res = {}, []
    for r in runs: groups.setdefault((r['sparsity'], METHODS.index(r['method'])), []).append(r)
    for (s, m), rs in sorted(groups.items()):
        (mean, spread), acc = printed()[METHODS[m], s], [r['accuracy'] for r in rs]
        ours = statistics.mean(acc)
        res.append(dict(sparsity=s, method=METHODS[m], live=rs[0]['live'], seeds=len(rs), ours=f'{ours:.2f}',
                        sd=f'{statistics.stdev(acc):.2f}' if len(acc) > 1 else '', published=f'{mean:.2f}', published_sd=spread or '',
                        difference=f'{ours-mean:+.2f}', verdict=verdict(ours, mean, spread),
                        minutes=round(statistics.mean(r['minutes'] for r in rs), 1)))
    return res


def read(folder):
    "The runs that are done"
    file = Path(folder)/f'{NAME}.json'
    return json.loads(file.read_text(encoding='utf8'))['runs'] if file.exists() else []


def add(folder, row):
    "Put one run into the files, in the place of an older one of the same cell; what another process has written stays"
    def key(r): return r['sparsity'], METHODS.index(r['method']), r['seed']
    runs = sorted([r for r in read(folder) if key(r) != key(row)] + [row], key=key)
    return write_table(NAME, rows(runs), NOTE, folder, runs=runs)


def is_done(cell, folder, **changes):
    return any((r['method'], r['sparsity'], r['seed'], r['recipe']) == (*cell, mark(*cell[:2], **changes)) for r in read(folder))


def run(seeds=3, only=None, folder=RESULTS, networks=None, dls=None, tell=lambda line: None, todo=None, **changes):
    "Run all cells that are not done, or those of `todo`; `changes` go to the recipes"
    torch.set_num_threads(1)
    networks = networks or Path(tempfile.gettempdir())/'paramfx_mnist_table'
    dls = dls or zoo.dls('mnist', device='cpu')
    for cell in todo or cells(seeds, only):
        if is_done(cell, folder, **changes): continue
        if cell[0] not in ('dense', 'pruned', *methods.METHODS):
            tell(f'method={cell[0]} sparsity={cell[1]:g} is not in this version')
            continue
        row = run_cell(dls, cell, networks, **changes)
        add(folder, row)
        tell(' '.join(f'{k}={row[k]}' for k in ('method', 'sparsity', 'seed', 'accuracy', 'live', 'minutes')))
    return Path(folder)/f'{NAME}.md'


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--only', nargs='+', metavar='METHOD', help=f"some of {', '.join(METHODS)}")
    p.add_argument('--seeds', type=int, default=3, help='for sparsities .98 and .95')
    p.add_argument('--out', type=Path, default=RESULTS, help='folder of the results')
    p.add_argument('--networks', type=Path, help='folder of the trained dense networks; default: a temporary one')
    p.add_argument('--cell', nargs=3, action='append', metavar=('METHOD', 'SPARSITY', 'SEED'),
        help='this training only, also with a seed that the table does not ask for; may be repeated')
    p.add_argument('--list', action='store_true', help='only tell which cells there are, and which are done')
    a = p.parse_args()
    todo = [(m, float(s), int(seed)) for m, s, seed in a.cell or ()]
    if a.list:
        for c in cells(a.seeds, a.only): print(*c, 'done' if is_done(c, a.out) else '')
    else: print(run(a.seeds, a.only, a.out, a.networks, tell=lambda line: print(line, flush=True), todo=todo).read_text())
