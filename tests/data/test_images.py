"""Reading images: one picture, whatever the file's depth, format and metadata; one clear error for what cannot be read."""

from __future__ import annotations

import ast
import io
import random
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from oodprompt.data.dataset import Datum
from oodprompt.data.folders import images_below, is_leftover
from oodprompt.data.images import PixelRules, decode, image_size, image_suffixes, read_image
from oodprompt.data.loading import DataManager
from oodprompt.errors import UserError
from tests.helpers.runs import REPOSITORY
from tests.helpers.small_data import MakeCfg

Y, X = np.mgrid[:24, :32]
LEVELS = ((X * 8 + Y * 7) % 256).astype(np.uint8)  # holds 0 and 255


def save(path: Path, values: np.ndarray, **options: object) -> str:
    Image.fromarray(values).save(path, **options)
    return str(path)


def grey(path: str, *rules: PixelRules) -> np.ndarray:
    """One channel of what is read, having seen that all three are equal."""
    pixels = np.asarray(read_image(path, *rules))
    assert pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def raw_png(values: np.ndarray, bits: int, colour: int) -> bytes:
    """A png of ``values`` [h, w, channels] with ``bits`` of depth; Pillow writes 16 bits for grey alone."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def raw_tiff(path: Path, data: bytes, bits: int, sample_format: int) -> str:
    """Write a grey tiff of 32 x 24 pixels, whose numbers are unsigned (1) or signed (2)."""
    entries = [(256, 3, 1, 32), (257, 3, 1, 24), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    entries += [(277, 3, 1, 1), (278, 3, 1, 24), (279, 4, 1, len(data)), (339, 3, 1, sample_format)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + b"\0\0\0\0")
    return str(path)


@pytest.mark.parametrize(
    "kind", ["16.png", "16.tif", "big-endian.tif", "32.tif", "float.tif", "float255.tif", "16.pgm", "16.jp2"]
)
def test_a_grey_picture_is_the_same_in_every_depth(tmp_path: Path, kind: str) -> None:
    path, sixteen = tmp_path / kind, LEVELS.astype(np.uint16) * 257
    if kind == "big-endian.tif":
        Image.frombytes("I;16B", (32, 24), sixteen.astype(">u2").tobytes()).save(path)
    elif kind == "16.pgm":
        path.write_bytes(b"P5 32 24 65535\n" + sixteen.astype(">u2").tobytes())
    else:
        values = {
            "16.png": sixteen,
            "16.tif": sixteen,
            "32.tif": sixteen.astype(np.int32),
            "float.tif": LEVELS * np.float32(1 / 255),  # which is not quite a 255th
            "float255.tif": LEVELS.astype(np.float32),
            "16.jp2": sixteen,
        }[kind]
        save(path, values)
    assert (grey(str(path)) == LEVELS).all()


def test_a_drawing_cut_to_8_bits_is_that_of_16_bits_and_of_floats(tmp_path: Path) -> None:
    values = np.linspace(0.003, 0.997, 768).reshape(24, 32)
    eight = grey(save(tmp_path / "8.png", (values * 255).astype(np.uint8)))
    assert (grey(save(tmp_path / "16.png", (values * 65535).astype(np.uint16))) == eight).all()
    assert (grey(save(tmp_path / "f.tif", values.astype(np.float32))) == eight).all()


@pytest.mark.parametrize("kind", ["16.png", "32.tif", "float.tif"])
def test_grey_levels_in_a_deeper_file_are_grey_levels(tmp_path: Path, kind: str) -> None:
    """As Pillow itself reads them."""
    kinds = {"16.png": np.uint16, "32.tif": np.int32, "float.tif": np.float32}
    path = save(
        tmp_path / kind, (LEVELS + (0.99995 if kind == "float.tif" else 0) * (LEVELS < 255)).astype(kinds[kind])
    )
    assert (grey(path) == np.asarray(Image.open(path).convert("L"))).all()
    assert (grey(path) == LEVELS).all()


def test_a_12_bit_tiff_says_its_range(tmp_path: Path) -> None:
    twelve = (LEVELS.astype(np.uint16) * 16)[:, :32]
    pairs = twelve.reshape(-1, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    path = raw_tiff(tmp_path / "12.tif", packed, 12, 1)
    assert np.abs(grey(path).astype(int) - LEVELS).max() <= 1 and grey(path).max() >= 253


def test_signed_numbers_of_16_bits_have_no_range_of_their_own(tmp_path: Path) -> None:
    values = (LEVELS.astype("<i2") * 100).tobytes()
    path = raw_tiff(tmp_path / "x.tif", values, 16, 2)
    with pytest.raises(UserError, match=r"values from 0 to 25500, .*INPUT.IMAGE_RANGE \"\(LOW, HIGH\)\""):
        read_image(path)
    assert (grey(raw_tiff(tmp_path / "x.tif", values, 16, 1)) == LEVELS.astype(int) * 100 // 257).all()
    assert (grey(raw_tiff(tmp_path / "x.tif", LEVELS.astype("<i2").tobytes(), 16, 2)) == LEVELS).all()


def test_a_16_bit_pgm_of_12_bits_says_its_range(tmp_path: Path) -> None:
    path = tmp_path / "x.pgm"
    path.write_bytes(b"P5 32 24 4095\n" + (LEVELS.astype(np.uint16) // 2).astype(">u2").tobytes())
    assert np.abs(grey(str(path)).astype(int) - LEVELS / 32).max() < 2


def test_white_is_zero(tmp_path: Path) -> None:
    path = save(tmp_path / "x.tif", LEVELS.astype(np.uint16) * 257, tiffinfo={262: 0})
    assert (grey(path) == 255 - LEVELS).all()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("12.png", LEVELS.astype(np.uint16) * 16, r"from 0 to 4080, .* INPUT.IMAGE_RANGE \"\(0, 4095\)\""),
        ("10.png", LEVELS.astype(np.uint16) * 4, r"IMAGE_RANGE \"\(0, 1023\)\""),
        ("ct.tif", LEVELS.astype(np.int32) * 10 - 1000, r"values from -1000 to 1550, .*\"\(LOW, HIGH\)\""),
        ("int32.tif", LEVELS.astype(np.int32) * 2**20, "values from 0 to 2.67387e.08"),
        ("float.tif", LEVELS.astype(np.float32) * 16, "values from 0 to 4080"),
        ("signed.tif", LEVELS.astype(np.float32) / 128 - 1, "values from -1 to 0.99"),
    ],
)
def test_values_of_unknown_range_are_an_error_that_the_key_mends(
    tmp_path: Path, name: str, values: np.ndarray, words: str
) -> None:
    path = save(tmp_path / name, values)
    with pytest.raises(UserError, match=f"^the image {path} holds .*{words}"):
        read_image(path)
    low, high = float(values.min()), float(values.max())
    assert np.abs(grey(path, PixelRules(value_range=(low, high))).astype(int) - LEVELS).max() <= 1
    narrow = grey(path, PixelRules(value_range=(low, (low + high) / 2)))
    assert (narrow[LEVELS > 128] == 255).all() and narrow.min() == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rules", [PixelRules(), PixelRules(value_range=(0, 1))])
def test_numbers_that_are_none_are_an_error(tmp_path: Path, bad: float, rules: PixelRules) -> None:
    values = LEVELS.astype(np.float32) / 255
    values[3, 4] = bad
    with pytest.raises(UserError, match="holds NaN or infinity"):
        read_image(save(tmp_path / "x.tif", values), rules)


def test_a_range_leaves_8_bit_files_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", LEVELS)
    assert (grey(path, PixelRules(value_range=(0, 4095))) == LEVELS).all()


@pytest.mark.parametrize(("colour", "channels"), [(2, (0, 1, 2)), (6, (0, 1, 2, 3)), (4, (0, 3))])
def test_16_bit_colour_is_that_of_8_bits(tmp_path: Path, colour: int, channels: tuple[int, ...]) -> None:
    eight = np.stack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1], np.full_like(LEVELS, 255)], 2)[..., list(channels)]
    for bits, values in ((8, eight), (16, eight.astype(np.uint16) * 257)):
        (tmp_path / f"{bits}.png").write_bytes(raw_png(values, bits, colour))
    assert read_image(str(tmp_path / "8.png")).tobytes() == read_image(str(tmp_path / "16.png")).tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "P with transparency"])
def test_files_of_8_bits_are_what_pillow_makes_of_them(tmp_path: Path, mode: str) -> None:
    path, colours = tmp_path / "x.tif", Image.fromarray(np.stack([LEVELS, LEVELS.T.reshape(24, 32), 255 - LEVELS], 2))
    image = colours.convert(mode.split()[0])
    options = {}
    if "transparency" in mode:
        path, options = tmp_path / "x.png", {"transparency": bytes(range(256))}
    image.save(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_image(str(path)).tobytes()
        warnings.simplefilter("ignore")
        assert found == Image.open(path).convert("RGB").tobytes()


@pytest.mark.parametrize("name", ["x.gif", "x.tif", "x.webp"])
def test_of_several_frames_the_first_counts(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    frames[0].save(
        tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "webp" in name else {})
    )
    found = decode(str(tmp_path / name), count_frames=True)
    assert found.image.getpixel((3, 3)) == (200, 0, 0) and found.has_frames


def test_metadata_of_any_size_is_passed_over(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "node " * 300_000, zip=True)
    image = Image.fromarray(LEVELS)
    image.save(tmp_path / "comment.png", pnginfo=info)
    image.save(tmp_path / "profile.png", icc_profile=bytes(3_000_000))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    ends, text = buffer.getvalue(), b"iTXtk\0\1\0\0\0" + zlib.compress(bytes(3_000_000))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (tmp_path / "behind.png").write_bytes(ends[:-12] + chunk + ends[-12:])  # read when the pixels already are
    for name in ("comment", "profile", "behind"):
        assert (grey(str(tmp_path / f"{name}.png")) == LEVELS).all()


def test_the_limit_on_pixels(tmp_path: Path, make_cfg: MakeCfg) -> None:
    path = save(tmp_path / "x.png", LEVELS)
    with pytest.raises(UserError, match=f"^the image {path} has 32 x 24 pixels, more than INPUT.MAX_PIXELS 767; raise"):
        read_image(path, PixelRules(max_pixels=767))
    for limit in (768, 0):
        assert PixelRules.of(make_cfg(INPUT__MAX_PIXELS=limit)) == PixelRules(limit)
        assert read_image(path, PixelRules(max_pixels=limit)).size == (32, 24)


def test_pillows_own_limit_on_pixels_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (save(tmp_path / f"x{end}", LEVELS) for end in (".png", ".tif", ".webp", ".gif", ".jp2")):
        for limit in (500, 100):  # that with a warning, and that with an error
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert read_image(path).size == image_size(path) == (32, 24)
        with pytest.raises(Image.DecompressionBombError), Image.open(path) as image:
            image.load()  # others keep it


def test_suffixes_are_those_that_the_reader_opens(tmp_path: Path) -> None:
    colours = np.stack([LEVELS] * 3, 2)
    for suffix in (
        ".jpg",
        ".JPEG",
        ".jpe",
        ".jfif",
        ".png",
        ".gif",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".tga",
        ".jp2",
    ):
        assert suffix.lower() in image_suffixes()
        path = tmp_path / f"x{suffix}"
        Image.fromarray(colours).save(path, format="JPEG" if suffix in (".jfif", ".jpe") else None)
        assert read_image(str(path)).size == (32, 24)
    assert not {".txt", ".pdf", ".eps", ".mpg", ".h5", ".ico", ".csv", ""} & set(image_suffixes())
    assert len(images_below(tmp_path)) == 13


def test_files_that_start_programs_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n" + bytes(200)
    )
    with pytest.raises(
        UserError, match=f"^cannot read the image {path}: it is no image file of a known format; replace"
    ):
        read_image(str(path))


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "._1.jpg", "Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir", ".ipynb_checkpoints", "$RECYCLE.BIN"],
)
def test_leftovers(name: str) -> None:
    assert is_leftover(name) and not is_leftover(f"x{name}")


def test_damaged_files_are_one_clear_error_and_nothing_else(tmp_path: Path) -> None:
    """Bytes of small files of every format are changed, cut off, doubled."""
    draw, sources = random.Random(0), []
    image = Image.fromarray(np.stack([LEVELS] * 3, 2))
    for name in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "JPEG2000"):
        buffer = io.BytesIO()
        image.save(buffer, name)
        sources.append(buffer.getvalue())
    for values in (LEVELS.astype(np.uint16) * 257, LEVELS.astype(np.float32) / 255):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "TIFF")
        sources.append(buffer.getvalue())
    path, refused, slowest = tmp_path / "x", 0, 0.0
    for _ in range(400):
        data = bytearray(draw.choice(sources))
        for _ in range(draw.choice((1, 1, 4, 30))):
            data[draw.choice((draw.randrange(len(data)), draw.randrange(min(64, len(data)))))] = draw.randrange(256)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        path.write_bytes(data)
        began = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read_image(str(path), PixelRules(max_pixels=10**6)).mode == "RGB"
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and str(path) in str(error)
        slowest = max(slowest, time.monotonic() - began)
    assert refused > 50 and slowest < 10


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1000), (0, 1.5)])
def test_levels_that_were_mapped_to_a_range_come_back(tmp_path: Path, low: float, high: float) -> None:
    path = save(tmp_path / "x.tif", (LEVELS / 255 * (high - low) + low).astype(np.float32))
    assert (grey(path, PixelRules(value_range=(low, high))) == LEVELS).all()


def test_the_rules_of_a_run_reach_its_batches(make_cfg: MakeCfg, tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", np.resize(LEVELS, (48, 48)).astype(np.uint16) * 16)
    data = [Datum(path)]
    with pytest.raises(UserError, match="IMAGE_RANGE"):
        next(iter(DataManager(make_cfg()).loader(data)))
    pixels = [
        next(iter(DataManager(make_cfg(INPUT__IMAGE_RANGE=(0, high))).loader(data)))["img"].max()
        for high in (4080, 8160)
    ]
    assert pixels[0] > pixels[1]
    with pytest.raises(UserError, match="MAX_PIXELS 10;"):
        next(iter(DataManager(make_cfg(INPUT__IMAGE_RANGE=(0, 4080), INPUT__MAX_PIXELS=10)).loader(data)))


def test_whoever_reads_images_hands_on_the_rules() -> None:
    """Of every call in the package and in the scripts: a call without rules would not follow the run's keys."""
    readers = {"read_image", "decode", "look", "DatasetWrapper", "build_regions", "proposal_regions", "check_data"}
    calls = [
        (file.name, ast.unparse(node))
        for folder in ("oodprompt", "datasets", "trainers", "scripts", "speed")
        for file in (REPOSITORY / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in readers
    ]
    assert len(calls) >= 8
    assert [text for _, text in calls if "rules" not in text.split("(", 1)[1].replace("PixelRules()", "").lower()] == []
