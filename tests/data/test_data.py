"Loaders in memory: fastai's rules, a second route to every batch, and the real MNIST where it is at hand"
import gzip, random
import numpy as np, pytest, torch
from torch import nn
from fastai.basics import DataLoaders, Learner, TensorImageBW, TfmdDL, accuracy, load_learner, set_seed
from paramfx.data.memory import InMemory, MemoryDL, digits_dls, mnist_dls, tensor_dls
from paramfx.data.loading import as_bytes, find_data

class ItemByItem(TfmdDL):
    "fastai's own loader, with our permutation"
    shuffle_fn = MemoryDL.shuffle_fn

def twin(dls, bs=64):
    "The same items through fastai's own loader, item by item"
    dss = [list(zip(dl.dataset.x, dl.dataset.y)) for dl in dls.loaders]
    drop = {'drop_last': False} if bs > len(dss[0]) else {} # where fastai would have no batch to train on
    return DataLoaders.from_dsets(*dss, bs=bs, num_workers=0, device='cpu', dl_type=ItemByItem, **drop)

def same(a, b): return len(a) == len(b) and all(torch.equal(s, t) for p,q in zip(a, b) for s,t in zip(p, q))

@pytest.mark.parametrize('bs', [7, 64, 1437, 2000])
def test_batches_equal_fastai(bs):
    "Same shuffling, same last batch, epoch after epoch, from the same random state"
    random.seed(5); ours = digits_dls(bs=bs, device='cpu')
    random.seed(5); theirs = twin(ours, bs)
    for _ in range(2):
        for a,b in zip(ours.loaders, theirs.loaders): assert same(list(a), list(b)) and len(a) == len(b)

def net(): return nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.ReLU(), nn.Linear(32,10))

def test_training_equals_fastai():
    "A run on these loaders is the run on fastai's, bit for bit"
    def weights(make):
        set_seed(3); dls = make()
        learn = Learner(dls, net(), loss_func=nn.CrossEntropyLoss(), lr=1e-2)
        with learn.no_logging(): learn.fit(2)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    ds = digits_dls(device='cpu')
    def ours(): return DataLoaders.from_dsets(*[d.dataset for d in ds.loaders], bs=64, dl_type=MemoryDL, device='cpu')
    assert torch.equal(weights(ours), weights(lambda: twin(ds)))

def test_split_is_stratified_and_fixed():
    a,b,c = (digits_dls(seed=s, device='cpu') for s in (1,1,2))
    assert torch.equal(a.valid_ds.y, b.valid_ds.y) and not torch.equal(a.valid_ds.y, c.valid_ds.y)
    share = a.valid_ds.y.bincount()/(a.train_ds.y.bincount() + a.valid_ds.y.bincount())
    assert ((share - .2).abs() < .01).all()
    assert len(digits_dls(valid_pct=.5, device='cpu').valid_ds) == 899

def test_making_a_split_moves_no_generator():
    "Loaders draw one seed each from Python's generator, as fastai's do; nothing else moves"
    np.random.seed(0); torch.manual_seed(0)
    n,t = np.random.get_state()[1].copy(),torch.get_rng_state()
    digits_dls(device='cpu')
    assert (np.random.get_state()[1] == n).all() and torch.equal(torch.get_rng_state(), t)

def test_types_only_for_transforms():
    plain,typed = digits_dls(device='cpu'),digits_dls(device='cpu', after_batch=lambda b: b)
    assert type(plain.one_batch()[0]) is torch.Tensor and type(typed.one_batch()[0]) is TensorImageBW
    items = digits_dls(device='cpu', after_item=lambda o: o)
    assert type(items.one_batch()[0]) is TensorImageBW and items.one_batch()[0].shape == (64,1,8,8)
    assert same(list(plain.valid), list(items.valid))

def test_item_transform_is_applied():
    def double(o:TensorImageBW): return o*2
    x,y = torch.rand(6,1,4,4),torch.arange(6)
    dls = tensor_dls(x, y, x, y, bs=3, normalize=False, after_item=double, device='cpu')
    assert torch.equal(torch.cat([b[0] for b in dls.valid]), 2*x)

def test_export_predict_and_test_dl(tmp_path):
    "An exported learner holds no data, normalises raw items and names classes"
    x,y = torch.rand(40,1,8,8)*5+3,torch.arange(40)%2
    dls = tensor_dls(x, y, x, y, bs=8, vocab=['cat','dog'], device='cpu')
    learn = Learner(dls, net(), path=tmp_path, metrics=accuracy)
    with learn.no_logging(): learn.fit(1)
    preds = learn.get_preds()[0]
    learn.export()
    assert (tmp_path/'export.pkl').stat().st_size < 60_000
    other = load_learner(tmp_path/'export.pkl')
    assert len(other.dls.train_ds) == 0 and other.dls.vocab == ['cat','dog'] and other.dls.c == 2
    new = other.get_preds(dl=other.dls.test_dl(x.numpy()))[0]
    torch.testing.assert_close(new, preds)
    name,idx,p = other.predict(x[7])
    assert name == ['cat','dog'][int(idx)]
    torch.testing.assert_close(p, preds[7])
    with pytest.raises(ValueError, match=r'\[1, 8, 8\]'): other.predict(x[0,0])

def test_export_leaves_the_loaders_alone(tmp_path):
    dls = digits_dls(device='cpu')
    learn = Learner(dls, net(), path=tmp_path)
    learn.export()
    assert learn.dls is dls and len(dls.train_ds) == 1437

def test_show():
    import matplotlib.pyplot as plt
    dls = digits_dls(device='cpu')
    dls.show_batch(max_n=5)
    assert sum(bool(ax.images) for ax in plt.gcf().axes) == 5
    b = dls.valid.one_batch()
    shown = dls.valid.show_batch(b, show=False)[2]
    back = torch.stack([o[0] for o in shown])*16
    torch.testing.assert_close(torch.Tensor(back), torch.Tensor(back).round(), atol=1e-4, rtol=0)
    axs = plt.subplots(1, 3)[1] # an array, as pyplot gives it
    dls.show_batch(b, max_n=3, ctxs=axs)
    assert all(ax.images for ax in axs)
    dls.valid.show_batch(b, max_n=5)
    assert len([ax for ax in plt.gcf().axes if ax.images]) == 5
    learn = Learner(dls, net())
    learn.show_results(max_n=4)
    titles = [ax.get_title() for ax in plt.gcf().axes if ax.images]
    assert len(titles) == 4 and all(len(t.split('\n')) == 2 for t in titles)
    plt.close('all')
    flat = tensor_dls(torch.rand(4,3), torch.arange(4), torch.rand(4,3), torch.arange(4), bs=2, device='cpu')
    with pytest.raises(TypeError, match='Only images'): flat.show_batch()

def test_regression_targets():
    x,y = torch.randn(32,3),torch.randn(32,2)
    dls = tensor_dls(x, y, x, y, bs=8, device='cpu')
    learn = Learner(dls, nn.Linear(3,2))
    with learn.no_logging(): learn.fit(1)
    assert dls.c == 2 and getattr(dls, 'vocab') is None

def test_constant_channel_is_not_divided_by_zero():
    x = torch.rand(8,2,4,4); x[:,1] = 3
    dls = tensor_dls(x, torch.arange(8), x, torch.arange(8), bs=4, device='cpu')
    assert dls.train_ds.x.isfinite().all() and (dls.train_ds.x[:,1] == 0).all()

def test_lengths_must_match():
    with pytest.raises(ValueError, match='3 validation inputs'): tensor_dls(torch.rand(4,2), torch.arange(4), torch.rand(3,2), torch.arange(2))

def write_idx(fn, a, packed):
    raw = bytes([0,0,8,a.ndim]) + np.array(a.shape, '>i4').tobytes() + a.astype(np.uint8).tobytes()
    if packed: gzip.open(f'{fn}.gz', 'wb').write(raw)
    else: fn.write_bytes(raw)

@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('sub', ['', 'raw', 'MNIST/raw', 'mnist/MNIST/raw'])
def test_idx_files(tmp_path, monkeypatch, packed, sub):
    "Packed or not, at every depth, by path or by the environment variable"
    folder = tmp_path/sub; folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part,n in (('train',12), ('t10k',5)):
        write_idx(folder/f'{part}-images-idx3-ubyte', rng.integers(0,256,(n,28,28)), packed)
        write_idx(folder/f'{part}-labels-idx1-ubyte', np.arange(n)%10, packed)
    monkeypatch.setenv('PARAMFX_DATA', str(tmp_path))
    for dls in (mnist_dls(tmp_path, bs=4, device='cpu'), mnist_dls(bs=4, device='cpu')):
        assert (len(dls.train_ds), len(dls.valid_ds)) == (12,5) and dls.valid_ds.y.tolist() == [0,1,2,3,4]

def test_mnist_missing(tmp_path, monkeypatch):
    monkeypatch.delenv('PARAMFX_DATA', raising=False)
    for path in (None, tmp_path, tmp_path/'nowhere'):
        with pytest.raises(FileNotFoundError, match='PARAMFX_DATA') as e: mnist_dls(path)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match="'test' or 'split'"): mnist_dls(valid='none')

def test_real_mnist(data_dir):
    "Counts, statistics and the first labels of the published files"
    if not (data_dir/'mnist').is_dir(): pytest.skip('no mnist folder in PARAMFX_DATA')
    dls = mnist_dls(data_dir, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (60_000, 10_000, 10)
    assert dls.train_ds.y[:8].tolist() == [5,0,4,1,9,2,1,3] and dls.valid_ds.y[:5].tolist() == [7,2,1,0,4]
    assert abs(float(dls.train_ds.mean) - .1307) < 1e-4 and abs(float(dls.train_ds.std) - .3081) < 1e-4
    split = mnist_dls(data_dir, valid='split', device='cpu')
    assert (len(split.train_ds), len(split.valid_ds)) == (50_000, 10_000)
    assert torch.equal(split.valid_ds.y, dls.train_ds.y[-10_000:])
    assert split.one_batch()[0].shape == (100,1,28,28)

def test_two_ranks_share_the_items():
    "fastai's distributed loader splits each pass; together the ranks see every item"
    pytest.importorskip('accelerate')
    from fastai.distributed import DistributedDL
    class Local(DistributedDL):
        def _broadcast(self, t, rank): return t
    dl = digits_dls(device='cpu').valid
    seen = [torch.cat([b[1] for b in Local(dl, rank=r, world_size=2)]) for r in (0,1)]
    assert torch.equal(torch.cat(seen), dl.dataset.y)

# images in bytes

def pixels(n=40, c=3, size=8): return torch.randint(0, 256, (n,c,size,size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('normalize', [True, False, ([.5], [.25])])
def test_bytes_give_the_batches_of_numbers(c, normalize):
    x,y = pixels(c=c),torch.arange(40)%3
    if isinstance(normalize, tuple): normalize = tuple(o*c for o in normalize)
    random.seed(1); small = tensor_dls(x, y, x[:9], y[:9], bs=7, normalize=normalize, device='cpu')
    random.seed(1); large = tensor_dls(x/255, y, x[:9]/255, y[:9], bs=7, normalize=normalize, device='cpu')
    for a,b in zip(small.loaders, large.loaders):
        for (xa,ya),(xb,yb) in zip(a, b):
            assert xa.dtype == torch.float32 and torch.equal(torch.Tensor(ya), torch.Tensor(yb))
            torch.testing.assert_close(torch.Tensor(xa), torch.Tensor(xb), atol=1e-5, rtol=1e-5)
    shown = torch.stack([torch.Tensor(o[0]) for o in small.valid.show_batch(show=False, max_n=7)[2]])
    torch.testing.assert_close(shown, x[:7]/255, atol=1e-5, rtol=1e-5)
    assert 0 <= shown.min() and shown.max() <= 1 and small.train_ds.x is x  # no copy of all pixels

def test_statistics_of_bytes_in_pieces():
    "More images than fit one piece; NumPy computes them at once"
    x = pixels(2300, size=4)
    dls = tensor_dls(x, torch.arange(2300)%2, x[:4], torch.arange(4)%2, device='cpu')
    a = x.numpy().transpose(1,0,2,3).reshape(3,-1)/255
    np.testing.assert_allclose(dls.train_ds.mean, a.mean(1), rtol=1e-5)
    np.testing.assert_allclose(dls.train_ds.std, a.std(1, ddof=1), rtol=1e-5)

def test_given_statistics_of_numbers():
    x = torch.rand(6,3,4,4)
    dls = tensor_dls(x, torch.arange(6), x, torch.arange(6), normalize=([.1,.2,.3], [1.,2.,4.]), bs=6, device='cpu')
    want = torch.stack([(x[:,i]-m)/s for i,(m,s) in enumerate([(.1,1.), (.2,2.), (.3,4.)])], 1)
    torch.testing.assert_close(dls.valid.one_batch()[0], want)
    torch.testing.assert_close(dls.valid_ds.encode([x[2]]).x[0], want[2])

def test_normalization_leaves_the_data_alone():
    x = pixels(); before = x.clone()
    dls = tensor_dls(x, torch.arange(40), x, torch.arange(40), device='cpu')
    list(dls.train); list(dls.valid)
    assert torch.equal(x, before)

def test_fastai_finds_the_normalization():
    "`vision_learner` would add ImageNet's otherwise"
    from fastai.vision.learner import _add_norm
    x = pixels(); dls = tensor_dls(x, torch.arange(40), x, torch.arange(40), device='cpu')
    _add_norm(dls, dict(stats=([.5]*3, [.5]*3)), pretrained=True)
    assert [type(t).__name__ for t in dls.after_batch.fs] == ['NormalizeBytes']
    assert [type(t).__name__ for t in dls.new_empty().valid.new(dls.valid_ds).after_batch.fs] == ['NormalizeBytes']

@pytest.mark.parametrize('to_float', [0, 1])
def test_fastais_own_transforms_of_bytes(to_float):
    "Bytes become numbers in [0,1] once, before augmentations and a normalisation that is given"
    from fastai.data.transforms import IntToFloatTensor, Normalize
    from fastai.vision.augment import Flip
    x = pixels(); norm = Normalize.from_stats([.5]*3, [.25]*3, cuda=False)
    for tfms,want in (([Flip(p=0.)], x/255), ([norm], (x/255-.5)/.25), ([Flip(p=0.), norm], (x/255-.5)/.25)):
        tfms = tfms + [IntToFloatTensor()]*to_float
        dls = tensor_dls(x, torch.arange(40), x, torch.arange(40), bs=40, normalize=([0.]*3, [1.]*3), after_batch=tfms, device='cpu')
        torch.testing.assert_close(torch.Tensor(dls.valid.one_batch()[0]), want)
        again = dls.valid.new(dls.valid_ds)
        torch.testing.assert_close(torch.Tensor(again.one_batch()[0]), want)

def test_bytes_that_are_no_images():
    x = torch.zeros(4, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r'images \(N,C,H,W\), not \[4, 5\]'): tensor_dls(x, torch.arange(4), x, torch.arange(4), normalize=False)

@pytest.mark.parametrize('bad', [torch.full((3,8,8), 1.5), torch.full((3,8,8), -1.), torch.full((3,8,8), 300)])
def test_pixels_out_of_range(bad):
    with pytest.raises(ValueError, match='before normalisation'): InMemory(pixels(), torch.arange(40)).encode([bad])

def test_rows_however_they_are_asked_for():
    "The quick way for a loader's rows, the usual one for all other indices"
    ds = InMemory(torch.rand(10,2), torch.arange(10))
    for i in (3, -1, slice(2,5), [1,2], torch.tensor([4,4,0]), torch.tensor([-1,2]), torch.arange(10) > 6, torch.tensor(5)):
        for a,b in zip(ds[i], (ds.x[i], ds.y[i])): assert torch.equal(a, b)

@pytest.mark.parametrize('in_bytes', [False, True])
def test_random_transforms_know_training_from_validation(in_bytes):
    "fastai's random transforms ask for `split_idx`: without it, some are never applied and others in validation, too"
    import fastai.callback.progress  # noqa: F401 learn.no_bar
    from fastai.vision.augment import Flip
    x = pixels(); y = torch.arange(40); given = x if in_bytes else x/255
    dls = tensor_dls(given, y, given, y, bs=40, normalize=False, after_batch=Flip(p=1.), shuffle=False, drop_last=False, device='cpu')
    assert torch.allclose(torch.Tensor(dls.train.one_batch()[0]), (x/255).flip(-1), atol=1e-5)
    assert torch.allclose(torch.Tensor(dls.valid.one_batch()[0]), x/255, atol=1e-5)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192,40)))
    with learn.no_bar(), learn.no_logging(): (flipped,plain),_ = learn.tta(n=1, beta=None)
    for p,o in ((plain, x/255), (flipped, (x/255).flip(-1))): torch.testing.assert_close(torch.Tensor(p), learn.model(o).softmax(1).detach())

def test_split_idx_is_put_back():
    "After an error, too; and an exported learner still tells training from validation"
    dls = digits_dls(device='cpu')
    with pytest.raises(KeyError), dls.valid_ds.set_split_idx(0) as ds:
        assert ds is dls.valid_ds and ds.split_idx == 0
        raise KeyError
    assert dls.valid_ds.split_idx == 1 and [dl.dataset.split_idx for dl in dls.new_empty().loaders] == [0,1]

def test_as_bytes_rounds():
    assert torch.equal(as_bytes(torch.arange(256)/255), torch.arange(256, dtype=torch.uint8))
    assert as_bytes(torch.tensor([.499,.999])).tolist() == [127,255] and as_bytes(torch.tensor([0,1,255])).tolist() == [0,1,255]

def test_default_vocab_holds_the_classes_of_both_sets():
    dls = tensor_dls(torch.rand(4,2), torch.tensor([0,1,0,1]), torch.rand(2,2), torch.tensor([0,3]), device='cpu')
    assert dls.vocab == [0,1,2,3] and dls.c == 4

def test_rows_as_items():
    "Rows bring their targets, so that fastai's Interpretation works"
    from fastai.interpret import ClassificationInterpretation
    dls = digits_dls(device='cpu'); learn = Learner(dls, net(), metrics=accuracy)
    dl = dls.test_dl(dls.valid_ds.items[3:6])
    dls.valid_ds.names = [f'digit {i}' for i in range(360)]
    assert dls.test_dl(dls.valid_ds.items[3:6]).dataset.names == ['digit 3','digit 4','digit 5']
    assert torch.equal(dl.dataset.y, dls.valid_ds.y[3:6]) and torch.equal(dl.dataset.x, dls.valid_ds.x[3:6])
    it = ClassificationInterpretation.from_learner(learn)
    losses,idx,rows = it.top_losses(4, items=True)
    own = nn.functional.cross_entropy(learn.model(dls.valid_ds.x), dls.valid_ds.y, reduction='none').detach()
    torch.testing.assert_close(torch.Tensor(losses), own.topk(4)[0])
    assert [o.i for o in rows] == idx.tolist() and it.confusion_matrix().sum() == 360
    inps,_,targs,_,_ = it[idx]
    assert torch.equal(torch.Tensor(inps), dls.valid_ds.x[idx]) and torch.equal(torch.as_tensor(targs).long(), dls.valid_ds.y[idx])

def test_vocab_is_fastais():
    dls = digits_dls(device='cpu')
    assert dls.vocab == list(range(10)) and dls.vocab.o2i[3] == 3
    with pytest.raises(ValueError, match='twice'): InMemory(torch.rand(2,1), torch.arange(2), vocab=['a','a'])

def halve(o): return torch.full((2,), float(o)/2)

def test_reader():
    "It survives export, and reads whatever it is made for"
    import pickle
    x = torch.rand(8,2); dls = tensor_dls(x, torch.arange(8)%2, x, torch.arange(8)%2, normalize=([1.], [2.]), reader=halve, bs=4, device='cpu')
    empty = pickle.loads(pickle.dumps(dls.new_empty()))
    assert empty.valid_ds.reader is halve and len(empty.valid_ds) == 0
    from fastcore.foundation import L
    for items in (['6'], ('6',), L('6')): assert empty.test_dl(items).dataset.x.tolist() == [[1.,1.]]
    with pytest.raises(ValueError, match='no items'): empty.test_dl([])

@pytest.mark.parametrize('workers', [0, 2, 8])
def test_workers(workers):
    "The batches of one process, also where there are more workers than batches"
    x = pixels(); dls = tensor_dls(x, torch.arange(40), x, torch.arange(40), bs=9, num_workers=workers, device='cpu')
    batches = list(dls.valid)
    assert [len(b[0]) for b in batches] == [9,9,9,9,4] and len(list(dls.train)) == len(dls.train) == 4
    torch.testing.assert_close(torch.cat([torch.Tensor(b[1]) for b in batches]).long(), torch.arange(40))

def test_find_data(tmp_path, monkeypatch):
    (tmp_path/'b/deep').mkdir(parents=True); (tmp_path/'b/deep/here.bin').touch(); (tmp_path/'c').mkdir(); (tmp_path/'c/here.bin').touch()
    monkeypatch.setenv('PARAMFX_DATA', str(tmp_path))
    for path in (None, tmp_path, str(tmp_path)): assert find_data('X', path, ('a','b/deep','c'), 'h*.bin', '') == tmp_path/'b/deep'
    assert find_data('X', tmp_path/'c', ('a','.'), 'here.bin', '') == tmp_path/'c'
    with pytest.raises(FileNotFoundError, match='No X in .*nowhere: buy it'): find_data('X', tmp_path/'nowhere', ('.',), '*', 'buy it')
    monkeypatch.delenv('PARAMFX_DATA')
    with pytest.raises(FileNotFoundError, match='unset'): find_data('X', None, ('.',), '*', 'buy it')

def test_permutations_are_uniform():
    "Each item is as likely at each place, and no epoch repeats the last"
    dls = tensor_dls(torch.zeros(6,1), torch.arange(6), torch.zeros(2,1), torch.zeros(2).long(), bs=6, normalize=False, device='cpu')
    random.seed(0); dls.train.rng = random.Random(0)
    orders = torch.stack([next(iter(dls.train))[1] for _ in range(3000)])
    at = torch.stack([(orders == k).sum(0) for k in range(6)]).double()
    assert (orders.sort(1).values == torch.arange(6)).all()
    assert ((at-500).abs() < 4.5*(3000*(1/6)*(5/6))**.5).all() and len(orders.unique(dim=0)) > 700 # of 720

SETTINGS = [(dict(vald='split'), 'vald.*valid'), (dict(batch_tfms=[]), 'batch_tfms.*after_batch'),
    (dict(item_tfms=[]), 'item_tfms'), (dict(seqlen=3), 'seq_len')]
def makers():
    from paramfx import zoo
    from paramfx.data.text import text_dls
    x,y,lines = torch.randn(8, 3),torch.arange(8)%2,['a b c d']*9
    return (lambda **kw: tensor_dls(x, y, x, y, **{'bs':2, **kw})),(lambda **kw: text_dls(
        lines, lines, **{'bs':2, **kw})),(lambda **kw: zoo.dls('cifar10', path='nowhere', **kw)),(lambda **kw: zoo.dls('mnist', path='nowhere', **kw))

@pytest.mark.parametrize('kw,text', SETTINGS)
def test_a_misspelt_setting_is_not_swallowed(kw, text):
    for make in makers():
        with pytest.raises(TypeError, match=text): make(**kw)

@pytest.mark.parametrize('bs', [0, -1, 'x', 2.5, None, True])
def test_a_batch_is_a_positive_whole_number(bs):
    for make in makers():
        with pytest.raises(ValueError, match='bs must be'): make(bs=bs)

def test_loader_functions_pass():
    "fastai's loaders take functions by name; those are known"
    x,y = torch.arange(6.).view(6,1),torch.arange(6)
    dls = tensor_dls(x, y, x, y, bs=2, normalize=False, device='cpu', shuffle=False, num_workers=0,
        pin_memory=False, verbose=False, get_idxs=lambda: [5,4,3,2,1,0])
    assert torch.cat([b[1] for b in dls.train]).tolist() == [5,4,3,2,1,0]

@pytest.mark.parametrize('content', [b'', b'xx', bytes([0,0,8,3])+b'\0'*12+b'\1'])
def test_damaged_mnist_names_the_file(tmp_path, content):
    for name in ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'): (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match='train-images-idx3-ubyte is damaged') as e: mnist_dls(tmp_path)
    assert '\n' not in str(e.value)
    (tmp_path/'train-images-idx3-ubyte').unlink(); (tmp_path/'train-images-idx3-ubyte.gz').write_bytes(content)
    with pytest.raises(ValueError, match='ubyte.gz is damaged'): mnist_dls(tmp_path)
