"""What a class is: the sub-folders of train/ and val/, and the images in and below each of them.

The rules are told in docs/data.md. For ordinary folders the images and their order are those of
torchvision's ImageFolder.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quadmamba.data.images import DataError, endings, is_image_name, shown

PARTS = ("train", "val")
# What systems and file servers leave behind, in lower case; besides all names with a leading dot
_SYSTEM = {
    *("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information"),
    *("lost+found", "thumbs.db", "desktop.ini", "__pycache__"),
}
_LOOKED_AT = 100  # sub-folders of a folder that are searched for what the user may have meant


@dataclass
class Survey:
    """What lies in a folder of class folders, in the order in which it is read.

    images: paths by class. All else are paths too: hidden: left out by their names. others: files
    in classes that are no images by their names. loose: files beside the class folders. repeated:
    links to a folder that is read already, or that holds the link. locked: what cannot be listed,
    and why. shared: pairs of classes that hold the same folder. nested: classes whose images all
    lie in sub-folders.
    """

    root: Path
    images: dict[str, list[str]] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    locked: dict[str, str] = field(default_factory=dict)
    shared: list[tuple[str, str]] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)

    @property
    def empty(self) -> list[str]:
        """Classes without images."""
        return [name for name, paths in self.images.items() if not paths]

    def below(self, paths: Sequence[str]) -> list[str]:
        """These paths as seen from the folder."""
        return [os.path.relpath(path, self.root) for path in paths]


def survey(root: Path, tell: Callable[[str], object] = lambda _: None) -> Survey:
    """Look at all that lies below `root`, each folder once in a class. Raises no error.

    tell: called with the path of each folder before it is listed.
    """
    found = Survey(root)
    real = Path(os.path.realpath(root))
    above = {_identity(folder) for folder in (real, *real.parents)}
    owners: dict[tuple[int, int], str] = {}
    for path, is_folder in _visible(str(root), found):
        if is_folder:
            found.images[os.path.basename(path)] = []
        else:
            found.loose.append(path)
    for label in found.images:
        _survey_class(found, label, above, owners, tell)
    return found


def _survey_class(
    found: Survey,
    label: str,
    above: set[tuple[int, int]],
    owners: dict[tuple[int, int], str],
    tell: Callable[[str], object],
) -> None:
    """Add the images of one class; real folders are entered before links to them."""
    seen = set(above)
    top = os.path.join(str(found.root), label)
    waiting, links, files = [top], [], {}
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        tell(folder)
        identity = _identity(folder)
        if identity in seen or _is_loop(folder):
            found.repeated.append(folder)
            continue
        seen.add(identity)
        owner = owners.setdefault(identity, label)
        if owner != label and (owner, label) not in found.shared:
            found.shared.append((owner, label))
        files[folder] = []
        for path, is_folder in _visible(folder, found):
            if is_folder:
                (links if os.path.islink(path) else waiting).append(path)
            else:
                (files[folder] if is_image_name(path) else found.others).append(path)
    found.images[label] = [path for folder in sorted(files) for path in files[folder]]
    if found.images[label] and not files.get(top):
        found.nested.append(label)


def _visible(folder: str, found: Survey) -> Iterator[tuple[str, bool]]:
    """What a folder holds, by name: paths, and whether each is a folder or a link to one."""
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        found.locked[folder] = error.strerror or str(error)
        return
    for entry in entries:
        if is_hidden(entry.name):
            found.hidden.append(entry.path)
        else:
            yield entry.path, _is_folder(entry)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle: reading it as a file says so
        return False


def _is_loop(folder: str) -> bool:
    """Whether a link leads to a folder that holds it."""
    if not os.path.islink(folder):
        return False
    target, place = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
    return os.path.commonpath([target, place]) == target


def _identity(folder: str | Path) -> tuple[int, int]:
    try:
        info = os.stat(folder)
    except OSError:  # gone meanwhile; listing it says so
        return -1, hash(folder)
    return info.st_dev, info.st_ino


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out by its name: hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in _SYSTEM


# ------------------------------------------------------------------------------------ what is wrong
def problems(found: Survey) -> list[str]:
    """What is wrong with the folders of a part, apart from empty ones: messages with advice."""
    texts = [
        f"cannot list the folder {shown(path)}: {why}" for path, why in sorted(found.locked.items())
    ]
    if not found.images and not texts:
        texts.append(
            f"expected one sub-folder a class in {shown(found.root)}, found no folder"
            + _meant(found.root)
        )
    elif len(found.images) == 1:
        texts.append(_one_class(found))
    return texts


def _one_class(found: Survey) -> str:
    (label,) = found.images
    folder = found.root / label
    text = f"expected two or more class folders in {shown(found.root)}, found one: {shown(label)}"
    inside, quoted = _sub_folders(folder), shlex.quote(shown(folder))
    if not inside:
        return text + "; a classifier needs two or more classes" + _meant(found.root)
    return (
        f"{text}\n{shown(folder)} holds folders itself: "
        f"{shorten([path.name for path in inside])}. Where these are the classes, move them up:\n"
        f"  mv {quoted}/* {shlex.quote(shown(found.root))}/ && rmdir {quoted}" + _meant(found.root)
    )


def missing(root: Path) -> str:
    """What to say where there is no folder `root`, one of the parts of a data set."""
    text = (
        f"no such folder: {shown(root)}\n"
        "DATA.PATH (--data-path) is expected to hold train/ and val/, "
        "each with one sub-folder a class."
    )
    data = root.parent
    meant = _meant(root)
    if meant or not data.is_dir():
        return text + meant
    names = [path.name for path in _sub_folders(data)]
    similar = {"val": ("valid", "validation", "test", "dev"), "train": ("training",)}
    for name in names:
        if name.lower() in (root.name, *similar.get(root.name, ())):
            return f"{text}\nThere is {shown(data / name)}: rename it to {root.name}."
    if not set(names) & set(PARTS) and len(names) > 1 and any(map(_holds_images, _first(data))):
        text += (
            f"\n{shown(data)} holds {len(names)} folders, {shorten(names)}. Where these are the "
            f"classes, move them to {shown(data / 'train')}, and some images of each to the same "
            f"folders in {shown(data / 'val')}."
        )
    return text


def _meant(root: Path) -> str:
    """The folder with train/ and val/ that is near, as a line of advice; "" where there is none."""
    data = Path(os.path.abspath(root)).parent
    near = [data.parent, data.parent.parent, *_first(data)]
    near += [inner for path in _first(data) for inner in _first(path)]
    for path in near:
        if path != data and all(len(_first(path / part)) > 1 for part in PARTS):
            return f"\nThere is {shown(path)} with train/ and val/: give --data-path {shown(path)}"
    return ""


def _first(folder: Path) -> list[Path]:
    return _sub_folders(folder)[:_LOOKED_AT]


def _sub_folders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden; none where it cannot be listed."""
    entries = _visible(str(folder), Survey(folder))
    return [Path(path) for path, is_folder in entries if is_folder]


def _holds_images(folder: Path) -> bool:
    entries = _visible(str(folder), Survey(folder))
    return any(not is_folder and is_image_name(path) for path, is_folder in entries)


# ------------------------------------------------------------------------------------ what is said
def notes(found: Survey) -> Iterator[str]:
    """What is left out of a folder of classes, or read in a way that may surprise: lines."""
    part = shown(found.root.name)
    shared = [f"{one} and {other}" for one, other in found.shared]
    for names, words in (
        (found.below(found.hidden), "hidden or system files and folders of {} are left out"),
        (found.below(found.others), "files of {} are no images by their names and left out"),
        (found.below(found.loose), "files of {} lie beside the class folders and are left out"),
        (found.below(found.repeated), "links of {} lead to folders that are read already"),
        (shared, "pairs of classes of {} share a folder, its images count in both"),
        (found.nested, "classes of {} have all images in sub-folders, which are no classes"),
    ):
        if names:
            yield f"{len(names)} {words.format(part)} ({shorten(names)})"


def read_classes(root: Path, tell: Callable[[str], object] = lambda _: None) -> Survey:
    """The classes and images of `root`, a part of a data set. Raises DataError for bad folders.

    tell: as for `survey`.
    """
    if not root.is_dir():
        raise DataError(missing(root))
    found = survey(root, tell)
    for problem in problems(found):
        raise DataError(problem)
    if found.empty:
        raise DataError(
            f"expected images in every class folder of {shown(root)}, "
            f"found none in {shorten(found.empty)}\n"
            f"Add images ({' '.join(sorted(endings()))}) or remove the folders."
        )
    return found


def differing_classes(data: str | Path, train: Sequence[str], val: Sequence[str]) -> str:
    """What to say where the classes of both parts are not the same; "" where they are."""
    if train == val:
        return ""
    lines = [f"expected the same class folders in {shown(data)}/train and {shown(data)}/val"]
    for name, extra in (("train", set(train) - set(val)), ("val", set(val) - set(train))):
        if extra:
            lines.append(f"only in {name}/ ({len(extra)}): {shorten(sorted(extra))}")
    return "\n".join(lines)


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names in one line, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(shown, names[:limit])) + more
