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
import json, os, sys, traceback, warnings
import torch, fastai.vision.all, fastai.text.all, fastai.tabular.all, safetensors.torch
torch.set_num_threads(1)
assert not [m for m in sys.modules if m.startswith('paramfx')]

def child(job):
    for name in ('out', 'err'): os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), dict(out=1, err=2)[name])
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
    pid = os.fork()
    if not pid: child(job)
    _, status = os.waitpid(pid, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
'''
_servers = {}


def run_fresh(code, *args, cwd=None, env=None, check=False):
    "As `subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *args], capture_output=True, text=True)`"
    server = _servers.get(os.getpid())
    if server is None or server.poll() is not None:
        clean = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'PYTHONWARNINGS': 'ignore'}
        server = _servers[os.getpid()] = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', SERVER], text=True, env=clean,
                                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with tempfile.TemporaryDirectory() as tmp:
        job = dict(code=code, args=[str(a) for a in args], cwd=str(cwd or os.getcwd()), env=dict(env or os.environ), out=f'{tmp}/out', err=f'{tmp}/err')
        server.stdin.write(json.dumps(job)+'\n'); server.stdin.flush()
        rc = json.loads(server.stdout.readline())
        out, err = (Path(tmp, n).read_text() if Path(tmp, n).exists() else '' for n in ('out', 'err'))
    done = subprocess.CompletedProcess(['python', '-c', code], rc, out, err)
    assert not check or rc == 0, err[-3000:]
    return done
