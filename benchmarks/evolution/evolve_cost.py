"""What generations add to the trainings they consist of, and what it takes to trace and re-initialise a network.

Everything that `learn.evolve` does besides its fits: the trace, re-initialisation, the slim network, the file. Measuring the
slim network on the validation set is a column of its own, because it is asked for (`Evaluation(slim=True)`). The second network needs
`PARAMFX_DATA`."""
import argparse
import os
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from fastai.basics import set_seed
from torch.nn.functional import interpolate
from benchmarks.evolution.evolve_digits import RATE, Timed, learner
from benchmarks.timing import paired, quartiles, table, write_table
from paramfx import zoo
from paramfx.evolution import generations
from paramfx.data.memory import digits_dls, tensor_dls
from paramfx.evolution.masks import kels_masks, reinit_
from paramfx.evolution.policies import KELS
from paramfx.data.images import cifar_dls

GOAL, GOAL_SECONDS = .01, .4


def cifar64(n=2560, n_valid=512):
    "A part of CIFAR-10, held at 64 pixels"
    def big(x): return interpolate(x.float(), scale_factor=2, mode='bilinear').byte()
    dls = cifar_dls(device='cpu', augment=False)
    (x, y), (xv, yv) = ((ds.x, ds.y) for ds in (dls.train.dataset, dls.valid.dataset))
    return tensor_dls(big(x[:n]), y[:n], big(xv[:n_valid]), yv[:n_valid], bs=32, device='cpu')


CASES = {'digits/convnet': (partial(zoo.build, 'digits/convnet'), partial(digits_dls, device='cpu'), 3, 15, 2e-2),
         'resnet18, CIFAR-10 at 64 pixels': (partial(zoo.build, 'grocery/resnet18'), cifar64, 2, 3, 1e-3)}


@contextmanager
def watched(names):
    "CPU seconds inside functions: name -> (owner, attribute)"
    spent = dict.fromkeys(names, 0.)
    def timed(name, f):
        def _f(*args, **kwargs):
            start = time.process_time()
            try: return f(*args, **kwargs)
            finally: spent[name] += time.process_time()-start
        return _f
    patches = [mock.patch.object(o, a, timed(n, getattr(o, a))) for n, (o, a) in names.items()]
    for p in patches: p.start()
    try: yield spent
    finally:
        for p in patches: p.stop()


def measure(name, cases=None):
    "What an evolution takes besides its trainings"
    build, data, n, epochs, lr = (cases or CASES)[name]
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        learn, fit = learner(build(), data(), 0, path=Path(folder)), Timed(unseen=False)
        with watched({'validating': (generations, 'valid_row'), 'slim': (generations.Evolution, 'slim'),
            'file': (generations.Evolution, 'save'), 'reset': (generations.Evolution, 'forget_')}) as spent:
            start = time.process_time()
            learn.evolve(n, epochs, KELS(RATE), lr=lr, fit_method=fit)
            total = time.process_time()-start
    added, trained = total-sum(fit.cpu)-spent['validating'], sum(fit.cpu)
    return dict(what=name, generations=n, epochs=epochs, training_s=trained, added_s=added, share=added/trained,
        target=GOAL, met='yes' if added <= GOAL*trained else 'no',
                **{f'{k}_s': v for k, v in spent.items() if k != 'validating'}, slim_validation_s=spent['validating'])


def trace_and_reset(name='resnet50', rounds=5, size=224):
    "Seconds to find the masks of a network and to re-initialise it"
    net, x = zoo.build(f'imagenet/{name}'), torch.randn(1, 3, size, size)
    gen = torch.Generator().manual_seed(0)
    times = paired({'go': lambda: reinit_(net, kels_masks(net, x, RATE), generator=gen)}, rounds=rounds, warmup=1)['go']
    s = quartiles(times)['median']
    return dict(what=f'{name}: trace and re-initialise, {size} pixels', added_s=s, target=GOAL_SECONDS, met='yes' if s <= GOAL_SECONDS else 'no')


NOTE = """CPU seconds on one thread. `share`: all that `learn.evolve` does besides its fits (`added_s`, of which `slim_s` to cut
out the slim network, `file_s` to write the state after each generation, `reset_s` to re-initialise; the rest is the first
trace, the norms, and what a call of `evolve` costs) over the fits, which validate after each epoch; at most 1 %.
`slim_validation_s` comes on top: the slim network is measured once per generation, and `Evaluation(slim=False)` spares it. The trace
is not repeated between generations; for the last row it is, at most .4 s."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows = [*map(measure, CASES), trace_and_reset(rounds=a.rounds)]
    print(table(rows) if a.dry else write_table('evolve_cost', rows, NOTE).read_text())
