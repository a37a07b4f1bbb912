"""The folder layouts of real data sets: which file is which image, and which its mask.

Nothing is decoded here. Every function lists a layout's files as `Record`s or raises a `UserError`
that names the folder or file at fault.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from ssn_jax.data import images
from ssn_jax.errors import UserError

GOOD = 'good'
SPLITS = ('train', 'test')


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


def mvtec_ad(root: Path, category: str) -> list[Record]:
    """Lists a category of MVTec AD, or of any set in its layout; every defect needs its mask.

    Args:
      root: the folder that holds the categories.
      category: one of the folders in it.

    Returns:
      The records of `root/category/{train,test}/DEFECT/NAME.*`, with the masks
      `root/category/ground_truth/DEFECT/NAME_mask.*`.

    Raises:
      UserError: a part of the layout is missing, or two files claim the same name.
    """
    categories = [path.name for path in _folders(root)]
    if category not in categories:
        if 'train' in categories:
            raise UserError(
                f'{root}: is itself a category; give the folder above it as --config.data.root, or '
                'say --config.data.name=folder'
            )
        raise UserError(
            f'{root}: no category {category!r}; choose --config.data.category from: '
            + (', '.join(categories) or '(the folder holds none: check --config.data.root)')
        )
    return _by_defect(root / category, root, masks_required=True)


def folder(root: Path) -> list[Record]:
    """Lists anybody's images, laid out as one category of MVTec AD; masks are optional.

    Defects may occur in training too. Where `train/DEFECT` and `test/DEFECT` share a file name,
    their masks lie in `ground_truth/train/DEFECT` and `ground_truth/test/DEFECT`.

    Args:
      root: the folder that holds `train/good`, `test/...` and, with masks, `ground_truth/...`.

    Returns:
      The records of the data set.

    Raises:
      UserError: a part of the layout is missing, or two files claim the same name.
    """
    _folders(root)
    return _by_defect(root, root, masks_required=False)


def ksdd2(root: Path) -> list[Record]:
    """Lists KolektorSDD2: `train/ID.png` beside `train/ID_GT.png`, and `test/` alike.

    Args:
      root: the folder that holds `train` and `test`.

    Returns:
      The records, with `defect` None: an image is defective when its mask is not empty.

    Raises:
      UserError: a split has no images, an image has no mask, or two files claim the same name.
    """
    _folders(root)
    records = []
    for split in SPLITS:
        files = {}
        for path in _images(root / split):
            if path.stem in files:
                raise UserError(f'{path}: duplicate name, {files[path.stem].name}; remove one')
            files[path.stem] = path
        # The official archive holds a stray "NAME_GT (copy).png": no image has _GT in its name.
        names = [name for name in files if '_GT' not in name]
        if not names:
            raise UserError(
                f'{root / split}: holds no images; KolektorSDD2 has {split}/ID.png and '
                f'{split}/ID_GT.png below --config.data.root'
            )
        for name in names:
            if f'{name}_GT' not in files:
                raise UserError(f'{files[name]}: has no mask; add {split}/{name}_GT.png')
            file = files[name].relative_to(root).as_posix()
            records.append(Record(split, None, file, files[name], files[f'{name}_GT']))
    return records


def _by_defect(base: Path, root: Path, masks_required: bool) -> list[Record]:
    """Lists `base/SPLIT/DEFECT/NAME.*` and the masks in `base/ground_truth`."""
    good = base / 'train' / GOOD
    if not good.is_dir():
        raise UserError(f'{good}: does not exist; training needs normal images there')
    if not _images(good):
        raise UserError(f'{good}: holds no images; training needs normal images there')
    if not any(_images(path) for path in _folders(base / 'test', required=False)):
        raise UserError(f'{base / "test"}: holds no images; put them into test/good, test/DEFECT')

    masks = _find_masks(base)
    records = []
    for split in SPLITS:
        for path in _folders(base / split, required=False):
            for image in _images(path):
                mask = masks.get(image)
                if masks_required and path.name != GOOD and mask is None:
                    expected = base / 'ground_truth' / path.name / f'{image.stem}_mask.png'
                    raise UserError(f'{image}: a defect without its mask; add {expected}')
                file = image.relative_to(root).as_posix()
                records.append(Record(split, path.name, file, image, mask))
    return records


def _find_masks(base: Path) -> dict[Path, Path]:
    """Assigns the masks below `base/ground_truth` to the defective images that they describe."""
    truth = base / 'ground_truth'
    defective = {
        (split, path.name): _images(path)
        for split in SPLITS
        for path in _folders(base / split, required=False)
        if path.name != GOOD
    }
    masks = {}
    shared = {}  # a mask that does not name its split -> the image that has claimed it
    for (split, defect), files in defective.items():
        both = files + defective.get(('test' if split == 'train' else 'train', defect), [])
        own = _masks_by_name(truth / split / defect, files)
        common = _masks_by_name(truth / defect, both)
        copies = Counter(image.stem for image in files)
        for image in files:
            mask = own.get(image.stem) or common.get(image.stem)
            if mask is None:
                continue
            if copies[image.stem] > 1:
                raise UserError(f'{image}: two images of this name share {mask}; rename one')
            if mask in shared:
                raise UserError(
                    f'{image}: duplicate name, {mask} belongs to it or to {shared[mask]}; '
                    'rename one, or put masks into ground_truth/train and ground_truth/test'
                )
            masks[image] = mask
            shared[mask] = image
    folders = {truth / defect for _, defect in defective}
    folders |= {truth / split / defect for split, defect in defective}
    for file in (file for folder in sorted(folders) for file in _images(folder)):
        if file not in shared:
            logging.warning(
                '%s belongs to no image and is left out: the mask of NAME.png is NAME_mask.png',
                file,
            )
    return masks


def _masks_by_name(path: Path, defective: list[Path]) -> dict[str, Path]:
    """Maps images' names (without suffix) to their masks in a folder that may not exist.

    Masks that fit none of the images are left out, but where none fits at all their names must be
    meant otherwise than we read them.
    """
    files = _images(path)
    masks = {}
    for file in files:
        name = file.stem.removesuffix('_mask')
        if name == file.stem:
            continue
        if name in masks:
            raise UserError(f'{file}: duplicate name, {masks[name]} is the same mask; remove one')
        masks[name] = file
    if files and defective and not any(image.stem in masks for image in defective):
        raise UserError(
            f'{files[0]}: belongs to no image of {path.name!r}; the mask of NAME.png is '
            'NAME_mask.png'
        )
    return masks


def _folders(path: Path, required: bool = True) -> list[Path]:
    """Lists the folders in a folder, sorted; a required one must exist and hold something."""
    if required and not path.is_dir():
        raise UserError(f'{path}: no such folder; check --config.data.root')
    entries = list(_entries(path))
    if required and not entries:
        raise UserError(f'{path}: the folder is empty; check --config.data.root')
    return sorted(entry for entry in entries if entry.is_dir())


def _images(path: Path) -> list[Path]:
    """Lists the image files in a folder that may not exist, sorted."""
    return sorted(entry for entry in _entries(path) if entry.suffix.lower() in images.SUFFIXES)


def _entries(path: Path) -> Iterator[Path]:
    """Yields what a folder that may not exist holds, hidden entries left out."""
    if not path.is_dir():
        return
    try:
        for entry in path.iterdir():
            if not entry.name.startswith('.'):
                yield entry
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}); check the folder') from error
