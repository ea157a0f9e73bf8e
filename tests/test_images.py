"""What an image file is, and its bytes: beside Pillow, by the rules of docs/data.md."""

import io
import os
import socket
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from damaged import chunk, picture
from PIL import Image, ImageCms, ImageOps
from runs import finish, start

from quadmamba.data import DataError, read_image
from quadmamba.data.images import FORMATS, endings, is_image_name, read_pixels, shown, to_rgb

LIMIT = 10**6
ORIENTATION = 274


def save(path, image, **options):
    image.save(path, **options)
    return path


def noise(mode, width=40, height=30):
    return picture(mode, width, height, np.random.default_rng(3))


def pixels(path):
    return read_image(path, LIMIT).numpy()


def encoded(image, name, **options):
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


# ------------------------------------------------------------------------------------------ JPEGs
def adobe_rgb(content):
    """A JPEG whose three channels are marked as RGB by Adobe's segment."""
    segment = b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, 0)
    return content[:2] + segment + content[20:]  # JFIF's segment, which says YCbCr, goes


@pytest.mark.parametrize("quality", [1, 10, 50, 75, 90, 100])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_W1_jpegs_are_those_of_pillow_to_the_bit(tmp_path, quality, subsampling, progressive):
    rng = np.random.default_rng(quality)
    for width, height in ((1, 1), (1, 9), (17, 1), (8, 8), (33, 47), (160, 121)):
        for restart in (0, 1, 5):
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            content = encoded(
                Image.blend(image, noise("RGB", width, height), 0.7),
                "JPEG",
                quality=quality,
                subsampling=subsampling,
                progressive=progressive,
                restart_marker_blocks=restart,
            )
            for data in (content, adobe_rgb(content)):
                (tmp_path / "a.jpg").write_bytes(data)
                expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                assert np.array_equal(pixels(tmp_path / "a.jpg"), expected)
    assert not np.array_equal(expected, np.asarray(Image.open(io.BytesIO(content)))), "RGB, not YCC"


@pytest.mark.parametrize(("mode", "by_pillow"), [("RGB", False), ("L", False), ("CMYK", True)])
def test_ordinary_jpegs_do_not_go_through_pillow(tmp_path, monkeypatch, mode, by_pillow):
    path = save(tmp_path / "a.jpg", noise(mode), quality=85)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(pixels(path), expected)
    monkeypatch.setattr("quadmamba.data.images.Image.open", lambda *_, **__: 1 / 0)
    if by_pillow:
        with pytest.raises(DataError, match="ZeroDivisionError"):
            pixels(path)
    else:
        assert np.array_equal(pixels(path), expected)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_cut_anywhere_is_an_error_or_what_pillow_reads(tmp_path, progressive):
    content = encoded(noise("RGB", 160, 120), "JPEG", progressive=progressive)
    path, read = tmp_path / "a.jpg", 0
    for end in [*range(0, len(content), 61), *range(len(content) - 6, len(content))]:
        path.write_bytes(content[:end])
        try:
            expected = np.asarray(Image.open(io.BytesIO(content[:end])).convert("RGB"))
        except OSError:
            with pytest.raises(
                DataError, match=r"(?i)a\.jpg: .*(truncated|0 bytes|content|cannot load)"
            ):
                pixels(path)
        else:
            read += 1
            assert np.array_equal(pixels(path), expected)
    assert read < 6


def test_what_a_jpeg_decoder_only_complains_of_is_read_and_can_be_recorded(tmp_path, capfd):
    content = encoded(noise("RGB"), "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(content[:20] + b"junk" + content[20:])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = read_pixels(path, LIMIT)
    assert "extraneous bytes" in str(caught[0].message)
    assert np.array_equal(got, np.asarray(Image.open(path)))
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------- depth
RAMP = np.linspace(0, 65535, 30 * 40).astype(np.uint16).reshape(30, 40)
RAMP_8 = np.rint(RAMP / 257).astype(np.uint8)


def big_endian_tiff(values, bits=16, white_is_zero=False, sample_format=1):
    """An uncompressed grey TIFF by hand: one strip behind the header, then the directory."""
    height, width = values.shape
    data = values.tobytes()
    entries = [
        *((256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1)),
        *((262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1), (278, 4, height)),
        *((279, 4, len(data)), (339, 3, sample_format)),
    ]
    order = ">" if values.dtype.byteorder == ">" else "<"
    fields = b"".join(
        struct.pack(order + ("HHIHxx" if kind == 3 else "HHII"), tag, kind, 1, value)
        for tag, kind, value in entries
    )
    start = b"MM\0*" if order == ">" else b"II*\0"
    directory = struct.pack(order + "H", len(entries)) + fields + bytes(4)
    return start + struct.pack(order + "I", 8 + len(data)) + data + directory


def sixteen_bits():
    grey = Image.fromarray(RAMP)
    return {
        "a.png": encoded(grey, "PNG"),
        "little.tif": encoded(grey, "TIFF"),
        "lzw.tif": encoded(grey, "TIFF", compression="tiff_lzw"),
        "big.tif": big_endian_tiff(RAMP.astype(">u2")),
        "white-is-zero.tif": big_endian_tiff((65535 - RAMP).astype("<u2"), white_is_zero=True),
        "a.pgm": b"P5 40 30 65535\n" + RAMP.astype(">u2").tobytes(),
        "plain.pgm": b"P2 40 30 65535\n" + b" ".join(b"%d" % v for v in RAMP.ravel()),
        "a.jp2": encoded(grey, "JPEG2000"),
    }


@pytest.mark.parametrize("name", sixteen_bits())
def test_W1_sixteen_bit_grey_is_divided_by_257_and_rounded(tmp_path, name):
    (tmp_path / name).write_bytes(sixteen_bits()[name])
    assert np.array_equal(pixels(tmp_path / name), np.repeat(RAMP_8[..., None], 3, 2))


def test_W1_classes_that_differ_above_255_do_not_look_alike(tmp_path):
    means = []
    for first in (2000, 40000):
        values = np.random.default_rng(0).integers(first, first + 400, (20, 20)).astype(np.uint16)
        means.append(pixels(save(tmp_path / f"{first}.tif", Image.fromarray(values))).mean())
    assert means == pytest.approx([2200 / 257, 40200 / 257], abs=0.2)


def test_W1_twelve_bits_of_a_tiff_are_scaled_by_its_own_white(tmp_path):
    values = np.array([[0, 2048], [4095, 16]])
    packed = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in values.tolist())
    content = bytearray(big_endian_tiff(np.zeros((2, 2), "<u2"), bits=12))
    content[8:14] = packed
    (tmp_path / "a.tif").write_bytes(content)
    expected = np.rint(values * 255 / 4095)
    assert np.array_equal(pixels(tmp_path / "a.tif")[..., 0], expected)


def test_W1_a_maximum_between_the_depths_is_scaled_by_pillow(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P2 3 1 1000\n0 500 1000")
    assert pixels(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, 128, 255]


FLAT = np.linspace(0, 1, 1200).reshape(30, 40)
REFUSED = {
    "float.tif": (lambda: encoded(Image.fromarray(FLAT.astype(np.float32)), "TIFF"), "floating"),
    "a.pfm": (lambda: encoded(Image.fromarray(FLAT.astype(np.float32)), "PPM"), "floating"),
    "int.tif": (lambda: encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "integers of 32"),
    "signed.tif": (
        lambda: big_endian_tiff(RAMP.astype(">i2"), sample_format=2),
        "integers of 32 or signed 16 bits",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_W1_pixels_without_a_known_white_are_refused_by_name(tmp_path, name):
    make, words = REFUSED[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(DataError, match=rf"{name}: its pixels are .*{words}.*save it"):
        pixels(tmp_path / name)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_W1_other_modes_are_converted_by_pillow(tmp_path, mode):
    path = save(tmp_path / "a.tif", noise(mode))
    with Image.open(path) as image:
        assert image.mode == mode
        assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBX", "HSV", "RGBa", "La"])
def test_W1_modes_that_only_live_in_memory(mode):
    colour = noise("RGBA") if mode == "RGBa" else noise("LA") if mode == "La" else noise("RGB")
    image = colour.convert(mode)
    plain = image.convert(mode.upper()).convert("RGB") if mode != "HSV" else image.convert("RGB")
    assert np.array_equal(to_rgb(image), np.asarray(plain))


def test_lab_is_a_colour_space_and_not_three_channels(tmp_path):
    patch = Image.new("RGB", (4, 4), (200, 40, 90))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(patch, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    got = pixels(save(tmp_path / "a.tif", lab))
    assert np.abs(got.astype(int) - (200, 40, 90)).max() <= 3


def test_a_large_image_is_converted_in_strips_as_in_one(tmp_path, monkeypatch):
    for mode in ("RGB", "P", "CMYK", "I;16", "LA"):
        path = save(tmp_path / f"{mode[0]}.tif", noise(mode, 50, 41))
        whole = pixels(path)
        with monkeypatch.context() as small:
            small.setattr("quadmamba.data.images._STRIP", 50 * 3)
            assert np.array_equal(pixels(path), whole)


# ----------------------------------------------------------------------- colours and orientation
def test_W8_hidden_colours_show(tmp_path):
    hidden = np.zeros((6, 5, 4), np.uint8)
    hidden[..., :3] = np.random.default_rng(0).integers(0, 256, (6, 5, 3))
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True, "exact": True})):
        path = save(tmp_path / name, Image.fromarray(hidden), **options)
        assert np.array_equal(pixels(path), hidden[..., :3])
    palette = noise("P")
    for name, clear in (("index.png", 3), ("each.png", bytes(256))):
        path = save(tmp_path / name, palette, transparency=clear)
        assert np.array_equal(pixels(path), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("turn", range(1, 9))
def test_W8_exif_orientation_is_not_applied(tmp_path, turn):
    image, exif = noise("RGB", 12, 7), Image.Exif()
    exif[ORIENTATION] = turn
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True}), ("a.jpg", {})):
        path = save(tmp_path / name, image, exif=exif, **options)
        stored = encoded(image, Image.registered_extensions()[path.suffix], **options)
        assert np.array_equal(pixels(path), np.asarray(Image.open(io.BytesIO(stored))))


def test_W8_the_orientation_of_a_tiff_is_part_of_its_format(tmp_path):
    image = noise("RGB", 12, 7)
    path = save(tmp_path / "a.tif", image, tiffinfo={ORIENTATION: 6})
    image.getexif()[ORIENTATION] = 6
    assert np.array_equal(pixels(path), np.asarray(ImageOps.exif_transpose(image)))


def test_W6_the_first_frame_of_an_animation(tmp_path):
    frames = [noise("RGB"), Image.new("RGB", (40, 30), "blue"), Image.new("RGB", (40, 30), "red")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif", "a.avif"):
        options = {"lossless": True} if name == "a.webp" else {}
        path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
        with Image.open(path) as image:
            assert image.n_frames == 3
            assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))
        assert np.abs(pixels(path).astype(int) - np.asarray(frames[0])).mean() < 40


# ----------------------------------------------------------------------------------- what is a file
def test_W6_endings_of_every_format_in_any_case(tmp_path):
    image = noise("L")
    for name, of_format in FORMATS.items():
        for ending in of_format:
            for written in (ending, ending.upper()):
                assert is_image_name(f"x{written}")
                kind = "PPM" if ending == ".pfm" else name
                grey = Image.fromarray(RAMP_8) if kind != "QOI" else image.convert("RGB")
                path = tmp_path / f"x{written}"
                path.write_bytes(encoded(grey, kind))
                assert pixels(path).shape == (30, 40, 3)
    for name in ("x.txt", "x.svg", "x.heic", "x", "jpg", "x.jpg.part", "x.jpg~", "x.xml", "x.npy"):
        assert not is_image_name(name)


def test_W6_an_ending_that_this_pillow_cannot_read_is_no_image(monkeypatch):
    monkeypatch.setattr("quadmamba.data.images.features.check", lambda part: part != "avif")
    names = endings.__wrapped__()
    assert ".avif" not in names
    assert {".jpg", ".webp"} < names


def test_the_content_says_which_format_it_is(tmp_path):
    image = noise("RGB")
    for name in ("PNG", "BMP", "GIF", "WEBP", "TIFF", "JPEG", "PPM", "QOI", "AVIF", "JPEG2000"):
        path = tmp_path / "a.jpg"
        path.write_bytes(encoded(image, name))
        assert np.array_equal(pixels(path), np.asarray(Image.open(path).convert("RGB")))
    for content in (encoded(image, "PDF"), encoded(image, "EPS"), encoded(image, "TGA"), b"a text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jpg: .*no known format \(JPEG, PNG"):
            pixels(path)


def test_a_file_that_is_known_but_cannot_be_opened_says_why(tmp_path):
    (tmp_path / "a.tif").write_bytes(big_endian_tiff(RAMP.astype("<u2"), bits=13))
    with pytest.raises(DataError, match="unknown pixel mode"):
        pixels(tmp_path / "a.tif")


READ = """
import sys
from quadmamba.data import DataError, read_image
for path in sys.argv[1:]:
    try:
        read_image(path, 10**6)
        print("read")
    except DataError as error:
        print(error)
"""


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
        names = ["pipe.jpg", "folder.jpg", "link.jpg", "socket.jpg"]
        paths = [*(tmp_path / name for name in names), "/dev/zero"]
        code, out, err = finish(start(["-c", READ, *paths]), timeout=60)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == len(paths)
    assert all(f"{p}: it is no regular file" in line for p, line in zip(paths, lines))


def test_faults_of_files_are_told_in_one_line(tmp_path):
    (tmp_path / "none.png").touch()
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    strange = os.fsencode(tmp_path) + b"/caf\xe9\n.png"
    with open(strange, "w") as file:
        file.write("no image")
    cases = {
        "none.png": r"none\.png: it is empty \(0 bytes\)",
        "circle.png": "Too many levels of symbolic links",
        "gone.png": "No such file",
        os.fsdecode(os.path.basename(strange)): r"/caf\\xe9\\n\.png: its content",
    }
    for name, words in cases.items():
        with pytest.raises(DataError, match=words) as caught:
            pixels(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
        str(caught.value).encode()


def test_shown_paths_are_valid_text_in_one_line():
    assert shown("a b/ü漢.png") == "a b/ü漢.png"
    assert shown("a\tb\r\x1b[31m\x9b.png") == r"a\tb\r\x1b[31m\x9b.png"
    assert shown(os.fsdecode(b"\xff.png")) == r"\xff.png"


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", noise("L"))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may open all
    with pytest.raises(DataError, match=r"a\.png: Permission denied"):
        pixels(path)


# ------------------------------------------------------------------------------------ the limit
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "TGA"] + ["TGA"])
def test_C5_one_limit_of_pixels_for_every_format(tmp_path, name):
    image = noise("RGB", 40, 30)
    path = tmp_path / f"a{FORMATS[name][0]}"
    path.write_bytes(encoded(image, name))
    assert read_image(path, 40 * 30).shape == (30, 40, 3)
    with pytest.raises(DataError, match=r"1,200 pixels, above the limit of 1,199 \(DATA.MAX_PIX"):
        read_image(path, 40 * 30 - 1)
    assert Image.MAX_IMAGE_PIXELS == 89478485, "the limit of others is as before"


def test_C5_huge_claims_of_small_files_cost_no_memory(tmp_path):
    path = tmp_path / "a.jpg"
    content = bytearray(encoded(noise("RGB"), "JPEG"))
    place = content.find(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", 65500, 65500)
    path.write_bytes(content)
    png = bytearray(encoded(noise("RGB"), "PNG"))
    png[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (tmp_path / "a.png").write_bytes(png)
    for each in (path, tmp_path / "a.png"):
        with pytest.raises(DataError, match=r"above the limit of 1,000,000 \(DATA.MAX_PIXELS\)"):
            pixels(each)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_C5_bombs_in_the_text_of_a_png_are_named(tmp_path, kind):
    bomb = zlib.compress(bytes(50_000_000), 9)
    head = {b"zTXt": b"Comment\0\0", b"iCCP": b"name\0\0", b"iTXt": b"Comment\0\1\0\0\0"}[kind]
    content = encoded(noise("RGB"), "PNG")
    (tmp_path / "a.png").write_bytes(content[:33] + chunk(kind, head + bomb) + content[33:])
    with pytest.raises(DataError, match=r"a\.png: .*[Dd]ecompressed data too large"):
        pixels(tmp_path / "a.png")


# -------------------------------------------------------------------------------------- warnings
QUIET = """
import sys, torch
from quadmamba.data import read_image
for path in sys.argv[1:]:
    assert isinstance(read_image(path, 60_000_000), torch.Tensor)
"""


def test_warnings_of_decoders_stay_off_the_console(tmp_path):
    palette = save(tmp_path / "palette.png", noise("P"), transparency=bytes(256))
    content = encoded(noise("RGB"), "JPEG")
    (tmp_path / "odd.jpg").write_bytes(content[:20] + b"junk" + content[20:])
    many = save(tmp_path / "many.png", Image.new("1", (8000, 6000)))  # above half of the limit
    tags = bytearray(encoded(noise("L"), "TIFF", tiffinfo={65000: "a private word"}))
    place = tags.find(struct.pack("<HH", 65000, 2))
    tags[place + 8 : place + 12] = struct.pack("<I", 5_000_000)  # it lies behind the end
    (tmp_path / "tag.tif").write_bytes(tags)
    paths = [palette, tmp_path / "odd.jpg", many, tmp_path / "tag.tif"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in paths:
            assert isinstance(read_pixels(path, 60_000_000), np.ndarray)
    assert len({str(warning.message) for warning in caught}) >= 4
    assert finish(start(["-c", QUIET, *paths]), timeout=60) == (0, "", "")


def test_reading_does_not_let_other_warnings_repeat(tmp_path):
    path = save(tmp_path / "a.png", noise("RGB"))
    code = (
        "import sys, warnings\n"
        "from quadmamba.data import read_image\n"
        "for _ in range(4):\n"
        "    read_image(sys.argv[1], 10**6)\n"
        "    warnings.warn('once')\n"
    )
    code, out, err = finish(start(["-c", code, path]), timeout=60)
    assert (code, err.count("once")) == (0, 1), err


def test_read_images_can_be_written_to(tmp_path):
    for name in ("a.jpg", "a.png"):
        image = read_image(save(tmp_path / name, noise("RGB")), LIMIT)
        assert (image.dtype, image.shape, image.is_contiguous()) == (torch.uint8, (30, 40, 3), True)
        image.zero_()
