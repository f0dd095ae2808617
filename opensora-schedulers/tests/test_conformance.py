"""All schedulers do what every scheduler must."""

import pytest

from opensora.core.testing import check_scheduler


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rflow", {}),
        ("rflow", {"use_timestep_transform": True, "sample_method": "logit-normal", "cfg_scale": 1.0}),
        ("iddpm", {}),
        ("iddpm", {"learn_sigma": False, "noise_schedule": "squaredcos_cap_v2"}),
        ("iddpm-speed", {}),
        ("dpm-solver", {"trains": False}),
        ("dpm-solver", {"trains": False, "order": 3, "spacing": "logSNR"}),
    ],
    ids=[
        "rflow",
        "rflow with a shift",
        "iddpm",
        "iddpm with fixed variance",
        "iddpm-speed",
        "dpm-solver",
        "dpm-solver of order 3",
    ],
)
def test_conforms(name, options):
    check_scheduler(name, **options)
