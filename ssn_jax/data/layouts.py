"""The folder layouts of real data sets: which file is which image, and which its mask.

Nothing is decoded here. Every function lists a layout's files as a `Listing`, or raises a
`UserError` that names the folder or file at fault.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
import itertools
import os
from pathlib import Path
import re
import unicodedata

import cv2

from ssn_jax.data import images
from ssn_jax.data.doubts import Doubt
from ssn_jax.errors import UserError

GOOD = 'good'
NORMAL = 'good,ok,normal'  # What people call its folder, unless they say otherwise.
_NORMAL = tuple(NORMAL.split(','))
SPLITS = ('train', 'test')
# What people call the folder of masks, in any case and with any separator.
_MASKS = ('ground_truth', 'groundtruth', 'gt', 'masks', 'mask', 'labels', 'label')
# What people add to an image's name for that of its mask.
_MARKED = re.compile(
    r'(?i)([-_. ]+(gt|ground_?truth|label|seg|segmentation)|[-_. ]*mask)$|^(mask|gt|seg)[-_. ]+'
)


@dataclass(frozen=True)
class Record:
    """One image of a data set, before anything is decoded.

    Attributes:
      split: 'train' or 'test'.
      defect: 'good' or the defect's name; None where only the mask can tell good from defective.
      file: path relative to the root, for people.
      image: the image's file or its encoded bytes.
      mask: the mask's file or its encoded bytes; None if there is none.
    """

    split: str
    defect: str | None
    file: str
    image: Path | bytes
    mask: Path | bytes | None


@dataclass(frozen=True)
class Listing:
    """The images of a data set, and what is doubtful about their names and places."""

    records: list[Record] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)


@dataclass(frozen=True)
class _Image:
    """An image, and where its mask may be: paths below the folder of masks, without ending."""

    split: str
    defect: str
    path: Path
    keys: tuple[str, ...]


def mvtec_ad(
    root: Path, category: str, normal: Collection[str] = _NORMAL, need: str = 'train'
) -> Listing:
    """Lists a category of MVTec AD, or of any set in its layout; every defect needs its mask.

    Args:
      root: the folder that holds the categories.
      category: one of the folders in it.
      normal: as of `folder`.
      need: as of `folder`.

    Returns:
      The images `root/category/{train,test}/DEFECT/NAME.*`, with the masks
      `root/category/ground_truth/DEFECT/NAME_mask.*`.

    Raises:
      UserError: a part of the layout is missing, or two files claim the same name.
    """
    categories = [path.name for path in _folders(root)]
    if category not in categories:
        if any(_key(name).lower() in SPLITS for name in categories):
            raise UserError(
                f'{root}: is itself a category; give the folder above it as --config.data.root, or '
                'say --config.data.name=folder'
            )
        raise UserError(
            f'{root}: no category {category!r}; choose --config.data.category from: '
            + (', '.join(categories) or '(the folder holds none: check --config.data.root)')
        )
    base = root / category
    place = _mask_folder(base)
    listing = _by_defect(base, root, normal, need, place)
    for record in listing.records:
        if record.defect != GOOD and record.mask is None:
            below = record.image.relative_to(base)
            expected = Path(*below.parts[1:]).with_suffix('')
            expected = (place or base / 'ground_truth') / f'{expected}_mask.png'
            raise UserError(f'{record.image}: a defect without its mask; add {expected}')
    return listing


def folder(
    root: Path,
    normal: Collection[str] = _NORMAL,
    need: str = 'train',
    mask_dir: Path | None = None,
) -> Listing:
    """Lists anybody's images, laid out as one category of MVTec AD; masks are optional.

    Defects may occur in training too. Where `train/DEFECT` and `test/DEFECT` share a file name,
    their masks lie in `ground_truth/train/DEFECT` and `ground_truth/test/DEFECT`.

    Args:
      root: the folder that holds `train/good`, `test/...` and, with masks, `ground_truth/...`.
      normal: names of the class of normal images, besides 'good'; in any case.
      need: the split that must hold images: 'train' (normal ones) or 'test'.
      mask_dir: where masks are, if not in `ground_truth` or a folder with another name for it.

    Raises:
      UserError: a part of the layout is missing, or two files claim the same name.
    """
    _folders(root)
    if mask_dir and not mask_dir.is_dir():
        raise UserError(f'{mask_dir}: no such folder; check --config.data.mask_dir')
    return _by_defect(root, root, normal, need, mask_dir or _mask_folder(root))


def from_folders(
    root: Path, places: dict[str, Path], normal: Collection[str] = _NORMAL, need: str = 'train'
) -> Listing:
    """Lists images whose folders are named one by one, wherever they are.

    Args:
      root: what names of files are relative to, if they lie there.
      places: by the name of their flag, `normal_dir`: normal images to train on; `normal_test_dir`:
        normal images to test on; `defect_dir`: defects to test on, each kind in a folder of its
        own, or all in this one (a folder with a name of the normal class holds normal ones);
        `mask_dir`: masks, under the names that the images have below `defect_dir`.
      normal: as of `folder`.
      need: as of `folder`.

    Raises:
      UserError: a folder is not there or holds no images, or two files claim the same name.
    """
    if need == 'train' and 'normal_dir' not in places:
        known = ', '.join(f'--config.data.{name}' for name in places)
        raise UserError(f'--config.data.normal_dir is missing beside {known}: name that folder too')
    listing, found = Listing(), []
    apart = {path.resolve() for path in places.values()}  # One may lie in another.
    for name, path in places.items():
        if not path.is_dir():
            raise UserError(f'{path}: no such folder; check --config.data.{name}')
        if name == 'mask_dir':
            continue
        files = _images(path, root, listing.doubts, apart)
        if not files:
            raise UserError(f'{path}: holds no images; check --config.data.{name}')
        split = 'train' if name == 'normal_dir' else 'test'
        for file in files:
            below = file.relative_to(path)
            kind = below.parts[0] if len(below.parts) > 1 else 'defect'
            defect = _class_of(kind, normal) if name == 'defect_dir' else GOOD
            found.append(_Image(split, defect, file, (_key_of(below),)))
    return _with_masks(listing, found, root, places.get('mask_dir'), normal)


def added(root: Path, normal: Collection[str] = _NORMAL) -> Listing:
    """Lists more training images, of any classes: `root/CLASS/...`, or `root/train/CLASS/...`.

    Args:
      root: the folder; masks are below it as of `folder`. Of a folder with `train` and `test` the
        latter is left out.
      normal: as of `folder`.

    Raises:
      UserError: it is not there or holds no such images, or two files claim the same name.
    """
    if not root.is_dir():
        raise UserError(f'{root}: no such folder; say with --config.data.added where it is now')
    listing, place = Listing(), _mask_folder(root)
    splits = any(_child(root, split).is_dir() for split in SPLITS)
    base = _child(root, 'train') if splits else root
    found = _classes(base, 'train', root, normal, listing, () if splits else (place,))
    if not found:
        raise UserError(
            f'{root}: holds no images to learn from; put normal ones into {root}/good, defects '
            f'into {root}/DEFECT, and masks, if there are any, into {root}/ground_truth/DEFECT'
        )
    listing.doubts.extend(
        Doubt(_name(path, root), 'stray image')
        for path in _entries(base)
        if not path.is_dir() and path.suffix.lower() in images.SUFFIXES
    )
    return _with_masks(listing, found, root, place, normal)


def ksdd2(root: Path, need: str = 'train') -> Listing:
    """Lists KolektorSDD2: `train/ID.png` beside `train/ID_GT.png`, and `test/` alike.

    Args:
      root: the folder that holds `train` and `test`.
      need: as of `folder`.

    Returns:
      The images, with `defect` None: an image is defective when its mask is not empty.

    Raises:
      UserError: a split has no images, an image has no mask, or two files claim the same name.
    """
    _folders(root)
    listing = Listing()
    for split in SPLITS:
        base, files = _child(root, split), {}
        for path in _images(base, root, listing.doubts):
            key = _key_of(path.relative_to(base))
            if key in files:
                raise UserError(f'{path}: duplicate name, {files[key].name}; remove one')
            files[key] = path
        keys = [key for key in files if '_GT' not in key.rpartition('/')[2]]
        if split == need and not keys:
            raise UserError(
                f'{base}: holds no images; KolektorSDD2 has {split}/ID.png and '
                f'{split}/ID_GT.png below --config.data.root'
            )
        for key in keys:
            if f'{key}_GT' not in files:
                raise UserError(f'{files[key]}: has no mask; add {split}/{key}_GT.png')
            file = _name(files[key], root)
            listing.records.append(Record(split, None, file, files[key], files[f'{key}_GT']))
        # The official archive holds a stray "NAME_GT (copy).png".
        for key in sorted(files.keys() - keys - {f'{key}_GT' for key in keys}):
            listing.doubts.append(Doubt(_name(files[key], root), 'mask of no image'))
    return listing


def guess(root: Path) -> str:
    """The name of the layout that a folder looks like: mvtec_ad, ksdd2 or folder."""
    splits = [path for path in (_child(root, split) for split in SPLITS) if path.is_dir()]
    if any(path.stem.endswith('_GT') for split in splits for path in _entries(split)):
        return 'ksdd2'
    folders = _folders(root, required=False)
    inside = any(_child(path, split).is_dir() for path in folders for split in SPLITS)
    return 'mvtec_ad' if inside and not splits else 'folder'


def walk(
    folder: Path, excluded: Collection[Path] = (), above: frozenset[Path] = frozenset()
) -> Iterator[tuple[Path, bool]]:
    """Yields the files below a folder, by name, and whether each is an image.

    Links are followed, but not to a folder that they lie in. Hidden entries are left out. The names
    of one folder at a time are held.

    Args:
      folder: where to look.
      excluded: resolved folders that are left out.
      above: resolved folders on the way here, besides the folder's own parents.

    Yields:
      A path, and whether it is to be read: by its ending, or, without one, by its first bytes. A
      folder that cannot be listed is yielded itself, to be read: it fails like a file.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        yield folder, True
        return
    above |= {folder.resolve(), *folder.resolve().parents}
    for path in entries:
        if path.name.startswith('.'):
            continue
        if path.is_dir():
            if path.resolve() not in above and path.resolve() not in excluded:
                yield from walk(path, excluded, above)
        elif path.suffix:
            yield path, path.suffix.lower() in images.SUFFIXES
        else:  # A named pipe would have us wait for its first bytes.
            yield path, path.is_file() and cv2.haveImageReader(str(path))


def _by_defect(
    base: Path, root: Path, normal: Collection[str], need: str, place: Path | None
) -> Listing:
    """Lists `base/SPLIT/DEFECT/.../NAME.*` and the masks of the same names below `place`."""
    listing, found = Listing(), []
    for split in SPLITS:
        found += _classes(_child(base, split), split, root, normal, listing)
    if not any(x.split == need and (need == 'test' or x.defect == GOOD) for x in found):
        raise UserError(_missing(base, need, normal))
    listing.doubts.extend(_strays(base, root, place))
    return _with_masks(listing, found, root, place, normal)


def _classes(
    base: Path,
    split: str,
    root: Path,
    normal: Collection[str],
    listing: Listing,
    excluded: Collection[Path | None] = (),
) -> list[_Image]:
    """The images `base/CLASS/.../NAME.*` of a split; notes what else is there."""
    found = []
    for path in _folders(base, required=False):
        if path in excluded:
            continue
        files = {x: _key_of(x.relative_to(path)) for x in _images(path, root, listing.doubts)}
        for file, key in files.items():
            keys = f'{split}/{_key(path.name)}/{key}', f'{_key(path.name)}/{key}'
            found.append(_Image(split, _class_of(path.name, normal), file, keys))
    return found


def _missing(base: Path, need: str, normal: Collection[str]) -> str:
    """What to say where the split that is needed has no images."""
    split = _child(base, need)
    where = split if split.is_dir() else base
    found = [f'{path.name}/' for path in _folders(where, required=False)]
    flat = sum(path.suffix.lower() in images.SUFFIXES for path in _entries(where))
    found = ', '.join(found[:8] + [f'{flat} image' + 's' * (flat > 1)] * bool(flat))
    found = f'; {where} holds {found}' if found else ''
    if need == 'test':
        return f'{split}: holds no images; put them into test/good, test/DEFECT{found}'
    good = (x for x in _folders(split, required=False) if _class_of(x.name, normal) == GOOD)
    good = next(good, split / GOOD)
    what = 'holds no images' if good.is_dir() else 'does not exist'
    return (
        f'{good}: {what}; training needs normal images there{found}. If the folder has another '
        'name, say --config.data.normal=NAME; if it is elsewhere, --config.data.normal_dir=FOLDER'
    )


def _strays(base: Path, root: Path, place: Path | None) -> Iterator[Doubt]:
    """What lies beside the folders of the layout and is not used."""
    splits = [_child(base, split) for split in SPLITS]
    used = {*splits, *((place, *place.parents) if place else ())}
    for path in _entries(base):
        if not path.is_dir():
            if path.suffix.lower() in images.SUFFIXES:
                yield Doubt(_name(path, root), 'stray image')
        elif path not in used and any(is_image for _, is_image in walk(path)):
            yield Doubt(f'{_name(path, root)}/', 'other folder')
    for split in splits:
        for path in _entries(split):
            if not path.is_dir():
                image = path.suffix.lower() in images.SUFFIXES
                yield Doubt(_name(path, root), 'stray image' if image else 'no image')


def _with_masks(
    listing: Listing,
    found: list[_Image],
    root: Path,
    place: Path | None,
    normal: Collection[str],
) -> Listing:
    """Adds images to a listing, each with its mask below `place`, if it has one.

    Raises:
      UserError: of two files it is not clear which is meant, or of a class no mask fits.
    """
    among = _masks_among(found)
    listing.doubts.extend(Doubt(_name(x.path, root), 'mask among images') for x in among)
    masks_among = set(among)
    found = [image for image in found if image not in masks_among]
    marked, plain = {}, {}  # By key the files called NAME_mask.*, and those called NAME.*
    for path in _images(place, root, listing.doubts) if place else ():
        key = _key_of(path.relative_to(place))
        of = marked if key.endswith('_mask') else plain
        of.setdefault(key.removesuffix('_mask'), []).append(path)
    taken = {}
    for image in found:
        ways = [of[key] for key in image.keys for of in (marked, plain) if key in of]
        masks = ways[0] if ways and image.defect != GOOD else [None]
        if len(masks) > 1:
            raise UserError(f'{masks[1]}: duplicate name, {masks[0]} is the same mask; remove one')
        [mask] = masks
        if mask in taken:
            other = taken[mask]
            if other.split == image.split:
                raise UserError(f'{other.path}: two images of this name share {mask}; rename one')
            raise UserError(
                f'{image.path}: duplicate name, {mask} belongs to it or to {other.path}; '
                'rename one, or put masks into ground_truth/train and ground_truth/test'
            )
        if mask:
            taken[mask] = image
        file = _name(image.path, root)
        listing.records.append(Record(image.split, image.defect, file, image.path, mask))

    classes = {image.keys[-1].rpartition('/')[0] for image in found if image.defect != GOOD}
    wanted = {key for image in found for key in image.keys}
    masks = {**marked, **{key: marked.get(key, []) + paths for key, paths in plain.items()}}
    fits = {path.parent for key in masks.keys() & wanted for path in masks[key]}
    for path in sorted(set(itertools.chain(*masks.values())) - taken.keys()):
        below = path.parent.relative_to(place).parts
        if any(_class_of(part, normal) == GOOD for part in below):
            continue  # The mask of a normal image is known to be empty.
        name = '/'.join(part for part in map(_key, below) if part not in SPLITS)
        if path.parent not in fits and name in classes:
            of = f' of {name!r}' if name else ''
            raise UserError(
                f'{path}: belongs to no image{of}; the mask of NAME.png is NAME_mask.png or '
                'NAME.png'
            )
        listing.doubts.append(Doubt(_name(path, root), 'mask of no image'))
    return listing


def _masks_among(found: list[_Image]) -> list[_Image]:
    """What is called as the mask of another image, or lies in a folder of masks beside it."""
    known = {(x.split, x.keys[-1]) for x in found}
    classes = ((split, *key.partition('/')) for split, key in known)
    below = {(split, rest) for split, name, _, rest in classes if not _holds_masks(name)}

    def is_mask(image):
        *folders, stem = image.keys[-1].split('/')
        bare = _MARKED.sub('', stem) or stem
        if bare != stem and (image.split, '/'.join([*folders, bare])) in known:
            return True
        for i, name in enumerate(folders):
            if not _holds_masks(name) or (i == 0 and 'label' in name.lower()):
                continue  # There are products with labels, and defects of these.
            for instead in ([], ['images'], ['image'], ['img']):
                for last in {stem, bare}:
                    key = '/'.join([*folders[:i], *instead, *folders[i + 1 :], last])
                    if (image.split, key) in known or (i == 0 and (image.split, key) in below):
                        return True
        return False

    return [image for image in found if is_mask(image)]


def _holds_masks(name: str) -> bool:
    """Whether a folder's name is one that folders of masks have."""
    return _key(name).lower().replace(' ', '_').replace('-', '_') in _MASKS


def _mask_folder(base: Path) -> Path | None:
    """The folder of masks below `base`, under any of its names; None if there is none."""
    found = [
        path
        for path in _folders(base, required=False)
        if _holds_masks(path.name) and any(is_image for _, is_image in walk(path))
    ]
    if len(found) > 1:
        raise UserError(
            f'{found[0]} and {found[1]} both hold masks; leave one of them, or name it with '
            '--config.data.mask_dir'
        )
    return found[0] if found else None


def _child(base: Path, name: str) -> Path:
    """The folder of this name below `base`, in any case."""
    found = [path for path in _folders(base, required=False) if _key(path.name).lower() == name]
    if len(found) > 1:
        raise UserError(f'{found[0]} and {found[1]} are both {name}; leave one of them')
    return found[0] if found else base / name


def _class_of(name: str, normal: Collection[str]) -> str:
    """The class that a folder's name means: `GOOD`, or the defect's name."""
    names = {_key(word).casefold() for word in (GOOD, *normal)}
    return GOOD if _key(name).casefold() in names else _key(name)


def _key(name: str) -> str:
    """A name as it is compared: macOS decomposes what others write composed."""
    return unicodedata.normalize('NFC', name).strip()


def _key_of(below: Path) -> str:
    """What image and mask share: the path below their folders, without the file's ending."""
    return '/'.join(map(_key, (*below.parts[:-1], below.stem)))


def _name(path: Path, root: Path) -> str:
    r"""A file's path relative to the root; of one elsewhere, its last two parts.

    Bytes that are no UTF-8, of names from other systems, are written as \xNN.
    """
    below = path.relative_to(root) if path.is_relative_to(root) else Path(*path.parts[-2:])
    return os.fsencode(below.as_posix()).decode(errors='backslashreplace')


def _folders(path: Path, required: bool = True) -> list[Path]:
    """Lists the folders in a folder, sorted; a required one must exist and hold something."""
    if required and not path.is_dir():
        raise UserError(f'{path}: no such folder; check --config.data.root')
    entries = _entries(path)
    if required and not entries:
        raise UserError(f'{path}: the folder is empty; check --config.data.root')
    above = path.resolve(), *path.resolve().parents
    return [entry for entry in entries if entry.is_dir() and entry.resolve() not in above]


def _images(
    path: Path, root: Path, doubts: list[Doubt], excluded: Collection[Path] = ()
) -> list[Path]:
    """Lists the images below a folder that may not exist, by name; notes what else is there."""
    found = []
    for file, is_image in walk(path, excluded) if path.is_dir() else ():
        if file.is_dir():
            raise UserError(f'{file}: cannot be listed; check the folder')
        if is_image:
            found.append(file)
        else:
            doubts.append(Doubt(_name(file, root), 'no image'))
    return found


def _entries(path: Path) -> list[Path]:
    """Lists what a folder that may not exist holds, sorted, hidden entries left out."""
    if not path.is_dir():
        return []
    try:
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith('.'))
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); check the folder') from error
