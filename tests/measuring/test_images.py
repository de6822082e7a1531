"""A folder of images becomes one tensor, or one clear error."""

from __future__ import annotations

import io
import os
import random
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from dsm_tune.errors import ImagesError, ModelError
from dsm_tune.measuring import images as module
from dsm_tune.measuring.images import ImageSet, Skipped, load_folder, split
from dsm_tune.measuring.labels import read_labels

DATA = Path(__file__).resolve().parents[2] / "../shared/data"


class Embed(nn.Module):
    def __init__(self, img_size: int | tuple[int, int], channels: int = 3) -> None:
        super().__init__()
        self.img_size = img_size
        self.proj = nn.Conv2d(channels, 1, 1)


class Model(nn.Module):
    """What load_folder looks at in a model: the size, the channels and the number of classes."""

    def __init__(
        self, img_size: int | tuple[int, int] = 16, classes: int = 10, channels: int = 3
    ) -> None:
        super().__init__()
        self.num_classes = classes
        self.patch_embed = Embed(img_size, channels)


def photo(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    noise = random.Random(seed).randbytes(size[0] * size[1] * 3)
    return Image.frombytes("RGB", size, noise).convert(mode)


def save(path: Path, image: Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or photo(zlib.crc32(path.name.encode()))).save(path)
    return path


def fill(folder: Path, names: Sequence[str] = ("a.png", "b.png", "c.png", "d.png")) -> Path:
    for name in names:
        save(folder / name)
    return folder


def labelled(folder: Path, text: str | bytes, classes: int = 10) -> list[int]:
    """Return the labels that a labels.csv gives to a.png, b.png, c.png and d.png."""
    raw = text if isinstance(text, bytes) else text.encode()
    (fill(folder) / "labels.csv").write_bytes(raw)
    return load_folder(folder, Model(classes=classes))[0].labels.tolist()


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    begin = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + crc
    return begin + struct.pack(">I", 9) + b"IDAT"


def plain(count: int, names: Sequence[str] | None = None) -> ImageSet:
    pixels = torch.arange(float(count)).reshape(count, 1, 1, 1).expand(count, 3, 1, 1)
    return ImageSet(pixels, torch.arange(count), tuple(names or (f"{i:04}" for i in range(count))))


class TestImageSet:
    def test_take_keeps_pixels_labels_and_names_together(self) -> None:
        part = plain(5).take([3, 1])
        assert part.names == ("0003", "0001")
        assert part.labels.tolist() == part.pixels[:, 0, 0, 0].tolist() == [3, 1]
        assert len(part) == 2

    def test_take_accepts_a_mask_and_nothing(self) -> None:
        assert plain(3).take(torch.tensor([True, False, True])).names == ("0000", "0002")
        assert len(plain(3).take([])) == 0

    def test_take_refuses_an_index_out_of_range(self) -> None:
        with pytest.raises(IndexError):
            plain(3).take([3])

    def test_digest_is_the_same_today_and_tomorrow(self) -> None:
        assert plain(2).digest == plain(2).digest == "4293a76430c69342"

    def test_digest_sees_names_labels_and_pixels(self) -> None:
        base = plain(2)
        others = [
            ImageSet(base.pixels, base.labels, ("0000", "x")),
            ImageSet(base.pixels, base.labels - 1, base.names),
            ImageSet(base.pixels + 1, base.labels, base.names),
            ImageSet(base.pixels.reshape(2, 3, 1, 1).repeat(1, 1, 1, 2), base.labels, base.names),
        ]
        assert len({base.digest, *(other.digest for other in others)}) == 5

    def test_labelled_means_that_no_label_is_missing(self) -> None:
        base = plain(2)
        assert base.labelled
        assert not ImageSet(base.pixels, base.labels - 1, base.names).labelled

    @pytest.mark.parametrize(
        ("pixels", "labels"),
        [
            (torch.zeros(1, 3, 2, 2), torch.zeros(2, dtype=torch.int64)),
            (torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)),
            (torch.zeros(2, 3, 2, 2).half(), torch.zeros(2, dtype=torch.int64)),
            (torch.zeros(2, 3, 2, 2), torch.zeros(2)),
            (torch.zeros(2, 3, 2, 2), torch.zeros(1, dtype=torch.int64)),
        ],
    )
    def test_parts_that_do_not_fit_are_refused(
        self, pixels: torch.Tensor, labels: torch.Tensor
    ) -> None:
        with pytest.raises(ImagesError, match="for 2 names, but got"):
            ImageSet(pixels, labels, ("a", "b"))


class TestSplit:
    @given(st.integers(2, 60), st.data(), st.integers(0, 2**32))
    def test_parts_are_disjoint_and_make_up_the_whole(
        self, total: int, data: st.DataObject, seed: int
    ) -> None:
        images = plain(total)
        count = data.draw(st.integers(1, total - 1))
        search, held = split(images, count, seed)
        assert len(held) == count
        assert sorted(search.names + held.names) == sorted(images.names)
        for part in (search, held):
            assert list(part.names) == sorted(part.names)
            assert [int(name) for name in part.names] == part.labels.tolist()

    @given(st.permutations(range(12)), st.integers(0, 2**32))
    def test_order_of_the_images_does_not_matter(self, order: list[int], seed: int) -> None:
        images = plain(12)
        for one, other in zip(
            split(images, 5, seed), split(images.take(order), 5, seed), strict=True
        ):
            assert one.names == other.names
            assert torch.equal(one.pixels, other.pixels)

    @given(st.integers(2, 60), st.floats(0, 1, exclude_min=True, exclude_max=True))
    def test_a_share_is_rounded_and_leaves_neither_part_empty(
        self, total: int, share: float
    ) -> None:
        search, held = split(plain(total), share, 0)
        assert len(search) >= 1
        assert len(held) >= 1
        assert len(held) == round(share * total) or 1 in (len(search), len(held))

    def test_another_seed_gives_another_split(self) -> None:
        assert len({split(plain(40), 20, seed)[0].names for seed in range(5)}) == 5

    @pytest.mark.parametrize("holdout", [0, -1, 8, 9, 0.0, 1.0, -0.5, 1.5, float("nan"), True])
    def test_a_holdout_out_of_range_is_refused(self, holdout: float) -> None:
        with pytest.raises(ImagesError, match="from 1 to 7 or a share between 0 and 1 of 8 images"):
            split(plain(8), holdout, 0)


class TestFolder:
    def test_images_come_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        names = ("z.png", "B.JPG", "sub/a.jpeg", "sub/deep/c.WebP", "a.bmp")
        images, skipped = load_folder(fill(tmp_path, names), Model())
        assert images.names == ("B.JPG", "a.bmp", "sub/a.jpeg", "sub/deep/c.WebP", "z.png")
        assert skipped == []
        assert images.pixels.shape == (5, 3, 16, 16)
        assert images.pixels.dtype == torch.float32
        assert images.labels.tolist() == [-1] * 5

    def test_each_row_is_the_image_of_its_name(self, tmp_path: Path) -> None:
        names = [f"{i}.png" for i in range(20)]
        model = Model()
        images, _ = load_folder(fill(tmp_path, names), model)
        config = resolve_model_data_config(model, {"input_size": (3, 16, 16)})
        transform = create_transform(**config, is_training=False)
        for name, pixels in zip(images.names, images.pixels, strict=True):
            assert torch.equal(pixels, transform(Image.open(tmp_path / name).convert("RGB")))

    def test_a_second_reading_is_bit_equal(self, tmp_path: Path) -> None:
        fill(tmp_path, [f"{i}.jpg" for i in range(20)])
        one, other = (load_folder(str(tmp_path), Model())[0] for _ in range(2))
        assert one.digest == other.digest

    def test_other_files_and_hidden_ones_are_passed_over(self, tmp_path: Path) -> None:
        fill(tmp_path, ["a.png", "b.png", "c.png", "d.png", ".e.png", ".cache/f.png"])
        (tmp_path / "readme.txt").write_text("no image")
        images, skipped = load_folder(tmp_path, Model())
        assert images.names == ("a.png", "b.png", "c.png", "d.png")
        assert skipped == []

    def test_links_are_followed_and_loops_end(self, tmp_path: Path) -> None:
        elsewhere = fill(tmp_path / "elsewhere")
        folder = fill(tmp_path / "folder", ["x.png"])
        (folder / "link").symlink_to(elsewhere)
        (elsewhere / "back").symlink_to(folder)
        (folder / "self").symlink_to(folder)
        (folder / "y.png").symlink_to("y.png")
        images, skipped = load_folder(folder, Model())
        assert images.names == (*(f"link/{name}.png" for name in "abcd"), "x.png")
        assert skipped == [Skipped("y.png", "not a file, or a broken link")]

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_a_pipe_and_a_folder_with_the_name_of_an_image_do_not_hang(
        self, tmp_path: Path
    ) -> None:
        os.mkfifo(fill(tmp_path) / "pipe.png")
        (tmp_path / "folder.png").mkdir()
        images, skipped = load_folder(tmp_path, Model())
        assert len(images) == 4
        assert [item.name for item in skipped] == ["pipe.png"]

    def test_a_name_that_is_no_text_is_read_and_hashed(self, tmp_path: Path) -> None:
        fill(tmp_path)
        os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/\xff\n.png")
        images, _ = load_folder(tmp_path, Model())
        assert len(images.digest) == 16
        assert "\udcff\n.png" in images.names

    @pytest.mark.parametrize("given", ["", "absent", "a\0b", "x" * 5000])
    def test_a_folder_that_does_not_exist_is_refused(self, tmp_path: Path, given: str) -> None:
        folder = str(tmp_path / given) if given else given
        with pytest.raises(ImagesError, match=r"must be a folder, but .* does not exist") as caught:
            load_folder(folder, Model())
        assert "\n" not in str(caught.value)
        assert "\0" not in str(caught.value)

    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ImagesError, match=r"must be a folder, but .*a.png' is a file"):
            load_folder(fill(tmp_path) / "a.png", Model())

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ImagesError, match=r"has none: it is empty; accepted are .jpg, "):
            load_folder(tmp_path, Model())

    def test_a_folder_without_images_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.gif").touch()
        with pytest.raises(ImagesError, match=r"none of its 1 files is one; accepted are .jpg, "):
            load_folder(tmp_path, Model())

    def test_too_few_images_are_refused(self, tmp_path: Path) -> None:
        fill(tmp_path, ["a.png", "b.png", "c.png"])
        (tmp_path / "d.png").touch()
        rule = r"at least 4 readable images, but .* holds 4, of which 1 were skipped "
        with pytest.raises(ImagesError, match=rule + r"\(d.png: empty file\)"):
            load_folder(tmp_path, Model())

    def test_a_sub_folder_that_cannot_be_listed_is_reported(self, tmp_path: Path) -> None:
        shut = fill(tmp_path, ["a.png", "b.png", "c.png", "d.png", "shut/e.png"]) / "shut"
        shut.chmod(0)
        try:
            if os.access(shut, os.R_OK):
                pytest.skip("this user may list any folder")
            assert load_folder(tmp_path, Model())[1] == [Skipped("shut", "Permission denied")]
        finally:
            shut.chmod(0o700)


class TestLimit:
    def test_limit_draws_a_subset_by_seed(self, tmp_path: Path) -> None:
        fill(tmp_path, [f"{i:02}.png" for i in range(30)])
        draws = [load_folder(tmp_path, Model(), limit=8, seed=seed)[0] for seed in (0, 0, 1)]
        assert draws[0].digest == draws[1].digest != draws[2].digest
        assert [len(draw) for draw in draws] == [8, 8, 8]
        assert list(draws[0].names) == sorted(draws[0].names)

    def test_nothing_but_the_subset_is_decoded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoded: list[str] = []
        decode: Callable[..., object] = module._decode

        def spy(root: Path, transform: object, name: str) -> object:
            decoded.append(name)
            return decode(root, transform, name)

        monkeypatch.setattr(module, "_decode", spy)
        fill(tmp_path, [f"{i:02}.png" for i in range(30)])
        images, _ = load_folder(tmp_path, Model(), limit=5)
        assert sorted(decoded) == list(images.names)

    def test_an_unreadable_image_is_replaced(self, tmp_path: Path) -> None:
        names = [f"{i:02}.png" for i in range(30)]
        fill(tmp_path, names)
        for name in names[::2]:
            (tmp_path / name).write_bytes(b"")
        images, skipped = load_folder(tmp_path, Model(), limit=10)
        assert len(images) == 10
        assert list(images.names) == sorted(images.names)
        assert [item.name for item in skipped] == sorted(item.name for item in skipped)
        everything, _ = load_folder(tmp_path, Model())
        rows = [everything.names.index(name) for name in images.names]
        assert torch.equal(images.pixels, everything.pixels[rows])

    def test_a_limit_above_the_number_of_images_takes_all(self, tmp_path: Path) -> None:
        folder = fill(tmp_path)
        limited, _ = load_folder(folder, Model(), limit=100)
        assert limited.digest == load_folder(folder, Model())[0].digest

    def test_a_limit_below_four_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ImagesError, match="limit must be at least 4, but got 3"):
            load_folder(fill(tmp_path), Model(), limit=3)

    def test_more_than_fits_in_memory_asks_for_a_limit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: int) -> torch.Tensor:
            raise RuntimeError("can't allocate memory")

        model = Model((1024, 2048))
        monkeypatch.setattr(torch, "empty", full)
        with pytest.raises(ImagesError, match="4 of 1024 x 2048 pixels take 0 GiB; a lower limit"):
            load_folder(fill(tmp_path), model)


def damaged() -> Iterator[tuple[str, bytes]]:
    for suffix in ("jpg", "png", "webp", "bmp"):
        buffer = io.BytesIO()
        photo(size=(64, 64)).save(buffer, Image.registered_extensions()[f".{suffix}"])
        whole = buffer.getvalue()
        for cut in (10, 60, len(whole) // 2, len(whole) * 9 // 10):
            yield f"cut{cut}.{suffix}", whole[:cut]
    yield "text.jpg", b"no image, but a letter\n" * 9
    yield "empty.jpg", b""
    yield "script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    yield "bomb.png", png_header(65000, 65000)
    yield "large.png", png_header(11000, 11000)
    yield "strip.png", png_header(1, 60000)
    yield "nothing.png", png_header(0, 5)


class TestUnreadable:
    @pytest.mark.parametrize(("name", "raw"), [pytest.param(*d, id=d[0]) for d in damaged()])
    def test_a_damaged_image_is_skipped_in_silence(
        self, tmp_path: Path, name: str, raw: bytes, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (fill(tmp_path) / name).write_bytes(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            images, skipped = load_folder(tmp_path, Model())
        assert len(images) == 4
        assert [item.name for item in skipped] == [name]
        assert skipped[0].reason.isprintable()
        assert str(tmp_path) not in skipped[0].reason
        assert capfd.readouterr() == ("", "")

    def test_reasons_say_what_is_wrong_and_accepted(self, tmp_path: Path) -> None:
        fill(tmp_path)
        for name, raw in damaged():
            (tmp_path / name).write_bytes(raw)
        reasons = {item.name: item.reason for item in load_folder(tmp_path, Model())[1]}
        assert reasons["empty.jpg"] == "empty file"
        assert reasons["text.jpg"] == "not an image of the formats JPEG, PNG, WEBP, BMP"
        assert reasons["bomb.png"] == "too many pixels; at most 89478485 are accepted"
        assert reasons["large.png"] == "11000 x 11000 pixels; at most 89478485 are accepted"
        assert reasons["strip.png"] == "1 x 60000 pixels; sides up to 32:1 are accepted"

    def test_a_truncated_image_is_skipped_even_where_pillow_was_told_otherwise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        whole = save(fill(tmp_path) / "e.jpg").read_bytes()
        (tmp_path / "e.jpg").write_bytes(whole[: len(whole) // 2])
        assert [item.name for item in load_folder(tmp_path, Model())[1]] == ["e.jpg"]
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(st.integers(0, 3), st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
    def test_no_bytes_give_anything_but_an_image_or_a_reason(
        self, tmp_path: Path, which: int, place: int, noise: bytes
    ) -> None:
        suffix = ("jpg", "png", "webp", "bmp")[which]
        for old in tmp_path.glob("*"):
            old.unlink()
        raw = save(fill(tmp_path) / f"e.{suffix}").read_bytes()
        place %= len(raw)
        (tmp_path / f"e.{suffix}").write_bytes(raw[:place] + noise + raw[place + len(noise) :])
        images, skipped = load_folder(tmp_path, Model())
        assert len(images) + len(skipped) == 5


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [
            ("1", "png"),
            ("L", "png"),
            ("L", "jpg"),
            ("LA", "png"),
            ("P", "png"),
            ("P", "bmp"),
            ("RGBA", "png"),
            ("RGBA", "webp"),
            ("CMYK", "jpg"),
            ("I;16", "png"),
        ],
    )
    def test_every_mode_becomes_three_finite_channels(
        self, tmp_path: Path, mode: str, suffix: str
    ) -> None:
        image = Image.new("I;16", (24, 20), 300) if mode == "I;16" else photo(mode=mode)
        save(fill(tmp_path) / f"e.{suffix}", image)
        images, skipped = load_folder(tmp_path, Model())
        assert skipped == []
        assert images.pixels.shape == (5, 3, 16, 16)
        assert images.pixels.isfinite().all()

    def test_a_palette_with_transparency_gives_no_warning(self, tmp_path: Path) -> None:
        path = fill(tmp_path) / "e.png"
        photo(mode="P").save(path, transparency=bytes(range(256)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(load_folder(tmp_path, Model())[0]) == 5

    @pytest.mark.parametrize("level", [0, 20_000, 65_535])
    def test_sixteen_bits_are_scaled_to_eight(self, tmp_path: Path, level: int) -> None:
        save(fill(tmp_path) / "y.png", Image.new("I;16", (24, 20), level))
        save(tmp_path / "z.png", Image.new("L", (24, 20), level // 257))
        pixels = load_folder(tmp_path, Model())[0].pixels
        assert torch.equal(pixels[4], pixels[5])

    def test_orientation_and_transparency_are_disregarded_as_in_timm(self, tmp_path: Path) -> None:
        image = photo()
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(fill(tmp_path) / "x.png", exif=exif)
        image.putalpha(0)
        save(tmp_path / "y.png", image)
        save(tmp_path / "z.png", photo())
        pixels = load_folder(tmp_path, Model())[0].pixels
        assert torch.equal(pixels[4], pixels[6])
        assert torch.equal(pixels[5], pixels[6])


class TestModel:
    @pytest.mark.parametrize(
        ("size", "shape"), [(32, (32, 32)), ((48, 48), (48, 48)), ((16, 64), (16, 64))]
    )
    def test_the_size_is_that_of_the_patch_embedding(
        self, tmp_path: Path, size: int | tuple[int, int], shape: tuple[int, int]
    ) -> None:
        images, _ = load_folder(fill(tmp_path), Model(size))
        assert images.pixels.shape[2:] == shape

    @pytest.mark.parametrize("size", [384, (128, 256)])
    def test_a_timm_model_of_another_size_can_run_on_the_images(
        self, tmp_path: Path, size: int | tuple[int, int]
    ) -> None:
        model = timm.create_model("vit_tiny_patch16_224", img_size=size, depth=1).eval()
        images, _ = load_folder(fill(tmp_path), model)
        with torch.inference_mode():
            assert model(images.pixels).shape == (4, 1000)
        assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
        assert images.pixels.abs().max() <= 1

    def test_a_model_that_says_nothing_gets_the_defaults_of_timm(self, tmp_path: Path) -> None:
        images, _ = load_folder(fill(tmp_path), nn.Sequential())
        assert images.pixels.shape == (4, 3, 224, 224)

    def test_the_configuration_of_the_model_is_followed(self, tmp_path: Path) -> None:
        model = nn.Sequential()
        model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0, 0, 0), "std": (2, 2, 2)}  # type: ignore[assignment]
        images, _ = load_folder(fill(tmp_path), model)
        assert images.pixels.shape == (4, 3, 8, 8)
        assert images.pixels.min() >= 0
        assert images.pixels.max() <= 0.5

    def test_a_model_without_three_channels_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="of 3 channels, but this one takes 1"):
            load_folder(fill(tmp_path), Model(channels=1))


class TestLabelsFile:
    def test_rows_are_found_by_column_and_path(self, tmp_path: Path) -> None:
        fill(tmp_path, ["sub/e.png", "sub/f.png"])
        text = "author,label,file\nx,3,b.png\n\n,,\ny, 9 ,./a.png\nz,7,sub\\e.png\nz,1,absent.png\n"
        assert labelled(tmp_path, text) == [9, 3, -1, -1, 7, -1]

    @pytest.mark.parametrize("text", ["file,label\n", "file,label\r\n\r\n"])
    def test_a_header_alone_leaves_all_unlabelled(self, tmp_path: Path, text: str) -> None:
        fill(tmp_path, ["5/e.png"])
        assert labelled(tmp_path, text) == [-1] * 5

    def test_spreadsheet_habits_are_accepted(self, tmp_path: Path) -> None:
        text = '\ufefffile,label\r\n"a.png","1"\r\nb.png,2\r\nc.png,03'
        assert labelled(tmp_path, text) == [1, 2, 3, -1]

    def test_accents_match_however_they_are_composed(self, tmp_path: Path) -> None:
        fill(tmp_path, ["e\u0301.png"])
        assert labelled(tmp_path, "file,label\n\u00e9.png,4\n")[-1] == 4

    @pytest.mark.parametrize("value", ["10", "-1", "999999999", "-7"])
    def test_a_label_out_of_range_is_refused(self, tmp_path: Path, value: str) -> None:
        rule = f"integer from 0 to 9, but got '{value}' in .*labels.csv, line 3"
        with pytest.raises(ImagesError, match=rule):
            labelled(tmp_path, f"file,label\na.png,0\nb.png,{value}\n")

    @pytest.mark.parametrize("value", ["", "1.0", "cat", "1_0", "٣", "+1", "9" * 5000, "0x1"])
    def test_a_label_that_is_no_integer_is_refused(self, tmp_path: Path, value: str) -> None:
        with pytest.raises(ImagesError, match=r"must be an integer from 0 to 9, but got .*line 2"):
            labelled(tmp_path, f"file,label\na.png,{value}\n")

    def test_any_index_is_accepted_for_a_model_without_a_head(self, tmp_path: Path) -> None:
        assert labelled(tmp_path, "file,label\na.png,21840\n", classes=0)[0] == 21840

    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("", "has the columns file and label once, but got ''"),
            ("name,label\na.png,1\n", "has the columns file and label once, but got 'name,label'"),
            ("file;label\na.png;1\n", "has the columns file and label once"),
            ("file,label,file\na.png,1,b.png\n", "has the columns file and label once"),
            ("file,label\na.png\n", "must have a file and a label, but line 2 is 'a.png'"),
            ("file,label\n,1\n", "must have a file and a label, but line 2 is ',1'"),
            ("file,label\na.png,1\n./a.png,1\n", "line 3 labels ./a.png again after line 2"),
            ('file,label\n"a.png,1\n', "must be comma-separated text, but line 2 is not"),
            (b"file,label\na.png,1\nb\0.png,1\n", "but got the byte 0x00 in line 3"),
            (b"file,label\n\xff.png,1\n", "must be UTF-8 text, but got the byte 0xff in line 2"),
            ("file,label\n/data/a.png,1\n", "names none of them; its first row is for /data/a.png"),
        ],
    )
    def test_a_malformed_file_is_refused(
        self, tmp_path: Path, text: str | bytes, rule: str
    ) -> None:
        with pytest.raises(ImagesError, match=rule):
            labelled(tmp_path, text)

    def test_a_folder_of_that_name_is_refused(self, tmp_path: Path) -> None:
        (fill(tmp_path) / "labels.csv").mkdir()
        with pytest.raises(ImagesError, match=r"labels.csv must be a file, but it is a folder"):
            load_folder(tmp_path, Model())

    @settings(deadline=None)
    @given(
        st.binary(max_size=60)
        | st.text(alphabet='file,label\n\r"0123456789-abcd.png\0\ufeff', max_size=60).map(
            str.encode
        )
        | st.text(alphabet='abcd.png,0123-"\n\r /\\', max_size=60).map(
            lambda rows: b"file,label\n" + rows.encode()
        )
    )
    def test_no_bytes_give_anything_but_labels_or_one_line(self, raw: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "labels.csv").write_bytes(raw)
            try:
                labels = read_labels(Path(folder), ["a.png", "b.png"], 10)
            except ImagesError as error:
                message = str(error)
            else:
                message = "labels.csv"
                assert [label for label in labels if -1 <= label < 10] == [*labels]
                assert len(labels) == 2
            assert message.isprintable()
            assert "labels.csv" in message


class TestLabelFolders:
    def labels(
        self, folder: Path, parts: Sequence[str], classes: int = 10, names: Sequence[str] = ()
    ) -> list[int]:
        fill(folder, [f"{part}/{i}.png" for i, part in enumerate(parts)])
        images, _ = load_folder(folder, Model(classes=classes), class_names=names)
        order = sorted(range(len(parts)), key=lambda i: f"{parts[i]}/{i}.png")
        found = dict(zip(order, images.labels.tolist(), strict=True))
        return [found[i] for i in range(len(parts))]

    def test_class_indices(self, tmp_path: Path) -> None:
        assert self.labels(tmp_path, ["0", "9", "007", "other"]) == [0, 9, 7, -1]

    def test_wordnet_ids(self, tmp_path: Path) -> None:
        parts = ["n01440764", "val/n15075141", "n01443537/images", "n99999999"]
        assert self.labels(tmp_path, parts, 1000) == [0, 999, 1, -1]

    def test_class_names(self, tmp_path: Path) -> None:
        parts = ["cat", "Golden_Retriever", "0", "dog"]
        names = ["dog", "cat", "golden retriever"]
        assert self.labels(tmp_path, parts, 3, names) == [1, 2, -1, 0]

    def test_class_names_that_are_numbers_come_before_indices(self, tmp_path: Path) -> None:
        assert self.labels(tmp_path, ["1", "2", "3", "1"], 3, ["1", "2", "3"]) == [0, 1, 2, 0]

    def test_the_innermost_class_counts(self, tmp_path: Path) -> None:
        assert self.labels(tmp_path, ["cat/dog", "dog/cat", "cat", "dog"], 2, ["cat", "dog"]) == [
            1,
            0,
            0,
            1,
        ]

    def test_other_sub_folders_leave_all_unlabelled(self, tmp_path: Path) -> None:
        assert self.labels(tmp_path, ["train", "val", "n01440764", "2023x"]) == [-1] * 4

    def test_numbers_out_of_range_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ImagesError, match=r"class indices from 0 to 9, but .* has 10; a "):
            self.labels(tmp_path, ["1", "2", "9", "10"])

    def test_a_year_among_other_names_is_no_class(self, tmp_path: Path) -> None:
        assert self.labels(tmp_path, ["2023", "2024", "new", "old"]) == [-1] * 4

    def test_a_name_that_two_classes_share_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ImagesError, match="but crane is the name of 2 classes"):
            self.labels(tmp_path, ["crane", "cat", "cat", "cat"], 3, ["crane", "cat", "Crane"])

    def test_more_class_names_than_classes_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ImagesError, match=r"from 0 to 1, but the sub-folder dog .* class 2"):
            self.labels(tmp_path, ["dog", "dog", "cat", "cat"], 2, ["cow", "cat", "dog"])


@pytest.mark.slow
def test_deit_tiny_is_as_good_on_the_photographs_as_published() -> None:
    if not DATA.is_dir():
        pytest.skip(f"the photographs and the checkpoint are not beside the repository: {DATA}")
    from safetensors.torch import load_file

    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(DATA / "deit_tiny_patch16_224.safetensors"))
    images, skipped = load_folder(DATA / "photos", model)
    assert (len(images), skipped, images.labelled) == (500, [], True)
    with torch.inference_mode():
        best = torch.cat([model(part).topk(5).indices for part in images.pixels.chunk(10)])
    hits = best == images.labels[:, None]
    assert round(100 * hits[:, 0].float().mean().item(), 1) == 87.6
    assert round(100 * hits.any(1).float().mean().item(), 1) == 98.2
