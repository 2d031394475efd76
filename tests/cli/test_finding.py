"""Which store a command takes where none is named, and options before or behind the command."""

from __future__ import annotations

from pathlib import Path

import legacy
import pytest
from click.testing import CliRunner
from conftest import SMALL, fill

from fedgfe_store import EmbeddingStore
from fedgfe_store.cli.main import group
from fedgfe_store.recording.fedgfe import EmbeddingClientMixin

OWN = Path("embeddings.zarr")
TRAINED = Path("checkpoints/embeddings/embeddings.zarr")
TAKEN = f"note: the store is {TRAINED}\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDGFE_STORE", raising=False)


def run(*words: object):
    return CliRunner().invoke(group, list(map(str, words)))


def found(*words: object) -> tuple[int, str]:
    """Return how many records `query` lists, and what it says beside them."""
    result = run(*words, "query", "--format", "csv")
    assert result.exit_code == 0, result.output
    return len(result.stdout.splitlines()) - 1, result.stderr


def made(path: Path, *, n: int = 3) -> Path:
    """Make a store of `n` records, or an empty one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    store = EmbeddingStore.create(path, SMALL)
    if n:
        fill(store, node=0, round=5, n=n, classes="dog")
    return path


def test_generate_takes_what_the_mixins_recorded():
    class Client(EmbeddingClientMixin):
        id = 0

        def iter_embeddings(self, split):
            t5, clip = legacy.tensors(2)
            yield {"class_name": ["dog", "drum"], "t5": t5, "clip": clip}

    assert Client().save_embeddings_to_checkpoint(split="train", round_num=5) == TRAINED
    result = run("generate", "--round", 5, "--model", "tiny", "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(TAKEN)
    assert result.stdout.startswith(f"records: 2 of {TRAINED}, commit 1\n")


def test_what_is_named_comes_first_then_the_folders_own_store(monkeypatch):
    made(OWN, n=1)
    made(TRAINED, n=2)
    other, third = made(Path("other.zarr"), n=3), made(Path("third.zarr"), n=4)
    assert found() == (1, "")
    monkeypatch.setenv("FEDGFE_STORE", str(other))
    assert found() == (3, "")
    assert found("--store", third) == (4, "")


def test_an_empty_store_is_named_and_not_taken():
    made(OWN, n=0)
    assert run("info").stderr == ""
    made(TRAINED, n=2)
    assert found() == (2, f"note: {OWN} holds no records\n{TAKEN}")
    # With none that holds records, it is the folder's own as ever.
    EmbeddingStore.open(TRAINED).delete(node="0")
    assert found("-q")[0] == 0


def test_of_several_none_is_taken():
    runs = [made(Path(f"checkpoints/embeddings/run {n}/embeddings.zarr"), n=n) for n in (1, 2)]
    result = run("info")
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "error: 2 stores are here: say which one",
        f"  --store '{runs[0]}'   1 record, rounds 5, experiment -",
        f"  --store '{runs[1]}'   2 records, rounds 5, experiment -",
    ]
    made(OWN, n=0)  # the same, with one more that is no choice
    assert run("info").output == result.output


@pytest.mark.parametrize("folder", [".", "checkpoints", "checkpoints/embeddings"])
def test_a_folder_that_holds_one_store_names_it(folder):
    made(TRAINED, n=2)
    count, said = found("--store", folder)
    assert count == 2
    assert said.startswith("note: the store is ")
    made(Path(folder) / "one.zarr")
    if folder == "checkpoints/embeddings":
        assert "2 stores are here" in run("--store", folder, "info").output
    else:  # what lies in it directly
        assert found("--store", folder)[0] == 3


def test_a_damaged_store_is_not_passed_over():
    made(OWN, n=1)
    made(TRAINED, n=2)
    (OWN / "zarr.json").write_text("{")
    result = run("info")
    assert result.exit_code == 1
    assert str(OWN) in result.output
    assert str(TRAINED) not in result.output


def test_import_adds_to_the_store_that_training_wrote():
    legacy.node_file(TRAINED.parent, 0, n=2)
    assert run("--store", TRAINED, "import", TRAINED.parent).exit_code == 0
    legacy.node_file(TRAINED.parent, 1, n=2)
    result = run("import", TRAINED.parent)
    assert result.exit_code == 0, result.output
    assert result.stderr == TAKEN
    assert not OWN.exists()
    assert len(EmbeddingStore.open(TRAINED)) == 4


def test_import_says_where_the_experiment_is_as_well():
    legacy.node_file(TRAINED.parent, 0, n=2)
    assert run("--store", TRAINED, "import", TRAINED.parent).stderr == ""
    note = (
        f"note: {TRAINED} holds 2 records of experiment vegas, too: --store {TRAINED} imports "
        f"there, merge makes one of both\n"
    )
    assert run("--store", "copy.zarr", "import", TRAINED.parent).stderr == note
    assert run("--store", "copy.zarr", "import", TRAINED.parent).stderr == ""  # nothing new
    assert run("--store", "x.zarr", "import", TRAINED.parent, "--dry-run").stderr == ""


def test_init_and_merge_make_the_folders_own_store():
    runs = [made(Path(f"checkpoints/{n}/embeddings.zarr"), n=n) for n in (1, 2)]
    assert run("merge", *runs, "--if-exists", "skip").exit_code == 0
    assert len(EmbeddingStore.open(OWN)) == 2
    assert "cannot make a store at embeddings.zarr" in run("init").output


def test_options_of_all_commands_stand_before_or_behind_them():
    one, two = made(Path("one.zarr"), n=1), made(Path("two.zarr"), n=2)
    before = run("--store", two, "--quiet", "verify")
    assert before.output == run("verify", "--store", two, "--quiet").output
    assert "2 records" in before.output
    assert run("--store", two, "info", "--store", two).exit_code == 0
    both = run("--store", one, "info", "--store", two)
    assert both.exit_code == 2
    assert "--store: expected one, got one.zarr and two.zarr" in both.output
