"""What `import paramfx.all` takes on top of fastai, in fresh processes, and what it must not load."""
import argparse
import json
import os
import subprocess
import sys

from benchmarks.timing import quartiles, write_table

TARGET = .050
HEAVY = ('torchvision', 'timm', 'matplotlib.pyplot', 'sklearn', 'scipy', 'pandas', 'onnx', 'onnxruntime', 'accelerate', 'triton')
FASTAI = 'import fastai.basics, fastai.callback.all'
PROBE = """
import json, sys, time
{first}
before, t = set(sys.modules), time.process_time()
{second}
took = time.process_time() - t
new = sorted(set(sys.modules) - before)
print(json.dumps(dict(seconds=took, new=new, before=sorted(m for m in {heavy!r} if m in before))))
"""


def probe(first, second):
    "CPU seconds of `second` after `first` in a fresh process, and the modules that it loaded"
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    env.pop('PYTHONDONTWRITEBYTECODE', None)  # as an installed package, from compiled files; the first round writes them
    code = PROBE.format(first=first, second=second, heavy=HEAVY)
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    if out.returncode: raise RuntimeError(f'{second!r} failed:\n{out.stderr}')
    return json.loads(out.stdout.splitlines()[-1])


def run(rounds=9, base=FASTAI, ours='import paramfx.all'):
    "All rows: in every round, in rotating order, fastai alone, ours timed after it, and both together"
    alone, ontop, both = [], [], []
    for r in range(-1, rounds):
        jobs = [(alone, '', base), (ontop, base, ours), (both, '', f'{base}; {ours}')]
        k = r % 3
        for into, first, second in jobs[k:] + jobs[:k]:
            got = probe(first, second)
            if r >= 0: into.append(got)  # the first round compiles, and fills the disk cache
    check(ontop)
    q = quartiles([o['seconds'] for o in ontop])
    d = quartiles([b['seconds']-a['seconds'] for a, b in zip(alone, both)])
    f = quartiles([a['seconds'] for a in alone])
    ms = lambda q: dict(ms=1e3*q['median'], q1=1e3*q['q1'], q3=1e3*q['q3'])
    other = sorted({m.split('.')[0] for o in ontop for m in o['new']} - {'paramfx'})
    return [dict(what=f'{ours}, after fastai', **ms(q), target_ms=1e3*TARGET, met='yes' if q['median'] <= TARGET else 'no',
                 modules=sum(m.startswith('paramfx') for m in ontop[0]['new']), also_loaded=', '.join(other) or 'nothing'),
            dict(what='difference of whole processes, with and without', **ms(d)), dict(what=base, **ms(f))]


def check(probes):
    "Raise where our modules loaded one of the heavy ones that fastai had not"
    for o in probes:
        bad = [m for m in o['new'] if m in HEAVY or m.split('.')[0] in HEAVY and m.split('.')[0] not in o['before']]
        if bad: raise AssertionError(f"import paramfx.all loads {', '.join(bad[:5])}; import it where it is used")


NOTE = """CPU time of `import paramfx.all` in a fresh process, after `import fastai.basics, fastai.callback.all`; medians and quartiles.
Second line, as a cross-check: the difference between two fresh processes, one with our import and one without (its spread is
that of fastai's import, third line). Checked as well: none of torchvision, timm, matplotlib.pyplot, scikit-learn, scipy,
pandas, onnx, accelerate and triton is loaded unless fastai has loaded it already."""


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--rounds', type=int, default=9)
    ap.add_argument('--dry', action='store_true', help='print, write no table')
    a = ap.parse_args()
    rows = run(a.rounds)
    if a.dry:
        from benchmarks.timing import table
        print(table(rows))
    else: print(write_table('imports', rows, NOTE).read_text())
