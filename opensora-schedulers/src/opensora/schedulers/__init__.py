"""Training objectives and samplers of opensora: rectified flow, improved DDPM, solvers, and classifier-free guidance."""

from opensora.schedulers.dpm_solver import DPMSolver, DPMSolverSpec
from opensora.schedulers.guidance import Guidance, GuidanceSpec
from opensora.schedulers.iddpm import IDDPM, IDDPMSpec
from opensora.schedulers.iddpm_speed import IDDPMSpeed, IDDPMSpeedSpec
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowSpec
from opensora.schedulers.sampling import Sampler
from opensora.schedulers.solvers import SOLVERS, Levels, StepWeights

__all__ = [
    "IDDPM",
    "SOLVERS",
    "DPMSolver",
    "DPMSolverSpec",
    "Guidance",
    "GuidanceSpec",
    "IDDPMSpec",
    "IDDPMSpeed",
    "IDDPMSpeedSpec",
    "Levels",
    "RectifiedFlow",
    "RectifiedFlowSpec",
    "Sampler",
    "StepWeights",
]
