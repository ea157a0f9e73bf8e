"""What a class is: folders, hidden names, links, nested folders, and folders in the wrong place."""

import os
import re
import shutil

import pytest
import torch
from PIL import Image
from runs import run, write_images
from torchvision.datasets import ImageFolder

from quadmamba.configs import load_cfg
from quadmamba.data import DataError, build_loaders
from quadmamba.data.folders import notes, read_classes, survey

KEYS = {"DATA.IMG_SIZE": 16, "DATA.WORKERS": 0, "DATA.BATCH_SIZE": 2}


@pytest.fixture
def root(tmp_path):
    """train/ and val/ with the classes class0, class1, class2."""
    return write_images(tmp_path / "data", train=3, val=2, classes=3)


def load(root, **options):
    return build_loaders(load_cfg(flags=KEYS | {"DATA.PATH": str(root)}), **options)


def refused(root, **options):
    with pytest.raises(DataError) as caught:
        load(root, **options)
    return str(caught.value)


def one_deeper(part, name="images"):
    """CLASS/* becomes NAME/CLASS/*."""
    classes = list(part.iterdir())
    (part / name).mkdir()
    for folder in classes:
        folder.rename(part / name / folder.name)


# ------------------------------------------------------------------------------- ordinary folders
def test_images_and_order_are_those_of_torchvision(root):
    train = root / "train"
    for name in ("class1/sub/b.png", "class1/sub-2/a.png", "class1/sub/deep/z.png", "Zebra/0.png"):
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(train / "class0" / "0.png", train / name)
    (train / "class9").symlink_to(root / "val" / "class0")
    (train / "class0" / "link.png").symlink_to("0.png")
    (train / "class0" / "more").symlink_to(root / "val" / "class2")
    theirs = ImageFolder(str(train))
    ours = read_classes(train)
    assert list(ours.images) == theirs.classes
    samples = [
        (path, number) for number, paths in enumerate(ours.images.values()) for path in paths
    ]
    assert samples == theirs.samples
    assert len(samples) == 9 + 4 + 2 + 1 + 2


def test_a_clean_folder_has_nothing_to_say(root):
    assert load(root).notes == []


# ------------------------------------------------------------------------------------ hidden names
HIDDEN = [
    ".ipynb_checkpoints",
    "__MACOSX",
    "@eaDir",
    ".git",
    "lost+found",
    "$RECYCLE.BIN",
    ".Trash-0",
]


@pytest.mark.parametrize("name", HIDDEN)
def test_W5_hidden_and_system_folders_are_no_classes(root, name):
    for part in ("train", "val"):
        shutil.copytree(root / part / "class0", root / part / name)
    loaders = load(root)
    assert loaders.classes == ["class0", "class1", "class2"]
    assert len(loaders.train.dataset) == 9
    assert [note for note in loaders.notes if name in note] == [
        f"1 hidden or system files and folders of {part} are left out ({name})"
        for part in ("train", "val")
    ]


def test_W5_hidden_files_are_no_images(root):
    ant = root / "train" / "class0"
    for name in ("._0.png", ".hidden.jpg", "Thumbs.db", ".DS_Store"):
        (ant / name).write_bytes(b"\0\5\x16\7")
    shutil.copytree(ant, ant / ".ipynb_checkpoints")
    found = read_classes(root / "train")
    assert len(found.images["class0"]) == 3
    assert len(found.hidden) == 5
    (note,) = notes(found)
    assert "5 hidden" in note
    assert "class0/._0.png" in note


def test_W5_a_hidden_folder_above_the_data_does_not_matter(tmp_path):
    root = write_images(tmp_path / ".cache" / "__MACOSX" / "data", train=2, val=1)
    assert load(root).classes == ["class0", "class1"]


def test_W5_it_is_said_once_in_a_run(root, tmp_path, capsys):
    shutil.copytree(root / "val" / "class0", root / "val" / ".ipynb_checkpoints")
    (root / "train" / "class1" / "a.heic").touch()
    flags = ("--data-path", root, "--output", tmp_path / "out", "--batch-size", 2, "--epochs", 1)
    assert run(*flags) == 0
    out = capsys.readouterr().out
    assert out.count("1 hidden or system files and folders of val are") == 1
    assert out.count("1 files of train are no images by their names and left out (class1/a.he") == 1
    best = tmp_path / "out" / "quadmamba_lite" / "default" / "best.pth"
    assert run("--eval", *flags, "--pretrained", best) == 0
    out = capsys.readouterr().out
    assert (out.count("hidden"), out.count("heic")) == (1, 0)


# --------------------------------------------------------------------------------- names of files
def test_W6_other_names_are_counted_and_said(root):
    train = root / "train"
    for name in (
        "class0/a.heic",
        "class0/b.svg",
        "class1/c.txt",
        "class2/d",
        "loose.png",
        "map.json",
    ):
        (train / name).touch()
    said = list(notes(read_classes(train)))
    assert said == [
        "4 files of train are no images by their names and left out "
        "(class0/a.heic, class0/b.svg, class1/c.txt, class2/d)",
        "2 files of train lie beside the class folders and are left out (loose.png, map.json)",
    ]


def test_W6_images_of_every_ending_are_read(root):
    picture = Image.new("RGB", (8, 8), "red")
    for name in (
        "a.jfif",
        "b.avif",
        "c.gif",
        "d.JPG",
        "e.TIF",
        "f.WebP",
        "g.pgm",
        "h.bmp",
        "i.jp2",
    ):
        (picture.convert("L") if name == "x.pgm" else picture).save(root / "val" / "class0" / name)
    loader = load(root, with_train=False).val
    assert sum(len(images) for images, _ in loader) == 6 + 9


# ------------------------------------------------------------------------------------------- links
def loops(train):
    """Links in class0 that lead to folders in which they lie, or to one that is read already."""
    ant = train / "class0"
    (ant / "sub").mkdir()
    shutil.copy(ant / "0.png", ant / "sub" / "9.png")
    return {
        "itself": (ant / "again", ant),
        "relative": (ant / "again", "."),
        "from below": (ant / "sub" / "up", ".."),
        "twice": (ant / "sub-again", ant / "sub"),
        "the classes": (ant / "all", train),
        "the data": (ant / "data", train.parent),
        "everything": (ant / "everything", "/"),
    }


@pytest.mark.parametrize(
    "case", ["itself", "relative", "from below", "twice", "the classes", "the data", "everything"]
)
def test_W7_a_folder_is_visited_once(root, case):
    link, target = loops(root / "train")[case]
    link.symlink_to(target)
    found = read_classes(root / "train")
    assert len(found.images["class0"]) == 4
    assert found.repeated == [str(link)]
    (note,) = notes(found)
    assert note.startswith("1 links of train lead to folders that are read already (class0/")


def test_W7_a_class_that_is_a_link_to_a_folder_with_a_link_upwards(tmp_path, root):
    store = tmp_path / "store"
    shutil.copytree(root / "train", store)
    (store / "class0" / "up").symlink_to("..")
    shutil.rmtree(root / "train" / "class0")
    (root / "train" / "class0").symlink_to(store / "class0")
    found = read_classes(root / "train")
    assert [len(paths) for paths in found.images.values()] == [3, 3, 3]
    assert found.repeated == [str(root / "train" / "class0" / "up")]


def test_W7_a_folder_elsewhere_with_a_link_back_to_the_classes(tmp_path, root):
    shutil.copytree(root / "val" / "class0", tmp_path / "store")
    (tmp_path / "store" / "all").symlink_to(root / "train")
    (root / "train" / "class0" / "more").symlink_to(tmp_path / "store")
    found = read_classes(root / "train")
    assert [len(paths) for paths in found.images.values()] == [5, 3, 3]
    assert found.repeated == [str(root / "train" / "class0" / "more" / "all")]


def test_W7_links_between_two_folders_in_a_circle(root, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, other in ((one, two), (two, one)):
        folder.mkdir()
        shutil.copy(root / "train" / "class0" / "0.png", folder / f"{folder.name}.png")
        (folder / "next").symlink_to(other)
    (root / "train" / "class0" / "more").symlink_to(one)
    names = [os.path.basename(path) for path in read_classes(root / "train").images["class0"]]
    assert names == ["0.png", "1.png", "2.png", "one.png", "two.png"]


def test_W7_the_real_folder_goes_before_a_link_to_it(root):
    ant = root / "train" / "class0"
    (ant / "b").mkdir()
    shutil.copy(ant / "0.png", ant / "b" / "9.png")
    (ant / "a").symlink_to("b")
    assert read_classes(root / "train").images["class0"][-1] == str(ant / "b" / "9.png")


def test_W7_classes_that_share_a_folder_are_said(root):
    (root / "train" / "class3").symlink_to("class1")
    (root / "train" / "class0" / "more").symlink_to(root / "train" / "class2")
    found = read_classes(root / "train")
    assert [len(paths) for paths in found.images.values()] == [6, 3, 3, 3]
    assert list(notes(found)) == [
        "2 pairs of classes of train share a folder, its images count in both "
        "(class0 and class2, class1 and class3)"
    ]


def test_W7_links_that_lead_nowhere_are_named_when_they_are_read(root):
    bee = root / "val" / "class1"
    (bee / "gone.png").symlink_to("nowhere.png")
    (bee / "circle.jpg").symlink_to("circle.jpg")
    (bee / "gone").symlink_to("nowhere")
    found = read_classes(root / "val")
    assert [os.path.basename(p) for p in found.images["class1"]] == [
        *("0.png", "1.png", "circle.jpg", "gone.png")
    ]
    assert found.others == [str(bee / "gone")]
    with pytest.raises(DataError, match=r"circle\.jpg: Too many levels"):
        list(load(root, with_train=False).val)


# -------------------------------------------------------------------------------- nested folders
def test_W4_classes_one_folder_too_deep(root):
    for part in ("train", "val"):
        one_deeper(root / part)
    for with_train in (True, False):
        text = refused(root, with_train=with_train)
        assert f"expected two or more class folders in {root}/val, found one: images" in text
        assert f"{root}/val/images holds folders itself: class0, class1, class2" in text
        assert f"mv {root}/val/images/* {root}/val/" in text


@pytest.mark.parametrize("part", ["train", "val"])
def test_W4_too_deep_on_one_side_and_what_is_advised_works(root, part):
    one_deeper(root / part)
    text = refused(root)
    assert f"{root}/{part}/images holds folders itself" in text
    (command,) = re.findall(r"^  (mv .*)$", text, re.MULTILINE)
    assert os.system(command) == 0
    assert load(root).classes == ["class0", "class1", "class2"]


def test_W4_train_in_train(root):
    one_deeper(root / "train", "train")
    assert f"mv {root}/train/train/* {root}/train/" in refused(root)


@pytest.mark.parametrize("depth", [1, 2])
def test_W4_the_data_lies_deeper_than_the_path(root, depth):
    moved = root.parent / "outer" / "/".join(["inner"] * (depth - 1)) / "imagenet"
    moved.parent.mkdir(parents=True)
    root.rename(moved)
    path = root.parent / "outer"
    assert f"There is {moved} with train/ and val/: give --data-path {moved}" in refused(path)
    assert load(moved).classes


@pytest.mark.parametrize("inside", ["train", "val", "train/class0"])
def test_W4_the_path_is_a_part_of_the_data(root, inside, monkeypatch):
    advice = f"There is {root} with train/ and val/: give --data-path {root}"
    assert advice in refused(root / inside)
    monkeypatch.chdir(root / inside)
    assert advice in refused(".")


def test_W4_the_path_holds_the_classes(root):
    flat = root.parent / "flat"
    shutil.copytree(root / "train", flat)
    text = refused(flat)
    assert f"{flat} holds 3 folders, class0, class1, class2" in text
    assert f"move them to {flat}/train" in text


@pytest.mark.parametrize("name", ["valid", "validation", "test", "Val", "VAL"])
def test_W4_a_part_of_another_name(root, name):
    (root / "val").rename(root / name)
    assert f"There is {root / name}: rename it to val" in refused(root)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_W4_one_class_is_refused(tmp_path, capsys, mode):
    root = write_images(tmp_path / "data", train=4, val=2, classes=1)
    flags = ["--data-path", root, "--output", tmp_path / "out", "--batch-size", 2, "--epochs", 1]
    flags += ["--eval", "--pretrained", "none.pth"] if mode == "eval" else []
    assert run(*flags, MODEL__NUM_CLASSES=1) == 2
    err = capsys.readouterr().err
    assert "found one: class0; a classifier needs two or more classes" in err


def test_W4_classes_of_nested_folders_are_the_upper_ones_and_said(tmp_path):
    for part in ("train", "val"):
        for name in ("animals/cat", "animals/dog", "vehicles/car"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "0.png")
    loaders = load(tmp_path)
    assert loaders.classes == ["animals", "vehicles"]
    assert loaders.notes == [
        f"2 classes of {part} have all images in sub-folders, which are no classes "
        "(animals, vehicles)"
        for part in ("train", "val")
    ]


def test_an_empty_class_and_none_are_refused_after_what_is_hidden(root):
    shutil.rmtree(root / "val" / "class1")
    (root / "val" / "class1" / ".ipynb_checkpoints").mkdir(parents=True)
    shutil.copy(root / "val/class0/0.png", root / "val/class1/.ipynb_checkpoints/0.png")
    assert "found none in class1" in refused(root)
    for name in ("class0", "class1", "class2"):
        (root / "val" / name).rename(root / "val" / f".{name}")
    assert "expected one sub-folder a class" in refused(root)


# ------------------------------------------------------------------------------------ odd entries
def test_folders_and_pipes_with_names_of_images(root):
    ant = root / "train" / "class0"
    (ant / "x.jpg").mkdir()
    shutil.copy(ant / "0.png", ant / "x.jpg" / "inside.png")
    os.mkfifo(ant / "pipe.png")
    os.mkfifo(ant / "pipe")
    found = read_classes(root / "train")
    names = [os.path.relpath(path, ant) for path in found.images["class0"]]
    assert names == ["0.png", "1.png", "2.png", "pipe.png", "x.jpg/inside.png"]
    with pytest.raises(DataError, match=r"pipe\.png: it is no regular file"):
        list(load(root).train)


def test_names_outside_utf_8_and_with_newlines(root):
    odd = os.fsencode(root / "val" / "class0") + b"/caf\xe9\n.png"
    shutil.copy(root / "val/class0/0.png", odd)
    folder = os.fsdecode(os.fsencode(root / "val") + b"/class0/d\xff")
    shutil.copytree(root / "val" / "class1", folder)
    (root / "val" / "class0" / "a\nb.txt").touch()
    loaders = load(root, with_train=False)
    assert sum(len(images) for images, _ in loaders.val) == 6 + 1 + 2
    assert loaders.notes[0].endswith(r"(class0/a\nb.txt)")
    with open(odd, "w"):
        pass
    with pytest.raises(DataError, match=r"class0/caf\\xe9\\n\.png: it is empty"):
        list(load(root, with_train=False).val)


def test_a_folder_that_cannot_be_listed_is_an_error(root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("class1"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("quadmamba.data.folders.os.scandir", refuse)  # root may list all
    assert f"cannot list the folder {root}/val/class1: Permission denied" in refused(root)


def test_ranks_agree_on_the_order(root):
    for name in ("b", "a", "c"):
        (root / "train" / "class0" / name).symlink_to(root / "val" / "class1")
    first = survey(root / "train").images
    assert all(survey(root / "train").images == first for _ in range(3))
    assert [os.path.relpath(p, root) for p in first["class0"]][-2:] == [
        "train/class0/a/0.png",
        "train/class0/a/1.png",
    ]


def test_targets_follow_the_classes(root):
    shutil.copytree(root / "val" / "class0", root / "val" / ".aaa")
    targets = torch.cat([targets for _, targets in load(root, with_train=False).val])
    assert targets.tolist() == [0, 0, 1, 1, 2, 2]
