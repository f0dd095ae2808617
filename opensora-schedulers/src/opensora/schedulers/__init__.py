"""Training objectives and samplers of opensora: rectified flow, improved DDPM, DPM-Solver++, and classifier-free guidance."""

from opensora.schedulers.dpm_solver import DPMSolver, DPMSolverSpec
from opensora.schedulers.guidance import Guidance, guide
from opensora.schedulers.iddpm import IDDPM, IDDPMSpec
from opensora.schedulers.iddpm_speed import IDDPMSpeed, IDDPMSpeedSpec
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowSpec

__all__ = [
    "IDDPM",
    "DPMSolver",
    "DPMSolverSpec",
    "Guidance",
    "IDDPMSpec",
    "IDDPMSpeed",
    "IDDPMSpeedSpec",
    "RectifiedFlow",
    "RectifiedFlowSpec",
    "guide",
]
