"""What a file is that holds no weights, by the bytes that it begins with."""

from __future__ import annotations

# Where and how other files begin, and what they are
_OTHERS = (
    (0, b"version https://git-lfs", "a pointer of Git LFS; `git lfs pull` fetches the file itself"),
    (0, b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (0, b"BZh", "compressed by bzip2; unpack it first"),
    (0, b"\xfd7zXZ\0", "compressed by xz; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by Zstandard; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (0, b"Rar!", "a RAR archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"\x93NUMPY", "an array of NumPy (.npy)"),
    (0, b"\x89HDF\r\n", "an HDF5 file, as Keras writes it"),
    (0, b"GGUF", "a GGUF file"),
    (4, b"TFL3", "a model of TensorFlow Lite"),
    (0, b"\x89PNG", "an image"),
    (0, b"\xff\xd8\xff", "an image"),
    (0, b"%PDF", "a PDF"),
)


def describe(head: bytes) -> str:
    """What to say after "FILE is not a checkpoint" of a file whose first 512 bytes are `head`."""
    if not head:
        return ": it is empty (0 bytes); copy or download it again"
    for place, magic, what in _OTHERS:
        if head[place:].startswith(magic):
            return f": it is {what}"
    if not head.strip(b"\0"):
        return ": it begins with zero bytes, as a broken copy or download does"
    if len(head) > 32 and head[:1] == b"\x80" and head[1] <= 5:
        return ": it is a pickle, but not one of torch.save, and reading it would run its code"
    text = _text(head)
    if text.lower().startswith(("<!doctype", "<html", "<?xml", "<")):
        return (
            f": it is a web page ({text[:60]!r}), as a server sends for an error or a login; "
            "download the file again"
        )
    if '"weight_map"' in text or (text.startswith("{") and '"total_size"' in text):
        return ": it is the index of weights in several files; put them into one file first"
    if text:
        return f": it is text that begins with {text[:60]!r}"
    return (
        ", or it is cut off: expected a whole file written by torch.save or a .safetensors file, "
        f"got one that begins with {head[:8]!r}"
    )


def _text(head: bytes) -> str:
    """The first bytes of a file as text, "" where they are none."""
    try:
        text = head[:256].decode("utf-8-sig", errors="strict")
    except UnicodeDecodeError as error:
        if error.start < min(len(head), 256) - 3:  # not merely cut within a letter
            return ""
        text = head[: error.start].decode("utf-8-sig")
    text = text.strip()
    return text if text and all(c.isprintable() or c.isspace() for c in text) else ""
