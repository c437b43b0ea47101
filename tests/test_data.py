"Loaders in memory: fastai's rules, a second route to every batch, and the real MNIST where it is at hand"
import gzip, random
import numpy as np, pytest, torch
from torch import nn
from fastai.basics import DataLoaders, Learner, TensorImageBW, accuracy, load_learner, set_seed
from paramfx.data import InMemory, MemoryDL, digits_dls, mnist_dls, tensor_dls

def twin(dls, bs=64):
    "The same items through fastai's own loader, item by item"
    dss = [list(zip(dl.dataset.x, dl.dataset.y)) for dl in dls.loaders]
    return DataLoaders.from_dsets(*dss, bs=bs, num_workers=0, device='cpu')

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
