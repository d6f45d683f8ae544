"""Where in a picture the subject is: faces and people by OpenCV's detectors, else where the contrast is."""

import threading
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from library.dataset.config import Size
from library.dataset.faces import Face

# Cascades of OpenCV, those that err least first.
FACES = ("haarcascade_frontalface_alt2.xml", "haarcascade_frontalface_default.xml", "haarcascade_profileface.xml")
CAT_FACES = ("haarcascade_frontalcatface_extended.xml",)
CASCADE_SIDE, PERSON_SIDE, CONTRAST_SIDE = 960, 640, 64  # longest side of what each detector looks at
SMALLEST_FACE = 0.07  # of the shorter side
MIN_NEIGHBOURS = 6  # detections that must agree
MIN_PERSON_WEIGHT = 0.6  # of the support vector machine
NEEDS_OPENCV_4 = "pip install 'opencv-python-headless<5'"


class Found(NamedTuple):
    """What a picture is cropped around."""

    what: str  # "face", "cat's face", "person"
    at: Face


class _Detectors(threading.local):
    """Detectors keep state while they look, so each thread has its own."""

    def __init__(self) -> None:
        self.cascades: dict[str, Any] = {}
        self.people: Any = None


_detectors = _Detectors()


def has_detectors() -> bool:
    """Whether this OpenCV finds faces and people; release 5 does not."""
    return hasattr(cv2, "CascadeClassifier") and hasattr(cv2, "HOGDescriptor") and hasattr(cv2, "data")


def find_face(pixels: np.ndarray) -> Found | None:
    """The largest face of a picture [H, W, 3]."""
    return _largest("face", _cascades(pixels, FACES))


def find_subject(pixels: np.ndarray) -> Found | None:
    """The largest face, else a cat's, else a person; None where there is none, or nothing that looks for them."""
    if not has_detectors():
        return None
    return find_face(pixels) or _largest("cat's face", _cascades(pixels, CAT_FACES)) or find_person(pixels)


def find_person(pixels: np.ndarray) -> Found | None:
    """The largest person seen whole and standing (N. Dalal, B. Triggs, CVPR 2005, as in OpenCV)."""
    if _detectors.people is None:
        _detectors.people = cv2.HOGDescriptor()
        _detectors.people.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())
    grey, scale = _grey(pixels, PERSON_SIDE)
    if grey.shape[0] < 128 or grey.shape[1] < 64:  # the detector's window
        return None
    boxes, weights = _detectors.people.detectMultiScale(grey, winStride=(8, 8), padding=(8, 8), scale=1.05)
    sure = [box for box, weight in zip(boxes, np.ravel(weights), strict=True) if weight >= MIN_PERSON_WEIGHT]
    return _largest("person", [_unscaled(box, scale) for box in sure])


def contrast_map(pixels: np.ndarray) -> np.ndarray:
    """Where a picture [H, W, 3] differs from what its frequencies let expect, as [h, w] float64 that sums to 1.

    Spectral residual: X. Hou, L. Zhang, "Saliency detection", CVPR 2007, equations 3 to 7.
    """
    grey, _ = _grey(pixels, CONTRAST_SIDE)
    spectrum = np.fft.fft2(grey.astype(np.float64))
    log_amplitude = np.log(np.abs(spectrum) + 1e-9)
    residual = log_amplitude - cv2.blur(log_amplitude, (3, 3))
    saliency = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    saliency = cv2.GaussianBlur(saliency, (0, 0), 2.5)
    return saliency / saliency.sum()


def place_of_contrast(pixels: np.ndarray, resized_wh: Size, target_wh: Size) -> tuple[int, int]:
    """Left and top of the crop of a resized picture that holds most of its contrast; the middle one of equals."""
    saliency = contrast_map(pixels)
    return (
        _best_offset(saliency.sum(axis=0), resized_wh[0], target_wh[0]),
        _best_offset(saliency.sum(axis=1), resized_wh[1], target_wh[1]),
    )


def _best_offset(profile: np.ndarray, whole: int, part: int) -> int:
    """Where a window of `part` of `whole` pixels covers most of a profile [n]."""
    trim = whole - part
    offsets = np.arange(trim + 1)
    cumulative = np.concatenate([[0.0], np.cumsum(profile)])
    edges = np.linspace(0, whole, len(cumulative))
    covered = np.interp(offsets + part, edges, cumulative) - np.interp(offsets, edges, cumulative)
    off_centre = np.abs(offsets - trim / 2) / max(trim, 1)  # 0 to 0.5
    return int(np.argmax(covered - 0.05 * off_centre))


def _cascades(pixels: np.ndarray, names: tuple[str, ...]) -> list[tuple[int, ...]]:
    return [box for name in names for box in _cascade(pixels, name)]


def _cascade(pixels: np.ndarray, name: str) -> list[tuple[int, ...]]:
    """Left, top, width and height of what a cascade finds (P. Viola, M. Jones, CVPR 2001, as in OpenCV)."""
    if name not in _detectors.cascades:
        _detectors.cascades[name] = _opened_cascade(name)
    grey, scale = _grey(pixels, CASCADE_SIDE)
    grey = cv2.equalizeHist(grey)
    smallest = max(24, int(SMALLEST_FACE * min(grey.shape)))
    found = _detectors.cascades[name].detectMultiScale(grey, 1.1, MIN_NEIGHBOURS, minSize=(smallest, smallest))
    return [_unscaled(box, scale) for box in found]


def _opened_cascade(name: str) -> Any:
    """A cascade, read here: OpenCV opens no path with letters that Windows has in no old code page."""
    text = (Path(cv2.data.haarcascades) / name).read_text(encoding="utf-8")
    storage = cv2.FileStorage(text, cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
    cascade = cv2.CascadeClassifier()
    if not cascade.read(storage.getFirstTopLevelNode()):
        raise RuntimeError(f"OpenCV {cv2.__version__} does not read its own {name}")
    return cascade


def _grey(pixels: np.ndarray, longest_side: int) -> tuple[np.ndarray, float]:
    """The picture in grey, shrunk to fit, and by how much."""
    scale = min(1.0, longest_side / max(pixels.shape[:2]))
    size_wh = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    small = cv2.resize(pixels, size_wh, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), scale


def _unscaled(box: Any, scale: float) -> tuple[int, ...]:
    return tuple(round(int(number) / scale) for number in box)


def _largest(what: str, boxes: list[tuple[int, ...]]) -> Found | None:
    if not boxes:
        return None
    left, top, width, height = max(boxes, key=lambda box: box[2] * box[3])
    return Found(what, Face((left + width // 2, top + height // 2), max(width, height)))
