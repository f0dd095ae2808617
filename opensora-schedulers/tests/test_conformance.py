"""All schedulers do what every scheduler must."""

import pytest

from opensora.core.testing import check_scheduler
from opensora.schedulers import SOLVERS

NEARLY = {
    "given_within": 0.1
}  # as from Open-Sora, iddpm noises given frames at the last step, which is next to the data


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rflow", {}),
        ("rflow", {"use_timestep_transform": True, "sample_method": "logit-normal", "cfg_scale": 1.0}),
        *(("rflow", {"trains": False, "solver": name}) for name in SOLVERS),
        ("iddpm", NEARLY),
        ("iddpm", {"learn_sigma": False, "noise_schedule": "squaredcos_cap_v2", **NEARLY}),
        ("iddpm", {"ddim_eta": 0.0, **NEARLY}),
        ("iddpm-speed", NEARLY),
        ("dpm-solver", {"trains": False}),
        ("dpm-solver", {"trains": False, "order": 3, "spacing": "logSNR"}),
        *(("dpm-solver", {"trains": False, "solver": name}) for name in SOLVERS),
    ],
    ids=str,
)
def test_conforms(name, options):
    check_scheduler(name, **options)
