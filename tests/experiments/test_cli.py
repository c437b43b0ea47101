"The `paramfx` command: the demo in a process of its own, as a user runs it; mistakes in this one, since imports take seconds"
import json
import os
import subprocess
import sys

import pytest

import paramfx.experiments.demo  # noqa: F401  (registers the rows)
from paramfx.experiments.cli import main
from paramfx.core.registry import ROWS


def run(*args, cwd=None, **env):
    return subprocess.run([sys.executable, '-c', 'import sys; from paramfx.experiments.cli import main; sys.exit(main())', *args], cwd=cwd,
                          capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', **env}, timeout=300)


@pytest.fixture(scope='module')
def demo(tmp_path_factory, request):
    "The demo, once: a row of each family, under --slow all of them"
    folder = tmp_path_factory.mktemp('demo')
    rows = [*ROWS] if request.config.getoption('--slow') else ['bases S8U1', 'sliced 0.5', 'slim 0.5', 'split 2', 'dsr 0.9', 'dense']
    return run('demo', '--json', '--only', ','.join(rows), cwd=folder), folder, rows


def test_demo_prints_json_and_nothing_else(demo):
    res, _, want = demo
    assert res.returncode == 0, res.stderr
    rows = {r['row']: r for r in json.loads(res.stdout)['rows']}
    assert set(rows) == {*want} and list(rows)[0] == 'dense'
    dense, sparse = rows['dense'], rows['dsr 0.9']
    assert dense['accuracy'] > .96 and sparse['accuracy'] > .94
    # the plain network it leaves, not the checkpoint with masks; filters that died by chance are cut out on the way
    for k in ('params', 'macs', 'bytes'): assert .8*dense[k] < sparse[k] <= dense[k]
    assert dense['nonzero'] == dense['params'] and sparse['nonzero'] < .15*dense['nonzero'] and sparse['macs'] == sparse['macs_executed']


def test_demo_writes_what_it_says(demo):
    import torch
    res, folder, _ = demo
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


def test_cost_for_people(call):
    code, out, err = call('cost', 'mnist/lenet_300_100')
    assert code == 0 and not err
    lines = dict(l.split(None, 1) for l in out.splitlines() if not l.startswith('peak'))
    assert lines['network'] == 'mnist/lenet_300_100' and lines['parameters'] == '267,020' and lines['MACs'] == '266,200'
    assert int(lines['bytes'].replace(',', '')) > 4*267_020 and ' ms' in lines['latency']


def test_cost_for_machines(call):
    code, out, err = call('cost', 'cifar10/resnet32', '--json')
    res = json.loads(out)
    assert code == 0 and not err and (res['name'], res['params'], res['macs']) == ('cifar10/resnet32', 464_154, 68_862_592)
    assert res['latency_ms'] > 0 and res['bytes'] > 4*464_154
    twice = json.loads(call('cost', 'cifar10/resnet32', '--json', '--input', '3,64,64')[1])
    assert twice['params'] == res['params'] and twice['macs'] == 4*(res['macs']-640)+640 and twice['sample'] == '[1, 3, 64, 64]'


@pytest.mark.few(3)
@pytest.mark.parametrize('args,params,macs', [
    (['cifar10/resnet32', '--shared-rank', '16', '--unique-rank', '1', '--n-bases', '2', '--mode', 'basis'], 245_642, 79_086_208),
    (['cifar10/resnet56', '--shared-rank', '0', '--unique-rank', '16'], 942_618, 138_068_608),
    (['cifar10/resnet32', '--shared-rank', '8'], 150_666, 47_628_928),
    (['cifar100/densenet121', '--shared-rank', '16', '--unique-rank', '1', '--n-bases', '1', '--mode', 'basis'], 5_084_504, 704_212_992),
    (['cifar100/mobilenet_v2', '--shared-rank', '16', '--unique-rank', '1', '--n-bases', '1', '--mode', 'tie'], 2_163_812, 67_356_736),
    (['imagenet/mobilenet_v2_eca', '--n-bases', '2', '--mode', 'tie'], 2_978_905, 313_621_120), (['cifar10/resnet32-S16U0*'], 218_650, 75_154_048)])
def test_cost_of_shared_filters(call, args, params, macs):
    "Golden counts; the rules of each network are those of its published form"
    code, out, err = call('cost', *args, '--json')
    res = json.loads(out)
    assert code == 0 and not err and (res['name'], res['params'], res['macs']) == (args[0], params, macs)
    assert {k: str(res[k]) for k in ('shared_rank', 'unique_rank', 'n_bases', 'mode') if k in res} == {
        k[2:].replace('-', '_'): v for k, v in zip(args[1::2], args[2::2])}


def test_cost_of_shared_filters_for_people(call):
    code, out, err = call('cost', 'cifar10/resnet20', '--shared-rank', '8')
    assert code == 0 and not err and 'shared      12 layers share 3 bases; parameters 269,722 -> ' in out


def test_cost_of_a_language_model(call):
    res = json.loads(call('cost', 'ptb/lstm', '--input', '10', '--json')[1])
    assert res['params'] == 10_000*201 + 4*200*402 and res['macs'] == 10*(4*200*400 + 200*10_000)


@pytest.mark.parametrize('args,text', [
    (['cost'], 'name'), (['cost', 'resnet32'], 'does not begin with a data set'),
    (['cost', 'cifar10/resnet33'], '8, 14, 20'), (['cost', 'cifar10/wrn'], 'did you mean'),
    (['cost', 'mnist/lenet_300_100', '--input', '28'], '3 dimensions'),
    (['cost', 'mnist/lenet_300_100', '--input', '1,14,14'], 'does not run on a sample of shape [1, 1, 14, 14]'),
    (['cost', 'cifar10/resnet32', '--input', '3,x,3'], 'no shape'),
    (['cost', 'cifar10/resnet32', '--input', '3,0,32'], 'no shape'), (['cost', 'cifar10/resnet32', '--inp'], '--inp'),
    (['cost', 'cifar10/resnet32', '--mode', 'tied'], "mode='tied'"),
    (['cost', 'cifar10/resnet32', '--n-bases', '3'], 'n_bases=3'), (['cost', 'cifar10/resnet32', '--shared-rank', '2.5'], '--shared-rank'),
    (['cost', 'cifar10/resnet32', '--shared-rank', '-1'], 'shared_rank=-1'),
    (['cost', 'cifar10/resnet32', '--shared_rank', '1'], '--shared_rank'), (['cost', 'mnist/lenet_300_100', '--mode', 'tie'], 'Nothing to share'),
    (['cost', 'cifar100/resnext50_32x4d', '--shared-rank', '16', '--unique-rank', '1'], 'multiple of 4'),
    (['cost', 'cifar10/resnet32-S8U1', '--shared-rank', '4'], 'shares filters already'),
    (['cost', 'cifar10/resnet32-S8'], 'no form'), (['cost', 'cifar10/resnet32', '--shared-rank', '200'], 'dimensions')])
def test_cost_bad_input(call, args, text):
    code, out, err = call(*args)
    assert code == 2 and not out and text in err and err.count('\n') == 1, err


@pytest.mark.parametrize('args', [['--input', '3,1000000,1000000'], ['--input', '']])
def test_cost_refuses_an_input_in_one_line(args, call):
    code, out, err = call('cost', 'imagenet/resnet18', *args)
    assert code == 2 and not out and err.count('\n') == 1 and '--input' in err
