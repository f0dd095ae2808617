"""What tests of autoencoders share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opensora.models.vae.lpips import LPIPS


@pytest.fixture(scope="session")
def procedural_lpips():
    """LPIPS whose weights are a function of their place, as the reference vectors had it."""
    model = LPIPS()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            n = parameter.numel()
            h = (np.arange(1, n + 1, dtype=np.uint64) * 2654435761 + np.uint64((i + 1) * 40503)) & 0xFFFFFFFF
            h ^= h >> np.uint64(16)
            h = (h * np.uint64(2246822519)) & 0xFFFFFFFF
            h ^= h >> np.uint64(13)
            gain = np.sqrt(2 * parameter.shape[0] / n) if parameter.dim() >= 2 else 0.05
            values = (h.astype(np.float64) / 2**32 - 0.5) * np.sqrt(12) * gain
            value = torch.from_numpy(values.astype(np.float32)).reshape(parameter.shape)
            parameter.copy_(value.abs() if name.startswith("lin") else value)
    return model
