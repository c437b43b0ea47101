"Images in memory: crops against a slow loop, every layout as a tiny tree, the real sets where they are at hand"
import os, pickle, random
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from fastai.basics import Learner, TensorImage, TensorImageBW, accuracy, set_seed
from paramfx.data.images import CropFlip, ImageFiles, ReadImage, cifar_dls, folder_dls, parts_dls, read_images
import fastai.callback.progress  # noqa: F401 learn.no_bar
from fresh import run_fresh

ROOT = Path(__file__).resolve().parent.parent.parent

def bytes_of(*shape, seed=0): return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

# crops

def slow(x, top, left, flip, size, pad, mode):
    "Image by image, padded by NumPy"
    res = []
    for o,t,l,f in zip(x.numpy(), top, left, flip):
        o = np.pad(o, [(0,0),(pad,pad),(pad,pad)], mode=mode)[:,t:t+size,l:l+size]
        res.append(o[:,:,::-1] if f else o)
    return torch.from_numpy(np.stack(res).copy())

@pytest.mark.parametrize('mode', ['reflect', 'constant'])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
@pytest.mark.parametrize('c,h,w,size,pad', [(3,32,32,32,4), (3,10,14,8,0), (1,9,7,8,1), (3,12,12,5,3)])
def test_crops_equal_a_slow_loop(mode, dtype, c, h, w, size, pad):
    x = bytes_of(16,c,h,w).to(dtype)
    tfm = CropFlip(size, pad, mode)
    torch.manual_seed(3); draws = tfm.draw(16, h+2*pad-size+1, w+2*pad-size+1)
    torch.manual_seed(3); out = tfm((TensorImage(x), torch.arange(16)), split_idx=0)[0]
    want = slow(x, *draws, size, pad, mode)
    assert type(out) is TensorImage and out.dtype == dtype and torch.equal(torch.as_tensor(out).as_subclass(torch.Tensor), want)
    assert len({tuple(int(o) for o in d) for d in zip(*draws)}) > 4

def test_places_are_uniform():
    "Each of the 81 places and both directions equally often: chi-square far from suspicious"
    torch.manual_seed(0)
    top,left,flip = CropFlip(32, 4).draw(81_000, 9, 9)
    counts = torch.bincount((top*9+left)*2 + flip, minlength=162).double()
    assert counts.shape == (162,) and ((counts-500)**2/500).sum() < 161+5*(2*161)**.5

def test_a_batch_has_all_places():
    "The transform itself reaches every corner: read back from an image whose pixels are their own numbers"
    x = TensorImage(torch.arange(36.).view(1,1,6,6).expand(4000,-1,-1,-1))
    out = CropFlip(4, flip=False)(x, split_idx=0)
    firsts = out[:,0,0,0].long().bincount(minlength=36).view(6,6)
    assert (firsts[:3,:3] > 300).all() and firsts.sum() == 4000 == firsts[:3,:3].sum()

@pytest.mark.parametrize('split_idx', [1, None])
def test_centre_in_validation(split_idx):
    x = TensorImageBW(bytes_of(5,1,9,12))
    state = torch.get_rng_state()
    out = CropFlip(6, pad=4)(x, split_idx=split_idx)
    assert type(out) is TensorImageBW and torch.equal(out, x[:,:,1:7,3:9]) and torch.equal(torch.get_rng_state(), state)
    assert CropFlip(8, pad=4)(TensorImage(bytes_of(2,3,8,8)), split_idx=split_idx).shape == (2,3,8,8)
    assert torch.equal(CropFlip(6, random=False)(x, split_idx=0), out)

def test_flip_only_when_asked():
    x = TensorImage(bytes_of(64,3,8,8))
    assert torch.equal(CropFlip(8, flip=False)(x, split_idx=0), x)
    out = CropFlip(8)(x, split_idx=0)
    same,mirrored = (out == x).flatten(1).all(1),(out == x.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 16 < same.sum() < 48

@pytest.mark.parametrize('kw,match', [(dict(size=0), 'size=0'), (dict(size=4, pad=-1), 'pad=-1'), (dict(size=4, mode='edge'), "'edge'")])
def test_bad_crops(kw, match):
    with pytest.raises(ValueError, match=match): CropFlip(**kw)

def test_crops_that_do_not_fit():
    x = TensorImage(bytes_of(2,3,8,8))
    with pytest.raises(ValueError, match='A crop of 11'): CropFlip(11, pad=1)(x, split_idx=0)
    with pytest.raises(ValueError, match='pad=8 is too much'): CropFlip(8, pad=8)(x, split_idx=0)
    assert CropFlip(8, pad=8, mode='constant')(x, split_idx=0).shape == x.shape

@pytest.mark.cuda
def test_crops_on_a_gpu():
    x = TensorImage(bytes_of(32,3,16,16))
    torch.manual_seed(1); a = CropFlip(16, 4)(x, split_idx=0)
    torch.manual_seed(1); b = CropFlip(16, 4)(TensorImage(x.cuda()), split_idx=0)
    assert b.is_cuda and torch.equal(a, b.cpu())

# reading

def write(fn, size=(20,16), color=(200,30,90), **kw):
    fn.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, color).save(fn, **kw)

@pytest.mark.parametrize('w,h', [(60,40), (40,60), (41,41), (20,30)])
def test_read_equals_resize_then_crop(tmp_path, w, h):
    "torchvision's way round: the shorter side first, then the centre; equal but for rounding and the edge"
    from torchvision.transforms import v2
    a = np.indices((h,w)).sum(0)*2 % 255
    im = Image.fromarray(np.stack([a, a[::-1], np.full_like(a, 77)], -1).astype(np.uint8)).resize((w,h))
    im.save(tmp_path/'a.png')
    ours = ReadImage(20)(tmp_path/'a.png').float()
    theirs = v2.functional.pil_to_tensor(v2.CenterCrop(20)(v2.Resize(20)(im))).float()
    assert ours.shape == (3,20,20) and (ours-theirs)[:,2:-2,2:-2].abs().mean() < 6 and (ours[2] == 77).all()

@pytest.mark.parametrize('w,h', [(60,40), (40,60), (45,20)])
def test_only_the_centre_square_is_read(w, h):
    a = np.full((h,w), 255, np.uint8); m = min(w, h); t,l = (h-m)//2,(w-m)//2
    a[t:t+m,l:l+m] = 0
    x = ReadImage(16)(Image.fromarray(a))
    assert (x[:,:,1:-1][:,1:-1] == 0).all() and x.float().mean() < 10

@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK', '1', 'LA'])
def test_every_mode_becomes_colour(tmp_path, mode):
    Image.new('RGB', (9,9), (255,255,255)).convert(mode).save(tmp_path/f"a.{'jpg' if mode == 'CMYK' else 'png'}")
    x = ReadImage(4)(next(tmp_path.iterdir()))
    assert x.shape == (3,4,4) and x.dtype == torch.uint8 and (x == 255).all()

def test_all_kinds_of_item():
    a = bytes_of(12,12,3).numpy(); want = ReadImage(6)(Image.fromarray(a))
    for o in (a, torch.from_numpy(a), torch.from_numpy(a).permute(2,0,1), a/255, a.astype(int)): assert torch.equal(ReadImage(6)(o), want)
    grey = a[...,0]
    for o in (grey, grey[...,None], grey[None]): assert torch.equal(ReadImage(6)(o), ReadImage(6)(Image.fromarray(grey)))
    with pytest.raises(ValueError, match=r'not \[5\]'): ReadImage(6)(np.zeros(5))

def test_files_on_disk_stand_for_the_tensor(tmp_path):
    fns = [tmp_path/f'{i}.png' for i in range(7)]
    for i,fn in enumerate(fns): write(fn, color=(i*20,0,0))
    x,lazy = read_images(fns, 8),ImageFiles(fns, 8)
    assert lazy.shape == x.shape and lazy.dtype == x.dtype and lazy.ndim == x.ndim and len(lazy) == 7
    for i in (2, -1, torch.tensor(4), torch.tensor([5,0,5]), slice(1,4), slice(0,0)): assert torch.equal(lazy[i], x[i])

def test_unreadable_image(tmp_path):
    write(tmp_path/'a/ok.jpg'); (tmp_path/'a/cut.jpg').write_bytes((tmp_path/'a/ok.jpg').read_bytes()[:300]); write(tmp_path/'b/ok.jpg')
    with pytest.raises(ValueError, match=r'cut\.jpg is not a readable image \(.*\): replace or delete it') as e: folder_dls(tmp_path, 8)
    assert '\n' not in str(e.value)

# CIFAR

def write_cifar(folder, n_classes, n):
    "Pickles as torchvision reads them; pixels tell class and number"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f'c{i:02d}' for i in range(n_classes)]
    def dump(fn, o): (folder/fn).write_bytes(pickle.dumps(o))
    def batch(k, n):
        y = [(i*3+k)%n_classes for i in range(n)]
        x = np.zeros((n,3,32,32), np.uint8); x[:,0],x[:,1] = np.array(y)[:,None,None],k; x[:,2,:,0] = 255
        return {'data':x.reshape(n,-1), 'labels' if n_classes == 10 else 'fine_labels':y}
    if n_classes == 10:
        for k in range(5): dump(f'data_batch_{k+1}', batch(k, n))
        dump('test_batch', batch(5, n)); dump('batches.meta', {'label_names':names})
    else: dump('train', batch(0, n)); dump('test', batch(5, n)); dump('meta', {'fine_label_names':names})

@pytest.mark.parametrize('n_classes,sub', [(10,'cifar-10-batches-py'), (10,'cifar10/cifar-10-batches-py'), (10,'.'),
                                           (100,'cifar-100-python'), (100,'cifar100/cifar-100-python'), (100,'cifar100')])
def test_cifar_pickles(tmp_path, monkeypatch, n_classes, sub):
    write_cifar(tmp_path/sub, n_classes, 200)
    monkeypatch.setenv('PARAMFX_DATA', str(tmp_path))
    n = 1000 if n_classes == 10 else 200
    for path in (None, tmp_path, tmp_path/sub):
        dls = cifar_dls(path, n_classes, bs=50, device='cpu')
        assert (len(dls.train_ds), len(dls.valid_ds), dls.c, dls.vocab[3]) == (n, 200, n_classes, 'c03')
        assert (dls.train_ds.x[:,0,0,5] == dls.train_ds.y).all() and (dls.train_ds.x[:,2,:,0] == 255).all()
        assert (dls.valid_ds.x[:,1] == 5).all() and dls.train_ds.x.dtype == torch.uint8
    split = cifar_dls(None, n_classes, valid='split', device='cpu')
    assert torch.equal(split.valid_ds.x, dls.train_ds.x[-n//10:]) and torch.equal(split.train_ds.x, dls.train_ds.x[:-n//10])

def test_cifar_equals_torchvision(tmp_path, monkeypatch):
    "The same images in the same order as torchvision's own reader gives, which is kept from checking the sums"
    from torchvision.datasets import CIFAR10
    import torchvision.datasets.cifar as mod
    monkeypatch.setattr(mod, 'check_integrity', lambda *a: True)
    write_cifar(tmp_path/'cifar-10-batches-py', 10, 20)
    dls = cifar_dls(tmp_path, device='cpu')
    for train,ds in ((True, dls.train_ds), (False, dls.valid_ds)):
        tv = CIFAR10(tmp_path, train=train)
        assert tv.classes == dls.vocab and tv.targets == ds.y.tolist() and (tv.data == ds.x.permute(0,2,3,1).numpy()).all()

def write_sheets(folder, n_classes=10, n=30):
    names = [f'c{i:02d}' for i in range(n_classes)][::-1]  # the order is that of classes.txt, not the alphabet's
    for part,rows in (('train',2), ('test',1)):
        (folder/part).mkdir(parents=True)
        for i,c in enumerate(names):
            a = np.repeat(np.repeat(np.arange(rows*5).reshape(rows,5)*20, 32, 0), 32, 1)
            Image.fromarray(np.stack([a, np.full_like(a, i*20), a*0], -1).astype(np.uint8)).save(folder/part/f'{c}.jpg', quality=98, subsampling=0)
    (folder/'classes.txt').write_text('\n'.join(names))

def test_cifar_sheets(tmp_path):
    write_sheets(tmp_path/'cifar10')
    dls = cifar_dls(tmp_path, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds)) == (100, 50) and dls.vocab[0] == 'c09'
    assert dls.train_ds.y.tolist() == [i for i in range(10) for _ in range(10)]
    mean = dls.train_ds.x.float().mean((2,3))
    assert (mean[:,0] - torch.arange(10.).repeat(10)*20).abs().max() < 3 and (mean[:,1] - dls.train_ds.y*20).abs().max() < 3
    split = cifar_dls(tmp_path, valid='split', device='cpu')
    assert split.valid_ds.y.tolist() == list(range(10)) and torch.equal(split.valid_ds.x, dls.train_ds.x[9::10])
    assert len(split.train_ds) == 90 and split.train_ds.y.bincount().tolist() == [9]*10

def test_cifar_bad_input(tmp_path, monkeypatch):
    monkeypatch.delenv('PARAMFX_DATA', raising=False)
    for path in (None, tmp_path, tmp_path/'nowhere'):
        with pytest.raises(FileNotFoundError, match=r'No CIFAR-100 in .*torchvision\.datasets\.CIFAR100') as e: cifar_dls(path, 100)
        assert '\n' not in str(e.value)
    write_sheets(tmp_path/'cifar10')
    for kw,match in ((dict(n_classes=20), 'not 20'), (dict(valid='none'), "not 'none'"), (dict(pad_mode='edge'), "not 'edge'"),
                     (dict(path=tmp_path/'cifar10', n_classes=100), 'give the folder of CIFAR-100')):
        with pytest.raises(ValueError, match=match): cifar_dls(**{'path':tmp_path, **kw})

def test_cifar_batches(tmp_path):
    "Normalised crops in training, the image itself in validation; `constant` pads with black"
    write_cifar(tmp_path, 10, 40)
    dls = cifar_dls(tmp_path, bs=20, pad_mode='constant', device='cpu')
    mean,std = (torch.tensor(o)[:,None,None] for o in ([.4914,.4822,.4465], [.2470,.2435,.2616]))
    xb = torch.cat([torch.Tensor(b[0]) for b in dls.valid])
    torch.testing.assert_close(xb, (dls.valid_ds.x/255-mean)/std, atol=1e-5, rtol=1e-5)
    x = torch.cat([torch.Tensor(b[0]) for b in dls.train])*std+mean
    assert x.shape == (200,3,32,32) and (x.abs() < 1e-5).all(1).any(-1).any(-1).float().mean() > .9  # black edges
    plain = cifar_dls(tmp_path, bs=20, augment=False, shuffle=False, device='cpu')
    torch.testing.assert_close(torch.Tensor(plain.train.one_batch()[0]), (plain.train_ds.x[:20]/255-mean)/std, atol=1e-5, rtol=1e-5)

def test_cifar_transforms(tmp_path):
    "Crops of 32 from a padding of 4, besides what is given"
    write_cifar(tmp_path, 10, 40)
    seen = []
    def spy(x:TensorImage): seen.append(x.shape); return x
    dls = cifar_dls(tmp_path, after_batch=spy, device='cpu')
    crop, = [t for t in dls.train.after_batch.fs if isinstance(t, CropFlip)]
    dls.one_batch()
    assert (crop.size, crop.pad, crop.mode, crop.flip, crop.random) == (32, 4, 'reflect', True, True) and seen == [(128,3,32,32)]

def batches(dls, seed):
    set_seed(seed); dls.train.rng = random.Random(seed)
    return torch.cat([torch.Tensor(b[0]) for _ in range(2) for b in dls.train])

def test_same_seed_same_batches(tmp_path):
    write_cifar(tmp_path, 10, 40)
    dls = cifar_dls(tmp_path, bs=20, device='cpu')
    a = batches(dls, 1)
    assert torch.equal(a, batches(dls, 1)) and not torch.equal(a, batches(dls, 2)) and not torch.equal(a[:200], a[200:])

def net(c, ps=(8,16)):
    def block(i, o): return [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*block(3, ps[0]), *block(*ps), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ps[1], c))

def test_resumed_run_equals_uninterrupted(tmp_path):
    "Crops come from the saved generators"
    from paramfx.core.runs import RunState
    write_cifar(tmp_path/'data', 10, 40)
    class Stop(Exception): pass
    def make():
        set_seed(7)
        return Learner(cifar_dls(tmp_path/'data', bs=20, device='cpu'), net(10), path=tmp_path, lr=1e-2)
    def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    from fastai.basics import Callback
    class Break(Callback):
        order = 69
        def after_epoch(self):
            if self.epoch == 1: raise Stop('here')
    whole = make()
    with whole.no_logging(): whole.fit(4)
    cut = make()
    with cut.no_logging(), pytest.raises(Stop): cut.fit(4, cbs=[RunState(), Break()])
    again = make(); torch.manual_seed(99)
    with again.no_logging(): again.resume().fit(4)
    assert torch.equal(weights(whole), weights(again))

# folders

def draw(fn, kind, i):
    "Red or green with noise, so that a small network tells them apart"
    a = bytes_of(20,26,3, seed=i).numpy()//3; a[...,{'a':0,'b':1,'c':2}[kind]] += 150
    fn.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(a).save(fn)

def tree(root, parts, kinds='ab'):
    for part,n in parts.items():
        for kind in kinds:
            for i in range(n): draw(root/part/kind/f'{i}.png', kind, i+100*len(part))
    return root

@pytest.mark.parametrize('parts,valid,n', [
    ({'train':6, 'valid':2, 'test':3}, 'auto', 4), ({'train':6, 'val':2, 'test':3}, 'auto', 4), ({'train':6, 'val':2}, 'valid', 4),
    ({'train':6, 'valid':2, 'test':3}, 'test', 6), ({'train':6, 'test':3}, 'auto', 6), ({'train':10}, 'auto', 4), ({'train':10, 'test':3}, 'split', 4),
    ({'.':10}, 'auto', 4), ({'.':10}, 'split', 4)])
def test_folder_layouts(tmp_path, parts, valid, n):
    dls = folder_dls(tree(tmp_path, parts), 8, bs=4, valid=valid, device='cpu')
    n_all = 2*parts.get('train', parts.get('.'))
    split = valid == 'split' or not parts.keys() & {'valid','val','test'}
    assert len(dls.valid_ds) == n and len(dls.train_ds) == n_all - n*split and dls.vocab == ['a','b']
    for ds in (dls.train_ds, dls.valid_ds):
        assert [o.parent.name for o in ds.names] == [dls.vocab[i] for i in ds.y] and ds.x.shape[1:] == (3,9,9)
        assert torch.equal(ds.x[1], ReadImage(9)(ds.names[1]))
    assert all(ds.names == sorted(ds.names) for ds in (dls.train_ds, dls.valid_ds))
    assert not set(dls.train_ds.names) & set(dls.valid_ds.names) and dls.one_batch()[0].shape == (4,3,8,8)

def test_split_is_fixed_and_stratified(tmp_path):
    tree(tmp_path, {'.':20}, 'abc'); draw(tmp_path/'rare/0.png', 'a', 0)
    a,b,c = (folder_dls(tmp_path, 8, valid_pct=.3, seed=s, device='cpu') for s in (1,1,2))
    assert a.valid_ds.names == b.valid_ds.names != c.valid_ds.names
    assert a.valid_ds.y.bincount(minlength=4).tolist() == [6,6,6,0] and a.train_ds.y.bincount().tolist() == [14,14,14,1]
    torch.manual_seed(5); random.seed(5); np.random.seed(5)
    assert folder_dls(tmp_path, 8, valid_pct=.3, seed=1, device='cpu').valid_ds.names == a.valid_ds.names

@pytest.mark.parametrize('workers', [0, 2])
def test_disk_gives_the_batches_of_memory(tmp_path, workers):
    "Same split, pixels, crops and normalisation"
    tree(tmp_path, {'.':15})
    def make(**kw):
        set_seed(4); dls = folder_dls(tmp_path, 8, bs=7, device='cpu', num_workers=workers, **kw); dls.train.rng = random.Random(1)
        torch.manual_seed(4)
        return dls,[torch.Tensor(b[0]) for dl in dls.loaders for b in dl]
    (mem,a),(disk,b) = make(),make(max_memory=0)
    assert isinstance(disk.train_ds.x, ImageFiles) and len(a) == len(b) and all(torch.equal(*o) for o in zip(a, b))
    assert disk.train.fake_l.num_workers == workers and mem.vocab == disk.vocab

def test_disk_learner_exports_without_files(tmp_path):
    dls = folder_dls(tree(tmp_path/'d', {'.':10}), 8, bs=4, max_memory=0, num_workers=0, device='cpu')
    learn = Learner(dls, net(2), path=tmp_path); learn.export()
    assert b'0.png' not in (tmp_path/'export.pkl').read_bytes()

def test_memory_bound(tmp_path):
    tree(tmp_path, {'.':4})
    exact = 8*3*9*9
    for bound,workers in ((exact-1, min(8, os.cpu_count())), (exact, 0)): # only what stays on disk is read by workers
        assert folder_dls(tmp_path, 8, max_memory=bound, device='cpu').valid.fake_l.num_workers == workers
    assert isinstance(folder_dls(tmp_path, 8, max_memory=exact-1, device='cpu').train_ds.x, ImageFiles)
    assert isinstance(folder_dls(tmp_path, 8, max_memory=exact, device='cpu').train_ds.x, torch.Tensor)

def test_folder_trains(tmp_path):
    set_seed(0)
    learn = Learner(folder_dls(tree(tmp_path, {'train':40, 'valid':10}), 16, bs=16, device='cpu'), net(2), metrics=accuracy, lr=1e-2)
    before = learn.validate()[0]
    with learn.no_logging(): learn.fit(3)
    loss,acc = learn.validate()
    assert loss < before/2 and acc > .9

def test_own_transforms_and_loader_arguments(tmp_path):
    from fastai.vision.augment import Rotate
    seen = []
    def spy(x:TensorImage): seen.append(x.dtype); return x
    dls = folder_dls(tree(tmp_path, {'.':10}), 8, bs=4, after_batch=[Rotate(p=1.), spy], drop_last=False, valid_pct=.5, device='cpu')
    assert [type(t).__name__ for t in dls.train.after_batch.fs if type(t).__name__ != 'Transform'] == ['CropFlip','IntToFloatTensor','Rotate','NormalizeBytes']
    xb = torch.cat([torch.Tensor(b[0]) for b in dls.train])
    assert len(xb) == 10 and xb.isfinite().all() and set(seen) == {torch.uint8}
    mean,std = (torch.tensor(o)[:,None,None] for o in ([.485,.456,.406], [.229,.224,.225]))
    want = (dls.valid_ds.x[:,:,:8,:8]/255-mean)/std
    torch.testing.assert_close(torch.cat([torch.Tensor(b[0]) for b in dls.valid]), want, atol=1e-5, rtol=1e-5)

def test_without_augmentation_training_images_are_centre_crops(tmp_path):
    dls = folder_dls(tree(tmp_path, {'.':10}), 7, bs=16, augment=False, shuffle=False, stats=([0.]*3, [1.]*3), device='cpu')
    assert dls.train_ds.x.shape[2:] == (8,8)
    torch.testing.assert_close(torch.Tensor(dls.train.one_batch()[0]), dls.train_ds.x[:,:,:7,:7]/255)

def test_a_missing_file_is_missing():
    with pytest.raises(FileNotFoundError, match='nowhere.png'): ReadImage(4)('nowhere.png')

def test_predict_in_a_new_process(tmp_path):
    "Export, delete the data, load elsewhere, predict on a file, a PIL image and an array"
    import shutil
    dls = folder_dls(tree(tmp_path/'data', {'train':12, 'valid':4}), 16, bs=8, device='cpu')
    learn = Learner(dls, net(2), path=tmp_path, metrics=accuracy, lr=1e-2)
    with learn.no_logging(): learn.fit(1)
    draw(tmp_path/'new.png', 'b', 77)
    want = learn.predict(tmp_path/'new.png')[2]
    preds = learn.get_preds()[0]; keep = [tmp_path/f'k{i}.png' for i in range(len(preds))]
    for a,b in zip(dls.valid_ds.names, keep): shutil.copy(a, b)
    learn.export(); shutil.rmtree(tmp_path/'data')
    code = '''if True:
        import numpy as np, sys, torch
        from PIL import Image
        from fastai.basics import load_learner
        import fastprogress.fastprogress; fastprogress.fastprogress.NO_BAR = True
        learn = load_learner('export.pkl')
        ps = [learn.predict(o)[2] for o in ('new.png', Image.open('new.png'), np.array(Image.open('new.png')))]
        n = len([1 for o in __import__('os').listdir() if o[0] == 'k'])
        torch.save([torch.stack(ps), learn.get_preds(dl=learn.dls.test_dl([f'k{i}.png' for i in range(n)]))[0]], 'out.pt')'''
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'); env.pop('PARAMFX_DATA', None)
    res = run_fresh(code, cwd=tmp_path, env=env)
    assert res.returncode == 0, res.stderr
    ps,again = torch.load(tmp_path/'out.pt', weights_only=False)
    assert all(torch.equal(torch.Tensor(p), torch.Tensor(want)) for p in ps)
    torch.testing.assert_close(torch.Tensor(again), torch.Tensor(preds))

def test_show(tmp_path):
    import matplotlib.pyplot as plt
    long = 'a'*36
    tree(tmp_path, {'.':8}); (tmp_path/'b').rename(tmp_path/long)
    dls = folder_dls(tmp_path, 8, bs=8, valid_pct=.5, device='cpu')
    assert dls.vocab == ['a',long]
    dls.show_batch(max_n=4)
    axs = [ax for ax in plt.gcf().axes if ax.images]
    assert len(axs) == 4 and all(0 <= np.min(ax.images[0].get_array()) and np.max(ax.images[0].get_array()) <= 1 for ax in axs)
    plt.gcf().canvas.draw()
    for ax in axs: assert ax.title.get_window_extent().width < 1.3*ax.get_window_extent().width
    Learner(dls, net(2)).show_results(max_n=4); plt.close('all')

def test_show_one_image_often(tmp_path):
    dls = folder_dls(tree(tmp_path, {'.':8}), 8, bs=6, device='cpu', shuffle=(True,False))
    for dl,n in ((dls.train, 2), (dls.valid, 1)):
        its = dl.show_batch(max_n=6, unique=True, show=False)[2]
        assert len(its) == 6 and {str(o[1]) for o in its} == {'a'}
        assert len({o[0].numpy().tobytes() for o in its}) >= n and (n > 1 or len({o[0].numpy().tobytes() for o in its}) == 1)
    assert len({tuple(b[1].tolist()) for b in dls.train}) > 1

@pytest.mark.parametrize('kw,match', [(dict(size=0), 'size=0'), (dict(size=8.5), 'size=8.5'), (dict(valid='some'), "not 'some'"),
                                      (dict(valid_pct=1.), 'valid_pct=1.0'), (dict(stats=[1,2,3]), 'stats='), (dict(valid='test'), "valid='split'")])
def test_folder_bad_options(tmp_path, monkeypatch, kw, match):
    "Before anything is read"
    import paramfx.data.images
    monkeypatch.setattr(paramfx.data.images, 'read_images', lambda *a: pytest.fail('has begun to read'))
    with pytest.raises(ValueError, match=match) as e: folder_dls(tree(tmp_path, {'train':3, 'valid':1}), **kw)
    assert '\n' not in str(e.value)

def test_folder_bad_trees(tmp_path, monkeypatch):
    import paramfx.data.images
    monkeypatch.setattr(paramfx.data.images, 'read_images', lambda *a: pytest.fail('has begun to read'))
    with pytest.raises(FileNotFoundError, match='nowhere is not a folder'): folder_dls(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='holds no images'): folder_dls(tmp_path)
    tree(tmp_path/'odd', {'train':3, 'valid':1}); draw(tmp_path/'odd/valid/new/0.png', 'a', 0)
    with pytest.raises(ValueError, match="Class 'new' is in the validation set only .*0.png"): folder_dls(tmp_path/'odd')
    (tmp_path/'empty/train/a').mkdir(parents=True); tree(tmp_path/'empty', {'valid':2})
    with pytest.raises(ValueError, match='holds no images'): folder_dls(tmp_path/'empty')
    with pytest.raises(FileNotFoundError, match='x.jpg is missing, one of 2'): parts_dls({'train':[(tmp_path/'x.jpg','a')]*2, 'valid':[]})

def test_training_class_that_validation_lacks(tmp_path):
    tree(tmp_path, {'train':3}, 'abc'); tree(tmp_path, {'valid':2}, 'ac')
    dls = folder_dls(tmp_path, 8, bs=2, device='cpu')
    assert dls.vocab == ['a','b','c'] and sorted(set(dls.valid_ds.y.tolist())) == [0,2]

# the real sets

@pytest.mark.parametrize('n_classes,n,m', [(10,25_000,.003), (100,10_000,.006)])
def test_real_cifar(data_dir, n_classes, n, m):
    "Counts, class names, and means near the published ones (a part of the images, as JPEG)"
    if not (data_dir/f'cifar{n_classes}').is_dir(): pytest.skip(f'no cifar{n_classes} folder in PARAMFX_DATA')
    dls = cifar_dls(data_dir, n_classes, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (n, 10_000, n_classes)
    assert dls.vocab == (data_dir/f'cifar{n_classes}/classes.txt').read_text().split()
    assert dls.valid_ds.y.bincount().tolist() == [10_000//n_classes]*n_classes
    x = dls.train_ds.x[::3].float()/255
    assert (x.mean((0,2,3)) - torch.as_tensor(dls.train_ds.mean)).abs().max() < m
    assert (x.std((0,2,3)) - torch.as_tensor(dls.train_ds.std)).abs().max() < .01
    split = cifar_dls(data_dir, n_classes, valid='split', device='cpu')
    assert (len(split.train_ds), len(split.valid_ds)) == (n*9//10, n//10) and split.valid_ds.y.bincount().unique().tolist() == [n//10//n_classes]

def test_real_cifar_trains(data_dir):
    if not (data_dir/'cifar10').is_dir(): pytest.skip('no cifar10 folder in PARAMFX_DATA')
    set_seed(0)
    learn = Learner(cifar_dls(data_dir, device='cpu'), net(10), lr=3e-3)
    losses = []
    for i,(x,y) in zip(range(60), learn.dls.train):
        if i == 0: opt = torch.optim.Adam(learn.model.parameters(), 3e-3)
        loss = nn.functional.cross_entropy(learn.model(torch.Tensor(x)), torch.Tensor(y).long()); losses.append(loss.item())
        opt.zero_grad(); loss.backward(); opt.step()
    assert np.mean(losses[-10:]) < np.mean(losses[:5])-.2

def test_sixteen_bits_keep_their_greys(tmp_path):
    "PIL alone would clip them to white"
    grey = np.arange(256).repeat(256).reshape(256, 256).astype('uint16')*257
    Image.fromarray(grey).save(tmp_path/'x.png')
    for im in (Image.fromarray(grey), tmp_path/'x.png'): assert torch.equal(ReadImage(256)(im)[0], torch.from_numpy((grey >> 8).astype('uint8')))

def test_damaged_sets_name_the_file(tmp_path):
    write_sheets(tmp_path/'cifar10')
    Image.fromarray(np.zeros((100,100,3), 'uint8')).save(tmp_path/'cifar10/train/c03.jpg')
    with pytest.raises(ValueError, match='c03.jpg is damaged') as e: cifar_dls(tmp_path)
    assert '\n' not in str(e.value)
    (tmp_path/'cifar-10-batches-py').mkdir(); (tmp_path/'cifar-10-batches-py/batches.meta').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='batches.meta is damaged'): cifar_dls(tmp_path/'cifar-10-batches-py')

def test_folders_in_capitals_and_lonely_images(tmp_path):
    for part in ('Train','Valid'):
        for c in 'ab': write(tmp_path/part/c/'1.png'); write(tmp_path/part/c/'2.png')
    dls = folder_dls(tmp_path, size=8, bs=2, device='cpu')
    assert list(dls.vocab) == ['a','b'] and (len(dls.train_ds), len(dls.valid_ds)) == (4,4)
    for c in 'ab': write(tmp_path/'one'/c/'1.png')
    with pytest.raises(ValueError, match='No class has two images'): folder_dls(tmp_path/'one', size=8)
    for kw in (dict(seed=-1), dict(seed=None), dict(stats=None)):
        with pytest.raises(ValueError, match='seed|stats'): folder_dls(tmp_path, size=8, **kw)

def test_a_set_smaller_than_a_batch_is_trained_on(tmp_path):
    for c in 'ab':
        for i in range(4): write(tmp_path/c/f'{i}.png')
    dls = folder_dls(tmp_path, size=8, device='cpu')
    assert [len(b[0]) for b in dls.train] == [6] and len(dls.valid_ds) == 2
