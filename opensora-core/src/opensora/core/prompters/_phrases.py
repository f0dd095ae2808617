"""What `opensora.core.prompters.templates` makes prompts of.

What is added to a user's subject fits any: it names no thing, place or time of day. Changing a list, or its order, changes
what a seed gives.
"""

from __future__ import annotations

__all__ = ["ADDITIONS", "MARKERS", "SCENES"]

ADDITIONS: dict[str, tuple[str, ...]] = {
    "shot": (
        "A wide shot leaves plenty of space on all sides.",
        "A medium shot shows the scene at eye level.",
        "A close-up shows the scene from nearby, with the background out of focus.",
        "A low angle makes everything look large in the frame.",
        "The view is from slightly above, a little to one side of the centre.",
        "A long shot shows the scene from a distance.",
        "The view is from the side, with the foreground slightly out of focus.",
        "The frame is centred and calm, with space above.",
    ),
    "light": (
        "Soft, even light leaves hardly any shadows.",
        "Light falls in from the left and gives every shape a bright and a dark side.",
        "Warm, low light draws long shadows.",
        "Cool, diffuse light makes the colours look muted.",
        "Light from behind leaves a thin bright outline around the shapes.",
        "Clear, bright light shows every detail in strong colours.",
        "Patches of light and shade move slowly over the scene.",
        "Dim light with a few bright spots leaves the corners of the frame dark.",
    ),
    "camera": (
        "The camera stands still.",
        "The camera moves slowly forward.",
        "The camera moves slowly back and shows more of the surroundings.",
        "The camera pans slowly to the right.",
        "The camera pans slowly to the left.",
        "The camera glides past at a steady speed.",
        "The camera circles slowly around the scene.",
        "A hand-held camera follows with small, natural movements.",
    ),
    "detail": (
        "Fine textures are visible, and the colours are natural.",
        "The motion is smooth and unhurried.",
        "Small movements in the background give the scene depth.",
        "The surfaces look real, down to small irregularities.",
        "The colours are few and go well together.",
        "The background is simple, and nothing distracts from what happens.",
        "Every movement is clearly visible from beginning to end.",
        "The picture is sharp, with a natural contrast.",
    ),
}
"""A sentence of each is added to a subject, in this order."""

MARKERS: dict[str, str] = {
    "shot": r"shot|close-?ups?|angle|aerial|drone|macro|bird'?s[- ]eye|framed|point of view|pov",
    "light": r"(?:sun|moon|lamp|candle|day|back|flash)?lights?|lit|lighting|sunny|sunset|sunrise|dawn|dusk|night|neon|dark"
    r"|shadows?|glow\w*|overcast|fog|foggy|golden hour",
    "camera": r"camera|pan|pans|panning|zoom\w*|tilts?|dolly|tracking|hand-?held|static|timelapse|time-lapse",
}
"""Words in a subject that speak of it already: the sentence is left out."""

Scene = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]

SCENES: tuple[Scene, ...] = (
    (
        ("A red fox", "A young deer", "A grey wolf", "A brown hare"),
        ("walks slowly through", "stops and looks around in", "runs through"),
        ("a snow-covered forest", "a meadow with tall grass", "a clearing full of ferns", "a birch wood in autumn"),
    ),
    (
        ("A sea turtle", "A manta ray", "A school of small silver fish", "An octopus"),
        ("glides over", "moves slowly across", "comes out from behind the edge of"),
        ("a coral reef", "a sandy sea floor", "a field of sea grass", "a wall of dark rock under water"),
    ),
    (
        ("A woman in a yellow raincoat", "An old man with a straw hat", "A boy with a red kite", "A girl on a bicycle"),
        ("moves along", "comes down", "crosses"),
        ("a path between fields", "a wet cobbled street", "a long wooden pier", "a dune above the sea"),
    ),
    (
        ("A small sailing boat", "A white ferry", "A rowing boat with two people", "A wooden fishing boat"),
        ("crosses", "drifts slowly over", "turns in the middle of"),
        ("a calm mountain lake", "a wide river", "a bay between green hills", "a harbour with coloured houses"),
    ),
    (
        ("A red tram", "A line of cyclists", "A yellow delivery van", "A blue bus"),
        ("moves along", "turns into", "waits and then sets off in"),
        ("a tree-lined avenue", "a narrow street of an old town", "a rainy street with bright shop windows"),
    ),
    (
        ("A baker", "A potter", "A watchmaker", "A florist"),
        ("works with quick, careful hands at", "cleans and puts in order", "bends over"),
        ("a wooden workbench", "a table covered with tools", "a bench next to a large window"),
    ),
    (
        ("Tall waves", "Low clouds", "Flocks of starlings", "Thick banks of mist"),
        ("roll over", "move in from the left and cover", "pass above"),
        ("a black sand beach", "a rocky coast with a lighthouse", "a wide valley of vineyards", "a chain of green hills"),
    ),
    (
        ("A glass of iced tea", "A bowl of steaming noodle soup", "A stack of pancakes with honey", "A basket of apples"),
        ("stands on", "is set down on", "is turned slowly on"),
        ("a table in a garden", "a wooden counter", "a white tablecloth", "a stone window sill"),
    ),
)  # fmt: skip
"""Subjects, what they do, and where: any of a scene's go together."""
