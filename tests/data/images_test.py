import io
import os
import struct
import zlib

import numpy as np
import pytest
from models import make_golden
from PIL import Image

from ares_jax.data import images

LIMITS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 40}


def encode(image, **options):
  buffer = io.BytesIO()
  image.save(buffer, **({"format": "PNG"} | options))
  return buffer.getvalue()


def noise(height, width, seed=0):
  return Image.fromarray(make_golden.picture(height, width, seed))


def test_sides_become_multiples_of_28_within_the_pixel_limits():
  def size(height, width):
    return images.resize_size(height, width, min_pixels=3136, max_pixels=12544)

  assert size(56, 56) == (56, 56)
  assert size(70, 98) == (56, 112)  # 2.5 and 3.5: halves to even
  assert size(10, 10) == (56, 56)  # too small: up
  assert size(224, 224) == (112, 112)  # too big: down
  assert size(300, 100) == (168, 56)  # 28 * 4 = 112 by rounding is 32928 px; sqrt(30000 / 12544)


@pytest.mark.parametrize("height, width, message", [
  (1, 201, "201 x 1 px has aspect ratio 201, the limit is 200"), (0, 5, "5 x 0 px is empty")])
def test_extreme_shapes_are_errors(height, width, message):
  with pytest.raises(ValueError, match=message):
    images.resize_size(height, width, **LIMITS)


def test_patches_come_in_blocks_of_four_with_both_frames_of_each_channel():
  image = np.arange(28 * 56 * 3, dtype=np.uint32).reshape(28, 56, 3).astype(np.uint8)
  patches, grid = images.patchify(image)
  assert grid == (1, 2, 4) and patches.shape == (8, 1176)
  # Patch 2 is the lower left one of the first unit, 5 the upper right one of the second.
  for index, row, column in ((2, 14, 0), (5, 0, 42)):
    part = patches[index].reshape(3, 2, 14, 14)
    want = image[row:row + 14, column:column + 14].transpose(2, 0, 1)
    np.testing.assert_array_equal(part[:, 0], want)
    np.testing.assert_array_equal(part[:, 1], want)
  with pytest.raises(ValueError, match="multiples of 28; pass it through load_image"):
    images.patchify(image[:27])


def sources():
  rgb = noise(61, 90)
  alpha = rgb.copy()
  alpha.putalpha(Image.fromarray(make_golden.picture(61, 90, 5)[..., 0]))
  palette = rgb.quantize(16)
  see_through = encode(palette, transparency=3)
  grey = rgb.convert("L")
  turned = Image.Exif()
  turned[0x0112] = 6
  return {
    "rgb": encode(rgb), "alpha": encode(alpha), "palette": encode(palette),
    "palette with a transparent colour": see_through, "grey": encode(grey),
    "grey with alpha": encode(alpha.convert("LA")), "1 bit": encode(grey.convert("1")),
    "cmyk": encode(rgb.convert("CMYK"), format="JPEG"),
    "jpeg": encode(rgb, format="JPEG"), "rotated by exif": encode(rgb, format="JPEG", exif=turned),
    "webp": encode(alpha, format="WEBP", lossless=True), "gif": encode(palette, format="GIF"),
    "one pixel wide": encode(noise(90, 1)), "wide": encode(noise(3, 400)),
    "large": encode(noise(400, 333)), "tiny": encode(noise(1, 1)),
  }


SOURCES = sources()


@pytest.mark.parametrize("family, patch", [("qwen2_5_vl", 14), ("qwen3_vl", 16)])
@pytest.mark.parametrize("kind", SOURCES)
def test_pixels_grid_and_order_are_bit_identical_with_transformers(kind, family, patch):
  from transformers import Qwen2VLImageProcessorPil

  from ares_jax.models.families import FAMILIES

  tower = FAMILIES[family].tower
  processor = Qwen2VLImageProcessorPil(
    size={"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]},
    patch_size=patch, image_mean=tower.mean, image_std=tower.std)
  want = processor(images=[Image.open(io.BytesIO(SOURCES[kind]))], return_tensors="np")
  patches, grid = images.patchify(
    images.load_image(SOURCES[kind], **LIMITS, factor=2 * patch, turn=False), patch=patch)
  assert grid == tuple(want["image_grid_thw"][0])
  level = (np.arange(256) * (1 / 255)).astype(np.float32)
  table = (level[:, None] - np.float32(tower.mean)) / np.float32(tower.std)
  got = table[patches, np.repeat(np.arange(3), 2 * patch**2)]
  np.testing.assert_array_equal(got.view(np.int32), want["pixel_values"].view(np.int32))


def test_transparent_pixels_become_white():
  clear_red = Image.new("RGBA", (56, 56), (255, 0, 0, 0))
  np.testing.assert_array_equal(images.load_image(clear_red, **LIMITS), 255)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_to_8(form):
  grey = make_golden.picture(61, 90, 2)[..., 0]
  deep = Image.fromarray(grey.astype(np.uint16) * 256 + 200)
  np.testing.assert_array_equal(images.load_image(encode(deep, format=form), **LIMITS),
                                images.load_image(Image.fromarray(grey), **LIMITS))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_grey_levels_without_a_range_are_refused(dtype):
  levels = Image.fromarray(np.linspace(0, 1, 3600).reshape(60, 60).astype(dtype))
  with pytest.raises(ValueError, match="its grey levels, '[IF]', have no range"):
    images.load_image(encode(levels, format="TIFF"), **LIMITS)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_orientation_says(form, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  plain = np.zeros((56, 84, 3), np.uint8)
  plain[:28, :28] = 255  # the upper left corner
  found = images.load_image(encode(Image.fromarray(plain), format=form, exif=exif), **LIMITS) > 127
  turns = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
           5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
           7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}
  want = turns[orientation](plain) > 127
  assert found.shape == want.shape and (found != want).mean() < 0.02
  if form != "TIFF":  # Pillow turns TIFF while it decodes
    data = encode(Image.fromarray(plain), format=form, exif=exif)
    assert images.load_image(data, **LIMITS, turn=False).shape == (56, 84, 3)


def test_exif_that_cannot_be_read_turns_nothing():
  data = encode(noise(56, 56), format="JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\xff" + b"x" * 40)
  assert images.load_image(data, **LIMITS).shape == (56, 56, 3)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_an_animation_is_refused(form):
  frames = [noise(56, 56, seed) for seed in range(3)]
  data = encode(frames[0], format=form, save_all=True, append_images=frames[1:])
  with pytest.raises(ValueError, match="it has 3 frames, of which one would be shown"):
    images.load_image(data, **LIMITS)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_a_regular_file_is_opened(tmp_path, make):
  make(tmp_path / "a.png")
  with pytest.raises(ValueError, match="a.png: cannot use this image: no regular file"):
    images.load_image(tmp_path / "a.png", **LIMITS)


def test_an_array_is_read_as_an_image():
  pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
  np.testing.assert_array_equal(images.load_image(pixels, **LIMITS), pixels)
  with pytest.raises(ValueError, match="^image: cannot use this image"):
    images.load_image(pixels[..., :1], **LIMITS)


def bomb(width, height):
  """A PNG of a few kB whose header promises width x height px."""
  def chunk(kind, data):
    return (struct.pack(">I", len(data)) + kind + data
            + struct.pack(">I", zlib.crc32(kind + data)))
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
          + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("content, reason", [
  (bomb(9000, 9000), "9000 x 9000 px exceed the limit of 67 MP"),
  (bomb(10_000, 10_000), "10000 x 10000 px exceed the limit of 67 MP"),
  (bomb(60_000, 60_000), "decompression bomb"),
  (bomb(50_000, 10), "aspect ratio 5000, the limit is 200"),
  (SOURCES["jpeg"][: len(SOURCES["jpeg"]) // 2], "truncated"),
  (SOURCES["rgb"][: len(SOURCES["rgb"]) // 2], "truncated|broken"),
  (SOURCES["rgb"][:20], ""),
  (b"", "not one of PNG, JPEG"),
  (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not one of PNG, JPEG"),
  (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of PNG, JPEG"),
])
def test_bad_content_is_one_error_with_its_reason(content, reason):
  with pytest.raises(ValueError, match=f"^image: cannot use this image: .*({reason})"):
    images.load_image(content, **LIMITS)


def test_a_file_is_named_by_its_path(tmp_path):
  with pytest.raises(ValueError, match="missing.png: cannot use this image: .*No such file"):
    images.load_image(tmp_path / "missing.png", **LIMITS)
  (tmp_path / "fine.png").write_bytes(SOURCES["rgb"])
  assert images.load_image(str(tmp_path / "fine.png"), **LIMITS).shape == (56, 84, 3)


def test_flipped_bits_give_an_image_or_a_valueerror():
  rng = np.random.default_rng(0)
  for kind in ("rgb", "jpeg", "webp", "gif", "palette"):
    for _ in range(20):
      damaged = bytearray(SOURCES[kind])
      damaged[rng.integers(8, len(damaged))] ^= 1 << rng.integers(8)
      try:
        images.load_image(bytes(damaged), **LIMITS)
      except ValueError as error:
        assert str(error).startswith("image: cannot use this image")


def test_window_layout_of_a_small_image():
  # 2 x 3 units in windows of 2 x 2: one full window, one of a single column.
  layout = images.window_layout([(1, 4, 6)], window=56, patch=14, merge=2)
  assert layout.windows == 2
  np.testing.assert_array_equal(layout.slot[::4] // 4, [0, 1, 4, 2, 3, 5])
  np.testing.assert_array_equal(layout.hw[:4], [[0, 0], [0, 1], [1, 0], [1, 1]])
  np.testing.assert_array_equal(layout.hw[4:6], [[0, 2], [0, 3]])


def test_every_frame_has_its_own_windows_and_segment():
  layout = images.window_layout([(2, 2, 2), (1, 2, 2)], window=56, patch=14, merge=2)
  assert layout.windows == 3
  np.testing.assert_array_equal(layout.image, np.repeat([1, 2, 3], 4))
  np.testing.assert_array_equal(layout.slot, [0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35])


def test_no_slot_is_used_twice_and_counts_agree():
  rng = np.random.default_rng(0)
  for _ in range(30):
    grids = [(int(rng.integers(1, 3)), *(2 * rng.integers(1, 12, 2)).tolist()) for _ in range(3)]
    layout = images.window_layout(grids, window=112, patch=14, merge=2)
    assert len(set(layout.slot.tolist())) == len(layout.slot) == sum(map(np.prod, grids))
    assert layout.slot.max() < 64 * layout.windows
    assert images.count_windows(grids, window=112, patch=14, merge=2) == layout.windows


def test_pack_rows_pads_and_maps_units_to_image_tokens():
  small, wide = (images.patchify(np.asarray(noise(*size))) for size in ((28, 28), (56, 84)))
  vision, units = images.pack_rows([[small, wide], [], [wide]], windows=4, window=56)
  assert vision["patches"].shape == (3, 4, 16, 1176) and vision["patches"].dtype == np.uint8
  np.testing.assert_array_equal(units[0][0], [0])
  np.testing.assert_array_equal(units[0][1], [4, 5, 8, 6, 7, 9])
  assert units[1] == []
  np.testing.assert_array_equal(vision["image"][1], 0)
  np.testing.assert_array_equal((vision["image"][0] > 0).sum(1), [4, 16, 8, 0])
  np.testing.assert_array_equal(vision["patches"][0].reshape(16, 4, 1176)[units[0][1]],
                                wide[0].reshape(6, 4, 1176))
  with pytest.raises(ValueError, match="row 1 needs 3 windows of 16 patches, the limit is 2"):
    images.pack_rows([[small], [small, wide]], windows=2, window=56)
  with pytest.raises(ValueError, match=r"row 0: 4 patches do not fill a grid of \(1, 4, 4\)"):
    images.pack_rows([[(small[0], (1, 4, 4))]], windows=2, window=56)
