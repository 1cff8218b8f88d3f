import io

import numpy as np
from PIL import Image

from ares_jax.run import responses


def test_a_kept_image_is_turned_where_the_model_sees_it_turned():
  exif = Image.Exif()
  exif[0x0112] = 6  # orientation: a quarter turn
  file = io.BytesIO()
  pixels = np.random.default_rng(0).integers(0, 256, (56, 112, 3), np.uint8)
  Image.fromarray(pixels).save(file, "JPEG", exif=exif)
  shapes = [Image.open(io.BytesIO(responses._jpeg(file.getvalue(), turn)[1])).size
            for turn in (True, False)]
  assert shapes == [(56, 112), (112, 56)]
