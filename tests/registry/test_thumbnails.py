"""`thumbnail.create`: what it draws, where it writes, and what it refuses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from job_registry import Cancel, Fail, JobContext
from job_registry.catalog.thumbnail import ThumbnailCreate, render


def context(assets: object, **options: Any) -> JobContext:
    return JobContext("id", "thumbnail.create", 1, 3, 300, assets=str(assets), **options)


def put(assets: Path, name: str, image: Image.Image, **options: Any) -> None:
    path = assets / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def thumbnails(assets: object, *sizes: int, asset: str = "a", version: int = 1) -> list[Any]:
    payload = ThumbnailCreate(asset_id=asset, version_number=version, sizes=list(sizes))
    return render(context(assets), payload).thumbnails


def test_each_size_is_the_longest_edge_of_a_webp(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", Image.new("RGB", (1000, 500), "red"))
    small, large = thumbnails(tmp_path, 128, 512)
    assert (small.path, small.width, small.height) == ("a/1/128.webp", 128, 64)
    assert (large.width, large.height) == (512, 256)
    with Image.open(tmp_path / small.path) as image:
        assert (image.format, image.size) == ("WEBP", (128, 64))
        pixel = image.convert("RGB").getpixel((60, 30))
        assert isinstance(pixel, tuple)
        red, green, blue = pixel
        assert red > 240
        assert green + blue < 30
    assert (tmp_path / small.path).stat().st_size == small.bytes
    assert sorted(path.name for path in (tmp_path / "a/1").iterdir()) == ["128.webp", "512.webp"]


def test_a_picture_is_never_enlarged(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", Image.new("RGB", (40, 20)))
    (only,) = thumbnails(tmp_path, 512)
    assert (only.width, only.height) == (40, 20)


def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 100), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path, "a/1.jpg", image, exif=exif)
    (only,) = thumbnails(tmp_path, 100)
    assert (only.width, only.height) == (50, 100)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_any_mode_of_png_is_rendered(tmp_path: Path, mode: str) -> None:
    put(tmp_path, "a/1.png", Image.new(mode, (30, 30)))
    (only,) = thumbnails(tmp_path, 16)
    with Image.open(tmp_path / only.path) as image:
        assert image.size == (16, 16)
        assert ("A" in image.getbands()) == (mode in ("LA", "RGBA"))


def test_sixteen_bits_and_cmyk_keep_their_light(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", Image.new("I;16", (30, 30), 32_768))
    put(tmp_path, "a/2.jpg", Image.new("CMYK", (30, 30), (0, 0, 0, 0)))
    grey, white = thumbnails(tmp_path, 8)[0], thumbnails(tmp_path, 8, version=2)[0]
    with Image.open(tmp_path / grey.path) as image:
        light = image.convert("L").getpixel((4, 4))
        assert isinstance(light, int)
        assert abs(light - 127) < 5
    with Image.open(tmp_path / white.path) as image:
        light = image.convert("L").getpixel((4, 4))
        assert isinstance(light, int)
        assert light > 245


def test_a_bucket_serves_as_well_as_a_folder() -> None:
    files = fsspec.filesystem("memory")
    encoded = io.BytesIO()
    Image.new("RGB", (64, 64)).save(encoded, "PNG")
    files.pipe_file("/bucket/a/1.png", encoded.getvalue())
    (only,) = thumbnails("memory://bucket", 32)
    assert only.path == "a/1/32.webp"
    assert len(files.cat_file("/bucket/a/1/32.webp")) == only.bytes


def test_what_cannot_get_better_fails_for_good_with_words_that_help(tmp_path: Path) -> None:
    put(tmp_path, "many/1.png", Image.new("RGB", (9, 9)))
    put(tmp_path, "many/1.jpg", Image.new("RGB", (9, 9)))
    put(tmp_path, "cut/1.png", Image.effect_noise((200, 200), 50))
    cut = tmp_path / "cut/1.png"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (tmp_path / "text").mkdir()
    (tmp_path / "text/1.png").write_text("no picture")
    for asset, words in (
        ("none", "There is no picture none/1"),
        ("many", "more than one picture many/1"),
        ("cut", "cut/1.png is broken"),
        ("text", "text/1.png is not a picture in a known format: expected JPEG, PNG, WebP or GIF"),
    ):
        with pytest.raises(Fail, match=words) as failed:
            thumbnails(tmp_path, 8, asset=asset)
        assert str(tmp_path) not in str(failed.value)


@pytest.mark.parametrize(
    "asset", ["..", "../x", "a/b", "/etc", "a\\b", ".hidden", "", "a\0", "~", "a:b", "%2e%2e"]
)
def test_no_asset_id_leaves_the_assets(asset: str) -> None:
    with pytest.raises(ValueError, match="asset_id"):
        ThumbnailCreate(asset_id=asset, version_number=1)


def test_a_link_does_not_lead_out_of_the_assets(tmp_path: Path) -> None:
    put(tmp_path, "secret/1.png", Image.new("RGB", (9, 9)))
    assets = tmp_path / "assets"
    (assets / "file").mkdir(parents=True)
    (assets / "file/1.png").symlink_to(tmp_path / "secret/1.png")
    (assets / "folder").symlink_to(tmp_path / "secret")
    put(assets, "target/1.png", Image.new("RGB", (9, 9)))
    (assets / "target/1").symlink_to(tmp_path / "secret")
    for asset in ("file", "folder", "target"):
        with pytest.raises(Fail, match="is a link to a place outside the assets"):
            thumbnails(assets, 8, asset=asset)
    assert sorted(path.name for path in (tmp_path / "secret").iterdir()) == ["1.png"]


def test_a_thumbnail_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/1.png", Image.new("RGB", (9, 9)))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    # An error of the storage may pass, so it is no Fail, and is tried again.
    with pytest.raises(OSError, match="No space"):
        thumbnails(tmp_path, 8)
    assert list((tmp_path / "a/1").iterdir()) == []


def test_a_cancelled_job_stops_between_two_sizes_and_reports_its_progress(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", Image.new("RGB", (9, 9)))
    told: list[Any] = []
    payload = ThumbnailCreate(asset_id="a", version_number=1, sizes=[4, 8])
    job = context(tmp_path, _report=told.append, _cancelled=lambda: bool(told))
    with pytest.raises(Cancel, match="cancelled"):
        render(job, payload)
    assert told == [{"rendered": 1, "of": 2}]
