"""Memory that is not enough, and options that save or cost it: nothing finished is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import SMALL, fill
from generation_fakes import SIZE, FakePipeline, checksum
from pictures import provenance_of
from PIL import Image
from torch._dynamo.utils import counters

from fedgfe_store import EmbeddingStore
from fedgfe_store.errors import SchemaMismatchError
from fedgfe_store.generation import denoise as denoising
from fedgfe_store.generation.run import GenerationReport, generate
from fedgfe_store.generation.settings import Settings, seed_of
from fedgfe_store.models import devices, offload, quantization
from fedgfe_store.models.diffusers import DiffusersImages
from fedgfe_store.models.families import resolve_model
from fedgfe_store.models.placement import Placement, Sampling
from fedgfe_store.names import image_name
from fedgfe_store.selection import Selection


@pytest.fixture
def selection(tmp_path: Path) -> Selection:
    store = EmbeddingStore.create(tmp_path / "embeddings.zarr", SMALL)
    fill(store, node=0, round=5, n=5)
    return store.select()


class Cramped(FakePipeline):
    """Has memory for `denoises` images at once in denoising, and for `decodes` in decoding."""

    def __init__(
        self, folder: Path, *, denoises: int = 99, decodes: int = 99, tiles: int = 99, **kind: Any
    ) -> None:
        super().__init__(folder, **kind)
        self.denoises, self.decodes, self.tiles = denoises, decodes, tiles
        self.decode_sizes: list[tuple[int, bool]] = []
        self.refused: list[int] = []

    def denoise(
        self,
        embeddings: Mapping[str, torch.Tensor],
        seeds: Sequence[int],
        settings: Sampling,
        *,
        on_step: Callable[[], None],
    ) -> torch.Tensor:
        if len(seeds) > self.denoises:
            self.refused.append(len(seeds))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().denoise(embeddings, seeds, settings, on_step=on_step)

    def decode(self, latents: torch.Tensor, settings: Sampling, *, tiled: bool) -> list:
        self.decode_sizes.append((len(latents), tiled))
        if len(latents) > (self.tiles if tiled else self.decodes):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")
        return super().decode(latents, settings, tiled=tiled)


def make(selection: Selection, folder: Path, pipeline: Any, **options: Any) -> tuple:
    remarks: list[str] = []
    options = {"steps": 2, "height": SIZE, "width": SIZE, "batch_size": 8, **options}
    report = generate(selection, folder, pipeline=pipeline, report=remarks.append, **options)
    return report, [line for line in remarks if "offload" not in line]


def check_pictures(selection: Selection, folder: Path) -> None:
    t5, clip = selection.read("t5"), selection.read("clip")
    for row, key in enumerate(selection.keys()):
        expected = np.frombuffer(checksum(t5[row], clip[row], seed_of(0, key)), np.uint8)
        with Image.open(folder / image_name(key)) as image:
            assert (np.asarray(image) == expected).all()


def test_denoising_goes_on_in_half_the_batch_and_stays_there(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    pipeline = Cramped(flux, denoises=3)
    report, remarks = make(selection, tmp_path / "out", pipeline)
    assert (report.done, report.failed) == (10, ())
    assert pipeline.refused == [8, 4], "nothing is tried again that did not fit"
    assert pipeline.batch_sizes == [2, 2, 2, 2, 2]
    assert remarks == [f"out of memory: going on in batches of {size}" for size in (4, 2)]
    check_pictures(selection, tmp_path / "out")
    provenance = provenance_of(next((tmp_path / "out").glob("*.png")))
    assert provenance["batch_size"] == 2


def test_decoding_goes_on_in_slices_without_denoising_again(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    pipeline = Cramped(flux, decodes=2)
    report, remarks = make(selection, tmp_path / "out", pipeline)
    assert (report.done, report.failed) == (10, ())
    assert pipeline.batch_sizes == [8, 2]
    assert [size for size, _ in pipeline.decode_sizes] == [8, 4, 2, 2, 2, 2, 2]
    assert remarks == [f"out of memory: decoding in slices of {size}" for size in (4, 2)]
    check_pictures(selection, tmp_path / "out")


def test_a_group_of_offloaded_batches_survives_a_full_device(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    pipeline = Cramped(flux, denoises=2, decodes=1, batches_per_swap=3)
    report, _ = make(selection, tmp_path / "out", pipeline, batch_size=3)
    assert (report.done, report.failed) == (10, ())
    check_pictures(selection, tmp_path / "out")


@pytest.mark.slow
def test_tiles_are_used_on_request_only_and_the_picture_says_so(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    report, remarks = make(selection, tmp_path / "no", Cramped(flux, decodes=0, tiles=1))
    assert (report.done, len(report.failed)) == (0, 10)
    assert "--vae-tiling may help" in report.failed[0].reason
    assert "there is not enough memory" in report.failed[-1].reason
    assert not list((tmp_path / "no").glob("*.png"))
    pipeline = Cramped(flux, decodes=0, tiles=1)
    report, remarks = make(selection, tmp_path / "yes", pipeline, vae_tiling=True)
    assert (report.done, report.failed) == (10, ())
    assert remarks[-1] == "out of memory: decoding tile by tile, which changes pixels"
    assert sum(pipeline.batch_sizes) == 10
    check_pictures(selection, tmp_path / "yes")
    assert provenance_of(next((tmp_path / "yes").glob("*.png")))["tiled"] is True


def test_one_picture_that_does_not_fit_ends_the_run_and_keeps_what_is_done(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    class Shrinking(Cramped):
        """Somebody else fills the device meanwhile."""

        def denoise(self, *args: Any, **options: Any) -> torch.Tensor:
            self.denoises = 99 if len(self.batch_sizes) < 2 else 0
            return super().denoise(*args, **options)

    pipeline = Shrinking(flux)
    report, _ = make(selection, tmp_path / "out", pipeline, batch_size=2)
    assert (report.done, len(report.failed)) == (4, 6)
    remedy = "a machine with more memory or --dtype bfloat16 may help"
    assert report.failed[0].reason.endswith(remedy)
    assert pipeline.refused == [2, 1], "it would be a waste to go on"
    report, _ = make(selection, tmp_path / "out", FakePipeline(flux))
    assert (report.done, report.skipped) == (6, 4)


def test_what_is_denoised_of_a_group_is_decoded_whatever_ends_the_run(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    class Ending(Cramped):
        def __init__(self, error: Exception) -> None:
            super().__init__(flux, batches_per_swap=16)
            self._error = error

        def denoise(self, *args: Any, **options: Any) -> torch.Tensor:
            if len(self.batch_sizes) == 6:
                raise self._error
            return super().denoise(*args, **options)

    full = torch.OutOfMemoryError("CUDA out of memory.")
    report, _ = make(selection, tmp_path / "full", Ending(full), batch_size=1)
    assert (report.done, len(report.failed)) == (6, 4)
    with pytest.raises(OSError, match="disk is gone"):
        make(selection, tmp_path / "gone", Ending(OSError("disk is gone")), batch_size=1)
    assert len(list((tmp_path / "gone").glob("*.png"))) == 6


def test_a_swap_that_finds_no_room_leaves_both_modules_at_home() -> None:
    modules = {name: torch.nn.BatchNorm1d(3) for name in ("a", "b")}
    home = {n: [t.data_ptr() for t in m.parameters()] for n, m in modules.items()}
    full = False

    def put(tensor: torch.Tensor) -> torch.Tensor:
        if full and tensor.numel() == 3 and tensor.eq(0).all():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tensor.clone()

    swap = offload.Swap(modules, put)
    swap.bring("a")
    full = True
    with pytest.raises(torch.OutOfMemoryError):
        swap.bring("b")
    assert {n: [t.data_ptr() for t in m.parameters()] for n, m in modules.items()} == home
    full = False
    swap.bring("a")
    assert [t.data_ptr() for t in modules["a"].parameters()] != home["a"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 must have the same dtype"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_a_lack_of_memory(error: Exception, expected: bool) -> None:
    assert devices.is_out_of_memory(error) == expected


def test_a_real_allocation_that_fails_counts() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert devices.is_out_of_memory(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    class Broken(FakePipeline):
        def decode(self, *args: Any, **options: Any) -> list:
            raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        make(selection, tmp_path / "out", Broken(flux))


def test_the_cache_is_given_back_as_often_as_asked(
    flux: Path, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[str] = []
    monkeypatch.setattr(denoising, "clear_cache", cleared.append)
    make(selection, tmp_path / "out", FakePipeline(flux), batch_size=2, clear_cache_every=2)
    assert cleared == ["cpu", "cpu"]


def test_tiling_reaches_the_decoder_and_is_gone_afterwards(
    flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = DiffusersImages.load(resolve_model(str(flux)), Placement("float32", "cpu"))
    vae, settings = pipeline._pipeline.vae, Settings("", "", "float32", 1, 3.5, SIZE, SIZE)
    # As in the real models: the decoder itself would split only what is larger than this.
    vae.tile_latent_min_size, vae.tile_sample_min_size = SIZE // 4, SIZE
    seen: list[tuple[int, ...]] = []
    decode = vae.decoder.forward

    def watched(latents: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(tuple(latents.shape[-2:]))
        return decode(latents, *args)

    monkeypatch.setattr(vae.decoder, "forward", watched)
    latents = pipeline.draw([torch.Generator().manual_seed(0)], SIZE, SIZE)
    (tiled,) = pipeline.decode(latents, settings, tiled=True)
    assert len(seen) > 1
    assert max(seen) == (4, 4)
    seen.clear()
    (whole,) = pipeline.decode(latents, settings)
    assert seen == [(8, 8)]
    assert (vae.tile_latent_min_size, vae.tile_sample_min_size) == (SIZE // 4, SIZE)
    assert tiled is not None
    assert whole is not None
    assert tiled.shape == whole.shape


def test_the_last_batch_is_padded_where_the_model_is_compiled(
    flux: Path, selection: Selection, tmp_path: Path
) -> None:
    pipeline = FakePipeline(flux)
    pipeline.placement = Placement("float32", "cpu", compiled=True)
    report, _ = make(selection, tmp_path / "out", pipeline, batch_size=4)
    assert (report.done, report.failed) == (10, ())
    assert pipeline.batch_sizes == [4, 4, 4]
    check_pictures(selection, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_a_compiled_model_draws_the_same_and_is_compiled_once(
    flux: Path, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FluxTransformer2DModel

    compiled = FluxTransformer2DModel.compile_repeated_blocks
    monkeypatch.setattr(  # tracing is torch's own; making machine code would take a minute
        FluxTransformer2DModel,
        "compile_repeated_blocks",
        lambda self: compiled(self, backend="eager"),
    )
    torch._dynamo.reset()
    options: dict[str, Any] = {"model": str(flux), "batch_size": 4, "steps": 2, "device": "cpu"}
    generate(selection, tmp_path / "plain", height=SIZE, width=SIZE, **options)
    generate(selection, tmp_path / "compiled", height=SIZE, width=SIZE, compiled=True, **options)
    for path in (tmp_path / "plain").glob("*.png"):
        with Image.open(path) as plain, Image.open(tmp_path / "compiled" / path.name) as other:
            assert np.abs(np.asarray(plain).astype(int) - np.asarray(other)).max() <= 1
    assert counters["stats"]["unique_graphs"] == 2, "one for each kind of block"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "nf4"}, "quantize nf4: expected a CUDA device, got cpu"),
        ({"quantize": "int3"}, "quantize: expected nf4, fp8 or fp8-cast, got 'int3'"),
        ({"compiled": True, "offload": "group"}, "compile: expected offload auto or none or model"),
    ],
)
def test_speed_options_that_are_not_possible_are_refused_before_loading(
    flux: Path, selection: Selection, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SchemaMismatchError, match=message):
        generate(selection, tmp_path, model=str(flux), device="cpu", height=32, width=32, **options)


@pytest.mark.parametrize(
    ("name", "package", "capability", "compiled", "message"),
    [
        ("nf4", False, (9, 0), False, r"the package bitsandbytes \(pip install 'fedgfe-store\[nf4"),
        ("fp8", False, (9, 0), True, r"the package torchao \(pip install 'fedgfe-store\[fp8\]'\)"),
        ("fp8", True, (8, 6), True, r"capability 8\.9 or newer.*, got 8\.6"),
        ("fp8", True, (9, 0), False, "expected --compile too"),
        ("fp8", True, (9, 0), True, None),
        ("nf4", True, (7, 5), False, None),
    ],
)
def test_quantization_says_what_a_card_lacks(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    package: bool,
    capability: tuple[int, int],
    compiled: bool,
    message: str | None,
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: package or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "compiled": compiled}
    if message is None:
        assert quantization.check_quantization(name, **options) == name
        return
    with pytest.raises(SchemaMismatchError, match=message):
        quantization.check_quantization(name, **options)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_fp8_takes_no_other_dtype_than_torchao_does(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    options: dict[str, Any] = {"device": "cuda", "dtype": dtype, "compiled": True}
    with pytest.raises(SchemaMismatchError, match=f"expected dtype bfloat16, .* got {dtype}"):
        quantization.check_quantization("fp8", **options)
    assert quantization.check_quantization("nf4", **options) == "nf4"


@pytest.mark.parametrize("pinned", [True, False])
def test_group_offload_moves_layers_where_the_host_has_no_memory_to_pin(
    monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """What diffusers is asked for; it does the rest on a GPU only."""
    asked: dict[str, Any] = {}
    network = torch.nn.Linear(1000, 100)
    monkeypatch.setattr(network, "enable_group_offload", asked.update, raising=False)
    pipeline = SimpleNamespace(vae=torch.nn.Linear(1, 1))
    monkeypatch.setattr(pipeline.vae, "to", lambda device: asked.update(vae=device), raising=False)
    placement = Placement("bfloat16", "cuda:1", "group", pinned=pinned)
    offload.offload_blocks(pipeline, network, placement)
    device = torch.device("cuda:1")
    assert asked == {
        "onload_device": device,
        "offload_type": "block_level" if pinned else "leaf_level",
        "num_blocks_per_group": 1 if pinned else None,
        "use_stream": True,
        "low_cpu_mem_usage": not pinned,
        "vae": device,
    }


def test_resident_blocks_are_out_of_sight_while_the_others_get_their_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))
    network.last = torch.nn.Linear(2, 2)
    before: list[torch.nn.Module] = list(network.blocks)
    seen: list[Any] = []
    monkeypatch.setattr(
        network,
        "enable_group_offload",
        lambda **_: seen.extend(name for name, _ in network.named_modules()),
        raising=False,
    )
    # Of the kinds that are no CPU only meta is on every machine.
    placement = Placement("float32", "meta", "group", resident=("blocks.0", "blocks.2"))
    offload.offload_blocks(SimpleNamespace(vae=torch.nn.Linear(1, 1)), network, placement)
    assert seen == ["", "blocks", "blocks.0", "blocks.1", "last"]
    assert list(network.blocks) == before
    assert [block.weight.is_meta for block in before] == [True, False, True, False]


def test_a_report_counts_what_failed(flux: Path, selection: Selection, tmp_path: Path) -> None:
    report, _ = make(selection, tmp_path / "out", Cramped(flux, denoises=0))
    assert isinstance(report, GenerationReport)
    assert (report.done, report.left, len(report.failed)) == (0, 0, 10)


def test_a_black_picture_is_a_failure(flux: Path, selection: Selection, tmp_path: Path) -> None:
    class Black(FakePipeline):
        def decode(self, latents: torch.Tensor, *args: Any, **options: Any) -> list:
            pictures = super().decode(latents, *args, **options)
            return [
                np.zeros_like(picture) if n == 1 else picture for n, picture in enumerate(pictures)
            ]

    report, _ = make(selection, tmp_path / "out", Black(flux))
    assert (report.done, len(report.failed)) == (8, 2)
    assert all("black all over" in failure.reason for failure in report.failed)
    assert not (tmp_path / "out" / image_name(selection.keys()[1])).exists()


def test_swapping_over_and_over_holds_no_memory(flux: Path) -> None:
    pipeline = DiffusersImages.load(resolve_model(str(flux)), Placement("float32", "cpu", "model"))
    parts = {"transformer": pipeline._pipeline.transformer, "vae": pipeline._pipeline.vae}
    pipeline._swap = offload.Swap(parts, torch.clone)  # as to a device of its own
    settings = Settings("", "", "float32", 1, 3.5, SIZE, SIZE)
    weights = sum(t.nbytes for part in parts.values() for t in part.parameters())
    embeddings = {"prompt_embeds": torch.zeros(1, 3, 8), "pooled_prompt_embeds": torch.zeros(1, 4)}
    held = []
    for _ in range(50):
        pipeline.decode(pipeline.denoise(embeddings, [0], settings), settings)
        held.append(psutil.Process().memory_info().rss)
    assert held[-1] - held[9] < 3 * weights, "one call's copies, not forty calls'"
