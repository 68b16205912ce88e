"""Shared fixtures: eight simulated CPU devices, and images to test on.

Real CIFAR-10 images are used where the environment variable JAXCIFAR_CIFAR names a folder that holds
cifar-10-batches-py; elsewhere generated ones take their place, so every test runs everywhere.
"""

import os
import pathlib
import pickle

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's: two waiting threads steal the cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

import numpy as np  # noqa: E402  (the flags above must be set before jax starts)
import pytest  # noqa: E402

if os.environ.get("CI"):
    import tensorboard  # noqa: F401  (what compares with them must not be skipped unseen in CI)
    import torch  # noqa: F401


def pytest_report_header():
    """Say on which images the tests run."""
    return f"images: {os.environ.get('JAXCIFAR_CIFAR', 'generated ones (JAXCIFAR_CIFAR is not set)')}"


ROOT = pathlib.Path(__file__).resolve().parent.parent


def generated_images(count, seed=0):
    """Return uint8 [count, 32, 32, 3]: smooth, noisy, flat and two-valued images in turn."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-60, 315, (count, 5, 5, 3))
    grid = np.linspace(0, 4, 32)
    low = np.minimum(grid.astype(int), 3)
    weight = (grid - low)[None, :, None, None]
    rows = coarse[:, low] * (1 - weight) + coarse[:, low + 1] * weight
    weight = (grid - low)[None, None, :, None]
    smooth = rows[:, :, low] * (1 - weight) + rows[:, :, low + 1] * weight
    images = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    images[1::4] = rng.integers(0, 256, images[1::4].shape)
    images[2::4] = rng.integers(0, 256, (len(images[2::4]), 1, 1, 3))
    images[3::4] = (smooth[3::4] > 128) * np.uint8(200) + np.uint8(20)
    return images


@pytest.fixture(scope="session")
def sample_images():
    """256 images, uint8 [256, 32, 32, 3]: 192 real ones where JAXCIFAR_CIFAR is set, and generated ones."""
    made = generated_images(256)
    folder = os.environ.get("JAXCIFAR_CIFAR")
    if not folder:
        return made
    path = pathlib.Path(folder) / "cifar-10-batches-py" / "test_batch"
    with path.open("rb") as f:
        data = pickle.load(f, encoding="bytes")[b"data"][:192]
    made[:192] = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return made
