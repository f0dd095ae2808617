"""Training objectives and samplers of opensora: rectified flow, improved DDPM, and classifier-free guidance."""

from opensora.schedulers.guidance import Guidance, guide
from opensora.schedulers.iddpm import IDDPM, IDDPMSpec
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowSpec

__all__ = ["IDDPM", "Guidance", "IDDPMSpec", "RectifiedFlow", "RectifiedFlowSpec", "guide"]
