"""Components are found in metadata alone, and loaded when they are used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import pytest
from attrs import field, frozen
from attrs.validators import gt

from opensora.core import ComponentError, ConfigError, components, preset
from opensora.core.config.structure import ComponentConfig

Install = Callable[..., Path]

MODEL = """
from attrs import field, frozen
from attrs.validators import gt

@frozen(kw_only=True)
class Spec:
    width: int = field(default=4, validator=gt(0))

class Model:
    Spec = Spec

    def __init__(self, spec, *, latent_channels, text_width=None):
        self.spec, self.latent_channels, self.text_width = spec, latent_channels, text_width

class Another(Model):
    pass
"""


@pytest.fixture
def tiny(install: Install) -> str:
    install("tiny-dist", {"opensora.models": {"Tiny/2": "tiny_of_components:Model"}}, {"tiny_of_components.py": MODEL})
    return "Tiny/2"


# ---- finding


def test_an_installed_component_is_listed_without_being_imported(install: Install) -> None:
    install("lazy-dist", {"opensora.models": {"Lazy": "a_module_that_is_not_there:Model"}}, {})
    assert components.find("models", "Lazy") == components.Component(
        kind="models", name="Lazy", distribution="lazy-dist", version="1.5", target="a_module_that_is_not_there:Model"
    )
    assert "a_module_that_is_not_there" not in sys.modules


def test_components_are_listed_by_name(install: Install) -> None:
    install("b-dist", {"opensora.attention": {"zeta": "x:y", "alpha": "x:y"}}, {})
    install("a-dist", {"opensora.attention": {"zeta": "x:y"}, "opensora.models": {"Elsewhere": "x:y"}}, {})
    found = [one for one in components.available("attention") if one.distribution != "opensora-accel"]
    listed = [(one.name, one.distribution) for one in found]
    assert listed == [("alpha", "b-dist"), ("sdpa", "opensora-core"), ("zeta", "a-dist"), ("zeta", "b-dist")]


def test_what_is_installed_later_is_seen_after_refresh(tiny: str, install: Install) -> None:
    components.load("models", tiny)
    install("late-dist", {"opensora.models": {"Late": "late_of_components:Model"}}, {"late_of_components.py": MODEL})
    assert components.load("models", "Late").__name__ == "Model"


def test_an_unknown_kind_names_the_kinds() -> None:
    with pytest.raises(ComponentError, match=r'"modles" is no kind of component. Kinds: models, vaes,'):
        components.available("modles")


def test_an_unknown_name_comes_with_the_nearest(install: Install) -> None:
    install("tiny-dist", {"opensora.models": {"Tiny/2": "x:y", "Tiny/4": "x:y", "Other": "x:y"}}, {})
    with pytest.raises(ComponentError) as caught:
        components.find("models", "tinny/2")
    assert str(caught.value).startswith('No model is named "tinny/2". Nearest: "Tiny/2", "Tiny/4"')
    assert "opensora plugins --kind models" in str(caught.value)


def test_a_name_like_no_other_comes_with_what_is_installed(install: Install) -> None:
    install("tiny-dist", {"opensora.models": {f"A/{number}": "x:y" for number in range(9)}}, {})
    listed = ", ".join(f"A/{number}" for number in range(8))
    with pytest.raises(ComponentError, match=rf'No model is named "QQQQ"\. Installed: {listed} and \d+ more\. All:'):
        components.find("models", "QQQQ")


OFFICIAL = """
from opensora.core import components
for kind, name in [("schedulers", "rflow"), ("schedulers", "rflows"), ("models", "STDIT3-XL/2")]:
    try:
        components.find(kind, name)
    except LookupError as error:
        print(error)
"""


def test_an_official_component_that_is_not_installed_comes_with_the_pip_line(tmp_path: Path) -> None:
    """In an environment that holds core alone, and of all libraries only the one that finding needs."""
    for package in ("attr", "attrs"):
        (tmp_path / package).symlink_to(Path(import_module(package).__file__).parent)
    source = Path(components.__file__).parents[2]
    paths = f"import sys; sys.path[:0] = {[str(source), str(tmp_path)]}\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", paths + OFFICIAL], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].endswith("It is part of a package that is not installed: pip install opensora-schedulers")
    assert 'Nearest: "rflow" (pip install opensora-schedulers)' in lines[1]
    assert '"STDiT3-XL/2" (pip install opensora-models)' in lines[2]


def test_install_hint_is_for_official_names_only() -> None:
    assert components.install_hint("models", "STDiT3-XL/2") == "pip install opensora-models"
    assert components.install_hint("models", "Nobody's") is None
    assert components.install_hint("hooks", "anything") is None


# ---- one name, two distributions


@pytest.fixture
def twice(install: Install) -> None:
    for distribution, module in (("first-dist", "first_of_two"), ("Second_Dist", "second_of_two")):
        install(distribution, {"opensora.models": {"Same/2": f"{module}:Model"}}, {f"{module}.py": MODEL})


@pytest.mark.usefixtures("twice")
def test_a_name_that_two_distributions_claim_is_refused_with_both_and_the_choice() -> None:
    with pytest.raises(ComponentError) as caught:
        components.load("models", "Same/2")
    message = str(caught.value)
    assert 'Two distributions have a model named "Same/2": Second_Dist 1.5 and first-dist 1.5' in message
    assert 'type="Second_Dist:Same/2" or type="first-dist:Same/2"' in message


@pytest.mark.usefixtures("twice")
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("first-dist:Same/2", "first_of_two"),
        ("Second_Dist:Same/2", "second_of_two"),
        ("second-dist:Same/2", "second_of_two"),
    ],
)
def test_one_of_them_can_be_chosen(name: str, module: str) -> None:
    assert components.load("models", name).__module__ == module
    assert components.build("models", {"type": name, "width": 7}, latent_channels=4).spec.width == 7


@pytest.mark.usefixtures("twice")
def test_a_third_one_is_counted(install: Install) -> None:
    install("third-dist", {"opensora.models": {"Same/2": "x:y"}}, {})
    with pytest.raises(ComponentError, match="3 distributions have"):
        components.find("models", "Same/2")


def test_a_distribution_that_lacks_the_name_is_not_chosen(tiny: str) -> None:
    with pytest.raises(ComponentError, match=f'No model is named "other-dist:{tiny}"'):
        components.find("models", f"other-dist:{tiny}")


# ---- loading


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("import a_package_that_is_missing", "ModuleNotFoundError: No module named 'a_package_that_is_missing'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("def Broken(:", "SyntaxError: "),
        ("import sys; sys.exit('I need a GPU')", "SystemExit: I need a GPU"),
        ("Other = 1", "AttributeError: "),
    ],
    ids=["missing import", "raises", "syntax", "exits", "no such attribute"],
)
def test_a_plugin_that_fails_to_import_breaks_only_itself(
    content: str, cause: str, install: Install, tiny: str, request: pytest.FixtureRequest
) -> None:
    module = f"broken_{request.node.callspec.id.replace(' ', '_')}"
    install("broken-dist", {"opensora.models": {"Broken": f"{module}:Broken"}}, {f"{module}.py": content})
    assert {one.name for one in components.available("models")} >= {"Broken", tiny}
    with pytest.raises(ComponentError) as caught:
        components.load("models", "Broken")
    assert f"Broken = {module}:Broken of broken-dist 1.5" in str(caught.value)
    assert cause in str(caught.value)
    assert caught.value.__cause__ is not None
    assert components.load("models", tiny).__name__ == "Model"


@pytest.mark.parametrize(
    "content",
    ["Thing = 3", "class Thing: ...", "class Thing:\n    Spec = dict", "from tiny_of_components import Spec as Thing"],
    ids=["a number", "no Spec", "Spec is no attrs class", "a Spec itself"],
)
def test_what_has_no_spec_is_no_component(
    content: str, install: Install, tiny: str, request: pytest.FixtureRequest
) -> None:
    module = f"thing_{request.node.callspec.id.replace(' ', '_')}"
    install("thing-dist", {"opensora.models": {"Thing": f"{module}:Thing"}}, {f"{module}.py": content})
    with pytest.raises(
        ComponentError, match=r'"Thing" is no model \(Thing = .* of thing-dist 1\.5\): it must be a class with'
    ):
        components.load("models", "Thing")


def test_a_kernel_needs_no_spec_but_must_be_callable(install: Install) -> None:
    entries = {"ours": "kernels_of_components:ours", "number": "kernels_of_components:number"}
    install(
        "kernel-dist",
        {"opensora.attention": entries},
        {"kernels_of_components.py": "number = 3\ndef ours(*args): return args"},
    )
    assert components.load("attention", "ours")(1) == (1,)
    with pytest.raises(ComponentError, match=r'"number" is no attention kernel .*it must be a function'):
        components.load("attention", "number")


# ---- building


def test_options_become_the_spec_and_run_time_facts_arguments(tiny: str) -> None:
    model = components.build(
        "models", {"type": tiny, "width": 9}, latent_channels=4, text_width=16, latent_size=(1, 2, 3)
    )
    assert (model.spec.width, model.latent_channels, model.text_width) == (9, 4, 16)
    config = ComponentConfig(type=tiny, options={})
    assert components.build("models", config, latent_channels=4).spec.width == 4


def test_a_constructor_that_takes_all_keywords_gets_all() -> None:
    class Greedy:
        def __init__(self, spec: object, **keywords: object) -> None:
            self.keywords = keywords

    assert components.construct(Greedy, None, latent_channels=4, text_width=5).keywords == {
        "latent_channels": 4,
        "text_width": 5,
    }


def test_a_subclass_that_hands_keywords_on_gets_what_its_base_names() -> None:
    class Named:
        def __init__(self, spec: object, *, latent_channels: int) -> None:
            self.latent_channels = latent_channels

    class HandsOn(Named):
        def __init__(self, spec: object, *, text_width: int, **keywords: int) -> None:
            super().__init__(spec, **keywords)
            self.text_width = text_width

    built = components.construct(HandsOn, None, latent_channels=4, text_width=5, text_length=6)
    assert (built.latent_channels, built.text_width) == (4, 5)


def test_a_function_is_called_with_what_it_names() -> None:
    def function(spec: object, latent_channels: int) -> int:
        return latent_channels

    assert components.construct(function, None, latent_channels=4, text_width=5) == 4


def test_the_given_dict_stays_as_it_is(tiny: str) -> None:
    config = {"type": tiny, "width": 9}
    components.build("models", config, latent_channels=4)
    assert config == {"type": tiny, "width": 9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widht": 3}, 'Did you mean "width"?'),
        ({"width": "wide"}, "width must be int"),
        ({"width": 0}, "width must be > 0"),
    ],
    ids=["unknown", "wrong type", "out of range"],
)
def test_bad_options_are_config_errors(options: dict[str, Any], message: str, tiny: str) -> None:
    with pytest.raises(ConfigError) as caught:
        components.build("models", {"type": tiny, **options}, latent_channels=4)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [{"width": 3}, {"type": 5}, {"type": None}], ids=["missing", "number", "None"])
def test_a_config_without_a_name_says_so(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"has no type.* dict\(type="):
        components.build("models", config)


# ---- presets


@frozen(kw_only=True)
class BaseSpec:
    """Options of `Base`."""

    depth: int = field(default=2, validator=gt(0), metadata={"unit": "blocks"})
    """How deep."""
    heads: tuple[int, ...] = field(default=(1,), converter=tuple)
    width: int = 8

    def __attrs_post_init__(self) -> None:
        if self.width % self.depth:
            raise ValueError(f"width {self.width} is no multiple of depth {self.depth}")


class Base:
    """Base's words."""

    Spec = BaseSpec

    def __init__(self, spec: BaseSpec) -> None:
        self.spec = spec


Large = preset(Base, "Large", depth=4, heads=(2, 2))
Larger = preset(Large, "Larger", width=16)


def test_a_preset_has_other_defaults() -> None:
    assert attrs.asdict(Large.Spec()) == {"depth": 4, "heads": (2, 2), "width": 8}
    assert attrs.asdict(Larger.Spec()) == {"depth": 4, "heads": (2, 2), "width": 16}
    assert attrs.asdict(Base.Spec()) == {"depth": 2, "heads": (1,), "width": 8}


def test_a_presets_options_can_still_be_overridden() -> None:
    assert Large(Large.Spec(depth=8, heads=[3])).spec.depth == 8
    assert Large.Spec(heads=[3]).heads == (3,)


def test_a_preset_keeps_validators_metadata_and_checks_across_fields() -> None:
    with pytest.raises(ValueError, match="'depth' must be > 0"):
        Large.Spec(depth=0)
    with pytest.raises(ValueError, match="no multiple"):
        Larger.Spec(depth=3)
    assert attrs.fields(Large.Spec).depth.metadata == {"unit": "blocks"}
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Large.Spec().depth = 1


def test_a_preset_is_its_base_by_another_name() -> None:
    assert issubclass(Larger, Base)
    assert isinstance(Larger.Spec(), BaseSpec)
    assert (Large.__name__, Large.__doc__, Large.__module__) == ("Large", "Base's words.", Base.__module__)
    assert Large.Spec.__name__ == "LargeSpec"


def test_presets_are_structured_like_any_spec() -> None:
    from opensora.core.config.structure import spec_fields, structure

    assert structure(Large.Spec, {"width": 12}).depth == 4
    with pytest.raises(ConfigError, match="depth must be int"):
        structure(Large.Spec, {"depth": "deep"})
    helps = {one.name: (one.default, one.help) for one in spec_fields(Large.Spec)}
    assert helps["depth"] == ("4", "How deep.")


def test_a_preset_of_a_field_that_is_not_there_fails_at_once() -> None:
    with pytest.raises(KeyError, match="deph"):
        preset(Base, "Wrong", deph=3)


# ---- start-up


def test_core_and_its_components_import_no_torch() -> None:
    program = """
import sys
import opensora.core, opensora.core.components, opensora.core.hookspecs, opensora.core.errors, opensora.core.prompts
import opensora.core.sizes, opensora.core.run_folder, opensora.core.stopping, opensora.core.config.structure
from opensora.core import ConfigError, available, hook
dir(opensora.core)
for kind in opensora.core.components.KINDS:
    available(kind)
print([name for name in ("torch", "numpy", "safetensors", "av") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
