"""Pictures in the metadata of a file, which programs show for it. Needs no torch."""

import base64
import io
from pathlib import Path

from PIL import Image

from library.dataset.images import load_image

COVER_SIDE = 512  # pixels, at most


def cover_image(path: Path) -> str:
    """A picture as `ssmd_cover_images` lists it; it is made smaller, and loses what its file says of itself."""
    picture = Image.fromarray(load_image(path))
    picture.thumbnail((COVER_SIDE, COVER_SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=90)
    return base64.b64encode(data.getvalue()).decode("ascii")
