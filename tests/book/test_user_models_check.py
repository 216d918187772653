"""What headers, configurations and rows show is refused by `check`, in the words of `merge`."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from divmerge_book import __main__
from divmerge_book.user_models import memory, save
from helpers import forbid
from local_files import (
    LABELS,
    ROWS,
    changed,
    configured,
    make_adapter,
    toy_rows,
    with_fields,
    write_rows,
)


def copied(project: Path, folder: Path, spoil: Callable[[Path], None], *, base: bool = False):
    """The project with its base, or its first expert, spoiled in a copy."""
    own = project.parent / ("base" if base else "experts/mood")
    spoil(Path(shutil.copytree(own, folder / "spoiled")))
    target = str(folder / "spoiled")
    return with_fields(project, base=target) if base else changed(project, 0, expert=target)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def wordless(folder: Path) -> None:
    for file in (*folder.glob("tokenizer*"), *folder.glob("vocab*")):
        file.unlink()


def bare(folder: Path, name: str) -> None:
    wordless(folder)
    (folder / name).write_text("{}")


def rows(project: Path, folder: Path, split: str, *edits: dict) -> Path:
    """The project with other rows in one split of its first task."""
    file = write_rows(folder / f"{split}.jsonl", [*toy_rows("mood")[split], *edits])
    return changed(project, 0, **{split: str(file)})


def with_dora(project: Path, folder: Path) -> Path:
    make_adapter(folder / "lora", {"bert.pooler.dense": (32, 32)}, use_dora=True)
    return changed(project, 0, expert=str(folder / "lora"))


def same(project: Path, folder: Path) -> Path:
    return project


wider = partial(configured, hidden_size=64)
BROKEN = {  # name -> (what is spoiled, words of the message[, options of both commands])
    "field": (lambda project, _: with_fields(project, layers=3), "layers"),
    "path": (lambda project, _: changed(project, 0, expert="nowhere"), "does not exist"),
    "words": (partial(copied, spoil=wordless, base=True), "has no tokenizer"),
    "no words": (partial(copied, spoil=partial(bare, name="tokenizer_config.json")), "no words"),
    "pieces": (partial(copied, spoil=partial(bare, name="spiece.model")), "has no words"),
    "download": (partial(copied, spoil=cut), "is no whole safetensors file but damaged"),
    "size": (partial(copied, spoil=wider), "has hidden_size = 64"),
    "order": (lambda p, _: changed(p, 0, labels=LABELS["mood"][::-1]), "in another order"),
    "column": (lambda p, _: changed(p, 0, columns={"text": "sentence"}), "has no column sentence"),
    "label": (lambda *where: rows(*where, "test", {"text": "a cat", "label": "odd"}), "'odd'"),
    "shared": (
        lambda *where: rows(*where, "validation", toy_rows("mood")["test"][0]),
        "stand in validation and in test",
    ),
    "no rows": (lambda project, _: changed(project, 0, merge=None), "reads unlabelled inputs"),
    "method": (same, "did you mean 'ties'", "--method tiess"),
    "option": (same, "no such options ['rate']", "--set rate=1"),
    "range": (same, "keep must be", "--method ties --set keep=7.5"),
    "rate": (same, "lr above 0 and finite, got 4 and -1", "--set lr=-1"),
    "passes": (same, "epochs must be 1 or more", "--set epochs=0"),
    "inputs": (same, "inputs must be 1 or more per task, got 0", "--set inputs=0"),
    "start": (same, "init is [1, 2]", "--set init=[1,2]"),
    "reach": (same, "softmax 1/T = 0.5", "--set link=softmax --set init=0.3"),
    "temperature": (same, "temperature must be above 0", "--set temperature=-2"),
    "nested": (same, "scale must be finite", "--method lines --set options={'scale':1e999}"),
    "strange": (same, "unexpected keyword argument 'lr'", "--method lines --set options={'lr':2}"),
    "storage": (lambda p, _: with_fields(p, storage="low_rank"), "is a whole model; take int8"),
    "adapter": (with_dora, "use_dora=True is more than plain LoRA"),
    "device": (same, "no device 'tpu' here", "--device tpu"),
    "idle device": (
        lambda p, _: changed(changed(p, 0, **dict.fromkeys(ROWS)), 1, **dict.fromkeys(ROWS)),
        "no device 'tpu' here",
        "--method average --device tpu",
    ),
    "precision": (same, "precision must be auto, float32 or bfloat16", "--precision int4"),
    "memory": (same, "the merge needs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_refuses_what_merge_would_and_says_the_same(
    project, tmp_path, monkeypatch, capsys, name
):
    spoil, words, *options = BROKEN[name]
    monkeypatch.setattr(save, "load", forbid)  # weights are not read
    if name == "memory":
        monkeypatch.setattr(memory, "room", lambda place: (10**6, 10**6))
    path, told = spoil(project, tmp_path), []
    for command in (["check", str(path)], ["merge", str(path), str(tmp_path / "merged")]):
        capsys.readouterr()
        assert __main__.main([*command, *" ".join(options).split()]) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1] and words in told[0], told
    assert not (tmp_path / "merged").exists()
