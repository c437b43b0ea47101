"The `paramfx` command: the demo in a process of its own, as a user runs it; mistakes in this one, since imports take seconds"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paramfx.experiments  # noqa: F401  (registers the rows)
from paramfx.cli import main
from paramfx.rows import ROWS


def run(*args, cwd=None, **env):
    return subprocess.run([sys.executable, '-c', 'import sys; from paramfx.cli import main; sys.exit(main())', *args], cwd=cwd,
                          capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', **env}, timeout=300)


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "The whole demo, once"
    folder = tmp_path_factory.mktemp('demo')
    return run('demo', '--json', cwd=folder), folder


def test_demo_prints_json_and_nothing_else(demo):
    res, _ = demo
    assert res.returncode == 0, res.stderr
    rows = {r['row']: r for r in json.loads(res.stdout)['rows']}
    assert set(rows) == set(ROWS) and list(rows)[0] == 'dense'
    dense, sparse = rows['dense'], rows['dsr 0.9']
    assert dense['accuracy'] > .96 and sparse['accuracy'] > .94
    assert sparse['params'] == dense['params'] == dense['nonzero']
    assert sparse['nonzero'] < .15*dense['nonzero'] and sparse['macs'] == dense['macs'] == sparse['macs_executed']
    assert sparse['bytes'] == dense['bytes']  # the plain network it leaves, not the checkpoint with masks


def test_demo_writes_what_it_says(demo):
    import torch
    res, folder = demo
    out = json.loads(res.stdout)
    made = sorted(p.name for p in (folder/out['folder']).iterdir())
    assert made == out['files']
    assert {'table.md', 'table.json', 'tradeoff.png', 'dsr_0.9_sparsity.png', 'dsr_0.9_threshold.png', 'dsr_0.9_mask.png'} <= set(made)
    assert 'dynamic_sparse_effect' in torch.load(folder/out['folder']/'dsr_0.9.pth', weights_only=True)['state']
    assert json.loads((folder/out['folder']/'table.json').read_text()) == out['rows']


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    "Run the command in this process: exit code, stdout, stderr"
    monkeypatch.chdir(tmp_path)
    def _call(*args):
        code = main(list(args))
        return code, *capsys.readouterr()
    return _call


def test_demo_is_quiet_without_a_terminal(call):
    code, out, err = call('demo', '--only', 'dense,dsr 0.95', '--epochs', '1', '--out', 'x')
    assert code == 0 and err == ''
    lines = out.splitlines()
    assert lines[0].startswith('dense: accuracy') and lines[1].startswith('dsr 0.95: accuracy')
    assert '\r' not in out and '█' not in out
    assert any(line.startswith('row ') for line in lines) and 'Written to x/' in lines[-1]


@pytest.mark.parametrize('args, words', [
    (['demo', '--frobnicate'], ['--frobnicate']),
    (['demo', '--epochs', 'many'], ['--epochs', "'many'"]),
    (['demo', '--epochs', '0'], ['epochs=0']),
    (['demo', '--only', 'lottery'], ["'lottery'", 'dsr 0.9']),
    (['demo', '--out', os.devnull + '/x'], ['cannot write', '--out']),
    (['train'], ["unknown command 'train'", 'demo'])])
def test_mistakes_are_one_line_and_exit_code_2(call, args, words, tmp_path):
    code, out, err = call(*args)
    assert code == 2 and out == ''
    assert err.count('\n') == 1
    for w in words: assert w in err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_the_process_with_2():
    res = run('demo', '--frobnicate')
    assert res.returncode == 2 and res.stderr.count('\n') == 1 and 'Traceback' not in res.stderr


def test_help(call):
    code, out, _ = call('--help')
    assert code == 0 and 'paramfx demo' in out
    with pytest.raises(SystemExit) as e: call('demo', '--help')
    assert e.value.code == 0
