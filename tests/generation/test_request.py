"""What is asked of a run: the same on the command line as in Python, and checked at once."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from conftest import fill
from generation_fakes import SIZE, FakePipeline, save_random_flux
from processes import finished

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.generate import command
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation.parts import Part
from fedgfe_store.generation.request import DEFAULTS, Request, RequestOptions
from fedgfe_store.generation.run import generate


def asked(*words: str) -> Request:
    """Give what the command line makes of `words`, but for the part, which is told apart."""
    params = command.make_context("generate", list(words)).params
    known = {field.name for field in fields(Request)} - {"part"}
    return Request(**{name: value for name, value in params.items() if name in known})


def test_nothing_said_is_the_same_everywhere() -> None:
    assert asked() == DEFAULTS == Request()


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--steps", "3", "--guidance", "2"], {"steps": 3, "guidance": 2.0}),
        (["--num_inference_steps", "3", "--batch_size", "4"], {"steps": 3, "batch_size": 4}),
        (["--quantize", "nf4", "--dtype", "float16"], {"quantize": "nf4", "dtype": "float16"}),
        (["--batch-size", "auto", "--offload", "group"], {"offload": "group"}),
        (["--compile", "--vae-tiling"], {"compiled": True, "vae_tiling": True}),
        (["--limit", "0", "--on-stale", "keep"], {"limit": 0, "on_stale": "keep"}),
    ],
)
def test_options_are_fields(words: list[str], options: dict[str, Any]) -> None:
    assert asked(*words) == Request(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool: expected one of last, first, mean, got 'max'"),
        ({"on_stale": "ask"}, "on_stale: expected error, regenerate or keep, got 'ask'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": -1}, "batch_size: expected at least 1, got -1"),
        ({"guidance": float("inf")}, "guidance: expected a number from 0 up, got inf"),
    ],
)
def test_what_no_run_could_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaMismatchError) as error:
        Request(**options)
    assert str(error.value) == message


def test_keywords_take_the_place_of_fields(store: EmbeddingStore, tmp_path: Path) -> None:
    fill(store, node=0, round=5)
    selection = store.select()
    request = Request(height=SIZE, width=SIZE, steps=3, limit=2)
    pipeline = FakePipeline(save_random_flux(tmp_path / "flux"))
    made = generate(selection, tmp_path / "out", request, pipeline=pipeline, steps=2)
    assert (made.done, made.plan.settings.steps) == (2, 2)
    # `shard` is what `part` was called before.
    shares: list[dict[str, Any]] = [{"part": Part(1, 3)}, {"shard": Part(1, 3)}]
    parts = [
        generate(selection, tmp_path / "new", request, pipeline=pipeline, dry_run=True, **share)
        for share in shares
    ]
    assert parts[0].plan.items == parts[1].plan.items
    assert 0 < len(parts[0].plan.items) < len(selection)


def test_every_field_is_a_keyword_of_its_type() -> None:
    assert get_type_hints(RequestOptions) == get_type_hints(Request)
    assert not RequestOptions.__required_keys__


def test_type_checkers_see_wrong_keywords(store: EmbeddingStore, tmp_path: Path) -> None:
    # mypy, which checks the tests, complains of a comment that hides nothing.
    with pytest.raises(TypeError, match="'step'"):
        generate(store.select(), tmp_path, step=2)  # type: ignore[call-arg]
    with pytest.raises(SchemaMismatchError, match="^on_stale: "):
        generate(store.select(), tmp_path, on_stale="ask")  # type: ignore[arg-type]


def test_the_options_help_waits_for_nothing_heavy() -> None:
    code = (
        "import sys, fedgfe_store.cli.generate\n"
        "print(sorted({'torch', 'numpy', 'zarr', 'pandas'} & set(sys.modules)))"
    )
    out = finished([sys.executable, "-c", code])
    assert out.stdout == "[]\n"
