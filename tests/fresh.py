"""A fresh process for a few lines of code, without the seconds that importing torch and fastai takes.

A helper process has imported what everybody imports, and nothing of paramfx; each run is a fork of it, so what a run
imports, patches or leaves behind is its own."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = r'''
import json, os, signal, sys, traceback, warnings
import torch, fastai.vision.all, fastai.text.all, fastai.tabular.all, safetensors.torch
torch.set_num_threads(1)
assert not [m for m in sys.modules if m.startswith('paramfx')]

def child(job, rank):
    if len(ranks) > 1: job['env'] |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
    for name in ('out', 'err'): os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), dict(out=1, err=2)[name])
    signal.alarm(300)  # who waits for ever is ended
    os.environ.clear(); os.environ.update(job['env'])
    os.chdir(job['cwd'])
    sys.argv, sys.path[:] = ['-c', *job['args']], [job['cwd'], *job['env'].get('PYTHONPATH', '').split(os.pathsep), *sys.path]
    warnings.simplefilter('ignore')
    rc = 0
    try: exec(compile(job['code'], '<string>', 'exec'), vars(__import__('__main__')))
    except SystemExit as e: rc = e.code if isinstance(e.code, int) else bool(e.code)
    except BaseException: traceback.print_exc(); rc = 1
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(rc or 0)

for line in sys.stdin:
    job = json.loads(line)
    ranks, codes = range(job['ranks']), []
    left = set()
    for rank in ranks:
        if not (pid := os.fork()): child(job, rank)
        left.add(pid)
    while left:
        pid, status = os.wait()
        left.remove(pid)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]: [os.kill(o, signal.SIGKILL) for o in left]  # they would wait for it for ever
    print(json.dumps(next((c for c in codes if c), 0)), flush=True)
'''
_servers = {}


def run_fresh(code, *args, cwd=None, env=None, check=False, ranks=1):
    """As `subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *args], capture_output=True, text=True)`

    `ranks`: as many processes at once, each with its `RANK` in the environment."""
    server = _servers.get(os.getpid())
    if server is None or server.poll() is not None:
        clean = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'PYTHONWARNINGS': 'ignore'}
        server = _servers[os.getpid()] = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', SERVER], text=True, env=clean,
                                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with tempfile.TemporaryDirectory() as tmp:
        job = dict(code=code, args=[str(a) for a in args], cwd=str(cwd or os.getcwd()), env=dict(env or os.environ),
                   out=f'{tmp}/out', err=f'{tmp}/err', ranks=ranks)
        server.stdin.write(json.dumps(job)+'\n'); server.stdin.flush()
        rc = json.loads(server.stdout.readline())
        out, err = (Path(tmp, n).read_text() if Path(tmp, n).exists() else '' for n in ('out', 'err'))
    done = subprocess.CompletedProcess(['python', '-c', code], rc, out, err)
    assert not check or rc == 0, err[-3000:]
    return done


def run_ranks(file, *args, cwd, n=2):
    "`file` on `n` ranks, started by torchrun, as users start them"
    here = Path(__file__).resolve().parent
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
           'PYTHONPATH': os.pathsep.join([str(here), str(here.parent), os.environ.get('PYTHONPATH', '')])}
    cmd = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', str(file), *map(str, args)]
    return subprocess.run(cmd, capture_output=True, text=True, env=env, cwd=cwd, timeout=180)
