"""The networks of the zoo against counted figures, to the unit, by several routes:

- golden counts of the original, unshared, dense or full-width networks;
- the *shared* rows: taking the published sharing out of a plain network must give the published shared count;
- the *sliced* rows: cutting every channel space of a full network must give the counts at that rate;
- torchvision's own networks: equal weights, equal outputs."""
import json, math, re
from pathlib import Path

import pytest, torch
from torch import nn
from paramfx import zoo
from paramfx.zoo import networks as nets
from paramfx.channels.trace import trace_channels
from paramfx.report.cost import count_macs, n_params
from fresh import run_fresh

GOLDEN = Path(__file__).parent.parent/'golden'


def golden(name): return json.loads((GOLDEN/name).read_text())


def counts(net, name, **kw):
    "Parameters and multiply-adds for one input"
    return n_params(net)[0], count_macs(net, zoo.sample(name, **kw))[0]


# ------------------------------------------------------------------ dense figures
BASES = {'CIFAR-10': 'cifar10', 'CIFAR-100': 'cifar100', 'ILSVRC2012': 'imagenet'}
SPELLED = {'ResNeXt50': 'resnext50_32x4d', 'MobileNetV2': 'mobilenet_v2', 'DenseNet121': 'densenet121'}


def bases_name(row):
    dataset, net = BASES[row['dataset']], row['row']
    name = f"{dataset}/{SPELLED.get(net, net.lower())}"
    return name+'_expand' if name == 'imagenet/mobilenet_v2' else name


ORIGINALS = [r for r in golden('shared_bases/counts.json')['rows'] if r['kind'] == 'original']


@pytest.mark.few(3)
@pytest.mark.parametrize('row', ORIGINALS, ids=bases_name)
def test_original_rows(row):
    name, want = bases_name(row), row['counted']
    net = zoo.build(name)
    assert counts(net, name) == (want['params'], want['macs'])
    by_kind = lambda kind: sum(p.numel() for m in net.modules() if isinstance(m, kind) for p in m.parameters(recurse=False))
    assert by_kind(nn.BatchNorm2d) == want['breakdown']['batchnorm'] and by_kind(nn.Linear) == want['breakdown']['linear']
    assert by_kind(nn.Conv2d) == want['breakdown']['other_conv']


def test_bn_outputs():
    "Elements that leave batch norms, the counted figure that sees the sizes of all feature maps"
    for row in ORIGINALS:
        if row['dataset'] == 'ILSVRC2012' and row['row'] == 'ResNet101': continue # counted above; this is a second look
        name, seen = bases_name(row), []
        net = zoo.build(name).eval()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d): m.register_forward_hook(lambda m, i, o: seen.append(o.numel()))
        with torch.no_grad(): net(zoo.sample(name))
        assert sum(seen) == row['counted']['bn_outputs'], name


MNIST = {'0.98,no_batch_norm=True': dict(norm=False)}
INITIAL = [r for r in golden('dynamic_sparse/initial_counts.json') if r['sparse_layers']]


@pytest.mark.parametrize('row', INITIAL, ids=lambda r: r['model'])
def test_dense_totals(row):
    "Totals, and the shapes of the layers that the experiments made sparse"
    model = row['model']
    name = 'mnist/lenet_300_100' if 'mlp' in model else 'cifar10/wrn_28_2' if 'Wide' in model else 'imagenet/resnet50'
    net = zoo.build(name, norm=False) if 'no_batch_norm' in model else zoo.build(name)
    assert n_params(net)[0] == row['dense_total']
    shapes = [tuple(p.shape) for p in net.parameters()]
    for layer in row['sparse_layers']: shapes.remove(tuple(layer['shape'])) # each is there, as often as asked


SLIM = [*{(r['arch'], r['num_classes']): r for r in golden('knowledge_evolution/slim_counts.json')}.values()]


@pytest.mark.few(2)
@pytest.mark.parametrize('row', SLIM, ids=lambda r: f"{r['arch']}-{r['num_classes']}")
def test_dense_column_of_slim_counts(row):
    name = f"imagenet/{row['arch']}"
    assert counts(zoo.build(name, n_out=row['num_classes']), name) == (row['dense_params'], row['dense_macs'])
    if row['num_classes'] == 102: assert n_params(zoo.build(f"flowers102/{row['arch']}"))[0] == row['dense_params']


# ------------------------------------------------------------------ sliced figures
def sliced_name(model):
    "Name and builder arguments of a model of `params_macs.json`"
    kind, kw = model.split()[0], dict(re.findall(r'(\w+)=(\w+)', model))
    if kind == 'cifar_resnet': return f"cifar{kw.get('classes', '10')}/preact_resnet{kw['depth']}", {'width': int(kw['k'])} if kw['k'] != '1' else {}
    if kind == 'cifar_vgg': return f"cifar10/vgg{kw['depth']}", {}
    if kind == 'imagenet_resnet': return f"imagenet/resnet{kw['depth']}", {}
    if kind == 'imagenet_vgg': return f"imagenet/vgg{kw['depth']}_bn", {}
    return f"imagenet/{ {'imagenet_mobilenetv2': 'mobilenet_v2', 'imagenet_googlenet': 'googlenet'}[kind]}", {}


SLICED = golden('model_slicing/params_macs.json')
heavy = lambda r: 'imagenet' in r['model']


@pytest.mark.few(2)
@pytest.mark.parametrize('row', [r if not heavy(r) or r['rate'] == 1 and 'vgg' not in r['model'] else pytest.param(r, marks=pytest.mark.slow) for r in SLICED],
                         ids=lambda r: f"{r['model']} {r['rate']}".replace(' ', '-'))
def test_sliced_rows(row):
    "A full network cut to the rate has the parameters and multiply-adds of the sliced one"
    name, kw = sliced_name(row['model'])
    net = zoo.build(name, **kw)
    if row['rate'] < 1: net = trace_channels(net, zoo.sample(name)).cut(row['rate']).apply(net, check=False)
    assert counts(net, name) == (row['active_params'], row['macs'])


@pytest.mark.few(10)
@pytest.mark.parametrize('row', [r for r in SLICED if r['model'].startswith(('cifar_vgg', 'cifar_resnet '
    'depth=20', 'cifar_resnet depth=164')) or r['model'] in ('imagenet_resnet depth=18', 'imagenet_resnet depth=50')],
                         ids=lambda r: f"{r['model']} {r['rate']}".replace(' ', '-'))
def test_width_scales_all_channels(row):
    "A thin network from the start has the counts of the wide one sliced"
    name, _ = sliced_name(row['model'])
    assert counts(zoo.build(name, width=row['rate']), name) == (row['active_params'], row['macs'])


# ------------------------------------------------------------------ shared figures
def shared(params, macs, uses, bases, extra=0):
    """Counts after sharing. `uses`: (channels in, channels out, pixels, rank) of each 3x3 convolution that shares;
    `bases`: (rank, channels in) of each basis. Parameters S C 9 once and U C 9 + R T + 2 R per use, multiply-adds R (9 C + T) per pixel."""
    for c, t, hw, s, u in uses:
        r = s+u
        params += u*c*9 + r*t + 2*r - 9*c*t
        macs += hw*(r*(9*c+t) - 9*c*t)
    return params + sum(s*c*9 for s, c in bases), macs


def resnet_sharing(depths, first, size, s, u, double=False):
    "All convolutions of a stage but those of its first block"
    uses, bases = [], []
    for i, n in enumerate(depths):
        c, m = first*2**i, 2**i
        uses += [(c, c, (size >> i)**2, s*m, u*m)]*(2*(n-1))
        bases += [(s*m, c)]*(1+double)
    return uses, bases


def published_counts(row, dataset):
    r = next(r for r in golden('shared_bases/counts.json')['rows'] if r['row'] == row and BASES[r['dataset']] == dataset)
    return r['counted']['params'], r['counted']['macs']


@pytest.mark.parametrize('name,row,args', [
    ('cifar10/resnet32', 'ResNet32-S8U1', ((5, 5, 5), 16, 32, 8, 1)), ('cifar10/resnet32', 'ResNet32-S16U1*', ((5, 5, 5), 16, 32, 16, 1, True)),
    ('cifar10/resnet56', 'ResNet56-S16U1', ((9, 9, 9), 16, 32, 16, 1)), ('cifar100/resnet34', 'ResNet34-S16U1', ((3, 4, 6, 3), 64, 32, 16, 1)),
    ('cifar100/resnet34', 'ResNet34-S32U16', ((3, 4, 6, 3), 64, 32, 32, 16)), ('imagenet/resnet34', 'ResNet34-S32U1*', ((3, 4, 6, 3), 64, 56, 32, 1, True))])
def test_sharing_taken_from_a_resnet(name, row, args):
    assert shared(*counts(zoo.build(name), name), *resnet_sharing(*args)) == published_counts(row, name.split('/')[0])


def test_sharing_taken_from_a_densenet():
    "Every 3x3 convolution of a dense block shares, the first one included"
    uses = [(128, 32, hw*hw, 16, 1) for n, hw in ((6, 32), (12, 16), (24, 8), (16, 4)) for _ in range(n)]
    name = 'cifar100/densenet121'
    assert shared(*counts(zoo.build(name), name), uses, [(16, 128)]*4) == published_counts('DenseNet121-S16U1', 'cifar100')


def tied(net, stages, project=False):
    "Parameters that tying saves: in `stages`, blocks from the second on share their 1x1 expansion (and projection)"
    saved = 0
    for i in stages:
        blocks = getattr(net, f'layer{i}')[1:]
        for b in blocks[1:]: saved += b.conv1[0].weight.numel() + (b.conv3[0].weight.numel() if project else 0)
    return saved


def test_tying_taken_from_a_mobilenet():
    name = 'cifar100/mobilenet_v2'
    p, m = counts(net := zoo.build(name), name)
    assert (p-tied(net, range(3, 7)), m) == published_counts('MobileNetV2-Shared', 'cifar100')
    name = 'imagenet/mobilenet_v2_expand' # its published row was counted with a small attention module: a handful of weights more
    p, m = counts(net := zoo.build(name), name)
    want = published_counts('MobileNetV2-Shared++', 'imagenet')
    assert 0 < want[0]-(p-tied(net, range(3, 7), project=True)) < 30 and 0 < want[1]-m < 2000


# ------------------------------------------------------------------ other figures of the specifications
def test_splitnet_network():
    "WRN-16-8 by its authors' counter: kernels without the first convolution, the classifier with its bias; two FLOPs per multiply-add"
    net, name = zoo.build('cifar100/wrn_16_8'), 'cifar100/wrn_16_8'
    kernels = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert kernels + net.fc.bias.numel() - net.conv1.weight.numel() == 10_999_908
    assert f'{2*(counts(net, name)[1]-432*1024)/1e9:.4f}' == '3.0955' # multiply-adds of the first convolution left out, too


@pytest.mark.parametrize('k,want', [(.75, 209_130), (.98, 356_376), (1.15, 491_845), (1.33, 652_093), (1.47, 795_477)])
def test_thin_wide_resnets(k, want):
    assert n_params(zoo.build(f'cifar10/wrn_28_{k}'))[0] == n_params(zoo.build('cifar10/wrn_28_2', width=k/2))[0] == want


@pytest.mark.parametrize('width,want', [(.54, 8_167_095), (.46, 5_771_217)])
def test_thin_resnet50(width, want): assert n_params(zoo.build('imagenet/resnet50', width=width))[0] == want


# ------------------------------------------------------------------ second routes to what a network computes
@pytest.mark.few(2)
@pytest.mark.parametrize('depth', ['18', '34', '50', '101'])
def test_our_resnet_is_torchvisions(depth):
    "The builder that gives thin ResNets: torchvision's weights and, with them, its outputs"
    name = f'imagenet/resnet{depth}'
    theirs = zoo.build(name, n_out=10).eval()
    ours = nets.resnet(zoo._DEPTHS[depth], 10, bottleneck=int(depth) > 34).eval()
    ours.load_state_dict(theirs.state_dict())
    x = zoo.sample(name, size=(3, 64, 64))
    with torch.no_grad(): assert torch.equal(ours(x), theirs(x))


def test_cifar_stem():
    "cifar100/resnet18 is torchvision's with another stem"
    from torchvision.models import resnet18
    net = resnet18(num_classes=100)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours = zoo.build('cifar100/resnet18')
    net.load_state_dict(ours.state_dict())
    x = zoo.sample('cifar100', 2)
    with torch.no_grad(): assert torch.equal(net.eval()(x), ours.eval()(x))


def norm_relu(b, t): return ((t-b.running_mean.view(-1, 1, 1))/(b.running_var+b.eps).sqrt().view(-1, 1, 1)).clamp(min=0)


def randomised(m):
    "`m` in evaluation mode, with running statistics and scales that tell one norm from another"
    torch.manual_seed(0)
    for b in m.modules():
        if isinstance(b, nn.modules.batchnorm._BatchNorm): b.running_mean.normal_(); b.running_var.uniform_(.5, 2)
    return m.eval()


def test_wide_block_by_hand():
    block = randomised(nets.WideBlock(4, 8, 2))
    x = torch.randn(2, 4, 6, 6)
    h = norm_relu(block.bn1, x)
    y = nn.functional.conv2d(norm_relu(block.bn2, nn.functional.conv2d(h, block.conv1.weight, stride=2, padding=1)), block.conv2.weight, padding=1)
    with torch.no_grad(): torch.testing.assert_close(block(x), y + nn.functional.conv2d(h, block.shortcut.weight, stride=2))
    same = nets.WideBlock(4, 4).eval() # without a change of shape the input itself is added
    same.conv2.weight.data.zero_()
    assert torch.equal(same(x), x)


@torch.no_grad()
def test_padded_shortcut():
    x = torch.rand(2, 3, 5, 5)
    for stride, extra in ((1, 2), (2, 3)):
        y = nets.PadShortcut(stride, extra)(x)
        want = torch.zeros(2, 3+extra, *[-(-5//stride)]*2)
        want[:, 1:4] = x[:, :, ::stride, ::stride]
        assert torch.equal(y, want)


@torch.no_grad()
@pytest.mark.parametrize('n_in,stride', [(8, 1), (4, 1), (8, 2)])
def test_preact_bottleneck_by_hand(n_in, stride):
    "The shortcut reads the raw input; where the shape changes, a projection with a norm"
    b, x = randomised(nets.PreActBottleneck(n_in, 2, stride)), torch.randn(2, n_in, 6, 6)
    h = nn.functional.conv2d(norm_relu(b.bn1, x), b.conv1.weight)
    h = nn.functional.conv2d(norm_relu(b.bn2, h), b.conv2.weight, stride=stride, padding=1)
    h = nn.functional.conv2d(norm_relu(b.bn3, h), b.conv3.weight)
    assert (b.downsample is None) == (n_in == 8 and stride == 1)
    torch.testing.assert_close(b(x), h + (x if b.downsample is None else b.downsample(x)))


def kinds(net): return ' '.join(type(m).__name__ for m in net.modules() if not [*m.children()])


def test_activations_stand_where_they_belong():
    "Counts do not see them"
    assert kinds(nets.lenet_300_100()) == 'Flatten Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear BatchNorm1d'
    assert kinds(nets.lenet_300_100(norm=False)) == 'Flatten Linear ReLU Linear ReLU Linear'
    assert kinds(nets.convnet()) == 'Conv2d BatchNorm2d ReLU '*3 + 'AdaptiveAvgPool2d Flatten Linear'
    vgg = kinds(nets.vgg_cifar(11)).replace('Conv2d BatchNorm2d ReLU', 'C').replace('MaxPool2d', 'P')
    assert vgg == 'C C P C C P C C C C AdaptiveAvgPool2d Flatten Linear'
    for net in (nets.wide_resnet(10, 1), nets.preact_resnet(11)): assert kinds(net).endswith('BatchNorm2d ReLU AdaptiveAvgPool2d Flatten Linear')
    mobile = kinds(nets.mobilenet_v2(small=True)).split()
    assert 'ReLU6' not in mobile and mobile.count('ReLU') == 2*17+2
    dense = nets.densenet_cifar((2, 2)).features
    assert kinds(dense.transition1) == 'BatchNorm2d Identity Conv2d AvgPool2d' and not hasattr(dense, 'pool0')
    assert all(b.drop.p == .3 for b in nets.wide_resnet(10, 1, p=.3).modules() if isinstance(b, nets.WideBlock))


@pytest.mark.parametrize('build', [lambda: nets.resnet((1, 1)), lambda: nets.wide_resnet(10, 2),
    lambda: nets.preact_resnet(11), lambda: nets.vgg_cifar(11, width=.25),
                                   lambda: nets.mobilenet_v2(width=.25), lambda: nets.densenet_cifar((2, 2), width=.5)])
def test_convolutions_start_by_fan_out(build):
    torch.manual_seed(0)
    for m in build().modules():
        if not isinstance(m, nn.Conv2d): continue
        want = (2/(m.weight[0, 0].numel()*m.out_channels))**.5
        assert m.bias is None or not m.bias.any()
        assert abs(m.weight.std()/want - 1) < 5/m.weight.numel()**.5 # far beyond chance


def test_inverted_block():
    x = torch.randn(2, 8, 5, 5)
    for b, adds in ((nets.Inverted(8, 8), True), (nets.Inverted(8, 8, 2), False), (nets.Inverted(8, 6), False), (nets.Inverted(8, 6, project=True), True)):
        b.eval(); b.conv3[1].weight.data.zero_() # nothing but the shortcut is left
        y = b(x)
        assert bool(y.abs().sum() > 0) == adds
        assert isinstance(b.conv1[2], nn.ReLU) and len(b.conv3) == 2
    assert torch.equal(nets.Inverted(8, 8).eval().shortcut(x), x)


# ------------------------------------------------------------------ every listed name
CHEAP = [n for n in zoo.list() if n.split('/')[0] in ('digits', 'mnist', 'cifar10')]


@pytest.mark.few(4)
@pytest.mark.parametrize('name', CHEAP)
def test_listed_networks_run_and_learn(name):
    "One training step moves every parameter; the trace finds channels to cut"
    net = zoo.build(name, **({} if name.startswith(('digits', 'mnist')) or 'densenet' in name else {'width': .25}))
    x, n = zoo.sample(name, 4), zoo.DATASETS[name.split('/')[0]][0]
    before = [p.detach().clone() for p in net.parameters()]
    loss = nn.functional.cross_entropy(out := net.train()(x), torch.arange(4)%n)
    assert out.shape == (4, n)
    loss.backward()
    still = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still and len(before) == len([*net.parameters()])
    assert any(s.cuttable for s in trace_channels(net, x).spaces)


def test_language_model():
    "Names, counts, a training step, the carried state, copies and files"
    import copy, io
    name = 'wikitext2/lstm'
    net = zoo.build(name)
    assert n_params(net)[0] == 13_777*200 + 13_777 + 4*200*402 and net.out.weight is net.emb.weight
    assert counts(net, name)[1] == 35*(4*200*400 + 200*13_777) and net.state is None # counting leaves no state behind
    assert n_params(zoo.build('ptb/lstm', tie=False, width=.5, n_layers=2))[0] == 2*10_000*100 + 10_000 + 2*4*100*202
    lm = zoo.build(name, n_out=60, n_emb=16)
    x = zoo.sample(name, 4, 9) % 60
    nn.functional.cross_entropy(lm(x).flatten(0, 1), x.roll(-1, 1).flatten()).backward()
    assert all(p.grad.abs().sum() > 0 for p in lm.parameters()) and not lm.state[0].requires_grad
    lm.eval()
    with torch.no_grad():
        lm.reset(); whole = lm(x); lm.reset()
        torch.testing.assert_close(torch.cat([lm(x[:, :4]), lm(x[:, 4:])], 1), whole)
        assert not torch.allclose(lm(x[:, 4:]), whole[:, 4:]) # the state has run on
        alone = lm(x[:2]) # another batch size begins afresh
        torch.testing.assert_close(alone, whole[:2])
    assert copy.deepcopy(lm).state is None and set(lm.state_dict()) == {n for n, _ in lm.named_parameters(remove_duplicate=False)}
    torch.save(lm, f := io.BytesIO()); f.seek(0)
    assert torch.load(f, weights_only=False).state is None
    with pytest.raises(ValueError, match='tie=False'): zoo.build(name, n_hidden=100)


def test_language_model_in_a_learner(tmp_path):
    "fit, lr_find, cost, export: words that follow a rule are learnt"
    from fastai.basics import Learner, Perplexity, load_learner
    from fastai.callback.rnn import ModelResetter
    import fastai.callback.schedule  # noqa: F401  (gives Learner lr_find)
    for part, n in (('train', 300), ('valid', 60), ('test', 60)): (tmp_path/f'{part}.txt').write_text('a b c d e f g h\n'*n)
    dls = zoo.dls('ptb', path=tmp_path, bs=8, seq_len=12, device='cpu')
    learn = Learner(dls, zoo.build('ptb/lstm', n_out=dls.c, n_emb=32, p=.1), metrics=Perplexity(), cbs=ModelResetter, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False, num_it=5)
        learn.fit_one_cycle(3, 2e-2)
        assert learn.validate()[1] < 1.5 and learn.validate(ds_idx=2)[1] < 1.5
    assert learn.cost(latency=False).params == n_params(learn.model)[0]
    learn.export()
    assert load_learner(tmp_path/'export.pkl').dls.vocab == dls.vocab


@pytest.mark.parametrize('name', ['mnist', 'cifar10', 'cifar100', 'grocery', 'wikitext2'])
def test_loaders_of_real_data(data_dir, name):
    "Every data set of which a copy is at hand: a batch fits the network of the same name"
    if not (data_dir/name).is_dir(): pytest.skip(f'no {name} folder in PARAMFX_DATA')
    dls = zoo.dls(name, path=data_dir/name, bs=4, device='cpu')
    x, y = dls.one_batch()
    n, shape = zoo.DATASETS[name]
    assert tuple(x.shape[1:]) == shape and x.dtype == zoo.sample(name).dtype and dls.c == n and int(y.max()) < n


def test_each_text_is_read_from_its_own_folder(tmp_path, monkeypatch):
    "Both lie below the same folder; where one is missing, the other is no substitute"
    monkeypatch.setenv('PARAMFX_DATA', str(tmp_path))
    def write(sub, pattern):
        (tmp_path/sub).mkdir()
        for part in ('train', 'valid', 'test'): (tmp_path/sub/pattern.format(part)).write_text('a b c\n'*20)
    write('wikitext2', 'wiki.{}.txt')
    with pytest.raises(FileNotFoundError, match='No ptb in .*PARAMFX_DATA/ptb'): zoo.dls('ptb')
    write('ptb', 'ptb.{}.txt')
    for name, source in (('ptb', 'ptb.train.txt'), ('wikitext2', 'wiki.train.txt')):
        for path in (None, tmp_path, tmp_path/name): assert zoo.dls(name, path=path, bs=2, device='cpu').train_ds.source == source


@pytest.mark.parametrize('name', sorted({*zoo.DATASETS}-{'digits'})) # these come with scikit-learn
def test_missing_data_sets_say_where_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv('PARAMFX_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError) as e: zoo.dls(name)
    text = str(e.value)
    assert '\n' not in text and 'PARAMFX_DATA' in text and any(o in text for o in ('torchvision', 'http', 'image-net.org', 'pytorch/examples'))


@pytest.mark.parametrize('name', zoo.list('imagenet/*') + ['grocery/resnet18', 'dogs/resnet50'])
def test_large_networks_build(name):
    with torch.device('meta'): net = zoo.build(name)
    n = zoo.DATASETS[name.split('/')[0]][0]
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    assert last.out_features == n


def test_names_that_are_not_listed():
    "The rules reach further than the list"
    assert n_params(zoo.build('cifar10/resnet110'))[0] > n_params(zoo.build('cifar10/resnet56'))[0]
    assert isinstance(zoo.build('imagenet/alexnet'), nn.Module) and isinstance(zoo.build('flowers102/squeezenet1_1'), nn.Module)
    assert n_params(zoo.build('imagenet/mobilenet_v2', width=.5))[0] < 2_000_000


def test_samples():
    "Fixed by their seed, and word numbers from the whole vocabulary"
    for name in ('mnist', 'ptb'):
        a, b, c = (zoo.sample(name, 64, seed=s) for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.min() >= 0 and 9000 < a.max() < 10_000


@pytest.mark.parametrize('call,text', [
    (lambda: zoo.build('cifar10/wrn_28'), 'wrn_28_2'), (lambda: zoo.build('cifar11/resnet20'), 'does not begin with a data set'),
    (lambda: zoo.build('cifar10'), 'No network'), (lambda: zoo.build(''), 'does not begin'), (lambda: zoo.build('cifar10/resnet21'), '8, 14, 20'),
    (lambda: zoo.build('cifar10/wrn_29_2'), 'depth 29'), (lambda: zoo.build('cifar10/preact_resnet50'),
    'depth 50'), (lambda: zoo.build('cifar10/vgg12'), '11, 13, 16, 19'),
    (lambda: zoo.build('imagenet/resnet_50'), 'resnet50'), (lambda: zoo.build('imagenet/fcn_resnet50'), 'No network'),
    (lambda: zoo.build('imagenet/googlenet', width=.5), 'has no width'), (lambda: zoo.build('mnist/lenet_300_100', n_out=0), 'n_out=0'),
    (lambda: zoo.build('mnist/lenet_300_100', width=-1), 'width must be'), (lambda: zoo.build('cifar10/wrn_28_2', width=float('nan')), 'width must be'),
    (lambda: zoo.sample('nothing'), 'does not begin'), (lambda: zoo.sample('mnist', size=(28, 28)),
    '3 dimensions'), (lambda: zoo.dls('nothing'), 'does not begin'),
    (lambda: zoo.published('shared'), 'shared_bases'), (lambda: zoo.published(dataset='svhn'), 'cifar100')])
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=re.escape(text)) as e: call()
    assert '\n' not in str(e.value)


def test_module_names_shadow_nothing():
    "`list` stays Python's own after `from paramfx.all import *`"
    out = run_fresh('from paramfx.all import *\nassert list("ab") == ["a", "b"]\nprint(len(zoo.list()), zoo.build.__name__)', check=True).stdout
    assert out.split() == [str(len(zoo.list())), 'build']


# ------------------------------------------------------------------ published rows
def records(*args, **kw): return zoo.published(*args, **kw).to_dict('records')


def test_printed_figures():
    "Each row names a network that can be built, and its printed figures are numbers"
    df = zoo.published(count=False)
    assert len(df) > 100 and 'net_params' not in df and all(df[c].dtype.kind == 'f' for c in ('top1', 'top5', 'spread'))
    rows = df.to_dict('records')
    for r in rows:
        dataset, f, _ = zoo._find(r['network'])
        assert 0 < r['top1'] <= 100 or math.isnan(r['top1']) and r['source'].startswith('code of') and not r['params']
        assert r['measure'] in ('error %', 'accuracy %') and r['source'] and r['row']
        assert r['flops_are'] in (('2 MACs', 'MACs') if r['flops'] else ('',))
        if r['params']: assert re.fullmatch(r'[\d.]+M', r['params'])
    assert len({(r['family'], r['dataset'], r['row']) for r in rows}) == len(rows)


def test_printed_equals_golden():
    "The printed figures are those that the golden vectors carry"
    rows = {(r['dataset'], r['row'].lower()): r for r in records('shared_bases', count=False)}
    n = 0
    for g in golden('shared_bases/counts.json')['rows']:
        if not g['published']: continue
        name = g['row'].lower().replace('mobilenetv2', 'mobilenet_v2').replace('resnext50-s16u1', 'resnext50_32x4d-s64u4') # under its true ranks
        r, p = rows[BASES[g['dataset']], name], g['published']
        assert (r['params'], r['flops']) == (p['params'], p['flops']) and r['top1'] == p['top1_error'] and (r['flops_are'] == p['flops_are'].replace('*', ' '))
        assert (None if math.isnan(r['top5']) else r['top5']) == p['top5_error']
        n += 1
    assert n >= 9
    runs, slim = golden('knowledge_evolution/published_runs.json'), {(r['dataset'], r['row']): r for r in records('knowledge_evolution', count=False)}
    for key, d in (('aircraft_sample_run', 'aircraft'), ('flower102_readme_chart', 'flowers102')):
        cols = runs[key]['columns']
        for v in runs[key]['rows']:
            for what in ('dense', 'slim'):
                r = slim[d, f'resnet18 KELS 0.5 generation {v[0]} {what}']
                assert r['top1'] == v[cols.index(f'{what}_test_top1')] and r['top5'] == v[cols.index(f'{what}_test_top5')]


def test_printed_sparse_rows_are_plausible():
    "No golden file has them: a slip of the pen would break the order, since accuracy falls with every step of sparsity"
    rows = [r for d in ('cifar10', 'imagenet') for r in records('dynamic_sparse', d, count=False)]
    by = {}
    for r in rows: by.setdefault(r['row'].rpartition(' ')[0], {})[r['row'].rpartition(' ')[2]] = r
    dense = by['wrn_28_2'].pop('dense')['top1']
    for name, at in by.items():
        for k in ('top1', 'top5'):
            vals = [at[s][k] for s in sorted(at)]
            assert all(math.isnan(v) for v in vals) or vals == sorted(vals, reverse=True) and vals[0]-vals[-1] < 5, name
        if name.startswith('wrn'): assert all(dense-4 < r['top1'] < dense+.1 and 0 < r['spread'] < .4 for r in at.values())


def test_counted_figures():
    "What is counted comes from the networks that the rows start from"
    rows = records('dynamic_sparse', 'cifar10')
    assert {(r['net_params'], r['net_macs']) for r in rows} == {(1_467_610, count_macs(zoo.build('cifar10/wrn_28_2'), zoo.sample('cifar10'))[0])}
    cifar = records('shared_bases', 'cifar10')
    assert {r['net_params'] for r in cifar} == {464_154, n_params(zoo.build('cifar10/resnet56'))[0]}
    assert {r['row']: r['row_params'] for r in cifar}['resnet32-S8U1'] == 150_666


def test_counting_draws_nothing():
    "Networks are counted without values: no random number is drawn, no weight made"
    before = torch.get_rng_state()
    net = zoo._bare(dict(network='cifar10/resnet32', width=''))
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {'meta'}
    records('shared_bases', 'cifar10'); records('dynamic_sparse', 'mnist')
    assert torch.equal(torch.get_rng_state(), before) and zoo.build('cifar10/resnet20').conv1.weight.std() > 0


def test_a_count_may_change_the_network(monkeypatch):
    "Each row is counted on a copy of its own"
    def shrink(net, row):
        n = n_params(net)[0]
        net.fc1 = nn.Identity()
        return dict(params=n)
    monkeypatch.setitem(zoo._COUNTS, 'dynamic_sparse', shrink)
    assert {r['row_params'] for r in records('dynamic_sparse', 'mnist')} == {267_020}


def test_sparse_rows_are_counted_by_their_family():
    "Live and dense parameters of the sparse rows, by the family's own masks; thin networks as they are"
    import paramfx.sparse.demo # registers  # noqa: F401
    want = {m['model']: m['learnable'] for m in golden('dynamic_sparse/initial_counts.json')}
    rows = {r['row']: r['row_params'] for d in ('mnist', 'cifar10', 'imagenet') for r in records('dynamic_sparse', d)}
    for s in ('0.9', '0.95', '0.98', '0.99'): assert rows[f'lenet_300_100 dsr {s}'] == want[f'mnist_mlp({s})']
    for s in ('0.5', '0.6', '0.7', '0.8', '0.9'): assert rows[f'wrn_28_2 set {s}'] == want[f'cifar10_WideResNet(28,widen_factor=2,initial_sparsity_conv={s})']
    for s in ('0.8', '0.9'): assert rows[f'resnet50 static {s}'] == want[f'imagenet_resnet50(initial_sparsity_conv={s},initial_sparsity_fc={s})']
    weights = sum(p.numel() for p in zoo.build('imagenet/resnet50').parameters() if p.ndim > 1)
    for row, mb in (('erk 0.8', 23.683), ('uniform 0.8', 23.685), ('erk 0.9', 13.499), ('uniform 0.9', 13.532)): # as RigL's README has them: 4 bytes per
        assert rows[f'resnet50 rigl {row}'] == pytest.approx((mb*1e6 - weights/8)/4, rel=.015) # live weight, a bit per weight; norms are folded there
    assert rows['wrn_28_2 dense'] == 1_467_610 and rows['resnet50 thin 0.8'] == 8_167_095 and rows['resnet50 thin 0.9'] == 5_771_217


@pytest.mark.parametrize('name', ['imagenet/mobilenet_v2', 'cifar10/resnet20', 'imagenet/resnet18', 'ptb/lstm'])
@pytest.mark.parametrize('width', [0, -1, float('inf'), 'x', None])
def test_width_is_a_positive_number(name, width):
    with pytest.raises(ValueError, match='width must be a positive number'): zoo.build(name, width=width)


def test_no_network_without_channels():
    with pytest.raises(ValueError, match='width=0.2 leaves no channel'): zoo.build('cifar10/resnext50_32x4d', width=.2)
    assert zoo.build('cifar10/resnext50_32x4d', width=.25).eval()(zoo.sample('cifar10')).shape == (1, 10)
    with pytest.raises(ValueError, match='whole and at least 1'): zoo.build('ptb/lstm', n_emb=0)


@pytest.mark.parametrize('call,text', [
    (lambda: zoo.build('cifar100'), 'No network is named'),
    (lambda: zoo.build('cifar100/'), 'No network is named'), (lambda: zoo.build(None), 'does not begin'),
    (lambda: zoo.build('cifar10/wrn_28_.'), 'wrn_28_2'), (lambda: zoo.build('cifar10/resnet20', n_out=2.5),
    'n_out=2.5'), (lambda: zoo.build('cifar10/resnet20', n_out=True), 'n_out=True'),
    (lambda: zoo.dls('cifar10/nosuchnet'), 'No network is called'), (lambda: zoo.dls(3), 'does not begin')])
def test_more_bad_input(call, text):
    with pytest.raises(ValueError, match=re.escape(text)) as e: call()
    assert '\n' not in str(e.value)


def test_imagenet_has_a_thousand_classes(tmp_path):
    (tmp_path/'train/a').mkdir(parents=True)
    with pytest.raises(ValueError, match='holds 1 classes, and ImageNet 1000'): zoo.dls('imagenet', path=tmp_path)


def test_types_of_the_published_columns():
    import paramfx.all # families register their counts  # noqa: F401
    df = zoo.published('shared_bases', 'cifar10')
    assert {str(df[c].dtype) for c in ('row_params', 'row_macs', 'row_flops', 'shared_rank', 'unique_rank', 'n_bases')} == {'Int64'} and df.width.dtype == float
    plain = df[df.row == 'resnet32'].iloc[0] # a row about the network as it is
    assert plain.row_params == plain.net_params and plain.row_macs == plain.net_macs
    assert zoo.published('knowledge_evolution', 'aircraft').row_params.isna().all() # which nobody counts


def test_names_of_fastai_are_not_shadowed():
    import paramfx.all
    assert not hasattr(paramfx.all, 'Table') # fastai has a Table of its own
    assert nets.LSTMLM and not hasattr(paramfx.all, 'LSTMLM') # a network of the zoo as the others
