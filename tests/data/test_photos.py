"The photo sets: a tiny tree in every published layout, torchvision's readers as the second route, the real groceries"
import hashlib
import numpy as np, pytest
from PIL import Image
from scipy.io import savemat
from paramfx.data.photos import grocery_dls, photo_dls

def write(fn, color=(90,20,10)):
    fn.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (11,9), color).save(fn)

def shade(i): return (i%16*16, i//16*16, 0)

def flowers(root):
    "306 images, shuffled: three per class, one in each part"
    order = np.random.default_rng(0).permutation(306); labels = order%102+1
    for i,y in enumerate(labels): write(root/f'jpg/image_{i+1:05d}.jpg', shade(y))
    ids = {k: np.flatnonzero(order//102 == p)+1 for p,k in enumerate(('trnid','valid','tstid'))}
    savemat(root/'imagelabels.mat', {'labels':labels}); savemat(root/'setid.mat', ids)

def aircraft(root):
    names = [f'Type {i:03d}/x' for i in range(100)][::-1]
    (root/'data').mkdir(parents=True); (root/'data/variants.txt').write_text('\n'.join(names)+'\n')
    for p,part in enumerate(('train','val','test')):
        rows = [(f'{p}{i:04d}', c) for i,c in enumerate(names)]
        for i,c in rows: write(root/f'data/images/{i}.jpg')
        (root/f'data/images_variant_{part}.txt').write_text(''.join(f'{i} {c}\n' for i,c in rows))

def cub(root):
    names = [f'{i+1:03d}.Bird_{i}' for i in range(200)]
    files = [f'{c}/{c}_{j}.jpg' for c in names for j in range(3)]
    for fn in files: write(root/'images'/fn)
    def lines(name, vals): (root/f'{name}.txt').write_text(''.join(f'{i+1} {v}\n' for i,v in enumerate(vals)))
    lines('images', files); lines('image_class_labels', [i//3+1 for i in range(600)]); lines('train_test_split',
        [int(i%3 < 2) for i in range(600)]); lines('classes', names)

def dogs(root):
    names = [f'n{2085620+i:08d}-Dog_{i}' for i in range(120)]
    for k,part in enumerate(('train','test')):
        files = [f'{c}/{c[:9]}_{k}.jpg' for c in names]
        for fn in files: write(root/'Images'/fn)
        cell = np.empty((120,1), object); cell[:,0] = files
        savemat(root/f'{part}_list.mat', {'file_list':cell, 'labels':np.arange(1,121)[:,None]})

def mit67(root):
    for k,part in enumerate(('Train','Test')):
        files = [f'room{i:02d}/a {j}.jpg' for i in range(67) for j in (k, k+2)]
        for fn in files: write(root/'Images'/fn)
        (root/f'{part}Images.txt').write_text('\n'.join(files))

def grocery(root):
    "Folders at two depths, of which the last names the class"
    names = [f'Item-{i:02d}' for i in range(81)][::-1]
    (root/'val').mkdir(parents=True)
    heads = 'Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),Iconic Image Path (str),Product Description Path (str)'
    (root/'classes.csv').write_text('\n'.join([heads, *(f'{c},{i},Kind,{i//2},/a.jpg,/a.txt' for i,c in enumerate(names))]))
    for part,n in (('train',2), ('val',1), ('test',1)):
        files = [(f"{part}/Fruit/{'Kind/' if i%2 else ''}{c}/{c}_{j}.jpg", i) for i,c in enumerate(names) for j in range(n)]
        for fn,_ in files: write(root/fn)
        (root/f'{part}.txt').write_text(''.join(f'{fn}, {i}, {i//2}\n' for fn,i in files))

OFFICIAL = {'grocery': (grocery, 'grocery/dataset', 162, 81, 81),
    'flowers102': (flowers, 'flowers-102', 102, 102, 102), 'aircraft': (aircraft, 'fgvc-aircraft-2013b', 100, 100, 100),
            'cub200': (cub, 'CUB_200_2011', 400, 200, 0), 'dogs': (dogs, 'StanfordDogs', 120, 120, 0), 'mit67': (mit67, 'mit67', 134, 134, 0)}

@pytest.mark.parametrize('name', OFFICIAL)
def test_official_layouts(tmp_path, monkeypatch, name):
    make,sub,n_train,n_test,n_valid = OFFICIAL[name]
    make(tmp_path/sub); monkeypatch.setenv('PARAMFX_DATA', str(tmp_path))
    n = dict(grocery=81, flowers102=102, aircraft=100, cub200=200, dogs=120, mit67=67)[name]
    for path in (None, tmp_path, tmp_path/sub):
        dls = photo_dls(name, path, size=4, device='cpu')
        assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (n_train, n_test, n)
        assert dls.train_ds.x.shape == (n_train,3,5,5) and dls.train_ds.y.bincount().tolist() == [n_train//n]*n
        assert not set(dls.train_ds.names) & set(dls.valid_ds.names)
    if name in ('grocery','cub200','dogs','mit67'):
        assert all(fn.parent.name == dls.vocab[y] for ds in (dls.train_ds, dls.valid_ds) for fn,y in zip(ds.names, ds.y))
        assert dls.vocab == sorted(dls.vocab, reverse=name == 'grocery') # the order of its authors
    if n_valid: assert len(photo_dls(name, size=4, valid='valid', device='cpu').valid_ds) == n_valid
    else:
        with pytest.raises(ValueError, match="valid='split'"): photo_dls(name, size=4, valid='valid')
    if n_train > n: assert len(photo_dls(name, size=4, valid='split', device='cpu').valid_ds) == n

@pytest.mark.parametrize('name,cls', [('flowers102','Flowers102'), ('aircraft','FGVCAircraft')])
def test_equal_to_torchvision(tmp_path, monkeypatch, name, cls):
    "The same files, labels and names as torchvision's readers give"
    import torchvision.datasets as tv
    make,sub = OFFICIAL[name][:2]; make(tmp_path/sub)
    if name == 'flowers102':
        md5 = {k: (fn, hashlib.md5((tmp_path/sub/fn).read_bytes()).hexdigest()) for k,fn in (('label','imagelabels.mat'), ('setid','setid.mat'))}
        monkeypatch.setattr(tv.Flowers102, '_file_dict', {**tv.Flowers102._file_dict, **md5})
    for valid,split in (('valid','val'), ('test','test')):
        dls = photo_dls(name, tmp_path, size=4, valid=valid, device='cpu')
        for ds,part in ((dls.train_ds,'train'), (dls.valid_ds,split)):
            ref = getattr(tv, cls)(tmp_path, split=part)
            assert [str(o) for o in ds.names] == [str(o) for o in ref._image_files] and ds.y.tolist() == ref._labels
            assert list(getattr(ref, 'classes', dls.vocab)) == dls.vocab

@pytest.mark.parametrize('sub', ['mit67', '.'])
@pytest.mark.parametrize('parts', [['train','test'], ['.']])
def test_plain_folder(tmp_path, sub, parts):
    for part in parts:
        for i in range(67): [write(tmp_path/sub/part/f'c{i:02d}'/f'{k}.jpg') for k in range(2)]
    dls = photo_dls('mit67', tmp_path, size=4, valid='test' if 'test' in parts else 'split', device='cpu')
    assert dls.c == 67 and len(dls.valid_ds) == (134 if 'test' in parts else 67)

def test_default_sizes(tmp_path):
    "224 from 256 pixels, and 64 from 73 for the groceries"
    mit67(tmp_path/'mit67')
    for i in range(81): [write(tmp_path/f'grocery/{part}/c{i:02d}/0.jpg') for part in ('train','test')]
    kw = dict(path=tmp_path, max_memory=0, num_workers=0, bs=2, device='cpu')
    for dls,side,size in ((photo_dls('mit67', **kw), 256, 224), (photo_dls('grocery', **kw), 73, 64), (grocery_dls(**kw), 73, 64)):
        assert dls.train_ds.x.shape[2:] == (side,side) and dls.one_batch()[0].shape == (2,3,size,size)

@pytest.mark.parametrize('name', OFFICIAL)
def test_missing(tmp_path, monkeypatch, name):
    monkeypatch.delenv('PARAMFX_DATA', raising=False)
    for path in (None, tmp_path, tmp_path/'nowhere'):
        with pytest.raises(FileNotFoundError, match='get it from .*(http|torchvision.datasets).*PARAMFX_DATA') as e: photo_dls(name, path)
        assert '\n' not in str(e.value)

def test_bad_input(tmp_path, monkeypatch):
    import paramfx.data.images
    monkeypatch.setattr(paramfx.data.images, 'read_images', lambda *a: pytest.fail('has begun to read'))
    mit67(tmp_path)
    with pytest.raises(ValueError, match="'cats' is no photo set"): photo_dls('cats')
    for kw,match in ((dict(size=-3), 'size=-3'), (dict(valid='none'), "not 'none'")):
        with pytest.raises(ValueError, match=match): photo_dls('mit67', tmp_path, **kw)
    (tmp_path/'Images/room05/a 2.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='a 2.jpg is missing'): photo_dls('mit67', tmp_path)
    for i in range(3): write(tmp_path/f'some/train/c{i}/0.jpg')
    with pytest.raises(ValueError, match='some has 3 classes, and Stanford Dogs has 120'): photo_dls('dogs', tmp_path/'some')

def test_real_grocery(data_dir):
    "2,640 / 296 / 2,485 photos of 81 classes; torchvision's folder reader as the second route"
    if not (data_dir/'grocery').is_dir(): pytest.skip('no grocery folder in PARAMFX_DATA')
    from torchvision.datasets import ImageFolder
    dls = grocery_dls(data_dir, size=16, valid='valid', device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (2640, 296, 81)
    ref = ImageFolder(data_dir/'grocery/train')
    assert ref.classes == dls.vocab and [str(o) for o in dls.train_ds.names] == [o[0] for o in ref.samples] and dls.train_ds.y.tolist() == ref.targets
    test = grocery_dls(data_dir, size=16, max_memory=0, num_workers=0, device='cpu')
    assert len(test.valid_ds) == 2485 and test.valid_ds.y.unique().numel() == 81
    assert photo_dls('grocery', data_dir, max_memory=0, device='cpu').train_ds.x.shape[2:] == (73,73)
