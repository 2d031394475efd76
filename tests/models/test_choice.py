"""Where weights lie and which batch a run has: chosen from sizes, for every machine of a table."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from benchmarks.full_size import save
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation import placing
from fedgfe_store.generation.placing import load_of
from fedgfe_store.generation.request import Request
from fedgfe_store.generation.settings import Settings
from fedgfe_store.models.blocks import Blocks
from fedgfe_store.models.choice import Choice, Load, Memory, choose
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.model import Model
from fedgfe_store.models.placement import Placement, possible_offloads

GIB = 2**30
CARDS = (8, 12, 16, 20, 22.5, 24, 32, 48, 80)
HOSTS = (16, 32, 64, 128)
MODES = possible_offloads(compiled=False, quantization=None)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """FLUX.1-dev at full size, of sparse files."""
    return resolve_model(str(save("flux-dev", tmp_path_factory.mktemp("models") / "flux-dev")))


@pytest.fixture(scope="module")
def load(dev: Model) -> Load:
    return load_of(dev, Settings("dev", "", "bfloat16", 28, 3.5, 1024, 1024), 512)


def on(load: Load, card: float, host: float, **options: object) -> Choice | None:
    memory = Memory(int(card * GIB), int(host * GIB), exact=True)
    return choose(load, memory, **{"modes": MODES, **options})  # type: ignore[arg-type]


def test_blocks_are_those_that_the_network_has(load: Load) -> None:
    doubles = [name for name in load.blocks.tensors if name.startswith("transformer_blocks.")]
    singles = [name for name in load.blocks.tensors if name.startswith("single_transformer_")]
    assert (len(doubles), len(singles), len(load.blocks.tensors)) == (19, 38, 57)
    total = sum(load.blocks.sizes.values()) + load.blocks.rest
    assert total == 2 * 11_901_408_320
    moving = load.blocks.moving(6)
    assert set(moving) <= set(singles)
    numbers = [int(name.rpartition(".")[2]) for name in moving]
    assert min(b - a for a, b in itertools.pairwise(numbers)) == 6, "far apart"
    assert set(load.blocks.moving(38)) == set(singles)
    assert set(load.blocks.moving(57)) == set(load.blocks.tensors)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("card", CARDS)
def test_flux_has_a_plan_within_the_memory_of_every_machine(
    load: Load, card: float, host: float
) -> None:
    found = on(load, card, host)
    assert found is not None
    assert found.device <= card * GIB
    assert found.host <= host * GIB
    assert found.decode_size == 1


def test_more_memory_is_never_slower(load: Load) -> None:
    for host in HOSTS:
        seconds = [on(load, card, host).seconds for card in CARDS]  # type: ignore[union-attr]
        assert all(b <= a * 1.016 for a, b in itertools.pairwise(seconds))
    assert on(load, 80, 16).offload == "none"  # type: ignore[union-attr]


@pytest.mark.parametrize("free", [21.8, 22.5, 22.9])
def test_a_card_of_24_gb_keeps_most_blocks_where_it_moved_all(load: Load, free: float) -> None:
    found = on(load, free, 32)
    assert found is not None
    assert found.offload == "group"
    moved = sum(load.blocks.sizes[name] for name in found.moving)
    assert moved < 0.25 * 22.17 * GIB
    alone = on(load, free, 32, batch_size=1)
    assert alone is not None
    assert sum(load.blocks.sizes[name] for name in alone.moving) < 0.15 * 22.17 * GIB


def test_what_moves_is_hidden_behind_the_work_of_a_larger_batch(load: Load) -> None:
    small, whole = on(load, 8, 64), on(load, 8, 64, partial_residency=False)
    assert small is not None
    assert whole is not None
    assert small.batch_size > 1
    alone = on(load, 8, 64, batch_size=1)
    assert alone is not None
    assert small.seconds < 0.5 * alone.seconds


def test_a_host_that_is_short_has_layers_moved_instead_of_pinned_blocks(load: Load) -> None:
    short, enough = on(load, 8, 16), on(load, 8, 32)
    assert short is not None
    assert enough is not None
    assert (short.pinned, enough.pinned) == (False, True)
    assert short.host == 0, "layers are pages of the files"
    rounded = choose(load, Memory(8 * GIB, 32 * GIB, exact=False), modes=MODES)
    assert rounded is not None
    assert not rounded.pinned, "rounded to powers of two the blocks take 34 GiB"


def test_weights_that_have_to_be_converted_count_on_the_host(load: Load) -> None:
    other = replace(load, converted=True)
    assert on(other, 80, 16) is None
    found = on(other, 80, 32)
    assert found is not None
    assert found.host == pytest.approx(22.3 * GIB, rel=0.01)


def test_nothing_is_chosen_that_does_not_fit(load: Load) -> None:
    assert on(load, 2, 64) is None
    found = on(load, 22.5, 64, modes=("none", "model"))
    assert found is None
    assert on(load, 24, 64, modes=("none", "model"), batch_size=1).offload == "model"  # type: ignore[union-attr]


def test_a_plan_that_is_asked_for_moves_all_blocks(load: Load) -> None:
    found = on(load, 22.5, 64, modes=("group",), partial_residency=False)
    assert found is not None
    assert len(found.moving) == 57


def test_a_small_network_has_no_blocks_to_move() -> None:
    assert Blocks.of({"conv_in.weight": 4, "mid_block.a.0.weight": 8}) == Blocks({}, 12, 8)


def test_what_is_cast_after_loading_is_on_the_host_as_it_was_loaded(dev: Model) -> None:
    stored = Settings("dev", "", "bfloat16", 28, 3.5, 1024, 1024, quantization="fp8-cast")
    found = on(load_of(dev, stored, 512), 16, 16)
    assert found is not None
    assert found.host == pytest.approx(11.2 * GIB, rel=0.02), "half of the weights"
    # Files of bfloat16 are converted to float16 first, and then cast.
    assert on(load_of(dev, replace(stored, dtype="float16"), 512), 16, 16) is None
    assert on(load_of(dev, replace(stored, dtype="float16"), 512), 16, 32) is not None
    packed = replace(stored, dtype="float16", quantization="nf4")
    found = on(load_of(dev, packed, 512), 12, 16, modes=("none",))
    assert found is not None
    assert found.host == 0


def test_a_refusal_names_what_fits(monkeypatch: pytest.MonkeyPatch, dev: Model) -> None:
    memory = {"free": 16 * GIB, "host": 16 * GIB}
    monkeypatch.setattr(placing, "free_bytes", lambda device: memory["free"])
    monkeypatch.setattr(placing, "free_host_bytes", lambda processes: memory["host"])
    settings = Settings("dev", "", "float16", 28, 3.5, 1024, 1024)
    placement = Placement("float16", "cuda:0")
    with pytest.raises(SchemaMismatchError, match=r"22\.3 GiB of the host") as caught:
        placing.place(Request(), dev, settings, 512, placement)
    assert "--dtype bfloat16, as the files are, fits or --quantize nf4 fits" in str(caught.value)
    forced = Request(offload="sequential")
    assert placing.place(forced, dev, settings, 512, placement)[0].offload == "sequential"
    stored = replace(settings, dtype="bfloat16")
    found, size, remark = placing.place(Request(), dev, stored, 512, placement)
    assert (found.offload, found.pinned, len(found.resident), size) == ("group", True, 20, 4)
    assert remark == "offload: group, 20 of 57 blocks stay on the device"
    memory["free"] = 2 * GIB
    with pytest.raises(SchemaMismatchError, match="--height 512 --width 512 fits"):
        placing.place(Request(), dev, stored, 512, placement)
