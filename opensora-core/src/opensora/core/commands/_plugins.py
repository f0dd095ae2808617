"""What ``opensora plugins`` lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from attrs import frozen

from opensora.core import components
from opensora.core.config._modules import find_folders, has_module
from opensora.core.errors import ComponentError

__all__ = ["Plugin", "list_plugins"]


@frozen
class Plugin:
    """A component and its state."""

    component: components.Component
    problem: str | None = None
    """None: as far as was looked, it is fine."""

    def as_row(self) -> tuple[str, str, str]:
        """Name, distribution, state; for people."""
        one = self.component
        return one.name, f"{one.distribution} {one.version}", self.problem or ""

    def as_dict(self) -> dict[str, str | None]:
        """For programs."""
        one = self.component
        return {
            "kind": one.kind,
            "name": one.name,
            "distribution": one.distribution,
            "version": one.version,
            "target": one.target,
            "status": (self.problem or "ok").partition(":")[0],
            "problem": self.problem,
        }


def list_plugins(kinds: Iterable[str], *, check: bool = False) -> list[Plugin]:
    """All components of these kinds.

    Args:
        check: Import each. Else only metadata is read, and it is looked whether the module is there.
    """
    plugins = []
    for kind in kinds:
        found = components.available(kind)
        names = Counter(component.name for component in found)
        for component in found:
            problem = _broken(component) or (_fails(component) if check and kind != "configs" else None)
            if not problem and names[component.name] > 1:
                others = {one.distribution for one in found if one.name == component.name} - {component.distribution}
                problem = f"duplicate: also in {', '.join(sorted(others)) or component.distribution}"
            plugins.append(Plugin(component, problem))
    return plugins


def _broken(component: components.Component) -> str | None:
    """What metadata and file names alone can tell."""
    module = component.target.partition(":")[0].strip()
    if component.kind == "configs":
        return None if find_folders(module) else f"broken: there is no package {module}"
    return None if has_module(module) else f"broken: there is no module {module}"


def _fails(component: components.Component) -> str | None:
    try:
        components.load(component.kind, f"{component.distribution}:{component.name}")
    except ComponentError as error:
        cause = error.__cause__
        return f"broken: {type(cause).__name__}: {cause}" if cause else f"broken: {error}"
    return None
