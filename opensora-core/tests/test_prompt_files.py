"""Prompts with settings of their own come from CSV and JSON lines; mistakes are named with file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from opensora.core import ConfigError, DataError
from opensora.core.prompt_files import PromptEntry, PromptSettings, read_prompt_file

Read = Callable[[str, str], list[PromptEntry]]
ALL = PromptSettings(
    seed=7,
    num_frames="2s",
    image_size=(240, 426),
    resolution="240p",
    aspect_ratio="9:16",
    fps=24.0,
    negative_prompt="blurry",
    reference_path="a.png;b.png",
    mask_strategy="0;0,1",
    loop=2,
    image="a.png",
    last_image="b.png",
    extend="c.mp4",
    connect=("a.png", "b.png"),
    edit="d.mp4",
    strength=0.4,
    cfg_scale=7.5,
    num_sampling_steps=30,
    name="first",
)


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Writes a file of that name in the current folder, and reads its prompts."""
    monkeypatch.chdir(tmp_path)

    def read(name: str, content: str) -> list[PromptEntry]:
        Path(name).write_bytes(content.encode())
        return read_prompt_file(Path(name))

    return read


def test_text_files_have_a_prompt_a_line(read: Read) -> None:
    for name in ("prompts.txt", "prompts", "prompts.md"):
        assert read(name, "a cat, 7\n\n{b}\n") == [
            PromptEntry("a cat, 7", PromptSettings(), f"{name}:1"),
            PromptEntry("", PromptSettings(), f"{name}:2"),
            PromptEntry("{b}", PromptSettings(), f"{name}:3"),
        ]


def test_csv_has_a_setting_a_column(read: Read) -> None:
    header = ",".join(["prompt", *attrs.asdict(ALL)])
    row = 'a cat,7,2s,240x426,240p,9:16,24,blurry,a.png;b.png,"0;0,1",2,a.png,b.png,c.mp4,a.png;b.png,d.mp4,0.4,7.5,30,first'
    assert read("prompts.csv", f"{header}\n{row}\n") == [PromptEntry("a cat", ALL, "prompts.csv:2")]


def test_json_lines_have_a_setting_a_key(read: Read) -> None:
    line = (
        '{"prompt": "a cat", "seed": 7, "num_frames": "2s", "image_size": [240, 426], "resolution": "240p", '
        '"aspect_ratio": "9:16", "fps": 24, "negative_prompt": "blurry", "reference_path": ["a.png", "b.png"], '
        '"mask_strategy": "0;0,1", "loop": 2, "image": "a.png", "last_image": "b.png", "extend": "c.mp4", '
        '"connect": ["a.png", "b.png"], "edit": "d.mp4", "strength": 0.4, "cfg_scale": 7.5, "num_sampling_steps": 30, '
        '"name": "first"}'
    )
    for name in ("prompts.jsonl", "prompts.ndjson", "prompts.JSON"):
        assert read(name, f"{line}\n") == [PromptEntry("a cat", ALL, f"{name}:1")]


@pytest.mark.parametrize("size", ["240x426", "240 426", "240 x 426"])
def test_sizes_are_written_as_people_write_them(size: str, read: Read) -> None:
    (entry,) = read("prompts.csv", f"prompt,image_size,num_frames\na,{size},51\n")
    assert entry.settings.image_size == (240, 426)
    assert entry.settings.num_frames == 51


def test_what_is_left_out_is_as_the_run_says(read: Read) -> None:
    rows = read("prompts.csv", "\ufefftext , seed,fps\r\n\r\na cat,,\r\n  a dog\r\n")
    assert rows == [
        PromptEntry("a cat", PromptSettings(), "prompts.csv:3"),
        PromptEntry("a dog", PromptSettings(), "prompts.csv:4"),
    ]
    lines = read("prompts.jsonl", '\ufeff{"text": " a cat ", "seed": null}\n \n{"text": ""}')
    assert lines == [
        PromptEntry("a cat", PromptSettings(), "prompts.jsonl:1"),
        PromptEntry("", PromptSettings(), "prompts.jsonl:3"),
    ]


def test_a_row_over_several_lines_is_where_it_starts(read: Read) -> None:
    first, second = read("prompts.csv", 'prompt,seed\n"a cat,\na ""dog""",3\n"b, c",4\n')
    assert (first.text, first.settings.seed, first.location) == ('a cat,\na "dog"', 3, "prompts.csv:2")
    assert (second.text, second.settings.seed, second.location) == ("b, c", 4, "prompts.csv:4")


def test_a_prompt_of_ten_thousand_words_is_read(read: Read) -> None:
    prompt = "word " * 9_999 + "word"
    assert read("prompts.csv", f"prompt,seed\n{prompt},1\n")[0].text == prompt


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,sed\na,1", 'prompts.csv:1: "sed" is no column of a prompt file. Did you mean "seed"?'),
        ("prompt,num-frames\na,1", 'Did you mean "num_frames"?'),
        ("prompt,path\na,1", 'prompts.csv:1: "path" is no column of a prompt file.'),
        ("prompt,x\na,1", "There are: prompt, text, seed, num_frames,"),
        ("prompt,seed,\na,1,", 'prompts.csv:1: "" is no column'),
        ("prompt,seed,seed\na,1,2", 'prompts.csv:1: The column "seed" is there twice.'),
        ("prompt,text\na,b", "prompts.csv:1: There is more than one column for the prompts. One is called prompt"),
        ("seed\n1", "prompts.csv:1: There is no column for the prompts. One is called prompt, or text."),
        (
            "prompt,seed\na,1\nb,2,c",
            'prompts.csv:3: The row has 3 fields, the header 2; the first too many is "c". Put a text',
        ),
        ('prompt\n"a\nb', "prompts.csv:2: The row is no CSV: unexpected end of data."),
        ('prompt\n"a"b', "prompts.csv:2: The row is no CSV: ',' expected after '\"'."),
        ("prompt,seed\na,abc", 'prompts.csv:2: seed must be int or None, not "abc" (str).'),
        ("prompt,seed\na,1.5", 'prompts.csv:2: seed must be int or None, not "1.5" (str).'),
        ("prompt,num_frames\na,3s", 'prompts.csv:2: num_frames "3s" is neither a number nor one of'),
        ("prompt,num_frames\na,0", "prompts.csv:2: num_frames is 0"),
        ("prompt,image_size\na,240", 'prompts.csv:2: image_size must be tuple[int, int] or None, not "240" (str).'),
        ("prompt,image_size\na,0x3", "prompts.csv:2: image_size is (0, 3); both sides must be at least 1."),
        ("prompt,connect\na,b.png", 'prompts.csv:2: connect must be tuple[str, str] or None, not "b.png" (str).'),
        ("prompt,fps\na,0", "prompts.csv:2: fps must be > 0, not 0.0."),
        ("prompt,fps\na,nan", "prompts.csv:2: fps must be > 0, not nan."),
        ("prompt,fps\na,inf", "prompts.csv:2: fps must be < inf, not inf."),
        ("prompt,cfg_scale\na,-1", "prompts.csv:2: cfg_scale must be >= 0, not -1.0."),
        ("prompt,loop\na,0", "prompts.csv:2: loop must be > 0, not 0."),
        ("prompt,num_sampling_steps\na,0", "prompts.csv:2: num_sampling_steps must be > 0, not 0."),
        ("prompt,strength\na,1.5", "prompts.csv:2: strength must be <= 1, not 1.5."),
        ("prompt,strength\na,0", "prompts.csv:2: strength must be > 0, not 0.0."),
        (
            'prompt,mask_strategy\na,"0,x"',
            'prompts.csv:2: mask_strategy: reference must be a whole number, not "x".\n    0,x\n      ^',
        ),
        ("prompt,reference_path\na,b;;c", "prompts.csv:2: reference_path: a path is empty."),
    ],
)
def test_mistakes_in_csv_are_named_with_their_line(content: str, message: str, read: Read) -> None:
    with pytest.raises(ConfigError) as caught:
        read("prompts.csv", content)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": }', 'The line is no JSON: expecting value.\n    {"prompt": }\n               ^'),
        ('["a"]', 'The line is no JSON object but "["a"]". Write {"prompt": "..."}, one a line.'),
        ("[", "The line is no JSON: expecting value."),
        ('{"prompt": "a", "sed": 1}', '"sed" is no key of a prompt file. Did you mean "seed"?'),
        ('{"prompt": "a", "seed": 1, "seed": 2}', 'can\'t be read as JSON: the key "seed" is there twice.'),
        ('{"prompt": "a", "text": "b"}', "There is more than one key for the prompts."),
        ('{"seed": 1}', "There is no key for the prompts."),
        ('{"prompt": ["a"]}', "prompt must be a text, not ['a'] (list)."),
        ('{"prompt": null}', "prompt must be a text, not None."),
        ('{"prompt": "\\ud83c"}', "prompt holds half a character, '\\ud83c'."),
        ('{"prompt": "a", "seed": "abc"}', 'seed must be int or None, not "abc" (str).'),
        ('{"prompt": "a", "seed": true}', "seed must be int or None, not True."),
        ('{"prompt": "a", "seed": {"b": 1}}', "seed can't hold lists of lists or objects."),
        ('{"prompt": "a", "image_size": [[1], 2]}', "image_size can't hold lists of lists or objects."),
        ('{"prompt": "a", "image_size": [1]}', "image_size must be tuple[int, int], not [1] (list)."),
        ('{"prompt": "a", "fps": NaN}', "can't be read as JSON: NaN is no number that JSON has."),
        ('{"prompt": "a", "reference_path": ["b;c"]}', 'reference_path: "b;c" is no path'),
        ('{"prompt": "a", "reference_path": ["b", 1]}', "reference_path must be str or None, not ['b', 1] (list)."),
        ('{"prompt": "a", "name": " "}', "name is empty; it is what the file is to be called."),
        ('{"prompt": "a", "loop": ' + "[" * 100_000 + "}", "The line can't be read as JSON: maximum recursion depth"),
        ('{"prompt": "a", "loop": ' + "9" * 5000 + "}", "The line can't be read as JSON: Exceeds the limit"),
        ('{"prompt": "a", "loop": ' + "[" * 900 + "]" * 900 + "}", "loop can't hold lists of lists"),
    ],
    ids=range(22),
)
def test_mistakes_in_json_lines_are_named_with_their_line(line: str, message: str, read: Read) -> None:
    with pytest.raises(ConfigError) as caught:
        read("prompts.jsonl", f'{{"prompt": "fine"}}\n{line}\n')
    assert str(caught.value).startswith("prompts.jsonl:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.csv", b"", "prompts.csv is empty. Its first line names the columns, one of them prompt"),
        ("prompts.csv", b"\n \n", "prompts.csv is empty"),
        ("prompts.csv", b"prompt,seed\n\n", "prompts.csv has no prompts"),
        ("prompts.csv", b"prompt\na\ncaf\xe9\n", "prompts.csv:3: The prompt file is no UTF-8 text (byte 12)"),
        ("prompts.jsonl", b"", "prompts.jsonl has no prompts"),
        ("prompts.jsonl", b"\n\n", "prompts.jsonl has no prompts"),
        ("prompts.jsonl", b'{"prompt": "\xff"}', "prompts.jsonl:1: The prompt file is no UTF-8 text"),
        ("prompts.txt", b"\n", "prompts.txt is empty"),
        ("prompts.csv", None, "prompts.csv can't be read: No such file"),
        ("prompts.jsonl", None, "prompts.jsonl can't be read: No such file"),
        ("prompts.txt", None, "prompts.txt can't be read: No such file"),
    ],
)
def test_files_that_cannot_be_used_say_why(
    name: str, content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_prompt_file(Path(name))
    assert message in str(caught.value)


@pytest.mark.parametrize("values", [{"fps": 0}, {"num_frames": "3s"}, {"image_size": (0, 1)}, {"mask_strategy": "x"}])
def test_settings_that_are_wrong_cannot_be_made(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        PromptSettings(**values)
